"""Pictures that a run leaves: grids, the loss curve and two films: noise becomes digits, and a network learns to write.

`python -m support.pictures [FOLDER]` makes the README's images/denoising.gif and process.png from a run's folder.
"""

import argparse
import io
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.checks import one_line
from support.files import make_folder, whole_file
from support.machine import on_main, warning_if_it_fails

COLUMNS, ROWS, README_ROWS, MOST_PIXELS = (
    10,
    10,
    6,
    400,
)  # of a film: images in a row; rows; width and height
FRAMES, LAST_TIME = (
    32,
    2000,
)  # of a film: frames, at most; how long the last is held, in milliseconds
SEED = 987_654_321  # of the noise between two steps; another than that of a run
LIMIT, README_LIMIT = 1_000_000, 600_000  # largest size of a film, in bytes
LEVELS, LAST_LEVELS = (
    (16, 8, 7, 6, 5, 4, 3, 2),
    64,
)  # of grey, tried in turn until a film fits; of the last frame
STRIP_ROWS, STRIP_COLUMNS, STRIP_STEPS = (
    3,
    9,
    100,
)  # of each half of the strip; sampling steps of the lower one


@on_main
def write_grid(images, path, events=None, tag=None, step=None):
    """Images in [-1, 1], (N, C, H, W), as a PNG with ten columns and, given an `EventLog`, in TensorBoard."""
    from torchvision.utils import make_grid, save_image

    grid = make_grid((images.float().cpu() + 1) / 2, nrow=10)
    with warning_if_it_fails("writing a picture"), whole_file(path) as partial:
        save_image(grid, partial, format="png")
    if events is not None:
        events.add("image", tag, grid.clamp(0, 1), step)


@on_main
def write_training(config, progress):
    """What training did: loss_curve.png, and samples/training.gif of the grids. A failure is only a warning."""
    with warning_if_it_fails("writing a picture"):
        plot_losses(config, progress, Path(config.save_dir) / "loss_curve.png")
    write_training_film(Path(config.save_dir) / "samples")


