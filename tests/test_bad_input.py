"""The doors: what a person hands in and does not fit is one line, with its name and what fits.

First the kinds of support/checks.py, with all that each refuses; then the doors, with a few values
for each argument, which show that the door asks. tests/test_dataprocess.py has damaged data and
pictures, tests/test_checkpoint.py damaged checkpoints, tests/test_configurator.py the flags.
"""

import itertools
import math
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import refused, snapshot, tiny_ddpm, tiny_unet
from torch import nn

import metrics
from dataprocess import Images, load_data
from diffusion import DDPM
from ema import EMA
from process import GaussianProcess
from support import checks
from support.checkpoint import save_checkpoint
from support.datasets import read_folder
from timesteps import make_timesteps
from unet import UNet

NAN, INF, HUGE = math.nan, math.inf, 10**400  # no float holds the last
X, T = torch.full((2, 1, 8, 8), 1 / 255), torch.tensor([0, 9])
BYTES, DIGITS = torch.zeros(5, 8, 8, dtype=torch.uint8), torch.arange(5)
MODEL = tiny_ddpm(3)  # ten timesteps, labels 0 to 2


def with_value(x, value):
    """A copy of a tensor with one other value."""
    return x.flatten().index_fill(0, torch.tensor([3]), value).view_as(x)


def text_of(value):
    """What the answer should show of a value: all of it, if that is short."""
    text = " ".join(repr(value).split())
    return "" if isinstance(value, torch.Tensor) or len(text) > 60 else text


# The kinds

CHOICE, SWITCH = partial(checks.choice, "it", choices=("mse", "l1")), partial(checks.switch, "it")
SIZE, STEP = partial(checks.whole, "it"), partial(checks.whole, "it", low=2, high=5, note=" steps")
NUMBER, POSITIVE = partial(checks.number, "it"), partial(checks.number, "it", low=0)
SHARE = partial(checks.number, "it", low=0, high=1, note=", a share")
PATH = partial(checks.path, "it")
FLOATS = partial(checks.tensor, "it", dtypes=checks.FLOATS, shape=("N", 3))
WHOLES = partial(checks.tensor, "it", dtypes=checks.WHOLE, shape=("N",), low=0, high=9)
BYTE = partial(checks.tensor, "it", dtypes=(torch.uint8,), shape=(), high=7)
SEED, ON_META = partial(checks.generator, device="cpu"), partial(checks.generator, device="meta")
NO_NUMBER = [True, np.True_, None, "3", "", [3], (3,), {3}, 3j, np.array([3]), torch.ones(2), X]
NO_TENSOR = [None, 3, 1.5, "x", [[1.0, 2.0, 3.0]], np.zeros((2, 3)), nn.Identity()]
KINDS = [  # a kind, what it says is expected, values that it refuses
    (CHOICE, "'mse' or 'l1'", ["huber", "MSE", "mse ", "", None, 1, True, ["mse"], b"l1"]),
    (SWITCH, "True or False", [1, 0, None, "", "True", 1.0, [True], torch.tensor(True)]),
    (SIZE, "a whole number", [*NO_NUMBER, 2.0, NAN, INF, Fraction(1, 2), np.float64(3)]),
    (SIZE, "at least 1", [0, -1, -HUGE, np.int64(0), np.int8(-3)]),
    (SIZE, "from 1 to 2147483647", [2**31, HUGE, np.uint64(2**63)]),
    (STEP, "from 2 to 5 steps", [1, 6, -HUGE, HUGE, np.uint8(255)]),
    (NUMBER, "a number", NO_NUMBER),
    (NUMBER, "a finite number", [NAN, INF, -INF, HUGE, -HUGE, np.float32(NAN), np.float64(INF)]),
    (POSITIVE, "at least 0 and finite", [-1, -1e-9, NAN, INF, HUGE, np.float16(-1)]),
    (SHARE, "from 0 to 1, a share", [-0.1, 1.1, 2, NAN, INF, HUGE, Fraction(3, 2), np.float32(2)]),
    (PATH, "the path of a file or folder", [None, 3, True, 1.5, b"x", ["x"], "a\0b", open]),
    (FLOATS, "a tensor of floating-point numbers, (N, 3)", [*NO_TENSOR, T, X, T[:, None]]),
    (FLOATS, "a tensor of floating-point", [torch.ones(2, 4), torch.ones(3), torch.ones(2, 3) > 0]),
    (FLOATS, "finite numbers", [torch.full((2, 3), value) for value in (NAN, INF, -INF)]),
    (FLOATS, "finite numbers", [with_value(torch.ones(2, 3).half(), NAN)]),
    (WHOLES, "a tensor of whole numbers, (N,)", [*NO_TENSOR, T.float(), T > 0, T[:, None], T[0]]),
    (WHOLES, "from 0 to 9", [T - 1, T + 1, torch.tensor([2**62])]),
    (BYTE, "a tensor of uint8, ()", [torch.tensor(3), torch.zeros(1).byte()]),
    (checks.device, "", ["abacus", "", None, True, 1.5, "cuda:99", "a\nb"]),
    (SEED, "a whole number", ["0", 1.5, True, [1], T]),
    (SEED, "at least 0", [-1, -HUGE]),
    (SEED, "from 0 to 4294967295", [2**32, HUGE]),
    (ON_META, "one on meta", [torch.Generator()]),
]


