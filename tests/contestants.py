"""What benchmark.py compares: our network and step, the same in plain code, and two libraries'.

The peers are diffusers and denoising_diffusion_pytorch; where one is missing, an ImportError says
how to get it.
"""

import argparse
import importlib
import sys
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_eval  # noqa: E402
from diffusion import DDPM  # noqa: E402
from ema import EMA  # noqa: E402
from support import configurator, machine, processes  # noqa: E402
from support.monitor import RunningStats  # noqa: E402
from timesteps import make_timesteps  # noqa: E402
from unet import Attention  # noqa: E402

NAMES = {
    "ours": "ours, as train_eval.py runs it",
    "flipped": "ours in the other precision, bf16 or fp32",
    "plain": "the same network, plain fp32 eager",
    "diffusers": "diffusers UNet2DModel",
    "denoising_diffusion_pytorch": "denoising_diffusion_pytorch Unet",
}


def settings(recipe, device):
    """The constants of a recipe, as train_eval.py would run it on this device.

    Without averaged targets, and with the same loss for all; that of x0 costs the same.
    """
    flags = {"recipe": recipe, "device": device, "target_references": 0, "prediction": "eps"}
    constants = configurator.read_constants(train_eval.__file__, vars(train_eval), flags)
    config = argparse.Namespace(**configurator.values_of(constants))
    labels = 10 if config.use_conditional_generation else 0
    config.num_classes = labels + config.num_clusters or None
    return config


def changed(config, **changes):
    """A copy of the config with other values."""
    return argparse.Namespace(**{**vars(config), **changes})


def plain(config):
    """The same without the speed-ups."""
    return changed(config, bf16=False, use_compile=False)


def flipped(config):
    """The same in the other precision."""
    return changed(config, bf16=not config.bf16)


def precision(config):
    """What the products are computed in: which ceiling counts."""
    return (
        "bf16" if config.bf16 else "tf32" if torch.device(config.device).type == "cuda" else "fp32"
    )


def make(kind, config):
    """The model of a contestant: a DDPM around its network."""
    if kind in ("ours", "flipped"):
        return train_eval.build(config)
    if kind != "plain":
        return DDPM(Peer(kind, config), image_size=config.image_size, channels=config.channels).to(
            config.device
        )
    ddpm = train_eval.build(plain(config)).to(memory_format=torch.contiguous_format)
    for module in ddpm.modules():
        if isinstance(module, Attention):
            module.forward = MethodType(fused_attention, module)
    return ddpm


