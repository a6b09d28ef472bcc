"""Faults that only a GPU would show, found on any machine; torch.compile; and the parts of support/machine.py.

On a fake GPU (`PretendCuda`) tensors have a shape and a device but no values. An operation on tensors of two devices
raises there, and so does one that would wait for the GPU. Three things need a real GPU: kernels, the backward pass,
and CUDA's own random generators.
"""

import argparse
import functools
import signal
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metrics
import train_eval
from dataprocess import Images
from diffusion import DDPM, LOSSES, SAMPLERS
from ema import EMA
from process import PREDICTIONS, VARIANCES, GaussianProcess, make_generator
from support import machine
from support.monitor import RunningStats
from support.pictures import write_grid
from timesteps import TIMESTEP_SAMPLINGS, make_timesteps
from unet import UNet

SMALL = (
    "--image_size 8 --base_channels 32 --channel_mult 1,2 --num_res_blocks 1 --time_emb_dim 32 --patch_size 2 "
    "--attention_resolutions 4 --num_timesteps 8 --sample_steps 3 --preview_steps 2 --bound_terms 4 "
    "--batch_size 16 --num_samples 100 --log_every 20 --target_references 0"
).split()
ONE_LEVEL = "--channel_mult 1 --patch_size 4 --attention_resolutions none".split()
CONDITIONAL = (
    "--no-use_conditional_generation --num_clusters 0 --guidance_scale 1".split(),
    "--use_conditional_generation".split(),
)


# The fake GPU


class WouldWait(RuntimeError):
    """The program would wait for the GPU here."""


@functools.cache
def fakes_need_a_driver():
    """Whether this is an older torch, built for CUDA, that sends no fake tensor to a GPU without NVIDIA's driver."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.ones(2).to("cuda")
    except RuntimeError:
        if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):
            raise
        return True
    return False


class PretendCuda(TorchDispatchMode):
    """Inside, 'cuda' is a device on any machine. Tensors on the CPU stay real.

    Besides torch's own checks of fake tensors, two tensors of different devices meet only in a copy. (A CPU tensor
    without dimensions is a plain number to a GPU, so it may meet any tensor.)

    Args:
        may_read: let values come to the CPU; they are zeros. Without it, that raises `WouldWait`.

    Attributes:
        sent: number of tensors copied from the CPU to the device. On a real GPU each of these copies waits too.
    """

    COPIES = (
        torch.ops.aten._to_copy.default,
        torch.ops.aten.copy_.default,
        torch.ops.aten._foreach_copy_.default,
    )
    LOOKUPS = (
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_put_.default,
    )  # these send an index from the CPU

    def __init__(self, may_read=False):
        if fakes_need_a_driver():
            pytest.skip(
                f"torch {torch.__version__} asks NVIDIA's driver even about fake tensors; torch 2.14 does not"
            )
        super().__init__()
        self.may_read, self.sent = may_read, 0
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.fake.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(
            isinstance(x, FakeTensor) or isinstance(x, torch.device) and x.type == "cuda"
            for x in leaves
        ):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if (
            torch.is_inference_mode_enabled() and func.namespace == "aten"
        ):  # torch has not taken the operation apart
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if any(
            isinstance(x, torch._C.Generator) and PretendGenerator.device_of(x).type != "cuda"
            for x in leaves
        ):
            raise RuntimeError(f"{func}: a generator and a tensor on different devices")
        if func in self.LOOKUPS and args[0].device.type == "cuda":
            leaves, indices = tree_leaves((args[0], args[2:], kwargs)), tree_leaves(args[1])
            self.sent += sum(
                isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in indices
            )
        here = {x.device.type for x in leaves if isinstance(x, torch.Tensor) and x.ndim}
        if func not in self.COPIES and len(here) > 1:
            raise RuntimeError(f"{func}: tensors on different devices")
        if func is torch.ops.aten._local_scalar_dense.default and self.may_read:
            with unset_fake_temporarily():
                return torch.zeros((), dtype=args[0].dtype).item()
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise WouldWait(f"{func}: the program needs a value from the device") from error
        return self._copied(func, args, result) if func in self.COPIES else result

    def _copied(self, func, args, result):
        """The result of a copy, after a look at where it came from and where it went."""
        if func is torch.ops.aten._to_copy.default:
            pairs = [(result, args[0])]
        else:
            pairs = [args[:2]] if isinstance(args[0], torch.Tensor) else list(zip(*args[:2]))
        for target, source in pairs:
            if target.device.type == "cpu" and source.device.type == "cuda":
                if not self.may_read:
                    raise WouldWait(f"{func}: from the device to the CPU")
                if func is torch.ops.aten._to_copy.default:
                    with unset_fake_temporarily():
                        return torch.zeros(target.shape, dtype=target.dtype)
            self.sent += source.device.type == "cpu" and target.device.type == "cuda"
        return result


class PretendGenerator(torch.Generator):
    """A generator that says it is on the device it was made for. A real one for CUDA needs a driver."""

    devices = {}

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        cls.devices[self._cdata] = torch.device(device)
        return self

    @classmethod
    def device_of(cls, generator):
        """The device of a generator of either kind: operations get another Python object of the same generator."""
        return cls.devices.get(generator._cdata, torch.device("cpu"))

    @property
    def device(self):
        return self.device_of(self)


@pytest.fixture(autouse=True)
def cuda_without_a_driver(monkeypatch):
    """What torch asks the driver: CUDA's generators, and autocast whether there is a GPU for it."""
    monkeypatch.setattr(torch, "Generator", PretendGenerator)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


