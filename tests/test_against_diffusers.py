"""The same network, noise and timesteps through diffusers' schedulers give the same images.

Where conventions differ they are set alike: all schedulers clip x0 (DPM-Solver++ cannot, so its network keeps x0
inside), visit the timesteps that ours visit, and end at the image itself (`set_alpha_to_one`, `final_sigmas_type`).
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffusion import DDPM

# eps with the cosine schedule is left out: x0 is then eps over 5e-5 at the start, and float32 decides nothing.
CASES = [("eps", "linear"), ("v", "linear"), ("v", "cosine"), ("x0", "cosine")]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (2, 1, 8, 8)
DDPM_NOISE = "diffusers.schedulers.scheduling_ddpm.randn_tensor"  # what their DDPM draws with


class Network(torch.nn.Module):
    """A fixed smooth function of image and time. Its x0 is in the range of images, unless `wild`."""

    def __init__(self, prediction, wild=False):
        super().__init__()
        self.prediction, self.wild = prediction, wild
        self.kernel = 0.2 * torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))  # small: not chaotic
        self.alphas_cumprod = None

    def forward(self, xt, t, y=None):
        a = self.alphas_cumprod[t][:, None, None, None].float()
        x0, fraction = torch.conv2d(xt, self.kernel, padding=1).add(3 * a).sin().chunk(2, dim=1)
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


def theirs(kind, ddpm, tables=True, **options):
    """Their scheduler with our settings, and with our tables, which the first test compares."""
    options = dict(num_train_timesteps=ddpm.num_timesteps, beta_start=1e-4, beta_end=0.02,
                   beta_schedule=SCHEDULES[ddpm.beta_schedule], prediction_type=NAMES[ddpm.prediction],
                   timestep_spacing=ddpm.timestep_spacing, rescale_betas_zero_snr=ddpm.zero_terminal_snr) | options
    scheduler = kind(**options)
    if tables:  # theirs are float32, where 1 - alphas_cumprod has three digits at the clean end
        scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = ddpm.betas, 1 - ddpm.betas, ddpm.alphas_cumprod
    return scheduler


def walk(scheduler, ddpm, steps, xT, noises=None, **options):
    """Their loop. `noises` stand in for what the scheduler would draw."""
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == ddpm.timesteps(steps)
    xt = xT
    for i, t in enumerate(scheduler.timesteps):
        output = ddpm.network(xt, t.expand(len(xt)))
        if noises is not None:
            options["variance_noise"] = noises[i]
        xt = scheduler.step(output, t, xt, **options).prev_sample
    return xt


def draws(steps, seed):
    """What `DDPM.sample` draws: the noise of each step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(steps)]


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Schedules and single steps


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedules_are_the_same(schedule, zero_terminal_snr):
    ddpm = ours("v", beta_schedule=schedule, zero_terminal_snr=zero_terminal_snr)
    scheduler = theirs(DDIMScheduler, ddpm, tables=False)
    close(ddpm.betas, scheduler.betas.double())
    close(ddpm.alphas_cumprod, scheduler.alphas_cumprod.double())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noisy_images_and_velocities_are_the_same(schedule):
    ddpm = ours("v", beta_schedule=schedule)
    scheduler = theirs(DDPMScheduler, ddpm)
    t, x0, eps = torch.tensor([3, 700]), start(), draws(1, 0)[0]
    close(ddpm.q_sample(x0, t, eps), scheduler.add_noise(x0, eps, t))
    close(ddpm._target(x0, eps, t), scheduler.get_velocity(x0, eps, t))


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
@pytest.mark.parametrize("steps, spacing, variance", [
    (1, "trailing", "fixed_small"), (7, "trailing", "fixed_small"), (7, "linspace", "fixed_small"),
    (7, "linspace", "fixed_large"), (200, "linspace", "fixed_large")])
def test_ddpm_is_the_same(prediction, schedule, steps, spacing, variance, monkeypatch):
    """The large variance down to t = 0 only: from higher up theirs adds noise to the image itself."""
    ddpm = ours(prediction, wild=True, variance=variance, beta_schedule=schedule, timestep_spacing=spacing)
    scheduler = theirs(DDPMScheduler, ddpm, variance_type=variance, clip_sample=True)
    noises = iter(draws(steps, seed=5))
    xT = start()
    images = ddpm.sample(2, sampler="ddpm", steps=steps, xT=xT, seed=5)
    monkeypatch.setattr(DDPM_NOISE, lambda *args, **options: next(noises))
    close(images, walk(scheduler, ddpm, steps, xT))


@pytest.mark.parametrize("prediction, schedule", CASES)
@pytest.mark.parametrize("steps, eta", [(1, 0.0), (5, 0.0), (5, 0.6), (50, 0.0), (50, 1.0), (200, 0.6)])
def test_ddim_is_the_same(prediction, schedule, steps, eta):
    """On trailing timesteps: from other ones theirs goes back by 1000 / steps, not to the next that it visits."""
    ddpm = ours(prediction, wild=True, beta_schedule=schedule)
    scheduler = theirs(DDIMScheduler, ddpm, clip_sample=True, set_alpha_to_one=True)
    xT = start()
    images = ddpm.sample(2, sampler="ddim", steps=steps, eta=eta, xT=xT, seed=5)
    close(images, walk(scheduler, ddpm, steps, xT, draws(steps, seed=5), eta=eta, use_clipped_model_output=True))


@pytest.mark.parametrize("prediction, schedule", CASES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_is_the_same(prediction, schedule, steps, eta):
    """With trailing timesteps: theirs leaves t = 0 out of the evenly spaced ones. eta 1 is its SDE form."""
    ddpm = ours(prediction, beta_schedule=schedule)
    scheduler = theirs(DPMSolverMultistepScheduler, ddpm, solver_order=2, solver_type="midpoint",
                       algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++", final_sigmas_type="zero",
                       lower_order_final=True)
    xT = start()
    images = ddpm.sample(2, sampler="dpm++", steps=steps, eta=eta, xT=xT, seed=5)
    close(images, walk(scheduler, ddpm, steps, xT, draws(steps, seed=5) if eta else None), 5e-5)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_is_the_same(prediction):
    """By DDIM: their DPM-Solver++ ends at 2**-24 instead of zero."""
    ddpm, xT = ours(prediction, zero_terminal_snr=True), start()
    scheduler = theirs(DDIMScheduler, ddpm, clip_sample=True, set_alpha_to_one=True)
    close(ddpm.sample(2, sampler="ddim", steps=20, xT=xT), walk(scheduler, ddpm, 20, xT))


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("wild", [False, True])
def test_x0_is_clipped_for_the_wild_network_alone(prediction, wild):
    ddpm, t = ours(prediction, wild), torch.full((2,), 300)
    assert (ddpm._x0(ddpm.network(start(), t), start(), t).abs().max() > 1) == wild
