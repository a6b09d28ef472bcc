"""Faults that only a GPU would show, found on any machine; torch.compile; support/machine.py.

On a pretended GPU (`PretendCuda`) tensors have a shape and a device but no values. An operation on
tensors of two devices raises there, and so does one that would wait for the GPU. Three things need
a real GPU: kernels, the backward pass, and CUDA's own random generators.
"""

import ctypes
import functools
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import gpu_check
import pytest
import torch
from conftest import configured
from tiny import FLAGS, OwnNetwork, refused, same, snapshot, tiny_ddpm, tiny_unet
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import likelihood
import metrics
import train_eval
from dataprocess import Images
from diffusion import LOSSES, SAMPLERS
from process import PREDICTIONS, VARIANCES, GaussianProcess
from support import checks, machine, processes
from support.checkpoint import load_checkpoint, load_last
from timesteps import TIMESTEP_SAMPLINGS

# The pretended GPU

REAL = torch.Generator
NEEDS_A_VALUE = fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException


class WouldWait(RuntimeError):
    """The program would wait for the GPU here."""


class Mixed(RuntimeError):
    """Tensors of two devices meet here, or a generator and a tensor."""


class PretendCuda(TorchDispatchMode):
    """Inside, 'cuda' is a device on any machine. Tensors on the CPU stay real.

    Tensors of two devices meet only in a copy. (A CPU tensor without dimensions is a plain number
    to a GPU, so it may meet any tensor.) Values come to the CPU only with `may_read`: zeros, and
    True for truths. `sent` counts the tensors copied to the device: a real GPU waits for these too.
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
    def sending(self, number):
        """Inside, so many tensors must be copied to the device."""
        before = self.sent
        yield
        assert self.sent == before + number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or getattr(x, "type", 0) == "cuda" for x in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        generators = [x for x in leaves if isinstance(x, torch._C.Generator)]
        if any(PretendGenerator.device_of(x).type != "cuda" for x in generators):
            raise Mixed(func)
        if func in self.LOOKUPS and args[0].device.type == "cuda":
            leaves, indices = tree_leaves((args[0], args[2:], kwargs)), tree_leaves(args[1])
            self.sent += sum(x.device.type == "cpu" for x in indices if x is not None)
        here = {x.device.type for x in leaves if isinstance(x, torch.Tensor) and x.ndim}
        if func not in self.COPIES and len(here) > 1:
            raise Mixed(func)
        try:
            result = func(*args, **kwargs)
        except NEEDS_A_VALUE as error:
            if not self.may_read:
                raise WouldWait(func) from error
            with unset_fake_temporarily():
                read = func(*tree_map(as_read, args), **kwargs)
            return torch.empty_like(read, device="cuda") if isinstance(read, torch.Tensor) else read
        return self._copied(func, args, result) if func in self.COPIES else result

    def _copied(self, func, args, result):
        """The result of a copy, after a look at where it came from and where it went."""
        pairs = [args[:2]] if isinstance(args[0], torch.Tensor) else list(zip(*args[:2]))
        if func is self.ATEN._to_copy.default:
            pairs = [(result, args[0])]
        for target, source in pairs:
            self.sent += source.device.type == "cpu" and target.device.type == "cuda"
            if target.device.type == "cpu" and source.device.type == "cuda":
                if not self.may_read:
                    raise WouldWait(func)
                if func is self.ATEN._to_copy.default:
                    return as_read(target)
        return result


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

    device = property(lambda self: self.device_of(self))


@pytest.fixture(autouse=True)
def cuda_without_a_driver(monkeypatch):
    """What torch asks the driver: CUDA's generators, and autocast whether there is a GPU for it."""
    monkeypatch.setattr(torch, "Generator", PretendGenerator)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def tiny(conditional=True, **settings):
    """A DDPM of an `OwnNetwork`, with ten timesteps and grey images of 8x8 pixels, on CUDA."""
    outputs = 1 + (settings.get("variance") == "learned")
    network = OwnNetwork(1, outputs, 10 if conditional else None)
    return tiny_ddpm(network=network, **settings).to("cuda")


