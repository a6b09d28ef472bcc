"""The variational bound, held to closed forms.

The data are independent normal pixels, N(MEAN, STD^2), on 8-bit levels, and the network is exact:
the bound must come down to the entropy of the data, and never below it.
"""

import math
from functools import partial

import pytest
import torch
from tiny import MEAN, STD, gaussian

from likelihood import discrete_log_likelihood

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
gaussian = partial(gaussian, prediction="x0")


def pixels(n, seed=0):
    """n images of the data, (n, 1, 8, 8)."""
    x0 = MEAN + STD * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return ((x0 + 1) * 127.5).round() / 127.5 - 1


def entropy_of(x0):
    """-log2 of the density of these very images times the width of a level, per dimension."""
    squares = ((x0.double() - MEAN) / STD).square().mean().item()
    nats = squares / 2 + math.log(STD * math.sqrt(2 * math.pi))
    return nats / math.log(2) - math.log2(2 / 255)


# The decoder


def test_the_decoder_is_the_normal_distribution_on_levels():
    mean, std = torch.tensor([-1.3, -1.0, 0.123, 0.999])[:, None].double(), 0.02
    log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
    log_p = discrete_log_likelihood(LEVELS.expand(4, 256), mean, log_variance)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(4).double())
    edges = ((LEVELS + half - mean) / std for half in (1 / 255, -1 / 255))
    upper, lower = (torch.special.ndtr(edge) for edge in edges)
    upper[:, -1], lower[:, 0] = 1, 0
    torch.testing.assert_close(log_p.exp(), upper - lower, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level, deviations", [(0, 2000), (64, 140), (64, 2000), (255, 300)])
def test_the_decoder_is_exact_where_float32_has_no_probability_left(level, deviations):
    """Its value and its gradients, against the asymptotic series of the normal tail."""
    x0 = torch.tensor([level / 127.5 - 1])
    mean = torch.tensor([0.9 if level < 128 else -0.9], requires_grad=True)
    sign = mean.sign().item()
    near = abs(mean.item() - x0.item()) - 1 / 255  # the near edge decides
    log_variance = torch.tensor([2 * math.log(near / deviations)], requires_grad=True)
    std = math.exp(log_variance.item() / 2)
    z = near / std
    log_p = discrete_log_likelihood(x0, mean, log_variance)
    series = -(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2 + 3 / z**4)
    assert log_p.dtype == torch.float32 and log_p.item() == pytest.approx(series, rel=1e-6)
    log_p.sum().backward()
    assert mean.grad.item() == pytest.approx(-sign * (z + 1 / z - 2 / z**3) / std, rel=1e-5)
    assert log_variance.grad.item() == pytest.approx((z**2 + 1 - 2 / z**2) / 2, rel=1e-5)


# The bound


def test_the_bound_comes_down_to_the_entropy_as_steps_grow_and_never_below():
    x0 = pixels(200)
    entropy, gaps = entropy_of(x0), []
    for num_timesteps in (20, 100, 1000):
        ddpm = gaussian(num_timesteps=num_timesteps, variance="fixed_large")
        bits = ddpm.bits_per_dim(x0, seed=1, terms=min(num_timesteps, 200))
        gaps.append(bits.total - entropy)
    assert min(gaps) > -0.04  # the noise of the estimate
    assert gaps[0] > 0.9 and gaps[1] < 0.35 and 0.01 < gaps[2] < 0.15, gaps
    learned = gaussian(place=0.95)  # near beta, where the true variance lies
    near_beta = learned.bits_per_dim(x0, seed=1, terms=100)
    assert -0.04 < near_beta.total - entropy < 0.1


def test_the_bound_is_the_prior_and_the_kl_and_the_decoder():
    ddpm, x0 = gaussian(num_timesteps=50), pixels(100)
    bits = ddpm.bits_per_dim(x0, seed=1)
    assert bits.total == pytest.approx(bits.prior + bits.kl + bits.decoder, rel=1e-9)
    a = ddpm.alphas_cumprod[-1].item()
    prior = (a * x0.square().mean().item() + (1 - a) - 1 - math.log(1 - a)) / 2 / math.log(2)
    assert bits.prior == pytest.approx(prior, rel=1e-3, abs=1e-12)
    assert bits.rate.shape == bits.rmse.shape == (50,) and (bits.rate.diff() >= 0).all()
    assert bits.rate[[0, -1]].tolist() == pytest.approx([bits.prior, bits.prior + bits.kl])
    for i, t in ((0, 49), (25, 24), (49, 0)):  # the best guess is off by the posterior deviation
        a = ddpm.alphas_cumprod[t].item()
        deviation = STD * math.sqrt((1 - a) / (a * STD**2 + 1 - a))
        assert bits.rmse[i].item() == pytest.approx(127.5 * deviation, rel=0.04)


def test_fewer_terms_estimate_the_same_bound_and_know_their_error():
    ddpm = gaussian(num_timesteps=200, variance="fixed_large")
    x0 = pixels(16).repeat(125, 1, 1, 1)
    whole, some = ddpm.bits_per_dim(x0[:256], seed=1), ddpm.bits_per_dim(x0, terms=6, seed=2)
    assert len(some.rate) == 6 and 0.01 < some.standard_error < 0.04
    errors = math.hypot(some.standard_error, whole.standard_error)
    assert some.total == pytest.approx(whole.total, abs=4 * errors)
    for part in ("prior", "decoder", "kl"):
        assert getattr(some, part) == pytest.approx(getattr(whole, part), abs=4 * errors)


def test_the_bound_uses_labels():
    ddpm, x0 = gaussian(means=(-0.4, MEAN, 0.0), num_timesteps=10), pixels(20)
    wrong, right, none = (ddpm.bits_per_dim(x0, y, seed=1) for y in (0, 1, None))
    assert right.total < none.total - 1 < wrong.total - 2


def test_the_vlb_loss_is_on_average_the_bound():
    ddpm, x0 = gaussian(num_timesteps=20, loss="vlb"), pixels(256)
    bits = ddpm.bits_per_dim(x0, seed=1)
    torch.manual_seed(2)  # not the images' own seed
    steps = (torch.full((256,), t) for t in range(20))
    losses = [ddpm.losses(x0, None, t, torch.randn_like(x0)).mean().item() for t in steps]
    assert sum(losses) / 20 == pytest.approx(bits.kl + bits.decoder, rel=0.01)


def test_a_learned_variance_finds_the_true_one():
    """The exact mean, and a place of the variance for each timestep, learned by the hybrid loss."""
    torch.manual_seed(0)
    ddpm = gaussian(place=0.0, num_timesteps=20).train()
    optimizer = torch.optim.Adam(ddpm.parameters(), 0.05)
    for step in range(150):
        optimizer.zero_grad()
        ddpm(pixels(64, seed=step)).backward()
        optimizer.step()

    t = torch.arange(1, 20)  # the decoder's has no closed form
    small, large = (log_variance.flatten() for log_variance in ddpm.log_variances(t, t - 1))
    a, before = ddpm.alphas_cumprod[t], ddpm.alphas_cumprod[t - 1]
    of_x0 = STD**2 * (1 - a) / (a * STD**2 + 1 - a)  # variance of x_0 given x_t
    true = small.exp() + (before.sqrt() * large.exp() / (1 - a)) ** 2 * of_x0
    fraction = (ddpm.network.places.weight[1:, 0] + 1) / 2
    torch.testing.assert_close(small + (large - small) * fraction, true.log(), rtol=0, atol=0.1)
