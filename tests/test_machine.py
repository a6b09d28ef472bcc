"""Faults that only a GPU would show, found on any machine; torch.compile; support/machine.py.

On a pretended GPU (`PretendCuda`) tensors have a shape and a device but no values. An operation on
tensors of two devices raises there, and so does one that would wait for the GPU. Three things need
a real GPU: kernels, the backward pass, and CUDA's own random generators.
"""

import argparse
import ctypes
import functools
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import configured
from tiny import FLAGS, tiny_ddpm, tiny_unet
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import metrics
import train_eval
from dataprocess import Images
from diffusion import LOSSES, SAMPLERS
from ema import EMA
from process import PREDICTIONS, VARIANCES, GaussianProcess
from support import checks, configurator, machine, processes
from timesteps import TIMESTEP_SAMPLINGS
from unet import UNet

# The pretended GPU


class WouldWait(RuntimeError):
    """The program would wait for the GPU here."""


class PretendCuda(TorchDispatchMode):
    """Inside, 'cuda' is a device on any machine. Tensors on the CPU stay real.

    Besides torch's own checks of fake tensors, two tensors of different devices meet only in a
    copy. (A CPU tensor without dimensions is a plain number to a GPU, so it may meet any tensor.)

    Args:
        may_read: let values come to the CPU: zeros, and True for truths. Without it, that raises
            `WouldWait`.

    Attributes:
        sent: number of tensors copied from the CPU to the device. On a real GPU each of these
            copies waits too.
    """

    ATEN = torch.ops.aten
    COPIES = ATEN._to_copy.default, ATEN.copy_.default, ATEN._foreach_copy_.default
    LOOKUPS = ATEN.index.Tensor, ATEN.index_put_.default  # they send an index from the CPU

    def __init__(self, may_read=False):
        if torch.version.cuda and torch.__version__ < "2.14":
            pytest.skip("this torch asks for NVIDIA's driver even for fake tensors")
        super().__init__()
        self.may_read, self.sent = may_read, 0
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.fake.__exit__(*exception)

    @contextmanager
    def sending(self, number=0):
        """Inside, so many tensors must be copied to the device."""
        before = self.sent
        yield
        assert self.sent == before + number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or is_cuda(x) for x in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        generators = [x for x in leaves if isinstance(x, torch._C.Generator)]
        if any(PretendGenerator.device_of(x).type != "cuda" for x in generators):
            raise RuntimeError(f"{func}: a generator and a tensor on different devices")
        if func in self.LOOKUPS and args[0].device.type == "cuda":
            leaves, indices = tree_leaves((args[0], args[2:], kwargs)), tree_leaves(args[1])
            self.sent += sum(x.device.type == "cpu" for x in indices if x is not None)
        here = {x.device.type for x in leaves if isinstance(x, torch.Tensor) and x.ndim}
        if func not in self.COPIES and len(here) > 1:
            raise RuntimeError(f"{func}: tensors on different devices")
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            if not self.may_read:
                raise WouldWait(f"{func}: the program needs a value from the device") from error
            with unset_fake_temporarily():
                found = func(*tree_map(as_read, args), **kwargs)
            tensor = isinstance(found, torch.Tensor)
            return torch.empty_like(found, device="cuda") if tensor else found
        return self._copied(func, args, result) if func in self.COPIES else result

    def _copied(self, func, args, result):
        """The result of a copy, after a look at where it came from and where it went."""
        if func is self.ATEN._to_copy.default:
            pairs = [(result, args[0])]
        else:
            pairs = [args[:2]] if isinstance(args[0], torch.Tensor) else list(zip(*args[:2]))
        for target, source in pairs:
            if target.device.type == "cpu" and source.device.type == "cuda":
                if not self.may_read:
                    raise WouldWait(f"{func}: from the device to the CPU")
                if func is self.ATEN._to_copy.default:
                    return as_read(target)
            self.sent += source.device.type == "cpu" and target.device.type == "cuda"
        return result


def is_cuda(x):
    return isinstance(x, torch.device) and x.type == "cuda"


def as_read(x):
    """What the program sees when it reads a tensor of the pretended device."""
    if not isinstance(x, FakeTensor):
        return x
    with unset_fake_temporarily():
        return torch.full(x.shape, x.dtype == torch.bool, dtype=x.dtype)


