"""Whatever a person gives that does not fit is answered in one line, and every folder stays as it was.

One row is one bad input: a call, and words of its answer, the name and the value at least. `tests/test_configurator.py`
has the kinds of all constants, `tests/test_dataprocess.py` the damaged data files, `tests/test_metrics.py` the PNGs.
"""

import functools
import math
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_constants
from PIL import Image
from test_dataprocess import small_mnist, write
from test_metrics import chunk, png

import metrics
import train_eval
from dataprocess import FILES, Images, load_data
from diffusion import DDPM
from ema import EMA
from process import GaussianProcess, make_betas
from support import configurator
from support.checkpoint import save_checkpoint
from support.png import read_folder
from timesteps import ImportanceSampler, LogitNormalSampler, UniformSampler, make_timesteps
from unet import UNet

HUGE, NAN, INF = 2**70, math.nan, math.inf
X = torch.zeros(2, 1, 8, 8)
T = torch.tensor([0, 9])
BYTES = torch.zeros(5, 8, 8, dtype=torch.uint8)
LABELS = torch.arange(5)
FEATURES = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))


SCRIPT = Path(train_eval.__file__).read_text(encoding="utf-8")
TINY = (
    "--train_size=2 --test_size=1 --base_channels=32 --channel_mult=1 --num_res_blocks=1 --time_emb_dim=8 "
    "--patch_size=8 --attention_resolutions=none --num_timesteps=20 --target_references=0 --epochs=1"
).split()


class Network(torch.nn.Module):
    """The least conditional network; what it says can be chosen."""

    def __init__(self, say=lambda xt: xt, num_classes=3):
        super().__init__()
        self.say, self.num_classes = say, num_classes
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, xt, t, y=None):
        return self.say(xt)


def ddpm(say=lambda xt: xt, **settings):
    return DDPM(Network(say), **dict(image_size=8, channels=1, num_timesteps=10) | settings)


@functools.cache
def model():
    return ddpm()


@functools.cache
def unet():
    return UNet(
        image_size=8,
        channels=1,
        base_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        time_emb_dim=8,
        attention_resolutions=(),
        num_classes=3,
    )


@functools.cache
def classifier():
    return metrics.Classifier(10)


@functools.cache
def process():
    return GaussianProcess(10)


def images(**settings):
    return Images(**dict(name="mnist", images=BYTES, labels=LABELS) | settings)


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    return tmp_path_factory.mktemp("nothing")


@pytest.fixture
def empty(nothing, monkeypatch):
    """The present folder, with nothing in it: one for all rows, since making one takes longer than a row."""
    monkeypatch.chdir(nothing)
    return nothing


def with_value(x, value):
    """A copy of a tensor with one other value."""
    return x.flatten().index_fill(0, torch.tensor([3]), value).view_as(x)


def snapshot(folder):
    """Names and bytes of all that is in a folder."""
    return {
        path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")
    }


def named(rows):
    """Rows as pytest's parameters, named by their words."""
    return [pytest.param(*row, id=f"{i}-{str(row[-1])[:40]}") for i, row in enumerate(rows)]


def settings(make, **values):
    """A row for each value of each argument of `make`; the answer has the name and, unless it is long, the value."""
    rows = []
    for name, bad in values.items():
        for value in bad:
            of_many = (
                name in ("y", "index") or isinstance(value, torch.Tensor) or len(repr(value)) > 60
            )
            text = (
                f"{name} " if of_many else f"{name} {value!r}"
            )  # of many the dtype, the shape or the range
            rows.append((lambda make=make, name=name, value=value: make(**{name: value}), text))
    return rows


NO_WHOLE = (True, None, "3", 2.0, NAN, [3], -1, HUGE)
NO_NUMBER = (True, None, "1", NAN, INF, -INF, [1.0], 10**400)
NO_SWITCH = (1, 0, None, "no", "True")
NO_CHOICE = ("sqrt", None, 1, ["linear"], True)

