"""Denoising diffusion: schedules, forward process, training loss, samplers, save and load.

DDPM: arXiv 2006.11239. Improved DDPM: 2102.09672. DDIM: 2010.02502. Guidance: 2207.12598. v-prediction: 2202.00512.
Timesteps are 0-based: t = 0 is the paper's t = 1, and t = -1 is the clean image.
"""

import math
import os
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from unet import UNet

BETA_SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("eps", "v", "x0")
LOSSES = ("mse", "l1")
SAMPLERS = {"ddpm": 1.0, "ddim": 0.0}  # and the eta that makes the general update this sampler
LABEL_DROPOUT = 0.1  # of the labels in training, so that the network also learns 'no label'


class DDPM(nn.Module):
    """A denoising diffusion probabilistic model around a network.

    Args:
        network: any module called `network(xt, t, y)`, that predicts what `prediction` says; None builds `UNet()`.
            It is conditional if it has an attribute `num_classes` that is not None; the label `num_classes` then
            means 'no label'.
        image_size: height and width of the images, in pixels.
        channels: channels of the images.
        num_timesteps: length of the diffusion.
        beta_schedule: 'linear' (DDPM) or 'cosine' (Improved DDPM).
        prediction: what the network predicts: the noise 'eps', the velocity 'v' or the image 'x0'.
        loss: 'mse' or 'l1', between prediction and truth.
        sampler, sample_steps, guidance_scale: what `sample` does where its caller says nothing; `sample_steps`
            None means all `num_timesteps`.

    Buffers: `betas` and `alphas_cumprod`, float64, (num_timesteps,). They must stay float64: for half precision use
    autocast, not `.half()`.

    Raises:
        ValueError: for a name or a number that does not fit.
    """

    def __init__(self, network=None, *, image_size=32, channels=3, num_timesteps=1000, beta_schedule="linear",
                 prediction="eps", loss="mse", sampler="ddpm", sample_steps=None, guidance_scale=1.0):
        super().__init__()
        _check_choice("prediction", prediction, PREDICTIONS)
        _check_choice("loss", loss, LOSSES)
        _check_choice("sampler", sampler, SAMPLERS)
        self.network = UNet(image_size=image_size, channels=channels) if network is None else network
        if isinstance(self.network, UNet):
            for name, value in (("image_size", image_size), ("channels", channels)):
                if value != self.network.config[name]:
                    raise ValueError(f"{name} {value}: expected {self.network.config[name]}, as in the network")
        self.num_classes = getattr(self.network, "num_classes", None)
        self.image_size = image_size
        self.channels = channels
        self.num_timesteps = num_timesteps
        self.beta_schedule = beta_schedule
        self.prediction = prediction
        self.loss = loss
        self.sampler = sampler
        self.sample_steps = num_timesteps if sample_steps is None else sample_steps
        self.guidance_scale = guidance_scale
        self.info = {}  # what `save` was given beside the model

        betas = make_betas(beta_schedule, num_timesteps)
        self._check_steps("sample_steps", self.sample_steps)
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

    # Training

    def forward(self, x0, y=None, *, t=None, eps=None, reduction="mean"):
        """The simple loss (DDPM eq. 14): how far the prediction is from the truth, at random timesteps.

        Args:
            x0: images in [-1, 1], (N, C, H, W).
            y: labels, int64, (N,). In training mode a tenth of them are replaced by 'no label' (2207.12598, alg. 1).
            t: timesteps, int64, (N,); None draws them uniformly.
            eps: standard normal noise, of the shape of `x0`; None draws it.
            reduction: 'mean' for a scalar, 'none' for a loss an image, (N,).
        """
        n = len(x0)
        if t is None:
            t = torch.randint(self.num_timesteps, (n,), device=x0.device)
        if eps is None:
            eps = torch.randn_like(x0)
        if y is not None and self.training and self.num_classes is not None:
            y = torch.where(torch.rand(n, device=x0.device) < LABEL_DROPOUT, self.num_classes, y)

        xt = self.q_sample(x0, t, eps)
        output = self.network(xt, t, y).float()
        difference = output - self._target(x0, eps, t)
        losses = difference.square() if self.loss == "mse" else difference.abs()
        losses = losses.flatten(1).mean(dim=1)
        return losses.mean() if reduction == "mean" else losses

    def _target(self, x0, eps, t):
        """What the network should have said."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        alpha_bar = self._alpha_bar(t)
        return _times(alpha_bar.sqrt(), eps) - _times((1 - alpha_bar).sqrt(), x0)  # v: 2202.00512, sec. 4

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
        if y is None or guidance_scale == 1:
            output = self.network(xt, t, y).float()
        elif guidance_scale == 0:
            output = self.network(xt, t, None).float()
        else:  # one doubled batch; 2207.12598 eq. 6, whose w is s - 1
            labels = torch.cat([y, torch.full_like(y, self.num_classes)])
            cond, uncond = self.network(torch.cat([xt, xt]), torch.cat([t, t]), labels).float().chunk(2)
            output = uncond + guidance_scale * (cond - uncond)

        alpha_bar = self._alpha_bar(t)
        if self.prediction == "eps":
            x0 = _times(1 / alpha_bar.sqrt(), xt) - _times((1 / alpha_bar - 1).sqrt(), output)  # DDPM eq. 15
        elif self.prediction == "v":
            x0 = _times(alpha_bar.sqrt(), xt) - _times((1 - alpha_bar).sqrt(), output)
        else:
            x0 = output
        x0 = x0.clamp(-1, 1)
        eps = _times(1 / (1 - alpha_bar).sqrt(), xt) - _times((alpha_bar / (1 - alpha_bar)).sqrt(), x0)
        return x0, eps

    def p_mean_variance(self, xt, t, y=None, guidance_scale=1.0):
        """Mean, (N, C, H, W), and variance, (N, 1, 1, 1), of p(x_{t-1} | x_t), and the x0 behind them.

        The posterior of the predicted x0 (DDPM sec. 3.2; the variance is its beta tilde).
        """
        x0, _ = self.predict(xt, t, y, guidance_scale)
        mean, variance = self.q_posterior(x0, xt, t)
        return mean, variance, x0

    def step(self, x0, eps, t, s, eta=0.0, noise=None):
        """Move from t to the less noisy s, both (N,), given the predicted x0 and eps (DDIM eq. 12 and 16).

        `eta` 1 with standard normal `noise` draws from `q_posterior`, which is DDPM on the timesteps that are
        visited; `eta` 0 is DDIM and needs no noise.
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bar(t), self._alpha_bar(s)
        sigma = eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)).sqrt()
        xs = _times(alpha_bar_s.sqrt(), x0) + _times((1 - alpha_bar_s - sigma**2).clamp(min=0).sqrt(), eps)
        return xs if noise is None else xs + _times(sigma, noise)

    def timesteps(self, steps):
        """The timesteps that a sampler of so many steps visits, falling: evenly spaced over all of them."""
        self._check_steps("steps", steps)
        return torch.linspace(self.num_timesteps - 1, 0, steps, dtype=torch.float64).round().long().tolist()

    @torch.no_grad()
    def sample(self, n, y=None, *, sampler=None, steps=None, eta=None, guidance_scale=None, seed=None, xT=None,
               return_sequence=False, progress=False, batch_size=256):
        """Draw images. What is left out comes from the model's own settings.

        Args:
            n: how many.
            y: labels: n integers, or one for all. None leaves the choice open: a conditional model then draws a label
                for each image, each label equally likely.
            sampler: 'ddpm' or 'ddim'.
            steps: network calls an image, from 1 to `num_timesteps`.
            eta: share of DDPM's noise that each step adds, 0 to 1; None means the sampler's: 1 for 'ddpm', 0 for
                'ddim'.
            guidance_scale: s in uncond + s (cond - uncond): 1 is no guidance, 0 ignores the labels; others need `y`.
            seed: decides the images, on one kind of device; None draws from torch's global state.
            xT: the noise to start from, (n, C, H, W); None draws it.
            return_sequence: return the prediction of x0 at every step.
            progress: show a progress bar.
            batch_size: images made at once, which bounds the memory.

        Returns:
            Images in [-1, 1], float32: (n, C, H, W), or (steps, n, C, H, W) with `return_sequence`.

        Raises:
            ValueError: for an argument that does not fit the model.
        """
        y, eta, guidance_scale = self._check_sampling(n, y, sampler, eta, guidance_scale, batch_size)
        timesteps = self.timesteps(self.sample_steps if steps is None else steps)
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
        with _evaluating(self), tqdm(total=n * len(timesteps), unit="call", disable=not progress, leave=False) as bar:
            for xt, label in zip(xT.to(self.device, torch.float32).split(batch_size), labels):
                sequence = []
                for t, s in zip(timesteps, timesteps[1:] + [-1]):
                    t, s = (torch.full((len(xt),), i, device=self.device) for i in (t, s))
                    x0, eps = self.predict(xt, t, label, guidance_scale)
                    noise = torch.randn(xt.shape, generator=generator, device=self.device) if eta else None
                    xt = self.step(x0, eps, t, s, eta, noise)
                    if return_sequence:
                        sequence.append(x0)
                    bar.update(len(xt))
                images.append(torch.stack(sequence) if return_sequence else xt)
        return torch.cat(images, dim=1 if return_sequence else 0)

    def _check_sampling(self, n, y, sampler, eta, guidance_scale, batch_size):
        """Labels as a tensor, eta and guidance scale, with the defaults filled in; ValueError for what does not fit."""
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} {value}: expected at least 1 image")
        sampler = self.sampler if sampler is None else sampler
        _check_choice("sampler", sampler, SAMPLERS)
        eta = SAMPLERS[sampler] if eta is None else eta
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: expected a number from 0 (DDIM) to 1 (DDPM)")
        if y is None:
            if guidance_scale not in (None, 0, 1):
                raise ValueError(f"guidance_scale {guidance_scale}: guidance needs labels; give y")
        elif self.num_classes is None:
            raise ValueError("y: this model is unconditional; it knows no labels")
        else:
            y = torch.as_tensor(list(y) if isinstance(y, range) else y)
            if y.is_floating_point():
                raise ValueError(f"y of {y.dtype}: expected whole numbers")
            y = y.long().expand(n) if y.ndim == 0 else y.long()
            if y.shape != (n,):
                raise ValueError(f"y of {len(y)} labels: expected {n}, one an image")
            if y.min() < 0 or y.max() >= self.num_classes:
                raise ValueError(f"y from {y.min()} to {y.max()}: expected labels from 0 to {self.num_classes - 1}")
            y = y.to(self.device)
        return y, eta, self.guidance_scale if guidance_scale is None else guidance_scale

    def _check_steps(self, name, steps):
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"{name} {steps}: expected from 1 to {self.num_timesteps}, the length of the diffusion")

    def _alpha_bar(self, t):
        """alphas_cumprod at timesteps from -1, (N,) -> float64 (N, 1, 1, 1)."""
        bar = torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])
        return bar[:, None, None, None]

    # Save and load

    def save(self, path, **info):
        """Write weights and settings to `path`, whole or not at all. `info` is kept as `DDPM.info`: plain values only.

        The network must be a `UNet` for `load` to rebuild it alone.
        """
        settings = {name: getattr(self, name) for name in (
            "image_size", "channels", "num_timesteps", "beta_schedule", "prediction", "loss",
            "sampler", "sample_steps", "guidance_scale")}
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


def make_betas(schedule, num_timesteps):
    """The variances of the forward process, float64, (num_timesteps,).

    'linear' runs from 1e-4 to 0.02 for 1000 steps (DDPM sec. 4), and scales so that the end is as noisy for any other
    number; 'cosine' is Improved DDPM eq. 17, with s = 0.008 and betas of at most 0.999.
    """
    _check_choice("beta_schedule", schedule, BETA_SCHEDULES)
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps {num_timesteps}: expected at least 1")
    if schedule == "linear":
        scale = 1000 / num_timesteps
        return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64).clamp(max=0.999)
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


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
