"""Signals that a person sends to a run, and its threads on a CPU that is not quiet."""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


@contextmanager
def patient_threads():
    """Inside, while other programs want the cores, OpenMP's threads wait asleep, not spinning.

    GNU OpenMP lets a thread spin for milliseconds while it waits for another one, which may not be
    scheduled, but hardly at all in a process with more threads than cores. So while others work,
    idle threads are added. Those that compute stay as they are, and so do the bits. A variable of
    the user's, and other systems, leave all as it is.
    """
    done, variables = threading.Event(), {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    linux = sys.platform == "linux" and not variables & os.environ.keys()
    before = torch.get_num_threads()
    if linux:
        torch.set_num_threads(min(before, _cores()))
    if linux and torch.get_num_threads() > 1:
        threading.Thread(target=_watch_others, args=(done,), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        torch.set_num_threads(before)


def _cores(quota="/sys/fs/cgroup/cpu.max"):
    """The cores that this process may use, also in a container with a quota of their time."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # no such file; no number but "max"
        time_, period = Path(quota).read_text().split()
        cores = min(cores, max(1, int(time_) // int(period)))
    return cores


def _watch_others(done, pause=1.0):
    """Until `done` is set, see every `pause` seconds whether others need the cores we use."""
    cores, idle_threads = _cores(), None
    before = _core_seconds()
    while before is not None and not done.wait(pause) and (now := _core_seconds()) is not None:
        others = now[0] - before[0] - (now[1] - before[1])
        crowded = others > (cores - torch.get_num_threads() + 0.25) * (now[2] - before[2])
        before = now
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
    """Seconds of work of all cores, those for this process, and the time; None without /proc."""
    try:
        with open("/proc/stat") as file:
            user, nice, system = map(int, file.readline().split()[1:4])
    except (OSError, ValueError):
        return None
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), time.process_time(), time.monotonic()


def _add_threads(number, done):
    """Have OpenMP keep so many threads for this one, until `done` is set."""
    before = torch.get_num_threads()
    # of this thread, and of any that begins before the number is set back
    torch.set_num_threads(number)
    torch.zeros(number * 2**15).add_(1)  # torch gives each thread 2^15 numbers
    torch.set_num_threads(before)
    done.wait()


class Interrupt:
    """Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 while a run goes on, as a context manager.

    Ctrl-C, SIGTERM and SIGHUP (of a lost terminal) end the block by KeyboardInterrupt, but inside
    `after_the_step` the first is only a request, which `asked` reports. SIGUSR1 asks for a save.
    What the shell ignores (`nohup`, a script's background job) stays ignored. In a thread other
    than the main one Python allows no handlers, so there it does nothing.

    Args:
        agree: makes one number of those of all processes of the run.
        several: whether a launcher started several. It sends again what the terminal has sent
            already; and they agree at every tenth step alone, since each waits for the others.

    Attributes:
        signum: the signal that ends the run, or 0.
        status: the exit status that belongs to it, as shells count: 130 for Ctrl-C, 143 for
            SIGTERM.
    """

    SAVE, HANGUP = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGHUP"))  # not on Windows

    def __init__(self, agree=int, several=False):
        self.agree, self.several = agree, several
        self.signum, self.save, self.immediate = 0, False, True
        self.before = {}

    @property
    def status(self):
        return 128 + (self.signum or signal.SIGINT)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in filter(None, (signal.SIGINT, signal.SIGTERM, self.HANGUP, self.SAVE)):
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self.before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame):
        if signum == self.SAVE:
            self.save = True
            return
        again, self.signum = bool(self.signum), self.signum or signum
        if again and (self.several or signum == self.HANGUP):  # which a shell may send again
            return
        if again or self.immediate:
            raise KeyboardInterrupt
        if sys.stderr is not None:  # else 2 may be another file
            with suppress(OSError):  # the `tee` behind a pipe ends by the same Ctrl-C
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def asked(self, step=0):
        """What a process of the run was asked for by this step: 'stop', 'save' or None."""
        if self.several and step % 10:
            return None
        asked = self.agree(2 * self.signum + self.save)  # as one number, for all processes
        self.save = False
        if asked > 1:
            self.signum = asked // 2
        return "stop" if asked > 1 else "save" if asked else None

    @contextmanager
    def after_the_step(self):
        """Inside, the first signal is a request; a second one ends the block at once."""
        self.immediate = False
        try:
            yield
        finally:
            self.immediate = True
