"""What a run needs of the machine: device, precision, memory layout, compiler, processes, signals and console."""

import ctypes
import functools
import hashlib
import os
import signal
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

WARNED = set()  # what `warning_if_it_fails` has printed in this run


def has_bf16(device):
    """Whether bfloat16 pays on this device: GPUs since Ampere, CPUs with AMX.

    With AVX512_BF16 alone a step is a quarter faster on a quiet machine, but beside a second run ten times as slow as
    in float32: there oneDNN's kernels of weight gradients wait in loops of their own, which never sleep.
    """
    try:
        if not str(device).startswith("cuda"):
            found = getattr(torch.cpu, "get_capabilities", dict)()
            return found.get("amx_bf16", False)
        with torch.cuda.device(device):  # the answer is for the current device
            return torch.cuda.is_bf16_supported(including_emulation=False)
    except Exception:  # no such device: check_device says so in one line
        return False


def describe_precision(config):
    """Which precision the products of a run have, and why, for a person: 'bf16, which this device has units for'."""
    pays = has_bf16(config.device)
    if config.bf16:
        return "bf16, " + (
            "which this device has units for"
            if pays
            else "as asked; --no-bf16 is faster without units for it, and beside other programs"
        )
    return "fp32, " + ("as asked" if pays else "since bf16 does not pay on this device")


def check_device(device):
    """ValueError, in one line, for a device that cannot be used here, or that the processes of a run cannot share."""
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if world()[1] > 1 and device != "cpu" and (device != "cuda" or local_rank >= gpus):
        raise ValueError(
            f"device {device!r} for process {local_rank + 1} of this machine, which has {gpus} GPUs: "
            "expected cuda, and at most one process a GPU, or cpu"
        )
    try:
        torch.zeros(1, dtype=torch.float64, device=device).cpu()
    except Exception as error:  # each backend has its own
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {device!r}: cannot be used here ({reason}); try --device cpu"
        ) from None


def place(module, config):
    """Move a module to the config's device, in the memory layout that its convolutions are fast in."""
    # On a CPU GroupNorm is several times slower channels-last, and so is SiLU where two layouts meet.
    layout = (
        torch.contiguous_format
        if torch.device(config.device).type == "cpu"
        else torch.channels_last
    )
    return module.to(config.device, memory_format=layout)


def autocast(config):
    """bfloat16 for convolutions and matrix products, if the config says so."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16)


def compile_network(config, ddpm, training=True):
    """`torch.compile` the network and try it. If that fails, a line says so and the run goes on without it.

    It tries inference with the number of images of a grid and, if `training`, the training batches.
    """
    if not config.use_compile:
        return
    ddpm.network.compile()
    x0 = torch.zeros(
        config.batch_size,
        config.channels,
        config.image_size,
        config.image_size,
        device=config.device,
    )
    y = (
        None
        if ddpm.num_classes is None
        else torch.zeros(len(x0), dtype=torch.long, device=config.device)
    )
    try:
        with torch.random.fork_rng([x0.device] if x0.is_cuda else []), autocast(config):
            for n in (config.batch_size, config.train_size % config.batch_size) if training else ():
                if n:  # with a second size, torch makes one graph for all sizes
                    for rows, _ in micro_batches(ddpm, n, config.grad_accumulation):
                        ddpm(x0[:n], None if y is None else y[:n], rows=rows).sum().backward()
            ddpm.sample(
                config.num_samples,
                None if y is None else 0,
                steps=1,
                rows=share(config.num_samples),
            )
    except Exception as error:  # compilers fail in too many ways to list
        ddpm.network.compile(disable=True)
        print(f"torch.compile failed ({in_one_line(error)}); going on without it", file=sys.stderr)
    ddpm.zero_grad()


def unwrapped(network):
    """The module inside the wrappers of `torch.compile` and (Distributed)DataParallel."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(network, parallel) or "_orig_mod" in network._modules:
        network = network.module if isinstance(network, parallel) else network._modules["_orig_mod"]
    return network


@contextmanager
def evaluating(module):
    """Evaluation mode (no dropout) inside; outside, every part is in its mode of before."""
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in training:
            part.training = mode


def plain_state_dict(network):
    """The state dict of a network without the names that `torch.compile` inserts for compiled layers."""
    return {name.replace("_orig_mod.", ""): value for name, value in network.state_dict().items()}