ARGUMENTS = [
    *settings(
        GaussianProcess,
        num_timesteps=(0, *NO_WHOLE),
        beta_schedule=NO_CHOICE,
        prediction=NO_CHOICE,
        variance=NO_CHOICE,
        timestep_spacing=NO_CHOICE,
        zero_terminal_snr=NO_SWITCH,
    ),
    *settings(
        ddpm,
        image_size=(0, *NO_WHOLE),
        channels=(0, *NO_WHOLE),
        loss=NO_CHOICE,
        sampler=NO_CHOICE,
        min_snr_gamma=(-1, *NO_NUMBER),
        guidance_scale=NO_NUMBER,
        sample_steps=(0, 11, True, "3", 2.0, HUGE),
        num_timesteps=(0, HUGE, 2.5),
        zero_terminal_snr=NO_SWITCH,
    ),
    *settings(DDPM, network=("unet", 3, dict(), torch.zeros(2), UNet)),
    *settings(
        lambda num_classes: DDPM(Network(num_classes=num_classes)),
        num_classes=(0, -1, True, "ten", 2.5, [10]),
    ),
    *settings(
        UNet,
        image_size=(0, *NO_WHOLE),
        channels=(0, *NO_WHOLE),
        base_channels=(0, 33, *NO_WHOLE),
        num_res_blocks=(0, *NO_WHOLE),
        time_emb_dim=(0, *NO_WHOLE),
        patch_size=(0, *NO_WHOLE),
        num_heads=(0, *NO_WHOLE),
        out_channels=(0, True, "3", 2.0, [3], -1, HUGE),
        adaptive_norm=NO_SWITCH,
        num_classes=(0, -1, True, 2.5, "10", [10], HUGE),
        dropout=(1, 1.0, -0.1, 2, *NO_NUMBER),
        channel_mult=(None, 2, "12", {1}, (), torch.ones(2)),
        attention_resolutions=(None, 8, "8", {8}, torch.ones(2)),
    ),
    *[
        (lambda name=name, value=value: UNet(**{name: (value,)}), f"{name} {value!r}")
        for name in ("channel_mult", "attention_resolutions")
        for value in (*NO_WHOLE, 8.0, 0, (8,))
    ],
    *settings(EMA, module=(None, 3, "unet", [torch.zeros(1)], torch.zeros(2))),
    *settings(
        lambda **options: make_timesteps("uniform", **dict(num_timesteps=5) | options),
        num_timesteps=(0, *NO_WHOLE),
        device=("abacus", "", 1.5, [1]),
    ),
    *settings(
        lambda timestep_sampling: make_timesteps(timestep_sampling, 5),
        timestep_sampling=("normal", None, 3, True, ["uniform"], LABELS),
    ),
    *settings(
        lambda timestep_std: make_timesteps("logit-normal", 5, timestep_std),
        timestep_std=(-0.5, *NO_NUMBER),
    ),
    *[
        row
        for sampler in (UniformSampler(5), LogitNormalSampler(5), ImportanceSampler(5))
        for row in settings(sampler.sample, n=NO_WHOLE)
    ],
    *settings(
        lambda dataset: load_data(dataset, "nowhere"),
        dataset=("cifar", None, 3, True, ["mnist"], LABELS),
    ),
    *settings(
        lambda **options: load_data("glyphs", **dict(train_size=1, test_size=1) | options),
        data_dir=(None, 3, True, ["data"], b"data", "a\0b"),
        image_size=(0, *NO_WHOLE),
        channels=(0, *NO_WHOLE),
        train_size=(0, *NO_WHOLE),
        test_size=(0, *NO_WHOLE),
        augment=NO_SWITCH,
        seed=(-1, 1.5, True, None, "0"),
        device=("abacus", 2.5),
    ),
    *settings(
        images,
        name=(None, 3),
        images=(None, [[0]], X, BYTES[0], BYTES.long(), BYTES.numpy()),
        labels=(None, [0] * 5, LABELS.int(), LABELS[:4], LABELS - 1, LABELS[:, None], 3),
        channels=(0, *NO_WHOLE),
        augment=NO_SWITCH,
        seed=(-1, 1.5, True, None, "0"),
        device=("abacus", 2.5),
    ),
    *settings(
        lambda index: images().batch(index),
        index=(
            None,
            "0",
            1.5,
            [0.5],
            [5],
            [-1],
            [True],
            [None],
            [[0]],
            [HUGE],
            3,
            LABELS + 1,
            LABELS.float(),
        ),
    ),
    *settings(
        lambda **options: list(images().epoch(**dict(batch_size=2, epoch=0) | options)),
        batch_size=(0, *NO_WHOLE),
        epoch=(True, None, "3", 2.0, NAN, -1),
        start=NO_WHOLE,
    ),
    *settings(metrics.Classifier, num_classes=(0, *NO_WHOLE)),
    *settings(
        lambda **options: metrics.train_classifier(**dict(images=BYTES, labels=LABELS) | options),
        images=(None, [[0]], BYTES.float(), BYTES[0], BYTES[:0], BYTES[:, :0]),
        labels=(None, [0], LABELS[:4], LABELS.float(), LABELS - 1, LABELS[:, None]),
        seed=(-1, True, "0", 1.5, HUGE),
        epochs=(0, *NO_WHOLE),
        device=("abacus", 2.5),
    ),
    *settings(
        lambda **options: metrics.load_classifier(
            **dict(dataset="glyphs", images=BYTES, labels=LABELS, folder="x") | options
        ),
        dataset=(None, 3, ["mnist"]),
        images=(None, BYTES.float()),
        labels=(None, LABELS[:4]),
        folder=(None, 3, "a\0b"),
        device=("abacus",),
    ),
    *settings(
        lambda evaluate: read_folder(evaluate), evaluate=(None, 3, True, b"x", "a\0b", ["x"])
    ),
    *settings(
        lambda **options: classifier().read(**dict(images=BYTES) | options),
        images=(None, X, BYTES[:0], "x"),
        batch_size=(0, *NO_WHOLE),
    ),
    *settings(
        lambda labels: classifier().accuracy(BYTES, labels),
        labels=(None, 3, LABELS[:2], LABELS.float()),
    ),
    *settings(
        lambda **options: metrics.frechet_distance(**dict(a=FEATURES, b=FEATURES) | options),
        a=(
            None,
            3,
            [[1.0]],
            FEATURES.long(),
            FEATURES[0],
            with_value(FEATURES, NAN),
            FEATURES[:, :0],
        ),
        b=(None, FEATURES[:, :2], with_value(FEATURES, INF), FEATURES.numpy()),
    ),
    *settings(
        lambda **options: metrics.precision_recall(
            **dict(samples=FEATURES, real=FEATURES) | options
        ),
        samples=(None, FEATURES.long(), FEATURES[0], with_value(FEATURES, NAN)),
        real=(None, FEATURES[:, :2], with_value(FEATURES, INF)),
        k=(0, *NO_WHOLE),
    ),
    *settings(
        lambda **options: metrics.nearest(**dict(images=BYTES, others=BYTES) | options),
        images=(None, X, BYTES[:0], BYTES[0]),
        others=(None, X, BYTES[:0], BYTES[0]),
    ),
    *settings(
        lambda **options: metrics.measure(
            **dict(classifier=classifier(), samples=BYTES, train=BYTES, test=BYTES) | options
        ),
        samples=(None, X, [0], BYTES[0]),
        train=(None, X),
        test=(None, X),
        labels=(3, LABELS[:2], LABELS.float()),
        seed=(-1, True, "0", 1.5),
    ),
    *settings(
        lambda **options: model().sample(**dict(n=2) | options),
        n=(0, *NO_WHOLE),
        steps=(0, 11, True, "3", 2.0),
        sampler=("euler", 3, True, ["ddpm"]),
        eta=(-0.1, 1.5, True, "0", NAN, INF),
        batch_size=(0, *NO_WHOLE),
        guidance_scale=(True, "1", NAN, INF, [1.0], 10**400),
        seed=(-1, HUGE, True, "0", 1.5, [0]),
        xT=(3, [0.0], X.long(), X[:1], X[0], with_value(X, NAN), with_value(X, INF)),
        progress=NO_SWITCH,
        start=(-1, 10, True, "", "3", 2.0, HUGE),
    ),
    *[
        (lambda call=call, y=y: call(y), "y ")
        for y in (
            -1,
            3,
            True,
            1.0,
            "3",
            [0, None],
            [0, 3],
            [0, 1, 2],
            [],
            HUGE,
            {0, 1},
            [[0, 1]],
            torch.tensor([0, NAN]),
        )
        for call in (
            lambda y: model().sample(2, y),
            lambda y: model().interpolate(X, X, [0.5], 5, y),
            lambda y: model().bits_per_dim(X, y),
        )
    ],
    *settings(
        lambda **options: model().predict(**dict(xt=X, t=T) | options),
        xt=(None, 3, [0.0], X.byte(), X[0], X[..., :4], with_value(X, NAN), X.numpy()),
        t=(
            None,
            3,
            [0, 9],
            T + 1,
            T - 1,
            T * HUGE.bit_length(),
            T.int(),
            T.float(),
            T[:1],
            T[:, None],
        ),
        y=(-1, 4, [0, 4], "1", 1.5, True, X),
        guidance_scale=(None, True, "1", NAN, INF, [1.0], 2.0),
    ),
    *settings(
        lambda **options: model().interpolate(**dict(x0=X, other=X, weights=[0.5], t=5) | options),
        x0=(None, X.byte(), X[0], with_value(X, NAN)),
        other=(None, X.byte(), X[:1], with_value(X, INF)),
        weights=(None, 0.5, "01", ["0"], [True], [NAN], [HUGE], {0.5}, [[0.5]], []),
        t=(-1, 10, True, None, "3", 2.0, T, HUGE),
        seed=(-1, True, "0"),
    ),
    *settings(
        lambda **options: model().bits_per_dim(**dict(x0=X) | options),
        x0=(
            None,
            3,
            [0.0],
            X.byte(),
            X[:0],
            X[0],
            X[..., :4],
            with_value(X, NAN),
            X + 1.01,
            X.numpy(),
        ),
        terms=(0, 1, 11, True, "3", 2.0),
        batch_size=(0, *NO_WHOLE),
        progress=NO_SWITCH,
        seed=(-1, True, "0"),
    ),
    *settings(
        lambda **options: process().q_sample(**dict(x0=X, t=T, eps=X) | options),
        x0=(None, X.byte(), X[0], with_value(X, NAN)),
        eps=(None, X.long(), X[:1], with_value(X, NAN)),
        t=(None, 3, [0, 9], T + 1, T - 2, T.int(), T[:1], T[:, None]),
    ),
    *settings(
        lambda **options: process().q_posterior(**dict(x0=X, xt=X, t=T) | options),
        t=(None, T + 1, T.float()),
    ),
    *settings(
        lambda **options: process().step(**dict(x0=X, eps=X, t=T, s=T - 1, noise=X) | options),
        eta=(-1, 1.5, *NO_NUMBER),
        t=(T + 1, None),
    ),
    *settings(
        lambda candidates: process().posterior_mean(X, T, candidates),
        candidates=(None, [0.0], X.long(), X[0], X[..., :4]),
    ),
    *settings(
        lambda **options: process().timesteps(**dict(steps=3) | options),
        steps=(0, 11, *NO_WHOLE),
        start=(-1, 10, True, "3", 2.0),
    ),
    (lambda: process().timesteps(3, spacing="even"), "timestep_spacing 'even'"),
    *settings(
        lambda **options: model()(**dict(x0=X) | options),
        x0=(None, 3, [0.0], X.byte(), X[0], X[..., :4], with_value(X, NAN)),
        y=(-1, 4, [0, 4], [0], "1", 1.5, True, {1}),
        t=(3, [0, 9], T + 1, T - 1, T.int(), T[:1]),
        eps=(3, X.long(), X[:1], with_value(X, NAN)),
        reduction=("sum", None, 1, ["mean"]),
        drop=(3, "no", [True, False], T, T[:1] > 0),
        references=(5, "no", X, (X,), (X, T, T), (X[0], None)),
    ),
    (lambda: model()(X, references=(None, None)), "references None"),
    *[
        (lambda labels=labels: model()(X, [0, 1], references=(X, labels)), "labels of references ")
        for labels in (3, [0, 1], T[:1], T.float(), X)
    ],
    *settings(
        lambda **options: unet()(**dict(xt=X, t=T) | options),
        xt=(None, 3, X.double(), X.byte(), X[0], X[..., :4]),
        t=(None, 3, [0, 9], T.float(), T.int(), T[:1]),
        y=(0, [0, 1], T[:1], T.float(), torch.tensor([0, 4]), torch.tensor([-1, 0])),
    ),
    *[
        (lambda say=say: ddpm(say).sample(2, steps=1), "network: its output")
        for say in (
            lambda xt: xt[:, :, :4],
            lambda xt: xt[:1],
            lambda xt: xt.flatten(),
            lambda xt: None,
            lambda xt: (xt, xt),
            lambda xt: xt.long(),
            lambda xt: xt.expand(-1, 2, -1, -1),
            lambda xt: xt.tolist(),
        )
    ],
    *[
        (lambda values=values: make_betas(*values), word)
        for values, word in (
            (("linear", 0), "num_timesteps 0"),
            (("linear", HUGE), "num_timesteps"),
            ((None, 5), "beta_schedule None"),
        )
    ],
    (lambda: DDPM.load("nowhere.pt", device="abacus"), "device 'abacus'"),
]


