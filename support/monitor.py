"""What a person watches: TensorBoard, the progress bar, grids of images, the loss curve and the table of measures."""

import json
import math
import os
import shlex
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from support.files import make_folder, unused, write_text
from support.machine import describe_precision, is_main, on_main, warning_if_it_fails
from support.pictures import write_denoising, write_grid

FIELDS = (  # of the reference's log, in its order
    "device", "batch_size", "epochs", "save_dir", "optimizer_type", "learning_rate", "weight_decay", "use_scheduler",
    "scheduler_type", "total_params", "image_size", "channels", "num_timesteps", "base_channels", "num_res_blocks",
    "channel_mult", "dropout", "time_emb_dim", "use_conditional_generation", "num_classes", "ema_decay", "ema_start",
    "ema_update_rate", "train_size", "test_size", "use_augmentation", "normalization", "convert_to_rgb",
)
MEASURES = {  # of metrics.measure: the words of the table
    "frechet": "Fréchet distance to the test set", "precision": "precision", "recall": "recall",
    "accuracy": "read as the digit asked for", "confidence": "confidence of the classifier",
    "rarest_digit": "share of the rarest digit", "commonest_digit": "share of the commonest digit",
    "colour": "deviation from grey, in grey levels", "nearest": "to the nearest training image, in grey levels",
    "nearest_1st": "the same, first percentile", "copies": "share nearer than 99 % of test digits"}


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
        from tqdm import tqdm

        self.config, self.progress = config, progress
        self.samples_dir = make_folder(Path(config.save_dir) / "samples")
        self.events = EventLog(config.save_dir, progress["log"],
                               purge_step=progress["step"] + 1 if progress["step"] else None)
        self.bar = tqdm(total=images, initial=seen, unit="img", smoothing=0.05, mininterval=0.5,
                        disable=not is_main())
        self.stats = stats
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
        self.bar.set_postfix(loss=f"{scalars['train/loss']:.4f}")
        self.progress["train_curve"].append([step, scalars["train/loss"]])

    def log_config(self, ddpm, real):
        """The config as a table, the reference's fields first, and a grid of real images."""
        known = vars(self.config) | {
            "optimizer_type": "AdamW", "scheduler_type": "CosineAnnealingLR" if self.config.use_scheduler else None,
            "total_params": 2 * sum(p.numel() for p in ddpm.parameters()),  # network and shadow
            "num_classes": ddpm.num_classes, "normalization": "[-1, 1]", "convert_to_rgb": self.config.channels == 3}
        names = [*FIELDS, *(name for name in known if name not in FIELDS)]
        rows = [f"| {name} | {known[name]} |" for name in names]
        text = "\n".join(["| | |", "| --- | --- |", *rows])
        self.events.add("text", "config", text.encode(errors="replace").decode())  # a path may hold any bytes
        write_grid(real, self.samples_dir / "real.png", self.events, "real", 0)

    def log_samples(self, images):
        """A grid of samples of this step."""
        step = self.progress["step"]
        write_grid(images, self.samples_dir / f"step_{step:07d}.png", self.events, "samples", step)

    @on_main
    def log_frechet(self, measured):
        """The Fréchet distances of some samples and of as many real images."""
        for name in ("frechet", "frechet_real"):
            self.events.add("scalar", f"samples/{name}", measured[0][name], self.progress["step"])


