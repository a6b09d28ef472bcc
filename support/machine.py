"""What a run needs of the machine: device, precision, memory layout, compiler, one-line errors."""

import ctypes
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from support.files import one_line


def has_bf16(device):
    """Whether bfloat16 pays on this device: GPUs since Ampere, CPUs with AMX.

    With AVX512_BF16 alone a step is a quarter faster on a quiet machine, but beside a second run
    ten times as slow as in float32: there oneDNN's kernels of weight gradients wait in loops of
    their own, which never sleep.
    """
    try:
        if not str(device).startswith("cuda"):
            found = getattr(torch.cpu, "get_capabilities", dict)()
            return found.get("amx_bf16", False)
        with torch.cuda.device(device):  # the answer is for the current device
            return torch.cuda.is_bf16_supported(including_emulation=False)
    except Exception:  # no such device: a door says so in one line
        return False


def describe_precision(config):
    """Which precision the products of a run have, and why, for a person."""
    pays = has_bf16(config.device)
    if config.bf16 and pays:
        return "bf16, which this device has units for"
    if config.bf16:
        return "bf16, as asked; --no-bf16 is faster without units for it, and beside other programs"
    return "fp32, " + ("as asked" if pays else "since bf16 does not pay on this device")


def place(module, config):
    """Move a module to the config's device, in the layout that its convolutions are fast in."""
    # On a CPU GroupNorm is several times slower channels-last, and so is SiLU where two layouts
    # meet.
    cpu = torch.device(config.device).type == "cpu"
    layout = torch.contiguous_format if cpu else torch.channels_last
    return module.to(config.device, memory_format=layout)


def autocast(config):
    """bfloat16 for convolutions and matrix products, if the config says so."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16)


def compile_network(config, ddpm, warm_up=None):
    """`torch.compile` the network and try it. If that fails, a line says so and the run goes on.

    It tries inference with the number of images of a grid, and `warm_up(n)`, which trains on n
    images, for both sizes of a batch: with a second size, torch makes one graph for all.
    """
    if not config.use_compile:
        return
    ddpm.network.compile()
    sizes = (config.batch_size, config.train_size % config.batch_size)
    try:
        with torch.random.fork_rng([ddpm.device] if ddpm.device.type == "cuda" else []):
            for n in filter(None, sizes if warm_up else ()):
                warm_up(n)
            with autocast(config):
                ddpm.sample(config.num_samples, None if ddpm.num_classes is None else 0, steps=1)
    except Exception as error:  # compilers fail in too many ways to list
        ddpm.network.compile(disable=True)
        print(f"torch.compile failed ({one_line(error)}); going on without it", file=sys.stderr)
    ddpm.zero_grad()


def unwrapped(network):
    """The module inside the wrappers of `torch.compile` and (Distributed)DataParallel."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(network, parallel) or hasattr(network, "_orig_mod"):
        network = network.module if isinstance(network, parallel) else network._orig_mod
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


def prepare_process():
    """Settings of the process: fast products, memory that is kept, a console for all texts."""
    torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16, on GPUs that have it
    torch.backends.cudnn.benchmark = True
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # on some consoles 'é' would otherwise end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def keep_freed_memory():
    """Have glibc keep freed memory for the next step instead of handing it back to the system.

    Each step frees and asks for the same 30 MB; the page faults of that were a tenth of a step on a
    CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: bytes free at the heap's end before it shrinks
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: bytes above which memory is mapped on its own


@contextmanager
def errors_in_one_line():
    """Out of memory, errors of the system and a lost process become one line and exit status 1."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, getattr(dist, "DistError", ())) or "gloo" in str(error):
            raise SystemExit(
                "train_eval.py: another process of the run has ended, or cannot be reached "
                f"({one_line(error)}); --resume goes on, with any number of processes"
            ) from None
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not memory and "DefaultCPUAllocator" not in str(error):  # torch's words for a CPU's
            raise
        raise SystemExit(
            f"train_eval.py: out of memory ({one_line(error)}); try a smaller --batch_size or "
            "--base_channels"
        ) from None
    except OSError as error:  # a full disk, most likely
        raise SystemExit(f"train_eval.py: {error}; what was saved before is whole") from None
