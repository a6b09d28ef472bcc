"""What a run records: TensorBoard, statistics of its steps and the files of its measures."""

import json
import math
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from support.console import (
    MEASURES,
    at_a_terminal,
    log_folder,
    print_measures,
    progress_bar,
    warning_if_it_fails,
)
from support.files import make_folder, printable, unused, write_text
from support.pictures import write_denoising, write_grid

# measures that compare runs, on TensorBoard's HParams page
FINAL = ("test_loss", "frechet", "precision", "recall", "accuracy", "bits_per_dim")


class Monitor:
    """TensorBoard and the progress bar of a training run, as a context manager.

    Args:
        config: the constants of the run.
        progress: its step, curves and the name of its log, as last.pt keeps them.
        stats: its `RunningStats`.
        images: number of training images of the run, all epochs together.
        seen: how many of them were seen before.
        writes: False shows and writes nothing.
    """

    def __init__(self, config, progress, stats, images, seen, writes=True):
        self.config, self.progress, self.writes = config, progress, writes
        self.samples_dir = make_folder(Path(config.save_dir) / "samples")
        step = progress["step"]
        self.events = EventLog(config.save_dir, progress["log"], step + 1 if step else 0, writes)
        self.bar = progress_bar(
            total=images, initial=seen, unit="img", desc="training", disable=not writes
        )
        self.stats, self.shown, self.announced, self.done = stats, {}, False, {}
        stats.clock = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()
        self.events.close()

    def add(self, losses, *others):
        """Take in one training step, see `RunningStats.add`."""
        self.stats.add(losses, *others)
        self.bar.update(len(losses))

    def log(self, rate):
        """The statistics since the last call: to TensorBoard, the bar and the loss curve."""
        step, scalars = self.progress["step"], self.stats.read(self.progress["step"], rate)
        if self.config.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated(self.config.device) / 1e9
            scalars["train/peak_memory_gb"] = peak
            self.show(peak_gb=peak)
        for tag, value in scalars.items():
            self.events.add("scalar", tag, value, step)
        self.show(loss=scalars["train/batch_loss"])
        self.progress["train_curve"].append([step, scalars["train/batch_loss"]])

    def show(self, **values):
        """Numbers that the bar shows until they are replaced."""
        self.shown |= {name: f"{value:.4g}" for name, value in values.items()}
        self.bar.set_postfix(self.shown, refresh=at_a_terminal())

    @contextmanager
    def doing(self, what):
        """The bar says what the run does inside, when it does not train."""
        began = time.perf_counter()
        self.bar.set_description_str(what, refresh=at_a_terminal())
        yield
        self.bar.set_description_str("training", refresh=False)
        self.done[what] = time.perf_counter(), time.perf_counter() - began

    def affordable(self, what, share=0.02):
        """Whether it took less than a second when it was done last, or this share of the time."""
        end, seconds = self.done.get(what, (0.0, 0.0))
        return seconds < 1 or seconds < share * (time.perf_counter() - end)

    def log_config(self, ddpm, real):
        """The constants, for TensorBoard's pages Text and HParams; a grid of real images."""
        params = sum(p.numel() for p in ddpm.parameters())
        # the reference counts the averaged weights too
        known = {"parameters": params, "total_params": 2 * params, "optimizer_type": "AdamW"}
        known |= {"num_classes": ddpm.num_classes, **vars(self.config)}
        rows = [f"| {name} | {printable(value)} |" for name, value in known.items()]
        self.events.add("text", "config", "\n".join(["| | |", "| --- | --- |", *rows]))
        self.events.add_hparams(known)
        self.write_grid(real, "real.png", "real")

    def write_grid(self, images, name, tag):
        """A grid of images in [-1, 1] into the folder of samples and TensorBoard."""
        if self.writes:
            path = self.samples_dir / name
            write_grid(images, path, self.events, tag, self.progress["step"])

    def log_losses(self, train, test):
        """Losses of some fixed training and test images, measured in the same way: one chart."""
        step = self.progress["step"]
        for part, loss, curve in (("train", train, "fixed_curve"), ("test", test, "test_curve")):
            self.events.add("scalar", "eval/loss", loss, step, part=part)
            self.progress[curve].append([step, loss])

    def log_samples(self, images):
        """A grid of samples of this step. The first one is announced, with the time to go."""
        name = f"step_{self.progress['step']:07d}.png"
        self.write_grid(images, name, "samples")
        if self.writes and not self.announced and self.bar.n < self.bar.total:
            minutes = (self.bar.total - self.bar.n) / self.stats.rate / 60
            rate = f"{self.stats.rate:.0f} images a second: about {minutes:.0f} minutes to go"
            self.bar.write(f"{rate}; samples so far: {self.samples_dir / name}", file=sys.stderr)
            self.announced = True

    def log_frechet(self, samples, real):
        """The Fréchet distance of the grid, and that of real images: one chart."""
        step = self.progress["step"]
        self.events.add("scalar", "eval/frechet", samples, step, part="samples")
        self.events.add("scalar", "eval/frechet", real, step, part="real")
        self.progress["frechet_curve"].append([step, samples])
        self.show(frechet=samples)