def batch(n, device="cuda"):
    """Images of 8x8 pixels, and their labels or timesteps."""
    return torch.zeros(n, 1, 8, 8, device=device), torch.zeros(n, dtype=torch.long, device=device)


def on_cuda(*tensors):
    return all(x.device.type == "cuda" for x in tensors)


def configure(flags, device="cuda"):
    """The constants of the smallest run by the quick recipe."""
    return configured(*FLAGS, "--device", device, "--recipe", "quick", *flags.split()).config


def split(n, config, augment=False):
    """The `Images` that the constants ask for, of so many pictures."""
    images = torch.randint(256, (n, 1, 16, 16), dtype=torch.uint8)
    how = config.channels, augment, 0, config.device, 10
    return Images("mnist", images, torch.arange(n) % 10, *how)


def cluster(images, number, within_labels, cluster=Images.use_clusters):
    """`Images.use_clusters` with shares of 1, since those of the pretended GPU read as zeros."""
    return [[1.0] * len(row) for row in cluster(images, number, within_labels)]


def prepare(config, monkeypatch, n=12):
    """`train_eval.prepare` with so many images and an `OwnNetwork`, and the model to train."""

    def network(config):
        return OwnNetwork(config.channels, config.channels, config.num_classes)

    splits = split(n, config, config.use_augmentation), split(10, config)
    monkeypatch.setattr(train_eval, "build_network", network)
    monkeypatch.setattr(train_eval, "load_images", lambda config: splits)
    monkeypatch.setattr(Images, "use_clusters", cluster)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    run = train_eval.prepare(config, {})
    return run, processes.parallel(run.ddpm).train()


# Faults that a person might make: the pretended GPU must see them

