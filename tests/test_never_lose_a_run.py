"""A run that is killed or stopped loses nothing: real processes and signals.

Python takes seconds to start, so a server imports the script once and forks a process for each run.
In it `patches`, functions and their arguments, arrange for the fault; then the script runs.
"""

import itertools
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import FLAGS, same, snapshot

import train_eval
from support import pictures
from support.checkpoint import load_checkpoint, load_last

STEPS = 24  # two epochs of 12; looks at 15 and 24, saves at 5, 10, 15, 20 and 24
RUN = FLAGS + "--use_augmentation --dropout 0.1 --timestep_sampling importance".split()
RUN += "--train_size 96 --log_every 3 --sample_every 15 --save_every 5".split()
RESUME = "--resume --device cpu --no-bf16".split()
STEP, KILL = "train_eval.train_step", signal.SIGKILL
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [__name__, "matplotlib.pyplot", "torch._dynamo", "torch.utils.tensorboard", "torchvision"]
)


# Processes and what happens to them


def fork(*calls):
    """Calls (function, args, patches, environment) at once, each in a process of its own.

    Returns status, stdout and stderr of each. The status is minus the signal that killed it.
    """
    python_path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent)))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, PYTHONPATH=python_path),  # for the server
    ):
        outputs = [Path(folder, str(k)) for k in range(len(calls))]
        running = [SERVER.Process(target=child, args=(*a,)) for a in zip(outputs, calls)]
        for process in running:
            process.start()
        for process in running:
            process.join()
        texts = [[Path(f"{o}.{end}").read_text() for end in ("out", "err")] for o in outputs]
    return [(process.exitcode, *text) for process, text in zip(running, texts)]


def child(output, call):
    """What a process does."""
    for number, path in enumerate((os.devnull, f"{output}.out", f"{output}.err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    signal.alarm(100)  # nothing waits forever
    function, args, patches, environment = call
    os.environ.update(environment)
    torch.set_num_threads(1)
    for patch, *its in patches:
        patch(*its)
    sys.exit(function(*args))


def run(folder, *flags, patches=()):
    """Status, stdout and stderr of the script in a folder."""
    argv = [*map(str, flags), "--save_dir", str(folder)]
    return fork((train_eval.main, [argv], [(draw_no_curve,), *patches], {}))[0]


def draw_no_curve():
    """matplotlib would take a third of each run's time."""
    pictures.write_training = lambda config, progress: None


def at_call(target, number, action, ending="", when="before", delay=0.0):
    """Act at a call of a function, a dotted name; only calls with a path that ends so count.

    An action is a signal to the process, an error or a function; `when` is 'before', 'half written'
    or 'after'.
    """
    place, _, name = target.rpartition(".")
    place, calls = pkgutil.resolve_name(place), itertools.count(1)
    function = getattr(place, name)

    def act():
        if isinstance(action, Exception):
            raise action
        return action() if callable(action) else os.kill(os.getpid(), action)

    def called(*args, **options):
        args_or_names = [getattr(arg, "name", arg) for arg in args]  # of open files
        paths = [os.fspath(arg) for arg in args_or_names if isinstance(arg, (str, os.PathLike))]
        counts = not ending or any(path.endswith(ending) for path in paths)
        now = counts and next(calls) == number
        if now and delay:
            threading.Timer(delay, act).start()
        elif now and when == "before":
            act()
        result = function(*args, **options)
        if now and when == "half written":
            os.truncate(paths[0], os.path.getsize(paths[0]) // 2)
        if now and when != "before":
            act()
        return result

    setattr(place, name, called)


# A run to compare with


@pytest.fixture(scope="module")
def flags(data_flags):
    return [*RUN, *data_flags]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    status, _, err = run(folder, *flags)
    assert status == 0, err
    assert [step for step, _ in load_last(folder)["test_curve"]] == [15, STEPS]
    assert len(list(folder.glob("samples/step_*.png"))) == 2
    return folder


def check_same(folder, whole):
    """A run came to what the run never stopped came to, to the bit, but for names and clocks."""
    last, expected = map(load_last, (folder, whole))
    assert {"network", "ema", "optimizer", "rng", "stats", "train_curve"} <= expected.keys()
    assert last.keys() == expected.keys()
    compared = expected.keys() - {"config", "log"}
    assert [name for name in compared if not same(last[name], expected[name])] == []
    paths = folder / "best_model.pt", whole / "best_model.pt"
    best, expected = (load_checkpoint(path, ["weights", "info"]) for path in paths)
    assert same(best["weights"], expected["weights"])
    assert same(best["info"]["test_loss"], expected["info"]["test_loss"])
    assert snapshot(folder / "samples") == snapshot(whole / "samples")
    assert leftovers(folder) == []


def leftovers(folder):
    return [path for pattern in ("*.partial", "run_*") for path in folder.rglob(pattern)]


# The tests


def test_five_kills_change_no_bit(flags, whole, tmp_path):
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**9)))
    print(f"to have the same kills again: KILL_SEED={seed}")
    draw = random.Random(seed)
    kills = {
        "in the middle of writing": ("torch.save", 2, KILL, "last.pt.partial", "half written"),
        "between the renames": ("os.replace", 2, KILL, "last.pt"),
        "after them, and after a look": ("os.replace", 1, KILL, "last.pt", "after"),
        "in a step": (STEP, draw.randint(1, 3), KILL, "", "before", draw.uniform(1e-3, 0.05)),
        "while it loads": (
            "support.checkpoint.load_last",
            1,
            KILL,
            "",
            "",
            draw.uniform(1e-3, 0.05),
        ),
    }
    steps = []
    for where, kill in kills.items():
        begun = flags if not steps else RESUME
        status, _, err = run(tmp_path, *begun, patches=[(at_call, *kill)])
        assert status == -KILL, (where, err)
        steps.append(load_last(tmp_path)["step"])
    assert steps[:3] == [5, 10, 15] and 15 <= steps[3] <= steps[4], steps
    status, _, err = run(tmp_path, *RESUME)
    assert status == 0, err
    check_same(tmp_path, whole)