class EventLog:
    """TensorBoard's log of a run, to be closed.

    What belongs into one chart has the same tag and another `part`, a subfolder, which TensorBoard
    shows as a run of its own: losses of training and test images, real and generated samples. If
    the log cannot be written, a warning says so once, and the run goes on without it.
    """

    def __init__(self, save_dir, name, purge_step=None, writes=True):
        self.folder = log_folder(save_dir, name)
        # With one, even 0, a session begins there: readers forget what was logged beyond it.
        self.purge_step, self.writers, self.works = purge_step, {}, writes
        self.hook, threading.excepthook = threading.excepthook, self._quiet

    def add(self, kind, *what, part="."):
        """SummaryWriter's `add_scalar`, `add_image` or `add_text`, or a ready "summary"."""
        if self.works:
            self.works = False
            with warning_if_it_fails("TensorBoard's log"):
                writer = self._writer(part)
                ready = kind == "summary"
                write = writer.file_writer.add_summary if ready else getattr(writer, f"add_{kind}")
                write(*what)
                self.works = True

    def add_hparams(self, values, part="."):
        """The constants of the run, or of a part, and which measures compare it: HParams."""
        with warning_if_it_fails("TensorBoard's log"):
            from torch.utils.tensorboard.summary import hparams

            plain = {
                name: value if type(value) in (int, float) else printable(value)
                for name, value in values.items()
            }
            for summary in hparams(plain, {f"final/{name}": 0 for name in FINAL})[:2]:
                self.add("summary", summary, part=part)  # the third would say "finished"

    def close(self):
        """Write what is left, and close the files."""
        if self.works:
            with warning_if_it_fails("TensorBoard's log"):
                for writer in self.writers.values():
                    writer.close()
        threading.excepthook = self.hook

    def _writer(self, part):
        from torch.utils.tensorboard import SummaryWriter

        if part not in self.writers:
            self.writers[part] = SummaryWriter(
                self.folder / part, purge_step=self.purge_step, flush_secs=10
            )
        return self.writers[part]

    def _quiet(self, failure):
        """TensorBoard's thread ends with the error that the next `add` gets: once is enough."""
        if not isinstance(failure.exc_value, OSError):
            self.hook(failure)


