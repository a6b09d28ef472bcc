"""Pictures that a run leaves: grids, the loss curve, and two films: noise becomes digits, a network learns to write.

    python -m support.pictures [FOLDER]

makes those of the README from best_model.pt of a run's folder: images/denoising.gif and images/process.png.
"""

import argparse
import io
import math
import sys
from pathlib import Path

import torch

from support.checks import one_line
from support.files import make_folder, whole_file
from support.machine import on_main, warning_if_it_fails

FRAMES = 32  # of a film, at most
FRAME_TIME, LAST_TIME = 100, 2000  # how long a frame and the last one are shown, in milliseconds
LEVELS = (16, 12, 8, 6, 5, 4, 3, 2)  # of grey, tried in turn until a film is small enough: noise compresses badly
LAST_LEVELS = 64  # of grey in the frame that is held
LIMIT, README_LIMIT = 1_000_000, 600_000  # size of a film, in bytes
COLUMNS, ROWS, README_ROWS, MOST_PIXELS = 10, 10, 6, 400  # of a film: images in a row; rows; width and height
STRIP_ROWS, STRIP_COLUMNS = 3, 9  # of each half of the strip


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
def plot_losses(config, progress, path):
    """Training and test loss over the steps. Averaged targets make the training loss lower, so its label says so."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    train_label = "train, averaged targets" if config.target_references else "train"
    for name, style in (("train", {"label": train_label, "linewidth": 1}), ("test", {"label": "test", "marker": "o"})):
        if progress[f"{name}_curve"]:
            axes.plot(*zip(*progress[f"{name}_curve"]), **style)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="DDPM training")
    axes.grid(True, which="both", alpha=0.3)
    if axes.lines:
        axes.legend()
    with warning_if_it_fails("writing a picture"), whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)


def sequence_options(steps):
    """What `DDPM.sample` should be told, so that a film of so many steps takes the memory of at most 2 * FRAMES."""
    return {"return_sequence": "xt", "return_every": max(1, steps // FRAMES)}


@on_main
def write_denoising(ddpm, sequence, steps, path, limit=LIMIT):
    """A GIF of noise that becomes images; the last frame is the result, and is held.

    Frames are evenly spaced in the angle arccos(sqrt(alpha_bar)): most of them where the images emerge. Between two
    steps they are drawn from q(x_u | x_s, x_t), so that the film is smooth even if the sampler took few steps.

    Args:
        ddpm: the `GaussianProcess` of the sampler.
        sequence: (K, N, C, H, W) of `ddpm.sample(N, steps=steps, **sequence_options(steps))`.
        steps: sampling steps.
        path: file to write. A failure is only a warning.
        limit: largest size in bytes.
    """
    with warning_if_it_fails("writing a picture"):
        times = [-1, *ddpm.timesteps(steps)[:0:-1]][::sequence_options(steps)["return_every"]][::-1]
        alpha_bar = ddpm.alpha_bar(torch.tensor(times, device=ddpm.device)).flatten().tolist()
        sequence = sequence[:, :COLUMNS * ROWS].float().mean(dim=2, keepdim=True).cpu()  # grey
        _write_film([_grid(x) for x in _film(sequence, alpha_bar, ddpm.alphas_cumprod[-1].item())], path, limit)


@on_main
def write_training(folder, limit=LIMIT):
    """The grids step_*.png of a folder, which are from the same noise, as its training.gif: at most FRAMES of them.

    Grids of another size than the last are left out; without any grid nothing is written. A failure is only a warning.
    """
    from torchvision.io import ImageReadMode, decode_image

    with warning_if_it_fails("writing a picture"):
        paths = sorted(Path(folder).glob("step_*.png"), key=lambda path: (len(path.name), path.name))
        grids = [decode_image(str(path), ImageReadMode.GRAY)[0] for path in paths]
        grids = [grid[:grid.shape[1]] / 255 for grid in grids if grid.shape == grids[-1].shape]  # as high as wide
        picked = torch.linspace(0, len(grids) - 1, min(FRAMES, len(grids))).round().long().tolist()
        if grids:
            _write_film([grids[i] for i in picked], Path(folder) / "training.gif", limit)


def film_strip(ddpm, x0, sequence, times, path):
    """The forward process, q(x_t | x_0) of real images, above the reverse process, as one PNG.

    Args:
        ddpm: the `GaussianProcess`.
        x0: real images in [-1, 1], (N, C, H, W).
        sequence: samples on their way at each of `times`, (len(times), M, C, H, W).
        times: timesteps, falling to -1.
        path: file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image
    from torchvision.utils import make_grid

    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    noisy = [ddpm.q_sample(x0, torch.full((len(x0),), t), eps) for t in times[::-1]]
    strips = (("Forward: noise is added to real digits, $q(x_t\\,|\\,x_0)$", noisy, times[::-1]),
              ("Reverse: the network removes noise, $p_\\theta(x_s\\,|\\,x_t)$", sequence, times))
    figure, axes = plt.subplots(2, figsize=(7.2, 5.2), layout="constrained")
    for axis, (title, columns, at) in zip(axes, strips):
        cells = torch.stack([x.mean(dim=1) for x in columns], dim=1).clamp(-1, 1).flatten(0, 1)[:, None]
        picture = make_grid(cells, nrow=len(at), padding=2, pad_value=1)[0]
        axis.imshow(picture, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        width = picture.shape[1] / len(at)
        axis.set_xticks([width * (i + 0.5) for i in range(len(at))], [f"t = {t}" if t >= 0 else "image" for t in at])
        axis.set(yticks=[], title=title)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    plt.close(figure)
    with whole_file(path) as partial:
        Image.open(buffer).convert("L").quantize(16).save(partial, format="png", optimize=True)


def write_readme(ddpm, x0, folder="images"):
    """The film and the strip of the README, from a model and a few real images, (N, C, H, W), in [-1, 1]."""
    digits = ddpm.num_classes == 10  # classes, not clusters
    steps, n, folder = ddpm.sample_steps, COLUMNS * README_ROWS, make_folder(folder)
    sequence = ddpm.sample(n, torch.arange(n) % 10 if digits else None, steps=steps, seed=0, **sequence_options(steps))
    write_denoising(ddpm, sequence, steps, folder / "denoising.gif", README_LIMIT)
    steps, n = min(100, ddpm.num_timesteps), len(x0)
    sequence = ddpm.sample(n, torch.arange(n) if digits else None, steps=steps, seed=0, return_sequence="xt").cpu()
    times = torch.tensor([*ddpm.timesteps(steps)[1:], -1])
    angles = ddpm.to("cpu").alpha_bar(times).flatten().sqrt().acos()
    picked = [(angles - angle).abs().argmin().item() for angle in torch.linspace(angles[0], 0, STRIP_COLUMNS)]
    film_strip(ddpm, x0.cpu(), [sequence[i] for i in picked], times[picked].tolist(), folder / "process.png")


def main(argv=None):
    """The command. A mistake in what it is given is one line and exit status 2."""
    from dataprocess import load_data
    from diffusion import DDPM

    parser = argparse.ArgumentParser(prog="python -m support.pictures", description="Make the pictures of the README.")
    parser.add_argument("folder", nargs="?", default="checkpoints", help="a run's folder, with its best_model.pt")
    parser.add_argument("--data_dir", default="data", help="folder of the data")
    args = parser.parse_args(argv)
    try:
        ddpm = DDPM.load(Path(args.folder) / "best_model.pt")
        dataset = (ddpm.info.get("config") or {}).get("dataset", "auto")
        real = load_data(dataset, args.data_dir, image_size=ddpm.image_size, channels=ddpm.channels, augment=False)[1]
        write_readme(ddpm, real.batch(slice(STRIP_ROWS))[0])
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _film(sequence, alpha_bar, alpha_bar_T):
    """The frames of `write_denoising`, from images, (K, N, 1, H, W), and alpha_bar of each, and of the noise."""
    generator = torch.Generator().manual_seed(0)
    angles, frames, after, now = [math.acos(math.sqrt(a)) for a in alpha_bar], [], 0, 0.0
    for angle in torch.linspace(math.acos(math.sqrt(alpha_bar_T)), 0, FRAMES, dtype=torch.float64).tolist():
        while angles[after] > angle:
            x, now, after = sequence[after], alpha_bar[after], after + 1
        noise = torch.randn(sequence[0].shape, generator=generator)
        goal = math.cos(angle) ** 2
        from_s, to_t = goal / alpha_bar[after], now / goal  # alpha_bar of u seen from s, and of t seen from u
        if not frames:
            x = math.sqrt(from_s) * sequence[0] + math.sqrt(1 - from_s) * noise
        else:  # DDPM eq. 7, with x_s in place of x_0
            total = 1 - from_s * to_t
            x = (math.sqrt(from_s) * (1 - to_t) / total * sequence[after] + math.sqrt(to_t) * (1 - from_s) / total * x
                 + math.sqrt(max(0.0, (1 - from_s) * (1 - to_t) / total)) * noise)
        now = goal
        frames.append(x)
    return frames


def _grid(images):
    """Images in [-1, 1], (N, 1, H, W), as `write_grid` lays them out: values from 0 to 1, (height, width)."""
    from torchvision.utils import make_grid

    return make_grid((images + 1) / 2, nrow=COLUMNS)[0].clamp(0, 1)


def _write_film(frames, path, limit):
    """Grey frames from 0 to 1, (height, width), as a GIF of at most `limit` bytes, with as many levels as fit."""
    from PIL import Image

    factor = math.ceil(max(frames[0].shape) / MOST_PIXELS)
    if factor > 1:
        frames = [torch.nn.functional.avg_pool2d(frame[None], factor)[0] for frame in frames]
    times = [max(FRAME_TIME, min(500, 4000 // len(frames)))] * (len(frames) - 1) + [LAST_TIME]
    for levels in LEVELS:
        pictures = []
        for i, frame in enumerate(frames):
            most = (levels if i < len(frames) - 1 else LAST_LEVELS) - 1
            pictures.append(Image.fromarray((frame * most).round().byte().numpy(), "P"))
            pictures[-1].putpalette([round(255 * level / most) for level in range(most + 1) for _ in range(3)])
        buffer = io.BytesIO()
        pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
        if buffer.tell() <= limit:
            break
    with whole_file(path) as partial:
        Path(partial).write_bytes(buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
