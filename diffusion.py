"""DDPM: a network in the Gaussian process. Training loss, sampling loop, guidance, save and load.

DDPM: arXiv 2006.11239. Improved DDPM: 2102.09672. Guidance: 2207.12598.
"""

import inspect
from itertools import pairwise

import torch
from tqdm import tqdm

import likelihood
from process import GaussianProcess, times
from support import checkpoint, checks
from support.files import one_line
from support.machine import evaluating, unwrapped
from unet import UNet

# The error between prediction and truth, and the weight of the bound: beside the error it trains a
# learned variance (lambda of Improved DDPM eq. 16), without it the mean too.
LOSSES = {"mse": (torch.square, 0.001), "l1": (torch.abs, 0.001)}
LOSSES |= dict.fromkeys(("vlb", "clipped-vlb"), (None, 1.0))
# Share of DDPM's noise (eta), and order of the step.
SAMPLERS = {"ddpm": (1.0, 1), "ddim": (0.0, 1), "dpm++": (0.0, 2), "sde-dpm++": (1.0, 2)}
BATCH = 256  # images that the network sees at once in sampling, which limits the memory


def clipped(x0, true):
    """x0 in [-1, 1]. The gradient ignores the clip where it is wrong: a wrong black is mended."""
    inside = x0.clamp(-1, 1)
    return torch.where(inside == true, inside, x0 + (inside - x0).detach())