class RunningStats:
    """What the steps since the last entry did. It stays on the device: no step waits for it."""

    def __init__(self, config):
        self.num_timesteps = config.num_timesteps
        # loss and gradient norm of each step
        self.steps = torch.zeros(2, config.log_every, device=config.device)
        # by quartile of t: sums of losses and of weights
        self.quartiles = torch.zeros(2, 4, dtype=torch.float64, device=config.device)
        self.seconds = self.rate = 0.0  # that steps took in all; images a second, last
        self.start()

    def start(self):
        """Forget all steps and start the clock."""
        self.steps.zero_()
        self.quartiles.zero_()
        self.count = self.images = 0
        self.clock = time.perf_counter()

    def add(self, losses, weights, t, norm):
        """Take in a step: losses, their weights and timesteps, (N,), gradient norm ()."""
        self.steps[0, self.count] = (weights * losses).mean()
        self.steps[1, self.count] = norm
        quartile = t * 4 // self.num_timesteps
        self.quartiles[0].index_add_(0, quartile, (weights * losses).double())
        self.quartiles[1].index_add_(0, quartile, weights.double())
        self.count += 1
        self.images += len(losses)

    def read(self, step, rate):
        """The TensorBoard scalars of these steps, of which `step` is the last. Begins anew.

        Raises:
            SystemExit: see `check`.
        """
        losses, norms = self.check(step, rate)
        seconds = time.perf_counter() - self.clock
        self.seconds, self.rate = self.seconds + seconds, self.images / seconds
        scalars = {
            "train/batch_loss": sum(losses) / self.count,
            "train/grad_norm": sum(norms) / self.count,
            "train/learning_rate": rate,
            "train/images_per_second": self.rate,
        }
        for quartile, (total, weight) in enumerate(self.quartiles.T.tolist(), start=1):
            if weight:
                scalars[f"train_batch_loss_by_t/quartile_{quartile}"] = total / weight
        self.start()
        return scalars

    def check(self, step, rate):
        """Losses and gradient norms of these steps, of which `step` is the last.

        Raises:
            SystemExit: one of them is not finite; the exit status is 3.
        """
        losses, norms = self.steps[:, : self.count].tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                before = ", ".join(f"{value:.4g}" for value in losses[max(0, i - 5) : i])
                print(
                    f"\nstep {step - self.count + i + 1}: loss {loss}, gradient norm {norm}, "
                    f"learning rate {rate:.3g}, losses before: {before or 'in the last entry'}. "
                    "Training has diverged and stops. If there is a last.pt, it is from before: "
                    "continue with --resume and a lower --learning_rate or --grad_clip",
                    file=sys.stderr,
                )
                raise SystemExit(3)
        return losses, norms

    def state_dict(self):
        """The steps since the last entry, so that a resumed run goes on to the same curve."""
        return {
            "steps": self.steps[:, : self.count].clone(),
            "quartiles": self.quartiles.clone(),
            "every": self.steps.shape[1],
        }

    def load_state_dict(self, state):
        """Go on from a `state_dict`; if the entries have another distance now, begin anew."""
        self.start()
        if state["every"] == self.steps.shape[1]:
            self.count = state["steps"].shape[1]
            self.steps[:, : self.count] = state["steps"]
            self.quartiles.copy_(state["quartiles"])


def write_final(config, ddpm, images, frames, test_loss):
    """A grid of a model as final.png, and its film; grid and test loss in TensorBoard.

    `frames` are the noisy images on the way, see `pictures.write_denoising`. All files are new.
    """
    with closing(EventLog(config.save_dir, ddpm.info["log"])) as events:
        events.add("scalar", "final/test_loss", test_loss, ddpm.info["step"])
        with warning_if_it_fails("writing a picture"):  # the folder of another person
            path = unused(make_folder(Path(config.save_dir) / "samples") / "final.png")
            write_grid(images, path, events, "final", ddpm.info["step"])
            write_denoising(frames, unused(path.with_name("denoising.gif")))
            print(f"samples: {path}")


def report(config, measured, known, info=None, own=True):
    """Measures of samples as a table, as JSON and as a picture of the nearest pairs: new files.

    Args:
        config: the constants of the evaluation.
        measured: what `metrics.measure` gave, and the test accuracy of its classifier.
        known: what else goes into the JSON.
        info: that of the model that drew the samples; the measures then go to TensorBoard too.
        own: whether the run's own constants drew them; else they are a part of their own there.
    """
    result, pairs, accuracy = measured
    print_measures(result, accuracy, config.dataset)  # first, in case that a file cannot be written
    pairs = pairs.float() / 127.5 - 1
    save_dir, name = Path(config.save_dir), ""
    everything = {"dataset": config.dataset, "classifier_accuracy": accuracy, **known, **result}
    if not info:
        name = f"_{Path(config.evaluate).resolve().name[:100]}"
    with warning_if_it_fails("writing the measures"):
        path = unused(make_folder(save_dir) / f"evaluation{name}.json")
        plain = {name: None if value != value else value for name, value in everything.items()}
        write_text(path, json.dumps(plain, indent=2) + "\n")  # JSON has no NaN
        picture = unused(make_folder(save_dir / "samples") / f"nearest{name}.png")
        log, step = (info["log"], info["step"]) if info else ("", None)
        with closing(EventLog(save_dir, log, writes=info is not None)) as events:
            part = "." if own else path.stem
            if not own:
                events.add_hparams(vars(config), part)
            for tag in sorted({*FINAL, *MEASURES} & everything.keys()):
                events.add("scalar", f"final/{tag}", everything[tag], step, part=part)
            write_grid(pairs, picture, events, "nearest", step)
        print(f"measures: {path}   nearest pairs: {picture}")