@pytest.mark.parametrize("call, words", named(ARGUMENTS))
def test_an_argument_that_does_not_fit_is_one_line_with_its_name_and_value(call, words, empty):
    with pytest.raises(ValueError) as error:
        call()
    line = str(error.value)
    assert line.startswith(words) and ("expected" in line or "needs labels" in line), line
    assert "\n" not in line and len(line) < 400 and not snapshot(empty)


def test_numpy_numbers_are_taken_where_pythons_are():
    three, half = np.int32(3), np.float32(0.5)
    assert images(seed=np.int64(2)).batch(np.array([1, 2]))[1].tolist() == [1, 2]
    assert len(list(images().epoch(three, np.int64(0)))) == 2
    assert ddpm(num_timesteps=np.int64(10)).sample(
        three, np.int64(1), steps=three, eta=half
    ).shape == (3, 1, 8, 8)
    assert model().interpolate(X, X, np.array([0.5], np.float32), np.int64(5)).shape == (
        1,
        2,
        1,
        8,
        8,
    )
    assert model().bits_per_dim(X.double(), terms=three, batch_size=np.uint8(1)).total > 0
    assert make_timesteps("logit-normal", three, half).sample(three)[0].shape == (3,)
    assert (
        UNet(
            image_size=np.int64(8),
            base_channels=32,
            channel_mult=[np.int64(1)],
            dropout=half,
            attention_resolutions=[],
            time_emb_dim=np.int16(8),
        ).image_shape[1]
        == 8
    )
    assert EMA(unet(), half, three, three).decay == half


