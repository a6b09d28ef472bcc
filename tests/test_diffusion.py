"""Diffusion held to closed forms.

For images whose pixels are independent normals N(m, s^2), x_t is normal too and the best possible prediction is known:
    E[x0 | x_t] = m + sqrt(a) s^2 / v_t (x_t - sqrt(a) m),   v_t = a s^2 + 1 - a,   a = alphas_cumprod[t].
With it in the network's place every sampler's result has an exact mean and variance.
"""

import math
import pickle
import resource

import numpy as np
import pytest
import torch

from diffusion import DDPM, LABEL_DROPOUT, SAMPLERS, walk
from process import PREDICTIONS, make_betas
from support.checkpoint import load_checkpoint, save_checkpoint
from unet import UNet

MEAN, STD = 0.3, 0.1  # so that clipping to [-1, 1] never bites


class Oracle(torch.nn.Module):
    """The exact predictor for N(mean[y], STD^2) pixels. Without labels it knows class 0 alone."""

    def __init__(self, prediction="eps", means=(MEAN,), **settings):
        super().__init__()
        self.prediction, self.means = prediction, torch.tensor(means)
        self.num_classes = len(means) if len(means) > 1 else None
        self.calls, self.largest = 0, 0
        settings.pop("guidance_scale", None)
        self.alphas_cumprod = DDPM(
            torch.nn.Identity(), prediction=prediction, **settings
        ).alphas_cumprod

    def forward(self, xt, t, y=None):
        self.calls, self.largest = self.calls + 1, max(self.largest, len(xt))
        a = self.alphas_cumprod[t][:, None, None, None]
        known = torch.cat([self.means, self.means[:1]])  # the last row: no label
        m = known[0] if y is None else known[y][:, None, None, None]
        x0 = m + a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * (xt.double() - a.sqrt() * m)
        eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()
        return {"x0": x0, "eps": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[
            self.prediction
        ].to(xt.dtype)


def gaussian(prediction="eps", means=(MEAN,), size=8, **settings):
    return DDPM(
        Oracle(prediction, means, **settings),
        image_size=size,
        channels=1,
        prediction=prediction,
        **settings,
    )


def constant(value, prediction="eps", **settings):
    """A DDPM whose network always says the same."""
    network = torch.nn.Module()
    network.forward = lambda xt, t, y=None: torch.full_like(xt, value)
    return DDPM(network, image_size=4, channels=1, prediction=prediction, **settings)


def final_moments(timesteps, ddpm, eta, order=1):
    """Mean and variance that a sampler gives, followed in closed form from x_T ~ N(0, 1).

    The state is (x_t, the x0 predicted before), both linear in the noises so far. The formulas are the papers': DDIM
    eq. 12 and 16, and 2211.01095 alg. 2 and its SDE form, in half log SNR.
    """
    mean, covariance = (
        torch.tensor([0.0, 0.0]).double(),
        torch.diag(torch.tensor([1.0, 0.0])).double(),
    )
    h_before = None
    for t, s in zip(timesteps, timesteps[1:] + [-1]):
        a, b = ddpm.alphas_cumprod[t].item(), ddpm.alphas_cumprod[s].item() if s >= 0 else 1.0
        gain = math.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)  # of x_t in x0
        offset = MEAN - gain * math.sqrt(a) * MEAN
        h = math.inf if s < 0 or a == 0 else (math.log(b / (1 - b)) - math.log(a / (1 - a))) / 2
        c = h / h_before / 2 if order == 2 and h_before is not None and s >= 0 else 0.0
        if order == 1:
            sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
            of_x = math.sqrt(1 - b - sigma**2) / math.sqrt(1 - a)
            of_x0 = math.sqrt(b) - of_x * math.sqrt(a)
        elif eta == 0:
            sigma, of_x, of_x0 = (
                0.0,
                math.sqrt((1 - b) / (1 - a)),
                math.sqrt(b) * (1 - math.exp(-h)),
            )
        else:
            sigma = math.sqrt(1 - b) * math.sqrt(1 - math.exp(-2 * h))
            of_x, of_x0 = (
                math.sqrt((1 - b) / (1 - a)) * math.exp(-h),
                math.sqrt(b) * (1 - math.exp(-2 * h)),
            )
        if ddpm.variance == "fixed_large" and s >= 0:
            sigma = eta * math.sqrt(1 - a / b)
        step = torch.tensor(
            [[of_x + of_x0 * (1 + c) * gain, -of_x0 * c], [gain, 0.0]], dtype=torch.float64
        )
        mean = step @ mean + torch.tensor([of_x0 * (1 + c) * offset, offset])
        covariance = step @ covariance @ step.T + torch.diag(torch.tensor([sigma**2, 0.0]).double())
        h_before = h
    return mean[0].item(), covariance[0, 0].item()


# Schedules


def test_the_linear_schedule_is_ddpms():
    ddpm = DDPM(torch.nn.Identity())
    assert ddpm.betas.dtype == torch.float64 and ddpm.betas.shape == (1000,)
    assert ddpm.betas[0].item() == pytest.approx(1e-4) and ddpm.betas[-1].item() == pytest.approx(
        0.02
    )
    steps = ddpm.betas.diff()
    assert torch.allclose(steps, steps[0])
    log_sum = sum(math.log1p(-(1e-4 + i * (0.02 - 1e-4) / 999)) for i in range(1000))
    assert ddpm.alphas_cumprod[-1].item() == pytest.approx(math.exp(log_sum), rel=1e-9)
    assert math.exp(log_sum) == pytest.approx(
        4.04e-5, rel=1e-2
    )  # DDPM sec. 4: x_T is all but noise


def test_the_cosine_schedule_is_improved_ddpms():
    alphas_cumprod = DDPM(torch.nn.Identity(), beta_schedule="cosine").alphas_cumprod

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 10, 500, 900, 990):
        assert alphas_cumprod[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    betas = make_betas("cosine", 1000)
    assert betas[-1] == 0.999 and betas.max() <= 0.999 and betas.min() > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [20, 100, 1000, 4000])
def test_any_length_is_a_diffusion(schedule, num_timesteps):
    betas = make_betas(schedule, num_timesteps)
    assert len(betas) == num_timesteps and ((betas > 0) & (betas < 1)).all()
    assert torch.cumprod(1 - betas, 0)[-1] < 1e-4
    if num_timesteps == 20:
        assert betas[-1] == 0.999  # 1 would divide by zero later


# Forward process


def test_q_sample_has_the_moments_of_equation_4():
    ddpm = gaussian()
    torch.manual_seed(0)
    x0 = torch.full((20_000, 1, 8, 8), 0.5)
    for t in (0, 300, 999):
        xt = ddpm.q_sample(x0, torch.full((20_000,), t), torch.randn_like(x0))
        a = ddpm.alphas_cumprod[t].item()
        assert xt.mean().item() == pytest.approx(
            0.5 * math.sqrt(a), abs=5 * math.sqrt(1 - a) / math.sqrt(xt.numel())
        )
        assert xt.var().item() == pytest.approx(1 - a, rel=0.01)


