"""DDPM: a network in the Gaussian process. The training loss, the sampling loop, guidance, save and load.

DDPM: arXiv 2006.11239. Improved DDPM: 2102.09672. Guidance: 2207.12598. The closed forms stand in process.py.
"""

import inspect
from itertools import pairwise, repeat

import torch
from tqdm import tqdm

import likelihood
import process
from process import GaussianProcess
from support import checks
from support.checkpoint import load_checkpoint, save_checkpoint
from support.machine import evaluating, load_state_dict, plain_state_dict, unwrapped
from unet import UNet, is_plain_unet, num_classes_of

LOSSES = ("mse", "l1", "vlb")
SAMPLERS = {
    "ddpm": (1.0, 1),
    "ddim": (0.0, 1),
    "dpm++": (0.0, 2),
    "sde-dpm++": (1.0, 2),
}  # eta and order of the step
LABEL_DROPOUT = (
    0.1  # share of the labels left out in training, so that the network also learns 'no label'
)
VLB_WEIGHT = 0.001  # lambda of Improved DDPM eq. 16


class DDPM(GaussianProcess):
    """A denoising diffusion probabilistic model: a network in a `GaussianProcess`.

    Args:
        network: any module that is called as `network(xt, t, y)`; None builds `UNet()`. If its attribute `num_classes`
            is not None, it is conditional, and the label `num_classes` means 'no label'. With a learned variance it
            returns twice the channels.
        image_size: height and width of the images, in pixels.
        channels: channels of the images.
        loss: 'mse' or 'l1' between prediction and truth, or 'vlb', the variational bound (see `forward`).
        min_snr_gamma: cap on the SNR that weights 'mse' (2303.09556); 0 turns the weights off.
        sampler, sample_steps, guidance_scale: the defaults of `sample`; `sample_steps` None means all timesteps.
        class_shares: how often `sample` draws each class where it is given no labels; None means evenly.
        settings: those of `GaussianProcess`: num_timesteps, beta_schedule, prediction, variance,
            zero_terminal_snr, timestep_spacing.

    Raises:
        ValueError: an unknown name, a number out of range, or settings that do not fit together.
    """

    def __init__(
        self,
        network=None,
        *,
        image_size=32,
        channels=3,
        loss="mse",
        min_snr_gamma=0.0,
        sampler="ddpm",
        sample_steps=None,
        guidance_scale=1.0,
        class_shares=None,
        **settings,
    ):
        super().__init__(**settings)
        for name, value in (("image_size", image_size), ("channels", channels)):
            process.check_whole(name, value, 1)
        for name, value, choices in (("loss", loss, LOSSES), ("sampler", sampler, SAMPLERS)):
            process.check_choice(name, value, choices)
        process.check_number("min_snr_gamma", min_snr_gamma, 0)
        process.check_number("guidance_scale", guidance_scale)
        _check_min_snr(min_snr_gamma, loss, self.zero_terminal_snr)
        out_channels = 2 * channels if self.variance == "learned" else channels
        if network is None:
            network = UNet(image_size=image_size, channels=channels, out_channels=out_channels)
        checks.check_module("network", network)
        _check_unet(
            inner := unwrapped(network),
            image_size=image_size,
            channels=channels,
            out_channels=out_channels,
        )
        self.network = network
        self.num_classes = num_classes_of(inner)
        self.class_shares = (
            None if class_shares is None else checks.check_shares(class_shares, self.num_classes)
        )
        if guidance_scale != 1 and self.num_classes is None:
            raise ValueError(
                f"guidance_scale {guidance_scale}: the network is unconditional; expected 1"
            )
        self.image_size, self.channels = int(image_size), int(channels)
        self.image_shape = (self.channels, self.image_size, self.image_size)
        self.loss, self.sampler, self.info = (
            loss,
            sampler,
            {},
        )  # info: what `save` was given beside the model
        self.min_snr_gamma, self.guidance_scale = float(min_snr_gamma), float(guidance_scale)
        sample_steps = self.num_timesteps if sample_steps is None else sample_steps
        process.check_whole(
            "sample_steps", sample_steps, 1, self.num_timesteps, ", the number of timesteps"
        )
        self.sample_steps = int(sample_steps)

    # Training

    def forward(
        self,
        x0,
        y=None,
        *,
        t=None,
        eps=None,
        drop=None,
        references=None,
        rows=None,
        reduction="mean",
    ):
        """The training loss at random timesteps.

        'mse' and 'l1' are the simple loss (DDPM eq. 14). A learned variance adds 0.001 of the bound: the hybrid loss
        (Improved DDPM eq. 16). 'vlb' is one term of the bound times `num_timesteps`. Its mean over uniform timesteps is
        the bound in bits per dimension, without the prior term, which is a constant.

        Args:
            x0: images in [-1, 1], (N, C, H, W).
            y: labels, int64, (N,).
            t: timesteps, int64, (N,); None draws them uniformly.
            eps: standard normal noise, of the shape of `x0`; None draws it.
            drop: which labels to replace by 'no label', bool, (N,); None draws a tenth in training mode (2207.12598).
            references: images, (M, C, H, W), or (M, 1, H, W) if all channels are equal, and their labels, (M,) or None.
                For 'mse' only: the target becomes the mean of all images that may be behind x_t, which has the same
                minimum but less variance (2302.00670).
            rows: slice of the batch to compute; the other images then serve as references alone. None means all.
            reduction: 'mean' for a scalar, 'none' for one loss per image, (N,).

        Raises:
            ValueError: references with a loss whose minimum is not the mean, or an argument of another type or shape.
        """
        process.check_images("x0", x0, (None, *self.image_shape))
        n = len(x0)
        y = process.check_labels(y, n, self.num_classes, self.device, no_label=True)
        process.check_choice("reduction", reduction, ("mean", "none"))
        checks.check_references(references, self.loss, y)
        t = torch.randint(self.num_timesteps, (n,), device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        process.check_timesteps(t, n)
        process.check_images("eps", eps, x0.shape)
        if drop is not None:
            checks.check_tensor("drop", drop, (torch.bool,), (n,))
        drop = (
            draw_dropped(n, x0.device) if y is not None and self.training and drop is None else drop
        )
        y_seen = (
            y if y is None or drop is None else torch.where(drop, self.num_classes, y)
        )  # by the network
        batch = x0
        if rows is not None:
            x0, t, eps, y_seen = x0[rows], t[rows], eps[rows], None if y is None else y_seen[rows]

        xt = self.q_sample(x0, t, eps)
        output, variance_fraction = self._network(xt, t, y_seen)
        losses = 0.0
        if self.loss != "vlb":
            target = self.target(x0, eps, t)
            if references is not None:
                images, labels = references
                same_label = (
                    None
                    if y is None
                    else (
                        (y_seen[:, None] == torch.cat([y, labels]))
                        | (y_seen[:, None] == self.num_classes)
                    )
                )
                mean = self.posterior_mean(
                    xt, t, batch[:, : images.shape[1]], images, allowed=same_label
                )
                target = self.target(mean, self.eps_from_x0(mean, xt, t), t)
            difference = output - target
            losses = (
                (difference.square() if self.loss == "mse" else difference.abs())
                .flatten(1)
                .mean(dim=1)
            )
            if self.min_snr_gamma:
                losses = losses * self.min_snr_weight(t, self.min_snr_gamma).to(losses.dtype)
            output = output.detach()  # in the hybrid loss the bound must not train the mean
        if self.loss == "vlb" or self.variance == "learned":
            bound = self.num_timesteps * likelihood.bound_term(
                self, x0, xt, t, self.x0_from_output(output, xt, t), variance_fraction
            )
            losses = losses + (bound if self.loss == "vlb" else VLB_WEIGHT * bound)
        return losses.mean() if reduction == "mean" else losses

    # The network

    def predict(self, xt, t, y=None, guidance_scale=1.0):
        """The predicted (x0, eps) of noisy images, whatever the network predicts.

        Args:
            xt: noisy images, (N, C, H, W).
            t: timesteps, int64, (N,).
            y: labels, int64, (N,), or None.
            guidance_scale: s in uncond + s (cond - uncond): 1 is no guidance, 0 ignores the labels, others need `y`.

        Returns:
            x0, clipped to [-1, 1], and the noise that makes `xt` from it, both (N, C, H, W).
        """
        process.check_images("xt", xt, (None, *self.image_shape))
        process.check_timesteps(t, len(xt), 0, self.num_timesteps - 1)
        y = process.check_labels(y, len(xt), self.num_classes, self.device, no_label=True)
        return self.denoise(xt, t, y, guidance_scale)[:2]

    def denoise(self, xt, t, y=None, guidance_scale=1.0):
        """`predict`, and the fraction of a learned variance (None if it is fixed)."""
        output, variance_fraction = self._network(xt, t, y, guidance_scale)
        x0 = self.x0_from_output(output, xt, t).clamp(-1, 1)
        return x0, self.eps_from_x0(x0, xt, t), variance_fraction

    def _network(self, xt, t, y=None, guidance_scale=1.0):
        """The guided prediction, and the fraction from 0 to 1 of a learned variance (None if it is fixed)."""
        _check_guidance(y, guidance_scale)
        no_label = None if self.num_classes is None else torch.full_like(t, self.num_classes)
        inputs = xt, t, no_label if y is None or guidance_scale == 0 else y
        if guidance_scale not in (0, 1):  # one doubled batch
            inputs = torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, no_label])
        # float32 even under bf16, and always in one layout, since torch.compile makes a graph for each.
        output, expected = (
            self.network(*inputs),
            self.channels * (2 if self.variance == "learned" else 1),
        )
        process.check_images(
            "network: its output", output, (len(inputs[0]), expected, *xt.shape[2:]), finite=False
        )
        output = output.to(xt.dtype, memory_format=torch.contiguous_format)
        if guidance_scale not in (0, 1):
            cond, uncond = output.chunk(2)
            output = uncond + guidance_scale * (cond - uncond)  # 2207.12598 eq. 6, whose w is s - 1
            output[:, self.channels :] = cond[:, self.channels :]  # a variance is not guided
        variance_fraction = (
            (output[:, self.channels :] + 1) / 2 if self.variance == "learned" else None
        )
        return output[:, : self.channels], variance_fraction

    def p_mean_variance(self, xt, t, y=None, guidance_scale=1.0):
        """Mean, (N, C, H, W), and variance, which broadcasts to it, of p(x_{t-1} | x_t), and x0 (DDPM sec. 3.2)."""
        x0, _, variance_fraction = self.denoise(xt, t, y, guidance_scale)
        return (
            self.q_posterior(x0, xt, t)[0],
            self.log_variance(t, t - 1, variance_fraction).exp().to(xt.dtype),
            x0,
        )

    # Sampling

    def sample(
        self,
        n,
        y=None,
        *,
        sampler=None,
        steps=None,
        eta=None,
        guidance_scale=None,
        seed=None,
        xT=None,
        start=None,
        rows=None,
        return_sequence=False,
        return_every=1,
        progress=False,
        batch_size=256,
    ):
        """Draw images. What is left out comes from the model's own settings.

        Args:
            n: number of images.
            y: labels: n integers, or one for all. With None, a conditional model draws them by `class_shares`.
            sampler: 'ddpm', 'ddim', 'dpm++' or 'sde-dpm++', which is DPM-Solver++ with DDPM's noise.
            steps: sampling steps, from 1 to `num_timesteps`. With guidance each takes two network inputs.
            eta: share of DDPM's noise in each step, from 0 to 1; None means 1 for 'ddpm' and 'sde-dpm++', else 0.
            guidance_scale: s in uncond + s (cond - uncond): 1 is no guidance, 0 ignores the labels.
            seed: an integer that decides the images, on one kind of device, or a torch.Generator; None is torch's own.
            xT: what to start from, (n, C, H, W); None draws noise.
            start: timestep that `xT` belongs to; None means the noisiest. From a lower one, `steps` defaults to the
                same share of the model's steps.
            rows: slice of the n images to draw; the parts are those of the whole. None means all.
            return_sequence: True returns the predicted x0 of every step (DDPM sec. 4.3), 'xt' the noisy images.
            return_every: return only every so many of these steps, counted back from the last.
            progress: show a progress bar.
            batch_size: images that the network sees at once. The noise is drawn for all n, so batches change no image.

        Returns:
            Images in [-1, 1], float32: (n, C, H, W), or (steps / return_every, n, C, H, W) with `return_sequence`.

        Raises:
            ValueError: an argument does not fit the model.
        """
        eta, order, guidance_scale = _sampling_defaults(
            self, n, sampler, eta, guidance_scale, xT, start, batch_size
        )
        if steps is None:  # from a lower start the same share of the model's steps
            steps = max(
                1,
                round(
                    self.sample_steps * (1 if start is None else (start + 1) / self.num_timesteps)
                ),
            )
        timesteps, rows = self.timesteps(steps, start), slice(None) if rows is None else rows
        if return_sequence not in (False, True, "xt"):
            raise ValueError(
                f"return_sequence {checks.shown(return_sequence)}: expected False, True or 'xt'"
            )
        checks.check_switch("progress", progress)
        process.check_whole("return_every", return_every, 1, note=" step")
        y = process.check_labels(y, n, self.num_classes, self.device)
        generator = process.make_generator(seed, self.device)
        if y is None and self.num_classes is not None:
            shares = torch.ones(self.num_classes, device=self.device)
            shares = shares if self.class_shares is None else shares.new_tensor(self.class_shares)
            y = torch.multinomial(shares, n, replacement=True, generator=generator)
        xT = (
            torch.randn(n, *self.image_shape, generator=generator, device=self.device)
            if xT is None
            else xT
        )
        process.check_images("xT", xT, (n, *self.image_shape))
        sequence, xT, y = (
            [],
            xT[rows].to(self.device, torch.float32),
            None if y is None else y[rows],
        )
        with (
            torch.no_grad(),
            evaluating(self),
            tqdm(
                total=len(xT) * len(timesteps), unit="call", disable=not progress, leave=False
            ) as progress_bar,
        ):
            for i, (x0, xt) in enumerate(
                walk(
                    self,
                    xT,
                    [*timesteps, -1],
                    y,
                    guidance_scale,
                    eta,
                    order,
                    generator,
                    batch_size,
                    progress_bar,
                    n,
                    rows,
                ),
                1 - len(timesteps),
            ):
                if return_sequence and i % return_every == 0:  # i is 0 at the last step
                    sequence.append(xt if return_sequence == "xt" else x0)
        return torch.stack(sequence) if return_sequence else xt

    def interpolate(self, x0, other, weights, t, y=None, **options):
        """Mix images through their noisy versions: (len(weights), N, C, H, W) (DDPM sec. 4.4).

        Args:
            x0, other: images in [-1, 1], (N, C, H, W).
            weights: weights of `other`, each from 0 to 1. All weights share the noise.
            t: timestep to mix at. The higher it is, the less is left of the two images.
            y: labels of the results, N integers or one for all; None means no label.
            options: those of `sample` except xT and start; `seed` decides the noise of the mixture too.

        Raises:
            ValueError: an argument does not fit the model or the others.
        """
        weights = checks.check_weights(weights)
        process.check_whole("t", t, 0, self.num_timesteps - 1, ", a timestep")
        process.check_images("x0", x0, (None, *self.image_shape))
        process.check_images("other", other, x0.shape)
        y = process.check_labels(y, len(x0), self.num_classes, self.device)
        generator = process.make_generator(
            options.pop("seed", None), self.device
        )  # one stream, there and back
        at = torch.full((len(x0),), t, device=self.device)
        noise = torch.randn(2, *x0.shape, generator=generator, device=self.device)
        xt, xt_other = (
            self.q_sample(image.to(self.device), at, eps) for image, eps in zip((x0, other), noise)
        )
        mixed = torch.cat([torch.lerp(xt, xt_other, weight) for weight in weights])
        if y is not None:
            y = y.repeat(len(weights))
        else:  # `sample` would draw labels
            _check_guidance(y, options.get("guidance_scale") or 0)
            options["guidance_scale"] = 0
        images = self.sample(len(mixed), y, xT=mixed, start=t, seed=generator, **options)
        return images.unflatten(-4, (len(weights), len(x0)))

    # Likelihood

    def bits_per_dim(self, x0, y=None, *, seed=None, **options):
        """The variational bound on -log2 p(x0), or on -log2 p(x0 | y) with labels, in bits per dimension.

        `seed` is as for `sample`. `y`, `options` (terms, progress, batch_size) and the result are those of
        `likelihood.bits_per_dim`.
        """
        process.check_images("x0", x0, (None, *self.image_shape))
        with evaluating(self):
            return likelihood.bits_per_dim(
                self, x0, y, generator=process.make_generator(seed, self.device), **options
            )

    # Save and load

    def save(self, path, **info):
        """Write weights and settings to `path`, whole or not at all. `info` is kept as `DDPM.info`.

        The weights are those of the network inside `torch.compile` and DistributedDataParallel. `load` can rebuild only
        a plain `UNet`; pass any other network to it.

        Raises:
            ValueError: `info` holds something other than plain values; nothing is written.
            OSError: the file cannot be written.
        """
        weights = plain_state_dict(network := unwrapped(self.network))
        save_checkpoint(
            path,
            dict(
                network=network.config if is_plain_unet(network, weights) else None,
                diffusion={name: getattr(self, name) for name in SETTINGS},
                weights={f"network.{name}": value for name, value in weights.items()},
                info=info,
            ),
        )

    @classmethod
    def load(cls, path, device=None, network=None):
        """The model that `save` wrote, in evaluation mode.

        Args:
            path: the file.
            device: where to put it; None means the GPU if there is one.
            network: the network to load the weights into; None builds the saved `UNet`.

        Raises:
            ValueError: the file is missing, damaged or something else, or the network does not fit it.
        """
        device = checks.check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        saved = load_checkpoint(path, ("network", "diffusion", "weights", "info"))
        if network is None and saved["network"] is None:
            raise ValueError(f"{path}: its network is not a plain UNet; give load() the network")
        try:
            ddpm = cls(
                UNet(**saved["network"]) if network is None else network, **saved["diffusion"]
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: written by another version or for another network ({error})"
            ) from None
        weights, ddpm.info = saved["weights"], saved["info"]
        if not (
            isinstance(ddpm.info, dict)
            and isinstance(weights, dict)
            and all(isinstance(k, str) for k in weights)
        ):
            raise ValueError(
                f"{path}: a checkpoint of another kind; expected named weights and named info"
            )
        load_state_dict(
            ddpm.network, {name.removeprefix("network."): w for name, w in weights.items()}, path
        )
        return ddpm.to(device).eval()


