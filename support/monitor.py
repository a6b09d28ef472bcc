"""What a run records: TensorBoard, statistics of its steps and the table of measures."""

import json
import math
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from support.configurator import FREE_TO_EVALUATE, NOT_SAVED
from support.console import at_a_terminal, progress_bar
from support.files import make_folder, unused, write_text
from support.machine import is_main, on_main, warning_if_it_fails
from support.pictures import write_denoising, write_grid

FIELDS = (  # of the reference's log, in its order
    "device",
    "batch_size",
    "epochs",
    "save_dir",
    "optimizer_type",
    "learning_rate",
    "weight_decay",
    "use_scheduler",
    "scheduler_type",
    "total_params",
    "image_size",
    "channels",
    "num_timesteps",
    "base_channels",
    "num_res_blocks",
    "channel_mult",
    "dropout",
    "time_emb_dim",
    "use_conditional_generation",
    "num_classes",
    "ema_decay",
    "ema_start",
    "ema_update_rate",
    "train_size",
    "test_size",
    "use_augmentation",
    "normalization",
    "convert_to_rgb",
)
MEASURES = {  # of metrics.measure: the words of the table
    "frechet": "Fréchet distance to the test set",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "read as the digit asked for",
    "confidence": "confidence of the classifier",
    "rarest_digit": "share of the rarest digit",
    "commonest_digit": "share of the commonest digit",
    "colour": "deviation from grey, in grey levels",
    "nearest": "to the nearest training image, in grey levels",
    "nearest_1st": "the same, first percentile",
    "copies": "share nearer than 99 % of test digits",
}
FINAL = (
    "test_loss",
    "frechet",
    "precision",
    "recall",
    "accuracy",
    "bits_per_dim",
)  # measures that compare runs
DECIDES_FIGURES = (
    FREE_TO_EVALUATE - NOT_SAVED - {"device", "data_dir", "bf16", "use_compile", "num_samples"}
)


class Monitor:
    """TensorBoard and the progress bar of a training run, as a context manager.

    Args:
        config: the constants of the run.
        progress: its step, curves and the name of its log, as last.pt keeps them.
        stats: its `RunningStats`.
        images: number of training images of the run, all epochs together.
        seen: how many of them were seen before.
    """

    def __init__(self, config, progress, stats, images, seen):
        self.config, self.progress = config, progress
        self.samples_dir = make_folder(Path(config.save_dir) / "samples")
        self.events = EventLog(
            config.save_dir,
            progress["log"],
            purge_step=progress["step"] + 1 if progress["step"] else None,
        )
        self.bar = progress_bar(
            total=images, initial=seen, unit="img", desc="training", disable=not is_main()
        )
        self.stats, self.shown, self.announced = stats, {}, False
        stats.clock = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()
        self.events.close()

    def add(self, losses, weights, t, norm):
        """Take in one training step, see `RunningStats.add`."""
        self.stats.add(losses, weights, t, norm)
        self.bar.update(len(losses))

    def log(self, rate):
        """The statistics since the last call, and the learning rate: to TensorBoard, the bar and the loss curve."""
        step, scalars = self.progress["step"], self.stats.read(self.progress["step"], rate)
        for tag, value in (scalars | {"train/learning_rate": rate}).items():
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
        self.bar.set_description_str(what, refresh=at_a_terminal())
        yield
        self.bar.set_description_str("training", refresh=False)

    def log_config(self, ddpm, real):
        """The config as a table, the reference's fields first, and for the HParams page; a grid of real images."""
        known = vars(self.config) | {
            "optimizer_type": "AdamW",
            "scheduler_type": "CosineAnnealingLR" if self.config.use_scheduler else None,
            "total_params": 2 * sum(p.numel() for p in ddpm.parameters()),  # network and shadow
            "num_classes": ddpm.num_classes,
            "normalization": "[-1, 1]",
            "convert_to_rgb": self.config.channels == 3,
        }
        names = [*FIELDS, *(name for name in known if name not in FIELDS)]
        rows = [f"| {name} | {known[name]} |" for name in names]
        text = "\n".join(["| constant | value |", "| --- | --- |", *rows])
        self.events.add(
            "text", "config", text.encode(errors="replace").decode()
        )  # a path may hold any bytes
        self.events.add_hparams({name: known[name] for name in names})
        write_grid(real, self.samples_dir / "real.png", self.events, "real", 0)

    def log_losses(self, train, test):
        """Losses of some fixed training and test images, measured in the same way: one chart."""
        step = self.progress["step"]
        for part, loss, curve in (("train", train, "fixed_curve"), ("test", test, "test_curve")):
            self.events.add("scalar", "eval/loss", loss, step, part=part)
            self.progress[curve].append([step, loss])

    def log_samples(self, images):
        """A grid of samples of this step. The first one is announced, with the time that the run will take."""
        step = self.progress["step"]
        path = self.samples_dir / f"step_{step:07d}.png"
        write_grid(images, path, self.events, "samples", step)
        if is_main() and not self.announced and self.bar.n < self.bar.total:
            minutes = (self.bar.total - self.bar.n) / self.stats.rate / 60
            self.bar.write(
                f"{self.stats.rate:.0f} images a second: about {minutes:.0f} minutes to go; digits so far: "
                f"{path}",
                file=sys.stderr,
            )
            self.announced = True

    def log_frechet(self, samples, real):
        """The Fréchet distance of the grid, and that of real images: one chart."""
        step = self.progress["step"]
        self.events.add("scalar", "eval/frechet", samples, step, part="samples")
        self.events.add("scalar", "eval/frechet", real, step, part="real")
        self.progress["frechet_curve"].append([step, samples])
        self.show(frechet=samples)


