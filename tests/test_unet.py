"""The network: the reference's exact size, and its parts against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_unet

from unet import Attention, Downsample, ResidualBlock, SinusoidalEmbedding, UNet, Upsample


def count(**settings):
    with torch.device("meta"):  # shapes without memory
        return sum(parameter.numel() for parameter in UNet(**settings).parameters())


def trained(module):
    """Random weights everywhere: nothing is zero any more."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


def watch(module):
    """Two lists to which each call will append: what the module was given, and what it made."""
    given, made = [], []

    def append(_, arguments, output):
        given.append(arguments)
        made.append(output)

    module.register_forward_hook(append)
    return given, made


def noisy(network, n=2):
    size, channels = network.config["image_size"], network.config["channels"]
    return torch.randn(n, channels, size, size), torch.arange(n) * 300 + 7


# Structure


def test_the_reference_has_its_exact_size():
    assert count(attention_resolutions=()) == 226_182_403
    assert count() == count(attention_resolutions=(8, 16)) == 232_759_043
    assert count(num_classes=10) == 232_759_043 + 11 * 512  # one row is for no label


@pytest.mark.parametrize(
    "patch_size, resolutions, blocks",
    [(1, (), 0), (1, (8, 16), 10), (1, (32, 4), 10), (4, (8,), 5)],
)
def test_attention_stands_where_named_and_in_the_middle(patch_size, resolutions, blocks):
    with torch.device("meta"):
        network = UNet(attention_resolutions=resolutions, patch_size=patch_size)
        watched = [watch(m) for m in network.modules() if isinstance(m, Attention)]
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    heights = [output.shape[2] for _, (output,) in watched]
    heights.remove(32 // patch_size // 8)  # the middle
    assert len(heights) == blocks and set(heights) == set(resolutions)


def test_the_way_up_takes_the_skips_last_one_first_and_ends_in_norm_and_silu():
    network = tiny_unet(channel_mult=(1, 2), num_res_blocks=2)
    down = [watch(layer) for layer in (network.conv_in, *network.down)]
    up = [watch(layer) for layer in network.up if isinstance(layer, ResidualBlock)]
    end = watch(network.conv_out)
    network(*noisy(network))
    assert len(down) == len(up) == 6
    for (given, _), (_, made) in zip(up, reversed(down)):
        (x, _), skip = given[0], made[0]
        assert torch.equal(x[:, -skip.shape[1] :], skip)
    assert torch.equal(end[0][0][0], F.silu(network.norm_out(up[-1][1][0])))


def test_settings_reach_every_layer_and_the_config_builds_the_same_network():
    network = tiny_unet(num_classes=10, dropout=0.3, num_heads=2, adaptive_norm=True)
    twin = UNet(**network.config).eval()
    twin.load_state_dict(network.state_dict())
    inputs = *noisy(network), torch.tensor([3, 10])
    assert twin.config == network.config and torch.equal(twin(*inputs), network(*inputs))
    assert {m.p for m in twin.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    assert {m.num_heads for m in twin.modules() if isinstance(m, Attention)} == {2}
    assert all(m.adaptive_norm for m in twin.modules() if isinstance(m, ResidualBlock))


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
    network = UNet(8, 1, 32, (1,), 1, (), time_emb_dim=8)
    assert network(*noisy(network)).abs().max() == 0
    x = torch.randn(2, 32, 4, 4)
    for block in network.middle:  # with attention, and without
        assert torch.equal(block(x, torch.randn(2, 8)), x)


# From input to output


@pytest.mark.parametrize("patch_size, channels, outputs", [(2, 3, 3), (4, 1, 2)])
def test_patches_become_channels_and_channels_patches(patch_size, channels, outputs):
    settings = dict(channels=channels, patch_size=patch_size, out_channels=outputs)
    network = tiny_unet(image_size=16, **settings)
    given, made = watch(network.conv_in)[0], watch(network.conv_out)[1]
    xt, t = noisy(network)
    prediction = network(xt, t)
    assert prediction.shape == (2, outputs, 16, 16)
    for images, patches in ((xt, given[0][0]), (prediction, made[0])):
        rows = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
        assert torch.equal(patches, rows.permute(0, 1, 3, 5, 2, 4).flatten(1, 3))


def test_blocks_get_the_time_through_two_layers_plus_the_label_after_a_silu():
    network = tiny_unet(num_classes=10)
    _, first, _, second = network.time_embedding
    (xt, t), (given, _) = noisy(network), watch(network.middle[0])
    for y in (torch.tensor([3, 0]), torch.tensor([10, 10]), None):
        network(xt, t, y)
        rows = network.label_embedding.weight[y if y is not None else [10, 10]]
        time = second(F.silu(first(SinusoidalEmbedding(32)(t))))
        torch.testing.assert_close(given.pop()[1], F.silu(time + rows))


# Parts


def test_the_time_embedding_is_sines_then_cosines_of_falling_frequencies():
    t = torch.tensor([0, 7, 999])
    angles = t[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    expected = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    torch.testing.assert_close(SinusoidalEmbedding(8)(t), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adaptive_norm, num_heads, training", [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_the_residual_block_is_the_designs(adaptive_norm, num_heads, training):
    """Norm, SiLU, conv; the embedding; norm, SiLU, dropout, conv; the shortcut; attention."""
    block = trained(ResidualBlock(32, 64, 16, 0.5, num_heads, bool(adaptive_norm)))
    block.train(bool(training))
    x, embedding = torch.randn(2, 32, 8, 8), torch.randn(2, 16)
    state = torch.get_rng_state()
    result = block(x, embedding)
    torch.set_rng_state(state)
    told = F.linear(embedding, block.project.weight, block.project.bias)[:, :, None, None]
    h = block.conv1(F.silu(F.group_norm(x, 32, block.norm1.weight, block.norm1.bias)))
    h = h if adaptive_norm else h + told
    h = F.group_norm(h, 32, block.norm2.weight, block.norm2.bias)
    if adaptive_norm:
        h = h * (1 + told[:, :64]) + told[:, 64:]
    h = block.conv2(F.dropout(F.silu(h), 0.5, bool(training))) + block.shortcut(x)
    torch.testing.assert_close(result, block.attention(h))
    assert isinstance(block.attention, Attention) == bool(num_heads)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_is_torchs_own_each_head_on_its_own_channels(num_heads):
    attention, x = trained(Attention(32, num_heads)), torch.randn(2, 32, 4, 2)
    with torch.no_grad():
        attention.qkv.weight *= 5  # so that the softmax is far from even
    qkv = attention.qkv(attention.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    mixed = mixed.transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + attention.out(mixed))


def test_upsampling_repeats_pixels_and_downsampling_takes_every_other():
    x = torch.randn(2, 4, 6, 6)
    for layer, expected in (
        (Upsample(4), x.repeat_interleave(2, 2).repeat_interleave(2, 3)),
        (Downsample(4), x[:, :, ::2, ::2]),
    ):
        torch.nn.init.dirac_(layer.conv.weight)
        torch.nn.init.zeros_(layer.conv.bias)
        assert torch.equal(layer(x, None), expected)
