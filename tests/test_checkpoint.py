"""What survives: whole files of plain values, the folder of a run and its lock, a resumed state."""

import collections
import contextlib
import io
import itertools
import math
import os
import pickle
import signal
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import full_disk, refused, same, snapshot
from torch import nn

from ema import EMA
from support import checkpoint, files
from support.checkpoint import load_checkpoint, load_last, save_checkpoint
from support.files import RunFolder, unused, write_text
from timesteps import make_timesteps

ROWS, PIXELS = torch.contiguous_format, torch.channels_last
LEFT = ["last.pt", "last.previous.pt", "best_model.pt", "loss_curve.png", "samples/final.png"]
LEFT += ["samples/step_0000200.png", "evaluation.json", "evaluation_mine.json"]  # by a run


def test_what_could_not_be_loaded_is_not_saved_and_the_old_file_stays(tmp_path):
    path, tensors = tmp_path / "last.pt", {"b": torch.arange(3), "p": nn.Parameter(torch.ones(2))}
    plain = [1, 2.5, True, None, "é", (1, (2,)), float("inf"), 2**63 - 1]
    state = {"a": plain, 3: tensors, "c": collections.OrderedDict(d=1)}
    save_checkpoint(path, state)
    values = [np.float64(0.1), np.int64(3), np.zeros((2, 2)), np.bool_(True), Path("x"), {1}, b"x"]
    values += [object(), 1j, int, len, 10**700, torch.device("cpu"), torch.float32, torch.Size([1])]
    values += [collections.namedtuple("Point", "x")(1), collections.defaultdict(int)]
    for value in values:
        bad = {"config": {"deep": [1, (2, {"score": value})]}}
        refused(lambda bad=bad: save_checkpoint(path, bad), "score", type(value).__name__)
    assert os.listdir(tmp_path) == ["last.pt"] and same(load_checkpoint(path, ["a", 3]), state)


def unsupported(*arguments):
    raise OSError(95, "not supported")


def disk_full(*arguments):
    raise OSError(28, "No space left on device")


