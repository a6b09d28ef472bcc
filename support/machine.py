"""What a run needs of the machine: device, precision, memory layout, compiler, signals and console."""

import ctypes
import os
import signal
import sys
import threading
from contextlib import contextmanager

import torch


def has_bf16(device):
    """Whether this device computes bfloat16 products in hardware: GPUs since Ampere, CPUs with AMX."""
    try:
        if not str(device).startswith("cuda"):
            return getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
        with torch.cuda.device(device):  # the answer is for the current device
            return torch.cuda.is_bf16_supported(including_emulation=False)
    except Exception:  # no such device: check_device says so in one line
        return False


def check_device(device):
    """ValueError, in one line, for a device that cannot be used here."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).cpu()
    except Exception as error:  # each backend has its own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r}: cannot be used here ({reason}); try --device cpu") from None


def place(module, config):
    """Move a module to the config's device, in the memory layout that its convolutions are fast in."""
    # In float32 on a CPU the plain layout makes a step a tenth faster; everything else is faster channels-last.
    plain = torch.device(config.device).type == "cpu" and not config.bf16
    return module.to(config.device, memory_format=torch.contiguous_format if plain else torch.channels_last)


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
    x0 = torch.zeros(config.batch_size, config.channels, config.image_size, config.image_size, device=config.device)
    y = torch.zeros(len(x0), dtype=torch.long, device=config.device) if config.use_conditional_generation else None
    try:
        with torch.random.fork_rng([x0.device] if x0.is_cuda else []), autocast(config):
            for n in (config.batch_size, config.train_size % config.batch_size) if training else ():
                if n:  # with a second size, torch makes one graph for all sizes
                    ddpm(x0[:n], None if y is None else y[:n]).backward()
            label = None if y is None else 0
            ddpm.sample(config.num_samples, label, steps=1)
    except Exception as error:  # compilers fail in too many ways to list
        ddpm.network.compile(disable=True)
        print(f"torch.compile failed ({in_one_line(error)}); going on without it", file=sys.stderr)
    ddpm.zero_grad()


def prepare_process():
    """Settings of the whole process: fast products, memory that is kept, and a console that takes any character."""
    torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16, on GPUs that have it
    torch.backends.cudnn.benchmark = True
    keep_freed_memory()
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
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: largest number of bytes that is not mapped on its own


class Interrupt:
    """Ctrl-C and SIGTERM while a run trains: `requested` becomes True, and the loop ends after its step.

    A second one raises KeyboardInterrupt. Use it as a context manager. In a thread other than the main one Python
    allows no handlers, so there it does nothing.
    """

    def __init__(self):
        self.requested = self.immediate = False
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame):
        if self.requested or self.immediate:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    @contextmanager
    def at_once(self):
        """Inside, Ctrl-C ends the block at once, and `requested` is True after it."""
        self.immediate = True
        try:
            yield
        except KeyboardInterrupt:
            if self.requested:
                raise
            self.requested = True
        finally:
            self.immediate = False


@contextmanager
def warning_if_it_fails(what):
    """An error inside becomes a warning, and the run goes on after the block."""
    try:
        yield
    except Exception as error:
        print(f"\n{what} failed ({in_one_line(error)}); the run goes on without it", file=sys.stderr)


@contextmanager
def errors_in_one_line():
    """Out of memory and errors of the system become one line and exit status 1."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise  # that is how torch says that a CPU is out of memory
        raise SystemExit(f"train_eval.py: out of memory ({in_one_line(error)}); try a smaller --batch_size or "
                         "--base_channels") from None
    except OSError as error:  # a full disk, most likely
        raise SystemExit(f"train_eval.py: {error}; what was saved before is whole") from None


def in_one_line(error):
    """The kind of an error and the first line of its message."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {reason}"