# The script


def refused(capsys, run):
    """The one line with which the script refuses what `run` does, and nothing else."""
    with pytest.raises(SystemExit) as exit_:
        run()
    said, line = capsys.readouterr()
    assert exit_.value.code == 2 and line.startswith("train_eval.py: error: ") and not said, line
    assert line.endswith("\n") and len(line.splitlines()) == 1, line
    return line


CONSTANTS = {name: value for name, (_, value, _) in read_constants({"device": "cpu"}).items()}


def bad_flags():
    """(flag, value) for every constant, by its kind."""
    for name in CONSTANTS:
        if name in configurator.WHOLE:
            low, high = configurator.WHOLE[name]
            bad = ("", "x", "1.5", "nan", "True", "1 2", "3\n4", low - 1, high + 1, HUGE, -HUGE)
        elif name in configurator.NUMBERS:
            low, high = configurator.NUMBERS[name]
            bad = (
                "",
                "x",
                "nan",
                "inf",
                "-inf",
                "1,2",
                low - 0.5,
                "1e999",
                *([high + 0.5] if high < INF else []),
            )
        elif name in configurator.TUPLES:
            bad = ("x", "1,", "1,,2", "1.5", "(1)", "-3", "0", HUGE)
        elif name in configurator.SWITCHES:
            bad = ("yes", "1")
        elif name in configurator.TEXTS:
            bad = ("", "a\0b")
        else:
            bad = ("", "sqrt\nx", "Linear ") if name in train_eval.CHOICES else ("",)
        yield from ((name, str(value)) for value in bad)


