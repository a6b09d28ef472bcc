"""The same network, noise and timesteps through diffusers' schedulers give the same images.

All is float64, theirs too (see `double`), so that 1e-9 tells rounding from another formula. Where conventions differ
they are set alike: all schedulers clip x0 (DPM-Solver++ cannot, so its network keeps x0 inside), visit the timesteps
that ours visit, and end at the image itself (`set_alpha_to_one`, `final_sigmas_type`).
"""

import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffusion import DDPM, SAMPLERS, walk

CASES = [("eps", "linear"), ("eps", "cosine"), ("v", "linear"), ("v", "cosine"), ("x0", "cosine")]
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
    """float64 and one thread, here and in the schedulers, which ask for float32 by name."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler):
            patch.setattr(sys.modules[kind.__module__], "torch", Torch64())
        yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


class Network(torch.nn.Module):
    """A fixed smooth function of image and time. Its x0 is in the range of images, unless `wild`."""

    def __init__(self, prediction, wild=False):
        super().__init__()
        self.prediction, self.wild = prediction, wild
        self.kernel = 0.2 * torch.randn(
            2, 1, 3, 3, generator=torch.Generator().manual_seed(0)
        )  # small: not chaotic
        self.alphas_cumprod = None

    def forward(self, xt, t, y=None):
        a = self.alphas_cumprod[t][:, None, None, None]
        x0, fraction = (
            torch.conv2d(xt.double(), self.kernel, padding=1).add(3 * a).sin().chunk(2, dim=1)
        )
        x0 = 1.5 * x0 if self.wild else 0.9 * x0
        eps = (xt - a.sqrt() * x0) / (1 - a).sqrt()
        said = {"x0": x0, "eps": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[self.prediction]
        return torch.cat([said, fraction], dim=1)


def ours(prediction="eps", wild=False, variance="fixed_small", **settings):
    network = Network(prediction, wild)
    settings = dict(image_size=8, channels=1, prediction=prediction, variance=variance) | settings
    ddpm = DDPM(network, **settings)
    network.alphas_cumprod = ddpm.alphas_cumprod
    if variance != "learned":
        network.register_forward_hook(lambda module, args, output: output[:, :1])
    return ddpm


def theirs(kind, ddpm, **options):
    """Their scheduler with our settings."""
    options = (
        dict(
            num_train_timesteps=ddpm.num_timesteps,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule=SCHEDULES[ddpm.beta_schedule],
            prediction_type=NAMES[ddpm.prediction],
            timestep_spacing=ddpm.timestep_spacing,
            rescale_betas_zero_snr=ddpm.zero_terminal_snr,
        )
        | options
    )
    return kind(**options)


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


def our_images(ddpm, steps, sampler, eta=None):
    """What `DDPM.sample` does, in float64."""
    default, order = SAMPLERS[sampler]
    generator = torch.Generator().manual_seed(5)
    *_, (_, images) = walk(
        ddpm,
        start(),
        [*ddpm.timesteps(steps), -1],
        None,
        1.0,
        default if eta is None else eta,
        order,
        generator,
    )
    return images


def draws(steps):
    """The noise of each step of `our_images`."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(SHAPE, generator=generator) for _ in range(steps)]


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))