class PretendGenerator(torch.Generator):
    """A generator that says it is on the device it was made for. CUDA's own need a driver."""

    devices = {}

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        cls.devices[self._cdata] = torch.device(device)
        return self

    @classmethod
    def device_of(cls, generator):
        """The device of a generator; operations get another Python object of the same one."""
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
    """A DDPM of a `Tiny`, with ten timesteps and grey images of 8x8 pixels, on the device."""
    outputs = 2 if settings.get("variance") == "learned" else 1
    network = Tiny(1, outputs, 10 if conditional else None)
    return tiny_ddpm(network=network, **settings).to("cuda")


def cuda_images(n, channels=1, size=8):
    return torch.zeros(n, channels, size, size, device="cuda")


def cuda_labels(n):
    return torch.zeros(n, dtype=torch.long, device="cuda")


def split(n, device="cuda", size=16, **options):
    """`Images` of so many grey pictures, on a device."""
    images = torch.randint(256, (n, size, size), dtype=torch.uint8)
    return Images("mnist", images, torch.arange(n) % 10, device=device, **{"channels": 1} | options)


def on_cuda(*tensors):
    return all(x.device.type == "cuda" for x in tensors)


def configure(flags, device="cuda"):
    """The constants of the smallest run by the quick recipe."""
    return configured(*FLAGS, "--device", device, "--recipe", "quick", *flags.split()).config


def prepare(config, monkeypatch, n=12):
    """`train_eval.prepare` with so many images, and the model as a run trains it."""
    options = dict(device=config.device, channels=config.channels)
    splits = split(n, augment=config.use_augmentation, **options), split(10, **options)
    monkeypatch.setattr(train_eval, "load_images", lambda config: splits)
    run = train_eval.prepare(config, {})
    return run, processes.parallel(run.ddpm).train()


# Faults that a person might make: the pretended GPU must see them


def plant(monkeypatch, table):
    """Have `GaussianProcess.alpha_bar` look up its table in another way."""
    monkeypatch.setattr(
        GaussianProcess, "alpha_bar", lambda self, t: table(self, t)[:, None, None, None]
    )