class Denoiser(GaussianProcess):
    """A network in a `GaussianProcess`: its training loss, its predictions, guidance.

    Args:
        network: any module that is called as `network(xt, t, y)`; None builds `UNet()`. If its
            attribute `num_classes` is not None, it is conditional, and the class `num_classes`
            means 'no label'. With a learned variance it returns twice the channels.
        image_size: height and width of the images, in pixels.
        channels: channels of the images.
        loss: 'mse', 'l1', 'vlb' or 'clipped-vlb', see `losses`.
        min_snr_gamma: cap on the SNR that weights 'mse' (2303.09556); 0 turns the weights off.
        clean_weight: for 'mse' of 'x0': weight of the clean end's own error, see `losses`; 0: off.
        label_dropout: share of the labels that training leaves out, which guidance needs.
        class_shares: of a network that knows clusters: how often an image is in each, a row of
            numbers for each label, or a single row without labels. Its classes are the labels, then
            the clusters of all rows. None: its classes are the labels.
        settings: those of `GaussianProcess`.
    """

    def __init__(
        self,
        network=None,
        *,
        image_size=32,
        channels=3,
        loss="mse",
        min_snr_gamma=0.0,
        clean_weight=0.0,
        label_dropout=0.1,
        class_shares=None,
        **settings,
    ):
        super().__init__(**settings)
        checks.whole("channels", channels)
        self.image_size = image_size
        self.channels = channels
        self.image_shape = channels, image_size, image_size
        self.loss = loss
        self.min_snr_gamma = min_snr_gamma
        self.clean_weight = clean_weight
        self.label_dropout = label_dropout
        self.class_shares = class_shares
        self.outputs = 2 * channels if self.variance == "learned" else channels
        if network is None:
            network = UNet(image_size=image_size, channels=channels, out_channels=self.outputs)
        self.network = network
        # number of classes that the network knows; None if it is unconditional
        self.num_classes = getattr(unwrapped(network), "num_classes", None)
        checks.denoiser(self, LOSSES)
        # of each class; a label's own is itself, as is that of 'no label'
        label_of = torch.arange((self.num_classes or 0) + 1)
        if self.num_labels != self.num_classes:
            of_cluster = torch.arange(self.num_labels).repeat_interleave(len(class_shares[0]))
            label_of[self.num_labels : -1] = of_cluster
        self.register_buffer("label_of", label_of, persistent=False)

    @property
    def num_labels(self):
        """Number of labels that a person can ask for; None if the network knows none."""
        return len(self.class_shares) if len(self.class_shares or ()) > 1 else self.num_classes

    @property
    def dtype(self):
        """The precision of the network: that of images and noise."""
        return next((p.dtype for p in self.network.parameters()), torch.float32)

    # Training

    def forward(self, x0, y=None):
        """What training minimises: the mean of `losses` at random timesteps, a scalar.

        Args:
            x0: images in [-1, 1], (N, C, H, W).
            y: classes of the network, N integers or one for all, or None. In training mode some
                are left out.

        Raises:
            ValueError: images or labels of another type or shape.
        """
        x0 = checks.images(self, "x0", x0)
        y = checks.labels(self, y, len(x0), classes=True)
        t = torch.randint(self.num_timesteps, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        return self.losses(x0, self.drop_labels(y) if self.training else y, t, eps).mean()

    def drop_labels(self, y):
        """Classes, (N,), of which a share means 'no label' (2207.12598 alg. 1). None stays None.

        Of clusters that lie in labels, one half of the share becomes their label instead.
        """
        if y is None:
            return None
        drawn = torch.rand(len(y), device=y.device)
        y = torch.where(drawn < self.label_dropout, self.label_of[y], y)
        share = self.label_dropout / (1 if self.num_labels == self.num_classes else 2)
        return torch.where(drawn < share, self.num_classes, y)

    def losses(self, x0, y, t, eps, candidates=None):
        """The loss of each image, (N,), at timestep t, (N,), with noise eps, (N, C, H, W).

        'mse' and 'l1' are the simple loss (DDPM eq. 14). A learned variance adds 0.001 of the
        bound: the hybrid loss (Improved DDPM eq. 16). `clean_weight` adds to 'mse' so much of the
        squared error of the clipped x0 in units of the noise. 'vlb' is one term of the bound times
        `num_timesteps`: its mean over uniform timesteps is the bound in bits per dimension, without
        the constant prior term. 'clipped-vlb' clips x0 to [-1, 1], as `bits_per_dim` does: below -1
        it counts as black, above 1 as white.

        `candidates` is for 'mse': a tuple of images that may be behind x_t, (M, C, H, W) or grey
        (M, 1, H, W), and the classes of all of them, or None. The target becomes their mean, which
        has the same minimum but less variance (2302.00670).
        """
        error, bound_weight = LOSSES[self.loss]
        xt = self.q_sample(x0, t, eps)
        output, variance_fraction = self._network(xt, t, y)
        losses = 0.0
        if error is not None:
            if candidates is not None:  # the mean of those of the same class
                images, classes = candidates
                allowed = None
                if y is not None:
                    allowed = (y[:, None] == classes) | (y[:, None] == self.label_of[classes])
                    allowed |= y[:, None] == self.num_classes
                mean = self.posterior_mean(xt, t, *images, allowed=allowed)
                target = self.target(mean, self.eps_from_x0(mean, xt, t), t)
            else:
                target = self.target(x0, eps, t)
            losses = error(output - target).flatten(1).mean(dim=1)
            if self.min_snr_gamma:
                losses = losses * self.min_snr_weight(t, self.min_snr_gamma).to(losses.dtype)
            elif self.clean_weight:  # the output is x0
                weight = self.clean_weight * self.snr(t)
                off = times(weight.sqrt(), clipped(output, target) - target)
                losses = losses + off.square().flatten(1).mean(dim=1)
            output = output.detach()  # the bound trains the variance alone
        if error is None or self.variance == "learned":
            predicted = self.x0_from_output(output, xt, t)
            if self.loss == "clipped-vlb":
                predicted = clipped(predicted, x0)
            bound = likelihood.bound_term(self, x0, xt, t, predicted, variance_fraction)
            losses = losses + bound_weight * self.num_timesteps * bound
        return losses

    # The network

    def predict(self, xt, t, y=None, guidance_scale=1.0):
        """The predicted (x0, eps) of noisy images, whatever the network predicts.

        Args:
            xt: noisy images, (N, C, H, W).
            t: timesteps, int64, (N,).
            y: labels, N integers or one for all, or None.
            guidance_scale: s in uncond + s (cond - uncond): 1 is no guidance, 0 ignores the labels,
                others need `y`.

        Returns:
            x0, clipped to [-1, 1], and the noise that makes `xt` from it, both (N, C, H, W).

        Raises:
            ValueError: an argument does not fit the model.
        """
        xt, t, y = checks.prediction(self, xt, t, y, guidance_scale)
        return self.denoise(xt, t, y, guidance_scale)[:2]

    def denoise(self, xt, t, y=None, guidance_scale=1.0):
        """`predict` without its checks, and the fraction of a learned variance, else None."""
        output, variance_fraction = self._network(xt, t, y, guidance_scale)
        x0 = self.x0_from_output(output, xt, t).clamp(-1, 1)
        return x0, self.eps_from_x0(x0, xt, t), variance_fraction

    def _network(self, xt, t, y=None, guidance_scale=1.0):
        """The guided prediction, and the fraction, 0 to 1, of a learned variance, else None."""
        no_label = None if self.num_classes is None else torch.full_like(t, self.num_classes)
        guided = guidance_scale not in (0, 1)
        inputs = xt, t, no_label if y is None or guidance_scale == 0 else y
        if guided:  # one doubled batch
            inputs = torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, no_label])
        # float32 even under bf16, and always in one layout: torch.compile makes a graph for each
        output = self.network(*inputs).to(xt.dtype, memory_format=torch.contiguous_format)
        output = output.view(len(inputs[0]), self.outputs, *xt.shape[2:])
        if guided:
            cond, uncond = output.chunk(2)
            output = uncond + guidance_scale * (cond - uncond)  # 2207.12598 eq. 6, w = s - 1
            output[:, self.channels :] = cond[:, self.channels :]  # a variance is not guided
        fraction = (output[:, self.channels :] + 1) / 2 if self.variance == "learned" else None
        prediction = output[:, : self.channels]
        return self.with_skip(prediction, xt, t) if self.skip_std else prediction, fraction