def name_of(x):
    """The id of a door or of a kind."""
    return getattr(getattr(x, "func", x), "__name__", None)


@pytest.mark.parametrize("kind, expected, values", KINDS, ids=name_of)
def test_a_value_of_another_kind_is_one_line_with_the_value_and_what_fits(kind, expected, values):
    for value in values:
        shown = "" if kind is ON_META else text_of(value)
        words = f"expected {expected}" if expected else "cannot be used here"
        line = refused(partial(kind, value), words, shown)
        assert line.startswith(("it ", "device ", "seed")) and len(line) < 300


# The doors: functions with arguments that fit, in place of which others can be given


NEW = partial(DDPM, network=tiny_unet(num_classes=3), image_size=8, channels=1, num_timesteps=10)
SAMPLE, BOUND = partial(MODEL.sample, n=2), partial(MODEL.bits_per_dim, x0=X)
PREDICT = partial(MODEL.predict, xt=X, t=T)
MIX = partial(MODEL.interpolate, x0=X, other=X, weights=[1], t=5)
AVERAGE = partial(EMA, module=MODEL)
TIMESTEPS = partial(make_timesteps, sampling="uniform", num_timesteps=5)
DATA, PICTURES = partial(load_data, train_size=1, test_size=1), Images("x", BYTES, DIGITS)
TRAIN = partial(metrics.train_classifier, images=BYTES, labels=DIGITS)
LOAD = partial(metrics.load_classifier, dataset="new", images=BYTES, labels=DIGITS, folder="none")
READER = metrics.Classifier(10)
MEASURE = partial(metrics.measure, classifier=READER, samples=BYTES, train=BYTES, test=BYTES)
FEATURES = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
VALUES = {  # of each kind, some that are refused
    "choice": ["what", 1],
    "switch": [1, None],
    "size": [0, 2.5, True],
    "count": [-1, 2.5, True],
    "number": [NAN, "1", HUGE],
    "positive": [-0.5, INF, None],
    "share": [-0.1, 1.5, "1"],
    "seed": [-1, 2**32, "0"],
    "path": [None, 3, "a\0b"],
    "file": [3, "a\0b"],  # None is the model that is there
    "device": ["abacus", 1.5],
    "network": ["unet", 3, UNet],
    "sizes": [None, 8, "12", {8}, (2.5,), (0,), torch.ones(2)],
    "images": [3, X.byte(), X[0], X[..., :4], with_value(X, NAN), X.numpy()],
    "labels": [-1, 4, True, 1.5, "3", [0, None], [0, 4], [0, 1, 2], [], {0, 1}, [[0, 1]], HUGE, X],
    "t": [None, [0, 9], T + 1, T - 1, T.int(), T.float(), T[:1], T[:, None]],
    "weights": [None, 0.5, "01", ["0"], [True], [NAN], [2], [[0.5]], {0.5}, [], [HUGE]],
    "return": ["x0", 2, None, [True], torch.ones(2)],
    "bytes": [None, [0], X, BYTES[0], BYTES[:0], BYTES[:, :0], BYTES.numpy()],
    "digits": [3, DIGITS[:4], DIGITS.float(), DIGITS[:, None], [0] * 5],
    "features": [None, 3, FEATURES.long(), FEATURES[0], with_value(FEATURES, NAN), FEATURES[:, :0]],
}
DOORS = [  # a door, its arguments of each kind
    (GaussianProcess, "size: num_timesteps; switch: zero_terminal_snr"),
    (GaussianProcess, "choice: beta_schedule prediction variance timestep_spacing"),
    (UNet, "size: image_size channels base_channels num_res_blocks time_emb_dim patch_size"),
    (UNet, "size: num_heads num_classes out_channels; share: dropout; switch: adaptive_norm"),
    (UNet, "sizes: channel_mult attention_resolutions"),
    (NEW, "network: network; size: image_size channels sample_steps num_timesteps"),
    (NEW, "choice: loss sampler beta_schedule; number: guidance_scale"),
    (NEW, "positive: min_snr_gamma skip_std clean_weight"),
    (NEW, "share: label_dropout"),
    (AVERAGE, "network: module; share: decay; count: start; size: update_rate"),
    (TIMESTEPS, "choice: sampling; size: num_timesteps; positive: std; device: device"),
    (partial(MODEL, x0=X), "images: x0; labels: y"),
    (PREDICT, "images: xt; t: t; labels: y; number: guidance_scale"),
    (SAMPLE, "size: n steps; choice: sampler; share: eta; number: guidance_scale; images: xT"),
    (SAMPLE, "labels: y; seed: seed; count: start; return: return_sequence"),
    (MIX, "images: x0 other; weights: weights; count: t; labels: y; seed: seed"),
    (MIX, "number: guidance_scale; size: steps"),
    (BOUND, "images: x0; labels: y; size: terms; seed: seed"),
    (MODEL.save, "path: path"),
    (DDPM.load, "file: path"),
    (partial(DDPM.load, path="none"), "device: device"),
    (DATA, "choice: dataset; path: data_dir; switch: augment flips; seed: seed; device: device"),
    (DATA, "size: image_size channels train_size test_size"),
    (lambda num_clusters: PICTURES.use_clusters(num_clusters), "size: num_clusters"),
    (lambda evaluate: read_folder(evaluate), "path: evaluate"),
    (TRAIN, "bytes: images; digits: labels; seed: seed; size: epochs; device: device"),
    (LOAD, "bytes: images; digits: labels; path: folder; device: device"),
    (READER.read, "bytes: images"),
    (partial(READER.accuracy, images=BYTES, labels=DIGITS), "bytes: images; digits: labels"),
    (partial(metrics.frechet_distance, a=FEATURES, b=FEATURES), "features: a b"),
    (partial(metrics.precision_recall, FEATURES, FEATURES), "size: k"),
    (partial(metrics.precision_recall, samples=FEATURES), "features: real"),
    (partial(metrics.precision_recall, real=FEATURES), "features: samples"),
    (partial(metrics.nearest, images=BYTES, others=BYTES), "bytes: images others"),
    (MEASURE, "bytes: samples train test; digits: labels"),
]


