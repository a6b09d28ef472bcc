"""Signals that a person sends to a run; its threads while other programs want the cores."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support import threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP and /proc")


def wait_for_threads(number):
    end = time.monotonic() + 20
    while len(os.listdir("/proc/self/task")) != number:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_threads_are_added_while_others_work_and_none_of_them_computes(monkeypatch):
    load, clock = [0.0], [0.0, 0.0]  # cores that others use; seconds that all have used, the time

    def seconds():
        clock[:] = clock[0] + load[0] + 0.5, clock[1] + 1  # half a core is this process's own
        return clock[0], clock[1] / 2, clock[1]

    watch, cores, own = threads._watch_others, len(os.sched_getaffinity(0)), torch.get_num_threads()
    monkeypatch.setattr(threads, "_core_seconds", seconds)
    monkeypatch.setattr(threads, "_watch_others", lambda done: watch(done, pause=0.02))
    monkeypatch.setattr(os, "environ", {})
    torch.set_num_threads(2)
    torch.ones(2**18).sum()
    before = len(os.listdir("/proc/self/task"))
    with threads.patient_threads():
        for _ in range(2):
            load[0] = max(0.0, cores - 2.0)
            wait_for_threads(before + 1)  # the one that watches
            load[0] = cores - 1.5  # one core and a half are left for two threads
            wait_for_threads(before + 2 + cores)
            assert torch.get_num_threads() == 2
    wait_for_threads(before)
    assert ThreadPoolExecutor().submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(own)


def test_a_variable_that_the_person_has_set_is_left_to_decide(monkeypatch):
    monkeypatch.setattr(threading, "Thread", lambda **options: pytest.fail("watched"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setattr(os, "environ", {name: "2"})
        threads.patient_threads().__enter__()


def test_the_load_is_that_of_all_programs_and_of_this_one(monkeypatch):
    before = threads._core_seconds()
    while time.process_time() - before[1] < 0.3:
        torch.ones(1000).sum()
    after = threads._core_seconds()
    assert after[0] - before[0] > 0.2 and after[1] - before[1] >= 0.3 and after[2] > before[2]
    for path in ("/proc/hidden", os.devnull):  # a system that hides its load is left alone
        monkeypatch.setattr("builtins.open", lambda _, path=path: os.fdopen(os.open(path, 0)))
        assert threads._core_seconds() is None
        threads._watch_others(threading.Event(), pause=0.01)  # comes back


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_an_order(signum, capfd):
    before, interrupt = signal.getsignal(signum), threads.Interrupt()
    with pytest.raises(KeyboardInterrupt), interrupt, interrupt.after_the_step():
        signal.raise_signal(signum)
        assert interrupt.asked(3) == interrupt.asked() == "stop"
        assert interrupt.status == 128 + signum and not interrupt.immediate
        signal.raise_signal(signum)
    assert interrupt.immediate and signal.getsignal(signum) is before
    assert capfd.readouterr().err.count("stopping after this step") == 1
    with pytest.raises(KeyboardInterrupt), threads.Interrupt():  # while nothing is trained
        signal.raise_signal(signum)


def test_a_lost_terminal_is_a_request_however_often_and_what_a_shell_ignores_is_none():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with threads.Interrupt() as interrupt, interrupt.after_the_step():
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.asked() == "stop" and interrupt.status == 129
    signal.signal(signal.SIGHUP, before)
    for signum in (signal.SIGHUP, signal.SIGINT):  # under nohup; of a script's background job
        before = signal.signal(signum, signal.SIG_IGN)
        with threads.Interrupt() as interrupt, interrupt.after_the_step():
            signal.raise_signal(signum)
            assert interrupt.asked() is None
        assert signal.signal(signum, before) == signal.SIG_IGN


@pytest.mark.parametrize("text, cores", [("150000 100000", 1), ("max 100000", 3), ("", 3)])
def test_a_containers_quota_counts(text, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert threads._cores(tmp_path / "cpu.max") == cores
    assert threads._cores(tmp_path / "missing") == 3


def test_a_save_is_asked_for_once_and_a_stop_comes_first():
    with threads.Interrupt(several=True) as interrupt, interrupt.after_the_step():
        signal.raise_signal(signal.SIGUSR1)
        assert interrupt.asked(9) is None  # processes agree at every tenth step
        assert interrupt.asked(10) == "save" and interrupt.asked() is None
        for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # a launcher repeats it
            signal.raise_signal(signum)
        assert interrupt.asked() == "stop" and interrupt.status == 143


def test_another_process_may_be_asked_and_another_thread_has_no_signals():
    def elsewhere(answers, signum=signal.SIGINT):
        with threads.Interrupt(agree=lambda number: max(number, answers.pop())) as interrupt:
            return signal.getsignal(signum), [interrupt.asked() for _ in "123"], interrupt.status

    found = ThreadPoolExecutor().submit(elsewhere, [30, 1, 0]).result()
    assert found == (signal.getsignal(signal.SIGINT), [None, "save", "stop"], 143)