# The names of all settings, from the signatures: what `save` keeps. train_eval.py has a constant for each.
SETTINGS = tuple(
    name
    for kind in (GaussianProcess, DDPM)
    for name in inspect.signature(kind).parameters
    if name not in ("network", "settings")
)


def _check_min_snr(gamma, loss, zero_terminal_snr):
    if gamma and (loss != "mse" or zero_terminal_snr):
        other = (
            f"loss {loss!r}: the weights are for squared errors"
            if loss != "mse"
            else ("zero_terminal_snr: the timestep at which sampling starts would never be trained")
        )
        raise ValueError(f"min_snr_gamma {gamma} with {other}; expected 0")


def _check_unet(network, **expected):
    for name, value in expected.items() if isinstance(network, UNet) else ():
        if value != network.config[name]:
            raise ValueError(f"{name} {value}: expected {network.config[name]}, as in the network")


def draw_dropped(n, device):
    """Which of n labels training leaves out, bool, (n,) (2207.12598 alg. 1)."""
    return torch.rand(n, device=device) < LABEL_DROPOUT


def _sampling_defaults(ddpm, n, sampler, eta, guidance_scale, xT, start, batch_size):
    """Eta, order and guidance scale of `DDPM.sample`; ValueError for arguments that do not fit together."""
    process.check_whole("n", n, 1, note=" image")
    process.check_whole("batch_size", batch_size, 1, note=" image")
    sampler = ddpm.sampler if sampler is None else sampler
    process.check_choice("sampler", sampler, SAMPLERS)
    eta, order = SAMPLERS[sampler][0] if eta is None else eta, SAMPLERS[sampler][1]
    process.check_number("eta", eta, 0, 1, " (0 is DDIM, 1 is DDPM)")
    guidance_scale = ddpm.guidance_scale if guidance_scale is None else guidance_scale
    _check_guidance(ddpm.num_classes, guidance_scale)
    process.check_whole(
        "start", 0 if start is None else start, 0, last := ddpm.num_timesteps - 1, ", a timestep"
    )
    if start not in (None, last) and xT is None:
        raise ValueError(
            f"start {start} without xT: pure noise belongs to timestep {last}; give xT"
        )
    return eta, order, guidance_scale