@pytest.mark.parametrize("call, arguments", DOORS, ids=name_of)
def test_an_argument_that_does_not_fit_is_one_line_with_its_name(call, arguments):
    for kind, names in re.findall(r"(\w+): ([\w ]+)", arguments):
        words = "cannot be used here" if kind == "device" else "expected"
        for name, value in itertools.product(names.split(), VALUES[kind]):
            shown = "" if isinstance(value, (list, tuple)) or name == "y" else text_of(value)
            refused(partial(call, **{name: value}), f"{name} {shown}", words)


class Wrapper(nn.Module):
    """A network that does not tell that a part of it knows labels, or tells something odd."""

    def __init__(self, **told):
        super().__init__()
        self.inside = tiny_unet(num_classes=3)
        vars(self).update(told)


UNCONDITIONAL, FINER = tiny_ddpm(), partial(NEW, network=Wrapper(num_classes=4))
ZERO = dict(zero_terminal_snr=True, prediction="v")
TOGETHER = [  # what does not fit together, or is just beyond a limit
    (partial(GaussianProcess, 1, **ZERO), "num_timesteps 1: expected at least 2"),
    (partial(GaussianProcess, zero_terminal_snr=True), "zero_terminal_snr", "'eps'", "'v' or 'x0'"),
    (partial(UNet, attention_resolutions=(32,), patch_size=2), "attention_resolutions 32: exp"),
    (partial(UNet, base_channels=48), "base_channels 48: expected a multiple of 32"),
    (partial(UNet, patch_size=8), "image_size 32: expected a multiple of 64"),
    (partial(UNet, channel_mult=()), "channel_mult (): expected", "each of 1 to 30 levels"),
    (partial(UNet, channel_mult=(1,) * 31), "channel_mult (1, 1, ", "of 1 to 30 levels"),
    (partial(UNet, num_heads=3), "num_heads 3: expected a divisor of 256", "attention at 16"),
    (partial(UNet, attention_resolutions=[], num_heads=5), "num_heads 5: expected a divisor"),
    (partial(UNet, dropout=1.0), "dropout 1: expected a probability from 0 to below 1"),
    (partial(NEW, image_size=16), "image_size 16: expected 8, as in the network"),
    (partial(NEW, channels=3), "channels 3: expected 1, as in the network"),
    (partial(NEW, variance="learned"), "out_channels 2: expected 1, as in the network"),
    (partial(NEW, sample_steps=11), "sample_steps 11: expected from 1 to 10, the number of"),
    (partial(NEW, clean_weight=0.2), "clean_weight 0.2: expected 0"),
    (partial(NEW, min_snr_gamma=5.0, loss="l1"), "min_snr_gamma 5.0: expected 0"),
    (partial(NEW, min_snr_gamma=5.0, **ZERO), "min_snr_gamma 5.0: expected 0", "zero_terminal_snr"),
    (partial(NEW, network=Wrapper()), "network", "Wrapper", "expected", "num_classes"),
    (partial(NEW, network=Wrapper(num_classes=0)), "num_classes 0: expected at least 1, or None"),
    (partial(NEW, network=Wrapper(num_classes="3")), "num_classes '3': expected a whole number"),
    (partial(tiny_ddpm, guidance_scale=2), "guidance_scale 2: expected 1", "unconditional"),
    (partial(tiny_ddpm, class_shares=[[1]]), "class_shares [[1]]: expected", "None classes"),
    (partial(NEW, class_shares=[[1, 1]] * 2), "class_shares [[1, 1], [1, 1]]: exp", "3 classes"),
    (partial(FINER, class_shares=[[1] * 4], label_dropout=0), "label_dropout 0: expected between"),
    (partial(MIX, start=3), "start 3: expected nothing"),
    (partial(NEW, skip_std=0.1), "skip_std 0.1: expected 0 with prediction 'eps', not 'x0'"),
    (partial(TIMESTEPS, sampling="logit-normal", std=0), "timestep_std 0: expected above 0"),
    (partial(UNCONDITIONAL.sample, 2, 1), "y: this model is unconditional"),
    (partial(UNCONDITIONAL.sample, 2, guidance_scale=2), "guidance_scale 2: expected 0 or 1"),
    (partial(PREDICT, guidance_scale=2.0), "guidance_scale 2.0: expected 0 or 1", "give y"),
    (partial(MIX, guidance_scale=2.0), "guidance_scale 2.0: expected 0 or 1", "give y"),
    (partial(SAMPLE, y=3), "y with values from 3 to 3: expected from 0 to 2"),  # 'no label'
    (partial(MIX, y=3), "y with values from 3 to 3: expected from 0 to 2"),
    (partial(BOUND, y=3), "y with values from 3 to 3: expected from 0 to 2"),
    (partial(SAMPLE, steps=11), "steps 11: expected from 1 to 10, the number of timesteps"),
    (partial(SAMPLE, steps=7, start=5, xT=X), "steps 7: expected from 1 to 6"),
    (partial(SAMPLE, start=10), "start 10: expected from 0 to 9, a timestep"),
    (partial(SAMPLE, start=5), "start 5 without xT: pure noise belongs to 9; give xT"),
    (partial(SAMPLE, xT=X[:1]), "xT of torch.float32 and shape (1, 1, 8, 8)", "(2, 1, 8, 8)"),
    (partial(MIX, other=X[:1]), "other of torch.float32 and shape (1, 1, 8, 8)", "(2, 1, 8, 8)"),
    (partial(MIX, t=10), "t 10: expected from 0 to 9, a timestep"),
    (partial(BOUND, x0=X + 1.01), "x0 with values from 1.0", "expected from -1 to 1"),
    (partial(BOUND, x0=X[:0]), "x0 of 0 images: expected at least 1"),
    (partial(BOUND, x0=X + 0.001), "x0 up to 0.13 grey levels off the 256 of a PNG"),
    (partial(BOUND, terms=1), "terms 1: expected from 2 to 10, the number of timesteps"),
    (partial(TRAIN, labels=DIGITS - 1), "labels with values from -1 to 3: expected at least 0"),
    (partial(metrics.frechet_distance, FEATURES[:3], FEATURES), "a of", "at least 4 images"),
    (partial(metrics.frechet_distance, FEATURES, FEATURES[:, :2]), "b of", "(N, 3)"),
    (partial(metrics.precision_recall, FEATURES[:3], FEATURES), "samples of", "at least 4 images"),
    (partial(metrics.precision_recall, FEATURES, FEATURES, 9), "samples of", "at least 10 images"),
    (partial(MEASURE, train=BYTES[:4]), "samples", "expected at most 4, ", "train images"),
    (partial(MEASURE, test=BYTES[:4]), "samples", "expected at most 4, ", "test images"),
]


