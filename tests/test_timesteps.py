"""Which timesteps training sees: the law of the draws, and weights that leave the mean of the loss as it is."""

import math
from collections import deque

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timesteps import ImportanceSampler

# Timesteps by importance


def test_importance_sampling_begins_evenly_and_then_follows_the_root_mean_square_loss():
    sampler = ImportanceSampler(4)
    sizes = torch.tensor([1.0, 2.0, 3.0, 10.0])
    for i in range(10):
        assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25).double())
        sampler.update(torch.arange(4), sizes * (2 if i % 2 else 1))
    expected = 0.999 * sizes / sizes.sum() + 0.001 / 4  # the mean of squares is 2.5 times the sizes' for each
    torch.testing.assert_close(sampler.probabilities(), expected.double())
    sampler.update(torch.arange(4).repeat(10), torch.ones(40))  # only the last ten count, also within one batch
    torch.testing.assert_close(sampler.probabilities(), torch.full((4,), 0.25).double())


def test_importance_weights_leave_the_mean_and_lower_its_spread():
    torch.manual_seed(0)
    sampler = ImportanceSampler(50)
    sizes = torch.arange(1, 51).double() ** -2.0
    for _ in range(10):
        sampler.update(torch.arange(50), sizes)
    t, weights = sampler.sample(200_000)
    estimates = weights * sizes[t]
    error = estimates.std().item() / math.sqrt(200_000)
    assert estimates.mean().item() == pytest.approx(sizes.mean().item(), abs=4 * error)
    even = sizes[torch.randint(50, (200_000,))]
    assert estimates.std() < 0.1 * even.std() and t.unique().numel() == 50


def test_importance_sampling_never_leaves_a_timestep_out_and_remembers_itself():
    sampler = ImportanceSampler(3)
    sampler.update(torch.arange(3).repeat(12), torch.tensor([0.0, 1.0, 1.0]).repeat(12))
    assert sampler.probabilities()[0].item() == pytest.approx(0.001 / 3)
    sampler.update(torch.tensor([1, 1, 2]), torch.tensor([5.0, 6.0, 7.0]))
    assert sampler.counts.tolist() == [12, 14, 13]
    assert sorted(sampler.losses[1].tolist())[-2:] == [5.0, 6.0] and sampler.losses[2].max() == 7
    twin = ImportanceSampler(3)
    twin.load_state_dict(sampler.state_dict())
    assert torch.equal(twin.probabilities(), sampler.probabilities())
    with torch.no_grad():
        twin.update(torch.tensor([0]), torch.tensor([9.0], requires_grad=True))
    assert not twin.losses.requires_grad


def test_importance_sampling_survives_losses_of_zero_and_losses_that_are_not_finite():
    sampler = ImportanceSampler(2)
    sampler.update(torch.arange(2).repeat(10), torch.zeros(20))
    assert sampler.probabilities().tolist() == [0.5, 0.5]
    assert sampler.sample(100)[1].tolist() == [1.0] * 100
    t, losses = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([math.nan, 3.0, math.inf, 1.0, -math.inf])
    sampler.update(t, losses)
    assert sampler.counts.tolist() == [11, 11]
    assert sampler.losses.tolist() == [[3.0] + [0.0] * 9, [1.0] + [0.0] * 9]
    assert sampler.probabilities().tolist() == pytest.approx([0.999 * 3 / 4 + 0.0005, 0.999 / 4 + 0.0005])
    never = ImportanceSampler(2)
    never.update(torch.arange(2).repeat(10), torch.tensor([math.nan, 1.0]).repeat(10))
    assert never.counts.tolist() == [0, 10] and never.probabilities().tolist() == [0.5, 0.5]


def test_importance_sampling_keeps_the_last_ten_of_each_timestep():
    """Against a plain queue, in batches with up to all of one timestep, and with losses that are not finite."""
    sampler, queues = ImportanceSampler(4), [deque(maxlen=10) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for n in (1, 5, 30, 64, 3, 100, 7):
        t = torch.randint(4, (n,), generator=generator) ** 2 // 3  # 0, 0, 1, 3
        losses = torch.rand(n, generator=generator, dtype=torch.float64)
        losses[torch.rand(n, generator=generator) < 0.2] = math.nan
        sampler.update(t, losses)
        for i, loss in zip(t.tolist(), losses.tolist()):
            if math.isfinite(loss):
                queues[i].append(loss)
        for kept, queue in zip(sampler.losses.tolist(), queues):
            assert sorted(kept) == sorted([*queue] + [0.0] * (10 - len(queue)))


def test_importance_sampling_writes_no_place_twice_and_does_not_wait_for_the_gpu():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.index_put_.default:
                places.extend(zip(*(index.tolist() for index in args[1])))
            return function(*args, **kwargs or {})

    places, sampler = [], ImportanceSampler(3)
    t = torch.arange(3).repeat(25)
    with Watch():
        sampler.update(t, torch.rand(75))
    places = [place for place in places if place[1] < 10]  # without the spare ones
    assert len(places) == len(set(places)) == 30
    on_meta = ImportanceSampler(3).to("meta")  # where whatever depends on values fails
    on_meta.update(t.to("meta"), torch.rand(75, device="meta"))
    assert on_meta.probabilities().is_meta
