"""What a person watches: commands that can be pasted, the table of measures, statistics of the steps."""

import shlex
import time
from types import SimpleNamespace

import pytest
import torch

from support import machine
from support.console import shell_command, shown_at_both_ends, tensorboard_command
from support.monitor import EventLog, table
from support.pictures import plot_losses, write_grid


@pytest.mark.parametrize("save_dir", ["runs/my first run", "a'b", 'c"d', "$(rm x)", "a;b", "ünï", "-x", "tab\there"])
def test_printed_commands_can_be_pasted(save_dir):
    assert shlex.split(shell_command("--resume", save_dir=save_dir)) == [
        "python", "train_eval.py", "--resume", f"--save_dir={save_dir}"]
    words = shlex.split(tensorboard_command(save_dir))
    assert words == ["tensorboard", f"--logdir={save_dir}/tensorboard_logs", "--samples_per_plugin", "images=1000"]


def test_the_default_folder_is_left_out_of_a_command():
    assert shell_command("--resume", save_dir="checkpoints") == "python train_eval.py --resume"


def test_the_table_shows_what_was_measured_beside_real_images_and_names_what_was_not():
    result = {"samples": 1234, "precision": 0.5, "precision_real": 0.75, "confidence": 0.9, "digits": [0.25, 0.75],
              "digits_real": [0.5, 0.5], "copies": 0.125, "classifier": "mnist-12345678"}
    text = table(result, 0.9955)
    lines = {" ".join(line.split()[:-2]): line.split()[-2:] for line in text.splitlines()}
    assert lines["precision"] == ["0.5000", "0.7500"]
    assert lines["share of the rarest digit"] == ["0.2500", "0.5000"]
    assert "1,234 samples" in text and "mnist-12345678, 99.55% test accuracy" in text and "0.1250" in text
    assert text.splitlines()[-1] == "left out, since there are too few images: Fréchet distance to the test set, recall"
    assert "left out" not in table(result | {"frechet": 1.0, "recall": 0.5}, 1.0)


def test_a_warning_is_seen_before_and_after_even_if_the_run_fails(capsys):
    with pytest.raises(KeyboardInterrupt), shown_at_both_ends("NOT MNIST"):
        assert capsys.readouterr().err == "NOT MNIST\n"
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "NOT MNIST\n"
    with shown_at_both_ends(None):
        pass
    assert capsys.readouterr().err == ""


def test_without_pictures_and_logs_a_run_goes_on_and_says_so_once(tmp_path, capsys, monkeypatch):
    """A full disk: the system refuses to write more into a file."""
    resource = pytest.importorskip("resource")
    machine.WARNED.clear()
    events, before = EventLog(tmp_path, "log"), resource.getrlimit(resource.RLIMIT_FSIZE)
    write_grid(torch.rand(4, 3, 32, 32), tmp_path / "a.png", events, "samples", 0)
    old = (tmp_path / "a.png").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))
    try:
        for step in range(5):
            write_grid(torch.rand(40, 3, 32, 32), tmp_path / "a.png", events, "samples", step)
            time.sleep(0.1)  # the log is written by a thread of its own
        curves = {f"{name}_curve": [] for name in ("train", "fixed", "test", "frechet")}
        plot_losses(SimpleNamespace(target_references=0), curves, tmp_path / "b.png")
        events.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert said.count("writing a picture failed (OSError") == 1 and said.count("TensorBoard's log failed (OSError") == 1
    assert "Traceback" not in said and (tmp_path / "a.png").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "tensorboard_logs"]
