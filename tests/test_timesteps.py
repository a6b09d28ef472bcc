"""Which timesteps training sees: the law of the draws, and weights that keep the mean loss."""

import math
from collections import deque
from statistics import NormalDist

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timesteps import ImportanceSampler, make_timesteps


@pytest.mark.parametrize("std", [0, 0.6, 2])
def test_draws_follow_their_law(std):
    sampling = "logit-normal" if std else "uniform"
    torch.manual_seed(0)
    t, weights = make_timesteps(sampling, 1000, std).sample(20_000)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < 1000
    assert weights.shape == (20_000,) and (weights == 1).all()
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9):
        normal = NormalDist(0, std or 1).cdf(math.log(share / (1 - share)))
        clean = math.log(1000 * share + 1, 1000)
        below = share if sampling == "uniform" else 0.98 * normal + 0.02 * clean
        deviation = math.sqrt(below * (1 - below) / 20_000)
        assert (t < 1000 * share).double().mean() == pytest.approx(below, abs=4 * deviation)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal", "importance"])
def test_all_timesteps_are_drawn_and_none_beyond_the_last(sampling):
    torch.manual_seed(0)  # with a std this large a sigmoid rounds to 1
    t, weights = make_timesteps(sampling, 3, std=20.0).sample(1000)
    assert t.unique().tolist() == [0, 1, 2] and weights.shape == (1000,)


def test_importance_begins_evenly_and_then_follows_the_root_mean_square_loss():
    sampler, sizes = ImportanceSampler(4), torch.tensor([1.0, 2.0, 3.0, 10.0])
    even = torch.full((4,), 0.25).double()
    sampler.update(torch.zeros(10, dtype=torch.int64), torch.ones(10))  # ten of one are not enough
    for i in range(10):
        assert torch.equal(sampler.probabilities(), even)
        # the root mean square is that of 1 and 2 times each size, but the mean is not
        sampler.update(torch.arange(4), sizes * torch.tensor([1, 1, 1, 1 + i % 2]))
    root_mean_square = sizes * torch.tensor([1, 1, 1, math.sqrt(2.5)])
    expected = 0.999 * root_mean_square / root_mean_square.sum() + 0.001 / 4
    twin = ImportanceSampler(4)
    twin.load_state_dict(sampler.state_dict())
    torch.testing.assert_close(twin.probabilities(), expected.double())
    for alike in (1.0, 0.0):  # only the last ten count
        sampler.update(torch.arange(4).repeat(10), torch.full((40,), alike))
        torch.testing.assert_close(sampler.probabilities(), even)


def test_importance_weights_keep_the_mean_and_lower_its_spread():
    torch.manual_seed(0)
    sampler, sizes = ImportanceSampler(50), torch.arange(1, 51).double() ** -2.0
    for _ in range(10):
        sampler.update(torch.arange(50), sizes)
    t, weights = sampler.sample(200_000)
    estimates = weights * sizes[t]
    error = estimates.std().item() / math.sqrt(200_000)
    assert estimates.mean().item() == pytest.approx(sizes.mean().item(), abs=4 * error)
    assert estimates.std() < 0.1 * sizes.std() and weights.dtype == torch.float32


def test_importance_keeps_the_last_ten_finite_losses_of_each_timestep():
    """Against a plain queue, in batches with up to all of one timestep."""
    sampler, queues = ImportanceSampler(4), [deque(maxlen=10) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for n in (1, 5, 30, 64, 3, 100, 7):
        t = torch.randint(4, (n,), generator=generator) ** 2 // 3  # 0, 0, 1, 3
        losses = torch.rand(n, generator=generator, dtype=torch.float64)
        losses[torch.rand(n, generator=generator) < 0.1] = math.nan
        losses[torch.rand(n, generator=generator) < 0.1] = -math.inf
        sampler.update(t, losses.requires_grad_())
        assert not sampler.losses.requires_grad
        for i, loss in zip(t.tolist(), losses.tolist()):
            if math.isfinite(loss):
                queues[i].append(loss)
        for kept, queue in zip(sampler.losses.tolist(), queues):
            assert sorted(kept) == sorted([*queue] + [0.0] * (10 - len(queue)))


def test_importance_writes_no_place_twice():
    """Two writes to one place have no defined winner there."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.index_put_.default:
                places.extend(zip(*(index.tolist() for index in args[1])))
            return function(*args, **kwargs or {})

    places, sampler, t = [], ImportanceSampler(3), torch.arange(3).repeat(25)
    with Watch():
        sampler.update(t, torch.rand(75))
    places = [place for place in places if place[1] < sampler.HISTORY]  # without the spare ones
    assert len(places) == len(set(places)) == 30
