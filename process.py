"""The Gaussian process of diffusion, without a network: schedules, posteriors, variances, the steps of the samplers.

DDPM: arXiv 2006.11239. Improved DDPM: 2102.09672. DDIM: 2010.02502. DPM-Solver++: 2211.01095. v-prediction:
2202.00512. Averaged targets: 2302.00670. Min-SNR weights: 2303.09556. Zero terminal SNR: 2305.08891.
Timesteps are 0-based: t = 0 is the papers' t = 1, and t = -1 is the clean image.
"""

import math

import torch
from torch import nn

from support.checks import (
    check_choice,
    check_number,
    check_switch,
    check_values,
    check_whole,
    shown,
)

BETA_SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("eps", "v", "x0")
VARIANCES = ("fixed_small", "fixed_large", "learned")
SPACINGS = ("trailing", "linspace")


class GaussianProcess(nn.Module):
    """The forward process that turns images into noise, its posteriors, and one step of any sampler back.

    Args:
        num_timesteps: number of steps from image to noise.
        beta_schedule: 'linear' (DDPM) or 'cosine' (Improved DDPM).
        prediction: what a network predicts: the noise 'eps', the velocity 'v' or the image 'x0'.
        variance: variance of p(x_{t-1} | x_t): 'fixed_small' is the posterior's, 'fixed_large' is beta (DDPM sec.
            3.2), 'learned' lies between the two where the network says (Improved DDPM sec. 3.1).
        zero_terminal_snr: rescale the schedule so that x_T is pure noise. It does not work with 'eps': at the start
            the noise says nothing about x0.
        timestep_spacing: 'trailing' or 'linspace', see `timesteps`.

    Buffers: `betas` and `alphas_cumprod`, float64, (num_timesteps,). They stay float64 whatever the module is cast to.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    def __init__(
        self,
        num_timesteps=1000,
        beta_schedule="linear",
        *,
        prediction="eps",
        variance="fixed_small",
        zero_terminal_snr=False,
        timestep_spacing="trailing",
    ):
        super().__init__()
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("variance", variance, VARIANCES)
        check_switch("zero_terminal_snr", zero_terminal_snr)
        check_choice("timestep_spacing", timestep_spacing, SPACINGS)
        if zero_terminal_snr and prediction == "eps":
            raise ValueError(
                "zero_terminal_snr with prediction 'eps': pure noise says nothing of x0; expected 'v' or "
                "'x0'"
            )
        betas = make_betas(beta_schedule, num_timesteps, zero_terminal_snr)
        self.num_timesteps = int(num_timesteps)
        self.beta_schedule = beta_schedule
        self.prediction = prediction
        self.variance = variance
        self.zero_terminal_snr = bool(zero_terminal_snr)
        self.timestep_spacing = timestep_spacing
        # The settings determine these tables, so they are not saved. 1 - alphas_cumprod is small at the clean end:
        # float64.
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, dim=0), persistent=False)

    def _apply(self, fn, recurse=True):
        """What `.to()` and `.float()` call: the tables follow to the device and stay float64."""
        super()._apply(fn, recurse)
        if self.betas.dtype != torch.float64:
            betas = make_betas(self.beta_schedule, self.num_timesteps, self.zero_terminal_snr)
            self.betas, self.alphas_cumprod = (
                x.to(self.device) for x in (betas, torch.cumprod(1 - betas, dim=0))
            )
        return self

    @property
    def device(self):
        """The device of the tables."""
        return self.betas.device

    def alpha_bar(self, t):
        """alphas_cumprod at timesteps from -1 (where it is 1), (N,) -> float64, (N, 1, 1, 1)."""
        check_timesteps(
            t, len(t) if isinstance(t, torch.Tensor) and t.ndim else 1, -1, self.num_timesteps - 1
        )
        return torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])[:, None, None, None]

    # The forward process and its posteriors

    def q_sample(self, x0, t, eps):
        """Noisy images x_t ~ q(x_t | x_0) from images and standard normal noise, all (N, C, H, W) (DDPM eq. 4)."""
        check_images("x0", x0, (None,) * 4)
        check_images("eps", eps, x0.shape)
        check_timesteps(t, len(x0), -1, self.num_timesteps - 1)
        alpha_bar = self.alpha_bar(t)
        return _times(alpha_bar.sqrt(), x0) + _times((1 - alpha_bar).sqrt(), eps)

    def q_posterior(self, x0, xt, t, s=None):
        """Mean, (N, C, H, W), and variance, (N, 1, 1, 1), of q(x_s | x_t, x_0) (DDPM eq. 7).

        `s` is the less noisy timestep to go to, (N,); None means `t - 1`. Between timesteps further apart these are
        the posteriors of the diffusion that has only those timesteps (Improved DDPM sec. 4).
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bar(t), self.alpha_bar(t - 1 if s is None else s)
        alpha = alpha_bar_t / alpha_bar_s  # of the one step from s to t
        beta = 1 - alpha
        mean = _times(alpha_bar_s.sqrt() * beta / (1 - alpha_bar_t), x0) + _times(
            alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t), xt
        )  # DDPM eq. 7
        variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta
        return mean, variance.to(xt.dtype)

    def posterior_mean(self, xt, t, *candidates, allowed=None):
        """E[x_0 | x_t] where x_0 is one of some images, all equally likely: (N, C, H, W) (2302.00670).

        A perfect network would predict this from `xt` if these images were all the data there is.

        Args:
            xt: noisy images, (N, C, H, W).
            t: timesteps, int64, (N,).
            candidates: the images, (M, C, H, W), or (M, 1, H, W) if all channels are equal; one tensor or several.
            allowed: which of them each noisy image may come from, bool, (N, total M); None allows all.
        """
        check_images("xt", xt, (None,) * 4, finite=False)
        for images in candidates:
            grey = isinstance(images, torch.Tensor) and images.ndim == 4 and images.shape[1] == 1
            check_images(
                "candidates",
                images,
                (None, 1 if grey else xt.shape[1], *xt.shape[2:]),
                finite=False,
            )
        alpha_bar = self.alpha_bar(t)[:, :, 0, 0]
        product_factor = (alpha_bar.sqrt() / (1 - alpha_bar)).to(xt.dtype)  # computed in float64
        size_factor = (alpha_bar / (1 - alpha_bar) / 2).to(xt.dtype)
        candidates = [images.flatten(1) for images in candidates]
        repeats = (
            xt[0].numel() // candidates[0].shape[1]
        )  # how many equal channels one candidate channel stands for
        x = (xt if repeats == 1 else xt.sum(dim=1)).flatten(1)
        size = (
            repeats
            * torch.cat([torch.linalg.vector_norm(images, dim=1) for images in candidates]).square()
        )
        with torch.autocast(
            xt.device.type, enabled=False
        ):  # small differences decide: bf16 is too coarse
            product = torch.cat(
                [images @ x.T for images in candidates]
            ).T  # twice as fast as x @ images.T
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
        alpha_bar = self.alpha_bar(t)
        if self.prediction == "eps":
            return eps
        if self.prediction == "v":
            return _times(alpha_bar.sqrt(), eps) - _times(
                (1 - alpha_bar).sqrt(), x0
            )  # 2202.00512 sec. 4
        return x0

    def min_snr_weight(self, t, gamma):
        """Loss weights, float64, (N,), that make a squared error min(SNR, gamma) times that of x0 (2303.09556 3.4)."""
        alpha_bar = self.alphas_cumprod[t]
        snr = alpha_bar / (1 - alpha_bar)
        error_ratio = {"x0": 1.0, "eps": snr, "v": snr + 1}[
            self.prediction
        ]  # squared error / squared error of x0
        return snr.clamp(max=gamma) / error_ratio

    def x0_from_output(self, output, xt, t):
        """The x0 that a network's output stands for, (N, C, H, W), not clipped."""
        alpha_bar = self.alpha_bar(t)
        if self.prediction == "eps":
            return _times(1 / alpha_bar.sqrt(), xt) - _times(
                (1 / alpha_bar - 1).sqrt(), output
            )  # DDPM eq. 15
        if self.prediction == "v":
            return _times(alpha_bar.sqrt(), xt) - _times((1 - alpha_bar).sqrt(), output)
        return output

    def eps_from_x0(self, x0, xt, t):
        """The eps with q_sample(x0, t, eps) = x_t, (N, C, H, W) (DDPM eq. 4, solved for eps)."""
        alpha_bar = self.alpha_bar(t)
        return _times(1 / (1 - alpha_bar).sqrt(), xt) - _times(
            (alpha_bar / (1 - alpha_bar)).sqrt(), x0
        )

    # The reverse process

    def log_variances(self, t, s):
        """Logarithms of the two fixed variances of p(x_s | x_t), small and large, float64, (N, 1, 1, 1).

        On fewer timesteps they are those of the diffusion that has only these (Improved DDPM sec. 4).
        """
        alpha_bar_t, alpha_bar_s = self.alpha_bar(t), self.alpha_bar(s)
        large = 1 - alpha_bar_t / alpha_bar_s
        small = (1 - alpha_bar_s) / (1 - alpha_bar_t) * large
        # At the last step the small variance is 0, but the decoder needs its logarithm: take the one of t = 1.
        smallest = (
            self.betas[0] * self.betas[1] / (1 - self.alphas_cumprod[1])
            if self.num_timesteps > 1
            else large
        )
        return torch.where(s[:, None, None, None] < 0, smallest, small).log(), large.log()

    def log_variance(self, t, s, variance_fraction=None):
        """Logarithm of the variance of p(x_s | x_t), float64, (N, 1, 1, 1), or (N, C, H, W) if it is learned.

        A learned one is fraction * log large + (1 - fraction) * log small (Improved DDPM eq. 15).
        """
        small, large = self.log_variances(t, s)
        if self.variance == "learned":
            if variance_fraction is None:
                raise ValueError(
                    "variance_fraction: expected that of the network, since variance is 'learned'"
                )
            return variance_fraction * large + (1 - variance_fraction) * small
        if (
            self.variance == "fixed_large"
        ):  # at the last step the small one, as in the code of Improved DDPM
            return torch.where(s[:, None, None, None] < 0, small, large)
        return small

    def step(self, x0, eps, t, s, eta=0.0, noise=None, variance_fraction=None):
        """Move from t to the less noisy s, both (N,), given the predicted x0 and eps (DDIM eq. 12 and 16).

        `eta` 0 is DDIM and needs no noise. `eta` 1 with standard normal `noise` is DDPM restricted to the chosen
        timesteps: the mean of `q_posterior` and the model's variance. The image itself, s = -1, gets no noise.
        """
        check_number("eta", eta, 0, 1)
        alpha_bar_t, alpha_bar_s = self.alpha_bar(t), self.alpha_bar(s)
        sigma2 = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        xs = _times(alpha_bar_s.sqrt(), x0) + _times(
            (1 - alpha_bar_s - sigma2).clamp(min=0).sqrt(), eps
        )
        if not eta:
            return xs
        if noise is None:
            raise ValueError(f"noise: eta {eta} needs standard normal noise")
        std = eta * (self.log_variance(t, s, variance_fraction) / 2).exp()
        return xs + _times(std * (s >= 0)[:, None, None, None], noise)

    def extrapolate(self, x0, x0_before, t_before, t, s):
        """x0 at the midpoint of t and s in log SNR, extrapolated from its last two predictions (2211.01095 alg. 2).

        With it in place of x0, `step` is DPM-Solver++(2M) for `eta` 0 and its SDE form for `eta` 1.
        """
        before, now, after = (self.alpha_bar(u).logit() for u in (t_before, t, s))  # log SNR
        return x0 + _times((after - now) / (now - before) / 2, x0 - x0_before)

    def timesteps(self, steps, start=None, spacing=None):
        """The timesteps that a sampler with so many steps visits, falling evenly from `start` (None: the noisiest).

        The last step goes from the last of them to the image, s = -1. 'trailing' leaves out the clean end, where little
        happens (2305.08891 sec. 3.3). 'linspace' goes down to t = 0 (Improved DDPM sec. 4). With as many steps as
        timesteps both visit all.
        """
        start = self.num_timesteps - 1 if start is None else start
        check_whole("start", start, 0, self.num_timesteps - 1, ", a timestep")
        check_whole("steps", steps, 1, start + 1, ", the number of timesteps")
        spacing = self.timestep_spacing if spacing is None else spacing
        check_choice("timestep_spacing", spacing, SPACINGS)
        if spacing == "linspace":
            return torch.linspace(start, 0, steps, dtype=torch.float64).round().long().tolist()
        return (
            torch.linspace(start + 1, (start + 1) / steps, steps, dtype=torch.float64)
            .round()
            .long()
            - 1
        ).tolist()


