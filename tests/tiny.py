"""What many tests share: the smallest network, model and run, and three ways to compare."""

from pathlib import Path

import pytest
import torch

from diffusion import DDPM
from unet import UNet

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