def close(
    a, b, tolerance=1e-9
):  # 1e-11 would do but for their least variance, 1e-20, on the way to the image
    assert a.dtype == b.dtype == torch.float64
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Schedules and single steps


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedules_are_the_same(schedule, zero_terminal_snr):
    ddpm = ours("v", beta_schedule=schedule, zero_terminal_snr=zero_terminal_snr)
    scheduler = theirs(DDIMScheduler, ddpm)
    close(ddpm.betas, scheduler.betas)
    close(ddpm.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noisy_images_and_velocities_are_the_same(schedule):
    ddpm = ours("v", beta_schedule=schedule)
    scheduler = theirs(DDPMScheduler, ddpm)
    t, x0, eps = torch.tensor([3, 700]), start(), draws(1)[0]
    close(ddpm.q_sample(x0, t, eps), scheduler.add_noise(x0, eps, t))
    close(ddpm.target(x0, eps, t), scheduler.get_velocity(x0, eps, t))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_a_step_of_the_chain_has_the_same_mean_and_variance(variance, prediction, t, monkeypatch):
    ddpm = ours(prediction, variance=variance, wild=True)
    name = "learned_range" if variance == "learned" else variance
    scheduler = theirs(DDPMScheduler, ddpm, variance_type=name, clip_sample=True)
    xt, at = start(), torch.full((2,), t)
    mean, deviation, x0 = ddpm.p_mean_variance(xt, at)
    output = ddpm.network(xt, at)
    results = []
    for noise in (torch.zeros(SHAPE), torch.ones(SHAPE)):
        monkeypatch.setattr(DDPM_NOISE, lambda *args, noise=noise, **options: noise)
        results.append(scheduler.step(output, t, xt))
    close(x0, results[0].pred_original_sample)
    close(mean, results[0].prev_sample)
    close(deviation.sqrt().expand(SHAPE), results[1].prev_sample - results[0].prev_sample)


# Trajectories


@pytest.mark.parametrize("prediction, schedule", CASES)
@pytest.mark.parametrize(
    "steps, spacing, variance",
    [
        (1, "trailing", "fixed_small"),
        (7, "trailing", "fixed_small"),
        (7, "linspace", "fixed_small"),
        (7, "linspace", "fixed_large"),
        (200, "linspace", "fixed_large"),
    ],
)
def test_ddpm_is_the_same(prediction, schedule, steps, spacing, variance, monkeypatch):
    """The large variance down to t = 0 only: from higher up theirs adds noise to the image itself."""
    if steps == 200 and (prediction, schedule) != ("v", "cosine"):
        steps = 40
    ddpm = ours(
        prediction, wild=True, variance=variance, beta_schedule=schedule, timestep_spacing=spacing
    )
    scheduler = theirs(DDPMScheduler, ddpm, variance_type=variance, clip_sample=True)
    noises = iter(draws(steps))
    monkeypatch.setattr(DDPM_NOISE, lambda *args, **options: next(noises))
    close(our_images(ddpm, steps, "ddpm"), their_images(scheduler, ddpm, steps))


@pytest.mark.parametrize("prediction, schedule", CASES)
@pytest.mark.parametrize(
    "steps, eta", [(1, 0.0), (5, 0.0), (5, 0.6), (50, 0.0), (50, 1.0), (200, 0.6)]
)
def test_ddim_is_the_same(prediction, schedule, steps, eta):
    """On trailing timesteps: from other ones theirs goes back by 1000 / steps, not to the next that it visits."""
    if steps == 200 and (prediction, schedule) != ("eps", "linear"):
        steps = 40
    ddpm = ours(prediction, wild=True, beta_schedule=schedule)
    scheduler = theirs(DDIMScheduler, ddpm, clip_sample=True, set_alpha_to_one=True)
    images = their_images(
        scheduler, ddpm, steps, draws(steps), eta=eta, use_clipped_model_output=True
    )
    close(our_images(ddpm, steps, "ddim", eta), images)


@pytest.mark.parametrize("prediction, schedule", CASES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++"])
def test_dpm_solver_is_the_same(prediction, schedule, steps, sampler):
    """With trailing timesteps: theirs leaves t = 0 out of the evenly spaced ones."""
    ddpm = ours(prediction, beta_schedule=schedule)
    scheduler = theirs(
        DPMSolverMultistepScheduler,
        ddpm,
        solver_order=2,
        solver_type="midpoint",
        algorithm_type=f"{sampler[:-2]}solver++",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    images = their_images(scheduler, ddpm, steps, draws(steps) if sampler == "sde-dpm++" else None)
    close(our_images(ddpm, steps, sampler), images)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_is_the_same(prediction):
    """By DDIM: their DPM-Solver++ ends at 2**-24 instead of zero."""
    ddpm = ours(prediction, zero_terminal_snr=True)
    scheduler = theirs(DDIMScheduler, ddpm, clip_sample=True, set_alpha_to_one=True)
    close(our_images(ddpm, 20, "ddim"), their_images(scheduler, ddpm, 20))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_takes_the_walk_of_these_tests(sampler):
    ddpm = ours("v", wild=True)
    images = ddpm.sample(2, sampler=sampler, steps=10, xT=start(), seed=5)  # that begins in float32
    close(images.double(), our_images(ddpm, 10, sampler), 1e-4)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("wild", [False, True])
def test_x0_is_clipped_for_the_wild_network_alone(prediction, wild):
    ddpm, t = ours(prediction, wild), torch.full((2,), 300)
    assert (ddpm.x0_from_output(ddpm.network(start(), t), start(), t).abs().max() > 1) == wild
