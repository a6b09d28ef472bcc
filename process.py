"""The Gaussian process of diffusion, without a network: schedules, posteriors, sampler steps.

DDPM: arXiv 2006.11239. Improved DDPM: 2102.09672. DDIM: 2010.02502. DPM-Solver++: 2211.01095.
v-prediction: 2202.00512. Averaged targets: 2302.00670. Min-SNR weights: 2303.09556. Zero terminal
SNR: 2305.08891. Timesteps are 0-based: t = 0 is the papers' t = 1, and t = -1 is the clean image.
"""

import math

import torch
from torch import nn

from support import checks


def linear_betas(num_timesteps):
    """From 1e-4 to 0.02 in 1000 steps (DDPM sec. 4); other numbers of steps end equally noisy."""
    scale = 1000 / num_timesteps
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
    return betas.clamp(max=0.999)


def cosine_betas(num_timesteps):
    """Improved DDPM eq. 17, with s = 0.008 and betas of at most 0.999."""
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def straight_betas(num_timesteps):
    """Flow matching's (1 - u) x0 + u eps, scaled to unit variance (2209.03003, 2210.02747)."""
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alpha_bar = (1 - u) ** 2 / ((1 - u) ** 2 + u**2)
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def with_zero_terminal_snr(betas):
    """Shift and scale sqrt(alphas_cumprod) to begin as before and end at 0 (2305.08891 alg. 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - alpha_bar / torch.cat([torch.ones_like(root[:1]), alpha_bar[:-1]])


def times(coefficient, x):
    """A float64 coefficient (N, 1, 1, 1) times images, in the precision of the images."""
    return coefficient.to(x.dtype) * x


# Each name that can be chosen is a key of the dictionary that holds what it stands for.
BETA_SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas, "straight": straight_betas}
# What a network can predict is a sum of x0 and eps: their factors, from alpha_bar.
PREDICTIONS = {
    "eps": lambda alpha_bar: (torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)),
    "v": lambda alpha_bar: (-(1 - alpha_bar).sqrt(), alpha_bar.sqrt()),  # 2202.00512 sec. 4
    "x0": lambda alpha_bar: (torch.ones_like(alpha_bar), torch.zeros_like(alpha_bar)),
}
# Where the log variance of p(x_s | x_t) lies: 0 is the small one, 1 the large one. The image itself
# gets the small one, as in the code of Improved DDPM. `fraction` is what a network says.
VARIANCES = {
    "fixed_small": lambda s, fraction: 0.0,
    "fixed_large": lambda s, fraction: (s >= 0).double()[:, None, None, None],
    "learned": lambda s, fraction: fraction,  # Improved DDPM eq. 15
}
# Timesteps from `start` down, float64. 'trailing' leaves out the clean end, where little happens
# (2305.08891 sec. 3.3); 'linspace' goes down to 0 (Improved DDPM sec. 4).
SPACINGS = {
    "trailing": lambda start, steps: (
        torch.linspace(start + 1, (start + 1) / steps, steps, dtype=torch.float64).round() - 1
    ),
    "linspace": lambda start, steps: torch.linspace(start, 0, steps, dtype=torch.float64).round(),
}


class GaussianProcess(nn.Module):
    """The process that turns images into noise, its posteriors, and one step of any sampler back.

    Args:
        num_timesteps: number of steps from image to noise.
        beta_schedule: 'linear' (DDPM), 'cosine' (Improved DDPM) or 'straight' (flow matching).
        prediction: what a network predicts: the noise 'eps', the velocity 'v' or the image 'x0'.
        skip_std: for 'x0': how far off the network's x0 is in grey areas, see `with_skip`; 0: no
            skip.
        variance: variance of p(x_{t-1} | x_t): 'fixed_small' is the posterior's, 'fixed_large' is
            beta (DDPM sec. 3.2), 'learned' lies between the two where the network says (Improved
            DDPM sec. 3.1).
        zero_terminal_snr: rescale the schedule so that x_T is pure noise. It does not work with
            'eps': at the start the noise says nothing about x0.
        timestep_spacing: 'trailing' or 'linspace', see `timesteps`.

    Buffers: `betas` and `alphas_cumprod`, float64, (num_timesteps,), whatever the module is cast
    to. Methods check nothing: shapes are (N, C, H, W) for images and (N,), int64, for timesteps.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    def __init__(
        self,
        num_timesteps=1000,
        beta_schedule="linear",
        *,
        prediction="eps",
        skip_std=0.0,
        variance="fixed_small",
        zero_terminal_snr=False,
        timestep_spacing="trailing",
    ):
        super().__init__()
        self.num_timesteps = num_timesteps
        self.beta_schedule = beta_schedule
        self.prediction = prediction
        self.skip_std = skip_std
        self.variance = variance
        self.zero_terminal_snr = zero_terminal_snr
        self.timestep_spacing = timestep_spacing
        checks.process(self, BETA_SCHEDULES, PREDICTIONS, VARIANCES, SPACINGS)
        betas = BETA_SCHEDULES[beta_schedule](num_timesteps)
        betas = with_zero_terminal_snr(betas) if zero_terminal_snr else betas
        # Float64, since 1 - alphas_cumprod is small at the clean end. The settings decide the
        # tables, so they are not saved.
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, dim=0), persistent=False)

    def _apply(self, fn, recurse=True):
        """What `.to()` and `.half()` call: the tables follow to the device and stay float64."""
        tables = self.betas, self.alphas_cumprod
        super()._apply(fn, recurse)
        if self.betas.dtype != torch.float64:
            self.betas, self.alphas_cumprod = (table.to(self.device) for table in tables)
        return self

    @property
    def device(self):
        """The device of the tables."""
        return self.betas.device

    def alpha_bar(self, t):
        """alphas_cumprod at timesteps from -1 (where it is 1), (N,) -> float64, (N, 1, 1, 1)."""
        return torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])[:, None, None, None]

    def snr(self, t):
        """The signal-to-noise ratio of x_t, (N,) -> float64, (N, 1, 1, 1)."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    # The forward process and its posteriors

    def q_sample(self, x0, t, eps):
        """Noisy images x_t ~ q(x_t | x_0) from images and standard normal noise (DDPM eq. 4)."""
        alpha_bar = self.alpha_bar(t)
        return times(alpha_bar.sqrt(), x0) + times((1 - alpha_bar).sqrt(), eps)

    def q_posterior(self, x0, xt, t, s=None):
        """Mean, (N, C, H, W), and variance, (N, 1, 1, 1), of q(x_s | x_t, x_0) (DDPM eq. 7).

        `s` is the less noisy timestep to go to, (N,); None means `t - 1`. Between timesteps further
        apart these are the posteriors of the diffusion that has only those timesteps (Improved DDPM
        sec. 4).
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bar(t), self.alpha_bar(t - 1 if s is None else s)
        alpha = alpha_bar_t / alpha_bar_s  # of the one step from s to t
        beta = 1 - alpha
        mean = times(alpha_bar_s.sqrt() * beta / (1 - alpha_bar_t), x0) + times(
            alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t), xt
        )
        variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta
        return mean, variance.to(xt.dtype)

    def posterior_mean(self, xt, t, *candidates, allowed=None):
        """E[x_0 | x_t] where x_0 is one of some images, all equally likely (2302.00670).

        A perfect network would predict this from `xt` if these images were all the data there is.

        Args:
            xt: noisy images, (N, C, H, W).
            t: timesteps, int64, (N,).
            candidates: the images, (M, C, H, W), or (M, 1, H, W) if all channels are equal; one
                tensor or several.
            allowed: which of them each noisy image may come from, bool, (N, total M); None: all.
        """
        alpha_bar = self.alpha_bar(t)[:, :, 0, 0]
        product_factor = (alpha_bar.sqrt() / (1 - alpha_bar)).to(xt.dtype)
        size_factor = (alpha_bar / (1 - alpha_bar) / 2).to(xt.dtype)
        candidates = [images.flatten(1) for images in candidates]
        repeats = xt[0].numel() // candidates[0].shape[1]  # equal channels that one stands for
        x = (xt if repeats == 1 else xt.sum(dim=1)).flatten(1)
        size = torch.cat([torch.linalg.vector_norm(images, dim=1) for images in candidates])
        size = repeats * size.square()
        with torch.autocast(xt.device.type, enabled=False):  # bf16 is too coarse here
            product = torch.cat([images @ x.T for images in candidates]).T  # faster than x @ .T
            # log q(x_t | x_0), DDPM eq. 4, without the terms that all candidates share
            logits = product_factor * product - size_factor * size
            if allowed is not None:
                logits = logits.masked_fill(~allowed, -math.inf)
            weights = logits.softmax(dim=1).split([len(images) for images in candidates], dim=1)
            mean = sum(weight @ images for weight, images in zip(weights, candidates))
        return mean.view(len(xt), -1, *xt.shape[2:]).expand_as(xt)

    # What a network predicts

    def target(self, x0, eps, t):
        """What the network should predict for x_t = q_sample(x0, t, eps), (N, C, H, W)."""
        of_x0, of_eps = PREDICTIONS[self.prediction](self.alpha_bar(t))
        return times(of_x0, x0) + times(of_eps, eps)

    def x0_from_output(self, output, xt, t):
        """The x0 that a network's output stands for, (N, C, H, W), not clipped (DDPM eq. 15)."""
        alpha_bar = self.alpha_bar(t)
        of_x0, of_eps = PREDICTIONS[self.prediction](alpha_bar)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        # the output and x_t, eq. 4, are two sums of x0 and eps
        determinant = of_eps * signal - of_x0 * noise
        return times(of_eps / determinant, xt) - times(noise / determinant, output)

    def with_skip(self, x0, xt, t):
        """Improve a network's x0 by x_t, which knows more of the image at the clean end.

        Two estimates, weighted by their inverse variances: the network's, d^2, which is assumed,
        and (1 - alpha_bar) / alpha_bar of x_t / sqrt(alpha_bar). With a constant d it is the skip
        of EDM (2206.00364 sec. 5). A pixel in [-1, 1] of mean m has a variance of at most 1 - m^2
        (Bhatia-Davis), so d^2 = skip_std^2 (1.01 - x0^2): black or white is trusted more.
        """
        alpha_bar = self.alpha_bar(t)
        own = self.skip_std**2 * (1.01 - x0.clamp(-1, 1) ** 2)
        noise = (1 - alpha_bar).to(xt.dtype)
        both = times(alpha_bar.sqrt(), own * xt) + noise * x0
        return both / (times(alpha_bar, own) + noise)

    def eps_from_x0(self, x0, xt, t):
        """The eps with q_sample(x0, t, eps) = x_t, (N, C, H, W) (DDPM eq. 4, solved for eps)."""
        return times(1 / (1 - self.alpha_bar(t)).sqrt(), xt) - times(self.snr(t).sqrt(), x0)

    def min_snr_weight(self, t, gamma):
        """Loss weights, (N,): an error becomes min(SNR, gamma) times x0's (2303.09556 sec. 3.4)."""
        snr = self.snr(t)[:, 0, 0, 0]
        of_x0, of_eps = PREDICTIONS[self.prediction](self.alphas_cumprod[t])
        error = (of_x0 - of_eps * snr.sqrt()) ** 2  # of the output, divided by that of its x0
        return snr.clamp(max=gamma) / error

    # The reverse process

    def log_variances(self, t, s):
        """Logarithms of the small and the large fixed variance of p(x_s | x_t), (N, 1, 1, 1).

        Both are float64. On fewer timesteps they are those of the diffusion that has only these
        (Improved DDPM sec. 4).
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bar(t), self.alpha_bar(s)
        large = 1 - alpha_bar_t / alpha_bar_s
        small = (1 - alpha_bar_s) / (1 - alpha_bar_t) * large
        # At the last step the small variance is 0, but the decoder needs its logarithm: take the
        # one of t = 1.
        if self.num_timesteps > 1:
            smallest = self.betas[0] * self.betas[1] / (1 - self.alphas_cumprod[1])
        else:
            smallest = large
        return torch.where(s[:, None, None, None] < 0, smallest, small).log(), large.log()

    def log_variance(self, t, s, variance_fraction=None):
        """Logarithm of the variance of p(x_s | x_t), float64, (N, 1, 1, 1).

        (N, C, H, W) if it is learned; `variance_fraction` is then what the network says, 0 to 1.
        """
        small, large = self.log_variances(t, s)
        place = VARIANCES[self.variance](s, variance_fraction)
        return place * large + (1 - place) * small

    def step(self, x0, eps, t, s, eta=0.0, noise=None, variance_fraction=None):
        """From t to the less noisy s, given the predicted x0 and eps (DDIM eq. 12 and 16).

        `eta` 0 is DDIM and needs no noise. `eta` 1 with standard normal `noise` is DDPM restricted
        to the chosen timesteps: the mean of `q_posterior` and the model's variance. The image
        itself, s = -1, gets no noise.
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bar(t), self.alpha_bar(s)
        sigma2 = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        xs = times(alpha_bar_s.sqrt(), x0)
        xs = xs + times((1 - alpha_bar_s - sigma2).clamp(min=0).sqrt(), eps)
        if not eta:
            return xs
        std = eta * (self.log_variance(t, s, variance_fraction) / 2).exp()
        return xs + times(std * (s >= 0)[:, None, None, None], noise)

    def extrapolate(self, x0, x0_before, t_before, t, s):
        """x0 at the midpoint of t and s in log SNR, from its last two predictions.

        With it in place of x0, `step` is DPM-Solver++(2M) for `eta` 0 and its SDE form for `eta` 1
        (2211.01095 alg. 2).
        """
        before, now, after = (self.alpha_bar(u).logit() for u in (t_before, t, s))  # log SNR
        return x0 + times((after - now) / (now - before) / 2, x0 - x0_before)

    def timesteps(self, steps, start=None):
        """The timesteps that a sampler of so many steps visits, falling evenly from `start`.

        None means the noisiest. The last step goes from the last of them to the image, s = -1. With
        as many steps as timesteps every spacing visits all.
        """
        start = self.num_timesteps - 1 if start is None else start
        return SPACINGS[self.timestep_spacing](start, steps).long().tolist()
