"""The network: (x_t, t, y) -> prediction.

The UNet of DDPM (arXiv 2006.11239, appendix B): residual blocks that get the time embedding, attention at low
resolutions, and skip connections from the way down to the way up.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn

from support.checks import check_number, check_switch, check_tensor, check_whole, shown

NUM_GROUPS = 32  # groups in every GroupNorm, as in DDPM


class UNet(nn.Module):
    """The UNet. Without arguments it is the reference: 232,759,043 parameters.

    Args:
        image_size: height and width of the images, in pixels.
        channels: channels of the images.
        base_channels: width of the first level; a multiple of 32.
        channel_mult: width of each level as a multiple of `base_channels`; each further level halves the resolution.
        num_res_blocks: residual blocks per level on the way down; the way up has one more.
        attention_resolutions: heights of the feature maps whose residual blocks end in attention. The first block of
            the middle always does.
        dropout: dropout probability in every residual block.
        time_emb_dim: width of the time embedding.
        num_classes: number of labels; None for an unconditional network.
        num_heads: heads in each attention layer; it does not change the number of parameters.
        adaptive_norm: the embedding scales and shifts the output of the second GroupNorm of a residual block (Improved
            DDPM, sec. 6) instead of being added before it.
        out_channels: channels of the prediction; None means `channels`. A learned variance needs twice as many.
        patch_size: fold patches of this size into channels at the input (pixel-unshuffle) and unfold them at the
            output. Inside, the network works at `image_size / patch_size`.

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
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        for name, value in (
            ("channel_mult", channel_mult),
            ("attention_resolutions", attention_resolutions),
        ):
            if not isinstance(value, (tuple, list)):
                raise ValueError(f"{name} {shown(value)}: expected a tuple of whole numbers")
        # What rebuilds this network: saved beside the weights.
        self.config = dict(
            image_size=image_size,
            channels=channels,
            base_channels=base_channels,
            channel_mult=tuple(channel_mult),
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions),
            dropout=dropout,
            time_emb_dim=time_emb_dim,
            num_classes=num_classes,
            patch_size=patch_size,
            num_heads=num_heads,
            adaptive_norm=adaptive_norm,
            out_channels=out_channels,
        )
        self.image_shape = (channels, image_size, image_size)
        self.num_classes = num_classes
        self.patch_size = patch_size
        resolutions = _check(self.config)

        self.time_embedding = nn.Sequential(
            SinusoidalEmbedding(base_channels),
            nn.Linear(base_channels, time_emb_dim),
            nn.SiLU(),
            nn.Linear(time_emb_dim, time_emb_dim),
        )
        # The last row stands for 'no label' (classifier-free guidance, arXiv 2207.12598).
        self.label_embedding = (
            None if num_classes is None else nn.Embedding(num_classes + 1, time_emb_dim)
        )

        def block(width_in, width_out, attention):
            return ResidualBlock(
                width_in,
                width_out,
                time_emb_dim,
                dropout,
                num_heads if attention else 0,
                adaptive_norm,
            )

        self.conv_in = nn.Conv2d(channels * patch_size**2, base_channels, 3, padding=1)
        width = base_channels
        skips = [width]
        self.down = nn.ModuleList()
        for level, (mult, resolution) in enumerate(zip(channel_mult, resolutions)):
            for _ in range(num_res_blocks):
                self.down.append(
                    block(width, base_channels * mult, resolution in attention_resolutions)
                )
                width = base_channels * mult
                skips.append(width)
            if level < len(channel_mult) - 1:
                self.down.append(Downsample(width))
                skips.append(width)

        self.middle = nn.ModuleList([block(width, width, True), block(width, width, False)])

        self.up = nn.ModuleList()
        for level, (mult, resolution) in reversed(list(enumerate(zip(channel_mult, resolutions)))):
            for _ in range(num_res_blocks + 1):
                self.up.append(
                    block(
                        width + skips.pop(),
                        base_channels * mult,
                        resolution in attention_resolutions,
                    )
                )
                width = base_channels * mult
            if level > 0:
                self.up.append(Upsample(width))

        self.norm_out = nn.GroupNorm(NUM_GROUPS, width)
        self.conv_out = _zero(nn.Conv2d(width, out_channels * patch_size**2, 3, padding=1))

    def forward(self, xt, t, y=None):
        """Predict from noisy images.

        Args:
            xt: noisy images, (N, channels, image_size, image_size).
            t: timesteps, int64, (N,).
            y: labels, int64, (N,), where `num_classes` means 'no label'; None means that for all of them.

        Returns:
            The prediction, (N, out_channels, image_size, image_size): the noise, v or x0, whatever the network was
            trained for. With a learned variance the second half of the channels says where it lies.

        Raises:
            ValueError: labels for an unconditional network, or images of another shape.
        """
        if not torch.compiler.is_compiling():  # a graph would be cut at each look at a value
            self._check_inputs(xt, t, y)
        embedding = self.time_embedding(t)
        if self.label_embedding is not None:
            if y is None:
                y = torch.full_like(t, self.num_classes)
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

    def _check_inputs(self, xt, t, y):
        """ValueError if the inputs of `forward` do not fit. Autocast converts images; without it they have one type."""
        weight = self.conv_in.weight
        mixed = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        dtypes = (
            {weight.dtype, torch.float32, torch.bfloat16, torch.float16}
            if mixed
            else {weight.dtype}
        )
        check_tensor("xt", xt, dtypes, ("N", *self.image_shape), finite=False)
        check_tensor("t", t, (torch.int64,), (len(xt),))
        if y is not None and self.num_classes is None:
            raise ValueError(
                "y: labels were given to an unconditional network; build it with num_classes"
            )
        if y is not None:
            check_tensor("y", y, (torch.int64,), (len(xt),), 0, self.num_classes)


