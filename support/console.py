"""What a terminal shows: the first and the last screen of a run, its progress bar, commands to paste."""

import os
import shlex
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from support.machine import describe_precision, is_main, on_main, warning_if_it_fails


def at_a_terminal():
    """Whether a person sees a bar move: this is the main process, and its errors go to a terminal."""
    return is_main() and sys.stderr is not None and sys.stderr.isatty()


def progress_bar(**options):
    """tqdm's bar at a terminal. Elsewhere, in a file or under CI, a line every half minute."""
    from tqdm import tqdm

    if at_a_terminal():
        return tqdm(**options, smoothing=0.05, mininterval=0.5, dynamic_ncols=True)
    return tqdm(
        **options,
        smoothing=0.05,
        mininterval=30,
        maxinterval=30,
        file=_Lines(),
        bar_format=(
            "{desc}: {n_fmt} of {total_fmt} images, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"
        ),
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


def print_start(run):
    """One screen: the data, the model, the machine, where things go and how to watch."""
    config, folder = run.config, Path(run.config.save_dir)
    kind = (
        "with labels"
        if config.use_conditional_generation
        else f"with {config.num_clusters} clusters in place of labels"
        if config.num_clusters
        else "without labels"
    )
    threads = f", {torch.get_num_threads()} threads" if config.device == "cpu" else ""
    print(
        f"data:   {config.dataset}, {len(run.train_images):,} images to train, {len(run.test_images):,} to test\n"
        f"model:  {sum(p.numel() for p in run.ddpm.parameters()):,} parameters, {kind}, predicts "
        f"{config.prediction}\n"
        f"device: {config.device}{threads}; {describe_precision(config)}\n"
        f"run:    {run.total_steps:,} steps of {config.batch_size} images, {run.progress['step']:,} done; PID "
        f"{os.getpid()}; Ctrl-C saves and stops\n"
        f"files:  {folder / 'best_model.pt'}, {folder / 'last.pt'}, {folder / 'samples'}\n"
        f"watch:  {tensorboard_command(config.save_dir)}"
    )


def print_unmeasured(least):
    """Print that the grids of a run cannot be measured."""
    print(
        f"grids are not measured during training: the Fréchet distance needs more than {least} samples "
        "(num_samples), training images and test images"
    )


def print_end(run, loss, info, grid, y):
    """What a run has reached, and what to do next; `grid` is the final one, and `y` its labels or None."""
    config, progress = run.config, run.progress
    print_test_loss(config, loss, info)
    if run.meter and y is not None:
        with warning_if_it_fails("measuring samples"):
            print(
                f"final grid: {run.meter.count_read(grid, y)} of {len(y)} read as the digit asked for"
            )
    if progress["frechet_curve"]:
        print(
            f"last grid during training: Fréchet distance {progress['frechet_curve'][-1][1]:.3f} "
            f"({config.num_samples} samples in {config.preview_steps} steps; compares only with such grids)"
        )
    again = "--resume", "--epochs", str(2 * config.epochs)
    print(
        f"next:   {shell_command('--evaluate', save_dir=config.save_dir)}   (Fréchet distance, precision and recall "
        f"of {config.eval_samples:,} samples in {config.sample_steps} steps)\n"
        f"        {shell_command(*again, save_dir=config.save_dir)}   (train on, as long again)\n"
        f"        {tensorboard_command(config.save_dir)}\n"
        "        explore.ipynb, in Jupyter or VS Code, takes the model apart in pictures\n"
        f"training steps took {run.state['stats'].seconds / 60:.2f} minutes since this start"
    )


def print_test_loss(config, loss, info):
    """Print the test loss. Some of these images have chosen the weights, so it is slightly too low."""
    print(
        f"test loss {loss:.5f} ({config.test_size:,} images of {config.dataset}; EMA weights of step "
        f"{info['step']:,})"
    )


def print_bits(config, bits, images, terms):
    """Print a `likelihood.BitsPerDim` of so many images and terms."""
    given = " given the label" if config.use_conditional_generation else ""
    print(
        f"bits per dimension{given} {bits.total:.4f} +- {bits.standard_error:.4f}: prior {bits.prior:.4f}, KL terms "
        f"{bits.kl:.4f}, decoder {bits.decoder:.4f} ({images:,} images, {terms} of {config.num_timesteps} terms)"
    )


def print_left_out(names):
    """Print which files of a folder were not read."""
    if names:
        print(
            f"left out, since they are not PNGs: {', '.join(names[:10])}"
            + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        )


@on_main
def print_saved(progress, asked):
    """Print that a run was saved, if it was asked to and goes on."""
    if asked == "save":
        print(f"\nsaved at step {progress['step']:,}", file=sys.stderr)


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
