"""Several processes as one run: torchrun starts them, DistributedDataParallel averages gradients.

Each draws the randomness of the whole batch and computes a share of it. What is sampled or measured
is cut into fixed chunks, each with a seed of its own. So N processes compute what one computes.
"""

import functools
import hashlib
import math
import os
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from support import checks
from support.console import progress_bar


def world():
    """(rank, number of processes) of this run: (0, 1) unless torchrun started several."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def is_main():
    """Whether this is the process that writes and prints."""
    return world()[0] == 0


def on_main(function):
    """The function, which one process calls for all: in the others it does nothing."""

    @functools.wraps(function)
    def guarded(*args, **options):
        return function(*args, **options) if is_main() else None

    return guarded


def launched():
    """Whether torchrun started this process and others."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "MASTER_ADDR" in os.environ


def check_device(device):
    """ValueError for a device that cannot be used, or that the processes cannot share."""
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if launched() and device != "cpu":
        if device != "cuda" or local_rank >= gpus:
            raise ValueError(
                f"device {device!r} for process {local_rank + 1} of this machine, which has {gpus} "
                "GPUs: expected cuda, and at most one process a GPU, or cpu"
            )
        if not dist.is_nccl_available():
            raise ValueError("device 'cuda' for several processes: needs NCCL; this torch has none")
        torch.cuda.set_device(local_rank)  # else each would open the first card
    checks.device(device)


def tolerable_errors():
    """Errors in a measurement after which a run goes on.

    Under several processes only those of the system: after any other they no longer do the same.
    """
    return Exception if world()[1] == 1 else OSError


@contextmanager
def joined(config):
    """Inside, the processes that torchrun started are one run: gloo joins CPUs, nccl GPUs."""
    if not launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo"
    # a lost process is noticed by its connection; the first one may measure or draw for long
    dist.init_process_group(backend, timeout=timedelta(days=1))
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


@contextmanager
def main_first():
    """The block runs in the first process of each machine, then in the others."""
    first = not int(os.environ.get("LOCAL_RANK", 0))
    if not first:
        barrier()
    yield
    if first:
        barrier()


def largest(number):
    """The largest of a whole number of each process."""
    if world()[1] == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def check_same(values):
    """ValueError unless all processes have the same values, {name: anything with a repr}."""
    if world()[1] == 1:
        return
    here = {name: repr(value) for name, value in values.items()}
    everywhere = [None] * world()[1]
    dist.all_gather_object(everywhere, here)
    different = [
        f"{name} (here {value})"
        for name, value in here.items()
        if any(other[name] != value for other in everywhere)
    ]
    if different:
        raise ValueError(
            f"the processes of this run differ in {', '.join(different)}; expected the same code, "
            "flags and data for all"
        )


def share(n):
    """The slice of n images that this process computes. Of few images each computes them all."""
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


class Losses(nn.Module):
    """`ddpm.losses` as what a module computes, which DistributedDataParallel can wrap."""

    def __init__(self, ddpm):
        super().__init__()
        self.ddpm = ddpm

    def forward(self, *batch):
        return self.ddpm.losses(*batch)


def parallel(ddpm):
    """`Losses` of a model, whose gradients are averaged if there are several processes."""
    model = Losses(ddpm)
    if world()[1] == 1:
        return model
    device_ids = [torch.cuda.current_device()] if ddpm.device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 has another word for the third
        return nn.parallel.DistributedDataParallel(
            model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def micro_batches(model, n, parts):
    """Split this process's share of n images into `parts` to run through the model in turn.

    Yields (part, scale): a slice of the batch, and what to multiply the sum of its losses with. The
    gradients then add up to that of the mean over the whole batch. Under several processes each has
    dropout of its own.
    """
    here, number = share(n), world()[1]
    size = here.stop - here.start
    parts, scale = min(parts, size), (number if n >= number else 1) / n
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=number > 1):
        if number > 1:
            # From the state, which moves on with every step: a GPU's number would be waited for.
            cuda = device.type == "cuda"
            state = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
            digest = hashlib.sha256(state.numpy().tobytes()).digest()
            torch.manual_seed(int.from_bytes(digest[:6], "big") + world()[0])
        for k in range(parts):
            part = slice(here.start + k * size // parts, here.start + (k + 1) * size // parts)
            last = k == parts - 1  # gradients are averaged once
            with nullcontext() if last or number == 1 else model.no_sync():
                yield part, scale


def in_chunks(n, seed, compute, size=100, advice=""):
    """Compute something of n images in chunks, of which each process computes every N-th.

    Args:
        n: number of images.
        seed: decides the seeds of the chunks.
        compute: called with a slice of the images and a seed; returns a tensor, images first.
        size: images in a chunk. Many chunks have a progress bar.
        advice: what to print if all chunks take more than ten minutes.

    Returns:
        The results one after the other, (n, ...), on the CPU of every process.
    """
    rank, number = world()
    found, mine = {}, range(rank, math.ceil(n / size), number)
    hidden, began = rank > 0 or len(mine) < 8, time.perf_counter()
    options = dict(total=n, unit="img", leave=False, disable=hidden, delay=2)
    with progress_bar(desc="computing", **options) as bar:
        for k in mine:
            own_seed = int(np.random.SeedSequence((seed, k)).generate_state(1)[0])
            found[k] = compute(slice(k * size, min(n, (k + 1) * size)), own_seed).cpu()
            bar.update(min(number * size, n - bar.n))
            minutes = (time.perf_counter() - began) * len(mine) / 60
            if advice and not rank and len(found) == 1 and minutes > 10:
                print(f"this takes about {minutes:.0f} minutes; {advice}", flush=True)
    if number > 1:
        everywhere = [None] * number
        dist.all_gather_object(everywhere, found)
        found = {k: part for parts in everywhere for k, part in parts.items()}
    return torch.cat([found[k] for k in sorted(found)])
