"""Which timesteps training sees: the law of the draws, and weights that leave the mean of the loss as it is."""

import math
from collections import deque
from statistics import NormalDist

import pytest
import torch
from test_diffusion import gaussian
from test_likelihood import pixels
from torch.utils._python_dispatch import TorchDispatchMode

from timesteps import ImportanceSampler, make_timesteps


@pytest.mark.parametrize(
    "sampling, std", [("uniform", None), ("logit-normal", 0.6), ("logit-normal", 2.0)]
)
def test_draws_follow_their_law(sampling, std):
    torch.manual_seed(0)
    timesteps = make_timesteps(sampling, 1000, std or 0.3)
    t, weights = timesteps.sample(20_000)
    timesteps.update(t, torch.rand(20_000))
    assert t.dtype == torch.long and weights.dtype == torch.float32 and (weights == 1).all()
    assert t.min() >= 0 and (900 if std == 0.6 else 970) < t.max() < 1000
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        below = NormalDist(0, std).cdf(math.log(share / (1 - share))) if std else share
        assert (t < 1000 * share).double().mean() == pytest.approx(
            below, abs=0.015
        )  # 4 standard deviations
    assert timesteps.state_dict() == {}


def test_an_unknown_sampling_is_one_line():
    with pytest.raises(
        ValueError, match="timestep_sampling 'normal': expected 'uniform' or 'logit-normal' or 'imp"
    ):
        make_timesteps("normal", 10)


def test_the_bound_is_what_is_trained_by_uniform_and_importance_sampled_timesteps_alone():
    """Weights of 1 at logit-normal timesteps minimise something else: train_eval.py refuses them with 'vlb'."""
    ddpm, x0 = gaussian(num_timesteps=20, loss="vlb"), pixels(500)
    bits = ddpm.bits_per_dim(x0, seed=1)
    torch.manual_seed(0)
    means = {}
    for sampling in ("uniform", "importance", "logit-normal"):
        timesteps, losses = make_timesteps(sampling, 20), []
        for _ in range(40):
            t, weights = timesteps.sample(500)
            found = ddpm(x0, t=t, reduction="none")
            timesteps.update(t, found)
            losses.append((weights * found).mean())
        means[sampling] = torch.stack(losses).mean().item()
    assert means["uniform"] == pytest.approx(bits.kl + bits.decoder, rel=0.05)
    assert means["importance"] == pytest.approx(bits.kl + bits.decoder, rel=0.05)
    assert means["logit-normal"] < 0.8 * (bits.kl + bits.decoder)


# Timesteps by importance


def test_importance_sampling_begins_evenly_and_then_follows_the_root_mean_square_loss():
    sampler = ImportanceSampler(4)
    sizes = torch.tensor([1.0, 2.0, 3.0, 10.0])
    for i in range(10):
        assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25).double())
        sampler.update(torch.arange(4), sizes * (2 if i % 2 else 1))
    expected = (
        0.999 * sizes / sizes.sum() + 0.001 / 4
    )  # the mean of squares is 2.5 times the sizes' for each
    torch.testing.assert_close(sampler.probabilities(), expected.double())
    sampler.update(
        torch.arange(4).repeat(10), torch.ones(40)
    )  # only the last ten count, also within one batch
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
    t, losses = (
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([math.nan, 3.0, math.inf, 1.0, -math.inf]),
    )
    sampler.update(t, losses)
    assert sampler.counts.tolist() == [11, 11]
    assert sampler.losses.tolist() == [[3.0] + [0.0] * 9, [1.0] + [0.0] * 9]
    assert sampler.probabilities().tolist() == pytest.approx(
        [0.999 * 3 / 4 + 0.0005, 0.999 / 4 + 0.0005]
    )
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
