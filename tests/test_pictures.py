"""Films: how many frames, in which order, how large; the command that makes the README's pictures."""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataprocess import load_data
from diffusion import DDPM
from process import GaussianProcess
from support import machine, pictures
from support.pictures import sequence_options, write_denoising, write_grid, write_training_film
from unet import UNet

SIZE = 8  # of the images of the small model


@pytest.fixture(scope="module")
def ddpm():
    torch.manual_seed(0)
    network = UNet(
        image_size=SIZE,
        base_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        time_emb_dim=32,
    )
    return DDPM(
        network, image_size=SIZE, prediction="x0", sampler="sde-dpm++", sample_steps=6
    ).eval()


def frames(path):
    """A GIF's frames from 0 to 1, (frames, height, width), and how long each is shown, in milliseconds."""
    with Image.open(path) as film:
        shown, times = [], []
        for i in range(film.n_frames):
            film.seek(i)
            times.append(film.info["duration"])
            shown.append(
                torch.frombuffer(bytearray(film.convert("L").tobytes()), dtype=torch.uint8)
            )
        assert film.info["loop"] == 0
        return torch.stack(shown).view(-1, film.height, film.width) / 255, times


def grey(path):
    return torch.from_numpy(np.array(Image.open(path).convert("L"))) / 255


@pytest.mark.parametrize("sampler, steps", [("sde-dpm++", 1), ("sde-dpm++", 6), ("ddpm", 40)])
def test_noise_becomes_the_final_grid(ddpm, tmp_path, sampler, steps):
    result = ddpm.sample(20, sampler=sampler, steps=steps, seed=1)
    sequence = ddpm.sample(20, sampler=sampler, steps=steps, seed=1, **sequence_options(steps))
    assert len(sequence) <= pictures.FRAMES and torch.equal(sequence[-1], result)
    write_denoising(ddpm, sequence, steps, tmp_path / "denoising.gif")
    write_grid(result, tmp_path / "final.png")
    shown, times = frames(tmp_path / "denoising.gif")
    assert shown.shape == (pictures.FRAMES, *grey(tmp_path / "final.png").shape)
    assert times[-1] == 2000 and set(times[:-1]) == {120}
    assert (shown[-1] - grey(tmp_path / "final.png")).abs().max() < 1 / 63
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.parametrize("times", [[832, 666, 499, 332, 166, -1], [-1], [500, -1]])
def test_frames_between_two_steps_are_those_of_the_process(monkeypatch, times):
    """Of many images of constant colour: each frame has the mean and the variance of q(x_t | x_0), at even angles."""
    process, steps = GaussianProcess(), len(times)
    x0, generator = torch.full((50, 1, 32, 32), 0.5), torch.Generator().manual_seed(1)
    sequence, x = [x0], x0
    for s, t in zip(times[::-1], times[-2::-1]):  # the forward process, backwards
        ratio = (process.alpha_bar(torch.tensor([t])) / process.alpha_bar(torch.tensor([s]))).item()
        x = ratio**0.5 * x + (1 - ratio) ** 0.5 * torch.randn(x.shape, generator=generator)
        sequence.insert(0, x)
    fake = types.SimpleNamespace(
        timesteps=lambda n: [999, *times[:-1]],
        alpha_bar=process.alpha_bar,
        alphas_cumprod=process.alphas_cumprod,
        device=process.device,
    )
    seen = []  # what is handed to the grid, before it is clipped
    monkeypatch.setattr(
        "torchvision.utils.make_grid", lambda x, nrow: seen.append(2 * x - 1) or x[0]
    )
    pictures._denoising(fake, torch.stack(sequence), steps)
    assert len(seen) == pictures.FRAMES and torch.equal(seen[-1], x0)
    first = process.alphas_cumprod[-1].sqrt().acos().item()
    for i, frame in enumerate(seen):
        angle = torch.tensor(first * (1 - i / (pictures.FRAMES - 1)))
        assert (frame.mean() - 0.5 * angle.cos()).abs().item() < 0.02, i
        assert (frame.std() - angle.sin()).abs().item() < 0.02, i
    # The noise of neighbours is as alike as in the process: corr = sqrt(alpha_bar_t / alpha_bar_s) sin(s) / sin(t).
    for i in range(1, pictures.FRAMES - 2):
        t, s = (torch.tensor(first * (1 - j / (pictures.FRAMES - 1))) for j in (i, i + 1))
        found = torch.corrcoef(torch.stack([seen[i].flatten(), seen[i + 1].flatten()]))[0, 1]
        assert (found - t.cos() / s.cos() * s.sin() / t.sin()).abs().item() < 0.02, i


