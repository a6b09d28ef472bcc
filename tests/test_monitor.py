"""What a run records and a terminal shows: TensorBoard, statistics, measures, commands."""

import math
import os
import shlex
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from conftest import configured
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import FLAGS, full_disk, tiny_ddpm
from tqdm import TMonitor, tqdm

from support import console, monitor
from support.monitor import EventLog, Monitor, RunningStats

CURVES = ("train", "fixed", "test", "frechet")
RESULT = {"samples": 1234, "precision": 0.5, "precision_real": 0.75, "confidence": 0.9}
RESULT |= {"digits": [0.25, 0.75], "digits_real": [0.5, 0.5], "classifier": "mnist-12345678"}


def log_of(save_dir, part="."):
    """TensorBoard's log of a part of a run, and its scalars, {tag: {step: value}}."""
    log = EventAccumulator(str(save_dir / "tensorboard_logs" / "log" / part)).Reload()
    tags = log.Tags()["scalars"]
    return log, {tag: {event.step: event.value for event in log.Scalars(tag)} for tag in tags}


def without_groups(found):
    return {tag.partition("/")[2]: value for tag, value in found.items()}


def four_steps(watch, loss):
    for _ in range(4):
        t = torch.tensor([15, 19])  # the noisiest quarter of 20 timesteps
        watch.add(torch.full((2,), loss), torch.ones(2), t, torch.tensor(0.5))
        watch.progress["step"] += 1
    watch.log(0.1)


def watch_of(save_dir, step=0):
    config = configured(*FLAGS, "--save_dir", save_dir).config
    progress = {"step": step, "log": "log"} | {f"{name}_curve": [] for name in CURVES}
    return Monitor(config, progress, RunningStats(config), 320, 8 * step)


def some_stats(log_every=50):
    return RunningStats(SimpleNamespace(num_timesteps=1000, log_every=log_every, device="cpu"))


def test_tensorboard_has_the_curves_the_grids_and_the_constants(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    with watch_of(tmp_path) as watch:
        watch.config.device = "cuda:0"
        watch.log_config(tiny_ddpm(10), torch.rand(4, 1, 8, 8))
        four_steps(watch, 2.0)
        watch.log_losses(1.0, 3.0)
        watch.log_samples(torch.rand(4, 1, 8, 8))
        watch.log_frechet(5.0, 7.0)
        assert watch.bar.postfix == "peak_gb=3, loss=2, frechet=5"
    log, found = log_of(tmp_path)
    assert found.pop("train/images_per_second")[4] > 0
    entry = {"batch_loss": 2, "grad_norm": 0.5, "learning_rate": 0.1, "quartile_4": 2}
    entry["peak_memory_gb"] = 3
    assert without_groups(found) == {tag: {4: pytest.approx(x)} for tag, x in entry.items()}
    pairs = {"train": ("loss", 1), "test": ("loss", 3), "samples": ("frechet", 5)}
    for part, (tag, value) in (pairs | {"real": ("frechet", 7)}).items():
        assert log_of(tmp_path, part)[1] == {f"eval/{tag}": {4: value}}
    assert [watch.progress[f"{name}_curve"] for name in CURVES] == [[[4, y]] for y in (2, 1, 3, 5)]
    assert [event.step for tag in ("real", "samples") for event in log.Images(tag)] == [0, 4]
    text = log.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines()[2:])
    assert vars(watch.config).keys() < rows.keys() and rows["epochs"] == "2"
    assert int(rows["total_params"]) == 2 * sum(p.numel() for p in tiny_ddpm(10).parameters())


def test_a_resumed_run_replaces_what_came_after_its_last_save(tmp_path):
    for step, losses in ((0, [1.0, 2.0, 3.0]), (8, [4.0, 5.0])):  # saved at 8, killed after 12
        time.sleep(1.1 * bool(step))  # the names of TensorBoard's files count seconds
        with watch_of(tmp_path, step) as watch:
            for loss in losses:
                four_steps(watch, loss)
    assert log_of(tmp_path)[1]["train/batch_loss"] == {4: 1, 8: 2, 12: 4, 16: 5}
    # another reader, that of --load_fast=false, which takes the first session for no restart
    log = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard_logs" / "log"))
    assert [event.step for event in log.Reload().Tensors("train/batch_loss")] == [4, 8, 12, 16]


