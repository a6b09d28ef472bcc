"""The Gaussian process as a student uses it, without a UNet, held to closed forms.

For pixels that are independent normals N(MEAN, STD^2), x_t is normal too, and the best possible
prediction is known (`tiny.Exact`). With it in place of a network every sampler is linear in its
noises, so that mean and variance of its samples have a closed form.
"""

import math
from itertools import pairwise

import pytest
import torch
from tiny import MEAN, STD, gaussian, truth

from process import PREDICTIONS, SPACINGS, VARIANCES, GaussianProcess

# eta and order of each sampler
SAMPLERS = {"ddpm": (1.0, 1), "ddim": (0.0, 1), "dpm++": (0.0, 2), "sde-dpm++": (1.0, 2)}


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def moments_by_hand(process, timesteps, eta, order=1):
    """Mean and variance of the samples, followed from x_T ~ N(0, 1) by the papers' formulas.

    They are DDIM eq. 12 and 16, and 2211.01095 alg. 2 and its SDE form, in half log SNR. The state
    is (x_t, the x0 predicted before).
    """
    mean, covariance = double(0, 0), double(1, 0).diag()
    h_before = None
    for t, s in pairwise([*timesteps, -1]):
        a, b = process.alphas_cumprod[t].item(), process.alphas_cumprod[s].item() if s >= 0 else 1.0
        gain = math.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)  # x0 = gain x_t + offset
        offset = MEAN - gain * math.sqrt(a) * MEAN
        h = math.inf if s < 0 or a == 0 else (math.log(b / (1 - b)) - math.log(a / (1 - a))) / 2
        c = h / h_before / 2 if order == 2 and h_before is not None and s >= 0 else 0.0
        if order == 1:
            sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
            of_x = math.sqrt(1 - b - sigma**2) / math.sqrt(1 - a)
            of_x0 = math.sqrt(b) - of_x * math.sqrt(a)
        elif eta == 0:
            sigma, of_x = 0.0, math.sqrt((1 - b) / (1 - a))
            of_x0 = math.sqrt(b) * (1 - math.exp(-h))
        else:
            sigma = math.sqrt(1 - b) * math.sqrt(1 - math.exp(-2 * h))
            of_x = math.sqrt((1 - b) / (1 - a)) * math.exp(-h)
            of_x0 = math.sqrt(b) * (1 - math.exp(-2 * h))
        if process.variance == "fixed_large" and s >= 0:
            sigma = eta * math.sqrt(1 - a / b)
        step = double([of_x + of_x0 * (1 + c) * gain, -of_x0 * c], [gain, 0])
        mean = step @ mean + double(of_x0 * (1 + c) * offset, offset)
        covariance = step @ covariance @ step.T + double(sigma**2, 0).diag()
        h_before = h
    return mean[0].item(), covariance[0, 0].item()