@pytest.mark.parametrize("name, value", named(bad_flags()))
def test_every_flag_refuses_what_it_cannot_be(name, value, capsys, empty):
    device = [] if name == "device" else ["--device=cpu"]
    line = refused(
        capsys, lambda: train_eval.main([*device, "--dataset=glyphs", f"--{name}={value}"])
    )
    assert name in line and (
        value.split("\n")[0][:30] in line
        or "\0" in value
        or name in configurator.NUMBERS
        or name == "ema_decay"
    ), line
    assert not snapshot(empty)


@pytest.mark.parametrize("flag", ["a\nb", "--a\nb", "--epochs\n", "-\r\n-"])
def test_a_flag_with_a_line_break_is_one_line_too(flag, capsys, empty):
    assert "unknown" in refused(capsys, lambda: train_eval.main([flag])) and not snapshot(empty)


def bad_edits():
    """(constant, value) of an edited script."""
    for name in CONSTANTS:
        known = name in configurator.SWITCHES | configurator.TEXTS | train_eval.CHOICES.keys() | {
            "evaluate"
        }
        yield from ((name, value) for value in (None, [1], *((3,) if known else ("x", True))))


@pytest.mark.parametrize("name, value", named(bad_edits()))
def test_every_constant_refuses_what_it_cannot_be(name, value, capsys, tmp_path):
    script = tmp_path / "train_eval.py"
    text = SCRIPT.replace("# end of constants", f"{name} = {value!r}\n# end of constants", 1)
    script.write_text(text, encoding="utf-8")
    before = snapshot(tmp_path)
    line = refused(
        capsys, lambda: configurator.configure(script, vars(train_eval), train_eval.CHOICES, [])
    )
    assert f"{name} {value!r}: expected" in line and snapshot(tmp_path) == before