FAULTS = {  # ways to look up alpha_bar, and how each is found
    "item": (WouldWait, lambda self, t: self.alphas_cumprod[t] * self.betas[0].item()),
    "tolist": (WouldWait, lambda self, t: self.alphas_cumprod[t] * self.betas.tolist()[0]),
    "if": (WouldWait, lambda self, t: self.alphas_cumprod[t] if (t >= 0).all() else None),
    "mask": (WouldWait, lambda self, t: self.alphas_cumprod[t][t >= 0]),
    "cpu": (WouldWait, lambda self, t: self.alphas_cumprod.cpu()[t.cpu()].to(t.device)),
    "copy": (WouldWait, lambda self, t: torch.zeros(len(t)).copy_(t)),
    "table on the CPU": (Mixed, lambda self, t: torch.linspace(0.9, 0.1, 10)[t]),
    "factor on the CPU": (Mixed, lambda self, t: self.alphas_cumprod[t] * torch.ones(len(t))),
    "generator": (Mixed, lambda self, t: torch.rand(4, generator=torch.Generator(), device="cuda")),
    "table sent": (AssertionError, lambda self, t: torch.linspace(1, 0, 10).to(t.device)[t]),
    "index sent": (AssertionError, lambda self, t: self.alphas_cumprod[[0] * len(t)]),
    "values sent": (AssertionError, lambda self, t: torch.ones_like(t).copy_(torch.ones(len(t)))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_in_the_loss_and_in_sampling(fault, monkeypatch):
    error, lookup = FAULTS[fault]
    with PretendCuda() as pretend:
        ddpm, (x0, y) = tiny(), batch(4)
        calls = functools.partial(ddpm, x0, y), functools.partial(ddpm.sample, 4, y, steps=2)
        for expected in (nullcontext(), pytest.raises(error)):
            for call in calls:
                with expected, pretend.sending(0):
                    call()
            fault = lambda self, t: lookup(self, t)[:, None, None, None]  # noqa: E731
            monkeypatch.setattr(GaussianProcess, "alpha_bar", fault)


# Training


@pytest.mark.parametrize("j, loss", [*enumerate(LOSSES)])
@pytest.mark.parametrize("i, prediction", [*enumerate(PREDICTIONS)])
def test_every_loss_stays_on_the_device(i, prediction, j, loss):
    variance, conditional = [*VARIANCES][(i + j) % 3], (i + j) % 2 == 1
    settings = dict(prediction=prediction, loss=loss, variance=variance)
    if prediction != "eps":
        settings |= dict(zero_terminal_snr=True, beta_schedule="cosine")
    elif loss == "mse":
        settings |= dict(min_snr_gamma=5.0)
    with PretendCuda() as pretend:
        ddpm, (x0, t), (others, labels) = tiny(conditional, **settings).train(), batch(4), batch(7)
        y, labels = (t, labels) if conditional else (None, None)
        candidates = ((x0, others[4:]), labels) if loss == "mse" else None
        with pretend.sending(0):
            losses = ddpm.losses(x0, ddpm.drop_labels(y), t, torch.randn_like(x0), candidates)
            assert on_cuda(losses, ddpm(x0, y)) and losses.requires_grad
        assert losses.shape == (4,) and losses.dtype == torch.float32


@pytest.mark.parametrize("sampling", TIMESTEP_SAMPLINGS)
def test_training_steps_never_wait_for_the_device(sampling, monkeypatch):
    """All of a step but its backward pass, for which autograd asks for a real device."""
    flags = f"--timestep_sampling {sampling} --ema_start 1 --use_augmentation "
    clusters = "--no-use_conditional_generation --num_clusters 3 --grad_accumulation 2"
    config = configure(flags + clusters * (sampling == "importance"))
    with PretendCuda(may_read=True) as pretend:
        run, model = prepare(config, monkeypatch)
        stats, ema, weights = run.parts["stats"], run.parts["ema"], [*run.ddpm.parameters()]

        def backward(self):
            assert self.requires_grad and self.shape == ()
            for p in weights:
                p.grad = torch.zeros_like(p)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        batches = run.train_images.epochs(8, 1)
        with pretend.sending(1):  # the order of the whole epoch
            first = next(batches)
        pretend.may_read = False
        with pretend.sending(0):
            for n, (x0, y) in zip((8, 4), (first, *batches)):
                result = train_eval.train_step(run, model, x0, y, 0.1)
                assert on_cuda(x0, y, *result) and len(x0) == n
                stats.add(*result)
            with ema.applied():
                ema.load_state_dict(ema.state_dict())
        assert ema.step == stats.count == 2
        saved = {name: torch.zeros(x.shape) for name, x in ema.shadow.state_dict().items()}
        ema.load_state_dict({"step": 2, "shadow": saved})  # a checkpoint is read to the CPU
        assert on_cuda(*weights, *ema.shadow.state_dict().values())
        pretend.may_read = True
        assert stats.read(2, 0.1)["train/batch_loss"] == 0


# Sampling and evaluation


@pytest.mark.parametrize("sampler, variance", list(zip(SAMPLERS, ["learned", *VARIANCES])))
def test_samplers_and_the_bound_never_wait_for_the_device(sampler, variance):
    with PretendCuda() as pretend:
        ddpm = tiny(sampler=sampler, variance=variance, prediction="v")
        (x0, y), generator = batch(5), torch.Generator("cuda")
        with pretend.sending(0):
            images = ddpm.sample(5, y, steps=3, guidance_scale=2.0, eta=0.5, return_sequence=True)
            assert on_cuda(images) and images.shape == (3, 5, 1, 8, 8)
            how = dict(xT=x0, start=5, steps=1, seed=generator)
            assert ddpm.sample(5, y, guidance_scale=0, **how).dtype == torch.float32
            options = dict(y=y, guidance_scale=2.0, seed=3, steps=1)
            assert on_cuda(ddpm.interpolate(x0, x0 + 1, [0, 0.5, 1], 4, **options))
            assert on_cuda(*ddpm.predict(x0, y, y, 2.0), *ddpm.denoise(x0, y, y)[:2])
            assert on_cuda(*likelihood.bound_terms(ddpm, x0, y, 2, generator))


def test_what_lies_on_the_cpu_is_sent_once_before_sampling():
    with PretendCuda() as pretend:
        ddpm, unconditional = tiny(), tiny(conditional=False, timestep_spacing="linspace")
        for y in ([0, 1, 2, 3, 4], 3, range(5), torch.arange(5), None):  # None: it draws labels
            with pretend.sending(1):
                assert on_cuda(ddpm.sample(5, y, steps=1))
        with pretend.sending(1):
            assert on_cuda(unconditional.sample(5, xT=batch(5, "cpu")[0].double(), steps=2))
        with pretend.sending(2):
            assert on_cuda(unconditional.interpolate(*2 * batch(5, "cpu")[:1], [0.5], 4, steps=2))
        with pytest.raises(ValueError, match="seed: a generator on cpu; expected one on cuda"):
            unconditional.sample(3, seed=torch.Generator("cpu"))


def test_an_evaluation_of_the_unet_in_bf16_mixes_no_devices(monkeypatch):
    """The test loss, bits per dimension, samples and a grid, with labels and guidance."""
    config, seen, shown = configure("--bf16 --sampler dpm++ --channels 3"), {}, []
    monkeypatch.setattr(train_eval.monitor, "write_final", lambda *args: shown.extend(args))
    config.num_classes = 10
    with PretendCuda(may_read=True):
        ddpm, images = train_eval.build(config), split(20, config)
        assert on_cuda(*ddpm.parameters(), *ddpm.buffers(), ddpm.network(*images.batch(slice(4))))
        for layer in (ddpm.network.conv_in, ddpm.network.norm_out):
            layer.register_forward_hook(lambda layer, x, y: seen.update({type(layer): y.dtype}))
        ddpm.info = {"step": 0}
        assert train_eval.measure_and_draw(config, ddpm, images) == 0
        assert seen == {nn.Conv2d: torch.bfloat16, nn.GroupNorm: torch.float32}  # autocast's rule
        assert shown[2].shape == (4, 3, 16, 16) and len(shown[3]) == 3  # images, frames
        assert isinstance(train_eval.bits_per_dim(config, ddpm, images).total, float)
        samples, y = train_eval.draw(config, ddpm, 6, sampler="ddim", steps=2)
        assert samples.device.type == "cpu" and samples.dtype == torch.float32 and len(y) == 6


@pytest.mark.parametrize("places", ("0111", "1000", "0110", "1111"))
def test_metrics_mix_no_devices(places, monkeypatch):
    """Samples, labels, training and test images on either device, the classifier on the GPU.

    It trains, but for `backward`.
    """
    forked = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda on: nullcontext(forked.append(on)))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    with PretendCuda(may_read=True):
        on = [("cpu", "cuda")[int(place)] for place in places]
        samples, labels = batch(70, on[0])[0].byte(), batch(70, on[1])[1]
        train, test = (batch(n, place)[0].byte() for n, place in zip((90, 80), on[2:]))
        classifier = metrics.train_classifier(train, batch(90, on[1])[1], device="cuda", epochs=1)
        assert on_cuda(*classifier.parameters(), *classifier.buffers()) and forked == [["cuda"]]
        report, pairs = metrics.measure(classifier, samples, train, test, labels)
        assert report["frechet"] == 0 and report["accuracy"] == 1 and len(pairs) == 20
        found = *classifier.read(samples), *metrics.nearest(samples, train)
        assert all(x.device.type == "cpu" and len(x) == 70 for x in found)
        assert metrics.FrechetMeter(classifier, test, [train[:70]])(samples) == 0
        a, b = (torch.zeros(9, 4, device=place) for place in on[:2])
        assert metrics.frechet_distance(a, b) == 0 and metrics.precision_recall(a, b)


class CpuForCuda(TorchFunctionMode):
    """Inside, 'cuda' is another name for the CPU, which computes as a card should."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(x):
            named = isinstance(x, (str, torch.device)) and str(x).startswith("cuda")
            return torch.device("cpu") if named else x

        return func(*map(here, args), **{name: here(x) for name, x in (kwargs or {}).items()})


def test_a_whole_run_on_a_card_comes_to_that_on_a_cpu(tmp_path, monkeypatch, data_flags):
    monkeypatch.setattr(PretendGenerator, "__new__", lambda cls, device="cpu": REAL("cpu"))
    asked = "get_rng_state", "max_memory_allocated", "get_device_properties"
    card = SimpleNamespace(name="a card", total_memory=0)
    for name, answer in zip(asked, (torch.zeros(1), 0, card)):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(train_eval.pictures, "write_training", lambda *args: None)
    found, flags = [], [*FLAGS, *data_flags, "--recipe", "quick", "--epochs", "1"]
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        with CpuForCuda():
            assert train_eval.main([*flags, "--device", device, "--save_dir", str(folder)]) == 0
        last, best = load_last(folder), load_checkpoint(folder / "best_model.pt", ["weights"])
        assert last.pop("config")["device"] == device and last.pop("log")
        last.pop("script"), last.pop("rng")  # those of a card too
        found.append((last, best["weights"], snapshot(folder / "samples")))
    assert same(*found)


# torch.compile


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that runs graphs as they are, lists what for, and fails for `broken` ones."""
    found = SimpleNamespace(graphs=[], broken=None)

    def backend(graph, inputs):
        kind = "training" if torch.is_grad_enabled() else "inference"
        if kind == found.broken:
            raise RuntimeError("long story\nx.c: SyntaxError: no such graph\nmore of it")
        found.graphs.append(kind)
        return graph.forward

    def with_backend(call, mode="default", compile=torch.compile, **options):
        found.mode = mode
        return compile(call, backend=backend, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", with_backend)
    yield found
    torch._dynamo.reset()


def test_the_network_is_one_graph_that_fits_any_number_of_images(compiler):
    """With all that is optional; `fullgraph` raises where a graph would break."""
    network = tiny_unet(num_classes=10, adaptive_norm=True, num_heads=2, channels=3, patch_size=2)
    compiled = torch.compile(network, fullgraph=True)
    for n in (3, 2, 5):
        inputs = torch.randn(n, 3, 8, 8), torch.arange(n), torch.arange(n) + 6
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), network(*inputs))
    assert compiler.graphs == ["inference"]