def plot_losses(config, progress, path):
    """Three charts over the steps: what training minimises, the loss of fixed images, the Fréchet distance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    averaged = " (averaged targets)" if config.target_references else ""
    charts = {
        f"loss of batches{averaged}": {"train": progress["train_curve"]},
        "loss of fixed images": {"train": progress["fixed_curve"], "test": progress["test_curve"]},
        "Fréchet distance of the grids": {"samples": progress["frechet_curve"]},
    }
    figure, row = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axes, (title, curves) in zip(row, charts.items()):
        for label, curve in curves.items():
            if curve:
                axes.plot(*zip(*curve), label=label, marker="" if len(curve) > 50 else ".")
        axes.set(xlabel="step", yscale="log", title=title)
        axes.grid(True, which="both", alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    with warning_if_it_fails("writing a picture"), whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)


def sequence_options(steps):
    """Options of `DDPM.sample` that make it return what `write_denoising` needs: x_t after at most FRAMES steps."""
    return {"return_sequence": "xt", "return_every": math.ceil(steps / FRAMES)}


@on_main
def write_denoising(ddpm, sequence, steps, path):
    """A GIF of noise that becomes images, of at most LIMIT bytes. A failure is only a warning.

    Args:
        ddpm: the `GaussianProcess` that the images were sampled in.
        sequence: what `ddpm.sample(N, steps=steps, **sequence_options(steps))` gave, (K, N, C, H, W).
        steps: its sampling steps.
        path: file to write.
    """
    with warning_if_it_fails("writing a picture"):
        _write_film(_denoising(ddpm, sequence[:, : COLUMNS * ROWS], steps), path, LIMIT)


def write_training_film(folder):
    """training.gif from the grids step_*.png of a folder, at most FRAMES of them, of at most LIMIT bytes.

    Grids of another size than the last are left out; without a grid there is no film. A failure is only a warning.
    """
    with warning_if_it_fails("writing a picture"):
        paths = sorted(
            Path(folder).glob("step_*.png"), key=lambda path: (len(path.name), path.name)
        )
        sizes = [_size(path) for path in paths]
        paths = [path for path, size in zip(paths, sizes) if size == sizes[-1]]
        if paths:
            picked = (
                torch.linspace(0, len(paths) - 1, min(FRAMES, len(paths))).round().long().tolist()
            )
            grids = [torch.from_numpy(np.array(Image.open(paths[i]).convert("L"))) for i in picked]
            _write_film(
                [grid[: grid.shape[1]] / 255 for grid in grids],
                Path(folder) / "training.gif",
                LIMIT,
            )


def _size(path):
    """Width and height of a picture."""
    with Image.open(path) as picture:
        return picture.size


def film_strip(ddpm, x0, y, path):
    """A PNG: how noise is added to real images x0, (N, C, H, W), in [-1, 1], and how a `DDPM` removes it.

    `y` are the labels of its N samples, (N,), or None. Raises OSError if the PNG cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from torchvision.utils import make_grid

    steps = min(STRIP_STEPS, ddpm.num_timesteps)
    sequence = ddpm.sample(len(x0), y, steps=steps, seed=0, return_sequence="xt")
    times = torch.tensor([*ddpm.timesteps(steps)[1:], -1], device=ddpm.device)
    angles = ddpm.alpha_bar(times).flatten().sqrt().acos()
    picked = [
        (angles - angle).abs().argmin().item()
        for angle in torch.linspace(angles[0], 0, STRIP_COLUMNS)
    ]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(ddpm.device)
    forward = torch.stack(
        [ddpm.q_sample(x0.to(ddpm.device), times[i].expand(len(x0)), eps) for i in picked]
    )
    figure, axes = plt.subplots(2, figsize=(7.2, 5.2), layout="constrained")
    for axis, title, images, at in (
        (axes[0], "Forward: noise is added to real digits", forward.flip(0), picked[::-1]),
        (axes[1], "Reverse: the network removes noise", sequence[picked], picked),
    ):
        images = (
            images.transpose(0, 1).mean(dim=2).flatten(0, 1)[:, None].clamp(-1, 1).cpu()
        )  # a row for each image
        picture = make_grid(images, nrow=len(at), pad_value=1)[0]
        axis.imshow(picture, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_xticks(
            [picture.shape[1] / len(at) * (i + 0.5) for i in range(len(at))],
            ["image" if (t := times[i].item()) < 0 else f"t = {t}" for i in at],
        )
        axis.set(yticks=[], title=title, frame_on=False)
        axis.tick_params(length=0)
    figure.savefig(buffer := io.BytesIO(), dpi=160, format="png")
    plt.close(figure)
    with whole_file(path) as partial:
        Image.open(buffer).convert("L").quantize(16).save(partial, format="png", optimize=True)


def main(argv=None):
    """The command that makes the README's pictures. Returns the exit status: 2, after one line, if it cannot."""
    from dataprocess import load_data
    from diffusion import DDPM

    parser = argparse.ArgumentParser(
        prog="python -m support.pictures", description="Make the pictures of the README."
    )
    parser.add_argument(
        "folder", nargs="?", default="checkpoints", help="folder of a run, with its best_model.pt"
    )
    parser.add_argument("--data_dir", help="folder of the data (default: that of the run)")
    args = parser.parse_args(argv)
    try:
        ddpm = DDPM.load(Path(args.folder) / "best_model.pt")
        config, steps, n = ddpm.info.get("config") or {}, ddpm.sample_steps, COLUMNS * README_ROWS
        data_dir = args.data_dir or config.get("data_dir", "data")
        real = load_data(
            config.get("dataset", "auto"),
            data_dir,
            image_size=ddpm.image_size,
            channels=ddpm.channels,
            augment=False,
        )[1]
        (x0, y), digits = real.batch(slice(STRIP_ROWS)), config.get("use_conditional_generation")
        sequence = ddpm.sample(
            n,
            torch.arange(n) % 10 if digits else None,
            steps=steps,
            seed=0,
            progress=True,
            **sequence_options(steps),
        )
        _write_film(
            _denoising(ddpm, sequence, steps), make_folder("images") / "denoising.gif", README_LIMIT
        )
        film_strip(ddpm, x0, y if digits else None, Path("images") / "process.png")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _denoising(ddpm, sequence, steps):
    """The frames of noise that becomes images, as grey grids. The first is noise, the last the images themselves.

    They are evenly spaced in the angle arccos(sqrt(alpha_bar)), so that most show how the images emerge. Between two
    steps they are drawn from q(x_u | x_s, x_t), which makes a film of few steps smooth; the noise, from q(x_T | x_s).
    """
    from torchvision.utils import make_grid

    times = [-1, *ddpm.timesteps(steps)[:0:-1]][:: sequence_options(steps)["return_every"]][::-1]
    alpha_bar = ddpm.alpha_bar(torch.tensor(times, device=ddpm.device)).flatten().tolist()
    sequence = sequence.mean(dim=2, keepdim=True).cpu()
    angles = [math.acos(math.sqrt(value)) for value in (ddpm.alphas_cumprod[-1].item(), *alpha_bar)]
    generator, frames, after, before, x = torch.Generator().manual_seed(SEED), [], 0, 0.0, 0.0
    for angle in torch.linspace(angles[0], 0, FRAMES, dtype=torch.float64).tolist():
        while angles[after + 1] > angle:
            x, before, after = sequence[after], alpha_bar[after], after + 1
        now = math.cos(angle) ** 2
        a, b = (
            now / alpha_bar[after],
            before / now,
        )  # alpha_bar of u seen from s, and of t seen from u
        noise = torch.randn(sequence[0].shape, generator=generator)
        x = (
            math.sqrt(a) * (1 - b) / (1 - a * b) * sequence[after]
            + math.sqrt(b) * (1 - a) / (1 - a * b) * x
            + math.sqrt(max(0.0, (1 - a) * (1 - b) / (1 - a * b))) * noise
        )  # DDPM eq. 7, with x_s in place of x_0
        frames.append(make_grid((x + 1) / 2, nrow=COLUMNS)[0].clamp(0, 1))
        before = now
    return frames


def _write_film(frames, path, limit):
    """Frames, from 0 to 1, (height, width), as a GIF of at most `limit` bytes, if it can be, in many grey levels."""
    shrink = math.ceil(max(frames[0].shape) / MOST_PIXELS)
    times = [min(500, 4000 // len(frames))] * (len(frames) - 1) + [LAST_TIME]
    for size, levels in itertools.product((shrink, 2 * shrink, 4 * shrink), LEVELS):
        pictures = []
        for frame, most in zip(frames, [levels - 1] * (len(frames) - 1) + [LAST_LEVELS - 1]):
            frame = torch.nn.functional.avg_pool2d(frame[None], size)[0]
            pictures.append(Image.fromarray((frame * most).round().byte().numpy(), "P"))
            pictures[-1].putpalette(
                [round(255 * level / most) for level in range(most + 1) for _ in range(3)]
            )
        first, *others = pictures
        first.save(
            buffer := io.BytesIO(),
            "GIF",
            save_all=True,
            append_images=others,
            duration=times,
            loop=0,
        )
        if buffer.tell() <= limit:
            break
    with whole_file(path) as partial:
        Path(partial).write_bytes(buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