@pytest.mark.parametrize("call, words", [(call, words) for call, *words in TOGETHER])
def test_what_does_not_fit_together_is_one_line(call, words):
    refused(call, *words)


def test_a_door_that_refuses_has_changed_nothing(tmp_path, monkeypatch):
    """No file, no folder, no random number, no mode of the network."""
    monkeypatch.chdir(tmp_path)
    MODEL.save("model.pt")
    own = torch.Generator()
    calls = [partial(SAMPLE, seed=own, return_sequence="x0"), partial(SAMPLE, xT=X[:1])]
    calls += [partial(MIX, seed=own, weights=[2]), partial(MIX, t=10)]
    calls += [partial(BOUND, seed=own, terms=99), partial(BOUND, y=3), partial(MODEL, X, 4)]
    calls += [partial(PREDICT, guidance_scale=2.0), partial(NEW, sampler="what")]
    calls += [partial(UNet, dropout=2), partial(TRAIN, labels=1)]
    calls += [partial(LOAD, labels=DIGITS - 1), partial(LOAD, device="abacus")]
    calls += [partial(MEASURE, labels=DIGITS[:2]), partial(TIMESTEPS, sampling="what")]
    calls += [partial(DATA, dataset="kmnist", data_dir="new", device="abacus")]
    calls += [partial(MODEL.save, "model.pt", score=np.float64(1)), partial(DDPM.load, "new.pt")]
    modes = [part.training for part in MODEL.train().modules()]
    before = snapshot("."), torch.get_rng_state().tolist(), own.get_state().tolist()
    for call in calls:
        refused(call)
        assert (snapshot("."), torch.get_rng_state().tolist(), own.get_state().tolist()) == before
        assert [part.training for part in MODEL.modules()] == modes
        assert len(list(Path().iterdir())) == 1
    MODEL.eval()