def test_a_run_that_moved_to_its_own_folder_goes_on_with_its_log(tmp_path):
    """Only its first half is there: `run_DATE` is inside the folder of all logs."""
    moved = tmp_path / "run_DATE"
    with watch_of(tmp_path) as watch:
        four_steps(watch, 2.0)
    with watch_of(moved, step=4) as watch:
        four_steps(watch, 1.0)
    assert log_of(tmp_path)[1]["train/batch_loss"] == {4: 2.0, 8: 1.0}
    assert not (moved / "tensorboard_logs").exists()
    command = console.tensorboard_command(moved, "log")
    folder = shlex.split(command)[1].partition("=")[2]
    assert os.path.samefile(folder, tmp_path / "tensorboard_logs")


def test_what_took_long_is_done_again_when_it_has_paid_off(tmp_path, monkeypatch):
    watch, now = watch_of(tmp_path), [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    for seconds, rest, again in ((0.9, 0, True), (10, 499, False), (10, 501, True)):
        with watch.doing("saving"):
            now[0] += seconds
        now[0] += rest
        assert watch.affordable("saving") == again
    assert watch.affordable("evaluating")


def test_statistics_are_means_over_the_steps_and_by_quartile_of_t(monkeypatch):
    stats, one = some_stats(), torch.ones(1)
    monkeypatch.setattr(time, "perf_counter", lambda: stats.clock + 2.0)
    t, losses = torch.tensor([0, 249, 250]), torch.tensor([1.0, 2.0, 3.0])
    stats.add(losses, torch.ones(3), t, torch.tensor(4.0))
    stats.add(torch.tensor([5.0]), one, torch.tensor([999]), torch.tensor(6.0))
    expected = {"batch_loss": 3.5, "grad_norm": 5, "learning_rate": 0.1, "images_per_second": 2}
    expected |= {"quartile_1": 1.5, "quartile_2": 3, "quartile_4": 5}
    assert without_groups(stats.read(2, 0.1)) == expected
    # then they begin anew; what importance draws often weighs less
    t, weights = torch.tensor([500, 749]), torch.tensor([0.5, 1.5])
    stats.add(torch.tensor([4.0, 1.0]), weights, t, torch.tensor(1.0))
    found = without_groups(stats.read(3, 0.1))
    assert found["batch_loss"] == found["quartile_3"] == 1.75


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_is_not_finite_ends_the_run_in_one_line(capsys, loss, norm):
    stats, one, t = some_stats(), torch.ones(1), torch.tensor([0])
    for x, size in ((2.0, 1.0), (loss, norm), (3.0, 1.0)):
        stats.add(torch.tensor([x]), one, t, torch.tensor(size))
    with pytest.raises(SystemExit) as exit_:
        stats.read(9, 0.1)
    err = capsys.readouterr().err
    assert exit_.value.code == 3 and err.count("\n") == 2  # the first leaves the bar
    assert f"step 8: loss {loss}, gradient norm {norm}, learning rate 0.1, losses before: 2." in err


@pytest.mark.parametrize("every, kept", [(50, True), (40, False)])
def test_statistics_go_on_after_a_resume_if_entries_have_the_same_distance(every, kept):
    before, after = some_stats(), some_stats(every)
    step = torch.ones(1), torch.tensor([900]), torch.tensor(1.0)
    for _ in range(39):
        before.add(torch.tensor([3.0]), *step)
    after.load_state_dict(before.state_dict())
    after.add(torch.tensor([1.0]), *step)
    found, mean = without_groups(after.read(40, 0.1)), (39 * 3 + 1) / 40 if kept else 1
    assert found["batch_loss"] == found["quartile_4"] == mean


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "WARNED", set())
    with full_disk(9_000), closing(EventLog(tmp_path, "log")) as log:
        for step in range(5):
            log.add("image", "noise", torch.rand(3, 100, 100), step)
            time.sleep(0.1)  # a thread of its own writes
    err = capsys.readouterr().err
    assert err.count("TensorBoard's log failed (OSError") == 1 and "Traceback" not in err