def load_state_dict(network, weights, path):
    """Load weights into a network, wrapped or not; ValueError, naming the file, if they do not fit."""
    network = unwrapped(network)
    own_names = {name.replace("_orig_mod.", ""): name for name in network.state_dict()}
    try:
        network.load_state_dict(
            {own_names.get(name, name): value for name, value in weights.items()}
        )
    except RuntimeError:
        raise ValueError(
            f"{path}: its weights do not fit this network; give load() the one saved"
        ) from None


# Several processes: torchrun starts them, DistributedDataParallel averages their gradients. Each draws the randomness
# of the whole batch and computes a share of it, so that they do together what one process does.


def world():
    """(rank, number of processes) of this run: (0, 1) unless torchrun started several."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def is_main():
    """Whether this is the process that writes and prints."""
    return world()[0] == 0


def on_main(function):
    """Decorator of what one process does for all, such as writing a file: in the others it does nothing."""

    @functools.wraps(function)
    def guarded(*args, **options):
        return function(*args, **options) if is_main() else None

    return guarded


@contextmanager
def processes(config):
    """Inside, the processes that torchrun started are one run: gloo joins them on a CPU, nccl on GPUs."""
    local_rank, together = (
        int(os.environ.get("LOCAL_RANK", 0)),
        "MASTER_ADDR" in os.environ,
    )  # as torchrun sets them
    if not together or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    cuda = (
        config.device == "cuda" and torch.cuda.is_available()
    )  # without GPUs check_device refuses it
    if cuda and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    stdout = sys.stdout
    try:
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
        yield
        dist.barrier()
        dist.destroy_process_group()  # not after an error: it would wait for the others
    finally:
        sys.stdout = stdout


def barrier():
    """Wait for the other processes."""
    if world()[1] > 1:
        dist.barrier()


def check_same(values):
    """ValueError unless all processes of the run have the same values, {name: anything with a repr}."""
    if world()[1] == 1:
        return
    hashes = [hashlib.sha256(repr(value).encode()).digest()[:7] for value in values.values()]
    low, high = (
        torch.tensor([int.from_bytes(digest, "big") for digest in hashes]) for _ in range(2)
    )
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    different = [
        f"{name} (here {value!r})"
        for (name, value), same in zip(values.items(), low == high)
        if not same
    ]
    if different:
        raise ValueError(
            f"the processes of this run differ in {', '.join(different)}; expected the same code, flags "
            "and data for all"
        )


@contextmanager
def main_first():
    """The block runs in the first process of each machine, then in the others: one download is enough."""
    first = not int(os.environ.get("LOCAL_RANK", 0))
    if not first:
        barrier()
    yield
    if first:
        barrier()


def share(n):
    """The slice of n images that this process computes. Of fewer images than processes each computes them all."""
    rank, number = world()
    return slice(rank * n // number, (rank + 1) * n // number) if n >= number else slice(0, n)


def gather(part, n):
    """The whole, (n, ...), of which each process has computed its `share`."""
    if world()[1] == 1 or n < world()[1]:
        return part
    whole = part.new_zeros(n, *part.shape[1:])
    whole[share(n)] = part
    dist.all_reduce(whole)
    return whole


def parallel(config, ddpm):
    """The module to call in training: `ddpm` itself, or DistributedDataParallel around it."""
    if world()[1] == 1:
        return ddpm
    device_ids = (
        [torch.cuda.current_device()] if torch.device(config.device).type == "cuda" else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 has another word for the third
        return nn.parallel.DistributedDataParallel(
            ddpm, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def micro_batches(model, n, parts):
    """Split this process's share of n images into `parts` to run through the model one after the other.

    Yields (rows, scale): a slice of the batch, and what to multiply the sum of its losses with. The gradients then add
    up to that of the mean over the whole batch. Under several processes each has dropout of its own.
    """
    rows, number = share(n), world()[1]
    size = rows.stop - rows.start
    parts, scale = min(parts, size), (number if n >= number else 1) / n
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=number > 1):
        if (
            number > 1
        ):  # from the state, which moves on with every step: a number drawn on a GPU would be waited for
            state = (
                torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
            )
            digest = hashlib.sha256(state.numpy().tobytes()).digest()
            torch.manual_seed(int.from_bytes(digest[:6], "big") + world()[0])
        for k in range(parts):
            last = k == parts - 1
            with (
                nullcontext() if last or number == 1 else model.no_sync()
            ):  # gradients are averaged once
                yield (
                    slice(rows.start + k * size // parts, rows.start + (k + 1) * size // parts),
                    scale,
                )


# The process


def prepare_process():
    """Settings of the whole process: fast products, memory that is kept, and a console that takes any character."""
    torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16, on GPUs that have it
    torch.backends.cudnn.benchmark = True
    keep_freed_memory()
    WARNED.clear()
    for stream in (sys.stdout, sys.stderr):  # on some consoles 'é' would otherwise end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def keep_freed_memory():
    """Have glibc keep freed memory for the next step instead of handing it back to the system.

    Each step frees and asks for the same 30 MB; the page faults of that were a tenth of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: bytes free at the end of the heap before it shrinks
        mallopt(
            -3, 2**25
        )  # M_MMAP_THRESHOLD: largest number of bytes that is not mapped on its own