def rand(*shape, seed=0):
    """Standard normal images, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Schedules and tables


def test_the_straight_schedule_is_flow_matching():
    """(1 - u) x0 + u eps, divided by its deviation; the velocity is linear in v and x_t."""
    process = GaussianProcess(beta_schedule="straight")
    x0, eps = rand(2, 5, 1, 4, 4)
    t = torch.tensor([0, 10, 499, 900, 998])
    u = ((t + 1).double() / 1000)[:, None, None, None]
    size = (u**2 + (1 - u) ** 2).sqrt()
    close(process.q_sample(x0, t, eps), ((1 - u) * x0 + u * eps) / size)
    a = process.alpha_bar(t)
    v = a.sqrt() * eps - (1 - a).sqrt() * x0
    close(eps - x0, (v + (2 * u - 1) * process.q_sample(x0, t, eps)) / size)
    assert process.betas[-1] == 0.999


def test_ddim_on_straight_paths_is_eulers_method_on_the_flow():
    ddpm = gaussian(beta_schedule="straight", prediction="x0")
    z = rand(5, 1, 1, 1)  # (1 - u) x0 + u eps
    timesteps = ddpm.timesteps(10)[1:]  # u = 1 itself is cut off
    u = [(t + 1) / 1000 for t in timesteps] + [0.0]
    size = [math.hypot(1 - at, at) for at in u]
    walk = ddpm.walk(z / size[0], timesteps, None, "ddim")
    for (_, xt), now, after, scale, t in zip(walk, u, u[1:], size[1:], timesteps):
        x0 = ddpm.network(z / math.hypot(1 - now, now), torch.full((5,), t))
        z = z + (after - now) * (z - x0) / now  # the velocity is eps - x0
        close(xt * scale, z)


@pytest.mark.parametrize(
    "schedule, num_timesteps", [("linear", 20), ("linear", 100), ("linear", 4000), ("cosine", 20)]
)
def test_any_number_of_timesteps_leads_to_noise(schedule, num_timesteps):
    process = GaussianProcess(num_timesteps, schedule)
    assert len(process.betas) == num_timesteps
    assert process.betas.min() > 0 and process.betas.max() <= 0.999  # 1 would divide by zero
    assert process.alphas_cumprod[-1] < 1e-4
    pure = GaussianProcess(num_timesteps, schedule, prediction="v", zero_terminal_snr=True)
    assert pure.betas.max() == pure.betas[-1] == 1 and pure.alphas_cumprod[-1] == 0


def test_the_tables_stay_float64_follow_the_device_and_are_not_saved():
    process = GaussianProcess(beta_schedule="cosine", prediction="v", zero_terminal_snr=True)
    process.network = torch.nn.Linear(1, 1)
    betas, alphas_cumprod = process.betas.clone(), process.alphas_cumprod.clone()
    assert betas.dtype == alphas_cumprod.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert process.to(dtype).network.weight.dtype == dtype
        assert torch.equal(process.betas, betas)
        assert torch.equal(process.alphas_cumprod, alphas_cumprod)
    assert list(process.state_dict()) == ["network.weight", "network.bias"]
    process.to("meta", torch.float16)
    assert process.device.type == process.alphas_cumprod.device.type == "meta"
    assert process.betas.dtype == torch.float64


# The forward process and its posteriors


def test_the_posterior_is_bayes_rule():
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0), two normals in x_s."""
    process = GaussianProcess(beta_schedule="cosine")
    x0, xt = double(0.7).view(1, 1, 1, 1), double(-0.4).view(1, 1, 1, 1)
    for t, s in ((999, None), (500, None), (500, 100), (1, 0)):
        b = process.alphas_cumprod[t - 1 if s is None else s].item()
        alpha = process.alphas_cumprod[t].item() / b
        precision = alpha / (1 - alpha) + 1 / (1 - b)
        expected = math.sqrt(alpha) * -0.4 / (1 - alpha) + math.sqrt(b) * 0.7 / (1 - b)
        s = None if s is None else torch.tensor([s])
        mean, variance = process.q_posterior(x0, xt, torch.tensor([t]), s)
        assert mean.item() == pytest.approx(expected / precision, rel=1e-9)
        assert variance.item() == pytest.approx(1 / precision, rel=1e-9)
    mean, variance = process.q_posterior(x0, xt, torch.tensor([0]))  # the image itself
    close(mean, x0)
    assert variance == 0