def compiled_run(flags, monkeypatch):
    """A run on the CPU that compiles at once, its model, and what warms it up."""
    sizes = "--batch_size 16 --num_samples 100 --train_size 300 --bound_images 300"
    config = configure(f"--use_compile --target_references 0 {sizes} {flags}", "cpu")
    run, model = prepare(config, monkeypatch, 300)
    return run, model, lambda n: train_eval.warm_up(config, model, n)


def evaluate(run):
    """All that the network is asked for after training, in chunks and what is left of them."""
    train_eval.draw(run.config, run.ddpm, 130, sampler="ddim", steps=2)
    train_eval.test_loss(run.config, run.ddpm, run.train_images)
    train_eval.bits_per_dim(run.config, run.ddpm, run.train_images)


UNLABELLED = "--no-use_conditional_generation --num_clusters 0 --guidance_scale 1"


@pytest.mark.parametrize("flags", (UNLABELLED, "--bf16 --channels 3 --compile_mode max-autotune"))
def test_a_run_compiles_no_more_graphs_than_it_needs(flags, compiler, monkeypatch):
    """Each costs a large network a minute, and after eight of them torch stops compiling.

    Training needs one, for full batches. Inference needs one, for any size: it is the second seen.
    """
    run, model, warm_up = compiled_run(flags, monkeypatch)
    machine.compile_network(run.config, run.ddpm, warm_up)
    assert compiler.graphs == ["training", "inference"] and compiler.mode == run.config.compile_mode
    for x0, y in run.train_images.epochs(16, 1, 0, 17):
        train_eval.train_step(run, model, x0, y, 0.1)
    with run.parts["ema"].applied():
        evaluate(run)
    assert compiler.graphs == ["training", "inference"]