def make_betas(schedule, num_timesteps, zero_terminal_snr=False):
    """The variances of the forward process, float64, (num_timesteps,).

    'linear' runs from 1e-4 to 0.02 for 1000 steps (DDPM sec. 4); for another number of steps it is scaled so that the
    end is equally noisy. 'cosine' is Improved DDPM eq. 17 with s = 0.008 and betas of at most 0.999.
    `zero_terminal_snr` shifts and scales sqrt(alphas_cumprod) to end at 0 and begin as before (2305.08891 alg. 1).
    """
    check_choice("beta_schedule", schedule, BETA_SCHEDULES)
    least = 2 if zero_terminal_snr else 1
    check_whole("num_timesteps", num_timesteps, least)
    if schedule == "linear":
        scale = 1000 / num_timesteps
        betas = torch.linspace(
            1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64
        ).clamp(max=0.999)
    else:
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    if zero_terminal_snr:
        root = torch.cumprod(1 - betas, dim=0).sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - alpha_bar / torch.cat([torch.ones_like(root[:1]), alpha_bar[:-1]])
    return betas


def make_generator(seed, device):
    """A generator of this seed; a torch.Generator itself and None, torch's global state, are returned as they are."""
    if isinstance(seed, torch.Generator) and seed.device.type != torch.device(device).type:
        raise ValueError(f"seed: a generator on {seed.device}; expected one on {device}")
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    check_whole("seed", seed, 0, 2**32 - 1)  # torch's generator on a CPU takes no more bits
    return torch.Generator(device).manual_seed(int(seed))