def test_images_and_numbers_of_every_precision_are_taken():
    half, three = np.float32(0.5), np.int64(3)
    for x in (X.double(), X.half()):
        assert MODEL(x, three).isfinite() and PREDICT(xt=x, y=3)[0].isfinite().all()  # 'no label'
        assert MIX(x0=x, weights=np.array([half]), steps=three).shape == (1, 2, 1, 8, 8)
        assert BOUND(x0=x, y=np.arange(2)[::-1], terms=three, seed=three).total > 0
    how = dict(sample_steps=three, guidance_scale=half, class_shares=[[1, 2, 1]])
    new = NEW(num_timesteps=three, **how)
    assert new.sample(three, eta=half).isfinite().all()
    assert NEW(network=Wrapper(num_classes=None)).num_classes is None  # on purpose


STATES = {  # what else may be in the file of a model
    "no weights": lambda s: s.pop("weights"),
    "weights of another shape": lambda s: s["weights"].update({"conv_in.bias": torch.ones(7)}),
    "one weight less": lambda s: s["weights"].popitem(),
    "no network": lambda s: s.update(network=None),
    "a network of other settings": lambda s: s["network"].update(new=1),
    "unknown settings": lambda s: s["diffusion"].update(new=1),
    "settings that do not fit": lambda s: s["diffusion"].update(loss="huber"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_file_that_holds_another_model_is_one_line(tmp_path, kind):
    path = tmp_path / "model.pt"
    MODEL.save(path)
    state = torch.load(path, weights_only=True)
    STATES[kind](state)
    save_checkpoint(path, state)
    before = snapshot(tmp_path)
    refused(lambda: DDPM.load(path, "cpu"), f"{path}: ")
    assert snapshot(tmp_path) == before