class Interrupt:
    """Ctrl-C, SIGTERM and SIGUSR1 while a run goes on, as a context manager.

    Ctrl-C and SIGTERM end the block by KeyboardInterrupt, but inside `after_the_step` the first is only a request,
    which `asked` reports. SIGUSR1 asks for a save. In a thread other than the main one Python allows no handlers, so
    there it does nothing.

    Attributes:
        signum: the signal that ends the run, or None.
        status: the exit status that belongs to it, as shells count: 130 for Ctrl-C, 143 for SIGTERM.
    """

    SAVE = getattr(signal, "SIGUSR1", None)  # Windows has none

    def __init__(self):
        self.signum, self.save, self.immediate = None, False, True
        self.before = {}

    @property
    def status(self):
        return 128 + (self.signum or signal.SIGINT)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGINT, signal.SIGTERM, *([] if self.SAVE is None else [self.SAVE])]
            self.before = {signum: signal.signal(signum, self._handle) for signum in signals}
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame):
        if signum == self.SAVE:
            self.save = True
            return
        again, self.signum = self.signum is not None, self.signum or signum
        if again and world()[1] > 1:
            return  # torchrun sends what the terminal has sent already; it kills after half a minute
        if again or self.immediate:
            raise KeyboardInterrupt
        if sys.stderr is not None:  # else 2 may be another file
            with suppress(OSError):  # the `tee` behind a pipe ends by the same Ctrl-C
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def asked(self):
        """What this process, or another one of the run, was asked for: 'stop', 'save' or None."""
        asked = torch.tensor(self.signum or int(self.save))
        if world()[1] > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.save = False
        if asked > 1:  # SIGINT is 2 and SIGTERM 15
            self.signum = int(asked)
        return "stop" if asked > 1 else "save" if asked else None

    @contextmanager
    def after_the_step(self):
        """Inside, the first signal is a request; a second one ends the block by KeyboardInterrupt."""
        self.immediate = False
        try:
            yield
        finally:
            self.immediate = True


@contextmanager
def warning_if_it_fails(what):
    """An error inside becomes a warning, the first time, and the run goes on after the block.

    Under several processes only an error of the system does: after any other they would no longer do the same.
    """
    try:
        yield
    except Exception as error:
        if world()[1] > 1 and not isinstance(error, OSError):
            raise
        warning = f"{what} failed ({in_one_line(error)}); the run goes on without it"
        if warning not in WARNED:
            with suppress(OSError):  # the log may lie on the disk that is full
                print(f"\n{warning}", file=sys.stderr, flush=True)
        WARNED.add(warning)


@contextmanager
def errors_in_one_line():
    """Out of memory, errors of the system and a lost process become one line and exit status 1."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, getattr(dist, "DistError", ())) or "gloo" in str(error):
            raise SystemExit(
                f"train_eval.py: another process of the run has ended, or cannot be reached "
                f"({in_one_line(error)}); --resume goes on, with any number of processes"
            ) from None
        if not isinstance(
            error, (MemoryError, torch.OutOfMemoryError)
        ) and "DefaultCPUAllocator" not in str(error):
            raise  # that is how torch says that a CPU is out of memory
        raise SystemExit(
            f"train_eval.py: out of memory ({in_one_line(error)}); try a smaller --batch_size or "
            "--base_channels"
        ) from None
    except OSError as error:  # a full disk, most likely
        raise SystemExit(f"train_eval.py: {error}; what was saved before is whole") from None


def in_one_line(error):
    """The kind of an error and the first line of its message."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {reason}"
