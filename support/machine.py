"""What a run needs of the machine: device, precision, memory layout, compiler, one-line errors."""

import ctypes
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from torch import nn

from support.files import one_line

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile


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


def describe_device(config):
    """The device for a person: a card with its memory; a CPU, its threads and a hidden card."""
    if torch.device(config.device).type == "cuda":
        card = torch.cuda.get_device_properties(config.device)
        return f"{config.device}, {card.name} of {card.total_memory / 1e9:.0f} GB"
    advice = f" ({why})" if (why := why_no_card(config.device)) else ""
    return f"{config.device}, {torch.get_num_threads()} threads{advice}"


def check_memory(name, shape, device):
    """ValueError if bytes of this shape, images of a data set, fit no memory here or on a card."""
    memory, device = {}, torch.device(device)
    if hasattr(os, "sysconf"):  # not on Windows
        memory["this machine"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory[str(device)] = torch.cuda.get_device_properties(device).total_memory
    for where, size in memory.items():
        if math.prod(shape) > size:
            raise ValueError(
                f"dataset {name}: {shape[0]:,} images take {math.prod(shape) / 1e9:,.1f} GB, and "
                f"{where} has {size / 1e9:,.1f}; expected a smaller train_size or image_size"
            )


def why_no_card(device):
    """Why this device cannot be used, or for a CPU the card beside it; '' if that is not known."""
    kind = str(device).partition(":")[0]
    with suppress(Exception):  # no such device
        if kind in ("cpu", "cuda") and torch.version.cuda is None and shutil.which("nvidia-smi"):
            return "there is a card, but this torch has no CUDA: see pytorch.org"
        if kind in ("cpu", "mps") and (kind == "mps" or torch.backends.mps.is_available()):
            return "Apple's GPU has no float64, which the tables need"
        if kind == "cuda" and not _has_code_for(of := torch.cuda.get_device_capability(device)):
            return f"this torch has no code for capability {of[0]}.{of[1]}: see pytorch.org"
    return ""


def _has_code_for(capability):
    """Whether torch was built for such a card: its code fits newer ones of the same generation."""
    for arch in torch.cuda.get_arch_list():  # sm_80: code; compute_90: source for any newer card
        kind, _, number = arch.partition("_")
        built = divmod(int(number.rstrip("af")), 10)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def compiled_if_usual(config, n):
    """Inside, a batch of another size than usual is not compiled.

    Else torch would go on with one graph for all sizes, which is slower.
    """
    odd = config.use_compile and n != config.batch_size
    return torch.compiler.set_stance("force_eager") if odd else nullcontext()


def place(module, config):
    """Move a module to the config's device, in the layout that its convolutions are fast in."""
    # On a CPU GroupNorm is several times slower channels-last, and so is SiLU where two layouts
    # meet; on a GPU without TF32, convolutions in float32 are (pytorch#50036).
    fast = torch.device(config.device).type == "cuda"
    fast = fast and (config.bf16 or torch.cuda.get_device_capability(config.device) >= (8, 0))
    layout = torch.channels_last if fast else torch.contiguous_format
    return module.to(config.device, memory_format=layout)


def autocast(config):
    """bfloat16 for convolutions and matrix products, if the config says so."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16)


def compile_network(config, ddpm, warm_up=None):
    """`torch.compile` the network and try it. If that fails, a line says so and the run goes on.

    It tries inference with the number of images of a grid, and `warm_up(n)`, which trains on n
    images.
    """
    if not config.use_compile:
        return
    began = time.perf_counter()
    ddpm.network.compile(mode=config.compile_mode)
    print("compiling the network, which can take minutes ...")
    try:
        with torch.random.fork_rng([ddpm.device] if ddpm.device.type == "cuda" else []):
            if warm_up:
                warm_up(config.batch_size)
            with autocast(config):
                ddpm.sample(config.num_samples, None if ddpm.num_classes is None else 0, steps=1)
        print(f"compiled in {time.perf_counter() - began:.0f} seconds")
    except Exception as error:  # compilers fail in too many ways to list
        ddpm.network.compile(disable=True)
        lines = [line for line in str(error).splitlines() if "Error" in line]  # of a compiler's
        reason = lines[-1].strip() if lines else one_line(error)
        print(f"torch.compile failed ({reason}); going on without it", file=sys.stderr)
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


@contextmanager
def prepared_process():
    """Inside: fast products, memory that is kept, a console for all texts, at once."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16, on GPUs that have it
    torch.backends.cudnn.benchmark = True
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # on some consoles 'é' would otherwise end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


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
        # the words for it of torch on a CPU, and of cuDNN and cuBLAS
        if not memory and not any(w in str(error) for w in ("DefaultCPUAllocator", "ALLOC_FAILED")):
            raise
        raise SystemExit(
            f"train_eval.py: out of memory ({one_line(error)}); try --grad_accumulation 2 or more, "
            "or a smaller --batch_size or --base_channels"
        ) from None
    except OSError as error:  # a full disk, most likely
        raise SystemExit(f"train_eval.py: {error}; what was saved before is whole") from None