def test_q_posterior_is_bayes_rule():
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): a product of two normals in x_s."""
    ddpm = gaussian(beta_schedule="cosine")
    x0, xt = torch.full((1, 1, 8, 8), 0.7), torch.full((1, 1, 8, 8), -0.4)
    for t, s in ((999, 998), (500, 499), (500, 100), (1, 0)):
        a_t, a_s = ddpm.alphas_cumprod[t].item(), ddpm.alphas_cumprod[s].item()
        alpha = a_t / a_s
        precision = alpha / (1 - alpha) + 1 / (1 - a_s)
        expected = (
            math.sqrt(alpha) * -0.4 / (1 - alpha) + math.sqrt(a_s) * 0.7 / (1 - a_s)
        ) / precision
        mean, variance = ddpm.q_posterior(x0, xt, torch.tensor([t]), torch.tensor([s]))
        assert mean.unique().item() == pytest.approx(expected, rel=1e-5)
        assert variance.item() == pytest.approx(1 / precision, rel=1e-5)


def test_the_first_step_goes_back_to_the_image_itself():
    ddpm = gaussian()
    x0 = torch.randn(2, 1, 8, 8)
    mean, variance = ddpm.q_posterior(x0, torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(mean, x0)
    assert variance.abs().max() < 1e-12


def test_q_posterior_of_one_step_is_the_papers_beta_tilde():
    ddpm = gaussian()
    _, variance = ddpm.q_posterior(
        torch.zeros(1000, 1, 8, 8), torch.zeros(1000, 1, 8, 8), torch.arange(1000)
    )
    before = torch.cat([torch.ones(1), ddpm.alphas_cumprod[:-1]])
    tilde = (1 - before) / (1 - ddpm.alphas_cumprod) * ddpm.betas
    torch.testing.assert_close(variance.flatten().double(), tilde, rtol=1e-5, atol=1e-12)


# Loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_zero_for_the_truth_and_known_for_a_constant(prediction):
    torch.manual_seed(0)
    ddpm = constant(0.0, prediction)
    x0, eps, t = (
        torch.randn(5, 1, 4, 4),
        torch.randn(5, 1, 4, 4),
        torch.tensor([0, 10, 500, 900, 999]),
    )
    a = ddpm.alphas_cumprod[t][:, None, None, None].float()
    truth = {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[prediction]
    losses = ddpm(x0, t=t, eps=eps, reduction="none")
    torch.testing.assert_close(losses, truth.square().mean((1, 2, 3)))
    torch.testing.assert_close(ddpm(x0, t=t, eps=eps), losses.mean())
    ddpm.loss = "l1"
    torch.testing.assert_close(
        ddpm(x0, t=t, eps=eps, reduction="none"), truth.abs().mean((1, 2, 3))
    )
    ddpm.network.forward = lambda xt, t, y=None: truth
    assert ddpm(x0, t=t, eps=eps) < 1e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_predictor_reaches_the_least_possible_loss(prediction):
    """Its error is the posterior variance of x0, in the units of the prediction."""
    torch.manual_seed(0)
    ddpm = gaussian(prediction)
    n, t = 4000, 400
    x0 = MEAN + STD * torch.randn(n, 1, 8, 8)
    a = ddpm.alphas_cumprod[t].item()
    variance = STD**2 * (1 - a) / (a * STD**2 + 1 - a)
    unit = {"x0": 1.0, "eps": a / (1 - a), "v": 1 / (1 - a)}[prediction]
    loss = ddpm(x0, t=torch.full((n,), t)).item()
    assert loss == pytest.approx(unit * variance, rel=0.02)


def test_posterior_mean_is_bayes_rule():
    torch.manual_seed(0)
    ddpm = DDPM(torch.nn.Identity(), image_size=4, channels=3)
    candidates, t = torch.randn(7, 1, 4, 4).double(), torch.tensor([0, 300, 600, 999])
    xt = ddpm.q_sample(candidates[:4].expand(-1, 3, -1, -1), t, torch.randn(4, 3, 4, 4).double())
    allowed = torch.rand(4, 7) < 0.6
    allowed[:, 0] = True
    for mask in (None, allowed):
        expected = torch.zeros_like(xt)
        for i in range(4):
            a = ddpm.alphas_cumprod[t[i]]
            q = torch.distributions.Normal(
                a.sqrt() * candidates.expand(-1, 3, -1, -1), (1 - a).sqrt()
            )
            p = q.log_prob(xt[i]).sum((1, 2, 3)).exp() * (1 if mask is None else mask[i])
            expected[i] = (p[:, None, None, None] * candidates).sum(0) / p.sum()
        for images in (candidates, candidates.expand(-1, 3, -1, -1)):
            torch.testing.assert_close(ddpm.posterior_mean(xt, t, images, allowed=mask), expected)
            torch.testing.assert_close(
                ddpm.posterior_mean(xt, t, images[:2], images[2:], allowed=mask), expected
            )
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step: still in float32
        mean = ddpm.posterior_mean(xt.float(), t, candidates.float(), allowed=allowed)
    torch.testing.assert_close(mean, expected.float(), rtol=0, atol=1e-4)


def test_posterior_mean_is_exact_at_the_clean_end_in_float32_too():
    """1 - alphas_cumprod is 1e-4 there: taken in float32 it would be off by 6e-4, and so would the logarithms."""
    ddpm = DDPM(torch.nn.Identity(), image_size=4, channels=1)
    candidates = 0.03 * torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    xt, t = candidates.mean(dim=0, keepdim=True).expand(3, -1, -1, -1), torch.tensor([0, 1, 2])
    exact = ddpm.posterior_mean(xt.double(), t, candidates.double())
    torch.testing.assert_close(
        ddpm.posterior_mean(xt, t, candidates), exact.float(), rtol=0, atol=2e-7
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("labels", [True, False])
def test_with_references_the_truth_is_the_mean_of_all_images_that_may_be(prediction, labels):
    """A network that says just that, for the label it is told, has no loss left; without references it has."""
    torch.manual_seed(0)
    ddpm = constant(0.0, prediction)
    x0, y = torch.randn(200, 1, 4, 4).clamp(-1, 1), torch.arange(200) % 2
    images, of_images = torch.randn(50, 1, 4, 4).clamp(-1, 1), torch.arange(50) % 2
    ddpm.num_classes = 2 if labels else None

    def exact(xt, t, y_seen=None):
        a = ddpm.alphas_cumprod[t].float()[:, None, None, None]
        every, of_every = torch.cat([x0, images]), torch.cat([y, of_images])
        same_label = (
            None if y_seen is None else (y_seen[:, None] == of_every) | (y_seen[:, None] == 2)
        )
        mean = ddpm.posterior_mean(xt, t, every, allowed=same_label)
        eps = (xt - a.sqrt() * mean) / (1 - a).sqrt()
        return {"x0": mean, "eps": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * mean}[prediction]

    ddpm.network.forward = exact
    t = torch.arange(200) * 5
    references = images, of_images
    if labels:
        assert ddpm(x0, y, t=t, references=references) < 1e-6
        assert ddpm(x0, y, t=t) > 1e-3
    else:
        assert ddpm(x0, t=t, references=(images, None)) < 1e-6
        assert ddpm(x0, t=t) > 1e-3


def test_references_need_the_loss_whose_minimum_is_the_mean():
    ddpm = constant(0.0, loss="l1")
    with pytest.raises(ValueError, match=r"^references with loss 'l1': expected 'mse'"):
        ddpm(torch.zeros(2, 1, 4, 4), references=(torch.zeros(2, 1, 4, 4), None))


def test_timesteps_are_drawn_from_all_of_them():
    torch.manual_seed(0)
    ddpm, seen = constant(0.0, num_timesteps=10), []
    ddpm.network.forward = lambda xt, t, y=None: (seen.append(t), torch.zeros_like(xt))[1]
    ddpm(torch.zeros(2000, 1, 4, 4))
    counts = torch.bincount(seen[0], minlength=10)
    assert len(counts) == 10 and counts.min() > 120 and counts.max() < 280


def test_a_tenth_of_the_labels_is_dropped_in_training_and_none_in_evaluation():
    torch.manual_seed(0)
    ddpm, seen = constant(0.0), []
    ddpm.num_classes = 10
    ddpm.network.forward = lambda xt, t, y=None: (seen.append(y), torch.zeros_like(xt))[1]
    x0, y = torch.zeros(10_000, 1, 4, 4), torch.arange(10_000) % 10
    ddpm(x0, y)
    ddpm.eval()(x0, y)
    dropped = seen[0] == 10
    assert dropped.float().mean().item() == pytest.approx(LABEL_DROPOUT, abs=0.015)
    assert torch.equal(seen[0][~dropped], y[~dropped]) and torch.equal(seen[1], y)


# Samplers


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predict_gives_the_same_x0_and_eps_whatever_is_predicted(prediction):
    ddpm = gaussian(prediction)
    torch.manual_seed(0)
    t = torch.tensor([0, 3, 500, 999])
    xt = ddpm.q_sample(MEAN + STD * torch.randn(4, 1, 8, 8), t, torch.randn(4, 1, 8, 8))
    x0, eps = ddpm.predict(xt, t)
    a = ddpm.alphas_cumprod[t][:, None, None, None]
    exact = MEAN + a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * (xt - a.sqrt() * MEAN)
    torch.testing.assert_close(x0, exact.float(), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(ddpm.q_sample(x0, t, eps), xt)  # the two explain x_t


def test_x0_is_clipped_and_eps_explains_x_t_with_the_clipped_one():
    ddpm = constant(7.0, "x0")
    t, xt = torch.tensor([500]), torch.randn(1, 1, 4, 4)
    x0, eps = ddpm.predict(xt, t)
    assert (x0 == 1).all()
    torch.testing.assert_close(ddpm.q_sample(x0, t, eps), xt)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    "sampler, steps, eta",
    [
        ("ddpm", 1000, None),
        ("ddpm", 50, None),
        ("ddim", 1000, None),
        ("ddim", 10, None),
        ("ddim", 50, 0.5),
        ("ddim", 50, 1.0),
        ("ddpm", 1, None),
        ("dpm++", 20, None),
        ("sde-dpm++", 20, None),
        ("dpm++", 2, None),
    ],
)
def test_samplers_give_the_exact_mean_and_variance(prediction, schedule, sampler, steps, eta):
    if steps == 1000 and (prediction, schedule) not in (("eps", "linear"), ("v", "cosine")):
        steps = (
            100  # the schedule and the kind of prediction change nothing that more steps would show
        )
    ddpm = gaussian(prediction, beta_schedule=schedule)
    check_moments(ddpm, sampler, steps, eta)
    if steps == 1000:  # and all steps give the data's own
        mean, variance = final_moments(ddpm.timesteps(steps), ddpm, SAMPLERS[sampler][0])
        assert mean == pytest.approx(MEAN, abs=2e-3) and variance == pytest.approx(STD**2, rel=0.1)


def check_moments(ddpm, sampler, steps, eta=None, n=300):
    images = ddpm.sample(n, sampler=sampler, steps=steps, eta=eta, seed=1, batch_size=n).double()
    default, order = SAMPLERS[sampler]
    mean, variance = final_moments(
        ddpm.timesteps(steps), ddpm, default if eta is None else eta, order
    )
    assert images.mean().item() == pytest.approx(
        mean, abs=1e-4 + 4 * math.sqrt(variance / images.numel())
    )
    assert images.var().item() == pytest.approx(
        variance, rel=4 * math.sqrt(2 / images.numel()), abs=1e-6
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(variance="fixed_large"),
        dict(timestep_spacing="linspace"),
        dict(prediction="v", zero_terminal_snr=True),
        dict(prediction="x0", zero_terminal_snr=True),
        dict(
            prediction="v",
            zero_terminal_snr=True,
            beta_schedule="cosine",
            timestep_spacing="linspace",
        ),
    ],
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_give_the_exact_mean_and_variance_under_every_setting(settings, sampler):
    ddpm = gaussian(**settings)
    for steps in (20, 100):
        check_moments(ddpm, sampler, steps)


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_deterministic_samplers_converge_to_the_exact_flow_at_their_order(
    sampler, order, prediction
):
    """The flow keeps x_t's distance from its mean in standard deviations. Here between inner steps of a fine chain."""
    ddpm = gaussian(prediction, num_timesteps=100_000)
    first, last = 80_000, 20_000
    a, b = (ddpm.alphas_cumprod[i].item() for i in (first, last))
    xt = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    xt = math.sqrt(a) * MEAN + math.sqrt(a * STD**2 + 1 - a) * xt
    exact = math.sqrt(b) * MEAN + math.sqrt((b * STD**2 + 1 - b) / (a * STD**2 + 1 - a)) * (
        xt - math.sqrt(a) * MEAN
    )
    errors = []
    for steps in (8, 16, 32, 64):
        timesteps = torch.linspace(first, last, steps + 1).long().tolist()
        *_, (_, xs) = walk(ddpm, xt.double(), timesteps, None, 1.0, *SAMPLERS[sampler])
        errors.append((xs - exact).abs().max().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert order - 0.15 < slopes[-1] < order + 0.35 and slopes == pytest.approx(
        [order] * 3, abs=0.5
    ), slopes


def test_more_steps_come_nearer_to_the_exact_flow_to_the_image():
    ddpm, xT = gaussian(beta_schedule="cosine", prediction="v"), torch.randn(2, 1, 8, 8)
    a = ddpm.alphas_cumprod[-1].item()
    exact = MEAN + STD / math.sqrt(a * STD**2 + 1 - a) * (xT - math.sqrt(a) * MEAN)
    for sampler in ("ddim", "dpm++"):
        errors = [
            (ddpm.sample(2, sampler=sampler, steps=n, xT=xT) - exact).abs().max().item()
            for n in (5, 20, 80)
        ]
        assert errors[0] > 2 * errors[1] > 5 * errors[2], errors


def test_a_chain_can_start_anywhere():
    ddpm = gaussian()
    torch.manual_seed(0)
    at = torch.full((300,), 400)
    xt = ddpm.q_sample(MEAN + STD * torch.randn(300, 1, 8, 8), at, torch.randn(300, 1, 8, 8))
    images = ddpm.sample(300, xT=xt, start=400, steps=401, sampler="ddpm", seed=0, batch_size=300)
    assert ddpm.timesteps(401, 400) == list(range(400, -1, -1))
    assert images.mean().item() == pytest.approx(MEAN, abs=3e-3)
    assert images.std().item() == pytest.approx(STD, rel=0.05)
    calls = ddpm.network.calls
    ddpm.sample(1, xT=xt[:1], start=99)
    assert ddpm.network.calls - calls == 100  # a tenth of the model's 1000
    for start in (-1, 1000):
        with pytest.raises(ValueError, match=f"start {start}: expected from 0 to 999, a timestep"):
            ddpm.sample(1, start=start)
    with pytest.raises(ValueError, match="steps 12: expected from 1 to 11"):
        ddpm.sample(1, xT=xt[:1], start=10, steps=12)


def test_interpolation_mixes_two_noisy_images_and_denoises_the_mixture():
    ddpm = gaussian()
    a, b = torch.full((2, 1, 8, 8), 0.2), torch.full((2, 1, 8, 8), 0.4)
    images = ddpm.interpolate(a, b, [0.0, 0.3, 1.0], t=300, sampler="ddim", steps=3, seed=4)
    assert images.shape == (3, 2, 1, 8, 8)
    generator = torch.Generator().manual_seed(4)
    at = torch.full((2,), 300)
    xt, other = (ddpm.q_sample(x, at, torch.randn(x.shape, generator=generator)) for x in (a, b))
    for weight, mixed in zip((0.0, 0.3, 1.0), images):
        expected = ddpm.sample(
            2, xT=(1 - weight) * xt + weight * other, start=300, sampler="ddim", steps=3
        )
        torch.testing.assert_close(mixed, expected)
    near = ddpm.interpolate(a, b, [0.0, 1.0], t=0)
    torch.testing.assert_close(near, torch.stack([a, b]), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="other of shape"):
        ddpm.interpolate(a, b[:1], [0.5], t=300)
    with pytest.raises(ValueError, match="t 1000: expected from 0 to 999, a timestep"):
        ddpm.interpolate(a, b, [0.5], t=1000)


def test_interpolation_without_labels_asks_for_no_label_and_with_them_for_these():
    ddpm, seen = gaussian(means=(-0.4, 0.4)), []
    ddpm.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    a = torch.zeros(2, 1, 8, 8)
    ddpm.interpolate(a, a, [0.2, 0.5, 0.8], t=10, steps=1)
    ddpm.interpolate(a, a, [0.2, 0.5, 0.8], t=10, steps=1, y=[1, 0])
    ddpm.interpolate(a, a, [0.2, 0.5, 0.8], t=10, steps=1, y=1)
    assert [y.tolist() for y in seen] == [[2] * 6, [1, 0] * 3, [1] * 6]  # 2 is 'no label'


def test_interpolation_without_labels_uses_none_whatever_the_guidance():
    ddpm, seen = gaussian(means=(-0.4, 0.4), guidance_scale=3.0), []
    ddpm.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    a = torch.zeros(2, 1, 8, 8)
    for guidance_scale in (None, 0, 1, 1.0):
        ddpm.interpolate(a, a, [0.5], t=10, steps=2, guidance_scale=guidance_scale)
        gaussian().interpolate(a, a, [0.5], t=10, steps=2, guidance_scale=guidance_scale)
    assert [y.tolist() for y in seen] == [[2, 2]] * 8


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(y=[0, 1, 0]), "y of 3 labels: expected 2"),
        (dict(y=[1]), "y of 1 labels: expected 2"),
        (dict(y=[0, 2]), "y from 0 to 2: expected labels from 0 to 1"),
        (dict(y=[0.5, 1]), "y of torch.float32"),
        (dict(guidance_scale=2.0), "guidance_scale 2.0: guidance needs labels"),
        (dict(weights=[0.5, 1.1]), r"weights \[0.5, 1.1\]: expected one or more, from 0 to 1"),
        (dict(weights=[-0.25]), r"weights \[-0.25\]"),
        (dict(weights=[math.nan]), r"weights \[nan\]"),
        (dict(weights=[]), r"weights \[\]"),
        (dict(weights=torch.linspace(0, 2, 3)), r"weights \[0.0, 1.0, 2.0\]"),
        (
            dict(x0=torch.zeros(0, 1, 8, 8), other=torch.zeros(0, 1, 8, 8), y=1),
            "n 0: expected at least 1 image",
        ),
    ],
)
def test_an_interpolation_that_does_not_fit_is_one_clear_line(arguments, words):
    ddpm, a = gaussian(means=(-0.4, 0.4)), torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=words) as error:
        ddpm.interpolate(**dict(x0=a, other=a, weights=[0.5], t=10, steps=1) | arguments)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="y: this model is unconditional"):
        gaussian().interpolate(a, a, [0.5], t=10, y=1)