class SinusoidalEmbedding(nn.Module):
    """Timesteps (N,) -> sines and cosines (N, dim) of `dim / 2` frequencies that fall from 1 towards 1/10000."""

    def __init__(self, dim):
        super().__init__()
        frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t):
        angles = t[:, None].float() * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ResidualBlock(nn.Module):
    """Two convolutions with the time embedding between them, a shortcut around them, and attention after them.

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
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )
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
    """Self-attention over the pixels of a feature map, with a residual: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels, num_heads=1):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        n, c, height, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x))
            .reshape(n, 3, self.num_heads, c // self.num_heads, height * width)
            .transpose(0, 1)
            .flatten(1, 2)
        )  # each (N heads, C / heads, H W)
        # Plain products: on CPU the fused kernel's backward pass is slower than these.
        weights = torch.softmax(
            torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5, dim=-1
        )  # (.., query, key)
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


UNET_SETTINGS = tuple(inspect.signature(UNet).parameters)  # what a config must have to build one


def num_classes_of(network):
    """The number of labels that a network knows, from its attribute `num_classes`; None if it is unconditional.

    Raises:
        ValueError: the network says nothing, but one of its parts knows labels: a wrapper hides them.
    """
    if not hasattr(network, "num_classes"):
        for name, module in network.named_modules():
            if getattr(module, "num_classes", None) is not None:
                raise ValueError(
                    f"network: {type(network).__name__} has no num_classes, but its part {name} knows "
                    f"{module.num_classes} labels; give it num_classes, None for an unconditional model"
                )
    num_classes = getattr(network, "num_classes", None)
    if num_classes is not None:
        check_whole("num_classes", num_classes, 1, note=", or None")
    return num_classes


def is_plain_unet(network, weights):
    """Whether `UNet(**network.config)` with these weights computes the same: no layer was exchanged, no hook added."""
    if type(network) is not UNet:
        return False
    layers = [
        layer for layer in network.modules() if "_orig_mod" not in layer._modules
    ]  # without torch.compile's
    if any(
        layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        for layer in layers
    ):
        return False
    with torch.device("meta"):
        plain = UNet(**network.config)
    shapes, plain_shapes = (
        {name: w.shape for name, w in of.items()} for of in (weights, plain.state_dict())
    )
    kinds, plain_kinds = (
        [(type(layer), layer.extra_repr()) for layer in of] for of in (layers, plain.modules())
    )
    return shapes == plain_shapes and kinds == plain_kinds


def _zero(module):
    """Set a layer to zero, so that its residual block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _check(config):
    """Check the settings. Returns the height of the feature maps of each level."""
    for name in (
        "image_size",
        "channels",
        "base_channels",
        "num_res_blocks",
        "time_emb_dim",
        "patch_size",
        "num_heads",
        "out_channels",
    ):
        check_whole(name, config[name], 1)
    for name in ("channel_mult", "attention_resolutions"):
        for value in config[name]:
            check_whole(name, value, 1)
    if config["num_classes"] is not None:
        check_whole("num_classes", config["num_classes"], 1, note=", or None")
    check_switch("adaptive_norm", config["adaptive_norm"])
    check_number("dropout", config["dropout"], 0, 1, note=", without 1")
    if config["base_channels"] % NUM_GROUPS:
        raise ValueError(
            f"base_channels {config['base_channels']}: expected a multiple of {NUM_GROUPS}"
        )
    if config["dropout"] == 1:
        raise ValueError(f"dropout {config['dropout']}: expected a probability from 0 to below 1")
    levels, patch_size = len(config["channel_mult"]), config["patch_size"]
    if not 1 <= levels <= 30:
        raise ValueError(
            f"channel_mult {shown(config['channel_mult'])}: expected a whole number for each of 1 to 30 "
            "levels"
        )
    factor = patch_size * 2 ** (levels - 1)
    if config["image_size"] % factor:
        raise ValueError(
            f"image_size {config['image_size']}: expected a multiple of {factor}, for patch_size "
            f"{patch_size} and {levels} levels in channel_mult"
        )
    resolutions = [config["image_size"] // patch_size // 2**level for level in range(levels)]
    for resolution in config["attention_resolutions"]:
        if resolution not in resolutions:
            raise ValueError(
                f"attention_resolutions {resolution}: no feature map has that height; "
                f"this network has {', '.join(map(str, resolutions))}"
            )
    for mult, resolution in zip(config["channel_mult"], resolutions):
        width = config["base_channels"] * mult
        if (
            resolution in (*config["attention_resolutions"], resolutions[-1])
            and width % config["num_heads"]
        ):
            raise ValueError(
                f"num_heads {config['num_heads']}: expected a divisor of {width}, the width of the "
                f"attention at {resolution}x{resolution}"
            )
    return resolutions