def test_the_mean_of_candidates_is_bayes_rule():
    process, t = GaussianProcess(), torch.tensor([0, 300, 600, 999])
    candidates, allowed = rand(7, 1, 4, 4), rand(4, 7, seed=1) < 0.3
    allowed[:, 0] = True
    colour = candidates.expand(-1, 3, -1, -1)
    xt = process.q_sample(colour[:4], t, rand(4, 3, 4, 4, seed=2))
    for mask in (None, allowed):
        expected = torch.zeros_like(xt)
        for i in range(4):
            a = process.alphas_cumprod[t[i]]
            q = torch.distributions.Normal(a.sqrt() * colour, (1 - a).sqrt())
            p = q.log_prob(xt[i]).sum((1, 2, 3)).exp() * (1 if mask is None else mask[i])
            expected[i] = (p[:, None, None, None] * candidates).sum(0) / p.sum()
        for images in (candidates, colour):  # one channel stands for three that are equal
            close(process.posterior_mean(xt, t, images, allowed=mask), expected)
            close(process.posterior_mean(xt, t, images[:2], images[2:], allowed=mask), expected)
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step: still in float32
        mean = process.posterior_mean(xt.float(), t, candidates.float(), allowed=allowed)
    close(mean, expected.float(), 1e-4)


def test_the_mean_of_candidates_is_exact_at_the_clean_end_in_float32_too():
    """1 - alphas_cumprod is 1e-4 there: taken in float32 the mean would be off by 1e-6."""
    process, candidates = GaussianProcess(), 0.01 * rand(6, 1, 4, 4)
    xt, t = candidates.mean(dim=0, keepdim=True).expand(3, -1, -1, -1), torch.tensor([0, 1, 2])
    mean = process.posterior_mean(xt.float(), t, candidates.float())
    close(mean.double(), process.posterior_mean(xt, t, candidates), 2e-8)


# What a network predicts


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_stands_for_its_x0_and_eps(prediction):
    process, t = GaussianProcess(prediction=prediction), torch.tensor([0, 3, 500, 999])
    x0, eps = rand(2, 4, 1, 4, 4)
    xt, a = process.q_sample(x0, t, eps), process.alphas_cumprod[t][:, None, None, None]
    output = truth(prediction, a, x0, eps)
    close(process.target(x0, eps, t), output)
    close(process.x0_from_output(output, xt, t), x0)
    close(process.eps_from_x0(x0, xt, t), eps)


def test_a_skip_weighs_the_network_and_x_t_by_their_inverse_variances():
    process, t = GaussianProcess(prediction="x0", skip_std=0.2), torch.tensor([0, 30, 500, 999])
    guess, xt = double(0.6).expand(4, 1, 1, 1), rand(4, 1, 1, 1)
    sigma = (1 / process.alphas_cumprod[t] - 1).sqrt()
    d = 0.2 * math.sqrt(1.01 - 0.36)
    for i in range(4):
        of_image, of_network = 1 / sigma[i] ** 2, 1 / d**2
        image = xt[i] / process.alphas_cumprod[t[i]].sqrt()
        expected = (of_image * image + of_network * guess[i]) / (of_image + of_network)
        close(process.with_skip(guess[i : i + 1], xt[i : i + 1], t[i : i + 1])[0], expected)
    black = -torch.ones(1, 1, 1, 1).double()
    of_black, of_grey = (process.with_skip(x, black + 0.01, t[:1]) for x in (black, 0.2 * black))
    assert -1 < of_black < -0.9915 and -0.99 < of_grey < -0.987  # one of black is trusted more
    pure = GaussianProcess(prediction="x0", skip_std=0.2, zero_terminal_snr=True)
    close(pure.with_skip(guess, xt, t)[3], guess[3])  # x_t says nothing there


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_x0_alike_whatever_is_predicted(prediction):
    process, t = GaussianProcess(prediction=prediction), torch.tensor([0, 20, 200, 400, 999])
    x0, eps = rand(2, 5, 1, 4, 4)
    guess = x0 + 0.1 * rand(5, 1, 4, 4, seed=1)
    eps_of_guess = process.eps_from_x0(guess, process.q_sample(x0, t, eps), t)
    difference = process.target(guess, eps_of_guess, t) - process.target(x0, eps, t)
    error, error_of_x0 = (x.square().mean((1, 2, 3)) for x in (difference, guess - x0))
    snr = process.alphas_cumprod[t] / (1 - process.alphas_cumprod[t])
    assert snr[1] > 5 > snr[2]
    close(process.min_snr_weight(t, 5.0) * error, snr.clamp(max=5) * error_of_x0)