def test_eta_one_is_the_posterior_and_p_mean_variance_its_one_step():
    ddpm = gaussian()
    torch.manual_seed(0)
    t, s = torch.tensor([700, 700]), torch.tensor([699, 300])
    xt, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    x0, eps = ddpm.predict(xt, t)
    mean, variance = ddpm.q_posterior(x0, xt, t, s)
    torch.testing.assert_close(ddpm.step(x0, eps, t, s, 1.0, noise), mean + variance.sqrt() * noise)
    p_mean, p_variance, p_x0 = ddpm.p_mean_variance(xt, t)
    torch.testing.assert_close(p_mean[0], mean[0])
    torch.testing.assert_close(p_variance[0], variance[0])
    torch.testing.assert_close(p_x0, x0)


def test_ddim_goes_a_fixed_way_and_ddpm_does_not():
    ddpm = gaussian()
    xT = torch.randn(2, 1, 8, 8)
    a, b = (ddpm.sample(2, sampler="ddim", steps=5, xT=xT) for _ in range(2))
    c, d = (ddpm.sample(2, sampler="ddpm", steps=5, xT=xT) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(c, d)


def test_a_seed_decides_the_images_and_leaves_the_global_state_alone():
    ddpm = gaussian()
    state = torch.get_rng_state()
    a, b, c = (ddpm.sample(3, steps=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    first = ddpm.sample(3, steps=5)
    torch.manual_seed(5)
    assert torch.equal(first, ddpm.sample(3, steps=5))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 250, 999, 1000])
def test_timesteps_fall_from_noise_to_image(steps):
    timesteps = gaussian().timesteps(steps)
    assert (
        len(set(timesteps)) == steps
        and timesteps == sorted(timesteps, reverse=True)
        and timesteps[0] == 999
    )
    assert timesteps[-1] == round(1000 / steps) - 1
    even = gaussian(timestep_spacing="linspace").timesteps(steps)
    assert len(set(even)) == steps and even == sorted(even, reverse=True) and even[0] == 999
    assert steps == 1 or even[-1] == 0


def test_any_number_of_images_goes_in_bounded_batches():
    ddpm = gaussian()
    images = ddpm.sample(23, steps=3, batch_size=10)
    assert images.shape == (23, 1, 8, 8) and ddpm.network.largest == 10 and ddpm.network.calls == 9
    assert len(images.flatten(1).unique(dim=0)) == 23


def test_the_sequence_ends_in_the_image():
    ddpm = gaussian()
    for sampler in SAMPLERS:
        sequence = ddpm.sample(
            12, steps=6, sampler=sampler, seed=3, return_sequence=True, batch_size=5
        )
        assert sequence.shape == (6, 12, 1, 8, 8)
        torch.testing.assert_close(
            sequence[-1], ddpm.sample(12, steps=6, sampler=sampler, seed=3, batch_size=5)
        )


def test_what_is_left_out_comes_from_the_models_settings():
    ddpm = gaussian(sampler="ddim", sample_steps=7)
    images = ddpm.sample(2, seed=0)
    assert ddpm.network.calls == 7
    assert torch.equal(images, ddpm.sample(2, sampler="ddim", steps=7, seed=0))
    assert not torch.equal(images, ddpm.sample(2, sampler="ddpm", steps=7, seed=0))


def test_sampling_turns_dropout_off_and_training_on_again():
    network = UNet(
        base_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        time_emb_dim=32,
        dropout=0.9,
        patch_size=4,
    )
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    torch.nn.init.normal_(network.middle[1].conv2.weight, std=0.1)
    ddpm = DDPM(network).train()
    xT = torch.randn(1, 3, 32, 32)
    a, b = (ddpm.sample(1, sampler="ddim", steps=2, xT=xT) for _ in range(2))
    assert torch.equal(a, b) and ddpm.training and network.training


# Labels and guidance


def test_labels_choose_the_class():
    ddpm = gaussian(means=(-0.4, 0.4))
    images = ddpm.sample(6, y=[0, 1, 1, 0, 1, 0], steps=100, seed=0)
    assert torch.equal(
        images.mean((1, 2, 3)) > 0, torch.tensor([False, True, True, False, True, False])
    )
    assert (ddpm.sample(4, y=1, steps=100, seed=0).mean((1, 2, 3)) > 0.3).all()
    assert (ddpm.sample(4, y=torch.tensor(1), steps=100, seed=0).mean((1, 2, 3)) > 0.3).all()
    assert (
        ddpm.sample(2, y=range(2), steps=100, seed=0).mean((1, 2, 3)) * torch.tensor([-1, 1]) > 0.3
    ).all()


def test_without_labels_a_conditional_model_draws_them_evenly():
    ddpm = gaussian(means=(-0.4, 0.4))
    images = ddpm.sample(200, steps=50, seed=0)
    assert 70 < (images.mean((1, 2, 3)) > 0).sum() < 130  # both classes, nothing between
    assert (images.mean((1, 2, 3)).abs() > 0.3).all() and torch.equal(
        images, ddpm.sample(200, steps=50, seed=0)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_uncond_plus_s_times_the_difference(prediction):
    ddpm = gaussian(prediction, means=(-0.2, 0.2))
    torch.manual_seed(0)
    xt, t, y = torch.randn(3, 1, 8, 8) * 0.5, torch.tensor([200, 500, 800]), torch.tensor([1, 1, 0])
    uncond, cond = ddpm.predict(xt, t)[0], ddpm.predict(xt, t, y)[0]
    for s in (0.0, 0.5, 1.0, 2.0):
        calls = ddpm.network.calls
        x0, _ = ddpm.predict(xt, t, y, s)
        torch.testing.assert_close(x0, uncond + s * (cond - uncond), atol=1e-4, rtol=1e-4)
        assert ddpm.network.calls == calls + 1  # guidance is one doubled batch
    assert not torch.allclose(cond, uncond, atol=1e-3)


def test_guidance_pushes_away_from_the_unconditional():
    ddpm = gaussian(means=(0.0, 0.1))
    plain, guided = (
        ddpm.sample(50, y=1, guidance_scale=s, steps=50, seed=0).mean().item() for s in (1.0, 3.0)
    )
    assert plain == pytest.approx(0.1, abs=0.02) and guided == pytest.approx(0.3, abs=0.05)


def labels_seen(guidance_scale=1.0, **options):
    """The labels that a model of three classes shows its network while it draws 4,000 images."""

    class Labels(torch.nn.Module):
        num_classes = 3

        def forward(self, xt, t, y):
            seen.append(y)
            return torch.zeros_like(xt)

    seen, ddpm = [], DDPM(Labels(), image_size=1, channels=1, **options)
    first = ddpm.sample(4000, steps=1, seed=0, batch_size=8000, guidance_scale=guidance_scale)
    assert torch.equal(
        first, ddpm.sample(4000, steps=1, seed=0, batch_size=900, guidance_scale=guidance_scale)
    )
    return seen[0]


@pytest.mark.parametrize(
    "shares, expected",
    [
        (None, [1, 1, 1]),
        ([0.5, 0.2, 0.3], [1.5, 0.6, 0.9]),
        ((0, 3, 1), [0, 2.25, 0.75]),
        (torch.tensor([1.0, 0, 1]), [1.5, 0, 1.5]),
    ],
)
def test_without_labels_classes_are_drawn_by_their_shares(shares, expected):
    share = labels_seen(class_shares=shares).bincount(minlength=3) / 4000
    assert torch.allclose(3 * share, torch.tensor(expected).float(), atol=0.1)
    assert (share == 0).tolist() == [number == 0 for number in expected]


def test_drawn_labels_can_be_guided_and_none_is_drawn_for_guidance_0():
    both, none = labels_seen(2.0, class_shares=[0, 0, 1]), labels_seen(0.0, class_shares=[0, 0, 1])
    assert (both[:4000] == 2).all() and (both[4000:] == 3).all() and (none == 3).all()


@pytest.mark.parametrize(
    "shares",
    [
        [1, 2],
        [1, 2, 3, 4],
        [1, -1, 1],
        [0, 0, 0],
        [1, 1, math.nan],
        [1, 1, math.inf],
        ["1", 1, 1],
        3,
        "abc",
        [True, 1, 1],
    ],
)
def test_shares_that_fit_no_classes_are_refused(shares):
    with pytest.raises(
        ValueError, match="class_shares .*expected a number from 0 for each of the network's 3"
    ):
        labels_seen(class_shares=shares)
    with pytest.raises(ValueError, match="class_shares .*network's 0 classes"):
        DDPM(constant(0).network, image_size=4, channels=1, class_shares=[1.0])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(n=0), "n 0"),
        (dict(n=2, steps=0), "steps 0"),
        (dict(n=2, steps=1001), "steps 1001.*1 to 1000"),
        (dict(n=2, sampler="euler"), "sampler 'euler'.*'ddpm'"),
        (dict(n=2, eta=-0.1), "eta -0.1"),
        (dict(n=2, eta=1.5), "eta 1.5"),
        (dict(n=2, y=[0, 2]), "y from 0 to 2.*0 to 1"),
        (dict(n=2, y=-1), "y from -1"),
        (dict(n=2, y=[0, 1, 0]), "y of 3 labels: expected 2"),
        (dict(n=2, y=[0.5, 1]), "y of torch.float32"),
        (dict(n=2, xT=torch.zeros(2, 1, 4, 4)), r"xT of shape \(2, 1, 4, 4\)"),
        (dict(n=2, batch_size=0), "batch_size 0"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        gaussian(means=(0.0, 0.1)).sample(**arguments)
    assert "\n" not in str(error.value)


def test_labels_for_an_unconditional_model_are_refused():
    with pytest.raises(ValueError, match="unconditional"):
        gaussian().sample(2, y=1)
    with pytest.raises(ValueError, match="unconditional"):
        DDPM(
            UNet(
                base_channels=32,
                channel_mult=(1,),
                num_res_blocks=1,
                attention_resolutions=(),
                patch_size=4,
            )
        )(torch.zeros(1, 3, 32, 32), torch.tensor([1]))


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(beta_schedule="sigmoid"), "beta_schedule 'sigmoid'"),
        (dict(prediction="score"), "prediction 'score'"),
        (dict(loss="huber"), "loss 'huber'"),
        (dict(sampler="x"), "sampler 'x'"),
        (dict(num_timesteps=0), "num_timesteps 0"),
        (dict(sample_steps=1001), "sample_steps 1001"),
        (dict(num_timesteps=50, sample_steps=51), "1 to 50"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DDPM(torch.nn.Identity(), **settings)


def test_images_of_another_shape_than_the_networks_are_refused():
    with pytest.raises(ValueError, match="channels 1: expected 3, as in the network"):
        DDPM(small_unet(), channels=1)
    with pytest.raises(ValueError, match="image_size 28: expected 32"):
        DDPM(small_unet(), image_size=28)


# Save and load


def small_unet():
    network = UNet(
        base_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        time_emb_dim=32,
        patch_size=4,
        num_classes=10,
    )
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    return network


def test_a_saved_model_comes_back_whole(tmp_path):
    ddpm = DDPM(
        small_unet(),
        beta_schedule="cosine",
        prediction="v",
        sampler="ddim",
        sample_steps=4,
        guidance_scale=2.0,
    )
    ddpm.save(tmp_path / "model.pt", epoch=3, config={"epochs": 5, "channel_mult": (1, 2)})
    again = DDPM.load(tmp_path / "model.pt", device="cpu")
    assert not again.training and again.info == {
        "epoch": 3,
        "config": {"epochs": 5, "channel_mult": (1, 2)},
    }
    assert torch.equal(again.sample(2, y=[3, 4], seed=0), ddpm.sample(2, y=[3, 4], seed=0))
    torch.load(tmp_path / "model.pt", weights_only=True)  # runs no code from the file
    settings = dict(
        num_timesteps=50,
        beta_schedule="cosine",
        prediction="v",
        loss="mse",
        variance="fixed_large",
        zero_terminal_snr=False,
        min_snr_gamma=5.0,
        sampler="dpm++",
        sample_steps=7,
        timestep_spacing="linspace",
        guidance_scale=2.0,
    )
    DDPM(small_unet(), **settings).save(tmp_path / "model.pt")
    again = DDPM.load(tmp_path / "model.pt", device="cpu")
    assert {name: getattr(again, name) for name in settings} == settings
    assert not any(name.startswith(("_orig_mod", "module")) for name in again.state_dict())


def test_another_network_is_given_to_load(tmp_path):
    DDPM(torch.nn.Conv2d(3, 3, 1)).save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not a plain UNet"):
        DDPM.load(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="do not fit"):
        DDPM.load(tmp_path / "model.pt", network=torch.nn.Conv2d(3, 3, 3))
    network = torch.nn.Conv2d(3, 3, 1)
    assert DDPM.load(tmp_path / "model.pt", "cpu", network).network is network


def test_files_that_are_no_model_are_one_clear_line(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    DDPM(small_unet()).save(tmp_path / "model.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:5000])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"weights": {}}, protocol=4))
    torch.save({"weights": Intruder(tmp_path / "here")}, tmp_path / "objects.pt")
    torch.save(
        {"weights": Intruder(tmp_path / "here")},
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)).save(tmp_path / "script.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "flipped.pt").write_bytes(
        whole[:300] + bytes(byte ^ 255 for byte in whole[300:400]) + whole[400:]
    )
    for name, words in (
        ("missing.pt", "no such checkpoint"),
        (".", "a folder; expected a file"),
        ("half.pt", "damaged or cut short"),
        ("pickle.pt", "a pickle, which could run code"),
        ("old.pt", "a pickle, which could run code"),
        ("objects.pt", "holds Python objects"),
        ("other.pt", "checkpoint of another kind"),
        ("script.pt", "another kind of file"),
        ("text.pt", "another kind of file"),
        ("empty.pt", "another kind of file"),
        ("flipped.pt", "damaged"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            DDPM.load(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
        assert "train again" not in str(error.value)  # another hand may still read it
    assert not (tmp_path / "here").exists()


class Intruder:
    """Pickles as an order to make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_loading_runs_no_code_from_the_file(tmp_path):
    saved = {"network": None, "diffusion": {}, "weights": Intruder(tmp_path / "here"), "info": {}}
    torch.save(saved, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="holds Python objects, which could run code"):
        DDPM.load(tmp_path / "m.pt")
    assert not (tmp_path / "here").exists()


def test_a_save_never_writes_into_the_old_file(tmp_path, monkeypatch):
    path, written, save = tmp_path / "last.pt", [], torch.save
    monkeypatch.setattr(torch, "save", lambda state, to: (written.append(str(to)), save(state, to)))
    save_checkpoint(path, {"step": 1})
    assert written and str(path) not in written and load_checkpoint(path, ["step"]) == {"step": 1}


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": 2, "bad": lambda: None})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10_000, limits[1])
    )  # to this process a disk that is full
    try:
        with pytest.raises(OSError, match="last.pt: cannot be written") as error:
            save_checkpoint(path, {"step": 2, "weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert load_checkpoint(path, ["step"]) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


# Wrapped and changed networks


class Hidden(torch.nn.Module):
    """Someone's wrapper, which passes calls on and attributes not."""

    def __init__(self, network):
        super().__init__()
        self.inside = network

    def forward(self, *args):
        return self.inside(*args)


class Changed(UNet):
    """A UNet that computes something else with the same weights."""

    def forward(self, xt, t, y=None):
        return -super().forward(xt, t, y)


def compiled_inside(network):
    network.middle[0] = torch.compile(network.middle[0], backend="eager")
    return network


@pytest.mark.parametrize(
    "wrap",
    [
        lambda network: torch.compile(network, backend="eager"),
        torch.nn.DataParallel,
        compiled_inside,
        lambda network: torch.compile(
            torch.nn.DataParallel(torch.compile(network, backend="eager")), backend="eager"
        ),
    ],
)
def test_a_wrapped_network_is_saved_as_what_is_inside(tmp_path, wrap):
    plain = small_unet()
    expected = DDPM(plain, sample_steps=2).sample(2, y=[3, 4], seed=0)
    ddpm = DDPM(wrap(plain), sample_steps=2)
    assert ddpm.num_classes == 10
    torch.testing.assert_close(ddpm.sample(2, y=[3, 4], seed=0), expected)
    ddpm.save(tmp_path / "model.pt")
    names = torch.load(tmp_path / "model.pt", weights_only=True)["weights"]
    assert list(names) == [f"network.{name}" for name in small_unet().state_dict()]
    torch.testing.assert_close(
        DDPM.load(tmp_path / "model.pt", "cpu").sample(2, y=[3, 4], seed=0), expected
    )
    again = DDPM.load(
        tmp_path / "model.pt", "cpu", network=torch.compile(small_unet(), backend="eager")
    )
    torch.testing.assert_close(again.sample(2, y=[3, 4], seed=0), expected)


def exchanged(network):
    network.conv_out = torch.nn.Sequential(network.conv_out, torch.nn.Tanh())
    return network


def normed(network):
    torch.nn.utils.parametrizations.weight_norm(network.conv_in)
    return network


def hooked(network):
    network.register_forward_hook(lambda module, args, output: -output)
    return network


def overridden(network):
    forward = network.forward
    network.forward = lambda *args: -forward(*args)
    return network


def same_shapes(network):
    """A layer that computes something else with the same weights."""
    network.conv_in = torch.nn.Conv2d(48, 32, 3, padding=1, padding_mode="circular")
    return network


@pytest.mark.parametrize(
    "change",
    [lambda network: Changed(**network.config), exchanged, normed, hooked, overridden, same_shapes],
)
def test_a_changed_unet_is_not_rebuilt_as_the_plain_one(tmp_path, change):
    ddpm = DDPM(change(small_unet()), sample_steps=2)
    ddpm.save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not a plain UNet; give load"):
        DDPM.load(tmp_path / "model.pt")
    again = DDPM.load(tmp_path / "model.pt", "cpu", change(small_unet()))
    assert torch.equal(again.sample(1, y=1, seed=0), ddpm.sample(1, y=1, seed=0))


def test_a_wrapper_that_hides_the_labels_is_refused_and_one_that_tells_them_is_not(tmp_path):
    with pytest.raises(
        ValueError, match="Hidden has no num_classes, but its part inside knows 10 labels"
    ):
        DDPM(Hidden(small_unet()))
    network = Hidden(small_unet())
    network.num_classes = 10
    assert DDPM(network, sample_steps=1).sample(1, y=3).shape == (1, 3, 32, 32)
    network.num_classes = None  # on purpose
    assert DDPM(network).num_classes is None
    assert DDPM(Hidden(torch.nn.Conv2d(3, 3, 1))).num_classes is None


@pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "double"])
def test_the_tables_stay_float64_whatever_the_module_is_cast_to(cast):
    ddpm = DDPM(torch.nn.Identity(), beta_schedule="cosine")
    betas, alphas_cumprod = ddpm.betas.clone(), ddpm.alphas_cumprod.clone()
    assert getattr(ddpm, cast)() is ddpm
    assert torch.equal(ddpm.betas, betas) and torch.equal(ddpm.alphas_cumprod, alphas_cumprod)
    assert not ddpm.state_dict()


def test_sampling_leaves_every_part_of_the_network_in_its_mode():
    network = small_unet()
    ddpm = DDPM(network, sample_steps=1, num_timesteps=4).eval()
    network.train()
    network.middle.eval()  # a frozen part
    modes = [module.training for module in ddpm.modules()]
    ddpm.sample(1, y=1)
    ddpm.bits_per_dim(torch.zeros(1, 3, 32, 32), 1, terms=2)
    assert [module.training for module in ddpm.modules()] == modes


def test_numpy_numbers_are_taken_and_saved(tmp_path):
    ddpm = DDPM(
        small_unet(),
        sample_steps=np.int64(4),
        num_timesteps=np.int64(50),
        guidance_scale=np.float64(1.5),
        min_snr_gamma=np.float32(5),
        image_size=np.int64(32),
        zero_terminal_snr=np.bool_(False),
    )
    ddpm.save(tmp_path / "model.pt")
    again = DDPM.load(tmp_path / "model.pt", "cpu")
    assert (again.sample_steps, again.guidance_scale, again.min_snr_gamma) == (4, 1.5, 5.0)
    assert again.sample(2, y=np.arange(2), seed=np.int64(3)).shape == (2, 3, 32, 32)


def test_a_network_with_compiled_layers_takes_its_own_weights_back(tmp_path):
    ddpm = DDPM(compiled_inside(small_unet()), sample_steps=2)
    ddpm.save(tmp_path / "model.pt")
    again = DDPM.load(tmp_path / "model.pt", "cpu", network=compiled_inside(small_unet()))
    torch.testing.assert_close(again.sample(1, y=1, seed=0), ddpm.sample(1, y=1, seed=0))


def test_a_file_of_another_version_is_one_line(tmp_path):
    DDPM(small_unet()).save(tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    for part in ("network", "diffusion"):
        save_checkpoint(tmp_path / "new.pt", saved | {part: saved[part] | {"new_setting": 1}})
        with pytest.raises(ValueError, match="new.pt: written by another version .*new_setting"):
            DDPM.load(tmp_path / "new.pt")


# Batches, seeds, and arguments that need one another


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "options", [{}, {"y": 1, "guidance_scale": 2.0}, {"eta": 0.5}, {"return_sequence": True}]
)
def test_batches_do_not_change_an_image(sampler, options):
    ddpm = gaussian(means=(-0.4, 0.4), sampler=sampler, sample_steps=6)
    whole = ddpm.sample(8, seed=0, batch_size=8, **options)
    for batch_size in (1, 3, 4, 256):
        assert torch.equal(ddpm.sample(8, seed=0, batch_size=batch_size, **options), whole)
    torch.manual_seed(1)
    whole = ddpm.sample(8, **options)  # from the global state too
    torch.manual_seed(1)
    assert torch.equal(ddpm.sample(8, batch_size=3, **options), whole)


def test_batches_do_not_change_an_image_of_a_unet_a_mixture_or_a_bound():
    ddpm = DDPM(small_unet(), sample_steps=4)
    torch.testing.assert_close(
        ddpm.sample(5, seed=0, batch_size=2), ddpm.sample(5, seed=0), rtol=0, atol=1e-4
    )
    ddpm = gaussian(num_timesteps=50, sample_steps=10)
    a, b = torch.full((3, 1, 8, 8), 0.2), torch.full((3, 1, 8, 8), 0.4)
    mixed = [
        ddpm.interpolate(a, b, [0.2, 0.7], t=30, seed=1, batch_size=batch_size)
        for batch_size in (2, 256)
    ]
    assert torch.equal(*mixed)
    sequence = ddpm.interpolate(a, b, [0.2, 0.7], t=30, seed=1, return_sequence=True)
    assert torch.equal(sequence[-1], mixed[0]) and sequence.shape[1:] == mixed[0].shape
    bits = [
        ddpm.bits_per_dim(a, seed=1, terms=7, batch_size=batch_size) for batch_size in (1, 2, 256)
    ]
    assert all(
        torch.equal(found.rate, bits[0].rate) and found.total == bits[0].total for found in bits
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda ddpm, x: ddpm.sample(4, seed=3, steps=3, sampler="ddpm"),
        lambda ddpm, x: ddpm.sample(4, seed=3, steps=3, sampler="ddpm", xT=x),
        lambda ddpm, x: ddpm.interpolate(x, x, [0.5], t=20, seed=3, steps=3, sampler="ddpm"),
        lambda ddpm, x: ddpm.interpolate(
            x, x, [0.5, 0.7], t=20, seed=3, steps=2, sampler="sde-dpm++"
        ),
        lambda ddpm, x: ddpm.bits_per_dim(x, seed=3, terms=5),
    ],
)
def test_no_noise_is_drawn_twice_from_a_seed(call, monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(
        torch,
        "randn",
        lambda *args, **options: (drawn.append(randn(*args, **options)), drawn[-1])[1],
    )
    call(gaussian(num_timesteps=50), torch.zeros(4, 1, 8, 8))
    first = torch.stack(
        [
            noise.flatten()[i * 256 : i * 256 + 50]
            for noise in drawn
            for i in range(noise.numel() // 256)
        ]
    )  # each four images
    assert len(first) >= 2 and len(first.unique(dim=0)) == len(first)


def test_a_generator_takes_the_place_of_a_seed():
    ddpm, generator = gaussian(), torch.Generator().manual_seed(5)
    first, second = (ddpm.sample(2, steps=3, seed=generator) for _ in range(2))
    assert torch.equal(first, ddpm.sample(2, steps=3, seed=5)) and not torch.equal(first, second)


IMAGES, T = torch.zeros(2, 1, 8, 8), torch.tensor([5, 5])


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda m: m.sample(2, start=100),
            "start 100 without xT: pure noise belongs to timestep 999",
        ),
        (lambda m: m.sample(2, start=0, steps=1), "start 0 without xT"),
        (lambda m: m.sample(2, steps=2.0), "steps 2.0: expected a whole number"),
        (lambda m: m.sample(2.0), "n 2.0: expected a whole number"),
        (lambda m: m.sample("2"), "n '2': expected a whole number"),
        (lambda m: m.sample(2, batch_size=None), "batch_size None: expected a whole number"),
        (lambda m: m.sample(2, eta="1"), "eta '1': expected a number"),
        (
            lambda m: m.sample(2, y=1, guidance_scale=math.nan),
            "guidance_scale nan: expected a finite number",
        ),
        (lambda m: m.sample(2, y=1, guidance_scale="2"), "guidance_scale '2': expected a number"),
        (lambda m: m.sample(2, y="3"), "y '3': expected whole numbers"),
        (lambda m: m.sample(2, y=[True, False]), "y of torch.bool: expected whole numbers"),
        (lambda m: m.sample(2, seed=1.5), "seed 1.5: expected a whole number"),
        (lambda m: m.sample(2, seed=-1), "seed -1: expected from 0 to 4294967295"),
        (lambda m: m.sample(2, sampler=["ddpm"]), "sampler .'ddpm'.: expected 'ddpm' or"),
        (
            lambda m: m.sample(2, xT=torch.zeros(2, 8, 8)),
            r"xT of shape \(2, 8, 8\): expected \(2, 1, 8, 8\)",
        ),
        (
            lambda m: m.sample(2, xT=[[0.0]]),
            r"xT \[\[0.0\]\]: expected a tensor of floating-point images",
        ),
        (
            lambda m: m.sample(2, xT=IMAGES.long()),
            "xT of torch.int64: expected a tensor of floating-point images",
        ),
        (
            lambda m: m(torch.zeros(2, 1, 28, 28)),
            r"x0 of shape \(2, 1, 28, 28\): expected \(N, 1, 8, 8\)",
        ),
        (
            lambda m: m(torch.zeros(2, 3, 8, 8)),
            r"x0 of shape \(2, 3, 8, 8\): expected \(N, 1, 8, 8\)",
        ),
        (lambda m: m(IMAGES.byte()), "x0 of torch.uint8"),
        (
            lambda m: m(IMAGES, eps=torch.zeros(1, 1, 8, 8)),
            r"eps of shape \(1, 1, 8, 8\): expected \(2, 1, 8, 8\)",
        ),
        (lambda m: m(IMAGES, [0, 3]), "y from 0 to 3: expected labels from 0 to 2"),
        (lambda m: m(IMAGES, [0]), "y of 1 labels: expected 2"),
        (
            lambda m: m(IMAGES, torch.zeros(2, 1, dtype=torch.long)),
            r"y of shape \(2, 1\): expected 2",
        ),
        (
            lambda m: m(IMAGES, t=torch.tensor([5])),
            r"t of torch.int64 and shape \(1,\): expected int64 of shape \(2,\)",
        ),
        (lambda m: m(IMAGES, t=torch.zeros(2)), r"t of torch.float32 and shape \(2,\)"),
        (lambda m: m(IMAGES, t=5), "t 5: expected int64"),
        (lambda m: m(IMAGES, reduction="sum"), "reduction 'sum': expected 'mean' or 'none'"),
        (lambda m: m(IMAGES, [0, 1], references=(IMAGES, None)), "references without labels"),
        (
            lambda m: m.predict(torch.zeros(2, 1, 4, 4), T),
            r"xt of shape \(2, 1, 4, 4\): expected \(N, 1, 8, 8\)",
        ),
        (
            lambda m: m.predict(IMAGES, T, guidance_scale=2.0),
            "guidance_scale 2.0: guidance needs labels; give y",
        ),
        (
            lambda m: m.p_mean_variance(IMAGES, T, guidance_scale=2.0),
            "guidance_scale 2.0: guidance needs labels",
        ),
        (
            lambda m: m.step(IMAGES, IMAGES, T, T - 1, eta=1.0),
            "noise: eta 1.0 needs standard normal noise",
        ),
        (
            lambda m: m.step(IMAGES, IMAGES, T, T - 1, eta=0.1),
            "noise: eta 0.1 needs standard normal noise",
        ),
        (lambda m: m.timesteps(10.0), "steps 10.0: expected a whole number"),
        (lambda m: m.timesteps(3, start=2.5), "start 2.5: expected a whole number"),
        (lambda m: m.timesteps(3, spacing="even"), "timestep_spacing 'even'"),
        (
            lambda m: m.interpolate(IMAGES, IMAGES, 0.5, t=100),
            "weights 0.5: expected a list of numbers from 0 to 1",
        ),
        (
            lambda m: m.interpolate(IMAGES, IMAGES, ["a"], t=100),
            "weights .'a'.: expected a list of numbers",
        ),
        (lambda m: m.interpolate(IMAGES, IMAGES, [0.5], t=1.5), "t 1.5: expected a whole number"),
        (
            lambda m: m.interpolate(IMAGES[..., :4], IMAGES, [0.5], t=10),
            r"x0 of shape \(2, 1, 8, 4\)",
        ),
        (
            lambda m: m.interpolate(IMAGES, IMAGES[:, :, :4], [0.5], t=10),
            r"other of shape \(2, 1, 4, 8\)",
        ),
        (
            lambda m: m.bits_per_dim(torch.zeros(2, 1, 9, 9)),
            r"x0 of shape \(2, 1, 9, 9\): expected \(N, 1, 8, 8\)",
        ),
        (lambda m: m.bits_per_dim(IMAGES, terms=3.0), "terms 3.0: expected a whole number"),
        (lambda m: m.bits_per_dim(IMAGES, seed="0"), "seed '0': expected a whole number"),
    ],
)
def test_an_argument_of_another_kind_or_without_its_partner_is_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(gaussian(means=(-0.4, 0.4)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(num_timesteps=10.0), "num_timesteps 10.0: expected a whole"),
        (dict(image_size="8"), "image_size '8'"),
        (dict(channels=0), "channels 0: expected at least 1"),
        (dict(sample_steps=2.5), "sample_steps 2.5: expected"),
        (dict(min_snr_gamma="5"), "min_snr_gamma '5': expected"),
        (dict(min_snr_gamma=math.inf), "min_snr_gamma inf"),
        (dict(guidance_scale=None), "guidance_scale None: expected a number"),
        (dict(variance=None), "variance None"),
        (
            dict(loss="l1", min_snr_gamma=5.0),
            "min_snr_gamma 5.0 with loss 'l1': the weights are for squared errors",
        ),
        (dict(loss="vlb", min_snr_gamma=5.0), "min_snr_gamma 5.0 with loss 'vlb'"),
        (dict(guidance_scale=2.0), "guidance_scale 2.0: the network is unconditional; expected 1"),
        (
            dict(prediction="v", zero_terminal_snr=True, min_snr_gamma=5.0),
            "min_snr_gamma 5.0 with zero_terminal_snr",
        ),
        (dict(timestep_spacing="log"), "timestep_spacing 'log'"),
    ],
)
def test_settings_of_another_kind_or_that_do_not_work_together_are_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        DDPM(torch.nn.Identity(), **settings)
    assert "\n" not in str(error.value)


def test_a_learned_variance_needs_its_fraction():
    ddpm = DDPM(torch.nn.Identity(), image_size=8, channels=1, variance="learned")
    with pytest.raises(ValueError, match="variance_fraction: expected that of the network"):
        ddpm.step(IMAGES, IMAGES, T, T - 1, eta=1.0, noise=IMAGES)
    assert ddpm.step(IMAGES, IMAGES, T, T - 1).shape == IMAGES.shape  # DDIM needs none


def test_a_network_of_ones_own_is_told_no_label_by_the_label_that_means_it():
    seen = []

    class Own(torch.nn.Module):
        num_classes = 7

        def forward(self, xt, t, y):
            seen.append(y.tolist())  # None has no tolist
            return torch.zeros_like(xt)

    ddpm = DDPM(Own(), image_size=8, channels=1, num_timesteps=10).eval()
    ddpm(IMAGES)
    ddpm.predict(IMAGES, T)
    ddpm.predict(IMAGES, T, torch.tensor([1, 2]), guidance_scale=0)
    ddpm.bits_per_dim(IMAGES, terms=2)
    ddpm.interpolate(IMAGES, IMAGES, [0.5], t=3, steps=1)
    assert seen == [[7, 7]] * 6
    ddpm.sample(2, y=[1, 2], guidance_scale=2.0, steps=1)
    assert seen[-1] == [1, 2, 7, 7]
