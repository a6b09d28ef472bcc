"""Whatever a person gives that does not fit is answered in one line, and every folder stays as it was.

One row is one bad input: a call, and words of its answer, the name and the value at least. `tests/test_configurator.py`
has the kinds of all constants, `tests/test_dataprocess.py` the damaged data files, `tests/test_metrics.py` the PNGs.
"""

import functools
import math
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import read_constants
from PIL import Image
from test_dataprocess import idx, small_mnist, write
from test_metrics import chunk, png

import metrics
import train_eval
from dataprocess import FILES, Images, load_data
from diffusion import DDPM
from ema import EMA
from process import GaussianProcess, make_betas
from support import configurator
from support.checkpoint import save_checkpoint
from timesteps import ImportanceSampler, LogitNormalSampler, UniformSampler, make_timesteps
from unet import UNet

HUGE, NAN, INF = 2**70, math.nan, math.inf
X = torch.zeros(2, 1, 8, 8)
T = torch.tensor([0, 9])
BYTES = torch.zeros(5, 8, 8, dtype=torch.uint8)
LABELS = torch.arange(5)
FEATURES = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))


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
    return UNet(image_size=8, channels=1, base_channels=32, channel_mult=(1,), num_res_blocks=1, time_emb_dim=8,
                attention_resolutions=(), num_classes=3)


@functools.cache
def classifier():
    return metrics.Classifier(10)


@functools.cache
def process():
    return GaussianProcess(10)


def images(**settings):
    return Images(**dict(name="mnist", images=BYTES, labels=LABELS) | settings)


def with_value(x, value):
    """A copy of a tensor with one other value."""
    return x.flatten().index_fill(0, torch.tensor([3]), value).view_as(x)


def snapshot(folder):
    """Names and bytes of all that is in a folder."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def named(rows):
    """Rows as pytest's parameters, named by their words."""
    return [pytest.param(*row, id=f"{i}-{str(row[-1])[:40]}") for i, row in enumerate(rows)]


def settings(make, **values):
    """A row for each value of each argument of `make`; the answer has the name and, unless it is long, the value."""
    rows = []
    for name, bad in values.items():
        for value in bad:
            of_many = name in ("y", "index") or isinstance(value, torch.Tensor) or len(repr(value)) > 60
            text = f"{name} " if of_many else f"{name} {value!r}"  # of many the dtype, the shape or the range
            rows.append((lambda make=make, name=name, value=value: make(**{name: value}), text))
    return rows


NO_WHOLE = (True, None, "3", 2.0, NAN, [3], -1, HUGE)
NO_NUMBER = (True, None, "1", NAN, INF, -INF, [1.0], 10**400)
NO_SWITCH = (1, 0, None, "no", "True")
NO_CHOICE = ("sqrt", None, 1, ["linear"], True)

