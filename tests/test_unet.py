"""The network: the reference's exact size, attention where it was asked for, labels, patches, the zero start."""

import math

import pytest
import torch
import torch.nn.functional as F

from unet import Attention, ResidualBlock, SinusoidalEmbedding, UNet, Upsample


def count(**options):
    with torch.device("meta"):  # shapes without memory
        return sum(parameter.numel() for parameter in UNet(**options).parameters())


def small(**options):
    defaults = dict(
        base_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        time_emb_dim=64,
        patch_size=2,
    )
    return UNet(**{**defaults, **options})


def trained(network):
    """Random weights everywhere, as after training: nothing is zero any more."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def test_the_reference_has_its_exact_size():
    assert count(attention_resolutions=()) == 226_182_403
    assert count() == count(attention_resolutions=(8, 16)) == 232_759_043


def test_the_conditional_reference_adds_a_row_a_label_and_one_for_no_label():
    assert count(num_classes=10) == 232_759_043 + 11 * 512 == 232_764_675
    assert count(num_classes=10, attention_resolutions=()) == 226_188_035


@pytest.mark.parametrize(
    "resolutions, blocks", [((), 0), ((8,), 5), ((16,), 5), ((8, 16), 10), ((32, 4), 10)]
)
def test_attention_stands_at_the_resolutions_named_and_in_the_middle(resolutions, blocks):
    with torch.device("meta"):
        network = UNet(attention_resolutions=resolutions)
        heights = []
        for module in network.modules():
            if isinstance(module, Attention):
                module.register_forward_hook(
                    lambda module, args, output: heights.append(output.shape[2])
                )
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    assert heights.pop(heights.index(4)) == 4  # the middle, the bottom of 32, 16, 8, 4
    assert len(heights) == blocks and set(heights) == set(resolutions)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(attention_resolutions=(7,)), "attention_resolutions 7"),
        (dict(attention_resolutions=(8, 32), patch_size=2), "attention_resolutions 32"),
        (dict(base_channels=48), "base_channels 48"),
        (dict(image_size=28), "image_size 28"),
        (dict(image_size=32, patch_size=8), "image_size 32"),
        (dict(channel_mult=()), "channel_mult"),
        (dict(patch_size=0), "patch_size 0"),
        (dict(num_res_blocks=0), "num_res_blocks 0"),
        (dict(time_emb_dim=0), "time_emb_dim 0"),
        (dict(dropout=1.5), "dropout 1.5"),
        (dict(num_heads=0), "num_heads 0"),
        (
            dict(num_heads=3),
            "num_heads 3: expected a divisor of 256, the width of the attention at 16x16",
        ),
        (dict(out_channels=0), "out_channels 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as error:
        UNet(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_prediction_has_the_shape_of_the_images(patch_size, channels):
    network = trained(
        small(patch_size=patch_size, channels=channels, attention_resolutions=(16 // patch_size,))
    )
    xt = torch.randn(2, channels, 32, 32)
    assert network(xt, torch.tensor([0, 999])).shape == xt.shape


def test_patches_keep_pixels_in_their_place():
    """A network of one patch step moves a local change of the input only locally."""
    network = trained(small(channel_mult=(1,), attention_resolutions=()))
    network.middle[
        0
    ].attention = torch.nn.Identity()  # attention and group norm look at the whole image
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    xt, t = torch.randn(1, 3, 32, 32), torch.tensor([5])
    changed = xt.clone()
    changed[0, :, 0, 31] += 1.0  # the upper right corner
    difference = (network(changed, t) - network(xt, t)).abs().sum(1)[0]
    assert (
        difference[:16, 16:].sum() > 0
        and difference[:, :2].sum() == 0
        and difference[30:].sum() == 0
    )


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
    network = small().eval()
    assert network(torch.randn(2, 3, 32, 32), torch.tensor([1, 2])).abs().max() == 0
    block = network.middle[0]
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(block(x, torch.randn(2, 64)), x)


def test_time_and_label_change_the_prediction():
    network = trained(small(num_classes=10))
    xt, t = torch.randn(1, 3, 32, 32).expand(3, -1, -1, -1), torch.full((3,), 500)
    with torch.no_grad():
        by_time = network(xt, torch.tensor([0, 500, 999]))
        by_label = network(xt, t, torch.tensor([0, 1, 10]))
        without = network(xt, t)
    assert not torch.allclose(by_time[0], by_time[1]) and not torch.allclose(by_time[1], by_time[2])
    assert not torch.allclose(by_label[0], by_label[1])
    torch.testing.assert_close(by_label[2], without[2])  # label 10 is 'no label'


def test_images_do_not_see_each_other():
    network = trained(small())
    xt, t = torch.randn(3, 3, 32, 32), torch.tensor([10, 500, 900])
    with torch.no_grad():
        torch.testing.assert_close(
            network(xt, t)[1:2], network(xt[1:2], t[1:2]), atol=1e-4, rtol=1e-4
        )


def test_labels_for_an_unconditional_network_are_refused():
    with pytest.raises(ValueError, match="unconditional"):
        small()(torch.randn(1, 3, 32, 32), torch.tensor([0]), torch.tensor([1]))


def test_attention_mixes_pixels_by_similarity():
    """Against torch's own attention, one head as wide as the channels."""
    attention = trained(Attention(32))
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        q, k, v = attention.qkv(attention.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = (
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            .transpose(1, 2)
            .reshape(x.shape)
        )
        torch.testing.assert_close(attention(x), x + attention.out(mixed))


def test_heads_attend_each_on_its_own_channels_and_cost_no_parameter():
    """Against torch's own attention over four heads of eight channels."""
    attention = trained(Attention(32, num_heads=4))
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        qkv = attention.qkv(attention.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(
            attention(x), x + attention.out(mixed.transpose(1, 2).reshape(x.shape))
        )
    assert count(num_heads=8) == count()
    assert [
        module.num_heads for module in small(num_heads=4).modules() if isinstance(module, Attention)
    ] == [4] * 4


def test_a_second_half_of_channels_comes_out_behind_the_first():
    """With patches too: the two halves are images of their own."""
    network = trained(small(out_channels=6))
    xt, t = torch.randn(2, 3, 32, 32), torch.tensor([5, 500])
    both = network(xt, t)
    assert both.shape == (2, 6, 32, 32)
    alone = small()
    alone.load_state_dict(
        {
            name: value[:12] if name.startswith("conv_out") else value
            for name, value in network.state_dict().items()
        }
    )
    torch.testing.assert_close(both[:, :3], alone.eval()(xt, t))


def test_adaptive_norm_scales_and_shifts_after_the_second_norm():
    block = trained(ResidualBlock(32, 64, 16, dropout=0.0, adaptive_norm=True))
    x, embedding = torch.randn(2, 32, 8, 8), torch.randn(2, 16)
    with torch.no_grad():
        scale, shift = block.project(embedding)[:, :, None, None].chunk(2, dim=1)
        h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
        torch.testing.assert_close(block(x, embedding), block.conv2(F.silu(h)) + block.shortcut(x))
    widths = [
        module.conv1.out_channels
        for module in small().modules()
        if isinstance(module, ResidualBlock)
    ]
    assert count(**small().config | {"adaptive_norm": True}) - count(**small().config) == sum(
        65 * width for width in widths
    )  # time_emb_dim 64, and a bias


def test_the_time_embedding_is_sines_then_cosines_of_falling_frequencies():
    embedding = SinusoidalEmbedding(8)(torch.tensor([0, 7, 999]))
    for row, t in zip(embedding, (0, 7, 999)):
        angles = [t * 10000 ** (-i / 4) for i in range(4)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [False, True])
def test_the_residual_block_is_the_designs(attention):
    """GroupNorm - SiLU - conv, plus the projected embedding, GroupNorm - SiLU - conv, shortcut, then attention."""
    block = trained(ResidualBlock(32, 64, 16, dropout=0.5, num_heads=1 if attention else 0))
    x, embedding = torch.randn(2, 32, 8, 8), torch.randn(2, 16)
    with torch.no_grad():
        h = F.conv2d(
            F.silu(F.group_norm(x, 32, block.norm1.weight, block.norm1.bias)),
            block.conv1.weight,
            block.conv1.bias,
            padding=1,
        )
        h = h + F.linear(embedding, block.project.weight, block.project.bias).view(2, 64, 1, 1)
        h = F.conv2d(
            F.silu(F.group_norm(h, 32, block.norm2.weight, block.norm2.bias)),
            block.conv2.weight,
            block.conv2.bias,
            padding=1,
        )
        h = h + F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
        torch.testing.assert_close(block(x, embedding), block.attention(h) if attention else h)
        block.train()
        assert not torch.allclose(block(x, embedding), block(x, embedding))  # dropout


def test_upsampling_repeats_pixels():
    upsample = Upsample(1)
    torch.nn.init.dirac_(upsample.conv.weight)
    torch.nn.init.zeros_(upsample.conv.bias)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert torch.equal(upsample(x, None), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_config_builds_the_same_network():
    network = small(num_classes=10, dropout=0.3, num_heads=2, adaptive_norm=True, out_channels=6)
    twin = UNet(**network.config)
    twin.load_state_dict(network.state_dict())
    assert twin.config == network.config
