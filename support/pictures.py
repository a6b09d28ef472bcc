"""Pictures that a run leaves: grids, the loss curve, films of denoising and of training."""

import io
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from support.console import warning_if_it_fails
from support.files import make_folder, unused, whole_file

COLUMNS, ROWS = 10, 10  # of a film: images in a row; rows
MOST_PIXELS, FRAMES, LAST_TIME = 400, 32, 2000  # width and height; frames; ms of the last frame
LIMIT = 1_000_000  # largest size of a film, in bytes
# levels of grey, tried in turn until a film fits; those of the last frame
LEVELS, LAST_LEVELS = (16, 8, 7, 6, 5, 4, 3, 2), 64


def write_grid(images, path, events=None, tag=None, step=None):
    """Images in [-1, 1], (N, C, H, W), as a PNG with ten columns, and in an `EventLog`."""
    from torchvision.utils import make_grid, save_image  # here, since it takes seconds

    grid = make_grid((images.float().cpu() + 1) / 2, nrow=COLUMNS)
    with warning_if_it_fails("writing a picture"), whole_file(path) as partial:
        save_image(grid, partial, format="png")
    if events is not None:
        events.add("image", tag, grid.clamp(0, 1), step)


def write_files(config, images, y):
    """Images, uint8, (N, C, H, W), as PNGs with their number and label, and a grid of some."""
    folder = make_folder(unused(Path(config.save_dir) / "samples" / "drawn"))
    for k, image in enumerate(images.cpu()):
        name = f"{k:05}.png" if y is None else f"{k:05}_{y[k]}.png"
        grey_or_rgb = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(grey_or_rgb.numpy()).save(folder / name)
    write_grid(images[:100] / 127.5 - 1, grid := unused(f"{folder}.png"))
    print(f"{len(images)} images: {folder}   the first of them: {grid}")


def write_training(config, progress):
    """What training did: loss_curve.png, and samples/training.gif of the grids."""
    with warning_if_it_fails("writing a picture"):
        plot_losses(config, progress, Path(config.save_dir) / "loss_curve.png")
    write_training_film(Path(config.save_dir) / "samples")


def plot_losses(config, progress, path):
    """Three charts over the steps: what training minimises, losses of fixed images, distance."""
    averaged = " (averaged targets)" if config.target_references else ""
    fixed = {"train": progress["fixed_curve"], "test": progress["test_curve"]}
    charts = {
        f"loss of batches{averaged}": {"train": progress["train_curve"]},
        "loss of fixed images": fixed,
        "Fréchet distance of the grids": {"samples": progress["frechet_curve"]},
    }
    figure = Figure(figsize=(12, 4), layout="constrained")  # without pyplot: no backend is set
    for axes, (title, curves) in zip(figure.subplots(1, 3), charts.items()):
        for label, curve in curves.items():
            if curve:
                axes.plot(*zip(*curve), label=label, marker="" if len(curve) > 50 else ".")
        axes.set(xlabel="step", yscale="log", title=title)
        axes.grid(True, which="both", alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def watch(noise, walk, steps):
    """Run a `DDPM.walk` of so many steps to its end, with a progress bar at a terminal.

    Returns:
        The images, (N, C, H, W), and for `write_denoising` the noise and at most FRAMES of the x_t,
        of the first images: grey, (at most 100, 1, H, W).
    """
    frames, bar = [noise], tqdm(walk, total=steps, disable=None, leave=False)
    for left, (_, xt) in zip(reversed(range(steps)), bar):
        if left % math.ceil(steps / FRAMES) == 0:
            frames.append(xt)
    return xt, [x[: COLUMNS * ROWS].mean(dim=1, keepdim=True).cpu() for x in frames]


def write_denoising(frames, path, limit=LIMIT):
    """A GIF of noise that becomes images, of at most `limit` bytes; `frames` are `watch`'s."""
    from torchvision.utils import make_grid

    with warning_if_it_fails("writing a picture"):
        grids = [make_grid((x + 1) / 2, nrow=COLUMNS)[0].clamp(0, 1) for x in frames]
        _write_film(grids, path, limit)


def write_training_film(folder):
    """training.gif from at most FRAMES of the grids step_*.png of a folder, of at most LIMIT bytes.

    Grids of another size than the last are left out; without a grid there is no film.
    """
    with warning_if_it_fails("writing a picture"):
        paths = [*Path(folder).glob("step_*.png")]
        paths.sort(key=lambda path: (len(path.name), path.name))
        sizes = [_size(path) for path in paths]
        paths = [path for path, size in zip(paths, sizes) if size == sizes[-1]]
        if paths:
            picked = torch.linspace(0, len(paths) - 1, min(FRAMES, len(paths))).round().long()
            grids = [torch.from_numpy(np.array(Image.open(paths[i]).convert("L"))) for i in picked]
            frames = [grid[: grid.shape[1]] / 255 for grid in grids]
            _write_film(frames, Path(folder) / "training.gif", LIMIT)


def _size(path):
    """Width and height of a picture."""
    with Image.open(path) as picture:
        return picture.size


def _write_film(frames, path, limit):
    """Frames, from 0 to 1, (height, width), as a GIF of at most `limit` bytes, if it can be."""
    shrink = math.ceil(max(frames[0].shape) / MOST_PIXELS)
    times = [min(500, 4000 // len(frames))] * (len(frames) - 1) + [LAST_TIME]
    for size, levels in itertools.product((shrink, 2 * shrink, 4 * shrink), LEVELS):
        pictures = []
        for frame, most in zip(frames, [levels - 1] * (len(frames) - 1) + [LAST_LEVELS - 1]):
            frame = torch.nn.functional.avg_pool2d(frame[None], size)[0]
            picture = Image.fromarray((frame * most).round().byte().numpy(), "P")
            grey = [round(255 * level / most) for level in range(most + 1)]
            picture.putpalette([level for level in grey for _ in range(3)])
            pictures.append(picture)
        options = dict(save_all=True, append_images=pictures[1:], duration=times, loop=0)
        pictures[0].save(buffer := io.BytesIO(), "GIF", **options)
        if buffer.tell() <= limit:
            break
    with whole_file(path) as partial:
        Path(partial).write_bytes(buffer.getvalue())
