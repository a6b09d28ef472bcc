"""A run that is killed, stopped, damaged or out of disk loses nothing: real processes, real signals, real limits.

Python takes seconds to start, so a server imports the script once and forks a process for each run. In that process
`patches`, functions of this file, arrange for the fault; then the script runs as from a command line.
"""

import builtins
import itertools
import json
import os
import pickle
import pkgutil
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import metrics
import train_eval
from support import checkpoint, machine

NETWORK = (
    "--device cpu --no-bf16 --channels 1 --base_channels 32 --channel_mult 1 --num_res_blocks 1 --time_emb_dim "
    "8 --patch_size 4 --attention_resolutions none --sample_steps 2 --preview_steps 2 --num_samples 4 "
    "--epochs 2"
).split()
FLAGS = [
    *NETWORK,
    *(
        "--train_size 240 --test_size 20 --image_size 16 --batch_size 8 --use_conditional_generation "
        "--use_augmentation --dropout 0.1 --timestep_sampling importance --num_timesteps 20 "
        "--target_references 32 --log_every 4 --sample_every 6 --save_every 5"
    ).split(),
]
STEPS = 60  # two epochs of 30
RESUME = "--resume --device cpu --no-bf16".split()


# The server and its processes


def serve():
    """Run the script for each request, a line, and answer with its exit status, minus the signal that killed it."""
    import matplotlib.pyplot  # noqa: F401
    import torch.utils.tensorboard
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork() or run_script(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run_script(argv, patches, out, err):
    """What a child does; it ends as Python would."""
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    signal.alarm(100)  # nothing waits forever
    status = 1
    try:
        for name, *args in patches:
            globals()[name](*args)
        status = train_eval.main(argv)
    except SystemExit as error:
        status = (
            error.code if isinstance(error.code, int) else print(error.code, file=sys.stderr) or 1
        )
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(save_dir, *flags, patches=()) -> exit status, stdout, stderr."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    out, err = (tmp_path_factory.mktemp("server") / name for name in ("out", "err"))

    def run(save_dir, *flags, patches=()):
        argv = [*map(str, flags), "--save_dir", str(save_dir)]
        print(
            json.dumps({"argv": argv, "patches": patches, "out": str(out), "err": str(err)}),
            file=process.stdin,
            flush=True,
        )
        return int(process.stdout.readline()), out.read_text(), err.read_text()

    yield run
    process.stdin.close()
    assert process.wait(100) == 0


# Patches


def replace(target, make):
    """Put make(function) in the place of the function with this dotted name."""
    place, _, name = target.rpartition(".")
    place = pkgutil.resolve_name(place)
    setattr(place, name, make(getattr(place, name)))


def act(action):
    """Send this process a signal, or call a function of this file."""
    os.kill(os.getpid(), action) if isinstance(action, int) else globals()[action]()


def at_call(target, number, action, ending="", when="before", delay=0.0):
    """Act at a call of `target`; only calls with a path that ends so count."""

    def make(function):
        calls = itertools.count(1)

        def called(*args, **options):
            paths = [os.fspath(arg) for arg in args if isinstance(arg, (str, os.PathLike))]
            now = (not ending or any(path.endswith(ending) for path in paths)) and next(
                calls
            ) == number
            if now and delay:
                threading.Timer(delay, act, (action,)).start()
            elif now and when == "before":
                act(action)
            result = function(*args, **options)
            if now and when == "half written":
                os.truncate(paths[0], os.path.getsize(paths[0]) // 2)
            if now and when != "before":
                act(action)
            return result

        return called

    replace(target, make)


def refuse(target, first, last, error, *args):
    """Raise an error at the calls `first` to `last` of `target`."""

    def make(function):
        calls = itertools.count(1)

        def called(*its_args, **options):
            if first <= next(calls) <= last:
                raise getattr(builtins, error)(*args)
            return function(*its_args, **options)

        return called

    replace(target, make)


def stalled_download(signum):
    """A download that has written a part when the signal comes."""
    import torchvision

    def download(root, download):
        Path(root, "part").write_bytes(bytes(100))
        os.kill(os.getpid(), signum)
        time.sleep(60)

    torchvision.datasets.MNIST = download


def limit_files():
    """From now on no file can be as large as last.pt."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))


def tell_memory():
    print("VmRSS", Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def another_system(held):
    """Windows and macOS, as far as a run notices."""
    locking = (lambda *args: os.open("/", os.O_WRONLY)) if held else lambda *args: None
    machine.Interrupt.SAVE = checkpoint.fcntl = None
    sys.modules["msvcrt"] = SimpleNamespace(locking=locking, LK_NBLCK=2)
    sys.platform = "darwin"


def shallow_network():
    """A U-Net without its blocks, so that thousands of steps take seconds."""

    def make(init):
        def called(self, *args, **options):
            init(self, *args, **options)
            self.down = self.middle = self.up = torch.nn.ModuleList()

        return called

    replace("unet.UNet.__init__", make)


# Runs to compare with, and the tests


def same(a, b):
    """Whether two checkpoints hold the same, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check_same(folder, whole, pictures=True):
    """All that a run came to is what the run never stopped came to, but for names and clocks."""
    last, expected = (torch.load(path / "last.pt", weights_only=True) for path in (folder, whole))
    assert (
        last.keys() == expected.keys()
        and {"network", "ema", "optimizer", "rng", "train_curve"} <= last.keys()
    )
    assert [
        name
        for name in last
        if name not in ("config", "log") and not same(last[name], expected[name])
    ] == []
    assert same(
        *(
            torch.load(path / "best_model.pt", weights_only=True)["weights"]
            for path in (folder, whole)
        )
    )
    if pictures:
        names = sorted(path.name for path in (whole / "samples").iterdir())
        assert (
            len(names) >= 2 + STEPS // 6
            and sorted(path.name for path in (folder / "samples").iterdir()) == names
        )
        for name in [*(f"samples/{name}" for name in names), "loss_curve.png"]:
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert leftovers(folder) == []


def leftovers(folder):
    return [
        path for pattern in ("*.partial", "download-*", ".lock") for path in folder.rglob(pattern)
    ]


@pytest.fixture(scope="module")
def flags(data_flags):
    return [*FLAGS, *data_flags]


@pytest.fixture(scope="module")
def whole(run, flags, tmp_path_factory):
    """A run never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    status, _, err = run(folder, *flags)
    assert status == 0 and "failed" not in err, err
    return folder


@pytest.fixture(scope="module")
def stopped(run, flags, tmp_path_factory):
    """A run stopped in its second epoch, with a last.previous.pt."""
    folder = tmp_path_factory.mktemp("stopped")
    status, _, err = run(
        folder, *flags, patches=[("at_call", "train_eval.train_step", 43, signal.SIGTERM)]
    )
    assert status == 143 and (folder / "last.previous.pt").exists(), err
    return folder


@pytest.fixture
def cut(stopped, tmp_path):
    """A copy of it, to go on with or to damage."""
    return Path(shutil.copytree(stopped, tmp_path / "cut"))


def test_twenty_kills_at_any_moment_change_no_bit(run, flags, whole, tmp_path):
    draw, folder, kill = random.Random(0), tmp_path / "run", int(signal.SIGKILL)
    writes = [
        ("at_call", "torch.save", 1, kill, "last.pt.partial", "half written"),
        ("at_call", "torch.save", 2, kill, "last.pt.partial", "after"),
        ("at_call", "os.fsync", 2, kill),
        *(
            ("at_call", "os.replace", 1, kill, name, when)
            for name in ("last.previous.pt", "last.pt")
            for when in ("before", "after")
        ),
    ]
    moments = [
        [
            (
                "at_call",
                "train_eval.train_step",
                draw.randint(1, 4),
                kill,
                "",
                "before",
                draw.uniform(1e-3, 0.05),
            )
        ]
        for _ in range(8)
    ]
    kills = [
        *([write] for write in writes),
        *moments,
        [("at_call", "train_eval.load_data", 1, kill, "", "before", draw.uniform(1e-3, 0.05))],
        [writes[4], ("refuse", "os.link", 1, 10**9, "OSError", 95, "no hard links")],
    ]
    draw.shuffle(kills)
    kills += [
        [("at_call", "torch.save", 1, kill, "best_model.pt.partial", "half written")],
        [("at_call", "train_eval.test_loss", 1, kill)],
        [("at_call", "train_eval.draw_final", 1, kill)],
    ]
    assert len(kills) == 20
    without_last = 0
    for patches in kills:
        new = not any(folder.glob("last*.pt"))
        status, _, err = run(folder, *(flags if new else RESUME), patches=patches)
        assert status == -kill, (patches, err)
        without_last += (folder / "last.previous.pt").exists() and not (folder / "last.pt").exists()
    assert without_last, "without hard links there is a moment with last.previous.pt alone"
    status, _, err = run(folder, *RESUME)
    assert status == 0, err
    check_same(folder, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "target, call, step",
    [
        ("train_eval.train_step", 13, 13),
        ("train_eval.test_loss", 3, 13),
        ("train_eval.test_loss", 19, STEPS),
        ("train_eval.draw_grid", 1, STEPS),
    ],
)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(
    run, flags, whole, tmp_path, target, call, step, signum
):
    status, out, err = run(tmp_path, *flags, patches=[("at_call", target, call, signum)])
    assert status == 128 + signum and "Traceback" not in err, err
    if target == "train_eval.draw_grid":
        assert "stopped at once; what was saved before is whole" in err
    else:
        assert f"stopped at step {step}; everything is saved" in out and "--resume" in out
    assert (
        leftovers(tmp_path) == []
        and torch.load(tmp_path / "last.pt", weights_only=True)["step"] == step
    )
    status, _, err = run(tmp_path, *RESUME)
    assert status == 0, err
    check_same(tmp_path, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_download_that_is_stopped_leaves_nothing(run, tmp_path, signum):
    data = tmp_path / "data"
    status, _, err = run(
        tmp_path / "run",
        *FLAGS,
        "--dataset",
        "mnist",
        "--data_dir",
        data,
        patches=[("stalled_download", signum)],
    )
    assert status == 128 + signum and "stopped at once" in err and "Traceback" not in err, err
    assert [path for path in data.rglob("*") if path.is_file()] == [] and leftovers(tmp_path) == []


def test_sigusr1_saves_and_the_run_goes_on(run, flags, whole, tmp_path):
    status, _, err = run(
        tmp_path,
        *flags,
        patches=[
            ("at_call", f"train_eval.{name}", call, signal.SIGUSR1)
            for name, call in (("load_data", 1), ("train_step", 13))
        ],
    )
    assert status == 0 and "saved at step 1\n" in err and "saved at step 13\n" in err, err
    check_same(tmp_path, whole)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "cut short": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "empty": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_pt_costs_some_steps(run, whole, cut, damage):
    step = torch.load(cut / "last.previous.pt", weights_only=True)["step"]
    DAMAGES[damage](cut / "last.pt")
    status, _, err = run(cut, *RESUME)
    assert status == 0, err
    first, second = err.splitlines()[:2]
    assert str(cut / "last.pt") in first and second.endswith(
        f"last.previous.pt, saved at step {step}"
    )
    check_same(cut, whole)
    for name in ("last.pt", "last.previous.pt"):  # and with both damaged there is one line
        flip(cut / name)
    status, out, err = run(cut, *RESUME)
    lines = [line for line in err.splitlines() if line.startswith("train_eval.py: error: ")]
    assert (
        status == 2
        and len(lines) == 1
        and "damaged or cut short" in lines[0]
        and "Traceback" not in err
    ), err


def test_a_full_disk_is_one_line_and_what_was_saved_is_whole(run, flags, whole, tmp_path):
    status, _, err = run(
        tmp_path, *flags, patches=[("at_call", "train_eval.save_last", 2, "limit_files")]
    )
    lines = [line for line in err.splitlines() if line.startswith("train_eval.py: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err, err
    assert (
        f"{tmp_path / 'last.pt'}: cannot be written" in lines[0] and "bytes are missing" in lines[0]
    )
    assert checkpoint.load_last(tmp_path)["step"] == 5 and leftovers(tmp_path) == []
    status, _, err = run(tmp_path, *RESUME)
    assert status == 0, err
    check_same(tmp_path, whole)


def test_pictures_and_logs_that_cannot_be_written_are_one_warning_each(run, flags, whole, tmp_path):
    full = (10**9, "OSError", 28, "No space left on device")
    status, _, err = run(
        tmp_path,
        *flags,
        patches=[
            ("refuse", "PIL.Image.Image.save", 3, *full),
            ("refuse", "tensorboard.summary.writer.record_writer.RecordWriter.write", 5, *full),
        ],
    )
    assert status == 0 and "Traceback" not in err, err
    assert err.count("writing a picture failed") == err.count("TensorBoard's log failed") == 1
    check_same(tmp_path, whole, pictures=False)


def test_a_diverged_run_leaves_its_checkpoints_alone(run, cut):
    before = {path: path.read_bytes() for path in cut.glob("*.pt")}
    status, _, err = run(cut, *RESUME, "--learning_rate", 1e30, "--save_every", 1000)
    (line,) = [line for line in err.splitlines() if line.startswith("step ")] or [err]
    assert status == 3 and "learning rate" in line and "losses before: " in line, err
    assert 43 < int(line.split()[1].rstrip(":")) <= STEPS and "Traceback" not in err
    assert len(before) == 3 and {path: path.read_bytes() for path in cut.glob("*.pt")} == before


@pytest.mark.parametrize(
    "write",
    [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save],
    ids=["raw", "zipped"],
)
def test_no_file_runs_code(tmp_path, capsys, monkeypatch, write):
    made = tmp_path / "made"
    harm = type("Harm", (), {"__reduce__": lambda self: (open, (str(made), "w"))})()
    pickle.loads(pickle.dumps(harm)).close()
    assert made.exists(), "the pickle must be able to do harm"
    made.unlink()
    for name, flags in (
        ("last.pt", RESUME),
        ("last.previous.pt", RESUME),
        ("best_model.pt", ["--evaluate"]),
    ):
        write({"network": harm}, tmp_path / name)
        with pytest.raises(SystemExit) as refused:
            train_eval.main([*flags, "--save_dir", str(tmp_path)])
        assert (
            refused.value.code == 2
            and "could run code" in capsys.readouterr().err
            and not made.exists()
        )
    data, trained = (
        ("glyphs", torch.zeros(20, 16, 16, dtype=torch.uint8), torch.arange(20) % 10, tmp_path),
        [],
    )
    monkeypatch.setattr(
        metrics, "train_classifier", lambda *args, **kw: trained.append(1) or metrics.Classifier(10)
    )
    metrics.load_classifier(*data)
    (path,) = tmp_path.glob("classifier-*.pt")
    write({"head": harm}, path)
    metrics.load_classifier(*data)
    assert len(trained) == 2 and not made.exists()


def test_what_other_systems_lack_or_refuse_is_passed_over(run, whole, cut):
    """No SIGUSR1, flock or mallopt; a rename that is refused twice, as by a virus scanner."""
    status, _, err = run(cut, *RESUME, patches=[("another_system", True)])
    assert status == 2 and "in use by" in err, err
    status, _, err = run(
        cut,
        *RESUME,
        patches=[
            ("another_system", False),
            ("refuse", "os.replace", 2, 3, "PermissionError", 13, "in use"),
        ],
    )
    assert status == 0 and "failed" not in err, err
    check_same(cut, whole)


def test_memory_does_not_grow(run, data_flags, tmp_path):
    status, out, err = run(
        tmp_path,
        *NETWORK,
        *data_flags,
        *"--train_size 500 --test_size 8 --image_size 8 --batch_size 2 --epochs 12 "
        "--log_every 50 --sample_every 125 --save_every 125 --target_references 0".split(),
        patches=[
            ("shallow_network",),
            *(("at_call", "train_eval.train_step", k, "tell_memory") for k in (300, 3000)),
        ],
    )
    assert status == 0, err
    early, late = (int(line.split()[1]) for line in out.splitlines() if line.startswith("VmRSS"))
    assert abs(late - early) < 0.02 * early, (early, late)


if __name__ == "__main__":
    serve()