@pytest.mark.parametrize("broken", ("training", "inference"))
def test_a_compiler_that_fails_costs_a_line(broken, compiler, monkeypatch, capsys):
    run, model, warm_up = compiled_run("", monkeypatch)
    compiler.broken = broken
    machine.compile_network(run.config, run.ddpm, warm_up)
    line = capsys.readouterr().err
    reason = "x.c: SyntaxError: no such graph"  # not the first line, nor the last
    assert line == f"torch.compile failed ({reason}); going on without it\n" and run.ddpm.training
    assert all(p.grad is None for p in run.ddpm.parameters())
    compiler.broken, tried = None, list(compiler.graphs)
    train_eval.train_step(run, model, *run.train_images.batch(slice(8)), 0.1)
    assert run.ddpm.sample(2, steps=2).isfinite().all()
    assert compiler.graphs == tried  # nothing more was compiled


# The parts of support/machine.py


def test_the_gpu_check_runs_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(train_eval, "load_images", train_eval.load_images)  # it has its own
    flags = "--image_size 16 --channels 1 --base_channels 32 --channel_mult 1 --num_res_blocks 1 "
    flags += "--attention_resolutions none --time_emb_dim 8 --num_timesteps 20 --sample_steps 2 "
    flags += "--preview_steps 2 --no-use_augmentation --steps_only --device cpu"
    assert gpu_check.main(flags.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ceilings:", "eager", "eager", "sampling"]
    assert "TFLOP/s" in lines[0] and "ms a step" in lines[1] and "10,000 images" in lines[3]


def test_bf16_is_asked_of_the_device_in_question(monkeypatch):
    asked = []

    def is_bf16_supported(including_emulation=True):
        return not including_emulation and asked[-1] == "cuda:1"  # emulated, it is slow

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(asked.append(str(device))))
    assert machine.has_bf16(torch.device("cuda", 1)) and not machine.has_bf16("cuda:0")
    monkeypatch.setattr(torch.cuda, "device", lambda name: 1 / 0)  # no driver
    assert machine.has_bf16("cuda") is False