# Files


def png_rows(rows, height, interlaced=0, width=8):
    """A PNG of 8-bit grey whose header says `height` rows and whose pixels, with all checksums right, are fewer."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)
    pixels = zlib.compress(b"".join(b"\0" + bytes([200] * width) for _ in range(rows)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


GREY, WIDER = png(8, 0, bytes(8)), png(8, 0, bytes(9))
FOLDERS = {
    "none": {},
    "only others": {"a.txt": b"x", "b.jpg": b"y"},
    "empty file": {"a.png": b""},
    "text": {"a.png": b"x"},
    "cut": {"a.png": GREY[:-20]},
    "mixed sizes": {"a.png": GREY, "b.png": WIDER},
    "no size": {"a.png": png_rows(0, 0)},
    "mixed in folders": {"a.png": GREY, "x/b.png": WIDER},
    "second is cut": {"a.png": GREY, "b.png": GREY[:50]},
    "transparent": {"a.png": png(8, 6, [1, 2, 3, 0])},
    "key": {"a.png": png(8, 0, [3, 5], (b"tRNS", b"\0\5"))},
    "few rows": {"a.png": png_rows(3, 8)},
    "no row": {"a.png": png_rows(0, 8)},
    "one row less": {"a.png": png_rows(7, 8)},
    "few rows, interlaced": {"a.png": png_rows(3, 8, interlaced=1)},
    "line\nbreak": {"a\nb.png": b"x"},
    "bad filter": {"a.png": png(8, 0, bytes(8)).replace(b"IHDR", b"IHDX")},
}


@pytest.mark.parametrize("kind", [*FOLDERS, "missing", "a file", "animated"])
def test_a_folder_of_pngs_that_cannot_be_measured(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind != "missing":
        (tmp_path / "pngs").mkdir() if kind != "a file" else (tmp_path / "pngs").write_bytes(GREY)
    if kind == "animated":
        frames = [Image.new("L", (3, 1), v) for v in (0, 9)]
        frames[0].save(tmp_path / "pngs/a.png", save_all=True, append_images=frames[1:])
    for name, data in FOLDERS.get(kind, {}).items():
        (tmp_path / "pngs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pngs" / name).write_bytes(data)
    before = snapshot(tmp_path)
    line = refused(
        capsys, lambda: train_eval.main("--evaluate pngs --device cpu --dataset glyphs".split())
    )
    assert "pngs" in line and snapshot(tmp_path) == before


def test_a_png_of_all_its_rows_is_read_whatever_its_order(tmp_path):
    """So that the count of rows above refuses nothing whole."""
    for size in ((1, 1), (3, 2), (5, 5), (8, 8), (9, 1)):
        passes = (
            (0, 0, 8, 8),
            (4, 0, 8, 8),
            (0, 4, 4, 8),
            (2, 0, 4, 4),
            (0, 2, 2, 4),
            (1, 0, 2, 2),
            (0, 1, 1, 2),
        )
        width, height = size
        rows = [
            range(x, width, dx)
            for x, y, dx, dy in passes
            for _ in range(y, height, dy)
            if x < width
        ]
        pixels = zlib.compress(b"".join(b"\0" + bytes([7] * len(row)) for row in rows))
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
        data = (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", pixels)
            + chunk(b"IEND", b"")
        )
        (tmp_path / "a.png").write_bytes(data)
        (image,), _ = read_folder(tmp_path)
        assert image.shape == (3, height, width) and (image == 7).all()


IDX = small_mnist()
DATA = {
    "cut": lambda d: d[:-1],
    "longer": lambda d: d + b"x",
    "empty": lambda d: b"",
    "magic": lambda d: b"\1" + d[1:],
    "count": lambda d: d[:4] + struct.pack(">i", 7) + d[8:],
    "text": lambda d: b"<html>",
    "header": lambda d: d[:7],
    "negative count": lambda d: d[:4] + struct.pack(">i", -5) + d[8:],
    "folder": None,
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("file", FILES)
def test_data_files_that_are_damaged(kind, file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = write(tmp_path, IDX | ({file: DATA[kind](IDX[file])} if DATA[kind] else {}))
    if kind == "folder":
        (raw / file).unlink()
        (raw / file).mkdir()
    before = snapshot(tmp_path)
    flags = ["--device=cpu", "--dataset=mnist", f"--data_dir={tmp_path}", *TINY]
    line = refused(capsys, lambda: train_eval.main(flags))
    assert file in line and "expected" in line and snapshot(tmp_path) == before


@pytest.mark.parametrize("file", FILES[1::2])
def test_a_label_ten(file, tmp_path):
    write(tmp_path, IDX | {file: IDX[file][:-1] + b"\x0a"})
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"{file}: has the label 10, expected 0 to 9$"):
        load_data("mnist", tmp_path)
    assert snapshot(tmp_path) == before


# Checkpoints


@functools.cache
def saved_run(folder):
    """The states in best_model.pt and last.pt of a run that was stopped before its first step."""
    config, _ = train_eval.configure(
        [*TINY, "--device=cpu", "--dataset=glyphs", f"--save_dir={folder}"]
    )
    run = train_eval.prepare(config)
    train_eval.save_best(run, 1.0)
    train_eval.save_last(config, run.state, run.progress)
    return {
        name: torch.load(folder / name, weights_only=True) for name in ("best_model.pt", "last.pt")
    }


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run"))


def first_weight(weights, value):
    return {**weights, next(iter(weights)): value}


BYTES_OF = {  # what else the file may be
    "missing": None,
    "folder": None,
    "empty": lambda d: b"",
    "cut short": lambda d: d[: len(d) // 2],
    "cut by a byte": lambda d: d[:-1],
    "a byte": lambda d: d[:1],
    "text": lambda d: b"no checkpoint\n",
    "zeros": lambda d: bytes(5000),
    "pickle": lambda d: pickle.dumps({"weights": {}}),
    "picture": lambda d: GREY,
    "header alone": lambda d: d[:400],
}
BEST = {  # another state in best_model.pt
    "list": lambda s: [s],
    "tensor": lambda s: torch.ones(3),
    "nothing": lambda s: {},
    "none": lambda s: None,
    "no weights": lambda s: {k: v for k, v in s.items() if k != "weights"},
    "weights of another shape": lambda s: (
        s | {"weights": first_weight(s["weights"], torch.ones(7))}
    ),
    "one weight less": lambda s: s | {"weights": dict(list(s["weights"].items())[1:])},
    "one weight more": lambda s: s | {"weights": s["weights"] | {"network.x": torch.ones(1)}},
    "weights that are none": lambda s: s | {"weights": None},
    "list of weights": lambda s: s | {"weights": [1]},
    "weights without names": lambda s: s | {"weights": {0: torch.ones(1)}},
    "weight of text": lambda s: s | {"weights": first_weight(s["weights"], "x")},
    "network of text": lambda s: s | {"network": "UNet"},
    "no network": lambda s: s | {"network": None},
    "unknown setting": lambda s: s | {"diffusion": s["diffusion"] | {"x": 1}},
    "bad setting": lambda s: s | {"diffusion": s["diffusion"] | {"loss": "huber"}},
    "bad kind": lambda s: s | {"diffusion": s["diffusion"] | {"num_timesteps": "10"}},
    "settings of text": lambda s: s | {"diffusion": "x"},
    "network of odd width": lambda s: s | {"network": s["network"] | {"base_channels": 33}},
    "info of text": lambda s: s | {"info": "x"},
}
LAST = {  # another state in last.pt
    **{kind: BEST[kind] for kind in ("list", "tensor", "nothing", "none")},
    **{
        f"no {name}": lambda s, name=name: {k: v for k, v in s.items() if k != name}
        for name in (
            "config",
            "step",
            "best_loss",
            "train_curve",
            "test_curve",
            "log",
            "rng",
            "network",
            "ema",
            "optimizer",
        )
    },
    "config of text": lambda s: s | {"config": "x"},
    **{
        f"config {name} {value!r}": lambda s, name=name, value=value: (
            s | {"config": s["config"] | {name: value}}
        )
        for name, value in (
            ("epochs", "x"),
            ("channel_mult", None),
            ("batch_size", 0),
            ("num_timesteps", 2.5),
            ("save_every", -1),
        )
    },
    **{
        f"{part} of text": lambda s, part=part: s | {part: "x"}
        for part in ("rng", "network", "ema", "optimizer")
    },
    "weights of another shape": lambda s: (
        s | {"network": first_weight(s["network"], torch.ones(7))}
    ),
    "rng of text": lambda s: s | {"rng": {"cpu": "x"}},
    "no rng": lambda s: s | {"rng": {}},
    "ema step": lambda s: s | {"ema": s["ema"] | {"step": -1}},
}


def put(path, kind, states, tmp_path):
    """Write a checkpoint that is no good."""
    state = states[path.name]
    if kind == "folder":
        path.mkdir()
    elif kind in BYTES_OF and kind != "missing":
        save_checkpoint(path, state)
        path.write_bytes(BYTES_OF[kind](path.read_bytes()))
    elif kind != "missing":
        torch.save((BEST if path.name == "best_model.pt" else LAST)[kind](state), path)


@pytest.mark.parametrize("kind", [*BYTES_OF, *BEST])
def test_a_model_that_cannot_be_loaded(kind, capsys, tmp_path, monkeypatch, states):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "best_model.pt", kind, states, tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError) as error:
        DDPM.load("best_model.pt", "cpu")
    assert "best_model.pt: " in str(error.value) and "\n" not in str(error.value)
    assert "best_model.pt: " in refused(
        capsys, lambda: train_eval.main(["--evaluate", "--save_dir=.", "--device=cpu"])
    )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", [*BYTES_OF, *LAST])
def test_a_run_that_cannot_go_on(kind, capsys, tmp_path, monkeypatch, states):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "last.pt", kind, states, tmp_path)
    before = snapshot(tmp_path)
    flags = [
        *TINY,
        "--target_references=0",
        "--dataset=glyphs",
        "--device=cpu",
        "--resume",
        "--save_dir=.",
    ]
    if "config" in kind:  # its constants are compared with the flags first
        flags = ["--dataset=auto", *flags[-3:]]
    line = refused(capsys, lambda: train_eval.main(flags))
    assert ("last.pt" in line or "config" in kind) and (
        "expected" in line
        or "readable" in line
        or "no such" in line
        or "version" in line
        or "a pickle" in line
    ), line
    assert snapshot(tmp_path) == before
