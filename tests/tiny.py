"""What many tests share: the smallest networks, models and run, and ways to compare."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from diffusion import DDPM
from unet import UNet

MEAN, STD = 0.3, 0.1  # of the pixels of `gaussian`; clipping to [-1, 1] never bites

# The smallest run of the script: 20 steps an epoch, some seconds. Later flags replace earlier ones.
FLAGS = (
    "--device cpu --no-bf16 --train_size 160 --test_size 80 --image_size 16 --channels 1 "
    "--base_channels 32 --channel_mult 1 --num_res_blocks 1 --time_emb_dim 8 --patch_size 4 "
    "--attention_resolutions none --batch_size 8 --epochs 2 --num_timesteps 20 --sample_steps 2 "
    "--preview_steps 2 --num_samples 4 --target_references 32 --bound_terms 4 --bound_images 8 "
    "--log_every 4 --sample_every 20 --save_every 20"
).split()


def tiny_unet(**settings):
    """A UNet of 8x8 images of one channel, whose output is not zero, in evaluation mode."""
    small = dict(image_size=8, channels=1, base_channels=32, channel_mult=(1,), num_res_blocks=1)
    small |= dict(attention_resolutions=(), dropout=0.0, time_emb_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(**small | settings)
        for parameter in network.parameters():  # some layers begin as zeros
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def tiny_ddpm(num_classes=None, network=None, **settings):
    """A DDPM of a `tiny_unet`, with ten timesteps, in evaluation mode."""
    settings = dict(image_size=8, channels=1, num_timesteps=10) | settings
    outputs = settings["channels"] * (2 if settings.get("variance") == "learned" else 1)
    if network is None:
        shape = {name: settings[name] for name in ("image_size", "channels")}
        network = tiny_unet(num_classes=num_classes, out_channels=outputs, **shape)
    return DDPM(network, **settings).eval()


class OwnNetwork(torch.nn.Module):
    """The least network of one's own: parameters, a buffer, and labels if it has `num_classes`."""

    def __init__(self, channels=1, out_channels=1, num_classes=10):
        super().__init__()
        self.num_classes = num_classes
        self.conv = torch.nn.Conv2d(channels, out_channels, 3, padding=1)
        self.labels = num_classes and torch.nn.Embedding(num_classes + 1, out_channels)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, xt, t, y=None):
        h = self.scale * self.conv(xt) + t[:, None, None, None] / 8
        return h if y is None else h + self.labels(y)[:, :, None, None]


def truth(prediction, a, x0, eps):
    """What a network should predict, by the papers; `a` is alphas_cumprod at t, (N, 1, 1, 1)."""
    return {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[prediction]


class Exact(torch.nn.Module):
    """The best possible network for pixels N(means[y], STD^2); the last label is 'no label'.

    With a = alphas_cumprod[t], E[x0 | x_t] = mean + sqrt(a) STD^2 / (a STD^2 + 1 - a) (x_t -
    sqrt(a) mean). `places`, if any, says for each t where a learned variance lies, from -1 to 1.
    """

    def __init__(self, means, places):
        super().__init__()
        self.means, self.places = torch.tensor(means, dtype=torch.float64), places
        self.num_classes = len(means) - 1 or None

    def forward(self, xt, t, y=None):
        a = self.alphas_cumprod[t][:, None, None, None]
        mean = self.means[torch.zeros_like(t) if y is None else y][:, None, None, None]
        x0 = mean + a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * (xt - a.sqrt() * mean)
        output = truth(self.prediction, a, x0, (xt - a.sqrt() * x0) / (1 - a).sqrt())
        if self.places is None:
            return output
        return torch.cat([output, self.places(t)[:, :, None, None].expand(xt.shape)], dim=1)


def gaussian(means=(MEAN,), place=None, num_timesteps=1000, **settings):
    """A DDPM of the `Exact` network; with a `place` its variance is learned."""
    places = None
    if place is not None:
        settings["variance"], places = "learned", torch.nn.Embedding(num_timesteps, 1)
        torch.nn.init.constant_(places.weight, place)
    network = Exact(means, places)
    ddpm = tiny_ddpm(network=network, num_timesteps=num_timesteps, **settings)
    network.prediction, network.alphas_cumprod = ddpm.prediction, ddpm.alphas_cumprod
    return ddpm


@contextmanager
def full_disk(size):
    """Inside, the system refuses to write more than so many bytes into a file."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def same(a, b):
    """Whether two values are equal to the bit: tensors, numbers, and dicts or lists of them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def snapshot(folder):
    """The contents of all files of a folder, {relative path: bytes}."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refused(function, *parts):
    """Assert that a call is refused by a ValueError of one line that contains these parts."""
    with pytest.raises(ValueError) as caught:
        function()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert all(str(part) in message for part in parts), message
    return message