WAITS = {
    "item": lambda self, t: self.alphas_cumprod[t] * self.betas[0].item(),
    "tolist": lambda self, t: self.alphas_cumprod[t] * self.betas.tolist()[0],
    "if": lambda self, t: self.alphas_cumprod[t] if (t >= 0).all() else None,
    "mask": lambda self, t: self.alphas_cumprod[t][t >= 0],
    "cpu": lambda self, t: self.alphas_cumprod.cpu()[t.cpu()].to(t.device),
    "copy": lambda self, t: torch.zeros(len(t), dtype=torch.long).copy_(t).double(),
}
TRANSFERS = {
    "a table": lambda self, t: torch.linspace(0.9, 0.1, 10, dtype=torch.float64).to(t.device)[t],
    "an index": lambda self, t: self.alphas_cumprod[torch.zeros(len(t), dtype=torch.long)],
    "a new tensor": lambda self, t: torch.empty(len(t), device=t.device).copy_(torch.ones(len(t))),
}
MIXTURES = {
    "a table left on the CPU": lambda self, t: torch.linspace(0.9, 0.1, 10)[t],
    "a factor left on the CPU": lambda self, t: self.alphas_cumprod[t] * torch.ones(len(t)),
    "a generator of the CPU": lambda self, t: torch.rand(
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


@pytest.mark.parametrize("fault", TRANSFERS)
def test_a_planted_transfer_to_the_device_is_counted(fault, monkeypatch):
    with PretendCuda() as pretend:
        ddpm = tiny()
        with pretend.sending(0):
            ddpm(cuda_images(4), cuda_labels(4))
        plant(monkeypatch, TRANSFERS[fault])
        with pytest.raises(AssertionError), pretend.sending(0):
            ddpm(cuda_images(4), cuda_labels(4))
        with pretend.sending(1):
            sources = [torch.zeros(1, 1, 8, 8), cuda_images(1)]
            torch._foreach_copy_([cuda_images(1), cuda_images(1)], sources)


def test_the_pretended_gpu_leaves_the_cpu_alone():
    with PretendCuda():
        assert torch.arange(4).sum().item() == 6 and [1, 2] == torch.tensor([1, 2]).tolist()
        assert not on_cuda(torch.zeros(1)) and on_cuda(torch.zeros(1).to("cuda"))
    with PretendCuda(may_read=True):
        read = (cuda_images(2) + 1).cpu()
        assert type(read) is torch.Tensor and read.shape == (2, 1, 8, 8) and not read.any()
        assert cuda_images(1).sum().item() == 0.0 and (cuda_labels(2) > 0).tolist() == [True] * 2
        assert on_cuda(cuda_labels(3)[cuda_labels(3) > 0])


# Training

LATIN_SQUARE = [
    (prediction, loss, [*VARIANCES][(i + j) % 3], (i + j) % 2 == 1)
    for i, prediction in enumerate(PREDICTIONS)
    for j, loss in enumerate(LOSSES)
]


@pytest.mark.parametrize("prediction, loss, variance, conditional", LATIN_SQUARE)
def test_every_loss_stays_on_the_device(prediction, loss, variance, conditional):
    settings = dict(prediction=prediction, loss=loss, variance=variance)
    if prediction != "eps":
        settings |= dict(zero_terminal_snr=True, beta_schedule="cosine")
    elif loss == "mse":
        settings |= dict(min_snr_gamma=5.0)
    with PretendCuda() as pretend:
        ddpm, x0, t = tiny(conditional, **settings).train(), cuda_images(4), cuda_labels(4)
        y, labels = (cuda_labels(4), cuda_labels(7)) if conditional else (None, None)
        candidates = ((x0, cuda_images(3)), labels) if loss == "mse" else None
        with pretend.sending(0):
            losses = ddpm.losses(x0, ddpm.drop_labels(y), t, torch.randn_like(x0), candidates)
            assert on_cuda(losses, ddpm(x0, y)) and losses.requires_grad
        assert losses.shape == (4,) and losses.dtype == torch.float32


def test_the_unet_computes_in_bf16_on_the_device():
    """As `train_eval.build` and `machine.autocast` have it; weights are channels-last."""
    config = configure("--bf16 --variance learned --timestep_sampling uniform")
    seen = {}
    with PretendCuda() as pretend:
        ddpm = train_eval.build(config)
        assert on_cuda(*ddpm.parameters(), *ddpm.buffers()) and ddpm.device.type == "cuda"
        assert ddpm.network.middle[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
        for name in ("conv_in", "norm_out"):
            getattr(ddpm.network, name).register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: output.dtype})
            )
        x0, t = cuda_images(4, size=16), cuda_labels(4)
        with pretend.sending(0), machine.autocast(config):
            losses = ddpm.losses(x0, t, t, x0, ((x0,), t))
            mean = ddpm.posterior_mean(x0, t, x0)
        assert seen == {"conv_in": torch.bfloat16, "norm_out": torch.float32}  # autocast's rule
        assert losses.dtype == mean.dtype == torch.float32  # bf16 would be too coarse


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


LABELLED = "--use_conditional_generation"
CLUSTERS = "--no-use_conditional_generation --num_clusters 3 --grad_accumulation 2"


@pytest.mark.parametrize(
    "sampling, flags", list(zip(TIMESTEP_SAMPLINGS, (LABELLED, LABELLED, CLUSTERS)))
)
def test_training_steps_never_wait_for_the_device(sampling, flags, monkeypatch):
    """`prepare`, then steps with AdamW, the start of the EMA, candidates and statistics."""
    config = configure(f"{flags} --timestep_sampling {sampling} --ema_start 1 --use_augmentation")
    with PretendCuda(may_read=True) as pretend:
        run, model = prepare(config, monkeypatch)
        stats, ema = run.parts["stats"], run.parts["ema"]
        assert on_cuda(stats.steps, stats.quartiles, *ema.shadow.parameters())
        batches = run.train_images.epochs(config.batch_size, 1)
        first = next(batches)  # it sends the order of the epoch
        pretend.may_read = False
        with without_backward_pass(run.ddpm), pretend.sending(0):
            for n, (x0, y) in zip((8, 4), (first, *batches)):
                result = train_eval.train_step(run, model, x0, y, 0.1)
                assert on_cuda(x0, y, *result) and len(x0) == n
                stats.add(*result)
        assert ema.step == stats.count == 2
        pretend.may_read = True
        assert stats.read(2, 0.1)["train/batch_loss"] == 0


