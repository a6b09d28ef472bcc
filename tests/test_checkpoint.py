"""What survives: whole files of plain values, the folder of a run and its lock, other memory layouts."""

import collections
import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_eval
from ema import EMA
from support import checkpoint, files
from support.checkpoint import RunFolder, load_checkpoint, load_last, match_layouts, save_checkpoint
from support.files import unused, write_text
from timesteps import UniformSampler

ROOT = Path(__file__).parent.parent
PLAIN, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
SMALL = (
    "--device cpu --no-bf16 --base_channels 32 --channel_mult 1,2 --num_res_blocks 1 --time_emb_dim 32 "
    "--patch_size 4 --attention_resolutions 4 --dataset glyphs"
).split()

# Files


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.1),
        np.int64(3),
        np.zeros(2),
        np.bool_(True),
        Path("x"),
        {1, 2},
        object(),
        b"bytes",
        1j,
        slice(1),
        torch.device("cpu"),
        torch.float32,
        torch.Size([1]),
        collections.namedtuple("Point", "x")(1),
        collections.defaultdict(int),
        lambda: None,
        int,
        10**700,
    ],
)
def test_what_cannot_be_loaded_is_not_saved_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    for state in ({"config": value}, {"config": {"deep": [1, (2, {"score": value})]}}):
        with pytest.raises(ValueError, match="expected tensors and plain Python values") as error:
            save_checkpoint(path, state)
        assert "\n" not in str(error.value) and "config" in str(error.value)
    assert load_checkpoint(path, ["step"]) == {"step": 1} and os.listdir(tmp_path) == ["last.pt"]


def test_a_tensor_that_carries_an_object_is_not_saved(tmp_path):
    tensor = torch.ones(1)
    tensor.origin = object()
    with pytest.raises(ValueError, match="weights.w .*expected tensors and plain"):
        save_checkpoint(tmp_path / "x.pt", {"weights": {"w": tensor}})


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["network"].popitem(),
        lambda saved: saved["ema"].pop("step"),
        lambda saved: saved["rng"].clear(),
        lambda saved: saved["optimizer"].pop("state"),
        lambda saved: saved["config"].pop("epochs"),
        lambda saved: saved.update(ema=None),
        lambda saved: saved.update(network={"x": torch.ones(1)}),
    ],
)
def test_a_last_pt_that_does_not_fit_is_one_line(tmp_path, change):
    config, ddpm, optimizer, state = trained(PLAIN, ["--save_dir", str(tmp_path)])
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, total_iters=1)
    state = {**state, "network": ddpm.network, "warmup": warmup}
    checkpoint.save_last(config, state, {"step": 2})
    saved = load_checkpoint(tmp_path / "last.pt", ["config"])
    change(saved)
    with pytest.raises(
        ValueError, match="last.pt: written by another version of this code"
    ) as error:
        checkpoint.restore(config, state, {"step": 0}, saved, 10)
    assert "\n" not in str(error.value)


def test_what_can_fail_fails_before_an_earlier_run_is_moved(tmp_path):
    a_run(tmp_path, "first")
    (tmp_path / "tensorboard_logs").write_text("a file")
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(
        ValueError, match="tensorboard_logs'.*expected a folder that can be written"
    ):
        RunFolder(tmp_path, new=True)
    assert (tmp_path / "last.pt").read_text() == "first" and not list(tmp_path.glob("run_*"))
    assert not (tmp_path / ".lock").exists()  # a refusal holds nothing


def test_plain_values_of_every_kind_come_back(tmp_path):
    state = {
        "a": [1, 2.5, True, None, "é", (1, (2,))],
        3: {"b": torch.arange(3)},
        "c": collections.OrderedDict(d=1),
        "p": torch.nn.Parameter(torch.ones(2)),
        "inf": float("inf"),
    }
    save_checkpoint(tmp_path / "x.pt", state)
    again = load_checkpoint(tmp_path / "x.pt", ["a"])
    assert (
        again["a"] == state["a"]
        and torch.equal(again[3]["b"], torch.arange(3))
        and again["inf"] == float("inf")
    )


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    names = []
    for _ in range(3):
        names.append(unused(tmp_path / "a.b.json"))
        write_text(names[-1], "é")
    assert [path.name for path in names] == ["a.b.json", "a.b-2.json", "a.b-3.json"]
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in names)