class DDPM(Denoiser):
    """A denoising diffusion probabilistic model: samples, bits per dimension, files.

    Args:
        network: see `Denoiser`.
        sampler, sample_steps, guidance_scale: the defaults of `sample`; None means all timesteps.
        settings: those of `Denoiser` and `GaussianProcess`.

    Raises:
        ValueError: an unknown name, a number out of range, or settings that do not fit together.
    """

    def __init__(
        self,
        network=None,
        *,
        sampler="ddpm",
        sample_steps=None,
        guidance_scale=1.0,
        **settings,
    ):
        super().__init__(network, **settings)
        self.sampler = sampler
        self.sample_steps = self.num_timesteps if sample_steps is None else sample_steps
        self.guidance_scale = guidance_scale
        self.info = {}  # what `save` was given beside the model
        checks.ddpm(self, SAMPLERS)

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
        return_sequence=False,
        progress=False,
    ):
        """Draw images. What is left out comes from the model's own settings.

        Args:
            n: number of images.
            y: n labels, or one for all; None draws those of a conditional model.
            sampler: 'ddpm', 'ddim', 'dpm++' or 'sde-dpm++', DPM-Solver++ with DDPM's noise.
            steps: sampling steps, 1 to `num_timesteps`; with guidance each takes two inputs.
            eta: share of DDPM's noise in each step, 0 to 1; None means the sampler's own.
            guidance_scale: s in uncond + s (cond - uncond): 1 is no guidance, 0 ignores the labels.
            seed: an integer that decides the images, on one kind of device; or a torch.Generator.
            xT: what to start from, (n, C, H, W); None draws noise.
            start: timestep of `xT`; None means the noisiest. From a lower one, `steps` defaults to
                the same share of the model's steps.
            return_sequence: True: the predicted x0 of every step (DDPM sec. 4.3), 'xt': the x_t.
            progress: show a progress bar.

        Returns:
            Images in [-1, 1]: (n, C, H, W), or (steps, n, C, H, W) with `return_sequence`.

        Raises:
            ValueError: an argument does not fit the model.
        """
        y, xT, generator = checks.sampling(locals(), SAMPLERS)
        y = self.draw_classes(n, y, generator)
        xT = self.draw_noise(n, generator) if xT is None else xT
        start = self.num_timesteps - 1 if start is None else start
        if steps is None:
            steps = max(1, round(self.sample_steps * (start + 1) / self.num_timesteps))
        sampler = self.sampler if sampler is None else sampler
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        timesteps, images = self.timesteps(steps, start), []
        with tqdm(total=n * steps, unit="call", disable=not progress, leave=False) as bar:
            for part in torch.arange(n, device=self.device).split(BATCH):
                labels, sequence = None if y is None else y[part], []
                walk = self.walk(
                    xT[part], timesteps, labels, sampler, eta, guidance_scale, generator
                )
                for x0, xt in walk:
                    if return_sequence:
                        sequence.append(xt if return_sequence == "xt" else x0)
                    bar.update(len(part))
                images.append(torch.stack(sequence) if return_sequence else xt)
        return torch.cat(images, dim=-4)

    def draw_noise(self, n, generator=None):
        """Standard normal noise, (n, C, H, W), in the precision of the network."""
        size = n, *self.image_shape
        return torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)

    def draw_classes(self, n, y=None, generator=None):
        """What the network is told, int64, (n,): a class of each label, drawn by its share.

        `y` are the labels, (n,); None draws them too. None for an unconditional network.
        """
        if self.num_classes is None or self.num_labels == self.num_classes and y is not None:
            return y
        shares = torch.tensor(self.class_shares or [[1] * self.num_classes], device=self.device)
        likely = shares.flatten().expand(n, -1) if y is None else shares[y]
        drawn = torch.multinomial(likely.float(), 1, generator=generator)[:, 0]
        drawn = drawn if y is None else y * shares.shape[1] + drawn
        return self.num_classes - shares.numel() + drawn  # the labels come first

    @torch.no_grad()
    def walk(
        self, xt, timesteps, y=None, sampler="ddpm", eta=None, guidance_scale=1.0, generator=None
    ):
        """The sampling loop: the predicted x0 and the new x_t of every step (DDPM alg. 2).

        From noise xt, (N, C, H, W), that belongs to the first of the timesteps, to the image. For
        the other arguments see `sample`; `y` is int64, (N,), or None.
        """
        own_eta, order = SAMPLERS[sampler]
        eta = own_eta if eta is None else eta
        x0_before = t_before = None
        for now, after in pairwise([*timesteps, -1]):
            t, s = (torch.full((len(xt),), i, device=xt.device) for i in (now, after))
            with evaluating(self):
                predicted, eps, variance_fraction = self.denoise(xt, t, y, guidance_scale)
            x0 = predicted
            # The last step, of infinite log SNR, is of first order.
            if order == 2 and x0_before is not None and after >= 0:
                x0 = self.extrapolate(predicted, x0_before, t_before, t, s)
                eps = self.eps_from_x0(x0, xt, t)
            x0_before, t_before = predicted, t
            like = {"device": xt.device, "dtype": xt.dtype}
            noise = torch.randn(xt.shape, generator=generator, **like) if eta else None
            xt = self.step(x0, eps, t, s, eta, noise, variance_fraction)
            yield predicted, xt

    def interpolate(self, x0, other, weights, t, y=None, **options):
        """Mix images through their noisy versions: (len(weights), N, C, H, W) (DDPM sec. 4.4).

        Args:
            x0, other: images in [-1, 1], (N, C, H, W).
            weights: weights of `other`, each from 0 to 1. All weights share the noise.
            t: timestep to mix at. The higher it is, the less is left of the two images.
            y: labels of the results, N integers or one for all; None means no label.
            options: those of `sample` but xT and start; `seed` decides the mixture's noise too.

        Raises:
            ValueError: an argument does not fit the model or the others.
        """
        given = x0, other, weights, t, y, options
        x0, other, weights, y, options["seed"] = checks.mixture(self, *given)
        at = torch.full((len(x0),), t, device=self.device)
        noise = self.draw_noise(2 * len(x0), options["seed"]).chunk(2)
        xt, xt_other = self.q_sample(x0, at, noise[0]), self.q_sample(other, at, noise[1])
        mixed = torch.cat([torch.lerp(xt, xt_other, weight) for weight in weights])
        if y is None:  # `sample` would draw labels
            options["guidance_scale"] = 0
        else:
            y = y.repeat(len(weights))
        images = self.sample(len(mixed), y, xT=mixed, start=t, **options)
        return images.unflatten(-4, (len(weights), len(x0)))

    # Likelihood

    def bits_per_dim(self, x0, y=None, *, terms=None, seed=None, progress=False):
        """The variational bound on -log2 p(x0), or on -log2 p(x0 | y) with labels (DDPM sec. 3.3).

        Args:
            x0: images of 256 levels in [-1, 1], (N, C, H, W).
            y: labels, N integers or one for all; None means no label.
            terms: number of its terms to compute for each image, an unbiased estimate; None: all.
            seed, progress: as for `sample`.

        Returns:
            likelihood.BitsPerDim: bits per dimension, their standard error and parts.

        Raises:
            ValueError: no images, or an argument does not fit the model.
        """
        x0, y, generator = checks.bound(self, x0, y, terms, seed)
        found = []
        with evaluating(self):
            parts = torch.arange(len(x0), device=self.device).split(BATCH)
            for part in tqdm(parts, disable=not progress, leave=False):
                labels = None if y is None else y[part]
                found.append(likelihood.bound_terms(self, x0[part], labels, terms, generator))
        return likelihood.summarise(*(torch.cat(values, dim=1) for values in zip(*found)))

    # Save and load

    def save(self, path, **info):
        """Write weights and settings to `path`, whole or not at all. `info` becomes `DDPM.info`.

        Raises:
            ValueError: `info` holds more than plain values. OSError: the file cannot be written.
        """
        network = unwrapped(self.network)
        model = {
            "network": network.config if type(network) is UNet else None,
            "diffusion": {name: checkpoint.plain(getattr(self, name)) for name in SETTINGS},
            "weights": checkpoint.plain_state_dict(network),
            "info": info,
        }
        checkpoint.save_checkpoint(path, model)

    @classmethod
    def load(cls, path=None, device=None, network=None):
        """The model that `save` wrote, in evaluation mode.

        Args:
            path: the file; None means checkpoints/best_model.pt, else the trained one in assets/.
            device: where to put it; None means the GPU if there is one.
            network: what to load the weights into; None builds the saved one, a `UNet`.

        Raises:
            ValueError: the file is missing, damaged or something else, or the network does not fit.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        checks.device(device)
        path = checkpoint.best_model() if path is None else path
        saved = checkpoint.load_checkpoint(path, ("network", "diffusion", "weights", "info"))
        if network is None and saved["network"] is None:
            raise ValueError(f"{path}: its network is no UNet; give load() the network")
        try:
            network = UNet(**saved["network"]) if network is None else network
            ddpm = cls(network, **saved["diffusion"])
            checkpoint.load_weights(ddpm.network, saved["weights"])
            ddpm.info = dict(saved["info"])
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: of another version or network ({one_line(error)})") from None
        return ddpm.to(device).eval()


# Names of all settings: what `save` keeps. train_eval.py has a constant for each but the shares.
SETTINGS = tuple(
    name
    for kind in (GaussianProcess, Denoiser, DDPM)
    for name in inspect.signature(kind).parameters
    if name not in ("network", "settings")
)