def fused_attention(self, x):
    """`Attention.forward` as most would write it."""
    n, c, height, width = x.shape
    q, k, v = (
        self.qkv(self.norm(x))
        .reshape(n, 3, self.num_heads, c // self.num_heads, height * width)
        .transpose(-1, -2)
        .unbind(1)
    )
    h = F.scaled_dot_product_attention(q, k, v)
    return x + self.out(h.transpose(-1, -2).reshape(n, c, height, width))


class Peer(nn.Module):
    """Another library's UNet, as near to ours as its options allow, as `network(xt, t, y)`.

    With `patch_size` it gets pixel-unshuffled images, as ours. diffusers' has the very parameters
    and operations of ours; denoising_diffusion_pytorch's has no labels, linear attention where ours
    has none, always two blocks, and is always told the time by scale and shift.
    """

    def __init__(self, kind, config):
        super().__init__()
        self.kind, self.patch_size = kind, config.patch_size
        self.num_classes = None
        channels, size = (
            config.channels * config.patch_size**2,
            config.image_size // config.patch_size,
        )
        attention = [
            size // 2**level in config.attention_resolutions
            for level in range(len(config.channel_mult))
        ]
        module = library(kind)
        if kind == "diffusers":
            self.num_classes = config.num_classes
            self.net = module.UNet2DModel(
                sample_size=size,
                in_channels=channels,
                out_channels=channels,
                layers_per_block=config.num_res_blocks,
                block_out_channels=[config.base_channels * mult for mult in config.channel_mult],
                down_block_types=[
                    "AttnDownBlock2D" if here else "DownBlock2D" for here in attention
                ],
                up_block_types=[
                    "AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)
                ],
                attention_head_dim=None,
                time_embedding_dim=config.time_emb_dim,
                dropout=config.dropout,
                num_class_embeds=self.num_classes and self.num_classes + 1,
                resnet_time_scale_shift="scale_shift" if config.adaptive_norm else "default",
            )
        else:
            self.net = module.Unet(
                config.base_channels,
                dim_mults=config.channel_mult,
                channels=channels,
                full_attn=tuple(attention),
                dropout=config.dropout,
            )

    def forward(self, xt, t, y=None):
        """(N, C, H, W), (N,), (N,) -> (N, C, H, W)."""
        x = F.pixel_unshuffle(xt, self.patch_size)
        out = self.net(x, t, class_labels=y).sample if self.kind == "diffusers" else self.net(x, t)
        return F.pixel_shuffle(out, self.patch_size)


def library(kind):
    """The library, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise ImportError(
            f"not installed: pip install {kind}" if error.name == kind else str(error)
        ) from error


def make_pipeline(config, steps):
    """A function without arguments that draws 16 images with diffusers."""
    module = library("diffusers")
    peer = Peer("diffusers", changed(config, num_classes=None))
    pipeline = module.DDPMPipeline(peer.net.to(config.device), module.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        speed("diffusers")
        pipeline(batch_size=16, num_inference_steps=steps, output_type="np")

    return draw


def speed(kind):
    """torch's switches as train_eval.py sets them, for ours, or as they are by default."""
    torch.set_float32_matmul_precision("high" if kind == "ours" else "highest")
    torch.backends.cudnn.benchmark = kind == "ours"


def stepper(kind, config):
    """A function without arguments that does one training step, on one batch."""
    if kind == "flipped":
        kind, config = "ours", flipped(config)
    speed(kind)
    ddpm = make(kind, config)
    shape = config.batch_size, config.channels, config.image_size, config.image_size
    x0 = torch.rand(shape, device=config.device) * 2 - 1
    y = torch.arange(config.batch_size, device=config.device) % 10
    return (
        own_step(config, ddpm, x0, y) if kind == "ours" else other_step(kind, config, ddpm, x0, y)
    )


def own_step(config, ddpm, x0, y):
    """`train_eval.train_step`, with the statistics that a run takes."""
    parts = {
        "ema": EMA(ddpm.network, config.ema_decay, start=0),
        "optimizer": torch.optim.AdamW(
            ddpm.parameters(), weight_decay=config.weight_decay, fused=True
        ),
        "timesteps": make_timesteps("uniform", config.num_timesteps, device=config.device),
    }
    run, stats = argparse.Namespace(config=config, ddpm=ddpm, parts=parts), RunningStats(config)
    run.train_images = None  # candidates would be drawn from these
    model = processes.parallel(ddpm).train()
    machine.compile_network(config, ddpm, lambda n: train_eval.warm_up(config, model, n))

    def step():
        speed("ours")
        stats.add(*train_eval.train_step(run, model, x0, y, config.learning_rate))
        if stats.count == config.log_every:
            stats.read(0, 0.0)

    return step


def other_step(kind, config, ddpm, x0, y):
    """The step of plain code, or of another library."""
    eager = {"foreach": False, "fused": False} if kind == "plain" else {}
    optimizer = torch.optim.AdamW(
        ddpm.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, **eager
    )
    if kind == "plain":
        update = python_ema(ddpm, [p.detach().clone() for p in ddpm.parameters()], config.ema_decay)
    elif kind == "diffusers":
        from diffusers.training_utils import EMAModel

        ema = EMAModel(ddpm.network.net.parameters(), decay=config.ema_decay)

        def update():
            ema.step(ddpm.network.net.parameters())
    else:  # as its Trainer has it: every tenth step
        update = (
            importlib.import_module("ema_pytorch").EMA(ddpm.network.net, update_every=10).update
        )

    def step():
        speed(kind)
        ddpm.train()
        ddpm(x0, y if ddpm.num_classes is not None else None).backward()
        nn.utils.clip_grad_norm_(
            ddpm.parameters(), config.grad_clip, foreach=False if kind == "plain" else None
        )
        optimizer.step()
        optimizer.zero_grad()
        update()

    return step


def python_ema(ddpm, shadow, decay):
    """The update of shadow weights as most write it."""

    @torch.no_grad()
    def update():
        for average, p in zip(shadow, ddpm.parameters()):
            average.mul_(decay).add_(p, alpha=1 - decay)

    return update
