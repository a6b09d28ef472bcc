"""The threads of a run on a CPU, on a machine that is not quiet."""

import os
import sys
import threading
import time
from contextlib import contextmanager

import torch


@contextmanager
def patient_threads():
    """Inside, while other programs want the cores, OpenMP's threads wait asleep instead of spinning.

    GNU OpenMP lets a thread spin for milliseconds while it waits for another one, which may not be scheduled, but
    hardly at all in a process with more threads than cores. So while others work, idle threads are added. Those that
    compute stay as they are, and so do the bits. A variable of the user's, and other systems, leave all as it is.
    """
    done, variables = threading.Event(), {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    if (
        sys.platform == "linux"
        and not variables & os.environ.keys()
        and torch.get_num_threads() > 1
    ):
        threading.Thread(target=_watch_others, args=(done,), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch_others(done, pause=1.0):
    """Every `pause` seconds see whether others use more than the cores that are left, until `done` is set."""
    cores, idle_threads = len(os.sched_getaffinity(0)), None
    before = _core_seconds()
    while before is not None and not done.wait(pause) and (now := _core_seconds()) is not None:
        others = now[0] - before[0] - (now[1] - before[1])
        crowded, before = (
            others > (cores - torch.get_num_threads() + 0.25) * (now[2] - before[2]),
            now,
        )
        if crowded and idle_threads is None:
            idle_threads = threading.Event()
            threading.Thread(
                target=_add_threads, args=(cores + 1, idle_threads), daemon=True
            ).start()
        elif not crowded and idle_threads is not None:
            idle_threads.set()
            idle_threads = None
    if idle_threads is not None:
        idle_threads.set()


def _core_seconds():
    """Seconds that all programs have used the cores, that this process has, and the time; None if /proc is hidden."""
    try:
        with open("/proc/stat") as file:
            user, nice, system = map(int, file.readline().split()[1:4])
    except (OSError, ValueError):
        return None
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), time.process_time(), time.monotonic()


def _add_threads(number, done):
    """Have OpenMP keep so many threads for this one, until `done` is set."""
    before = torch.get_num_threads()
    torch.set_num_threads(
        number
    )  # of this thread, and of any that begins before the number is set back
    torch.zeros(number * 2**15).add_(1)  # torch gives each thread 2^15 numbers
    torch.set_num_threads(before)
    done.wait()