class EventLog:
    """TensorBoard's log of a run, as a context manager; only the main process writes it.

    What belongs into one chart has the same tag and another `part`, a subfolder, which TensorBoard shows as a run of
    its own: losses of training and test images, real and generated samples. If the log cannot be written, a warning
    says so once, and the run goes on without it.
    """

    def __init__(self, save_dir, name, purge_step=None):
        self.folder, self.purge_step = Path(save_dir) / "tensorboard_logs" / name, purge_step
        self.writers, self.works = {}, is_main()
        if is_main():
            self.hook, threading.excepthook = threading.excepthook, self._quiet

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def add(self, kind, *what, part="."):
        """SummaryWriter's `add_scalar`, `add_image` or `add_text`, or a "summary" that is ready to write."""
        if self.works:
            self.works = False
            with warning_if_it_fails("TensorBoard's log"):
                writer = self._writer(part)
                (
                    writer.file_writer.add_summary
                    if kind == "summary"
                    else getattr(writer, f"add_{kind}")
                )(*what)
                self.works = True

    def add_hparams(self, values, part="."):
        """The constants of the run, or of a part, and which measures compare it, for TensorBoard's HParams page."""
        if not self.works:
            return
        with warning_if_it_fails("TensorBoard's log"):
            from torch.utils.tensorboard.summary import hparams

            plain = {
                name: value
                if type(value) in (int, float)
                else str(value).encode(errors="replace").decode()
                for name, value in values.items()
            }
            for summary in hparams(plain, {f"final/{name}": 0 for name in FINAL})[
                :2
            ]:  # not "finished"
                self.add("summary", summary, part=part)

    def close(self):
        """Write what is left, and close the files."""
        if self.works:
            with warning_if_it_fails("TensorBoard's log"):
                for writer in self.writers.values():
                    writer.close()
        if is_main():
            threading.excepthook = self.hook

    def _writer(self, part):
        from torch.utils.tensorboard import SummaryWriter

        if part not in self.writers:
            self.writers[part] = SummaryWriter(
                self.folder / part, purge_step=self.purge_step, flush_secs=10
            )
        return self.writers[part]

    def _quiet(self, failure):
        """TensorBoard's thread ends with the error that the next `add` gets; it need not be shown twice."""
        if not isinstance(failure.exc_value, OSError):
            self.hook(failure)


class RunningStats:
    """What the steps since the last entry did. It stays on the device, so that no step waits for it."""

    def __init__(self, config):
        self.num_timesteps = config.num_timesteps
        self.steps = torch.zeros(
            2, config.log_every, device=config.device
        )  # loss and gradient norm of each
        self.quartiles = torch.zeros(
            2, 4, dtype=torch.float64, device=config.device
        )  # by t: sums of losses, weights
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
            "train/images_per_second": self.rate,
        }
        for quartile, (total, weight) in enumerate(self.quartiles.T.tolist(), start=1):
            if weight:
                scalars[f"train_batch_loss_by_t/quartile_{quartile}"] = total / weight
        self.start()
        return scalars

    def check(self, step, rate):
        """Losses and gradient norms of these steps, of which `step` is the last; `rate` is the learning rate now.

        Raises:
            SystemExit: one of them is not finite; the exit status is 3.
        """
        losses, norms = self.steps[:, : self.count].tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                if is_main():
                    before = (
                        ", ".join(f"{value:.4g}" for value in losses[max(0, i - 5) : i])
                        or "in the last entry"
                    )
                    print(
                        f"\nstep {step - self.count + i + 1}: loss {loss}, gradient norm {norm}, learning rate "
                        f"{rate:.3g}, losses before: {before}. Training has diverged and stops. If there is a "
                        "last.pt, it is from before: continue with --resume and a lower --learning_rate or "
                        "--grad_clip",
                        file=sys.stderr,
                    )
                raise SystemExit(3)
        return losses, norms

    def state_dict(self):
        """The steps since the last entry, so that a run that is stopped between two goes on to the same curve."""
        return {
            "steps": self.steps[:, : self.count].clone(),
            "quartiles": self.quartiles.clone(),
            "every": self.steps.shape[1],
        }

    def load_state_dict(self, state):
        """Go on from a `state_dict`; if the entries have another distance now, begin anew."""
        self.start()
        if state.get("every") == self.steps.shape[1]:
            self.count = count = state["steps"].shape[1]
            self.steps[:, :count] = state["steps"]
            self.quartiles.copy_(state["quartiles"])