def test_the_ema_stays_on_the_device():
    class Normed(Tiny):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)  # its running statistics are buffers

    with PretendCuda() as pretend:
        network = Normed().to("cuda")
        ema = EMA(network, decay=0.9, start=1, update_rate=2)
        with pretend.sending(0):
            for _ in range(4):  # a copy, a step between updates, and averages
                ema.update()
            with ema.applied():
                assert on_cuda(*network.parameters(), *network.buffers())
            ema.load_state_dict(ema.state_dict())
        assert ema.step == 4 and on_cuda(*ema.state_dict()["shadow"].values())
        ema.load_state_dict(EMA(Normed()).state_dict())  # a checkpoint is read to the CPU
        assert on_cuda(*ema.shadow.state_dict().values())


@pytest.mark.parametrize("channels, augment", ((1, True), (3, False)))
def test_images_stay_on_the_device(channels, augment):
    with PretendCuda() as pretend:
        images = split(20, channels=channels, augment=augment)
        with pretend.sending(0):
            for index, n in ((slice(3), 3), (cuda_labels(5), 5)):
                x0, y = images.batch(index)
                assert on_cuda(x0, y) and x0.shape == (n, channels, 16, 16) and y.shape == (n,)
        with pretend.sending(1):  # the order of the whole epoch
            batches = list(images.epoch(8, 1, start=1))
        assert [len(x0) for x0, _ in batches] == [8, 4]
        assert all(on_cuda(*batch) for batch in batches)


# Sampling


@pytest.mark.parametrize(
    "sampler, variance",
    list(zip(SAMPLERS, ("learned", "fixed_small", "fixed_large", "learned"))),
)
def test_samplers_never_wait_for_the_device(sampler, variance):
    with PretendCuda() as pretend:
        ddpm = tiny(sampler=sampler, variance=variance, prediction="v")
        y, generator = cuda_labels(5), torch.Generator("cuda")
        with pretend.sending(0):
            for options in (
                dict(guidance_scale=2.0, eta=0.5, seed=1),
                dict(guidance_scale=0, xT=cuda_images(5), start=5, seed=generator),
            ):
                images = ddpm.sample(5, y, steps=3, **options)
                assert on_cuda(images) and images.shape == (5, 1, 8, 8)
                assert images.dtype == torch.float32
            images = ddpm.sample(5, y, steps=2, return_sequence=True)
            assert on_cuda(images) and images.shape == (2, 5, 1, 8, 8)


def test_what_lies_on_the_cpu_is_sent_once_before_sampling():
    with PretendCuda() as pretend:
        ddpm, noise = tiny(), torch.zeros(5, 1, 8, 8, dtype=torch.float64)
        for y in ([0, 1, 2, 3, 4], 3, range(5), torch.arange(5), None):  # None: it draws labels
            with pretend.sending(1):
                assert on_cuda(ddpm.sample(5, y, steps=1))
        with pretend.sending(1):
            assert on_cuda(ddpm.sample(5, cuda_labels(5), xT=noise, steps=2))
        with pytest.raises(ValueError, match="seed: a generator on cpu; expected one on cuda"):
            ddpm.sample(3, seed=torch.Generator("cpu"))
        unconditional = tiny(conditional=False, timestep_spacing="linspace")
        with pretend.sending(0):
            assert on_cuda(unconditional.sample(3, seed=0))


def test_interpolation_and_prediction_stay_on_the_device():
    with PretendCuda() as pretend:
        ddpm, x0, y = tiny(), cuda_images(2), cuda_labels(2)
        with pretend.sending(0):
            options = dict(y=y, guidance_scale=2.0, seed=3, steps=2, eta=0.5)
            images = ddpm.interpolate(x0, x0 + 1, [0, 0.5, 1], 4, **options)
            assert on_cuda(images) and images.shape == (3, 2, 1, 8, 8)
            assert on_cuda(*ddpm.predict(x0, y, y, 2.0), *ddpm.p_mean_variance(x0, y, y))
        other = torch.ones(2, 1, 8, 8)
        assert on_cuda(ddpm.interpolate(x0, other, [0.5], 4, [1, 2], steps=1))


# Evaluation: it reads values from the device, so here they are zeros