class Tiny(nn.Module):
    """The least network that uses all its inputs: (xt, t, y) -> prediction."""

    def __init__(self, channels=1, out_channels=1, num_classes=None):
        super().__init__()
        self.num_classes = num_classes
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.labels = None if num_classes is None else nn.Embedding(num_classes + 1, out_channels)

    def forward(self, xt, t, y=None):
        h = self.conv(xt) + t[:, None, None, None] / 8
        return h if y is None else h + self.labels(y)[:, :, None, None]


def tiny(conditional=True, **settings):
    """A DDPM of 8 timesteps and grey images of 8x8 pixels, on the fake GPU."""
    network = Tiny(
        1, 2 if settings.get("variance") == "learned" else 1, 10 if conditional else None
    )
    return DDPM(network, image_size=8, channels=1, num_timesteps=8, **settings).to("cuda")


def cuda_images(n, channels=1, dtype=torch.float32):
    return torch.zeros(n, channels, 8, 8, dtype=dtype, device="cuda")


def cuda_labels(n):
    return torch.zeros(n, dtype=torch.long, device="cuda")


def on_cuda(*tensors):
    return all(x.device.type == "cuda" for x in tensors)


def configure(*flags):
    return train_eval.configure([*SMALL, *flags])[0]


# Faults that a person might make: the tests must see them


def plant(monkeypatch, table):
    """Have `GaussianProcess.alpha_bar` use another way to look up its table."""
    monkeypatch.setattr(
        GaussianProcess, "alpha_bar", lambda self, t: table(self, t)[:, None, None, None]
    )


WAITS = {
    "item": lambda self, t: self.alphas_cumprod[t] * self.betas[0].item(),
    "tolist": lambda self, t: self.alphas_cumprod[t] * self.betas.tolist()[0],
    "if": lambda self, t: self.alphas_cumprod[t] if (t >= 0).all() else None,
    "float": lambda self, t: self.alphas_cumprod[t] * float(self.betas[0]),
    "mask": lambda self, t: self.alphas_cumprod[t][t >= 0],
    "cpu": lambda self, t: self.alphas_cumprod.cpu()[t.cpu()].to(t.device),
    "copy": lambda self, t: torch.zeros(len(t), dtype=torch.long).copy_(t).double(),
}
TRANSFERS = {
    "a table": lambda self, t: torch.linspace(0.9, 0.1, 8, dtype=torch.float64).to(t.device)[t],
    "an index": lambda self, t: self.alphas_cumprod[torch.zeros(len(t), dtype=torch.long)],
    "a new tensor": lambda self, t: torch.empty(len(t), device=t.device).copy_(torch.ones(len(t))),
}
MIXTURES = {
    "table left on the CPU": lambda self, t: torch.linspace(0.9, 0.1, 8, dtype=torch.float64)[t],
    "factor left on the CPU": lambda self, t: self.alphas_cumprod[t] * torch.ones(len(t)),
    "condition left on the CPU": lambda self, t: torch.where(
        torch.ones(len(t)) > 0, self.alphas_cumprod[t], 1.0
    ),
    "generator of the CPU": lambda self, t: torch.rand(
        len(t), generator=torch.Generator(), device=t.device
    ),
}


@pytest.mark.parametrize("fault", WAITS)
def test_a_planted_wait_is_found(fault, monkeypatch):
    plant(monkeypatch, WAITS[fault])
    with PretendCuda():
        ddpm = tiny()
        with pytest.raises(WouldWait):
            ddpm(cuda_images(4), cuda_labels(4))
        with pytest.raises(WouldWait):
            ddpm.sample(4, cuda_labels(4), steps=2)


@pytest.mark.parametrize("fault", MIXTURES)
def test_a_planted_mixture_of_devices_is_found(fault, monkeypatch):
    plant(monkeypatch, MIXTURES[fault])
    for may_read in (False, True):
        with PretendCuda(may_read):
            ddpm = tiny()
            with pytest.raises(RuntimeError, match="on different devices"):
                ddpm(cuda_images(4), cuda_labels(4))
            with pytest.raises(RuntimeError, match="on different devices"):
                ddpm.sample(4, cuda_labels(4), steps=2)


@pytest.mark.parametrize("fault", TRANSFERS)
def test_a_planted_transfer_to_the_device_is_counted(fault, monkeypatch):
    with PretendCuda() as pretend:
        ddpm = tiny()
        for planted in (False, True):
            if planted:
                plant(monkeypatch, TRANSFERS[fault])
            sent = pretend.sent
            ddpm(cuda_images(4), cuda_labels(4))
            assert (pretend.sent > sent) == planted
            sent = pretend.sent
            ddpm.sample(4, cuda_labels(4), steps=2)
            assert (pretend.sent > sent) == planted
        sent = pretend.sent
        torch._foreach_copy_(
            [cuda_images(1), cuda_images(1)], [torch.zeros(1, 1, 8, 8), cuda_images(1)]
        )
        assert pretend.sent == sent + 1


def test_the_fake_gpu_leaves_the_cpu_alone():
    with PretendCuda():
        assert torch.arange(4).sum().item() == 6 and [1, 2] == torch.tensor([1, 2]).tolist()
        assert not on_cuda(torch.zeros(1)) and on_cuda(torch.zeros(1).to("cuda"))
    with PretendCuda(may_read=True):
        read = (cuda_images(2) + 1).cpu()
        assert type(read) is torch.Tensor and read.shape == (2, 1, 8, 8) and not read.any()
        assert cuda_images(1).sum().item() == 0.0 and (cuda_labels(2) > 0).tolist() == [
            False,
            False,
        ]