def killed_at(number, function, links):
    """Run a function in a process that is killed at one of its writes. Returns the status."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def deadly(call, writes=itertools.count()):  # noqa: B008, one count for all
        def called(*args):
            if next(writes) == number:
                if call is torch.save:  # in the middle of the file
                    Path(getattr(args[1], "name", args[1])).write_bytes(b"PK half")
                os._exit(9)
            return call(*args)

        return called

    os.link = os.link if links else unsupported
    for place, name in ((torch, "save"), (os, "fsync"), (os, "link"), (os, "replace")):
        setattr(place, name, deadly(getattr(place, name)))
    try:
        function()
    finally:
        os._exit(sys.exc_info()[0] is not None)


@pytest.mark.parametrize("links", (True, False))
def test_a_kill_at_any_write_of_a_save_leaves_whole_files(tmp_path, links):
    path, previous = tmp_path / "last.pt", tmp_path / "last.previous.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step}, previous)
    found, status = [], 9
    while status == 9:
        status = killed_at(len(found), lambda: save_checkpoint(path, {"step": 3}, previous), links)
        last = path if links or path.exists() else previous
        found.append(load_checkpoint(last, ["step"])["step"])
    assert status == 0 and len(found) > 5
    assert found == sorted(found) and set(found) == {2, 3}, "the old one, then the new one"
    save_checkpoint(path, {"step": 4}, previous)  # what the kills left is in nobody's way
    assert [load_checkpoint(p, ["step"])["step"] for p in (path, previous)] == [4, 3]
    assert sorted(os.listdir(tmp_path)) == ["last.previous.pt", "last.pt"]


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
    write_text(unused(tmp_path / "a.pt"), "é")
    assert (tmp_path / "a-2.pt").read_bytes() == "é".encode()
    monkeypatch.setattr(os, "fsync", unsupported)
    files.flush(tmp_path)  # not every system can flush a folder
    write_text(tmp_path / "b.json", "x")  # nor a file, on some network drives
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "c.json", "x")
    assert sorted(os.listdir(tmp_path)) == ["a-2.pt", "a.pt", "b.json"]


def not_written(path):
    """The line with which a save says that the system did not write."""
    with pytest.raises(OSError) as caught:
        save_checkpoint(path, {"weights": torch.ones(100_000)})
    line = str(caught.value)
    assert line.startswith(f"{path}: cannot be written (") and len(line.splitlines()) == 1, line
    return line


def test_a_rename_that_is_refused_is_tried_again_for_a_while(tmp_path, monkeypatch):
    replace, refusals = os.replace, iter(range(2))

    def scanner(*names):
        if next(refusals, None) is not None:
            raise PermissionError(13, "held by another program")
        replace(*names)

    monkeypatch.setattr(os, "replace", scanner)
    save_checkpoint(tmp_path / "a.pt", {"step": 1})
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    refusals = itertools.count()
    assert "held by another program" in not_written(tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", ["step"]) == {"step": 1}


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"weights": torch.zeros(100_000)})
    before = snapshot(tmp_path)
    for size in (300_000, 1000, 0):
        with full_disk(size):
            not_written(tmp_path / "a.pt")
    for path in (tmp_path / "missing" / "a.pt", tmp_path):
        assert "the disk is full" not in not_written(path)
    assert snapshot(tmp_path) == before


def zipped(pickled):
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as file:
        for name, data in {"data.pkl": pickled, "version": b"3", "byteorder": b"little"}.items():
            file.writestr(f"archive/{name}", data)
    return archive.getvalue()


def torch_saved(state, **options):
    torch.save(state, data := io.BytesIO(), **options)
    return data.getvalue()


FOREIGN = {  # what the file is, from the bytes of a whole one; words of the answer
    "missing": (None, "no such checkpoint"),
    "a folder": (None, "a folder; expected a file"),
    "a wrong bit": (lambda d: d[:2000] + bytes([d[2000] ^ 1]) + d[2001:], "damaged or cut short"),
    "cut": (lambda d: d[: len(d) // 2], "damaged or cut short"),
    "empty": (lambda d: b"", "another kind of file"),
    "no unicode": (lambda d: zipped(b"\x80\2X\1\0\0\0\xff."), "another kind of file"),
    "an object": (lambda d: torch_saved({"step": Path("x")}), "could run code"),
    "a pickle": (lambda d: pickle.dumps({"step": 1}), "could run code"),
    "a list": (lambda d: torch_saved(["step"]), "of another kind; expected step"),
    "other keys": (lambda d: torch_saved({"w": 1}), "of another kind; expected step"),
}


def put(path, kind):
    """Put something else in the place of a checkpoint."""
    data, change = path.read_bytes(), FOREIGN[kind][0]
    path.unlink()
    path.write_bytes(change(data)) if change else kind == "missing" or path.mkdir()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_whole_checkpoint_is_refused_in_one_line(tmp_path, kind):
    save_checkpoint(tmp_path / "a.pt", {"step": 1, "w": torch.ones(5000)})
    put(tmp_path / "a.pt", kind)
    before = snapshot(tmp_path)
    refused(lambda: load_checkpoint(tmp_path / "a.pt", ["step"]), "a.pt: ", FOREIGN[kind][1])
    assert snapshot(tmp_path) == before


MALICIOUS = {  # the bytes of a file with an order in it
    "raw": lambda harm: pickle.dumps({"step": harm}),
    "before an archive": lambda harm: pickle.dumps(harm) + torch_saved({"step": 1}),
    "archive": lambda harm: torch_saved({"step": harm}),
    "old format": lambda harm: torch_saved({"step": harm}, _use_new_zipfile_serialization=False),
    "by hand": lambda harm: zipped(pickle.dumps(harm, 2)),
}


@pytest.mark.parametrize("form", MALICIOUS)
def test_no_file_runs_code(tmp_path, form):
    made = tmp_path / "made"
    harm = type("Harm", (), {"__reduce__": lambda self: (os.system, (f"touch {made}",))})()
    pickle.loads(pickle.dumps(harm))
    assert made.exists(), "the pickle must be able to do harm"
    made.unlink()
    (tmp_path / "a.pt").write_bytes(MALICIOUS[form](harm))
    refused(lambda: load_checkpoint(tmp_path / "a.pt", ["step"]), "a.pt: ")
    assert os.listdir(tmp_path) == ["a.pt"]


def a_run(folder, layout=ROWS):
    """Config and parts of a run, as `save_last` and `restore` take them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    network.to(memory_format=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, fused=True)
    parts = dict(network=network, ema=EMA(network, start=1), optimizer=optimizer)
    parts |= dict(timesteps=make_timesteps("importance", 5), stats=nn.BatchNorm1d(1))
    return SimpleNamespace(device="cpu", save_dir=str(folder)), parts


def train(parts, steps):
    for _ in range(steps):
        losses = parts["network"](torch.randn(4, 3, 8, 8)).square().flatten(1).mean(dim=1)
        parts["timesteps"].update(parts["timesteps"].sample(4)[0], losses)
        parts["stats"](losses[:, None])
        losses.mean().backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        parts["ema"].update()


def save_and_load(config, parts, step=3):
    checkpoint.save_last(config, parts, {"step": step, "config": {}, "script": ""})
    return load_last(config.save_dir)


@pytest.mark.parametrize("before, after", [(ROWS, ROWS), (ROWS, PIXELS), (PIXELS, ROWS)])
def test_a_restored_run_goes_on_as_if_it_had_not_stopped(tmp_path, before, after):
    """In another memory layout too. Fused AdamW on a CPU does not look at strides."""
    config, parts = a_run(tmp_path, before)
    train(parts, 20)
    save_and_load(config, parts, 20)
    ends = []
    for run in (parts, a_run(tmp_path, after)[1]):
        progress, saved = {"step": 0, "best_loss": math.inf}, load_last(tmp_path)
        checkpoint.restore(config, run, progress, saved | {"best_loss": 0.5})
        assert progress == {"step": 20, "best_loss": 0.5}
        assert [name for name in run if not same(run[name].state_dict(), saved[name])] == []
        for p, moments in run["optimizer"].state.items():
            assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == p.stride()
        train(run, 5)
        ends.append({name: part.state_dict() for name, part in run.items()})
    assert ends[1]["ema"]["step"] == 25 and same(*ends) == (before == after)
    torch.testing.assert_close(ends[0]["network"], ends[1]["network"], rtol=1e-3, atol=1e-3)