def test_bits_per_dim_reads_nothing_until_all_terms_are_there():
    with PretendCuda(may_read=True) as pretend:
        ddpm = tiny(variance="learned")
        with pretend.sending(0):
            bits = ddpm.bits_per_dim(cuda_images(5), cuda_labels(5), terms=2, seed=1)
        assert bits.rate.device.type == bits.rmse.device.type == "cpu"
        ddpm.bits_per_dim(torch.zeros(5, 1, 8, 8), [0, 1, 2, 3, 4], terms=2)
        pretend.may_read = False
        with pytest.raises(WouldWait) as caught:
            ddpm.bits_per_dim(cuda_images(5), terms=2)
        assert "summarise" in [entry.name for entry in caught.traceback]


def test_an_evaluation_mixes_no_devices(monkeypatch):
    """The test loss, bits per dimension, samples and a grid, with labels and guidance in bf16."""
    config = configure("--bf16 --sampler dpm++ --bound_terms 2 --channels 3")
    shown = []
    monkeypatch.setattr(train_eval.monitor, "write_final", lambda *args: shown.extend(args))
    with PretendCuda(may_read=True):
        ddpm, images = train_eval.build(config), split(20, channels=3)
        ddpm.info = {"step": 0}
        assert train_eval.measure_and_draw(config, ddpm, images) == 0
        assert shown[2].shape == (4, 3, 16, 16) and len(shown[3]) == 2  # images, frames
        assert isinstance(train_eval.bits_per_dim(config, ddpm, images).total, float)
        samples, y = train_eval.draw(config, ddpm, 6, sampler="ddim", steps=2)
        assert samples.device.type == "cpu" and samples.dtype == torch.float32 and len(y) == 6


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_metrics_mix_no_devices(device):
    """Samples on either device, real images on the GPU; features read as zeros."""
    with PretendCuda(may_read=True):
        classifier = metrics.Classifier(10).to("cuda")
        samples = torch.zeros(70, 1, 8, 8, dtype=torch.uint8, device=device)
        train, test = (torch.zeros(n, 8, 8, dtype=torch.uint8, device="cuda") for n in (90, 80))
        labels = torch.zeros(70, dtype=torch.long, device=device)
        report, pairs = metrics.measure(classifier, samples, train, test, labels)
        assert report["frechet"] == 0 and report["accuracy"] == 1 and pairs.shape[0] == 20
        for found in (*classifier.read(samples), *metrics.nearest(samples, train)):
            assert found.device.type == "cpu" and len(found) == 70
        assert metrics.FrechetMeter(classifier, test, train)(samples) == 0
        here, there = torch.zeros(9, 4, device=device), torch.zeros(9, 4, device="cuda")
        assert metrics.frechet_distance(here, there) == 0 and metrics.precision_recall(here, there)


def test_the_classifier_trains_on_the_device(monkeypatch):
    """All but its backward pass, and the state of CUDA's random generator."""
    forked = []

    @contextmanager
    def fork_rng(devices):
        forked.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    with PretendCuda(may_read=True):
        images = torch.zeros(140, 8, 8, dtype=torch.uint8, device="cuda")
        how = dict(device="cuda", epochs=1)
        classifier = metrics.train_classifier(images, cuda_labels(140), **how)
        assert on_cuda(*classifier.parameters(), *classifier.buffers()) and forked == [["cuda"]]


# torch.compile


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that runs the graphs as they are. `graphs` says what each is for.

    'training' or 'inference'. If `broken` is one of these, it fails for such graphs.
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