# The loss of a training step


@pytest.mark.parametrize("conditional", (False, True), ids=("unconditional", "conditional"))
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_loss_stays_on_the_device(prediction, loss, variance, conditional):
    variants = [dict()]
    if loss == "mse" and variance == "fixed_small" and not conditional:
        variants.append(dict(min_snr_gamma=5.0))
    if prediction != "eps" and conditional:
        variants = [dict(zero_terminal_snr=True, beta_schedule="cosine")]
    with PretendCuda() as pretend:
        x0, t, y = cuda_images(4), cuda_labels(4), cuda_labels(4) if conditional else None
        references = (
            (cuda_images(3), cuda_labels(3) if conditional else None) if loss == "mse" else None
        )
        for settings in variants:
            ddpm = tiny(
                conditional, prediction=prediction, loss=loss, variance=variance, **settings
            ).train()
            sent = pretend.sent
            losses = ddpm(x0, y, t=t, references=references, reduction="none")
            assert (
                losses.shape == (4,)
                and on_cuda(losses)
                and losses.dtype == torch.float32
                and losses.requires_grad
            )
            assert pretend.sent == sent


def test_what_the_loss_draws_is_on_the_device():
    with PretendCuda() as pretend:
        ddpm, x0 = tiny(min_snr_gamma=5.0), cuda_images(4)
        sent = pretend.sent
        for mode in (True, False):
            ddpm.train(mode)
            for y in (None, cuda_labels(4)):
                assert on_cuda(
                    ddpm(x0, y), ddpm(x0, y, eps=torch.ones_like(x0), references=(x0, y))
                )
        assert pretend.sent == sent
        assert (
            on_cuda(ddpm(x0, [0, 1, 2, 10])) and pretend.sent == sent + 1
        )  # this list has to be sent


@pytest.mark.parametrize("sampling", TIMESTEP_SAMPLINGS)
def test_every_sampling_of_timesteps_stays_on_the_device(sampling):
    with PretendCuda() as pretend:
        ddpm, timesteps = tiny(), make_timesteps(sampling, 8, device="cuda")
        sent = pretend.sent
        for n in (16, 5):
            t, weights = timesteps.sample(n)
            assert on_cuda(t, weights) and t.dtype == torch.int64 and weights.dtype == torch.float32
            losses = ddpm(cuda_images(n), cuda_labels(n), t=t, reduction="none")
            assert on_cuda(weights * losses)
            timesteps.update(t, losses.detach())
        assert pretend.sent == sent and on_cuda(*timesteps.buffers())


def test_the_unet_computes_in_bf16_on_the_device():
    """`train_eval.build` and `machine.autocast` as a run has them; weights are channels-last."""
    config = configure(
        "--device",
        "cuda",
        "--bf16",
        "--use_conditional_generation",
        "--adaptive_norm",
        "--variance",
        "learned",
        "--loss",
        "mse",
        "--timestep_sampling",
        "uniform",
    )
    seen = {}
    with PretendCuda() as pretend:
        ddpm = train_eval.build(config)
        assert on_cuda(*ddpm.parameters(), *ddpm.buffers()) and ddpm.device.type == "cuda"
        assert ddpm.network.middle[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
        for name in ("conv_in", "norm_out"):
            getattr(ddpm.network, name).register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: output.dtype})
            )
        x0, sent = cuda_images(4, 3), pretend.sent
        with machine.autocast(config):
            losses = ddpm(
                x0, cuda_labels(4), references=(x0[:, :1], cuda_labels(4)), reduction="none"
            )
            assert on_cuda(ddpm.network(x0, cuda_labels(4)))  # no label for all
            assert (
                ddpm.posterior_mean(x0, cuda_labels(4), x0[:, :1]).dtype == torch.float32
            )  # bf16 is too coarse
        assert seen == {
            "conv_in": torch.bfloat16,
            "norm_out": torch.float32,
        }  # norms are float32 by autocast's rule
        assert on_cuda(losses) and losses.dtype == torch.float32 and pretend.sent == sent


# Whole training steps


@contextmanager
def without_backward_pass(ddpm):
    """Autograd's threads ask for a real device, so `backward` writes zeros as gradients instead."""

    def backward(self):
        assert self.requires_grad and self.shape == ()
        for p in ddpm.parameters():
            p.grad = torch.zeros_like(p)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        yield


def cuda_split(n, channels=1, augment=True):
    return Images(
        "glyphs",
        torch.zeros(n, 8, 8, dtype=torch.uint8),
        torch.arange(n) % 10,
        channels,
        augment,
        0,
        "cuda",
    )