def table(result, accuracy):
    """The result of `metrics.measure` as text: each figure of the samples beside that of real images."""
    result = result | {
        f"{name}_digit{suffix}": pick(result[f"digits{suffix}"])
        for name, pick in (("rarest", min), ("commonest", max))
        for suffix in ("", "_real")
    }
    head = f"{result['samples']:,} samples, as many real digits:"
    lines = [f"{head:50}{'samples':>10}{'real':>10}"]
    for name, text in MEASURES.items():
        if name in result:
            real = result.get(f"{name}_real")
            lines.append(
                f"  {text:48}{result[name]:10.4f}" + (f"{real:10.4f}" if real is not None else "")
            )
    lines.append(
        "real: as many training images, which the classifier learned from; nearest: test images\n"
        f"classifier: {result['classifier']}, {accuracy:.2%} test accuracy; compare only figures by the same"
    )
    missing = [MEASURES[name] for name in ("frechet", "precision", "recall") if name not in result]
    if missing:
        lines.append(f"left out, since there are too few images: {', '.join(missing)}")
    return "\n".join(lines)


@on_main
def write_final(config, ddpm, sequence, test_loss):
    """The final grid of a model, the last of a sequence, as final.png, and its film; grid and test loss in TensorBoard.

    Both are new files.
    """
    path = unused(make_folder(Path(config.save_dir) / "samples") / "final.png")
    with EventLog(config.save_dir, ddpm.info["log"]) as events:
        write_grid(sequence[-1], path, events, "final", ddpm.info["step"])
        events.add("scalar", "final/test_loss", test_loss, ddpm.info["step"])
    write_denoising(ddpm, sequence, config.sample_steps, unused(path.with_name("denoising.gif")))
    print(f"model: {Path(config.save_dir) / 'best_model.pt'}   samples: {path}")


@on_main
def report(config, measured, info=None, **known):
    """What train_eval.measure gave as a table, as JSON and as a picture of the nearest pairs, all in new files.

    `info` is that of the model that drew the samples; the measures then go to TensorBoard too, and if the run's own
    constants did not draw them, as a part of their own. `known` goes into the JSON.
    """
    result, pairs, accuracy = measured
    print(table(result, accuracy))  # first, in case that a file cannot be written
    pairs = pairs.float() / 127.5 - 1
    save_dir, name = (
        Path(config.save_dir),
        "" if info else f"_{Path(config.evaluate).resolve().name[:100]}",
    )
    path = unused(save_dir / f"evaluation{name}.json")
    picture = unused(make_folder(save_dir / "samples") / f"nearest{name}.png")
    known |= {"dataset": config.dataset, "classifier_accuracy": accuracy}
    if info:
        known |= {"seed": config.seed, "step": info["step"]}
        with EventLog(save_dir, info["log"]) as events:
            part = "."
            if any(getattr(config, name) != info["config"].get(name) for name in DECIDES_FIGURES):
                events.add_hparams(
                    vars(config), part := path.stem
                )  # a row of its own, not figures beside other flags
            for tag in dict.fromkeys((*FINAL, *MEASURES)):
                if tag in result or tag in known:
                    events.add(
                        "scalar", f"final/{tag}", (result | known)[tag], info["step"], part=part
                    )
            write_grid(pairs, picture, events, "nearest", info["step"])
    else:
        write_grid(pairs, picture)
    plain = {
        name: None if value != value else value for name, value in (known | result).items()
    }  # JSON has no NaN
    write_text(path, json.dumps(plain, indent=2) + "\n")
    print(f"measures: {path}   nearest pairs: {picture}")