def test_bf16_pays_on_a_cpu_with_amx_alone(monkeypatch):
    for found in ({"amx_bf16": True}, {"amx_bf16": False, "avx512_bf16": True}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert machine.has_bf16("cpu") is found.get("amx_bf16", False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert machine.has_bf16("cpu") is False


NO_CUDA, NO_FLOAT64 = "this torch has no CUDA: see pytorch.org", "Apple's GPU has no float64"
OLD, NEW = (f"no code for capability {x}: see pytorch.org" for x in ("7.5", "12.0"))


@pytest.mark.parametrize(
    "device, built_for, found, words",
    [
        ("cpu", None, "nvidia-smi", NO_CUDA),
        ("cuda", None, "nvidia-smi", NO_CUDA),
        ("cpu", "sm_90", "nvidia-smi", ""),
        ("cpu", None, "mps", NO_FLOAT64),
        ("mps", None, "mps", NO_FLOAT64),
        ("cuda", "sm_80 sm_90a", (8, 6), ""),  # code for the first of a generation
        ("cuda", "sm_75 sm_86", (8, 0), "capability 8.0"),
        ("cuda", "sm_80 sm_90a", (7, 5), OLD),
        ("cuda:1", "sm_80 sm_90a", (12, 0), NEW),
        ("cuda", "sm_80 compute_90", (12, 0), ""),  # source, which the driver compiles
    ],
)
def test_a_card_not_used_is_said_with_its_reason(device, built_for, found, words, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", built_for and "13.0")
    monkeypatch.setattr(machine.shutil, "which", lambda name: found == name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: found == "mps")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for.split())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    card = SimpleNamespace(name="H100", total_memory=80.1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: 1 / (device.type == "cpu"))
    assert words in (why := machine.why_no_card(device)) and bool(words) == bool(why)
    if device == "cpu":
        assert machine.describe_device(SimpleNamespace(device=device)).partition(" (")[2] == (
            f"{why})" if words else ""
        )
    else:
        refused(lambda: checks.device(device), f"device '{device}'", words, "try --device cpu")
        if device != "mps":
            described = machine.describe_device(SimpleNamespace(device=device))
            assert described == f"{device}, H100 of 80 GB"


@pytest.mark.parametrize(
    "device, bf16, capability",
    [
        ("cpu", False, None),
        ("cpu", True, None),
        ("cuda:1", True, (7, 5)),
        ("cuda:1", False, (7, 5)),
        ("cuda:1", False, (8, 0)),
    ],
)
def test_a_module_is_placed_in_its_fast_layout(device, bf16, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config, kind = SimpleNamespace(device=device, bf16=bf16), torch.device(device).type
    with PretendCuda(may_read=True):
        checks.device(device)
        module = nn.Conv2d(3, 4, 3)
        assert machine.place(module, config) is module and module.weight.device.type == kind
        plain = kind == "cpu" or not bf16 and capability < (8, 0)  # pytorch#50036
        fast = torch.contiguous_format if plain else torch.channels_last
        assert module.weight.is_contiguous(memory_format=fast)
    with machine.autocast(config):
        assert torch.is_autocast_enabled(kind) == bf16
        assert not bf16 or torch.get_autocast_dtype(kind) == torch.bfloat16


def test_the_process_is_prepared_on_any_console_and_keeps_freed_memory(monkeypatch):
    asked, precision = [], torch.get_float32_matmul_precision()
    glibc = SimpleNamespace(mallopt=lambda *option: asked.append(option))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(reconfigure=lambda **x: asked.append(x)))
    monkeypatch.setattr(sys, "stderr", object())  # a stream of somebody else's making
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with machine.prepared_process():
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == precision
    assert not torch.backends.cudnn.benchmark
    assert asked == [(-1, 2**30), (-3, 2**25), {"errors": "replace", "line_buffering": True}]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # another C library
    machine.keep_freed_memory()


def test_what_ends_a_run_is_said_in_one_line():
    for error, words in (
        (OSError(28, "No space"), "[Errno 28] No space; what was saved before is whole"),
        (torch.OutOfMemoryError("CUDA.\nmore"), "out of memory (OutOfMemoryError: CUDA.); try --"),
        (MemoryError(), "out of memory (MemoryError: ); try --grad_accumulation 2 or more, or"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "out of memory (RuntimeError: CUBLAS_"),
        (RuntimeError("[gloo] closed"), "another process of the run has ended, or cannot be rea"),
    ):
        with pytest.raises(SystemExit) as caught, machine.errors_in_one_line():
            raise error
        assert caught.value.code.startswith(f"train_eval.py: {words}")
        assert len(caught.value.code.splitlines()) == 1
    with pytest.raises(SystemExit, match="out of memory .RuntimeError: "):
        with machine.errors_in_one_line():
            torch.empty(10**15)  # torch's own words on a CPU
    with pytest.raises(RuntimeError, match="^size mismatch$"), machine.errors_in_one_line():
        raise RuntimeError("size mismatch")