class EventLog:
    """TensorBoard's log of a run, as a context manager; only the main process writes it.

    If it cannot be written, a warning says so once, and the run goes on without it.
    """

    def __init__(self, save_dir, name, purge_step=None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = None
        if is_main():
            self.hook, threading.excepthook = threading.excepthook, self._quiet
            with warning_if_it_fails("TensorBoard's log"):
                self.writer = SummaryWriter(Path(save_dir) / "tensorboard_logs" / name, purge_step=purge_step,
                                            flush_secs=10)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def add(self, kind, *what):
        """SummaryWriter's `add_scalar`, `add_image` or `add_text`."""
        if self.writer is not None:
            writer, self.writer = self.writer, None
            with warning_if_it_fails("TensorBoard's log"):
                getattr(writer, f"add_{kind}")(*what)
                self.writer = writer

    def close(self):
        """Write what is left, and close the file."""
        if self.writer is not None:
            with warning_if_it_fails("TensorBoard's log"):
                self.writer.close()
        if is_main():
            threading.excepthook = self.hook

    def _quiet(self, failure):
        """TensorBoard's thread ends with the error that the next `add` gets; it need not be shown twice."""
        if not isinstance(failure.exc_value, OSError):
            self.hook(failure)


class RunningStats:
    """What the steps since the last entry did. It stays on the device, so that no step waits for it."""

    def __init__(self, config):
        self.num_timesteps = config.num_timesteps
        self.steps = torch.zeros(2, config.log_every, device=config.device)  # loss and gradient norm of each
        self.quartiles = torch.zeros(2, 4, dtype=torch.float64, device=config.device)  # by t: sums of losses, weights
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
        scalars = {"train/loss": sum(losses) / self.count, "train/grad_norm": sum(norms) / self.count,
                   "train/images_per_second": self.images / (time.perf_counter() - self.clock)}
        for quartile, (total, weight) in enumerate(self.quartiles.T.tolist(), start=1):
            if weight:
                scalars[f"train_loss_by_t/quartile_{quartile}"] = total / weight
        self.start()
        return scalars

    def check(self, step, rate):
        """Losses and gradient norms of these steps, of which `step` is the last; `rate` is the learning rate now.

        Raises:
            SystemExit: one of them is not finite; the exit status is 3.
        """
        losses, norms = self.steps[:, :self.count].tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                if is_main():
                    before = ", ".join(f"{value:.4g}" for value in losses[max(0, i - 5):i]) or "in the last entry"
                    print(f"\nstep {step - self.count + i + 1}: loss {loss}, gradient norm {norm}, learning rate "
                          f"{rate:.3g}, losses before: {before}. Training has diverged and stops. If there is a "
                          "last.pt, it is from before: continue with --resume and a lower --learning_rate or "
                          "--grad_clip", file=sys.stderr)
                raise SystemExit(3)
        return losses, norms

    def state_dict(self):
        """The steps since the last entry, so that a run that is stopped between two goes on to the same curve."""
        return {"steps": self.steps[:, :self.count].clone(), "quartiles": self.quartiles.clone()}

    def load_state_dict(self, state):
        """Go on from a `state_dict`; if the entries are now closer together than that, begin anew."""
        self.start()
        count = state["steps"].shape[1]
        if count < self.steps.shape[1]:
            self.steps[:, :count] = state["steps"]
            self.quartiles.copy_(state["quartiles"])
            self.count = count


def table(result, accuracy):
    """The result of `metrics.measure` as text: each figure of the samples beside that of real images."""
    result = result | {f"{name}_digit{suffix}": pick(result[f"digits{suffix}"])
                       for name, pick in (("rarest", min), ("commonest", max)) for suffix in ("", "_real")}
    head = f"{result['samples']:,} samples, as many real digits:"
    lines = [f"{head:50}{'samples':>10}{'real':>10}"]
    for name, text in MEASURES.items():
        if name in result:
            real = result.get(f"{name}_real")
            lines.append(f"  {text:48}{result[name]:10.4f}" + (f"{real:10.4f}" if real is not None else ""))
    lines.append(f"real: as many training images, from which the classifier learned; in rows on nearness, test images\n"
                 f"classifier: {result['classifier']}, {accuracy:.2%} test accuracy; compare only figures by the same")
    missing = [MEASURES[name] for name in ("frechet", "precision", "recall") if name not in result]
    if missing:
        lines.append(f"left out, since there are too few images: {', '.join(missing)}")
    return "\n".join(lines)


@on_main
def write_final(config, ddpm, sequence):
    """The final grid of a model, the last of a sequence, in a new file final.png and in TensorBoard, and its film."""
    path = unused(make_folder(Path(config.save_dir) / "samples") / "final.png")
    with EventLog(config.save_dir, ddpm.info["log"]) as events:
        write_grid(sequence[-1], path, events, "samples/final", ddpm.info["step"])
    write_denoising(ddpm, sequence, config.sample_steps, unused(path.with_name("denoising.gif")))
    print(f"model: {Path(config.save_dir) / 'best_model.pt'}   samples: {path}")


@on_main
def report(config, measured, info=None, **known):
    """What train_eval.measure gave as a table, as JSON and as a picture of the nearest pairs, all in new files.

    `info` is that of the model that drew the samples; the measures then go to TensorBoard too. `known` goes into the
    JSON.
    """
    result, pairs, accuracy = measured
    print(table(result, accuracy))  # first, in case that a file cannot be written
    pairs = pairs.float() / 127.5 - 1
    save_dir, name = Path(config.save_dir), "" if info else f"_{Path(config.evaluate).resolve().name[:100]}"
    path = unused(save_dir / f"evaluation{name}.json")
    picture = unused(make_folder(save_dir / "samples") / f"nearest{name}.png")
    known |= {"dataset": config.dataset, "classifier_accuracy": accuracy}
    if info:
        known |= {"seed": config.seed, "epoch": info["epoch"], "step": info["step"]}
        with EventLog(save_dir, info["log"]) as events:
            for tag, value in result.items():
                if isinstance(value, (int, float)):
                    events.add("scalar", f"evaluation/{tag}", value, info["step"])
            write_grid(pairs, picture, events, "samples/nearest", info["step"])
    else:
        write_grid(pairs, picture)
    plain = {name: None if value != value else value for name, value in (known | result).items()}  # JSON has no NaN
    write_text(path, json.dumps(plain, indent=2) + "\n")
    print(f"measures: {path}   nearest pairs: {picture}")


def print_start(run, least_samples):
    """What is trained on what, and how to watch it."""
    config = run.config
    print(f"{config.dataset}: {len(run.train_images):,} images to train, {len(run.test_images):,} to test; network: "
          f"{sum(p.numel() for p in run.ddpm.parameters()):,} parameters on {config.device}\n"
          f"precision: {describe_precision(config)}\n"
          f"{run.total_steps:,} steps, {run.progress['step']:,} done; process {os.getpid()}\n"
          f"watch: {tensorboard_command(config.save_dir)}")
    if config.eval_every and run.few_samples <= least_samples:
        print("samples are not measured during training: there are too few training or test images")


def print_test_loss(config, loss, info):
    """Print the test loss, and which weights it is of: the epoch was chosen by this very loss."""
    best = f"epoch {info['epoch']}, which has the lowest" if info["epoch"] else f"step {info['step']}, in epoch 1"
    print(f"test loss {loss:.5f} ({config.test_size:,} images of {config.dataset}; EMA weights of {best})")


def print_bits(config, bits, images, terms):
    """Print a `likelihood.BitsPerDim` of so many images and terms."""
    given = " given the label" if config.use_conditional_generation else ""
    print(f"bits per dimension{given} {bits.total:.4f} +- {bits.standard_error:.4f}: prior {bits.prior:.4f}, KL terms "
          f"{bits.kl:.4f}, decoder {bits.decoder:.4f} ({images:,} images, {terms} of {config.num_timesteps} terms)")


def print_left_out(names):
    """Print which files of a folder were not read."""
    if names:
        print(f"not read, since they are no PNGs: {', '.join(names[:10])}"
              + (f" and {len(names) - 10} more" if len(names) > 10 else ""))


@on_main
def print_saved(progress, asked):
    """Print that a run was saved, if it was asked to and goes on."""
    if asked == "save":
        print(f"\nsaved at step {progress['step']:,}", file=sys.stderr)


def print_stopped(config, progress):
    """Print where a run stopped, and how to continue it."""
    print(f"stopped at step {progress['step']:,}; everything is saved. To continue: "
          f"{shell_command('--resume', save_dir=config.save_dir)}")


def shell_command(*flags, save_dir):
    """`python train_eval.py FLAGS` for the folder of a run, ready to paste into a shell."""
    folder = [] if save_dir == "checkpoints" else [f"--save_dir={save_dir}"]
    return shlex.join(["python", "train_eval.py", *flags, *folder])


def tensorboard_command(save_dir):
    """The command that shows a run, ready to paste. Without the last flag TensorBoard shows only ten grids."""
    folder = Path(save_dir) / "tensorboard_logs"
    return shlex.join(["tensorboard", f"--logdir={folder}", "--samples_per_plugin", "images=1000"])


@contextmanager
def shown_at_both_ends(warning):
    """Print a warning before the block and, in case it scrolled away, after it; None prints nothing."""
    warning = warning if is_main() else None
    if warning:
        print(warning, file=sys.stderr)
    try:
        yield
    finally:
        if warning:
            print(warning, file=sys.stderr)