def test_a_last_pt_that_does_not_fit_is_one_line(tmp_path):
    config, parts = a_run(tmp_path)
    state, empty = save_and_load(config, parts), {"state": {}, "param_groups": []}
    changes = [{"network": {"x": torch.ones(1)}}, {"network": None}, {"ema": {"step": 1}}]
    changes += [{"ema": None}, {"optimizer": {"state": {}}}, {"optimizer": empty}, {"rng": {}}]
    changes += [{"rng": "x"}, {"rng": {"cpu": torch.zeros(3)}}, {"timesteps": {}}]
    for saved in [*(state | change for change in changes), {"network": state["network"]}]:
        words = f"{tmp_path / 'last.pt'}: written by another version"
        refused(lambda s=saved: checkpoint.restore(config, parts, {"step": 0}, s), words)


@pytest.mark.parametrize("damage", ["a wrong bit", "cut", "missing", "a folder"])
def test_a_damaged_last_pt_is_replaced_by_the_one_before(tmp_path, damage, capsys):
    path, previous = tmp_path / "last.pt", tmp_path / "last.previous.pt"
    for step in (1006, 1007):
        assert save_and_load(*a_run(tmp_path), step)["step"] == step
    put(path, damage)
    assert load_last(tmp_path)["step"] == 1006
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{path}: ") and second.endswith(f"{previous}, saved at step 1,006")
    put(previous, "cut")
    refused(lambda: load_last(tmp_path), f"{previous}: not a readable checkpoint")


def test_a_second_run_in_a_folder_is_told_who_holds_it_until_that_process_is_gone(tmp_path):
    (told, telling), process = os.pipe(), os.fork()
    if not process:
        with contextlib.suppress(BaseException), RunFolder(tmp_path, new=False):
            os.write(telling, b"locked")
            signal.sigtimedwait([], 100)
        os._exit(1)
    os.close(telling)
    assert os.read(told, 6) == b"locked"
    for new in (True, False):
        words = str(tmp_path), f"in use by process {process} on ", "another --save_dir"
        refused(lambda new=new: RunFolder(tmp_path, new), *words)
    assert os.listdir(tmp_path) == [".lock"] and os.stat(tmp_path / ".lock").st_mode & 0o22
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with RunFolder(tmp_path, new=True):
        refused(lambda: RunFolder(tmp_path, new=False), f"process {os.getpid()} ")  # in one, too
    RunFolder(tmp_path, new=False).close()
    assert sorted(os.listdir(tmp_path)) == [".lock", "samples", "tensorboard_logs"]


def test_a_file_system_without_locks_stops_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    RunFolder(tmp_path, new=False).close()


def write_all(folder, names, mark):
    for path in (folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(mark)
        for touched in (path, path.parent):
            os.utime(touched, (10**9, 10**9))


@pytest.mark.parametrize("left", [LEFT, LEFT[:1], ["samples/real.png"], LEFT[-1:]])
def test_a_new_run_moves_all_of_the_earlier_one_aside_and_nothing_else(tmp_path, left, capsys):
    others = ["tensorboard_logs/events", "my notes.txt", ".gitignore", "run_2020-01-01/last.pt"]
    write_all(tmp_path, others, "other")
    for mark in ("a", "b", "c"):  # of one second
        write_all(tmp_path, left, mark)
        before = snapshot(tmp_path).keys()
        with RunFolder(tmp_path, new=False):
            assert before <= snapshot(tmp_path).keys()  # a resumed run moves nothing
        RunFolder(tmp_path, new=True).close()
        aside = sorted(tmp_path.glob("run_*_*"))[-1]
        assert str(aside) in capsys.readouterr().out
        assert snapshot(aside) == dict.fromkeys(left, mark.encode())
        assert os.listdir(tmp_path / "samples") == []
    RunFolder(tmp_path, new=True).close()
    assert len([*tmp_path.glob("run_*_*")]) == 3  # an empty folder samples is not moved
    assert all((tmp_path / name).read_text() == "other" for name in others)


def test_what_can_fail_fails_before_an_earlier_run_is_moved(tmp_path):
    write_all(tmp_path, [*LEFT, "tensorboard_logs"], "first")
    (tmp_path / "x.partial").mkdir()
    before = snapshot(tmp_path)
    refused(lambda: RunFolder(tmp_path, new=True), "tensorboard_logs'", "expected a folder that")
    RunFolder(tmp_path, new=False).close()  # a refusal holds no lock
    assert {name: x for name, x in snapshot(tmp_path).items() if name != ".lock"} == before
    for folder in (tmp_path / "last.pt", tmp_path / "last.pt" / "below", "x" * 300):
        refused(lambda folder=folder: RunFolder(folder, new=True), "save_dir", "expected a folder")