def test_x_t_of_every_step_and_of_some(ddpm):
    every = ddpm.sample(3, steps=7, seed=0, return_sequence="xt")
    assert every.shape == (7, 3, 3, SIZE, SIZE) and torch.equal(
        every[-1], ddpm.sample(3, steps=7, seed=0)
    )
    assert every[0].std() > 0.9  # noise
    assert torch.equal(
        ddpm.sample(3, steps=7, seed=0, return_sequence="xt", return_every=3), every[::3]
    )
    x0 = ddpm.sample(3, steps=7, seed=0, return_sequence=True)
    assert torch.equal(
        ddpm.sample(3, steps=7, seed=0, return_sequence=True, return_every=4), x0[2::4]
    )
    for options in ({"return_sequence": "x0"}, {"return_every": 0}, {"return_every": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ddpm.sample(1, steps=1, **options)


def test_the_hardest_films_are_small_enough(tmp_path, monkeypatch):
    process = GaussianProcess()
    sequence = torch.randn(6, 300, 3, 32, 32)  # more than a film shows
    write_denoising(process, sequence, 6, tmp_path / "denoising.gif")
    shown, _ = frames(tmp_path / "denoising.gif")
    assert (
        shown.shape[1:] == (342, 342)
        and 500_000 < (tmp_path / "denoising.gif").stat().st_size <= 1_000_000
    )
    assert (
        shown[-1, 2:34, 2:34] - ((sequence[-1, 0].mean(dim=0) + 1) / 2).clamp(0, 1)
    ).abs().max() < 1 / 63
    monkeypatch.setattr(pictures, "LEVELS", (16, 2))  # the most and the fewest
    for step in range(40):
        Image.effect_noise((400, 400), 200).save(
            tmp_path / f"step_{step:07d}.png", compress_level=0
        )
    write_training_film(tmp_path)
    assert frames(tmp_path / "training.gif")[0].shape in (
        (32, 200, 200),
        (32, 400, 400),
    )  # Pillow's own compression
    assert (tmp_path / "training.gif").stat().st_size <= 1_000_000
    Image.effect_noise((700, 1400), 200).save(tmp_path / "step_0000099.png")
    write_training_film(tmp_path)
    assert frames(tmp_path / "training.gif")[0].shape == (1, 350, 350)


def test_the_grids_of_a_run_in_order(tmp_path):
    write_training_film(tmp_path)
    assert not list(tmp_path.iterdir())  # no grid yet: no film
    last = 10_000_000  # its name is longer, and sorts before those of other steps
    for number, step in enumerate([1, *range(5000, 5000 * 49, 5000), last]):
        images = torch.full((20, 3, 8, 8), number / 25 - 1)
        images[1 + number % 19] = 1.0  # no two frames are equal: Pillow would make one of them
        write_grid(images, tmp_path / f"step_{step:07d}.png")
        if number == 0:
            write_training_film(tmp_path)
            shown, times = frames(tmp_path / "training.gif")
            assert shown.shape[0] == 1
    write_grid(
        torch.zeros(10, 3, 8, 8), tmp_path / "step_0000002.png"
    )  # as before --resume --num_samples 20
    write_training_film(tmp_path)
    shown, times = frames(tmp_path / "training.gif")
    assert shown.shape == (pictures.FRAMES, 22, 102) and times == [125 // 10 * 10] * 31 + [2000]
    assert (shown[-1] - grey(tmp_path / f"step_{last}.png")).abs().max() < 1 / 63
    assert (shown[0] - grey(tmp_path / "step_0000001.png")).abs().max() < 1 / 15
    assert (shown[:, 5, 5].diff() >= 0).all() and shown[15, 5, 5] == pytest.approx(0.5, abs=0.05)


def test_a_film_that_cannot_be_written_is_a_warning(ddpm, tmp_path, capsys):
    """A full disk: the system refuses to write more into a file."""
    resource = pytest.importorskip("resource")
    write_grid(torch.rand(100, 3, 32, 32), tmp_path / "step_0000001.png")
    before, names = resource.getrlimit(resource.RLIMIT_FSIZE), list(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        for write in (
            lambda: write_training_film(tmp_path),
            lambda: write_denoising(
                ddpm, torch.randn(6, 10, 3, 8, 8), 6, tmp_path / "denoising.gif"
            ),
        ):
            machine.WARNED.clear()
            write()
            assert capsys.readouterr().err.count("writing a picture failed (OSError") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == names
    (tmp_path / "step_0000001.png").write_bytes(b"damaged")
    write_training_film(tmp_path)
    assert "writing a picture failed (UnidentifiedImageError" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == names


def test_the_command_makes_the_pictures_of_the_readme(ddpm, tmp_path, monkeypatch):
    ddpm.save(
        tmp_path / "best_model.pt",
        config={"dataset": "glyphs", "use_conditional_generation": False},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "dataprocess.load_data", lambda *args, **options: load_data(*args, **options, train_size=1)
    )
    assert pictures.main([str(tmp_path)]) == 0
    assert sorted(path.name for path in Path("images").iterdir()) == [
        "denoising.gif",
        "process.png",
    ]
    shown, _ = frames("images/denoising.gif")
    assert shown.shape == (32, 6 * (SIZE + 2) + 2, 10 * (SIZE + 2) + 2)
    strip = grey("images/process.png")
    assert strip.shape[1] > 1000 and strip.unique().numel() <= 16
    assert Path("images/process.png").stat().st_size < 150_000


@pytest.mark.parametrize("flags", [["nowhere"], ["."], [".", "."]])
def test_bad_input_of_the_command_is_one_clear_line(tmp_path, flags):
    (tmp_path / "best_model.pt").write_bytes(b"no checkpoint")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); from support import pictures; "
        f"sys.exit(pictures.main({flags!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    *usage, line = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("python -m support.pictures: error: "), (
        done.stderr
    )
    assert bool(usage) == (flags == [".", "."]) and not (tmp_path / "images").exists()
    assert "Traceback" not in done.stderr