@pytest.mark.parametrize(
    "sampling, conditional",
    list(zip(TIMESTEP_SAMPLINGS, (*CONDITIONAL, CONDITIONAL[1]))),
    ids=TIMESTEP_SAMPLINGS,
)
def test_training_steps_never_wait_for_the_device(sampling, conditional, monkeypatch):
    """`train_eval.train_step` with AdamW, schedules, EMA over its start, references, augmentation and statistics."""
    config = configure(
        "--device",
        "cuda",
        "--no-bf16",
        *conditional,
        "--timestep_sampling",
        sampling,
        "--target_references",
        "6",
        "--prediction",
        "x0",
        "--loss",
        "mse",
        "--variance",
        "fixed_small",
        "--epochs",
        "1",
        "--ema_start",
        "1",
        "--use_augmentation",
        "--warmup_steps",
        "1",
        *ONE_LEVEL,
    )
    train, test = None, None
    monkeypatch.setattr(train_eval, "load_images", lambda config: (train, test))
    with PretendCuda(
        may_read=True
    ) as pretend:  # `prepare` reads one value, to see whether the device works
        train, test = (
            cuda_split(24, config.channels),
            cuda_split(10, config.channels, augment=False),
        )
        run = train_eval.prepare(config)
        stats = RunningStats(config)
        assert on_cuda(stats.steps, stats.quartiles, *run.ema.shadow)
        pretend.may_read = False
        with without_backward_pass(run.ddpm):
            batches = train.epoch(config.batch_size, 0)
            first = next(batches)  # it sends the order of the epoch
            sent = pretend.sent
            for i, (x0, y) in enumerate([first, *batches]):
                assert on_cuda(x0, y) and len(x0) == (16, 8)[i]
                references = train_eval.draw_references(config, train)
                result = train_eval.train_step(config, run.ddpm, run.state, x0, y, references)
                assert on_cuda(*result)
                stats.add(*result)
            assert pretend.sent == sent and run.ema.step == 2
        pretend.may_read = True
        assert stats.read(2, 0.1)["train/batch_loss"] == 0


def test_the_ema_stays_on_the_device():
    class Normed(Tiny):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)  # its running statistics are buffers

    with PretendCuda() as pretend:
        network = Normed().to("cuda")
        ema, sent = EMA(network, decay=0.9, start=1, update_rate=2), pretend.sent
        for _ in range(4):  # a copy, a step between updates, and averages
            ema.update()
        with ema.applied():
            assert on_cuda(
                network(cuda_images(2), cuda_labels(2)), *network.parameters(), *network.buffers()
            )
        state = ema.state_dict()
        assert (
            on_cuda(*state["shadow"].values(), *state["buffers"].values())
            and len(state["buffers"]) == 3
        )
        ema.load_state_dict(state)
        assert ema.step == 4 and pretend.sent == sent
        on_cpu = Normed()
        saved = EMA(on_cpu, decay=0.9).state_dict()
        ema.load_state_dict(saved)  # as from a checkpoint, which is read to the CPU
        assert on_cuda(*ema.shadow, *ema.buffers) and pretend.sent > sent
        follower = EMA(on_cpu)
        on_cpu.to("cuda")
        follower.parameters = list(
            on_cpu.parameters()
        )  # fake parameters are new objects, real ones stay the same
        follower.update()
        assert on_cuda(*follower.shadow)


@pytest.mark.parametrize("augment", (False, True))
@pytest.mark.parametrize("channels", (1, 3))
def test_images_stay_on_the_device(channels, augment):
    with PretendCuda() as pretend:
        images = cuda_split(20, channels, augment)
        sent = pretend.sent
        for index, n in ((slice(3), 3), (cuda_labels(5), 5)):
            x0, y = images.batch(index)
            assert on_cuda(x0, y) and x0.shape == (n, channels, 8, 8) and y.shape == (n,)
        assert pretend.sent == sent
        for index in ([1, 2], torch.tensor([1, 2])):  # these have to be sent
            assert on_cuda(*images.batch(index))
        sent = pretend.sent
        batches = list(images.epoch(8, 1, start=1))
        assert [len(x0) for x0, _ in batches] == [8, 4] and all(
            on_cuda(*batch) for batch in batches
        )
        assert pretend.sent == sent + 1  # the order of the whole epoch


# Sampling


def batch_sizes(ddpm):
    """A list that gets the number of images of every call of the network from now on."""
    seen = []
    ddpm.network.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(
    "sampler, variance", list(zip(SAMPLERS, ("learned", "fixed_small", "fixed_large", "learned")))
)
def test_samplers_never_wait_for_the_device(sampler, variance):
    with PretendCuda() as pretend:
        ddpm, y = tiny(sampler=sampler, variance=variance, prediction="v"), cuda_labels(5)
        sent = pretend.sent
        for options in (
            dict(steps=3),
            dict(y=y, guidance_scale=2.0, eta=0.5, seed=1),
            dict(y=y, guidance_scale=0, xT=cuda_images(5), start=5, seed=torch.Generator("cuda")),
        ):
            images = ddpm.sample(5, **dict(steps=2) | options)
            assert (
                on_cuda(images) and images.shape == (5, 1, 8, 8) and images.dtype == torch.float32
            )
        calls = batch_sizes(ddpm)
        images = ddpm.sample(5, y, steps=2, guidance_scale=2.0, batch_size=2, return_sequence=True)
        assert on_cuda(images) and images.shape == (2, 5, 1, 8, 8) and calls == [4, 4, 2] * 2
        assert pretend.sent == sent


@pytest.mark.parametrize(
    "options",
    (
        dict(y=[0, 1, 2, 3, 4]),
        dict(y=3),
        dict(y=range(5)),
        dict(y=torch.arange(5)),
        dict(xT=torch.zeros(5, 1, 8, 8, dtype=torch.float64)),
    ),
    ids=("list", "number", "range", "tensor", "xT"),
)
def test_what_lies_on_the_cpu_is_sent_before_sampling(options):
    with PretendCuda() as pretend:
        ddpm = tiny()
        sent = pretend.sent
        assert on_cuda(ddpm.sample(5, steps=1, **options)) and pretend.sent == sent + 1
        with pytest.raises(ValueError, match="expected labels from 0 to 9"):
            ddpm.sample(2, [0, 10])


