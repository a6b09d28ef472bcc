"""The same network, noise and timesteps through diffusers' schedulers give the same images.

All is float64, theirs too (see `double`), so that 1e-9 tells rounding from another formula. Where
conventions differ they are set alike: all schedulers clip x0 (DPM-Solver++ cannot, so its network
keeps x0 inside), visit the timesteps that ours visit, and end at the image itself
(`set_alpha_to_one`, `final_sigmas_type`).
"""

import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffusion import DDPM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (2, 1, 8, 8)
DDPM_NOISE = "diffusers.schedulers.scheduling_ddpm.randn_tensor"  # what their DDPM draws with


class Torch64:
    """torch with float64 for float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(scope="module", autouse=True)
def double():
    """float64 here and in the schedulers, which ask for float32 by name."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler):
            patch.setattr(sys.modules[kind.__module__], "torch", Torch64())
        yield
    torch.set_default_dtype(dtype)


class Network(torch.nn.Module):
    """A fixed smooth function of image and time. Its x0 lies in [-1, 1], unless `wild`."""

    def __init__(self, prediction, outputs, wild):
        super().__init__()
        self.prediction, self.outputs, self.wild = prediction, outputs, wild
        generator = torch.Generator().manual_seed(0)
        self.kernel = 0.2 * torch.randn(2, 1, 3, 3, generator=generator)  # small: not chaotic

    def forward(self, xt, t, y=None):
        a = self.alphas_cumprod[t][:, None, None, None]
        x0, fraction = torch.conv2d(xt, self.kernel, padding=1).add(3 * a).sin().chunk(2, dim=1)
        x0 = (1.5 if self.wild else 0.9) * x0
        eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()
        said = {"x0": x0, "eps": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[self.prediction]
        return torch.cat([said, fraction], dim=1)[:, : self.outputs]


def ours(prediction="eps", schedule="linear", wild=False, variance="fixed_small", **settings):
    network = Network(prediction, 2 if variance == "learned" else 1, wild)
    settings |= dict(prediction=prediction, beta_schedule=schedule, variance=variance)
    ddpm = DDPM(network, image_size=8, channels=1, **settings)
    network.alphas_cumprod = ddpm.alphas_cumprod
    return ddpm


def theirs(kind, ddpm, **options):
    """Their scheduler with our settings."""
    return kind(
        num_train_timesteps=ddpm.num_timesteps,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=SCHEDULES[ddpm.beta_schedule],
        prediction_type=NAMES[ddpm.prediction],
        timestep_spacing=ddpm.timestep_spacing,
        rescale_betas_zero_snr=ddpm.zero_terminal_snr,
        **options,
    )


def draw(number, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(number)]


def start():
    return draw(1, seed=9)[0]


def our_images(ddpm, steps, sampler, eta=None):
    """What `DDPM.sample` does, in float64. Its noises are `draw(steps, seed=5)`."""
    generator = torch.Generator().manual_seed(5)
    timesteps = ddpm.timesteps(steps)
    *_, (_, images) = ddpm.walk(start(), timesteps, None, sampler, eta, generator=generator)
    return images


def their_images(scheduler, ddpm, steps, noises=None, **options):
    """Their loop. `noises` stand in for what the scheduler would draw."""
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == ddpm.timesteps(steps)
    if isinstance(scheduler, DPMSolverMultistepScheduler):  # rounds these to float32 by numpy
        a = scheduler.alphas_cumprod[scheduler.timesteps]
        exact = torch.cat([((1 - a) / a).sqrt(), torch.zeros(1)])
        torch.testing.assert_close(scheduler.sigmas, exact.float())
        scheduler.sigmas = exact
    xt = start()
    for i, t in enumerate(scheduler.timesteps):
        output = ddpm.network(xt, t.expand(len(xt)))
        if noises is not None:
            options["variance_noise"] = noises[i]
        xt = scheduler.step(output, t, xt, **options).prev_sample
    return xt


def close(a, b):
    """1e-11 would do but for their least variance, 1e-20, on the way to the image."""
    assert a.dtype == b.dtype == torch.float64
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# Schedules


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_noisy_images_and_velocities_are_the_same(schedule, zero_terminal_snr):
    ddpm = ours("v", schedule, zero_terminal_snr=zero_terminal_snr)
    scheduler = theirs(DDPMScheduler, ddpm)
    close(ddpm.betas, scheduler.betas)
    close(ddpm.alphas_cumprod, scheduler.alphas_cumprod)
    t, x0, eps = torch.tensor([3, 700]), start(), draw(1, seed=5)[0]
    close(ddpm.q_sample(x0, t, eps), scheduler.add_noise(x0, eps, t))
    close(ddpm.target(x0, eps, t), scheduler.get_velocity(x0, eps, t))


# Trajectories


@pytest.mark.parametrize(
    "prediction, schedule, steps, spacing, variance",
    [
        ("eps", "cosine", 1, "trailing", "fixed_small"),
        ("eps", "linear", 40, "linspace", "fixed_small"),
        ("v", "cosine", 200, "linspace", "fixed_large"),
        ("x0", "linear", 200, "linspace", "learned_range"),
    ],
)
def test_ddpm_is_the_same(prediction, schedule, steps, spacing, variance, monkeypatch):
    """Larger variances down to t = 0 only: from higher up theirs add noise to the image."""
    settings = dict(variance=variance.removesuffix("_range"), timestep_spacing=spacing)
    ddpm = ours(prediction, schedule, wild=True, **settings)
    scheduler = theirs(DDPMScheduler, ddpm, variance_type=variance)
    noises = iter(draw(steps, seed=5))
    monkeypatch.setattr(DDPM_NOISE, lambda *args, **options: next(noises))
    close(our_images(ddpm, steps, "ddpm"), their_images(scheduler, ddpm, steps))


@pytest.mark.parametrize(
    "prediction, schedule, steps, eta, zero_terminal_snr",
    [
        ("eps", "linear", 1, 0.0, False),
        ("v", "cosine", 50, 1.0, False),
        ("eps", "linear", 200, 0.6, False),
        ("v", "linear", 20, 0.0, True),
    ],
)
def test_ddim_is_the_same(prediction, schedule, steps, eta, zero_terminal_snr):
    """On trailing timesteps: from others theirs goes back by 1000 / steps, past the next one."""
    ddpm = ours(prediction, schedule, wild=True, zero_terminal_snr=zero_terminal_snr)
    scheduler = theirs(DDIMScheduler, ddpm, set_alpha_to_one=True)
    options = dict(eta=eta, use_clipped_model_output=True)
    images = their_images(scheduler, ddpm, steps, draw(steps, seed=5), **options)
    close(our_images(ddpm, steps, "ddim", eta), images)


@pytest.mark.parametrize(
    "prediction, schedule, steps, sampler",
    [
        ("x0", "cosine", 1, "dpm++"),
        ("eps", "linear", 3, "dpm++"),
        ("v", "cosine", 50, "dpm++"),
        ("eps", "cosine", 10, "sde-dpm++"),
    ],
)
def test_dpm_solver_is_the_same(prediction, schedule, steps, sampler):
    """On trailing timesteps: theirs leaves t = 0 out of the evenly spaced ones."""
    ddpm = ours(prediction, schedule)
    options = dict(algorithm_type=f"{sampler[:-2]}solver++", final_sigmas_type="zero")
    scheduler = theirs(DPMSolverMultistepScheduler, ddpm, solver_order=2, **options)
    noises = draw(steps, seed=5) if sampler == "sde-dpm++" else None
    close(our_images(ddpm, steps, sampler), their_images(scheduler, ddpm, steps, noises))
