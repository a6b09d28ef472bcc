"""Films: how many frames, in which order, how large."""

import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tiny import full_disk, same, snapshot, tiny_ddpm

from support import console, pictures
from support.pictures import write_denoising, write_grid, write_training_film


def frames(path):
    """A GIF's frames from 0 to 1, (frames, height, width), and their times in milliseconds."""
    with Image.open(path) as film:
        assert film.info["loop"] == 0
        shown = [(grey(frame), frame.info["duration"]) for frame in ImageSequence.Iterator(film)]
    return torch.stack([frame for frame, _ in shown]), [time for _, time in shown]


def grey(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=float)).mean(dim=2) / 255


@pytest.mark.parametrize("sampler, steps, every", [("sde-dpm++", 6, 1), ("ddpm", 40, 2)])
def test_noise_becomes_the_final_grid(tmp_path, sampler, steps, every):
    ddpm, sequence = tiny_ddpm(channels=3, num_timesteps=100, prediction="x0"), []
    noise = torch.randn(12, 3, 8, 8)
    walk = ddpm.walk(noise, ddpm.timesteps(steps), None, sampler)
    spied = ((x0, sequence.append(xt) or xt) for x0, xt in walk)
    result, seen = pictures.watch(noise, spied, steps)
    assert torch.equal(result, sequence[-1])
    expected = [noise, *sequence[every - 1 :: every]]
    assert same(seen, [x.mean(dim=1, keepdim=True) for x in expected])
    write_denoising(seen, tmp_path / "denoising.gif")
    write_grid(result, tmp_path / "final.png")
    (shown, times), final = frames(tmp_path / "denoising.gif"), Image.open(tmp_path / "final.png")
    assert times == [min(500, 4000 // len(seen) // 10 * 10)] * (len(seen) - 1) + [2000]
    assert (shown[-1] - grey(final)).abs().max() < 1 / 63 and len(shown) == len(seen)


@pytest.mark.parametrize("limit, width, greys", [(150, 100, 2), (60, 50, 16), (10, 25, 2)])
def test_a_large_film_loses_greys_then_pixels(tmp_path, monkeypatch, limit, width, greys):
    monkeypatch.setattr(pictures, "LEVELS", (16, 2))  # 182, 82, 55, 25, 14 and 8 kB
    noise = [grey(Image.effect_noise((100, 100), 200)) for _ in range(32)]
    pictures._write_film(noise, tmp_path / "film.gif", 1000 * limit)
    shown, _ = frames(tmp_path / "film.gif")
    assert shown.shape == (32, width, width) and len(shown[0].unique()) == greys


def test_the_grids_of_a_run_in_order(tmp_path):
    write_training_film(tmp_path)
    assert not list(tmp_path.iterdir())  # no grid, no film
    last = 10_000_000  # its name is longer, and sorts before those of other steps
    for number, step in enumerate([1, *range(5000, 5000 * 49, 5000), last]):
        images = torch.full((20, 3, 8, 8), number / 25 - 1)
        images[1 + number % 19] = 1.0  # no two frames are equal: Pillow would make one of them
        write_grid(images, tmp_path / f"step_{step:07d}.png")
    write_grid(torch.zeros(10, 3, 8, 8), tmp_path / "step_0000002.png")  # of fewer samples
    write_training_film(tmp_path)
    shown, times = frames(tmp_path / "training.gif")
    assert shown.shape == (pictures.FRAMES, 22, 102) and times == [125 // 10 * 10] * 31 + [2000]
    assert (shown[-1] - grey(Image.open(tmp_path / f"step_{last}.png"))).abs().max() < 1 / 63
    assert (shown[0] - grey(Image.open(tmp_path / "step_0000001.png"))).abs().max() < 1 / 15
    assert (shown[:, 5, 5].diff() >= 0).all() and shown[15, 5, 5] == pytest.approx(0.5, abs=0.05)
    Image.new("L", (700, 1400)).save(tmp_path / "step_99999999.png")
    write_training_film(tmp_path)
    assert frames(tmp_path / "training.gif")[0].shape == (1, 350, 350)


def test_the_loss_curve_needs_no_look(tmp_path, capsys):
    curves = {f"{name}_curve": [] for name in ("fixed", "test", "frechet")}
    config = types.SimpleNamespace(save_dir=tmp_path, target_references=0)
    pictures.write_training(config, curves | {"train_curve": [[1, 0.5], [2, 0.4]]})
    assert capsys.readouterr().err == ""
    assert Image.open(tmp_path / "loss_curve.png").size == (1440, 480)


def test_pictures_that_cannot_be_written_are_one_warning(tmp_path, capsys, monkeypatch):
    write_grid(torch.rand(100, 3, 32, 32), path := tmp_path / "step_0000001.png")
    files, noise = snapshot(tmp_path), [torch.randn(10, 1, 32, 32)] * 2
    monkeypatch.setattr(console, "WARNED", set())
    with full_disk(1_000):
        write_grid(torch.rand(100, 3, 32, 32), path)
        write_training_film(tmp_path)
        write_denoising(noise, tmp_path / "denoising.gif")
    assert capsys.readouterr().err.count("writing a picture failed (OSError") == 1
    assert snapshot(tmp_path) == files
    path.write_bytes(b"damaged")
    write_training_film(tmp_path)
    assert "writing a picture failed (UnidentifiedImageError" in capsys.readouterr().err