def test_an_unconditional_model_samples_on_the_device():
    with PretendCuda() as pretend:
        ddpm = tiny(conditional=False, timestep_spacing="linspace", sample_steps=2)
        sent = pretend.sent
        assert on_cuda(
            ddpm.sample(3, seed=0), ddpm.interpolate(cuda_images(2), cuda_images(2), [0.5], 4)
        )
        assert pretend.sent == sent
        with pytest.raises(ValueError, match="seed: a generator on cpu; expected one on cuda"):
            ddpm.sample(3, seed=torch.Generator("cpu"))


def test_the_unet_samples_on_the_device():
    """As a run draws its grids: labels from the CPU, guidance, bf16."""
    config = configure(
        "--device",
        "cuda",
        "--bf16",
        "--use_conditional_generation",
        "--guidance_scale",
        "2",
        "--sampler",
        "sde-dpm++",
        "--no-adaptive_norm",
    )
    with PretendCuda():
        images, y = train_eval.draw(
            config, train_eval.build(config), 12, **train_eval.sampling(config)
        )
        assert on_cuda(images) and images.dtype == torch.float32 and len(y) == 12


def test_interpolation_and_prediction_stay_on_the_device():
    with PretendCuda() as pretend:
        ddpm = tiny()
        x0, y, sent = cuda_images(2), cuda_labels(2), pretend.sent
        for options in (dict(steps=1), dict(y=y, guidance_scale=2.0, seed=3, steps=2, eta=0.5)):
            images = ddpm.interpolate(x0, x0 + 1, [0, 0.5, 1], 4, **options)
            assert on_cuda(images) and images.shape == (3, 2, 1, 8, 8)
        assert on_cuda(
            *ddpm.predict(x0, y, y, 2.0), *ddpm.predict(x0, y), *ddpm.p_mean_variance(x0, y, y)
        )
        assert pretend.sent == sent
        assert on_cuda(
            ddpm.interpolate(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8), [0.5], 4, 1, steps=1)
        )
        assert on_cuda(ddpm.interpolate(x0, torch.ones(2, 1, 8, 8), [0.5], 4, [1, 2], steps=1))


# Evaluation: it reads values from the device, so here they are zeros


def test_bits_per_dim_mixes_no_devices():
    with PretendCuda(may_read=True) as pretend:
        ddpm = tiny(variance="learned")
        sent = pretend.sent
        for options in (dict(terms=2), dict(y=cuda_labels(5), terms=2, seed=1, batch_size=3)):
            bits = ddpm.bits_per_dim(cuda_images(5), **options)
            assert bits.rate.device.type == bits.rmse.device.type == "cpu" and isinstance(
                bits.total, float
            )
        assert pretend.sent == sent
        ddpm.bits_per_dim(
            torch.zeros(5, 1, 8, 8), [0, 1, 2, 3, 4], terms=2, batch_size=3
        )  # these have to be sent
        pretend.may_read = False
        with pytest.raises(WouldWait) as caught:  # the first value is read when all terms are there
            ddpm.bits_per_dim(cuda_images(5), terms=2)
        assert any(
            ".item()" in str(entry.statement)
            for entry in caught.traceback
            if entry.name == "bits_per_dim"
        )


def test_an_evaluation_mixes_no_devices(tmp_path):
    config = configure(
        "--device",
        "cuda",
        "--no-bf16",
        "--use_conditional_generation",
        "--bound_terms",
        "2",
        *ONE_LEVEL,
    )
    with PretendCuda(may_read=True):
        ddpm, images = train_eval.build(config), cuda_split(20, config.channels, augment=False)
        assert isinstance(train_eval.test_loss(config, ddpm, images), float)
        assert isinstance(train_eval.bits_per_dim(config, ddpm, images).total, float)
        samples, _ = train_eval.draw(config, ddpm, 6, sampler="ddim", steps=2)
        write_grid(samples, tmp_path / "grid.png")
        assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_metrics_mix_no_devices(device):
    """Samples on either device, real images on the GPU. All of `measure` runs, on features that read as zeros."""
    with PretendCuda(may_read=True):
        classifier = metrics.Classifier(10).to("cuda")
        samples = torch.zeros(70, 1, 8, 8, dtype=torch.uint8, device=device)
        train, test = (torch.zeros(n, 8, 8, dtype=torch.uint8, device="cuda") for n in (90, 80))
        for found in (*classifier.read(samples, batch_size=30), *metrics.nearest(samples, train)):
            assert found.device.type == "cpu" and len(found) == 70
        assert classifier.accuracy(test, cuda_labels(80)) == 1.0
        report, pairs = metrics.measure(
            classifier, samples, train, test, torch.zeros(70, dtype=torch.long)
        )
        assert (
            report["frechet"] == 0 and report["accuracy"] == 1.0 and pairs.shape == (20, 1, 32, 32)
        )
        assert (
            metrics.measure(classifier, samples, train, test, cuda_labels(70))[0]["accuracy"] == 1.0
        )
        train, test = (
            Images("mnist", x, torch.zeros(len(x), dtype=torch.long), device="cuda")
            for x in (train, test)
        )
        assert metrics.FrechetMeter(classifier, test.few(70), train.few(70))(samples) == 0
        features = torch.zeros(9, 4, device="cuda")
        for a, b in ((features, features.cpu()), (features.cpu(), features)):
            assert metrics.frechet_distance(a, b) == 0 and metrics.precision_recall(a, b)


