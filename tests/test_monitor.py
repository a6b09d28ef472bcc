"""What a person watches: commands that can be pasted, the table of measures, statistics of the steps."""

import shlex
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_eval
from support import machine, monitor
from support.console import (
    at_a_terminal,
    progress_bar,
    shell_command,
    shown_at_both_ends,
    tensorboard_command,
)
from support.monitor import EventLog, RunningStats, table
from support.pictures import plot_losses, write_grid


@pytest.mark.parametrize(
    "save_dir", ["runs/my first run", "a'b", 'c"d', "$(rm x)", "a;b", "ünï", "-x", "tab\there"]
)
def test_printed_commands_can_be_pasted(save_dir):
    assert shlex.split(shell_command("--resume", save_dir=save_dir)) == [
        "python",
        "train_eval.py",
        "--resume",
        f"--save_dir={save_dir}",
    ]
    words = shlex.split(tensorboard_command(save_dir))
    assert words == [
        "tensorboard",
        f"--logdir={save_dir}/tensorboard_logs",
        "--samples_per_plugin",
        "images=1000",
    ]


def test_the_default_folder_is_left_out_of_a_command():
    assert shell_command("--resume", save_dir="checkpoints") == "python train_eval.py --resume"


def test_the_table_shows_what_was_measured_beside_real_images_and_names_what_was_not():
    result = {
        "samples": 1234,
        "precision": 0.5,
        "precision_real": 0.75,
        "confidence": 0.9,
        "digits": [0.25, 0.75],
        "digits_real": [0.5, 0.5],
        "copies": 0.125,
        "classifier": "mnist-12345678",
    }
    text = table(result, 0.9955)
    lines = {" ".join(line.split()[:-2]): line.split()[-2:] for line in text.splitlines()}
    assert lines["precision"] == ["0.5000", "0.7500"]
    assert lines["share of the rarest digit"] == ["0.2500", "0.5000"]
    assert (
        "1,234 samples" in text
        and "mnist-12345678, 99.55% test accuracy" in text
        and "0.1250" in text
    )
    assert (
        text.splitlines()[-1]
        == "left out, since there are too few images: Fréchet distance to the test set, recall"
    )
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
    assert (
        said.count("writing a picture failed (OSError") == 1
        and said.count("TensorBoard's log failed (OSError") == 1
    )
    assert "Traceback" not in said and (tmp_path / "a.png").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "tensorboard_logs"]


@pytest.mark.parametrize("every, kept", [(50, True), (40, False), (60, False)])
def test_statistics_of_a_resumed_run_go_on_if_its_entries_have_the_same_distance(every, kept):
    def stats(log_every):
        return RunningStats(SimpleNamespace(num_timesteps=10, log_every=log_every, device="cpu"))

    def add(window, loss):
        window.add(torch.tensor([loss]), torch.ones(1), torch.tensor([5]), torch.tensor(1.0))

    before, after = stats(50), stats(every)
    for _ in range(39):
        add(before, 3.0)
    after.load_state_dict(before.state_dict())
    add(after, 3.0 if kept else 1.0)
    assert after.count == (40 if kept else 1)
    assert after.read(40, 0.1)["train/batch_loss"] == pytest.approx(3.0 if kept else 1.0)


def test_a_log_that_cannot_be_written_or_is_closed_stops_no_run(monkeypatch, tmp_path):
    def broken(*args):
        raise BrokenPipeError

    for stderr in (None, SimpleNamespace(write=broken, flush=broken, isatty=lambda: False)):
        monkeypatch.setattr("sys.stderr", stderr)
        machine.WARNED.clear()
        assert not at_a_terminal()
        with progress_bar(total=3, desc="training") as bar:
            bar.update(3)
        with machine.warning_if_it_fails("a picture"):
            raise OSError(28, "No space left on device")
        with machine.Interrupt() as interrupt, interrupt.after_the_step():
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.asked() == "stop"


def test_constants_of_any_kind_reach_the_page_that_compares_runs(tmp_path):
    events = EventLog(tmp_path, "log")
    events.add_hparams(
        {"save_dir": "\udcff", "channel_mult": (1, 2), "epochs": 3, "bf16": True, "y": None}
    )
    events.close()
    found = EventAccumulator(str(tmp_path / "tensorboard_logs" / "log")).Reload()
    start = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"channel_mult" in start and b"(1, 2)" in start and b"bf16" in start
    assert b"final/frechet" in found.SummaryMetadata("_hparams_/experiment").plugin_data.content


@pytest.mark.parametrize(
    "flag, part",
    [
        ({}, ""),
        ({"sampler": "ddim"}, "evaluation"),
        ({"seed": 1}, "evaluation"),
        ({"eval_samples": 9}, "evaluation"),
        ({"device": "cuda"}, ""),
    ],
)
def test_figures_stand_beside_the_constants_that_they_are_of(flag, part, tmp_path):
    """What other flags drew is a row of its own on the page that compares runs."""
    config = vars(train_eval.configure(["--device", "cpu"])[0]) | {"save_dir": str(tmp_path)}
    result = {
        "samples": 1,
        "frechet": 2.0,
        "classifier": "mnist",
        "digits": [1.0],
        "digits_real": [1.0],
    }
    monitor.report(
        SimpleNamespace(**config | flag),
        (result, torch.zeros(20, 1, 32, 32, dtype=torch.uint8), 0.5),
        {"config": config, "step": 3, "log": "log"},
        bits_per_dim=4.0,
    )
    logs = tmp_path / "tensorboard_logs" / "log"
    for folder in {logs, logs / part}:
        found = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
        assert found == (["final/frechet", "final/bits_per_dim"] if folder == logs / part else [])
    if part:
        start = (
            EventAccumulator(str(logs / part))
            .Reload()
            .SummaryMetadata("_hparams_/session_start_info")
        )
        assert next(iter(flag)).encode() in start.plugin_data.content
