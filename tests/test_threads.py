"""The threads of a run while other programs want the cores."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from support import threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP and /proc are Linux's")
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture
def two_threads(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def number_of_threads():
    return len(os.listdir("/proc/self/task"))


def wait_until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_threads_are_added_while_others_work_and_only_then_and_none_that_computes(
    two_threads, monkeypatch
):
    load, clock = [0.0], [0.0, 0.0]  # cores that others use; seconds that they have used, the time

    def seconds():
        clock[0], clock[1] = (
            clock[0] + load[0] + 0.5,
            clock[1] + 1,
        )  # half a core is this process's own
        return clock[0], clock[1] / 2, clock[1]

    watch, cores = threads._watch_others, len(os.sched_getaffinity(0))
    monkeypatch.setattr(threads, "_core_seconds", seconds)
    monkeypatch.setattr(threads, "_watch_others", lambda done: watch(done, pause=0.02))
    torch.ones(2**18).sum()
    before = number_of_threads()
    with threads.patient_threads():
        wait_until(lambda: number_of_threads() == before + 1)  # the one that watches
        time.sleep(0.2)
        assert number_of_threads() == before + 1
        for _ in range(2):
            load[0] = cores - 1.5  # one core and a half are left for two threads
            wait_until(lambda: number_of_threads() == before + 2 + cores)
            assert torch.get_num_threads() == 2
            load[0] = max(0.0, cores - 2.0)
            wait_until(lambda: number_of_threads() == before + 1)
        load[0] = float(cores)
        wait_until(lambda: number_of_threads() > before + 1)
    wait_until(lambda: number_of_threads() == before)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_that_the_person_has_set_is_left_to_decide(two_threads, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(threads, "_watch_others", lambda done: pytest.fail("watched"))
    with threads.patient_threads():
        pass


@pytest.mark.parametrize("content", [None, "", "cpu", "cpu a b c"])
def test_a_system_that_hides_its_load_is_left_alone(two_threads, monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "stat").write_text(content)
    monkeypatch.setattr(
        "builtins.open", lambda path, *args, **options: Path(tmp_path / "stat").open()
    )
    assert threads._core_seconds() is None
    threads._watch_others(threading.Event(), pause=0.01)  # comes back
    answers = iter(
        [(0.0, 0.0, 0.0), (9.0, 0.0, 1.0), None]
    )  # hidden later on, while threads are added
    monkeypatch.setattr(threads, "_core_seconds", lambda: next(answers))
    threads._watch_others(threading.Event(), pause=0.01)


def test_the_load_is_that_of_all_programs_and_of_this_one():
    before = threads._core_seconds()
    while time.process_time() - before[1] < 0.3:
        torch.ones(1000).sum()
    after = threads._core_seconds()
    assert after[0] - before[0] > 0.2 and after[1] - before[1] >= 0.3 and after[2] > before[2]