NETWORKS = {  # one for any number of images; one with all that is optional
    "added time": dict(image_size=4, attention_resolutions=(4,)),
    "adaptive norm, labels, heads, RGB": dict(
        num_classes=10, adaptive_norm=True, num_heads=2, channels=3, out_channels=6, patch_size=2
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_network_has_no_graph_break(kind, compiler):
    """`fullgraph` raises at a break. A graph made for any number of images has to fit each."""
    network, any_number = tiny_unet(**NETWORKS[kind]), kind == "added time"
    compiled = torch.compile(network, fullgraph=True)
    with torch.set_grad_enabled(not any_number):
        for n in (3, 2, 5) if any_number else (3,):
            size, channels = network.config["image_size"], network.config["channels"]
            xt, t = torch.randn(n, channels, size, size), torch.arange(n)
            if any_number:
                torch._dynamo.mark_dynamic(xt, 0), torch._dynamo.mark_dynamic(t, 0)
            y = t + 8 if network.num_classes else None
            torch.testing.assert_close(compiled(xt, t, y), network(xt, t, y))
    assert len(compiler.graphs) == 1


def test_a_planted_graph_break_is_found(compiler):
    class Broken(Tiny):
        def forward(self, xt, t, y=None):
            h = super().forward(xt, t, y)
            return h if h.sum() > 0 else -h  # the compiler cannot know which

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Broken(), fullgraph=True)(torch.ones(2, 1, 8, 8), torch.arange(2))


def compiled_run(flags, monkeypatch):
    """A run of a `Tiny` on the CPU that compiles at once, and its model and `warm_up`."""
    config = configure(f"--use_compile --target_references 0 {flags}", "cpu")
    classes = 10 if config.use_conditional_generation else None
    network = Tiny(config.channels, config.channels, classes)
    monkeypatch.setattr(train_eval, "build_network", lambda config: network)
    config.train_size = 300
    run, model = prepare(config, monkeypatch, 300)
    return run, model, lambda n: train_eval.warm_up(config, model, n)


def evaluate(run):
    """All that the network is asked for after training, in chunks and what is left of them."""
    for n in (100, 130):
        train_eval.draw(run.config, run.ddpm, n, sampler="ddim", steps=2)
    train_eval.test_loss(run.config, run.ddpm, run.train_images)
    train_eval.bits_per_dim(run.config, run.ddpm, run.train_images)


@pytest.mark.parametrize(
    "flags",
    (
        "--no-use_conditional_generation --num_clusters 0 --guidance_scale 1",
        "--bf16 --channels 3 --guidance_scale 2",
    ),
)
def test_a_run_compiles_no_more_graphs_than_it_needs(flags, compiler, monkeypatch):
    """Each graph costs a large network a minute, and after eight of them torch stops compiling.

    Training needs two: one for full batches, and one of any size for the last batch of an epoch.
    Inference needs one: torch has seen several sizes then, and makes a graph for any size. Neither
    what a batch is for nor the step of a sampler may ask for another.
    """
    run, model, warm_up = compiled_run(flags, monkeypatch)
    machine.compile_network(run.config, run.ddpm, warm_up)
    assert compiler.graphs == ["training", "training", "inference"]
    for x0, y in run.train_images.epochs(8, 1, 0, 35):
        train_eval.train_step(run, model, x0, y, 0.1)
    with run.parts["ema"].applied():
        evaluate(run)
    assert compiler.graphs == ["training", "training", "inference"]


def test_an_evaluation_compiles_no_more_graphs_than_it_needs(compiler, monkeypatch):
    """Two: one for the size of a grid, and one for any size when the next size comes."""
    run, _, _ = compiled_run("--guidance_scale 2", monkeypatch)
    machine.compile_network(run.config, run.ddpm)
    assert compiler.graphs == ["inference"]
    evaluate(run)
    assert compiler.graphs == ["inference", "inference"]


@pytest.mark.parametrize("broken", ("training", "inference"))
def test_a_compiler_that_fails_costs_a_line(broken, compiler, monkeypatch, capsys):
    run, model, warm_up = compiled_run("", monkeypatch)
    compiler.broken = broken
    machine.compile_network(run.config, run.ddpm, warm_up)
    line = capsys.readouterr().err
    assert line.startswith("torch.compile failed (") and line.endswith("); going on without it\n")
    assert line.count("\n") == 1 and run.ddpm.training
    assert all(p.grad is None for p in run.ddpm.parameters())
    compiler.broken, tried = None, list(compiler.graphs)
    train_eval.train_step(run, model, *run.train_images.batch(slice(8)), 0.1)
    assert run.ddpm.sample(2, steps=2).isfinite().all()
    assert compiler.graphs == tried  # nothing more was compiled


def test_nothing_is_compiled_unless_the_config_says_so(compiler, monkeypatch):
    run, _, warm_up = compiled_run("--no-use_compile", monkeypatch)
    machine.compile_network(run.config, run.ddpm, warm_up)
    run.ddpm.sample(2, steps=1)
    assert not compiler.graphs