def _check_guidance(y, guidance_scale):
    process.check_number("guidance_scale", guidance_scale)
    if y is None and guidance_scale not in (0, 1):
        raise ValueError(f"guidance_scale {guidance_scale}: guidance needs labels; give y")


def walk(
    ddpm,
    xt,
    timesteps,
    y,
    guidance_scale,
    eta,
    order,
    generator=None,
    batch_size=256,
    progress_bar=None,
    n=None,
    rows=slice(None),
):
    """The sampling loop: yields the predicted x0 and the new x_t after every step. `order` 2 is DPM-Solver++.

    `xt` are the `rows` of n images. Noise is drawn for all of them, so that neither batches nor rows change it.
    """
    x0_before = t_before = None
    for now, after in pairwise(timesteps):
        t, s = (torch.full((len(xt),), i, device=ddpm.device) for i in (now, after))
        x0, eps, variance_fraction = _denoise_in_batches(
            ddpm, xt, t, y, guidance_scale, batch_size, progress_bar
        )
        predicted = x0
        if order == 2:
            if (
                x0_before is not None and after >= 0
            ):  # the last step, of infinite log SNR, is of first order
                x0 = ddpm.extrapolate(x0, x0_before, t_before, t, s)
                eps = ddpm.eps_from_x0(x0, xt, t)
            x0_before, t_before = predicted, t
        shape = len(xt) if n is None else n, *xt.shape[1:]
        noise = torch.randn(shape, generator=generator, device=ddpm.device)[rows] if eta else None
        xt = ddpm.step(x0, eps, t, s, eta, noise, variance_fraction)
        yield predicted, xt


def _denoise_in_batches(ddpm, xt, t, y, guidance_scale, batch_size, progress_bar):
    """`DDPM.denoise` for any number of images."""
    parts, batch_size = [], int(batch_size)
    for part in zip(
        xt.split(batch_size),
        t.split(batch_size),
        repeat(None) if y is None else y.split(batch_size),
    ):
        parts.append(ddpm.denoise(*part, guidance_scale))
        if progress_bar is not None:
            progress_bar.update(len(part[0]))
    return [None if found[0] is None else torch.cat(found) for found in zip(*parts)]