# The folder of a run


HOLD = """
import sys, time
from support.checkpoint import RunFolder
folder = RunFolder(sys.argv[1], new=False)
print("locked", flush=True)
time.sleep(100)
"""


def test_a_second_run_in_a_folder_is_told_who_holds_it_until_that_process_is_gone(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"locked\n"
        for new in (True, False):
            with pytest.raises(
                ValueError, match=rf"in use by process {other.pid} on .* since .*another --save_dir"
            ):
                RunFolder(tmp_path, new)
        assert not (tmp_path / "samples").exists()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with RunFolder(tmp_path, new=True):
        with pytest.raises(ValueError, match=f"process {os.getpid()} "):  # in one process too
            RunFolder(tmp_path, new=False)
    with RunFolder(tmp_path, new=False):
        pass
    assert sorted(os.listdir(tmp_path)) == [
        "samples",
        "tensorboard_logs",
    ]  # the lock leaves no file


def test_a_lock_file_that_another_run_removes_between_open_and_lock_is_not_taken_for_a_lock(
    tmp_path, monkeypatch
):
    lock, removed = checkpoint._try_lock, []

    def late(file):
        if not removed:  # the run that held it ends just now
            removed.append(os.remove(file.name))
        return lock(file)

    monkeypatch.setattr(checkpoint, "_try_lock", late)
    with RunFolder(tmp_path, new=False):
        assert removed and (tmp_path / ".lock").exists()
        with pytest.raises(ValueError, match="in use by"):
            RunFolder(tmp_path, new=False)


def a_run(folder, mark):
    """What a finished and measured run leaves, each file with its mark."""
    for name in (
        "last.pt",
        "best_model.pt",
        "loss_curve.png",
        "samples/final.png",
        "samples/step_0000200.png",
        "evaluation.json",
        "evaluation-2.json",
        "evaluation_mine.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(mark)


def marks(folder):
    """{mark: number of files with it}, of the files in a folder and below."""
    return collections.Counter(path.read_text() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "only", [None, "last.pt", "best_model.pt", "samples/real.png", "evaluation_mine.json"]
)
def test_a_new_run_moves_all_of_the_earlier_one_aside_and_nothing_else(tmp_path, only, capsys):
    others = [
        "tensorboard_logs/events",
        "classifier-1.pt",
        "my notes.txt",
        ".gitignore",
        "run_2020-01-01/last.pt",
    ]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("other")
    a_run(tmp_path, "first")
    if only:  # killed before its first save, or loaded from elsewhere
        for path in [
            path for path in tmp_path.rglob("*") if path.is_file() and path.read_text() == "first"
        ]:
            path.unlink()
        (tmp_path / only).write_text("first")
    count = marks(tmp_path)["first"]
    with RunFolder(tmp_path, new=False):
        assert marks(tmp_path)["first"] == count and not list(tmp_path.glob("run_*-*_*"))
    with RunFolder(tmp_path, new=True):
        (aside,) = tmp_path.glob("run_*_*")
        assert str(aside) in capsys.readouterr().out
    assert marks(aside) == {"first": count} and os.listdir(tmp_path / "samples") == []
    assert all((tmp_path / name).read_text() == "other" for name in others)
    with RunFolder(tmp_path, new=True):
        assert list(tmp_path.glob("run_*_*")) == [aside]  # nothing to move: an empty folder samples


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    for mark in "abc":
        a_run(tmp_path, mark)
        for path in tmp_path.iterdir():
            os.utime(path, (10**9, 10**9))
        RunFolder(tmp_path, new=True).close()
    assert sorted("".join(marks(path)) for path in tmp_path.glob("run_*")) == ["a", "b", "c"]


@pytest.mark.parametrize("renames", range(8))
def test_a_kill_between_the_renames_leaves_the_run_in_one_folder_after_the_next_start(
    tmp_path, monkeypatch, renames
):
    class Killed(BaseException):
        pass

    left, rename = [renames], Path.rename

    def killed(self, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return rename(self, target)

    a_run(tmp_path, "first")
    files = marks(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            RunFolder(tmp_path, new=True)
    (tmp_path / "last.pt.partial").write_text("half")  # and a save that was killed
    (tmp_path / "samples").mkdir(exist_ok=True)
    (tmp_path / "samples" / "nearest_mine.png").write_text("first")  # and an evaluation meanwhile
    files += {"first": 1}
    checkpoint.RunFolder(tmp_path, new=renames % 2 == 0).close()
    (aside,) = tmp_path.glob("run_*")
    assert marks(aside) == marks(tmp_path) == files and not aside.name.endswith(".moving")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "x" * 300):
        with pytest.raises(
            ValueError, match="^save_dir .*: .*expected a folder that can be written"
        ) as error:
            RunFolder(folder, new=True)
        assert "\n" not in str(error.value)


# Another memory layout


def trained(layout, flags=(), steps=2):
    """A model in a memory layout, its optimiser and the state of `train_step` after some steps."""
    config, _ = train_eval.configure([*SMALL, *flags])
    torch.manual_seed(0)
    ddpm = train_eval.build(config).to(memory_format=layout)
    optimizer = torch.optim.AdamW(ddpm.parameters(), lr=0.01, fused=True)
    state = {
        "optimizer": optimizer,
        "ema": EMA(ddpm.network, start=0),
        "timesteps": UniformSampler(1000),
    }
    for i in range(steps):
        torch.manual_seed(i)
        train_eval.train_step(
            config, ddpm, state, torch.rand(4, 3, 32, 32) * 2 - 1, torch.arange(4)
        )
    return config, ddpm, optimizer, state


@pytest.mark.parametrize("before, after", [(PLAIN, CHANNELS_LAST), (CHANNELS_LAST, PLAIN)])
def test_a_step_after_going_on_in_another_layout_is_the_step_with_all_laid_out_alike(before, after):
    """A GPU has another layout than a CPU. Fused AdamW on a CPU goes through memory and does not look at strides."""
    _, ddpm, optimizer, state = trained(before)
    _, other, optimizer_after, state_after = trained(after, steps=0)
    other.load_state_dict(ddpm.state_dict())
    optimizer_after.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    match_layouts(optimizer_after)
    state_after["ema"].load_state_dict(state["ema"].state_dict())
    layouts = set()
    for model, its in ((ddpm, optimizer), (other, optimizer_after)):
        for i, p in enumerate(model.parameters()):
            torch.manual_seed(i)
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
            layouts.add(p.stride())
            assert (
                its.state[p]["exp_avg"].stride()
                == its.state[p]["exp_avg_sq"].stride()
                == p.stride()
            )
        its.step()
    for a, b in zip(ddpm.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert any(
        stride[1:2] == (1,) and len(stride) == 4 for stride in layouts
    )  # one of them was channels-last
    assert [s.stride() for s in state_after["ema"].shadow] == [
        p.stride() for p in other.network.parameters()
    ]


def test_restore_matches_the_layouts(tmp_path):
    config, ddpm, optimizer, state = trained(PLAIN, ["--save_dir", str(tmp_path)])
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, total_iters=1)
    checkpoint.save_last(config, {**state, "network": ddpm.network, "warmup": warmup}, {"step": 2})
    saved = load_checkpoint(tmp_path / "last.pt", ["config"])
    config, other, optimizer, state = trained(CHANNELS_LAST, ["--save_dir", str(tmp_path)], steps=0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, total_iters=1)
    progress = {"step": 0}
    checkpoint.restore(
        config, {**state, "network": other.network, "warmup": warmup}, progress, saved, 10
    )
    assert progress == {
        "step": 2,
        "best_loss": float("inf"),
    }  # one without looks measured all test images
    for parameter, moments in optimizer.state.items():
        assert moments["exp_avg"].stride() == parameter.stride()
    assert all(torch.equal(a, b) for a, b in zip(ddpm.parameters(), other.parameters()))


# Written whole or not at all


@contextlib.contextmanager
def files_of_at_most(size):
    """The system refuses to write more into a file, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_gets_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    """Else a power cut could leave the name with nothing in it."""
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("rename") or replace(*names))
    save_checkpoint(tmp_path / "a.pt", {"step": 1})
    assert calls[-3:] == ["file", "rename", "folder"] and calls.count("rename") == 1


@pytest.mark.parametrize("links", (True, False))
def test_the_save_before_is_kept(tmp_path, monkeypatch, links):
    def refuse(*names):
        raise OSError(95, "not supported")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for step in range(4):
        save_checkpoint(tmp_path / "last.pt", {"step": step}, tmp_path / "before.pt")
        assert load_checkpoint(tmp_path / "last.pt", ["step"]) == {"step": step}
        if step:
            assert load_checkpoint(tmp_path / "before.pt", ["step"]) == {"step": step - 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before.pt", "last.pt"]


@pytest.mark.parametrize("times", (2, 1000))
def test_a_rename_that_is_refused_is_tried_again_for_a_while(tmp_path, monkeypatch, times):
    replace, refused = os.replace, []

    def scanner(*names):
        refused.append(names)
        if len(refused) <= times:
            raise PermissionError(13, "held by another program")
        replace(*names)

    monkeypatch.setattr(os, "replace", scanner)
    monkeypatch.setattr(files, "PATIENCE", 0.5)
    if times == 2:
        save_checkpoint(tmp_path / "a.pt", {"step": 1})
        assert load_checkpoint(tmp_path / "a.pt", ["step"]) == {"step": 1}
    else:
        with pytest.raises(OSError, match="held by another program"):
            save_checkpoint(tmp_path / "a.pt", {"step": 1})
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", (0, 1000, 300_000))
def test_a_full_disk_names_the_missing_bytes_and_leaves_the_old_file(tmp_path, size):
    save_checkpoint(tmp_path / "a.pt", {"weights": torch.zeros(100_000)})
    old = (tmp_path / "a.pt").read_bytes()
    with files_of_at_most(size), pytest.raises(OSError) as caught:
        save_checkpoint(tmp_path / "a.pt", {"weights": torch.ones(100_000)}, tmp_path / "before.pt")
    missing, whole = (
        int(number.replace(",", "")) for number in re.findall(r"[\d,]{3,}", str(caught.value))[-2:]
    )
    assert str(caught.value).startswith(
        f"{tmp_path / 'a.pt'}: cannot be written ("
    ) and "\n" not in str(caught.value)
    assert whole == pytest.approx(len(old), abs=200) and missing == pytest.approx(
        whole - size, abs=70_000
    )
    assert (tmp_path / "a.pt").read_bytes() == old and [
        path.name for path in tmp_path.iterdir()
    ] == ["a.pt"]
    with files_of_at_most(0), pytest.raises(OSError):
        write_text(tmp_path / "b.json", "a text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("damage", ("flipped", "cut", "empty", "gone", "folder"))
def test_a_damaged_last_pt_is_replaced_by_the_one_before(tmp_path, damage, capsys):
    state = {
        "config": {},
        "step": 7,
        "best_loss": 1.0,
        "train_curve": [[7, 1.0]],
        "test_curve": [],
        "warning": None,
        "log": "a",
        "rng": {},
        "network": {"w": torch.arange(1000.0)},
        "ema": {},
        "optimizer": {},
        "warmup": {},
    }
    save_checkpoint(tmp_path / "last.previous.pt", state)
    save_checkpoint(tmp_path / "last.pt", state | {"step": 8})
    assert load_last(tmp_path)["step"] == 8 and capsys.readouterr().err == ""
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 1001] ^= 1
    (tmp_path / "last.pt").unlink()
    if damage == "folder":
        (tmp_path / "last.pt").mkdir()
    elif damage != "gone":
        (tmp_path / "last.pt").write_bytes(
            {"flipped": content, "cut": content[:-100], "empty": b""}[damage]
        )
    assert load_last(tmp_path)["step"] == 7
    said = capsys.readouterr().err
    assert f"{tmp_path / 'last.pt'}: " in said
    assert f"going on from {tmp_path / 'last.previous.pt'}, saved at step 7" in said
    (tmp_path / "last.previous.pt").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="last.previous.pt: not a readable checkpoint"):
        load_last(tmp_path)
