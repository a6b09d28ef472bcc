"""What a terminal shows: first and last screen of a run, its bar, its measures, commands."""

import os
import shlex
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from support.files import one_line
from support.machine import describe_device, describe_precision

MEASURES = {  # of metrics.measure: the words of the table
    "frechet": "Fréchet distance to the test set",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "read as the label asked for",
    "confidence": "confidence of the classifier",
    "rarest_digit": "share of the rarest label",
    "commonest_digit": "share of the commonest label",
    "colour": "deviation from grey, in grey levels",
    "nearest": "to the nearest training image, in grey levels",
    "nearest_1st": "the same, first percentile",
    "copies": "share nearer than 99 % of test images",
}
WARNED = set()  # what `warning_if_it_fails` has printed


def at_a_terminal():
    """Whether a person sees a bar move."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(**options):
    """tqdm's bar at a terminal. Elsewhere, in a file or under CI, a line every half minute."""
    if at_a_terminal():
        return tqdm(**options, smoothing=0.05, mininterval=0.5, dynamic_ncols=True)
    line = "{desc}: {n_fmt} of {total_fmt} images, {elapsed} gone, {remaining} left, {rate_fmt}"
    return tqdm(
        **options,
        smoothing=0.05,
        mininterval=30,
        miniters=1,  # else tqdm's own thread prints one more after a look
        file=_Lines(),
        bar_format=line + "{postfix}",
    )


class _Lines:
    """A file for tqdm that makes each state of its bar a line of its own."""

    def write(self, text):
        """Write a state, without the characters that move the cursor."""
        if text.strip():
            with suppress(OSError):  # a log that cannot be written stops no run
                print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        """Lines are written at once."""


@contextmanager
def warning_if_it_fails(what, errors=Exception):
    """An error inside becomes a warning, the first time, and the run goes on after the block."""
    try:
        yield
    except errors as error:
        warning = f"{what} failed ({one_line(error)}); the run goes on without it"
        if warning not in WARNED:
            with suppress(OSError):  # the log may lie on the disk that is full
                print(f"\n{warning}", file=sys.stderr, flush=True)
        WARNED.add(warning)


def print_start(run):
    """One screen: the data, the model, the machine, where things go and how to watch."""
    config, folder = run.config, Path(run.config.save_dir)
    kind = "with labels" if config.use_conditional_generation else "without labels"
    if config.num_clusters:  # fewer than asked for where there are few images
        kind += f", told {len(run.ddpm.class_shares[0])} clusters"
    splits = run.train_images, run.test_images
    size = sum(split.images.nbytes for split in splits) / 1e9
    params = sum(p.numel() for p in run.ddpm.parameters())
    print(
        f"data:   {config.dataset}, {len(splits[0]):,} images to train, {len(splits[1]):,} to test,"
        f" {splits[0].num_labels or 'no'} labels, {size:.2f} GB\n"
        f"model:  {params:,} parameters, {kind}, predicts {config.prediction}\n"
        f"device: {describe_device(config)}; {describe_precision(config)}\n"
        f"run:    recipe {config.recipe}, {run.total_steps:,} steps of {config.batch_size} images, "
        f"{run.progress['step']:,} done; PID {os.getpid()}; Ctrl-C saves and stops\n"
        f"files:  {folder / 'best_model.pt'}, {folder / 'last.pt'}, {folder / 'samples'}\n"
        f"watch:  {tensorboard_command(config.save_dir, run.progress['log'])}"
    )


def print_end(run):
    """What a run has reached, and what to do next."""
    config, curve = run.config, run.progress["frechet_curve"]
    if curve:
        print(
            f"last grid during training: Fréchet distance {curve[-1][1]:.3f} "
            f"({config.num_samples} samples in {config.preview_steps} steps; compares only with "
            "such grids)"
        )
    longer = shell_command("--resume", "--epochs", str(2 * config.epochs), save_dir=config.save_dir)
    print(
        f"next:   {shell_command('--evaluate', save_dir=config.save_dir)}   (measures "
        f"{config.eval_samples:,} samples in {config.sample_steps} steps)\n"
        f"        {longer}   (train on, as long again)\n"
        f"        {tensorboard_command(config.save_dir, run.progress['log'])}\n"
        "        explore.ipynb, in Jupyter or VS Code, takes the model apart in pictures\n"
        f"training steps took {run.parts['stats'].seconds / 60:.2f} minutes since this start"
    )