def test_signals_save_or_stop_a_run_and_change_no_bit(flags, whole, tmp_path):
    patches = [(at_call, STEP, 7, signal.SIGINT)] * 2
    status, _, err = run(tmp_path, *flags, patches=patches)
    assert status == 130 and "Traceback" not in err, err
    assert "stopped at once; what was saved before is whole" in err
    assert load_last(tmp_path)["step"] == 5 and leftovers(tmp_path) == []
    keep = partial(shutil.copy, tmp_path / "last.pt", tmp_path / "kept.pt")
    patches = [(at_call, STEP, 6, signal.SIGUSR1), (at_call, STEP, 7, keep)]
    patches += [(at_call, "train_eval.load_data", 1, signal.SIGUSR1)]  # before the first step
    patches += [(at_call, "train_eval.test_loss", 4, signal.SIGTERM)]  # in the last look
    status, out, err = run(tmp_path, *RESUME, patches=patches)
    assert status == 143 and err.count("saved at step") == 2, err
    assert "saved at step 6\n" in err and "saved at step 11\n" in err, err
    assert load_checkpoint(tmp_path / "kept.pt", ["step"])["step"] == 11
    assert f"stopped at step {STEPS}; everything is saved" in out and "--resume" in out
    assert load_last(tmp_path)["step"] == STEPS and leftovers(tmp_path) == []
    status, _, err = run(tmp_path, *RESUME)
    assert status == 0, err
    check_same(tmp_path, whole)


def test_a_new_run_moves_the_earlier_one_aside(flags, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    status, out, err = run(folder, *flags, patches=[(at_call, STEP, 1, signal.SIGTERM)])
    assert status == 143 and load_last(folder)["step"] == 1, err
    assert load_checkpoint(folder / "best_model.pt", ["info"])["info"]["step"] == 1  # before a look
    (aside,) = folder.glob("run_*")
    assert f"what an earlier run left in {folder} is now in {aside}" in out
    assert load_last(aside)["step"] == STEPS