def check_images(name, x, shape, finite=True):
    """ValueError if x is not a tensor of finite floating-point images of this shape; None in it allows any number."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        found = f"of {x.dtype}" if isinstance(x, torch.Tensor) else shown(x)
        raise ValueError(f"{name} {found}: expected a tensor of floating-point images")
    if x.ndim != len(shape) or any(
        size not in (None, found) for size, found in zip(shape, x.shape)
    ):
        expected = str(tuple("N" if size is None else size for size in shape)).replace("'", "")
        raise ValueError(f"{name} of shape {tuple(x.shape)}: expected {expected}")
    if finite:
        check_values(name, x)


def check_timesteps(t, n, low=0, high=None, name="t"):
    """ValueError if t is not n timesteps, int64, (n,), or if it is on the CPU and not from `low` to `high`.

    Timesteps on a GPU are not compared with their limits: that would wait for it.
    """
    if not isinstance(t, torch.Tensor) or t.dtype != torch.int64 or t.shape != (n,):
        found = (
            f"of {t.dtype} and shape {tuple(t.shape)}" if isinstance(t, torch.Tensor) else shown(t)
        )
        raise ValueError(f"{name} {found}: expected int64 of shape ({n},)")
    if n and t.device.type == "cpu":
        values = t.tolist()  # for a batch faster than torch's own minimum
        least, most = min(values), max(values)
        if least < low or high is not None and most > high:
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} from {least} to {most}: expected timesteps {limits}")


def check_labels(y, n, num_classes, device, no_label=False):
    """n labels, or one for all, as int64 on a device, (n,); None stays None. `no_label` allows `num_classes` too.

    Raises:
        ValueError: they do not fit. Labels on a GPU are not compared with their limits: that would wait for it.
    """
    if y is None:
        return None
    if num_classes is None:
        raise ValueError("y: this model is unconditional; it knows no labels")
    try:
        y = torch.as_tensor(list(y) if isinstance(y, range) else y)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"y {shown(y)}: expected whole numbers") from None
    if y.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"y of {y.dtype}: expected whole numbers")
    # Contiguous, since torch.compile makes a graph of its own for a label that is repeated by stride 0.
    y = y.long().expand(n).contiguous() if y.ndim == 0 else y.long()
    if y.shape != (n,):
        found = f"{len(y)} labels" if y.ndim == 1 else f"shape {tuple(y.shape)}"
        raise ValueError(f"y of {found}: expected {n}, one an image")
    most = num_classes if no_label else num_classes - 1
    if n and y.device.type == "cpu" and (y.min() < 0 or y.max() > most):
        raise ValueError(f"y from {y.min()} to {y.max()}: expected labels from 0 to {most}")
    return y.to(device)


def _times(coefficient, x):
    """A float64 coefficient (N, 1, 1, 1) times images, in the precision of the images."""
    return coefficient.to(x.dtype) * x
