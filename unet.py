"""The network: (x_t, t, y) -> prediction.

The UNet of DDPM (arXiv 2006.11239, appendix B): residual blocks that get the time embedding,
attention at low resolutions, and skip connections from the way down to the way up.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn

from support import checks

NUM_GROUPS = 32  # groups in every GroupNorm, as in DDPM


class UNet(nn.Module):
    """The UNet. Without arguments it is the reference: 232,759,043 parameters.

    Args:
        image_size: height and width of the images, in pixels.
        channels: channels of the images.
        base_channels: width of the first level; a multiple of 32.
        channel_mult: width of each level as a multiple of `base_channels`; each further level
            halves the resolution.
        num_res_blocks: residual blocks per level on the way down; the way up has one more.
        attention_resolutions: heights of the feature maps whose residual blocks end in attention.
            The first block of the middle always does.
        dropout: dropout probability in every residual block.
        time_emb_dim: width of the time embedding.
        num_classes: number of labels; None for an unconditional network.
        patch_size: fold patches of this size into channels at the input (pixel-unshuffle) and
            unfold them at the output. Inside, the network works at `image_size / patch_size`.
        num_heads: heads in each attention layer; it does not change the number of parameters.
        adaptive_norm: the embedding scales and shifts the output of the second GroupNorm of a
            residual block (Improved DDPM, app. A) instead of being added before it.
        out_channels: channels of the prediction; None means `channels`. A learned variance needs
            twice as many.

    Raises:
        ValueError: widths, sizes or resolutions do not fit together.
    """

    def __init__(
        self,
        image_size=32,
        channels=3,
        base_channels=128,
        channel_mult=(1, 2, 4, 8),
        num_res_blocks=2,
        attention_resolutions=(8, 16),
        dropout=0.1,
        time_emb_dim=512,
        num_classes=None,
        patch_size=1,
        num_heads=1,
        adaptive_norm=False,
        out_channels=None,
    ):
        arguments = locals()
        super().__init__()
        # What rebuilds this network: saved beside the weights.
        self.config = {name: arguments[name] for name in UNET_SETTINGS}
        _check(self.config)
        self.num_classes = num_classes
        self.patch_size = patch_size

        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(base_channels),
            nn.Linear(base_channels, time_emb_dim),
            nn.SiLU(),
            nn.Linear(time_emb_dim, time_emb_dim),
        )
        # The last row stands for 'no label' (classifier-free guidance, arXiv 2207.12598).
        self.label_embedding = None
        if num_classes is not None:
            self.label_embedding = nn.Embedding(num_classes + 1, time_emb_dim)

        def block(width_in, width_out, attention):
            heads = num_heads if attention else 0
            return ResidualBlock(width_in, width_out, time_emb_dim, dropout, heads, adaptive_norm)

        self.conv_in = nn.Conv2d(channels * patch_size**2, base_channels, 3, padding=1)
        width = base_channels
        skips, levels = [width], []  # of a level: width, and whether its blocks end in attention
        for level, mult in enumerate(channel_mult):
            resolution = image_size // patch_size // 2**level
            levels.append((base_channels * mult, resolution in attention_resolutions))

        self.down = nn.ModuleList()
        for level, (level_width, attention) in enumerate(levels):
            for _ in range(num_res_blocks):
                self.down.append(block(width, level_width, attention))
                width = level_width
                skips.append(width)
            if level < len(levels) - 1:
                self.down.append(Downsample(width))
                skips.append(width)

        self.middle = nn.ModuleList([block(width, width, True), block(width, width, False)])

        self.up = nn.ModuleList()
        for level, (level_width, attention) in reversed(list(enumerate(levels))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(width + skips.pop(), level_width, attention))
                width = level_width
            if level > 0:
                self.up.append(Upsample(width))

        self.norm_out = nn.GroupNorm(NUM_GROUPS, width)
        out_channels = channels if out_channels is None else out_channels
        self.conv_out = _zero(nn.Conv2d(width, out_channels * patch_size**2, 3, padding=1))

    def forward(self, xt, t, y=None):
        """Predict from noisy images.

        Args:
            xt: noisy images, (N, channels, image_size, image_size).
            t: timesteps, int64, (N,).
            y: labels, int64, (N,), where `num_classes` means 'no label', as None does for all.

        Returns:
            The prediction, (N, out_channels, image_size, image_size): the noise, v or x0, whatever
            the network was trained for. With a learned variance the second half of the channels
            says where it lies.
        """
        embedding = self.time_embedding(t)
        if self.label_embedding is not None:
            y = torch.full_like(t, self.num_classes) if y is None else y
            embedding = embedding + self.label_embedding(y)
        embedding = F.silu(embedding)

        h = self.conv_in(F.pixel_unshuffle(xt, self.patch_size))
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            if isinstance(layer, ResidualBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size)


UNET_SETTINGS = tuple(inspect.signature(UNet).parameters)  # what a config must have to build one


class SinusoidalEmbedding(nn.Module):
    """Timesteps (N,) -> sines and cosines (N, dim) of frequencies that fall from 1 to 1/10000."""

    def __init__(self, dim):
        super().__init__()
        frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t):
        angles = t[:, None].float() * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ResidualBlock(nn.Module):
    """Two convolutions with the time embedding between them, a shortcut around, attention after.

    It maps images (N, in_channels, H, W) and the embedding after its SiLU, (N, time_emb_dim), to
    (N, out_channels, H, W). `num_heads` 0 means no attention.
    """

    def __init__(
        self, in_channels, out_channels, time_emb_dim, dropout, num_heads=0, adaptive_norm=False
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.adaptive_norm = adaptive_norm
        self.project = nn.Linear(time_emb_dim, 2 * out_channels if adaptive_norm else out_channels)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels, num_heads) if num_heads else nn.Identity()

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x)))
        conditioning = self.project(embedding)[:, :, None, None]
        if self.adaptive_norm:
            scale, shift = conditioning.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + conditioning)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(h + self.shortcut(x))


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual, (N, C, H, W) to the same.

    Plain products: on a CPU the fused kernel's backward pass is slower than these.
    """

    def __init__(self, channels, num_heads=1):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x))
        qkv = qkv.reshape(n, 3, self.num_heads, c // self.num_heads, height * width)
        q, k, v = qkv.transpose(0, 1).flatten(1, 2)  # each (N heads, C / heads, H W)
        scores = torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5  # (.., query, key)
        weights = torch.softmax(scores, dim=-1)
        h = torch.bmm(v, weights.transpose(1, 2))
        return x + self.out(h.reshape(n, c, height, width))


class Downsample(nn.Module):
    """A strided convolution that halves height and width. It does not use the embedding."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, embedding):
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution. It does not use the embedding."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, embedding):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _zero(module):
    """Set a layer to zero, so that its residual block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _check(config):
    """ValueError for settings that do not fit together: the door of the network."""
    for name in ("channel_mult", "attention_resolutions"):
        if not isinstance(config[name], (tuple, list)):
            checks.refuse(name, config[name], "a tuple of whole numbers")
        for value in config[name]:
            checks.whole(name, value)
    sizes = "image_size channels base_channels num_res_blocks time_emb_dim patch_size num_heads"
    for name in sizes.split():
        checks.whole(name, config[name])
    for name in ("num_classes", "out_channels"):
        if config[name] is not None:
            checks.whole(name, config[name], note=", or None")
    checks.switch("adaptive_norm", config["adaptive_norm"])
    checks.number("dropout", config["dropout"], 0, 1)
    if config["dropout"] == 1:
        checks.refuse("dropout", 1, "a probability from 0 to below 1")
    if config["base_channels"] % NUM_GROUPS:
        checks.refuse("base_channels", config["base_channels"], f"a multiple of {NUM_GROUPS}")
    levels, patch_size = len(config["channel_mult"]), config["patch_size"]
    if not 1 <= levels <= 30:
        checks.refuse(
            "channel_mult", config["channel_mult"], "a whole number for each of 1 to 30 levels"
        )
    factor = patch_size * 2 ** (levels - 1)
    if config["image_size"] % factor:
        expected = f"a multiple of {factor}, for patch_size {patch_size} and {levels} levels"
        checks.refuse("image_size", config["image_size"], f"{expected} in channel_mult")
    resolutions = [config["image_size"] // patch_size // 2**level for level in range(levels)]
    for resolution in config["attention_resolutions"]:
        if resolution not in resolutions:
            expected = f"heights of feature maps: {', '.join(map(str, resolutions))}"
            checks.refuse("attention_resolutions", resolution, expected)
    for mult, resolution in zip(config["channel_mult"], resolutions):
        width = config["base_channels"] * mult
        attention = resolution in (*config["attention_resolutions"], resolutions[-1])
        if attention and width % config["num_heads"]:
            expected = f"a divisor of {width}, the width of the attention at {resolution}"
            checks.refuse("num_heads", config["num_heads"], expected)