@pytest.mark.parametrize("own", [True, False])
def test_measures_stand_beside_the_constants_that_they_are_of(own, tmp_path):
    config = configured("--recipe", "quick", "--data_dir", "\udcff", "--save_dir", tmp_path).config
    known, info = {"bits_per_dim": 4.0, "test_loss": math.nan}, {"step": 3, "log": "log"}
    measured = RESULT, torch.zeros(20, 1, 32, 32, dtype=torch.uint8), 0.5
    monitor.report(config, measured, known, info, own)
    log, found = log_of(tmp_path, "." if own else "evaluation")
    assert found["final/precision"] == {3: 0.5} and found["final/bits_per_dim"] == {3: 4}
    if not own:  # a row of their own on the page that compares runs
        assert log_of(tmp_path)[1] == {}
        constants = log.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert b"channel_mult" in constants and b"(1, 2, 4)" in constants and b"bf16" in constants
        assert b"final/frechet" in log.SummaryMetadata("_hparams_/experiment").plugin_data.content
    written = (tmp_path / "evaluation.json").read_text()
    assert '"test_loss": null' in written and '"samples": 1234' in written


def test_the_table_shows_real_images_beside_and_names_what_is_missing(capsys):
    console.print_measures(RESULT, 0.9955, "mnist")
    text = " ".join(capsys.readouterr().out.split())
    said = ["1,234 samples, as many images of mnist", "precision 0.500 0.750 "]
    said += ["share of the rarest label 0.250 0.500 "]
    said += ["of the classifier 0.900 ", "mnist-12345678, 99.55% test accuracy"]
    assert [words for words in said if words not in text] == []
    assert text.endswith("too few images: Fréchet distance to the test set, recall")


@pytest.mark.parametrize("folder", ["my first run", "a'b", "$(rm x)", "-x", "tab\there"])
def test_printed_commands_can_be_pasted(folder):
    words = shlex.split(console.shell_command("-x", save_dir=folder))
    assert words == ["python", "train_eval.py", "-x", f"--save_dir={folder}"]
    assert f"--logdir={folder}/tensorboard_logs" in shlex.split(console.tensorboard_command(folder))
    assert console.shell_command("-x", save_dir="checkpoints") == "python train_eval.py -x"


def test_without_a_terminal_lines_are_half_a_minute_apart_after_a_long_look_too(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(console._Lines, "write", lambda self, text: lines.append(now[0]))
    monkeypatch.setattr(TMonitor, "_test", {"time": lambda: now[0]})  # tqdm's thread prints too
    with console.progress_bar(total=999, desc="training") as bar:
        bar._time, bar.start_t, bar.last_print_t = (lambda: now[0]), 0.0, 0.0
        monitor = TMonitor(tqdm, 0.001)
        for pause in [1] * 65 + [100] + [1] * 65:
            now[0] += pause
            time.sleep(0.05 * (pause > 1))
            bar.update(1)
        monitor.exit()
        assert lines == [0, 30, 60, 165, 195, 225]


@pytest.mark.parametrize("stderr", [None, open(os.devnull)], ids=["missing", "not writable"])
def test_an_output_that_is_closed_stops_no_run(monkeypatch, stderr):
    monkeypatch.setattr("sys.stderr", stderr)
    assert not console.at_a_terminal()
    with console.progress_bar(total=3, desc="training") as bar:
        bar.update(3)
    with console.warning_if_it_fails(f"what says so in {stderr}"):
        raise OSError(28, "No space left on device")
