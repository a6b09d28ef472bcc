"""Denoising diffusion: schedules, forward process, losses, samplers, likelihood, save and load.

DDPM: arXiv 2006.11239. Improved DDPM: 2102.09672. DDIM: 2010.02502. DPM-Solver++: 2211.01095. Guidance: 2207.12598.
v-prediction: 2202.00512. Min-SNR weights: 2303.09556. Averaged targets: 2302.00670. Zero terminal SNR: 2305.08891.
Timesteps are 0-based: t = 0 is the papers' t = 1, and t = -1 is the clean image.
"""

import math
import os
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from unet import UNet

BETA_SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("eps", "v", "x0")
LOSSES = ("mse", "l1", "vlb")
VARIANCES = ("fixed_small", "fixed_large", "learned")
# Eta and order that make the general update each of them.
SAMPLERS = {"ddpm": (1.0, 1), "ddim": (0.0, 1), "dpm++": (0.0, 2), "sde-dpm++": (1.0, 2)}
SPACINGS = ("trailing", "linspace")
LABEL_DROPOUT = 0.1  # of the labels in training, so that the network also learns 'no label'
VLB_WEIGHT = 0.001  # lambda of Improved DDPM eq. 16


class DDPM(nn.Module):
    """A denoising diffusion probabilistic model around a network.

    Args:
        network: any module called `network(xt, t, y)`, that predicts what `prediction` says; None builds `UNet()`.
            It is conditional if it has an attribute `num_classes` that is not None; the label `num_classes` then
            means 'no label'. With a learned variance it gives twice the channels.
        image_size: height and width of the images, in pixels.
        channels: channels of the images.
        num_timesteps: length of the diffusion.
        beta_schedule: 'linear' (DDPM) or 'cosine' (Improved DDPM).
        prediction: what the network predicts: the noise 'eps', the velocity 'v' or the image 'x0'.
        loss: 'mse' or 'l1', between prediction and truth, or 'vlb', the variational bound itself.
        variance: of p(x_{t-1} | x_t): 'fixed_small', the posterior's, 'fixed_large', beta (DDPM sec. 3.2), or
            'learned' between the two (Improved DDPM sec. 3.1), which adds 0.001 of the bound to 'mse' and 'l1'.
        zero_terminal_snr: rescale the schedule so that x_T is noise alone; not for 'eps', which would then say
            nothing of x0 at the start.
        min_snr_gamma: weigh 'mse' and 'l1' by noise level as min(SNR, gamma) weighs errors of x0; 0 does not.
        sampler, sample_steps, timestep_spacing, guidance_scale: what `sample` does where its caller says nothing;
            `sample_steps` None means all `num_timesteps`. `timestep_spacing` is 'trailing' or 'linspace', see
            `timesteps`.

    Buffers: `betas` and `alphas_cumprod`, float64, (num_timesteps,). They must stay float64: for half precision use
    autocast, not `.half()`.

    Raises:
        ValueError: for a name or a number that does not fit.
    """

    def __init__(self, network=None, *, image_size=32, channels=3, num_timesteps=1000, beta_schedule="linear",
                 prediction="eps", loss="mse", variance="fixed_small", zero_terminal_snr=False, min_snr_gamma=0.0,
                 sampler="ddpm", sample_steps=None, timestep_spacing="trailing", guidance_scale=1.0):
        super().__init__()
        _check_choice("prediction", prediction, PREDICTIONS)
        _check_choice("loss", loss, LOSSES)
        _check_choice("variance", variance, VARIANCES)
        _check_choice("sampler", sampler, SAMPLERS)
        _check_choice("timestep_spacing", timestep_spacing, SPACINGS)
        if zero_terminal_snr and prediction == "eps":
            raise ValueError("zero_terminal_snr with prediction 'eps': pure noise says nothing of x0; expected 'v' or "
                             "'x0'")
        if min_snr_gamma < 0 or (min_snr_gamma and loss == "vlb"):
            raise ValueError(f"min_snr_gamma {min_snr_gamma} with loss {loss!r}: expected a number above 0 with 'mse' "
                             "or 'l1', or 0 for no weights")
        out_channels = 2 * channels if variance == "learned" else channels
        if network is None:
            network = UNet(image_size=image_size, channels=channels, out_channels=out_channels)
        self.network = network
        if isinstance(self.network, UNet):
            for name, value in (("image_size", image_size), ("channels", channels), ("out_channels", out_channels)):
                if value != self.network.config[name]:
                    raise ValueError(f"{name} {value}: expected {self.network.config[name]}, as in the network")
        self.num_classes = getattr(self.network, "num_classes", None)
        self.image_size = image_size
        self.channels = channels
        self.num_timesteps = num_timesteps
        self.beta_schedule = beta_schedule
        self.prediction = prediction
        self.loss = loss
        self.variance = variance
        self.zero_terminal_snr = zero_terminal_snr
        self.min_snr_gamma = min_snr_gamma
        self.sampler = sampler
        self.sample_steps = num_timesteps if sample_steps is None else sample_steps
        self.timestep_spacing = timestep_spacing
        self.guidance_scale = guidance_scale
        self.info = {}  # what `save` was given beside the model

        betas = make_betas(beta_schedule, num_timesteps, zero_terminal_snr)
        self._check_steps("sample_steps", self.sample_steps, num_timesteps)
        # Made from the settings, so not saved; float64, since 1 - alphas_cumprod is small at the clean end.
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, dim=0), persistent=False)

    @property
    def device(self):
        """Where the model lives."""
        return self.betas.device

    # Forward process

    def q_sample(self, x0, t, eps):
        """Noisy images x_t ~ q(x_t | x_0) from images and standard normal noise, all (N, C, H, W)."""
        alpha_bar = self._alpha_bar(t)
        return _times(alpha_bar.sqrt(), x0) + _times((1 - alpha_bar).sqrt(), eps)  # DDPM eq. 4

    def q_posterior(self, x0, xt, t, s=None):
        """Mean, (N, C, H, W), and variance, (N, 1, 1, 1), of q(x_s | x_t, x_0).

        `s` is the timestep to go to, (N,), less noisy than `t`; None means `t - 1`. Between timesteps further apart
        these are the posteriors of the diffusion that has only those (Improved DDPM, sec. 4).
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bar(t), self._alpha_bar(t - 1 if s is None else s)
        alpha = alpha_bar_t / alpha_bar_s  # of the one step from s to t
        beta = 1 - alpha
        mean = (_times(alpha_bar_s.sqrt() * beta / (1 - alpha_bar_t), x0)
                + _times(alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t), xt))  # DDPM eq. 7
        variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta
        return mean, variance.to(xt.dtype)

    def posterior_mean(self, xt, t, *candidates, possible=None):
        """E[x_0 | x_t] where x_0 is one of some images, each as likely as the others: (N, C, H, W).

        This is what a perfect network would make of `xt` if they were all the data that there is.

        Args:
            xt: noisy images, (N, C, H, W).
            t: timesteps, int64, (N,).
            candidates: the images, (M, C, H, W), or (M, 1, H, W) where all channels are alike; one tensor or several.
            possible: which of them each noisy image may come from, bool, (N, M of all); None means any.
        """
        alpha_bar = self._alpha_bar(t)[:, :, 0, 0].to(xt.dtype)
        candidates = [images.flatten(1) for images in candidates]
        alike = xt[0].numel() // candidates[0].shape[1]
        x = (xt if alike == 1 else xt.sum(dim=1)).flatten(1)
        size = alike * torch.cat([torch.linalg.vector_norm(images, dim=1) for images in candidates]).square()
        with torch.autocast(xt.device.type, enabled=False):  # bf16 is too coarse: what counts is a small difference
            product = torch.cat([images @ x.T for images in candidates]).T  # this way round twice as fast as the other
            # log q(x_t | x_0), DDPM eq. 4, up to what all of them share
            logits = (alpha_bar.sqrt() * product - alpha_bar * size / 2) / (1 - alpha_bar)
            if possible is not None:
                logits = logits.masked_fill(~possible, -math.inf)
            weights = logits.softmax(dim=1).split([len(images) for images in candidates], dim=1)
            mean = sum(weight @ images for weight, images in zip(weights, candidates))
        return mean.view(len(xt), -1, *xt.shape[2:]).expand_as(xt)

    # Training

    def forward(self, x0, y=None, *, t=None, eps=None, references=None, reduction="mean"):
        """What training minimises, at random timesteps.

        'mse' and 'l1' are the simple loss (DDPM eq. 14): how far the prediction is from the truth. With a learned
        variance it is the hybrid loss (Improved DDPM eq. 16). 'vlb' is one term of the bound times `num_timesteps`, so
        that its mean over timesteps is the bound, in bits a dimension.

        Args:
            x0: images in [-1, 1], (N, C, H, W).
            y: labels, int64, (N,). In training mode a tenth of them are replaced by 'no label' (2207.12598, alg. 1).
            t: timesteps, int64, (N,); None draws them uniformly.
            eps: standard normal noise, of the shape of `x0`; None draws it.
            references: further images of the data, (M, C, H, W), or (M, 1, H, W) where all channels are alike, and
                their labels, (M,) (None where y is). The truth is then not the one x0 behind each x_t but the mean of
                all the images that may be: the same minimum, sooner reached, since the target is less of a lottery
                (2302.00670). For 'mse' only.
            reduction: 'mean' for a scalar, 'none' for a loss an image, (N,).

        Raises:
            ValueError: for references with a loss whose minimum is not the mean.
        """
        n = len(x0)
        if references is not None and self.loss != "mse":
            raise ValueError(f"references with loss {self.loss!r}: expected 'mse', whose minimum is the mean")
        if t is None:
            t = torch.randint(self.num_timesteps, (n,), device=x0.device)
        if eps is None:
            eps = torch.randn_like(x0)
        told = y
        if y is not None and self.training and self.num_classes is not None:
            told = torch.where(torch.rand(n, device=x0.device) < LABEL_DROPOUT, self.num_classes, y)

        xt = self.q_sample(x0, t, eps)
        output, between = self._network(xt, t, told)
        losses = 0.0
        if self.loss != "vlb":
            target = self._target(x0, eps, t)
            if references is not None:
                mean = self._mean_of_possible(x0, y, told, xt, t, *references)
                target = self._target(mean, self._eps(mean, xt, t), t)
            difference = output - target
            losses = difference.square() if self.loss == "mse" else difference.abs()
            losses = losses.flatten(1).mean(dim=1)
            if self.min_snr_gamma:
                losses = losses * self._min_snr_weight(t).to(losses.dtype)
            output = output.detach()  # the bound's part of the hybrid loss moves the variance alone
        if self.loss == "vlb" or self.variance == "learned":
            bound = self.num_timesteps * self._bound_term(x0, xt, t, self._x0(output, xt, t), between)
            losses = losses + (bound if self.loss == "vlb" else VLB_WEIGHT * bound)
        return losses.mean() if reduction == "mean" else losses

    def _mean_of_possible(self, x0, y, told, xt, t, images, labels):
        """`posterior_mean` over the batch and its references, of the label that the network is told, if it is."""
        possible = None
        if y is not None:
            possible = (told[:, None] == torch.cat([y, labels])) | (told[:, None] == self.num_classes)
        return self.posterior_mean(xt, t, x0[:, :images.shape[1]], images, possible=possible)

    def _target(self, x0, eps, t):
        """What the network should have said."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        alpha_bar = self._alpha_bar(t)
        return _times(alpha_bar.sqrt(), eps) - _times((1 - alpha_bar).sqrt(), x0)  # v: 2202.00512, sec. 4

    def _min_snr_weight(self, t):
        """Weight of the error of the prediction that weighs the error of x0 by min(SNR, gamma), float64, (N,)."""
        alpha_bar = self.alphas_cumprod[t]
        snr = alpha_bar / (1 - alpha_bar)
        of_x0 = {"x0": 1.0, "eps": snr, "v": snr + 1}[self.prediction]  # its squared error there over that of x0
        return snr.clamp(max=self.min_snr_gamma) / of_x0  # 2303.09556 sec. 3.4

    # Reverse process

    def predict(self, xt, t, y=None, guidance_scale=1.0):
        """What the network makes of noisy images, as (x0, eps), whatever it predicts.

        Args:
            xt: noisy images, (N, C, H, W).
            t: timesteps, int64, (N,).
            y: labels, int64, (N,), or None.
            guidance_scale: s in uncond + s (cond - uncond): 1 is no guidance, 0 ignores the labels. No use without
                labels.

        Returns:
            x0, clipped to [-1, 1], and the noise that explains `xt` with it, both (N, C, H, W).
        """
        return self._denoise(xt, t, y, guidance_scale)[:2]

    def _denoise(self, xt, t, y, guidance_scale):
        """`predict`, and where a learned variance lies (else None)."""
        output, between = self._network(xt, t, y, guidance_scale)
        x0 = self._x0(output, xt, t).clamp(-1, 1)
        return x0, self._eps(x0, xt, t), between

    def _network(self, xt, t, y=None, guidance_scale=1.0):
        """The network's prediction, guided, and where its variance lies from small, 0, to large, 1 (None if fixed)."""
        if y is None or guidance_scale in (0, 1):
            output = self.network(xt, t, None if guidance_scale == 0 else y).to(xt.dtype)
        else:  # one doubled batch; 2207.12598 eq. 6, whose w is s - 1
            labels = torch.cat([y, torch.full_like(y, self.num_classes)])
            cond, uncond = self.network(torch.cat([xt, xt]), torch.cat([t, t]), labels).to(xt.dtype).chunk(2)
            output = uncond + guidance_scale * (cond - uncond)
            output[:, self.channels:] = cond[:, self.channels:]  # a variance is not guided
        expected = self.channels * (2 if self.variance == "learned" else 1)
        if output.shape[1] != expected:
            raise ValueError(f"network: its output has {output.shape[1]} channels; expected {expected}, for images of "
                             f"{self.channels} and variance {self.variance!r}")
        between = (output[:, self.channels:] + 1) / 2 if self.variance == "learned" else None
        return output[:, :self.channels], between

    def _x0(self, output, xt, t):
        """The x0 that a prediction means."""
        alpha_bar = self._alpha_bar(t)
        if self.prediction == "eps":
            return _times(1 / alpha_bar.sqrt(), xt) - _times((1 / alpha_bar - 1).sqrt(), output)  # DDPM eq. 15
        if self.prediction == "v":
            return _times(alpha_bar.sqrt(), xt) - _times((1 - alpha_bar).sqrt(), output)
        return output

    def _eps(self, x0, xt, t):
        """The noise that explains x_t with this x0 (DDPM eq. 4, solved for it)."""
        alpha_bar = self._alpha_bar(t)
        return _times(1 / (1 - alpha_bar).sqrt(), xt) - _times((alpha_bar / (1 - alpha_bar)).sqrt(), x0)

    def p_mean_variance(self, xt, t, y=None, guidance_scale=1.0):
        """Mean and variance of p(x_{t-1} | x_t), and the x0 behind them.

        Returns:
            mean, (N, C, H, W): the posterior's, for the predicted x0 (DDPM sec. 3.2); variance, of a shape that
            broadcasts to it; x0, (N, C, H, W), clipped.
        """
        x0, _, between = self._denoise(xt, t, y, guidance_scale)
        return self.q_posterior(x0, xt, t)[0], self._log_variance(t, t - 1, between).exp().to(xt.dtype), x0

    def _log_variances(self, t, s):
        """Logarithms of the two fixed variances of p(x_s | x_t), small and large, float64, (N, 1, 1, 1).

        On fewer timesteps they are those of the diffusion that has only these (Improved DDPM sec. 4).
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bar(t), self._alpha_bar(s)
        large = 1 - alpha_bar_t / alpha_bar_s
        small = (1 - alpha_bar_s) / (1 - alpha_bar_t) * large
        # That is 0 on the way to the image, where the decoder needs a variance: there, as the papers do, that of t = 1.
        smallest = self.betas[0] * self.betas[1] / (1 - self.alphas_cumprod[1]) if self.num_timesteps > 1 else large
        return torch.where(s[:, None, None, None] < 0, smallest, small).log(), large.log()

    def _log_variance(self, t, s, between=None):
        """Logarithm of the variance of p(x_s | x_t), float64; `between` places a learned one."""
        small, large = self._log_variances(t, s)
        if between is not None:
            return between * large + (1 - between) * small  # Improved DDPM eq. 15
        return large if self.variance == "fixed_large" else small

    def step(self, x0, eps, t, s, eta=0.0, noise=None, between=None):
        """Move from t to the less noisy s, both (N,), given the predicted x0 and eps (DDIM eq. 12 and 16).

        `eta` 0 is DDIM and needs no noise; `eta` 1 with standard normal `noise` is DDPM on the timesteps that are
        visited: the mean of `q_posterior`, and the model's variance. The image itself, s = -1, gets no noise.
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bar(t), self._alpha_bar(s)
        sigma2 = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        xs = _times(alpha_bar_s.sqrt(), x0) + _times((1 - alpha_bar_s - sigma2).clamp(min=0).sqrt(), eps)
        if noise is None:
            return xs
        std = eta * (self._log_variance(t, s, between) / 2).exp()
        return xs + _times(std * (s >= 0)[:, None, None, None], noise)

    def _extrapolate(self, x0, x0_before, t_before, t, s):
        """x0 as it will be half way from t to s in log SNR, given its last two predictions (2211.01095, alg. 2).

        With it in the place of x0, `step` is DPM-Solver++(2M) for `eta` 0, and its SDE form for `eta` 1.
        """
        before, now, after = (self._alpha_bar(u).logit() for u in (t_before, t, s))  # log SNR; the steps' ratio counts
        return x0 + _times((after - now) / (now - before) / 2, x0 - x0_before)

    def timesteps(self, steps, start=None, spacing=None):
        """The timesteps that a sampler of so many steps visits, falling from `start` (None: the noisiest), evenly.

        'trailing' leaves out the clean end, where little happens (2305.08891 sec. 3.3); 'linspace' goes down to
        t = 0 (Improved DDPM sec. 4). With as many steps as timesteps both visit all.
        """
        start = self.num_timesteps - 1 if start is None else start
        if not 0 <= start < self.num_timesteps:
            raise ValueError(f"start {start}: expected a timestep from 0 to {self.num_timesteps - 1}")
        self._check_steps("steps", steps, start + 1)
        spacing = self.timestep_spacing if spacing is None else spacing
        _check_choice("timestep_spacing", spacing, SPACINGS)
        if spacing == "linspace":
            return torch.linspace(start, 0, steps, dtype=torch.float64).round().long().tolist()
        return (torch.linspace(start + 1, (start + 1) / steps, steps, dtype=torch.float64).round().long() - 1).tolist()

    def sample(self, n, y=None, *, sampler=None, steps=None, eta=None, guidance_scale=None, seed=None, xT=None,
               start=None, return_sequence=False, progress=False, batch_size=256):
        """Draw images. What is left out comes from the model's own settings.

        Args:
            n: how many.
            y: labels: n integers, or one for all. None leaves the choice open: a conditional model then draws a label
                for each image, each label equally likely.
            sampler: 'ddpm', 'ddim', 'dpm++' or 'sde-dpm++', DPM-Solver++ with DDPM's noise.
            steps: network calls an image, from 1 to `num_timesteps`.
            eta: share of DDPM's noise that each step adds, 0 to 1; None means the sampler's: 1 for 'ddpm'
                and 'sde-dpm++', else 0.
            guidance_scale: s in uncond + s (cond - uncond): 1 is no guidance, 0 ignores the labels; others need `y`.
            seed: decides the images, on one kind of device; None draws from torch's global state.
            xT: what to start from, (n, C, H, W); None draws noise.
            start: timestep that `xT` belongs to; None means the noisiest. From a lower one the default of `steps` is
                its share.
            return_sequence: return the prediction of x0 at every step: progressive generation, DDPM sec. 4.3.
            progress: show a progress bar.
            batch_size: images made at once, which bounds the memory.

        Returns:
            Images in [-1, 1], float32: (n, C, H, W), or (steps, n, C, H, W) with `return_sequence`.

        Raises:
            ValueError: for an argument that does not fit the model.
        """
        y, eta, order, guidance_scale = self._check_sampling(n, y, sampler, eta, guidance_scale, batch_size)
        if steps is None:
            share = 1 if start is None else (start + 1) / self.num_timesteps
            steps = max(1, round(self.sample_steps * share))
        timesteps = self.timesteps(steps, start)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        if y is None and self.num_classes is not None:
            y = torch.randint(self.num_classes, (n,), generator=generator, device=self.device)
        shape = (n, self.channels, self.image_size, self.image_size)
        if xT is None:
            xT = torch.randn(shape, generator=generator, device=self.device)
        elif xT.shape != shape:
            raise ValueError(f"xT of shape {tuple(xT.shape)}: expected {shape}")
        labels = [None] * n if y is None else y.split(batch_size)

        images = []
        with (torch.inference_mode(), _evaluating(self),
              tqdm(total=n * len(timesteps), unit="call", disable=not progress, leave=False) as bar):
            for noise, label in zip(xT.to(self.device, torch.float32).split(batch_size), labels):
                sequence = []
                for x0, xt in self._walk(noise, [*timesteps, -1], label, guidance_scale, eta, order, generator):
                    if return_sequence:
                        sequence.append(x0)
                    bar.update(len(xt))
                images.append(torch.stack(sequence) if return_sequence else xt)
        return torch.cat(images, dim=1 if return_sequence else 0)  # outside inference mode: to train on, if one likes

    def _walk(self, xt, timesteps, y, guidance_scale, eta, order, generator=None):
        """The sampling loop: yields the predicted x0 and the new x_t after every step along `timesteps`."""
        x0_before = t_before = None
        for now, after in zip(timesteps, timesteps[1:]):
            t, s = (torch.full((len(xt),), i, device=self.device) for i in (now, after))
            x0, eps, between = self._denoise(xt, t, y, guidance_scale)
            predicted = x0
            if order == 2:
                if x0_before is not None and after >= 0:  # the last step, of infinite log SNR, is of first order
                    x0 = self._extrapolate(x0, x0_before, t_before, t, s)
                    eps = self._eps(x0, xt, t)
                x0_before, t_before = predicted, t
            noise = torch.randn(xt.shape, generator=generator, device=self.device) if eta else None
            xt = self.step(x0, eps, t, s, eta, noise, between)
            yield predicted, xt

    def interpolate(self, x0, other, weights, t, y=None, **options):
        """Mix images through their noisy versions: (len(weights), N, C, H, W) (DDPM sec. 4.4).

        Args:
            x0, other: images in [-1, 1], (N, C, H, W).
            weights: of `other`, each from 0 to 1. All weights share the noise.
            t: timestep to mix at: the higher, the less is left of the two.
            y: labels of the results, N integers or one for all; None means no label.
            options: as for `sample`; `seed` decides the noise too.

        Raises:
            ValueError: for an argument that does not fit the model, or the others.
        """
        if not len(weights) or not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights {[float(weight) for weight in weights]}: expected one or more, from 0 to 1")
        if x0.shape != other.shape:
            raise ValueError(f"other of shape {tuple(other.shape)}: expected {tuple(x0.shape)}, as of x0")
        self.timesteps(1, t)
        y = self._check_labels(y, len(x0))
        x0, other = x0.to(self.device), other.to(self.device)
        seed = options.get("seed")
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        at = torch.full((len(x0),), t, device=self.device)
        xt, xt_other = (self.q_sample(image, at, torch.randn(image.shape, generator=generator, device=self.device))
                        for image in (x0, other))
        mixed = torch.cat([torch.lerp(xt, xt_other, weight) for weight in weights])
        if y is not None:
            y = y.repeat(len(weights))
        elif options.get("guidance_scale") in (None, 0, 1):
            options["guidance_scale"] = 0  # without it `sample` would draw labels
        images = self.sample(len(mixed), y, xT=mixed, start=t, **options)
        return images.unflatten(0, (len(weights), len(x0)))

    def _check_sampling(self, n, y, sampler, eta, guidance_scale, batch_size):
        """Labels as a tensor, eta, order, guidance scale, with the defaults filled in; ValueError for what is wrong."""
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} {value}: expected at least 1 image")
        sampler = self.sampler if sampler is None else sampler
        _check_choice("sampler", sampler, SAMPLERS)
        eta, order = (SAMPLERS[sampler][0] if eta is None else eta), SAMPLERS[sampler][1]
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: expected a number from 0 (DDIM) to 1 (DDPM)")
        if y is None and guidance_scale not in (None, 0, 1):
            raise ValueError(f"guidance_scale {guidance_scale}: guidance needs labels; give y")
        y = self._check_labels(y, n)
        return y, eta, order, self.guidance_scale if guidance_scale is None else guidance_scale

    def _check_labels(self, y, n):
        """n labels, or one for all, as int64 on the model's device, (n,), or None; ValueError where they do not fit."""
        if y is None:
            return None
        if self.num_classes is None:
            raise ValueError("y: this model is unconditional; it knows no labels")
        y = torch.as_tensor(list(y) if isinstance(y, range) else y)
        if y.is_floating_point():
            raise ValueError(f"y of {y.dtype}: expected whole numbers")
        y = y.long().expand(n) if y.ndim == 0 else y.long()
        if y.shape != (n,):
            raise ValueError(f"y of {len(y)} labels: expected {n}, one an image")
        if n and (y.min() < 0 or y.max() >= self.num_classes):
            raise ValueError(f"y from {y.min()} to {y.max()}: expected labels from 0 to {self.num_classes - 1}")
        return y.to(self.device)

    def _check_steps(self, name, steps, most):
        if not 1 <= steps <= most:
            raise ValueError(f"{name} {steps}: expected from 1 to {most}, the number of timesteps")

    def _alpha_bar(self, t):
        """alphas_cumprod at timesteps from -1, (N,) -> float64 (N, 1, 1, 1)."""
        bar = torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])
        return bar[:, None, None, None]

    # Likelihood

    def _bound_term(self, x0, xt, t, x0_predicted, between=None):
        """The term of the variational bound of timestep t, in bits a dimension, (N,) (DDPM eq. 5).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and for t = 0 -log p(x_0 | x_1): the discrete decoder.
        """
        true_mean, mean = (self.q_posterior(image, xt, t)[0] for image in (x0, x0_predicted))
        true_log_variance, log_variance = self._log_variances(t, t - 1)[0], self._log_variance(t, t - 1, between)
        spread = true_log_variance - log_variance
        kl = (spread.exp() - 1 - spread + (true_mean - mean).square() * (-log_variance).exp()) / 2
        nll = -discrete_log_likelihood(x0, mean, log_variance)
        terms = torch.where((t == 0)[:, None, None, None], nll, kl.to(nll.dtype))
        return terms.flatten(1).mean(dim=1) / math.log(2)

    def _prior_term(self, x0):
        """KL(q(x_T | x_0) || N(0, 1)), in bits a dimension, float64, (N,)."""
        alpha_bar = self.alphas_cumprod[-1]
        return ((alpha_bar * (x0.double().square() - 1) - torch.log1p(-alpha_bar)) / 2).flatten(1).mean(1) / math.log(2)

    def bits_per_dim(self, x0, y=None, *, terms=None, seed=None, progress=False, batch_size=256):
        """The variational bound on -log2 p(x0) a dimension, of 8-bit images (DDPM sec. 3.3 and 4.1).

        Args:
            x0: images of 256 levels in [-1, 1], (N, C, H, W).
            y: labels, N integers or one for all; None means no label.
            terms: how many of the `num_timesteps` terms to compute for each image: the decoder, and one drawn from
                each of so many stretches of the others, short where the terms are large. That leaves the estimate
                unbiased. None means all.
            seed: decides noise and timesteps; None draws from torch's global state.
            progress: show a progress bar.
            batch_size: images at once, which bounds the memory.

        Returns:
            BitsPerDim: the bound, its standard error, its parts, and the rate-distortion curve.

        Raises:
            ValueError: for an argument that does not fit the model, or no images.
        """
        for name, value in (("x0", len(x0)), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} of {value} images: expected at least 1")
        y = self._check_labels(y, len(x0))
        terms = self.num_timesteps if terms is None else terms
        if not min(2, self.num_timesteps) <= terms <= self.num_timesteps:
            raise ValueError(f"terms {terms}: expected from {min(2, self.num_timesteps)} to {self.num_timesteps}, the "
                             "number of timesteps")
        cube = (self.num_timesteps - 1) * torch.linspace(0, 1, terms, dtype=torch.float64) ** 3
        edges = [0, *torch.maximum(1 + cube.round(), 1.0 + torch.arange(terms)).long().tolist()]
        stretches = list(zip(edges, edges[1:]))[::-1]  # from noise to the decoder, which is the stretch (0, 1)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        bits, errors = [], []
        batches = x0.split(batch_size), [None] * len(x0) if y is None else y.split(batch_size)
        with (torch.inference_mode(), _evaluating(self),
              tqdm(total=len(x0) * terms, unit="call", disable=not progress, leave=False) as bar):
            for x, labels in zip(*batches):
                x = x.to(self.device)
                bits.append([self._prior_term(x)])
                errors.append([])
                for low, high in stretches:
                    t = torch.randint(low, high, (len(x),), generator=generator, device=self.device)
                    xt = self.q_sample(x, t, torch.randn(x.shape, generator=generator, device=self.device))
                    predicted, _, between = self._denoise(xt, t, labels, 1.0)
                    bits[-1].append((high - low) * self._bound_term(x, xt, t, predicted, between).double())
                    errors[-1].append((x - predicted).square().flatten(1).mean(dim=1).double())
                    bar.update(len(x))
        # Outside inference mode: for tensors to compute with like any others.
        bits = torch.cat([torch.stack(of_batch) for of_batch in bits], dim=1)  # (1 + terms, N)
        errors = torch.cat([torch.stack(of_batch) for of_batch in errors], dim=1)
        mean, total = bits.mean(dim=1), bits.sum(dim=0)
        error = (total.std() / math.sqrt(len(x0))).item() if len(x0) > 1 else math.nan
        return BitsPerDim(total.mean().item(), error, mean[0].item(), mean[1:-1].sum().item(), mean[-1].item(),
                          mean[:-1].cumsum(0).cpu(), 127.5 * errors.mean(dim=1).sqrt().cpu())

    # Save and load

    def save(self, path, **info):
        """Write weights and settings to `path`, whole or not at all. `info` is kept as `DDPM.info`: plain values only.

        The network must be a `UNet` for `load` to rebuild it alone.
        """
        settings = {name: getattr(self, name) for name in (
            "image_size", "channels", "num_timesteps", "beta_schedule", "prediction", "loss",
            "variance", "zero_terminal_snr", "min_snr_gamma", "sampler", "sample_steps", "timestep_spacing",
            "guidance_scale")}
        network = self.network.config if isinstance(self.network, UNet) else None
        save_checkpoint(path, dict(network=network, diffusion=settings, weights=self.state_dict(), info=info))

    @classmethod
    def load(cls, path, device=None, network=None):
        """The model that `save` wrote, in evaluation mode.

        Args:
            path: the file.
            device: where to put it; None means the GPU if there is one.
            network: the network to load the weights into; None builds the saved `UNet`.

        Raises:
            ValueError: for a file that is missing, damaged or something else, or a network that does not fit it.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        saved = load_checkpoint(path, ("network", "diffusion", "weights", "info"))
        if network is None:
            if saved["network"] is None:
                raise ValueError(f"{path}: its network is not a UNet; give load() the network")
            network = UNet(**saved["network"])
        ddpm = cls(network, **saved["diffusion"])
        try:
            ddpm.load_state_dict(saved["weights"])
        except RuntimeError:
            raise ValueError(f"{path}: its weights do not fit this network; give load() the one saved") from None
        ddpm.info = saved["info"]
        return ddpm.to(device).eval()


class BitsPerDim(NamedTuple):
    """The variational bound in bits a dimension: mean over images, standard error of that mean, and parts.

    `prior + kl` is DDPM's rate and `decoder` its distortion. Its progressive coding (sec. 4.3), float64, (terms,), from
    noise to image: `rate`, the bits received before x_t is known, and `rmse`, of the x0 predicted from x_t, in grey
    levels from 0 to 255.
    """

    total: float
    standard_error: float
    prior: float
    kl: float
    decoder: float
    rate: torch.Tensor
    rmse: torch.Tensor


class ImportanceSampler(nn.Module):
    """Timesteps drawn in proportion to the root mean square of their losses (Improved DDPM eq. 18).

    It remembers ten losses a timestep, and draws evenly until it has them all, and where all are zero; one draw in a
    thousand stays even, so that no timestep is ever left out. Losses times the weights that come with the timesteps
    have the mean that even draws would give them.
    """

    HISTORY = 10
    EVEN = 0.001

    def __init__(self, num_timesteps):
        super().__init__()
        self.register_buffer("losses", torch.zeros(num_timesteps, self.HISTORY, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.long))

    def probabilities(self):
        """Of each timestep, float64, (num_timesteps,)."""
        size = self.losses.square().mean(dim=1).sqrt()
        p = (1 - self.EVEN) * size / size.sum() + self.EVEN / len(size)
        return torch.where((self.counts >= self.HISTORY).all() & (size.sum() > 0), p, 1 / len(p))

    def sample(self, n):
        """n timesteps, int64, and the weights of their losses, float32, both (n,)."""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True)
        return t, (1 / (len(p) * p[t])).float()

    @torch.no_grad()
    def update(self, t, losses):
        """Take in the unweighted losses of these timesteps, both (N,); the oldest are forgotten.

        A loss that is not finite is passed over. Nothing here waits for the GPU.
        """
        finite = losses.isfinite()
        alike = (t[:, None] == t) & finite
        earlier, later = alike.tril(-1).sum(dim=1), alike.triu(1).sum(dim=1)  # how often t comes in this batch
        # What is not to be kept goes to a spare column: which of two writes to one place wins is undefined on a GPU.
        kept = finite & (later < self.HISTORY)
        column = torch.where(kept, (self.counts[t] + earlier) % self.HISTORY, self.HISTORY)
        losses_and_spare = nn.functional.pad(self.losses, (0, 1))
        losses_and_spare[t, column] = losses.double()
        self.losses.copy_(losses_and_spare[:, :-1])
        self.counts.index_add_(0, t, finite.long())


def make_betas(schedule, num_timesteps, zero_terminal_snr=False):
    """The variances of the forward process, float64, (num_timesteps,).

    'linear' runs from 1e-4 to 0.02 for 1000 steps (DDPM sec. 4), and scales so that the end is as noisy for any other
    number; 'cosine' is Improved DDPM eq. 17, with s = 0.008 and betas of at most 0.999. `zero_terminal_snr` shifts and
    scales sqrt(alphas_cumprod) to end at 0 and begin as before (2305.08891, alg. 1).
    """
    _check_choice("beta_schedule", schedule, BETA_SCHEDULES)
    least = 2 if zero_terminal_snr else 1
    if num_timesteps < least:
        raise ValueError(f"num_timesteps {num_timesteps}: expected at least {least}")
    if schedule == "linear":
        scale = 1000 / num_timesteps
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64).clamp(max=0.999)
    else:
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    if zero_terminal_snr:
        root = torch.cumprod(1 - betas, dim=0).sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - alpha_bar / torch.cat([torch.ones_like(root[:1]), alpha_bar[:-1]])
    return betas


def discrete_log_likelihood(x0, mean, log_variance):
    """log of the probability that N(mean, variance) gives the 8-bit level x0, in nats, as x0 in shape (DDPM eq. 13).

    Levels are 2/255 apart in [-1, 1]; the two outermost take the tails. Differences of the distribution function are
    taken in logarithms on its lower side, so that they are exact however unlikely the level; in float64, since
    log_ndtr's gradient cancels in float32: it is off by 1 % at 300 standard deviations, by 27 % at 2000.
    """
    scale = (-log_variance.double() / 2).exp()
    off = x0.double() - mean.double()
    upper, lower = (1 / 255 - off.abs()) * scale, (-1 / 255 - off.abs()) * scale  # mirrored: both on the lower side
    upper, lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    inside = upper + torch.log1p(-torch.exp(lower - upper))
    darkest = torch.special.log_ndtr((off + 1 / 255) * scale)
    brightest = torch.special.log_ndtr((1 / 255 - off) * scale)
    return torch.where(x0 < -0.999, darkest, torch.where(x0 > 0.999, brightest, inside)).to(x0.dtype)


def save_checkpoint(path, state):
    """`torch.save` that leaves the old file or the new one, never half of one.

    Raises:
        OSError: where the file cannot be written, for example on a full disk.
    """
    path = os.fspath(path)
    partial = path + ".partial"
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except RuntimeError as error:  # torch's own for a write that failed
        raise OSError(f"{path}: cannot be written ({str(error).partition(chr(10))[0]})") from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_checkpoint(path, keys):
    """The dict at `path`, on the CPU, without running any code from the file.

    Raises:
        ValueError: where the file is missing, damaged, or lacks one of `keys`.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; train_eval.py writes one") from None
    except Exception as error:  # damaged files fail in too many ways to list
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}); train again") from None
    if not isinstance(saved, dict) or not set(keys) <= set(saved):
        raise ValueError(f"{path}: a file of another kind; expected a checkpoint with {', '.join(keys)}")
    return saved


@contextmanager
def _evaluating(module):
    """Evaluation mode (no dropout) inside, the mode that was before outside."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _times(coefficient, x):
    """A float64 coefficient (N, 1, 1, 1) times images, in the precision of the images."""
    return coefficient.to(x.dtype) * x


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r}: expected {' or '.join(map(repr, choices))}")