ARGUMENTS = [
    *settings(GaussianProcess, num_timesteps=(0, *NO_WHOLE), beta_schedule=NO_CHOICE, prediction=NO_CHOICE,
              variance=NO_CHOICE, timestep_spacing=NO_CHOICE, zero_terminal_snr=NO_SWITCH),
    *settings(ddpm, image_size=(0, *NO_WHOLE), channels=(0, *NO_WHOLE), loss=NO_CHOICE, sampler=NO_CHOICE,
              min_snr_gamma=(-1, *NO_NUMBER), guidance_scale=NO_NUMBER, sample_steps=(0, 11, True, "3", 2.0, HUGE),
              num_timesteps=(0, HUGE, 2.5), zero_terminal_snr=NO_SWITCH),
    *settings(DDPM, network=("unet", 3, dict(), torch.zeros(2), UNet)),
    *settings(lambda num_classes: DDPM(Network(num_classes=num_classes)), num_classes=(0, -1, True, "ten", 2.5, [10])),
    *settings(UNet, image_size=(0, *NO_WHOLE), channels=(0, *NO_WHOLE), base_channels=(0, 33, *NO_WHOLE),
              num_res_blocks=(0, *NO_WHOLE), time_emb_dim=(0, *NO_WHOLE), patch_size=(0, *NO_WHOLE),
              num_heads=(0, *NO_WHOLE), out_channels=(0, True, "3", 2.0, [3], -1, HUGE), adaptive_norm=NO_SWITCH,
              num_classes=(0, -1, True, 2.5, "10", [10], HUGE), dropout=(1, 1.0, -0.1, 2, *NO_NUMBER),
              channel_mult=(None, 2, "12", {1}, (), torch.ones(2)),
              attention_resolutions=(None, 8, "8", {8}, torch.ones(2))),
    *[(lambda name=name, value=value: UNet(**{name: (value,)}), f"{name} {value!r}")
      for name in ("channel_mult", "attention_resolutions") for value in (True, None, 8.0, "8", -1, 0, NAN, HUGE, (8,))],
    *settings(EMA, module=(None, 3, "unet", [torch.zeros(1)], torch.zeros(2))),
    *settings(lambda **options: make_timesteps("uniform", **dict(num_timesteps=5) | options),
              num_timesteps=(0, *NO_WHOLE), device=("abacus", "", 1.5, [1])),
    *settings(lambda timestep_sampling: make_timesteps(timestep_sampling, 5),
              timestep_sampling=("normal", None, 3, True, ["uniform"], LABELS)),
    *settings(lambda timestep_std: make_timesteps("logit-normal", 5, timestep_std), timestep_std=(-0.5, *NO_NUMBER)),
    *[row for sampler in (UniformSampler(5), LogitNormalSampler(5), ImportanceSampler(5))
      for row in settings(sampler.sample, n=NO_WHOLE)],
    *settings(lambda dataset: load_data(dataset, "nowhere"), dataset=("cifar", None, 3, True, ["mnist"], LABELS)),
    *settings(lambda **options: load_data("glyphs", **dict(train_size=1, test_size=1) | options),
              data_dir=(None, 3, True, ["data"], b"data", "a\0b"), image_size=(0, *NO_WHOLE), channels=(0, *NO_WHOLE),
              train_size=(0, *NO_WHOLE), test_size=(0, *NO_WHOLE), augment=NO_SWITCH, seed=(-1, 1.5, True, None, "0"),
              device=("abacus", 2.5)),
    *settings(images, name=(None, 3), images=(None, [[0]], X, BYTES[0], BYTES.long(), BYTES.numpy()),
              labels=(None, [0] * 5, LABELS.int(), LABELS[:4], LABELS - 1, LABELS[:, None], 3), channels=(0, *NO_WHOLE),
              augment=NO_SWITCH, seed=(-1, 1.5, True, None, "0"), device=("abacus", 2.5)),
    *settings(lambda index: images().batch(index),
              index=(None, "0", 1.5, [0.5], [5], [-1], [True], [None], [[0]], [HUGE], 3, LABELS + 1, LABELS.float())),
    *settings(lambda **options: list(images().epoch(**dict(batch_size=2, epoch=0) | options)),
              batch_size=(0, *NO_WHOLE), epoch=(True, None, "3", 2.0, NAN, -1), start=NO_WHOLE),
    *settings(metrics.Classifier, num_classes=(0, *NO_WHOLE)),
    *settings(lambda **options: metrics.train_classifier(**dict(images=BYTES, labels=LABELS) | options),
              images=(None, [[0]], BYTES.float(), BYTES[0], BYTES[:0], BYTES[:, :0]),
              labels=(None, [0], LABELS[:4], LABELS.float(), LABELS - 1, LABELS[:, None]),
              seed=(-1, True, "0", 1.5, HUGE), epochs=(0, *NO_WHOLE), device=("abacus", 2.5)),
    *settings(lambda **options: metrics.load_classifier(**dict(images=BYTES, labels=LABELS, folder="x") | options),
              images=(None, BYTES.float()), labels=(None, LABELS[:4]), folder=(None, 3, "a\0b"), device=("abacus",)),
    *settings(lambda evaluate: metrics.read_folder(evaluate), evaluate=(None, 3, True, b"x", "a\0b", ["x"])),
    *settings(lambda **options: classifier().read(**dict(images=BYTES) | options),
              images=(None, X, BYTES[:0], "x"), batch_size=(0, *NO_WHOLE)),
    *settings(lambda labels: classifier().accuracy(BYTES, labels), labels=(None, 3, LABELS[:2], LABELS.float())),
    *settings(lambda **options: metrics.frechet_distance(**dict(a=FEATURES, b=FEATURES) | options),
              a=(None, 3, [[1.0]], FEATURES.long(), FEATURES[0], with_value(FEATURES, NAN), FEATURES[:, :0]),
              b=(None, FEATURES[:, :2], with_value(FEATURES, INF), FEATURES.numpy())),
    *settings(lambda **options: metrics.precision_recall(**dict(samples=FEATURES, real=FEATURES) | options),
              samples=(None, FEATURES.long(), FEATURES[0], with_value(FEATURES, NAN)),
              real=(None, FEATURES[:, :2], with_value(FEATURES, INF)), k=(0, *NO_WHOLE)),
    *settings(lambda **options: metrics.nearest(**dict(images=BYTES, others=BYTES) | options),
              images=(None, X, BYTES[:0], BYTES[0]), others=(None, X, BYTES[:0], BYTES[0])),
    *settings(lambda **options: metrics.measure(**dict(classifier=classifier(), samples=BYTES, train=BYTES, test=BYTES)
                                                | options),
              samples=(None, X, [0], BYTES[0]), train=(None, X), test=(None, X), labels=(3, LABELS[:2], LABELS.float()),
              seed=(-1, True, "0", 1.5), frechet_only=NO_SWITCH),
    *settings(lambda **options: model().sample(**dict(n=2) | options), n=(0, *NO_WHOLE), steps=(0, 11, True, "3", 2.0),
              sampler=("euler", 3, True, ["ddpm"]), eta=(-0.1, 1.5, True, "0", NAN, INF), batch_size=(0, *NO_WHOLE),
              guidance_scale=(True, "1", NAN, INF, [1.0], 10**400), seed=(-1, HUGE, True, "0", 1.5, [0]),
              xT=(3, [0.0], X.long(), X[:1], X[0], with_value(X, NAN), with_value(X, INF)),
              start=(-1, 10, True, "", "3", 2.0, HUGE)),
    *[(lambda call=call, y=y: call(y), "y ") for y in
      (-1, 3, True, 1.0, "3", [0, None], [0, 3], [0, 1, 2], [], HUGE, {0, 1}, [[0, 1]], torch.tensor([0, NAN]))
      for call in (lambda y: model().sample(2, y), lambda y: model().interpolate(X, X, [0.5], 5, y),
                   lambda y: model().bits_per_dim(X, y))],
    *settings(lambda **options: model().predict(**dict(xt=X, t=T) | options),
              xt=(None, 3, [0.0], X.byte(), X[0], X[..., :4], with_value(X, NAN), X.numpy()),
              t=(None, 3, [0, 9], T + 1, T - 1, T * HUGE.bit_length(), T.int(), T.float(), T[:1], T[:, None]),
              y=(-1, 4, [0, 4], "1", 1.5, True, X), guidance_scale=(None, True, "1", NAN, INF, [1.0], 2.0)),
    *settings(lambda **options: model().interpolate(**dict(x0=X, other=X, weights=[0.5], t=5) | options),
              x0=(None, X.byte(), X[0], with_value(X, NAN)), other=(None, X.byte(), X[:1], with_value(X, INF)),
              weights=(None, 0.5, "01", ["0"], [True], [NAN], [HUGE], {0.5}, [[0.5]], []),
              t=(-1, 10, True, None, "3", 2.0, T, HUGE), seed=(-1, True, "0")),
    *settings(lambda **options: model().bits_per_dim(**dict(x0=X) | options),
              x0=(None, 3, [0.0], X.byte(), X[:0], X[0], X[..., :4], with_value(X, NAN), X + 1.01, X.numpy()),
              terms=(0, 1, 11, True, "3", 2.0), batch_size=(0, *NO_WHOLE), progress=NO_SWITCH, seed=(-1, True, "0")),
    *settings(lambda **options: process().q_sample(**dict(x0=X, t=T, eps=X) | options),
              x0=(None, X.byte(), X[0], with_value(X, NAN)), eps=(None, X.long(), X[:1], with_value(X, NAN)),
              t=(None, 3, [0, 9], T + 1, T - 2, T.int(), T[:1], T[:, None])),
    *settings(lambda **options: process().q_posterior(**dict(x0=X, xt=X, t=T) | options), t=(None, T + 1, T.float())),
    *settings(lambda **options: process().step(**dict(x0=X, eps=X, t=T, s=T - 1, noise=X) | options),
              eta=(-1, 1.5, *NO_NUMBER), t=(T + 1, None)),
    *settings(lambda candidates: process().posterior_mean(X, T, candidates),
              candidates=(None, [0.0], X.long(), X[0], X[..., :4])),
    *settings(lambda **options: process().timesteps(**dict(steps=3) | options), steps=(0, 11, *NO_WHOLE),
              start=(-1, 10, True, "3", 2.0)),
    (lambda: process().timesteps(3, spacing="even"), "timestep_spacing 'even'"),
    *settings(lambda **options: model()(**dict(x0=X) | options),
              x0=(None, 3, [0.0], X.byte(), X[0], X[..., :4], with_value(X, NAN)),
              y=(-1, 4, [0, 4], [0], "1", 1.5, True, {1}), t=(3, [0, 9], T + 1, T - 1, T.int(), T[:1]),
              eps=(3, X.long(), X[:1], with_value(X, NAN)), reduction=("sum", None, 1, ["mean"])),
    *settings(lambda **options: unet()(**dict(xt=X, t=T) | options),
              xt=(None, 3, X.double(), X.byte(), X[0], X[..., :4]), t=(None, 3, [0, 9], T.float(), T.int(), T[:1]),
              y=(0, [0, 1], T[:1], T.float(), torch.tensor([0, 4]), torch.tensor([-1, 0]))),
    *[(lambda say=say: ddpm(say).sample(2, steps=1), "network: its output") for say in (
        lambda xt: xt[:, :, :4], lambda xt: xt[:1], lambda xt: xt.flatten(), lambda xt: None, lambda xt: (xt, xt),
        lambda xt: xt.long(), lambda xt: xt.expand(-1, 2, -1, -1), lambda xt: xt.tolist())],
    *[(lambda values=values: make_betas(*values), word) for values, word in (
        (("linear", 0), "num_timesteps 0"), (("linear", HUGE), "num_timesteps"), ((None, 5), "beta_schedule None"))],
    (lambda: DDPM.load("nowhere.pt", device="abacus"), "device 'abacus'"),
]


@pytest.mark.parametrize("call, words", named(ARGUMENTS))
def test_an_argument_that_does_not_fit_is_one_line_with_its_name_and_value(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        call()
    line = str(error.value)
    assert words in line and "expected" in line or "no labels" in line or "needs" in line, line
    assert "\n" not in line and len(line) < 400 and not snapshot(tmp_path)