def test_every_variance_is_its_share_between_small_and_large():
    t, fraction = torch.tensor([0, 1, 500]), torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    small, large = GaussianProcess().log_variances(t, t - 1)
    assert small[0].item() == pytest.approx(small[1].item(), rel=1e-12)  # not log 0
    expected = {
        "fixed_small": small,
        "fixed_large": torch.cat([small[:1], large[1:]]),  # the small one for the image
        "learned": torch.cat([small, (small + large) / 2, large], dim=3),
    }
    for name in VARIANCES:
        process = GaussianProcess(variance=name)
        close(process.log_variance(t, t - 1, fraction), expected[name])
    one = GaussianProcess(1).log_variances(torch.tensor([0]), torch.tensor([-1]))
    assert one[0] == one[1]


# Variances and one step of a sampler


def test_timesteps_fall_evenly_from_the_start():
    trailing, even = (GaussianProcess(10, timestep_spacing=name) for name in SPACINGS)
    assert trailing.timesteps(5) == [9, 7, 5, 3, 1] and trailing.timesteps(1) == [9]
    assert trailing.timesteps(3) == [9, 6, 2] and trailing.timesteps(4, start=7) == [7, 5, 3, 1]
    assert even.timesteps(4) == [9, 6, 3, 0] and even.timesteps(1) == [9]
    assert even.timesteps(4, start=7) == [7, 5, 2, 0]
    for name in SPACINGS:
        process = GaussianProcess(60, timestep_spacing=name)
        for start in (0, 7, 59):
            assert process.timesteps(start + 1, start) == list(range(start, -1, -1))
            for steps in range(2, start + 1):
                falls = [t - s for t, s in pairwise(process.timesteps(steps, start))]
                assert len(falls) == steps - 1 and 1 <= min(falls) and max(falls) - min(falls) <= 1


# Samplers


def exact_moments(ddpm, sampler, timesteps, eta=None):
    """Mean and variance of the samples, to rounding: each image has one of the noises as a 1.

    The last image has none of them, so it is the mean.
    """
    number = 1 + len(timesteps)
    noises = iter(torch.eye(number + 1, number).double().T[..., None, None, None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, **options: next(noises))
        *_, (_, images) = ddpm.walk(next(noises), timesteps, None, sampler, eta)
    mean = images[-1].item()
    return mean, (images[:-1] - mean).square().sum().item()


@pytest.mark.parametrize(
    "sampler, steps, eta, settings",
    [
        ("ddpm", 50, None, dict()),
        ("ddpm", 20, None, dict(variance="fixed_large", beta_schedule="cosine")),
        ("ddpm", 20, None, dict(prediction="x0", zero_terminal_snr=True)),
        ("ddim", 20, 0.5, dict(prediction="v")),
        ("ddim", 20, None, dict(prediction="v", zero_terminal_snr=True)),
        ("dpm++", 2, None, dict(prediction="v", beta_schedule="cosine")),
        ("dpm++", 20, None, dict(prediction="x0", zero_terminal_snr=True)),
        ("sde-dpm++", 20, None, dict(variance="fixed_large", timestep_spacing="linspace")),
        ("sde-dpm++", 20, None, dict(prediction="v", zero_terminal_snr=True)),
    ],
)
def test_every_sampler_gives_the_mean_and_variance_of_its_paper(sampler, steps, eta, settings):
    ddpm = gaussian(**settings)
    timesteps, (own_eta, order) = ddpm.timesteps(steps), SAMPLERS[sampler]
    expected = moments_by_hand(ddpm, timesteps, own_eta if eta is None else eta, order)
    assert exact_moments(ddpm, sampler, timesteps, eta) == pytest.approx(expected, rel=1e-8)