def print_test_loss(config, loss, images, info):
    """Print the test loss of so many images, which have not chosen the weights."""
    print(
        f"test loss {loss:.5f} ({images:,} images of {config.dataset}; EMA weights of step "
        f"{info['step']:,})"
    )


def print_bits(config, bits, images, terms):
    """Print a `likelihood.BitsPerDim` of so many images and terms."""
    given = " given the label" if config.use_conditional_generation else ""
    print(
        f"bits per dimension{given} {bits.total:.4f} +- {bits.standard_error:.4f}: prior "
        f"{bits.prior:.4f}, KL terms {bits.kl:.4f}, decoder {bits.decoder:.4f} ({images:,} images, "
        f"{terms} of {config.num_timesteps} terms)"
    )


def print_measures(result, accuracy, dataset):
    """Print what `metrics.measure` gave; `accuracy` is None where there is no classifier."""
    result = dict(result)
    for suffix in ("", "_real"):
        if shares := result.get(f"digits{suffix}"):
            result[f"rarest_digit{suffix}"] = min(shares)
            result[f"commonest_digit{suffix}"] = max(shares)
    head = f"{result['samples']:,} samples, as many images of {dataset}:"
    print(f"{head:50}{'samples':>10}{'real':>10}")
    for name, text in MEASURES.items():
        if name in result:
            real = result.get(f"{name}_real")
            spread = result.get(f"{name}_real_std")
            beside = "" if real is None else f"{real:10.3f}"
            beside += "" if spread is None else f" +- {spread:.3f}"
            print(f"  {text:48}{result[name]:10.3f}{beside}")
    if accuracy is None:
        tools = "measure the PNGs of --sample N with torch-fidelity or clean-fid"
        return print(f"real: test images; no labels, so no classifier for more: {tools}")
    print(
        "real: as many training images, which the classifier learned from, the mean of several "
        "sets; nearest: test images\n"
        f"classifier: {result['classifier']}, {accuracy:.2%} test accuracy; compare only figures "
        "by the same"
    )
    missing = [MEASURES[name] for name in ("frechet", "precision", "recall") if name not in result]
    if missing:
        print(f"left out, since there are too few images: {', '.join(missing)}")


def print_left_out(names, why):
    """Print which files of a folder were not read, how many, and why."""
    if names:
        more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
        print(f"{len(names):,} left out, since {why}: {', '.join(names[:10])}{more}")


def print_stopped(config, progress):
    """Print where a run stopped, and how to continue it."""
    print(
        f"stopped at step {progress['step']:,}; everything is saved. To continue: "
        f"{shell_command('--resume', save_dir=config.save_dir)}"
    )


def shell_command(*flags, save_dir):
    """`python train_eval.py FLAGS` for the folder of a run, ready to paste into a shell."""
    folder = [] if save_dir == "checkpoints" else [f"--save_dir={save_dir}"]
    return shlex.join(["python", "train_eval.py", *flags, *folder])


def log_folder(save_dir, name):
    """The folder of the log of this name: that of a run moved to run_DATE stays above it."""
    here, above = (
        Path(folder, "tensorboard_logs", name) for folder in (save_dir, Path(save_dir, ".."))
    )
    return above if above.exists() and not here.exists() else here


def tensorboard_command(save_dir, name=""):
    """The command that shows a run, ready to paste; without its last flag, only ten grids."""
    folder = log_folder(save_dir, name).parent if name else Path(save_dir, "tensorboard_logs")
    return shlex.join(["tensorboard", f"--logdir={folder}", "--samples_per_plugin", "images=1000"])
