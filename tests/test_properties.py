"""Any bytes and any flags: the answer is success or one line. What is loaded from a checkpoint is what was saved.

Hypothesis makes the inputs, the same ones at every run: whole files with some bytes changed, cut out or put in, and
bytes that were never a file.
"""

import zlib

import pytest
import torch
from conftest import read_constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_input import png_rows
from test_dataprocess import small_mnist
from test_metrics import SEEN, chunk

import train_eval
from dataprocess import FILES, load_data
from diffusion import DDPM
from process import make_betas
from support.checkpoint import load_checkpoint, save_checkpoint
from support.png import read_folder
from unet import UNet

CONSTANTS = read_constants({"device": "cpu"})


def few(n):
    """So many examples, the same ones at every run."""
    return settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def answered(call, *arguments):
    """What a call returns, or None if it refuses in one line. Any other error goes on."""
    try:
        return call(*arguments)
    except ValueError as error:
        assert type(error) is ValueError and len(str(error).splitlines()) == 1, error
        return None


@st.composite
def damaged(draw, whole):
    """Whole files, mostly with a few changes; sometimes other bytes."""
    data = bytearray(draw(whole))
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        change = draw(st.sampled_from(["flip", "cut", "remove", "insert", "repeat"]))
        if change == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[at:]
        elif change == "remove":
            del data[at : at + draw(st.integers(1, 9))]
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif change == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 99))]
    return bytes(data)


MNIST = small_mnist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples, which write over the same file."""
    return tmp_path_factory.mktemp("folder")


@few(80)
@given(file=st.sampled_from(FILES), data=st.data())
def test_any_bytes_in_place_of_a_data_file(folder, file, data):
    content = data.draw(damaged(st.just(MNIST[file])))
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, whole in (MNIST | {file: content}).items():
        (raw / name).write_bytes(whole)
    splits = answered(load_data, "mnist", folder)
    if splits is not None:  # a change of pixels or labels alone, which no checksum guards
        assert len(content) == len(MNIST[file])
        assert all(
            len(split.images) == len(split.labels) and split.labels.max() < 10 for split in splits
        )


@few(100)
@given(data=damaged(st.sampled_from([data for data, _ in SEEN.values()] + [png_rows(8, 8)])))
def test_any_bytes_in_place_of_a_png(folder, data):
    (folder / "a.png").write_bytes(data)
    found = answered(read_folder, folder)
    assert found is None or found[0].dtype == torch.uint8 and found[0].shape[:2] == (1, 3)


@few(100)
@given(
    size=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    bits=st.sampled_from([1, 2, 4, 8, 16]),
    colour=st.sampled_from([0, 2, 3, 4, 6]),
    interlaced=st.integers(0, 1),
    rest=st.integers(-9, 9),
)
def test_a_png_is_read_if_and_only_if_all_its_pixels_are_there(
    folder, size, bits, colour, interlaced, rest
):
    """With checksums that are right, and a number of bytes that is about right."""
    width, height = size
    depth = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    needed = 0
    for x, y, dx, dy in PASSES if interlaced else ((0, 0, 1, 1),):
        row = len(range(x, width, dx))
        needed += len(range(y, height, dy)) * (1 + (row * depth + 7) // 8) if row else 0
    header = b"".join(value.to_bytes(4, "big") for value in size) + bytes(
        [bits, colour, 0, 0, interlaced]
    )
    palette = chunk(b"PLTE", bytes(3 * 256)) if colour == 3 else b""
    pixels = zlib.compress(bytes(max(0, needed + rest)))
    (folder / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + palette
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )
    found = answered(read_folder, folder)
    legal = (
        bits in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}[colour]
    )
    whole = (
        legal and needed and rest >= 0 and colour in (0, 2, 3)
    )  # with colour 4 and 6 zeros are transparent
    assert (found is not None) == bool(whole)
    assert found is None or found[0].shape == (1, 3, height, width)


PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of 40 kB: its bytes and what is in it."""
    path = tmp_path_factory.mktemp("whole") / "model.pt"
    torch.manual_seed(0)
    network = UNet(
        image_size=8,
        channels=1,
        base_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        time_emb_dim=4,
        attention_resolutions=(),
    )
    DDPM(network, image_size=8, channels=1, num_timesteps=10).save(path, epoch=3)
    saved = load_checkpoint(path, ["weights"])
    saved["weights"] = {
        name: torch.randn(value.shape)[..., :2].clone() for name, value in saved["weights"].items()
    }
    save_checkpoint(path, saved)
    return path.read_bytes(), saved


def same(a, b):
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        )
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@few(100)
@given(data=st.data())
def test_a_checkpoint_with_any_change_is_refused_or_holds_the_same(folder, checkpoint, data):
    whole, saved = checkpoint
    path = folder / "changed.pt"
    path.write_bytes(data.draw(damaged(st.just(whole))))
    found = answered(load_checkpoint, path, ["network", "weights"])
    assert found is None or same(found, saved)
    assert answered(DDPM.load, path, "cpu") is None  # its weights have other shapes


@pytest.mark.parametrize("name", ["time_embedding.1.weight", "conv_out.bias"])
def test_a_bit_flipped_in_a_weight_is_refused(folder, checkpoint, name):
    """torch.load does not look at the checksums of a zip archive, so it would load another number."""
    whole, saved = checkpoint
    weight = saved["weights"][f"network.{name}"].numpy().tobytes()
    assert whole.count(weight) == 1
    path = folder / "flipped.pt"
    for bit in range(8):
        changed = bytearray(whole)
        changed[whole.index(weight)] ^= 1 << bit
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="flipped.pt: .*damaged"):
            load_checkpoint(path, ["weights"])


FLAGS = st.one_of(
    st.sampled_from([f"--{name}" for name in CONSTANTS]),
    st.text(max_size=8),
    st.sampled_from([f"--{name}=" for name in CONSTANTS]).flatmap(
        lambda flag: st.one_of(
            st.integers(),
            st.floats(),
            st.text(max_size=8),
            st.just("1,2"),
            st.sampled_from(["none", "cpu", "mse", "v", "cosine", "True"]),
        ).map(lambda value: f"{flag}{value}")
    ),
)


@few(40)
@given(flags=st.lists(FLAGS.filter(lambda flag: flag not in ("-h", "--help")), max_size=4))
def test_any_flags(capsys, flags):
    """The kinds of the flags; what does not fit together is found later, at the start of a run."""
    capsys.readouterr()
    try:
        config, names = train_eval.configure(["--device=cpu", *flags])
    except SystemExit as exit_:
        out, line = capsys.readouterr()
        assert (
            exit_.code == 2
            and len(line.splitlines()) == 1
            and line.startswith("train_eval.py: error: ")
        )
    else:
        assert names <= vars(config).keys() == CONSTANTS.keys()
        answered(build, config)


def build(config):
    """What a run checks before it builds its network, which may be large."""
    train_eval.configurator.check_together(config)
    make_betas(config.beta_schedule, min(config.num_timesteps, 1000), config.zero_terminal_snr)
    with torch.device("meta"):
        UNet(
            **{
                name: vars(config)[name]
                for name in (
                    "image_size",
                    "channels",
                    "attention_resolutions",
                    "dropout",
                    "num_heads",
                    "patch_size",
                )
            },
            base_channels=32,
        )