def test_the_classifier_trains_on_the_device(monkeypatch):
    """All but its backward pass, and the state of CUDA's random generator, which the driver keeps."""
    forked = []

    @contextmanager
    def fork_rng(devices):
        forked.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    with PretendCuda(may_read=True):
        classifier = metrics.train_classifier(
            torch.zeros(140, 8, 8, dtype=torch.uint8, device="cuda"),
            cuda_labels(140),
            device="cuda",
            epochs=1,
        )
        assert on_cuda(*classifier.parameters(), *classifier.buffers()) and forked == [["cuda"]]


# torch.compile


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that runs the graphs as they are. `graphs` lists what each is for: 'training' or 'inference'.

    If `broken` is one of these two, the compiler fails for such graphs.
    """
    found = SimpleNamespace(graphs=[], broken=None)

    def backend(graph, inputs):
        kind = "training" if torch.is_grad_enabled() else "inference"
        if kind == found.broken:
            raise RuntimeError("no such graph\nlong story")
        found.graphs.append(kind)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield found
    torch._dynamo.reset()


UNETS = {
    "added time": dict(image_size=4, channel_mult=(1,), attention_resolutions=(4,)),
    "adaptive norm, labels, heads, RGB, two levels": dict(
        num_classes=10, adaptive_norm=True, num_heads=2, channels=3, out_channels=6, patch_size=2
    ),
}


@pytest.mark.parametrize("kind", UNETS)
def test_the_network_has_no_graph_break(kind):
    """`fullgraph` raises at a break. And a graph that is made for any number of images has to fit every number."""
    settings = (
        dict(
            image_size=8,
            channels=1,
            base_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            time_emb_dim=8,
            attention_resolutions=(2,),
            dropout=0.0,
        )
        | UNETS[kind]
    )
    torch.manual_seed(0)
    network, graphs = UNet(**settings), []
    nn.init.normal_(network.conv_out.weight)
    torch._dynamo.reset()
    compiled = torch.compile(
        network, fullgraph=True, backend=lambda graph, inputs: (graphs.append(1), graph.forward)[1]
    )
    any_number = kind == "added time"
    with torch.set_grad_enabled(not any_number):
        for n in (3, 2, 5) if any_number else (3,):
            xt, t = (
                torch.randn(n, settings["channels"], *2 * [settings["image_size"]]),
                torch.arange(n),
            )
            if any_number:
                torch._dynamo.mark_dynamic(xt, 0), torch._dynamo.mark_dynamic(t, 0)
            y = t + 8 if network.num_classes else None
            torch.testing.assert_close(compiled(xt, t, y), network(xt, t, y))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_planted_graph_break_is_found(compiler):
    class Broken(Tiny):
        def forward(self, xt, t, y=None):
            h = super().forward(xt, t, y)
            return h if h.sum() > 0 else -h  # the compiler cannot know which

    network = Broken()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(network, backend="eager", fullgraph=True)(
            torch.ones(2, 1, 8, 8), torch.arange(2)
        )
    torch._dynamo.reset()
    network.compile()
    network(torch.ones(2, 1, 8, 8), torch.arange(2))
    assert len(compiler.graphs) > 1


def compiled_model(*flags):
    """A config for the CPU, and a model that compiles at once: what is compiled again depends on the inputs alone."""
    config = configure("--device", "cpu", "--use_compile", *flags)
    network = Tiny(
        config.channels, config.channels, 10 if config.use_conditional_generation else None
    )
    ddpm = DDPM(
        network,
        image_size=8,
        channels=config.channels,
        num_timesteps=8,
        guidance_scale=config.guidance_scale,
    )
    return config, machine.place(ddpm, config)


def cpu_split(n, channels):
    return Images(
        "glyphs", torch.randint(256, (n, 8, 8), dtype=torch.uint8), torch.arange(n) % 10, channels
    )


def a_training_state(config, ddpm):
    return {
        "optimizer": torch.optim.AdamW(ddpm.parameters(), fused=True),
        "ema": EMA(ddpm.network, start=0),
        "timesteps": make_timesteps("uniform", config.num_timesteps),
    }


def evaluate(config, ddpm):
    """All that the network is asked for after training: batches of 256 and the rest, grids of 100, few samples."""
    images = cpu_split(300, config.channels)
    train_eval.draw(config, ddpm, 100, sampler="ddim", steps=2)
    train_eval.test_loss(config, ddpm, images)
    train_eval.draw(config, ddpm, 300, sampler="ddim", steps=2)
    train_eval.draw(config, ddpm, 100, **train_eval.sampling(config))
    train_eval.bits_per_dim(config, ddpm, images)


@pytest.mark.parametrize(
    "flags",
    (
        "--no-bf16 --channels 1 --use_conditional_generation --guidance_scale 1",
        "--no-bf16 --channels 3 --no-use_conditional_generation --num_clusters 0 --guidance_scale 1",
        "--bf16 --channels 3 --use_conditional_generation --guidance_scale 2",
    ),
)
def test_a_run_compiles_no_more_graphs_than_it_needs(flags, compiler):
    """Each graph costs a large network a minute, and after eight of them torch stops compiling.

    Training needs two: one for full batches, and one of any size once the last batch of an epoch is smaller.
    Inference needs one. When it is first compiled, torch has seen another batch size in training and makes a graph
    for any size. Neither what the batch is for nor the step of a sampler may ask for another.
    """
    config, ddpm = compiled_model(*flags.split())
    machine.compile_network(config, ddpm)
    assert compiler.graphs == ["training", "inference"]
    state = a_training_state(config, ddpm)
    for epoch in range(2):
        for x0, y in cpu_split(40, config.channels).epoch(config.batch_size, epoch):
            train_eval.train_step(config, ddpm, state, x0, y)
        if epoch == 0:
            with state["ema"].applied():
                evaluate(config, ddpm)
    assert compiler.graphs == ["training", "inference", "training"]


@pytest.mark.parametrize(
    "flags",
    (
        "--no-use_conditional_generation --num_clusters 0 --guidance_scale 1",
        "--use_conditional_generation --guidance_scale 2",
    ),
)
def test_an_evaluation_compiles_no_more_graphs_than_it_needs(flags, compiler):
    """Two: one for the size of a grid, and one for any size when the next size comes."""
    config, ddpm = compiled_model("--no-bf16", *flags.split())
    machine.compile_network(config, ddpm.eval(), training=False)
    assert compiler.graphs == ["inference"] and not ddpm.training
    evaluate(config, ddpm)
    assert compiler.graphs == ["inference", "inference"]


@pytest.mark.parametrize("broken", ("training", "inference"))
def test_a_compiler_that_fails_for_some_graphs_costs_a_line(broken, compiler, capsys):
    config, ddpm = compiled_model("--use_conditional_generation")
    compiler.broken = broken
    machine.compile_network(config, ddpm)
    line = capsys.readouterr().err
    assert line.startswith("torch.compile failed (") and line.endswith(
        "); going on without it\n"
    ), line
    assert (
        line.count("\n") == 1 and ddpm.training and all(p.grad is None for p in ddpm.parameters())
    )
    assert compiler.graphs == (["training"] if broken == "inference" else [])
    x0, y = torch.rand(16, 3, 8, 8), torch.arange(16) % 10
    train_eval.train_step(config, ddpm, a_training_state(config, ddpm), x0, y)
    assert ddpm.sample(2, y=1, steps=2).isfinite().all()
    assert len(compiler.graphs) == (broken == "inference")  # nothing more was compiled


def test_an_evaluation_tries_no_graph_of_training(compiler, capsys):
    config, ddpm = compiled_model(*CONDITIONAL[0])
    compiler.broken = "training"
    machine.compile_network(config, ddpm.eval(), training=False)
    assert ddpm.sample(100, steps=2).isfinite().all() and set(compiler.graphs) == {"inference"}
    assert capsys.readouterr().err == "" and all(p.grad is None for p in ddpm.parameters())


def test_nothing_is_compiled_unless_the_config_says_so(compiler):
    config, ddpm = compiled_model("--no-use_compile", *CONDITIONAL[0])
    machine.compile_network(config, ddpm)
    ddpm.sample(2, steps=1)
    assert not compiler.graphs


# The parts of support/machine.py


def test_bf16_is_asked_of_the_device_in_question(monkeypatch):
    current, asked = ["cuda:0"], []

    @contextmanager
    def device(name):
        before, current[0] = current[0], str(name)
        yield
        current[0] = before

    def is_bf16_supported(including_emulation=True):
        asked.append(including_emulation)
        return current[0] == "cuda:1"

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert machine.has_bf16("cuda:1") and not machine.has_bf16("cuda:0")
    assert machine.has_bf16(torch.device("cuda", 1)) and current == ["cuda:0"]
    assert asked == [False] * 3  # emulated bf16 is slower than float32


@pytest.mark.parametrize(
    "bf16, units, words",
    [
        (True, True, "bf16, which this device has units for"),
        (
            True,
            False,
            "bf16, as asked; --no-bf16 is faster without units for it, and beside other programs",
        ),
        (False, True, "fp32, as asked"),
        (False, False, "fp32, since bf16 does not pay on this device"),
    ],
)
def test_the_precision_is_said_with_its_reason(bf16, units, words, monkeypatch):
    monkeypatch.setattr(machine, "has_bf16", lambda device: units)
    assert machine.describe_precision(argparse.Namespace(device="cpu", bf16=bf16)) == words


def test_bf16_of_a_cpu_or_of_no_device(monkeypatch):
    for found, expected in (
        ({"amx_bf16": True}, True),
        ({"amx_bf16": False}, False),
        ({}, False),
        ({"amx_bf16": False, "avx512_bf16": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert machine.has_bf16("cpu") is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert machine.has_bf16("cpu") is False

    def no_driver(name):
        raise RuntimeError("no NVIDIA driver")

    monkeypatch.setattr(torch.cuda, "device", no_driver)
    assert machine.has_bf16("cuda") is False


def test_a_device_that_cannot_be_used_is_refused_in_one_line(monkeypatch):
    machine.check_device("cpu")
    with PretendCuda(may_read=True):
        machine.check_device("cuda:1")
    for device in ("meta", "toaster"):  # 'meta' has no values to read
        with pytest.raises(
            ValueError, match=f"^device '{device}': cannot be used here .*; try --device cpu$"
        ):
            machine.check_device(device)

    def no_float64(*size, **options):
        raise TypeError("no float64 here\nstack of C++ calls")

    monkeypatch.setattr(torch, "zeros", no_float64)
    with pytest.raises(ValueError) as caught:
        machine.check_device("mps")
    assert (
        str(caught.value) == "device 'mps': cannot be used here (no float64 here); try --device cpu"
    )


def test_generators():
    generator = torch.Generator("cpu")
    assert make_generator(None, "cpu") is None and make_generator(generator, "cpu") is generator
    with pytest.raises(ValueError, match="^seed: a generator on cpu; expected one on cuda:1$"):
        make_generator(generator, "cuda:1")
    numbers = [
        torch.rand(3, generator=make_generator(seed, "cpu")) for seed in (7, 7, 8, 2**32 - 1)
    ]
    assert torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[0], numbers[2])
    assert make_generator(0, "cuda:1").device == torch.device("cuda:1")
    for seed in (-1, 2**32, 1.0, "1", True, [1]):
        with pytest.raises(
            ValueError, match="^seed .*: expected (a whole number|from 0 to 4294967295)$"
        ):
            make_generator(seed, "cpu")


@pytest.mark.parametrize(
    "device, bf16, channels_last",
    (("cpu", False, False), ("cpu", True, False), ("cuda", False, True), ("cuda:1", True, True)),
)
def test_a_module_is_placed_in_its_fast_layout(device, bf16, channels_last):
    config = SimpleNamespace(device=device, bf16=bf16)
    with PretendCuda():
        module = nn.Conv2d(3, 4, 3)
        assert machine.place(module, config) is module
        assert module.weight.device.type == torch.device(device).type
        assert module.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert module.weight.is_contiguous() != channels_last
    with machine.autocast(config):
        assert torch.is_autocast_enabled(torch.device(device).type) == bf16
        assert torch.get_autocast_dtype(torch.device(device).type) == torch.bfloat16 or not bf16


@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))
def test_the_first_signal_is_a_request_and_the_second_ends_the_run(signum, capfd):
    before = signal.getsignal(signum)
    with machine.Interrupt() as interrupt, interrupt.after_the_step():
        assert interrupt.asked() is None
        signal.raise_signal(signum)
        assert interrupt.asked() == interrupt.asked() == "stop" and interrupt.status == 128 + signum
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
    assert signal.getsignal(signum) is before
    assert capfd.readouterr().err.count("stopping after this step") == 1
    with (
        machine.Interrupt() as interrupt,
        pytest.raises(KeyboardInterrupt),
    ):  # while nothing is trained
        signal.raise_signal(signum)
    assert interrupt.status == 128 + signum


def test_an_error_leaves_the_handlers_as_they_were():
    before = signal.getsignal(signal.SIGINT)  # a shell ignores it in what it runs in the background
    with (
        pytest.raises(ZeroDivisionError),
        machine.Interrupt() as interrupt,
        interrupt.after_the_step(),
    ):
        1 / 0  # noqa: B018
    assert interrupt.immediate
    with pytest.raises(ZeroDivisionError), machine.Interrupt():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no such signal")
def test_a_save_is_asked_for_once_and_a_stop_comes_first():
    with machine.Interrupt() as interrupt, interrupt.after_the_step():
        signal.raise_signal(signal.SIGUSR1)
        assert interrupt.asked() == "save" and interrupt.asked() is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked() == "stop" and interrupt.status == 143


def test_what_may_fail_costs_a_line(capsys):
    with machine.warning_if_it_fails("a grid of samples"):
        raise RuntimeError("\n  out of paint\nstack of C++ calls")
    assert capsys.readouterr().err == (
        "\na grid of samples failed (RuntimeError: out of paint); the run goes on without it\n"
    )
    with machine.warning_if_it_fails("nothing"):
        pass
    for error in (KeyboardInterrupt, SystemExit):  # these are for the run itself
        with pytest.raises(error), machine.warning_if_it_fails("a grid of samples"):
            raise error
    with machine.warning_if_it_fails("a grid of samples"):  # the same again is not said again
        raise RuntimeError("out of paint")
    assert capsys.readouterr().err == ""
    assert machine.in_one_line(ValueError()) == "ValueError: "


def test_a_full_disk_or_gpu_ends_the_run_in_one_line():
    for error, message in (
        (
            OSError(28, "No space left on device"),
            "train_eval.py: [Errno 28] No space left on device; what was saved before is whole",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nmore"),
            "train_eval.py: out of memory (OutOfMemoryError: CUDA out of memory.); try a smaller --batch_size or "
            "--base_channels",
        ),
        (
            MemoryError(),
            "train_eval.py: out of memory (MemoryError: ); try a smaller --batch_size or "
            "--base_channels",
        ),
    ):
        with pytest.raises(SystemExit) as caught, machine.errors_in_one_line():
            raise error
        assert caught.value.code == message
    with pytest.raises(
        SystemExit, match="out of memory .RuntimeError: .*can't allocate memory.*--batch_size"
    ):
        with machine.errors_in_one_line():
            torch.empty(10**15)  # torch's own words on a CPU
    with pytest.raises(RuntimeError, match="^size mismatch$"), machine.errors_in_one_line():
        raise RuntimeError("size mismatch")
    with pytest.raises(ZeroDivisionError), machine.errors_in_one_line():
        1 / 0  # noqa: B018


def test_interrupts_outside_the_main_thread_are_left_to_the_main_one():
    found = []

    def elsewhere():
        with machine.Interrupt() as interrupt:
            found.append((interrupt.asked(), signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [(None, before)] and signal.getsignal(signal.SIGINT) is before


def test_the_process_is_prepared_on_any_console(monkeypatch):
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    asked = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: asked.append("memory"))
    monkeypatch.setattr(
        sys, "stdout", SimpleNamespace(reconfigure=lambda **options: asked.append(options))
    )
    monkeypatch.setattr(sys, "stderr", object())  # a stream of somebody else's making
    try:
        machine.prepare_process()
        assert (
            asked == ["memory", {"errors": "replace"}]
            and torch.get_float32_matmul_precision() == "high"
        )
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
