"""The script, run as a person runs it, on a few real digits and a very small network."""

import ast
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA_DIR, read_constants
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.utils import make_grid

import metrics
import train_eval
from dataprocess import load_data
from diffusion import DDPM
from ema import EMA
from support import machine
from support.checkpoint import RunFolder
from support.monitor import FIELDS, Monitor, RunningStats
from timesteps import ImportanceSampler, make_timesteps
from unet import UNet

ROOT = Path(__file__).parent.parent
CPU = "--device cpu --no-bf16".split()  # the same on every CPU
SMALL = [
    *CPU,
    *(
        "--train_size 320 --test_size 100 --base_channels 32 --channel_mult 1 --num_res_blocks 1 --time_emb_dim 32 "
        "--patch_size 4 --attention_resolutions none --batch_size 16 --epochs 2 --sample_steps 3 --preview_steps 4 "
        "--num_samples 20 --log_every 5 --sample_every 10 --save_every 10"
    ).split(),
]
UNLABELLED = "--no-use_conditional_generation --num_clusters 0 --guidance_scale 1".split()
STEPS = 40
PEAK = read_constants({"device": "cpu"})["learning_rate"][1]


def command(*flags):
    return [sys.executable, str(ROOT / "train_eval.py"), *map(str, flags)]


def run(*flags, **options):
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=200, **options)


def refused(capsys, *flags):
    """The one line with which the script refuses these flags."""
    with pytest.raises(SystemExit) as exit_:
        train_eval.main([str(flag) for flag in flags])
    line = capsys.readouterr().err
    assert (
        exit_.value.code == 2
        and line.startswith("train_eval.py: error: ")
        and line.count("\n") == 1
    ), line
    return line


def timesteps_of(config):
    """The sampler of timesteps that a run with this config has."""
    return make_timesteps(config.timestep_sampling, config.num_timesteps, config.timestep_std)


def scalars(save_dir, part="."):
    """TensorBoard scalars of a part of the only run: {tag: {step: value}}."""
    (log,) = (save_dir / "tensorboard_logs").iterdir()
    events = EventAccumulator(
        str(log / part), size_guidance={"images": 0, "scalars": 0, "tensors": 0}
    ).Reload()
    return events, {
        tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }


def same(a, b):
    """Whether two checkpoints hold the same, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state(save_dir):
    """What the run came to: everything in last.pt that is not a name or a clock."""
    last = torch.load(save_dir / "last.pt", weights_only=True)
    return {key: last[key] for key in last if key not in ("config", "log")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_flags):
    """A whole run, conditional, with every option that takes part in the bits."""
    save_dir = tmp_path_factory.mktemp("run")
    flags = [
        *SMALL,
        *data_flags,
        "--use_augmentation",
        "--dropout",
        0.1,
        "--use_conditional_generation",
        "--ema_start",
        5,
        "--variance",
        "learned",
        "--timestep_sampling",
        "importance",
        "--num_samples",
        70,
        "--num_heads",
        2,
        "--target_references",
        64,
        "--num_timesteps",
        10,
    ]  # so few that importance sampling is warm in an epoch
    done = run(*flags, "--save_dir", save_dir)
    assert done.returncode == 0, done.stderr
    return save_dir, flags, done


def test_a_run_leaves_everything_that_it_promises(trained):
    save_dir, _, done = trained
    assert sorted(path.name for path in save_dir.iterdir()) == [
        "best_model.pt",
        "last.previous.pt",
        "last.pt",
        "loss_curve.png",
        "samples",
        "tensorboard_logs",
    ]
    assert sorted(path.name for path in (save_dir / "samples").iterdir()) == [
        "denoising.gif",
        "final.png",
        "real.png",
        *(f"step_{step:07d}.png" for step in range(10, STEPS + 1, 10)),
        "training.gif",
    ]
    for path in (save_dir / "samples").glob("*.png"):
        assert Image.open(path).size == (
            10 * 34 + 2,
            7 * 34 + 2,
        )  # seven rows of ten: a column a digit
    for words in (
        "320 images to train, 100 to test",
        "parameters, with labels",
        "device: cpu, ",
        "best_model.pt",
        "tensorboard --logdir",
        "test loss ",
        "of 70 read as the digit asked for",
        "last grid during training: Fréchet distance ",
        "train_eval.py --evaluate",
        "--resume --epochs ",
        "explore.ipynb",
        "minutes",
    ):
        assert words in done.stdout, words
    lines = done.stderr.splitlines()  # no terminal: lines, and few of them
    assert (
        "\r" not in done.stderr
        and len(lines) < 5
        and lines[-1].startswith("training: 640 of 640 images, ")
    )
    assert (
        "loss=" in lines[-1]
        and "frechet=" in lines[-1]
        and any("minutes to go" in line for line in lines)
    )


def test_tensorboard_has_the_curves_the_grids_and_the_config(trained):
    save_dir, _, _ = trained
    events, curves = scalars(save_dir)
    assert set(curves) == {
        "train/batch_loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/images_per_second",
        "final/test_loss",
        *(f"train_batch_loss_by_t/quartile_{i}" for i in range(1, 5)),
    }
    assert list(curves["train/batch_loss"]) == list(range(5, STEPS + 1, 5))
    looks, part = (
        [10, 20, 30, 40],
        {name: scalars(save_dir, name)[1] for name in ("train", "test", "samples", "real")},
    )
    assert all(
        set(part[name]) == {f"eval/{tag}"} and list(part[name][f"eval/{tag}"]) == looks
        for name, tag in (
            ("train", "loss"),
            ("test", "loss"),
            ("samples", "frechet"),
            ("real", "frechet"),
        )
    )
    assert (
        part["samples"]["eval/frechet"][40] > 2 * part["real"]["eval/frechet"][40] > 0
    )  # no digits yet
    assert len(set(part["real"]["eval/frechet"].values())) == 1
    last = torch.load(save_dir / "last.pt", weights_only=True)
    for name, tag, curve in (
        ("train", "loss", "fixed"),
        ("test", "loss", "test"),
        ("samples", "frechet", "frechet"),
    ):
        assert dict(last[f"{curve}_curve"]) == pytest.approx(part[name][f"eval/{tag}"])
    rate = curves["train/learning_rate"]
    for step, value in rate.items():  # cosine to zero over the run
        assert value == pytest.approx(PEAK * (1 + math.cos(math.pi * step / STEPS)) / 2, abs=1e-9)
    first, last = (curves["train/batch_loss"][step] for step in (5, STEPS))
    assert last < 0.95 * first, "training must lower the loss"
    assert {"real", "samples", "final"} == set(events.Tags()["images"])
    assert [e.step for e in events.Images("samples")] == looks
    table = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = dict(line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    assert list(rows)[:28] == list(FIELDS)
    network = DDPM.load(save_dir / "best_model.pt", "cpu").network
    assert int(rows["total_params"]) == 2 * sum(p.numel() for p in network.parameters())
    assert (
        rows["convert_to_rgb"] == "True"
        and rows["normalization"] == "[-1, 1]"
        and rows["num_classes"] == "10"
    )


def test_best_model_holds_the_ema_weights_of_the_best_epoch(trained):
    save_dir, _, _ = trained
    best = DDPM.load(save_dir / "best_model.pt", "cpu")
    last = torch.load(save_dir / "last.pt", weights_only=True)
    assert last["timesteps"]["counts"].sum() == 640 and last["timesteps"]["losses"].all()
    assert (
        best.info["test_loss"] == last["best_loss"] == min(loss for _, loss in last["test_curve"])
    )
    assert best.info["step"] == last["step"] == STEPS  # the loss falls to the end
    assert same(dict(best.network.state_dict()), last["ema"]["shadow"])
    assert not same(dict(best.network.state_dict()), dict(last["network"]))
    assert best.sample_steps == 3 and best.info["config"]["use_conditional_generation"] is True
    assert best.sample(2, y=[3, 7]).shape == (2, 3, 32, 32)


def test_adamw_has_the_constants_and_its_fused_form(trained):
    (group,) = torch.load(trained[0] / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 1e-4 and group["fused"] and group["initial_lr"] == PEAK
    assert tuple(group["betas"]) == (0.9, read_constants({"device": "cpu"})["adam_beta2"][1])


def test_grids_during_training_are_ema_weights_in_few_steps_a_column_a_digit(trained, tmp_path):
    """The last grid of the run, drawn again from the EMA weights that best_model.pt holds."""
    save_dir, flags, _ = trained
    config, _ = train_eval.configure([*map(str, flags), "--save_dir", str(tmp_path)])
    best = DDPM.load(save_dir / "best_model.pt", "cpu")
    how = {"sampler": "sde-dpm++", "steps": 4, "guidance_scale": 1.0}
    images = best.sample(70, torch.arange(70) % 10, seed=0, **how)
    torch.testing.assert_close(train_eval.draw(config, best, 70, **how)[0], images)
    drawn = torch.from_numpy(np.array(Image.open(save_dir / "samples" / f"step_{STEPS:07d}.png")))
    expected = make_grid((images + 1) / 2, nrow=10).clamp(0, 1) * 255
    assert (drawn.permute(2, 0, 1) - expected).abs().max() < 2


def test_a_grid_asks_for_the_digits_in_turn_and_for_the_same_noise():
    def asked(*flags):
        config, _ = train_eval.configure([*SMALL, "--seed", "7", *flags])
        model = SimpleNamespace(
            num_classes=10,
            sample=lambda n, y, **options: (seen.append((n, y, options)), torch.zeros(n, 1, 2, 2))[
                1
            ],
        )
        return seen, train_eval.draw(config, model, 20, steps=3)[1]

    seen = []

    asked_for = {"seed": 7, "steps": 3, "rows": slice(0, 20)}
    ((n, y, options),), labels = asked("--use_conditional_generation")
    assert n == 20 and y.tolist() == [*range(10), *range(10)] and options == asked_for
    assert torch.equal(labels, y)
    seen.clear()
    assert asked("--no-use_conditional_generation", "--num_clusters", "0") == (
        [(20, None, asked_for)],
        None,
    )


def test_a_training_step_gives_the_network_labels_and_bf16_and_clips_the_gradient():
    config, _ = train_eval.configure(
        [*SMALL, "--use_conditional_generation", "--bf16", "--grad_clip", "0.01"]
    )
    ddpm, seen, norms = train_eval.build(config), [], []
    torch.nn.init.normal_(ddpm.network.conv_out.weight)
    ddpm.network.register_forward_hook(
        lambda module, args, output: seen.append((*args, output.dtype))
    )
    optimizer = torch.optim.SGD(ddpm.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: norms.append(
            torch.stack([p.grad.norm() for p in ddpm.parameters() if p.grad is not None]).norm()
        )
    )
    ema = EMA(ddpm.network)
    y = torch.arange(50) % 10
    state = {"optimizer": optimizer, "ema": ema, "timesteps": timesteps_of(config)}
    losses, weights, t, norm = train_eval.train_step(
        config, ddpm, state, torch.rand(50, 3, 32, 32), y
    )
    ((_, t_seen, y_seen, dtype),) = seen
    assert losses.shape == t.shape == (50,) and torch.equal(t, t_seen) and dtype == torch.bfloat16
    assert ((y_seen == y) | (y_seen == 10)).all() and (y_seen == y).sum() > 30
    assert norm > 0.01 and norms[0].item() == pytest.approx(0.01, rel=1e-3) and ema.step == 1


def test_timesteps_are_drawn_as_asked():
    config, _ = train_eval.configure(
        [*SMALL, "--timestep_sampling", "logit-normal", "--timestep_std", "0.001"]
    )
    ddpm = train_eval.build(config)
    state = {
        "optimizer": torch.optim.SGD(ddpm.parameters(), lr=0.0),
        "ema": EMA(ddpm.network),
        "timesteps": timesteps_of(config),
    }
    _, weights, t, _ = train_eval.train_step(
        config, ddpm, state, torch.rand(50, 3, 32, 32), torch.arange(50) % 10
    )
    assert ((t - 500).abs() < 3).all() and (weights == 1).all()  # the law itself: test_timesteps.py


def test_no_logit_normal_timestep_lies_beyond_the_last():
    config, _ = train_eval.configure(
        [*SMALL, "--timestep_sampling", "logit-normal", "--timestep_std", "1000"]
    )
    ddpm = train_eval.build(config)
    state = {
        "optimizer": torch.optim.SGD(ddpm.parameters(), lr=0.0),
        "ema": EMA(ddpm.network),
        "timesteps": timesteps_of(config),
    }
    _, _, t, _ = train_eval.train_step(
        config, ddpm, state, torch.rand(50, 3, 32, 32), torch.arange(50) % 10
    )
    assert t.min() == 0 and t.max() == config.num_timesteps - 1


def test_a_step_gives_the_loss_references_drawn_anew_from_the_training_images():
    config, _ = train_eval.configure([*SMALL, "--target_references", "60"])
    train_images, _ = load_data("glyphs", "", train_size=30, test_size=1, augment=False)
    torch.manual_seed(0)
    images, labels = train_eval.draw_references(config, train_images)
    again, _ = train_eval.draw_references(config, train_images)
    assert (
        images.shape == (60, 1, 32, 32) and labels.shape == (60,) and not torch.equal(images, again)
    )
    every, _ = train_images.batch(slice(None))
    index = (
        (images - every[None, :, 0].transpose(0, 1).reshape(30, 1, 1, 32, 32))
        .abs()
        .amax((2, 3, 4))
        .argmin(dim=0)
    )
    assert torch.equal(images, every[index, :1]) and torch.equal(labels, train_images.labels[index])
    assert len(index.unique()) > 20

    ddpm, seen = train_eval.build(config), []
    forward = ddpm.forward
    ddpm.forward = lambda *args, references, **options: (
        seen.append(references),
        forward(*args, references=references, **options),
    )[1]
    state = {
        "optimizer": torch.optim.SGD(ddpm.parameters(), lr=0.0),
        "ema": EMA(ddpm.network),
        "timesteps": timesteps_of(config),
    }
    x0, y = train_images.batch(slice(16))
    train_eval.train_step(config, ddpm, state, x0, y, (images, labels))
    assert seen[0][0] is images and seen[0][1] is labels
    config.target_references = 0
    assert train_eval.draw_references(config, train_images) is None


def test_every_step_of_a_run_has_references_of_its_own(data_flags, tmp_path, monkeypatch):
    seen, step = [], train_eval.train_step
    monkeypatch.setattr(
        train_eval, "train_step", lambda *args: (seen.append(args[-1][0]), step(*args))[1]
    )
    flags = [
        *SMALL,
        *data_flags,
        "--save_dir",
        tmp_path,
        "--epochs",
        1,
        "--train_size",
        40,
        "--test_size",
        10,
        "--num_samples",
        2,
        "--target_references",
        7,
    ]
    assert train_eval.main([*map(str, flags)]) == 0
    assert [len(images) for images in seen] == [7, 7, 7]
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_every_constant_of_the_model_reaches_it():
    flags = {
        "num_heads": 2,
        "adaptive_norm": True,
        "prediction": "v",
        "beta_schedule": "cosine",
        "loss": "l1",
        "variance": "learned",
        "zero_terminal_snr": True,
        "min_snr_gamma": 0.0,
        "sampler": "dpm++",
        "sample_steps": 7,
        "timestep_spacing": "linspace",
        "guidance_scale": 2.5,
        "num_timesteps": 50,
    }
    given = [
        f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name}={value}"
        for name, value in flags.items()
    ]
    ddpm = train_eval.build(
        train_eval.configure([*SMALL, "--use_conditional_generation", *given])[0]
    )
    for name, value in flags.items():
        assert (ddpm.network.config if name in ddpm.network.config else vars(ddpm))[
            name
        ] == value, name
    assert ddpm.network.config["out_channels"] == 6


def test_an_evaluation_may_visit_other_timesteps(trained, monkeypatch):
    save_dir, _, _ = trained
    seen, draw = [], train_eval.draw
    monkeypatch.setattr(
        train_eval,
        "draw",
        lambda config, ddpm, n, **options: (
            seen.append(ddpm.timestep_spacing),
            draw(config, ddpm, n, **options),
        )[1],
    )
    for spacing in ("linspace", "trailing"):
        train_eval.main(
            ["--evaluate", "--save_dir", str(save_dir), *CPU, "--timestep_spacing", spacing]
        )
    assert seen == [
        "linspace",
        "linspace",
        "trailing",
        "trailing",
    ]  # the grid, and what is measured


def test_a_compiled_run_is_the_same_run(data_flags, tmp_path):
    """Whatever the compiler does, weights keep their names, and the loss its course; here with torch's own tracer."""
    config, _ = train_eval.configure(
        [*SMALL, *data_flags, "--use_compile", "--use_conditional_generation"]
    )
    losses, calls = {}, []
    for use_compile in (False, True):
        config.use_compile = use_compile
        torch.manual_seed(0)
        ddpm = train_eval.build(config)
        names, rng = list(ddpm.state_dict()), torch.get_rng_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch,
                "compile",
                functools.partial(
                    torch.compile,
                    backend=lambda graph, example: (calls.append(1), graph.forward)[1],
                ),
            )
            machine.compile_network(config, ddpm)
        assert torch.equal(torch.get_rng_state(), rng) and list(ddpm.state_dict()) == names
        assert (
            all(p.grad is None for p in ddpm.parameters()) and len(calls) == 2 * use_compile
        )  # training, sampling
        state = {
            "optimizer": torch.optim.AdamW(ddpm.parameters(), 1e-3),
            "ema": EMA(ddpm.network),
            "timesteps": timesteps_of(config),
        }
        x0, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
        losses[use_compile] = torch.stack(
            [train_eval.train_step(config, ddpm, state, x0, y)[0] for _ in range(3)]
        )
        assert ddpm.sample(2, y=1, steps=2).shape == (2, 3, 32, 32)
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-5)


def test_a_compiler_that_fails_costs_a_line(capsys, monkeypatch):
    def broken(call, disable=False):
        def fail(*args):
            raise RuntimeError("no compiler\nlong story")

        return call if disable else fail

    monkeypatch.setattr(torch, "compile", broken)
    config, _ = train_eval.configure([*SMALL, "--use_compile"])
    ddpm = train_eval.build(config)
    machine.compile_network(config, ddpm)
    assert capsys.readouterr().err == (
        "torch.compile failed (RuntimeError: no compiler); going on without it\n"
    )
    assert ddpm.sample(1, steps=1).shape == (1, 3, 32, 32)


def test_the_bf16_step_is_the_float32_step_within_its_error():
    """Loss and gradients of the layouts and precisions that a run may have: norms' statistics stay float32."""
    torch.manual_seed(0)
    results, weights, x0, eps = {}, None, torch.rand(8, 3, 32, 32), torch.randn(8, 3, 32, 32)
    for flag in ("--no-bf16", "--bf16"):
        config, _ = train_eval.configure(
            [*SMALL, flag, "--channel_mult", "1,2", "--attention_resolutions", "8", *UNLABELLED]
        )
        ddpm = train_eval.build(config)
        if weights is None:  # from the plain layout
            weights = {
                name: torch.randn(value.shape) / math.sqrt(value[0].numel())
                if value.ndim > 1
                else value
                for name, value in ddpm.state_dict().items()
            }
        ddpm.load_state_dict(weights)
        with machine.autocast(config):
            loss = ddpm(x0, t=torch.arange(8) * 120, eps=eps)
        loss.backward()
        results[flag] = (
            loss.item(),
            torch.cat([p.grad.flatten() for p in ddpm.parameters() if p.grad is not None]),
        )
    (loss, gradient), (loss16, gradient16) = results.values()
    assert loss16 == pytest.approx(loss, rel=0.01) and loss16 != loss
    assert (gradient16 - gradient).norm() < 0.05 * gradient.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: not run")
def test_on_cuda_a_step_never_waits_for_the_device_and_agrees_with_the_cpu(data_flags):
    flags = [flag for flag in SMALL if flag not in CPU] + ["--timestep_sampling", "importance"]
    config, _ = train_eval.configure([*flags, "--device", "cuda", "--use_conditional_generation"])
    ddpm = train_eval.build(config)
    ema = EMA(ddpm.network)
    state = {
        "optimizer": torch.optim.AdamW(ddpm.parameters(), 1e-3, fused=True),
        "ema": ema,
        "timesteps": ImportanceSampler(config.num_timesteps).cuda(),
    }
    train_images, _ = load_data("glyphs", "", train_size=64, test_size=1, device="cuda")
    machine.compile_network(config, ddpm)
    window = RunningStats(config)
    for x0, y in train_images.epoch(
        16, 0
    ):  # the compiler and the allocator have had their say after one epoch
        window.add(*train_eval.train_step(config, ddpm, state, x0, y))
    window.start()
    batches = list(train_images.epoch(16, 1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x0, y in batches:
            window.add(*train_eval.train_step(config, ddpm, state, x0, y))
        ddpm.sample(4, y=torch.arange(4, device="cuda"), steps=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    twin = train_eval.build(train_eval.configure([*SMALL, "--use_conditional_generation"])[0])
    twin.load_state_dict(ddpm.state_dict())
    x0, y = batches[0]
    t, eps = torch.arange(16) * 60, torch.randn(16, 3, 32, 32)
    ddpm.eval(), twin.eval()
    with torch.no_grad():
        on_cuda = ddpm(x0, y, t=t.cuda(), eps=eps.cuda()).item()
        assert on_cuda == pytest.approx(twin(x0.cpu(), y.cpu(), t=t, eps=eps).item(), rel=0.02)


def test_a_window_tells_what_its_steps_did(monkeypatch, capsys):
    config, _ = train_eval.configure(
        ["--device", "cpu", "--num_timesteps", "1000", "--log_every", "5"]
    )
    window = RunningStats(config)
    monkeypatch.setattr(time, "perf_counter", lambda: window.clock + 2.0)
    one = torch.ones(1)
    window.add(
        torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.tensor([0, 249, 250]), torch.tensor(4.0)
    )
    window.add(torch.tensor([5.0]), one, torch.tensor([999]), torch.tensor(6.0))
    assert window.read(2, 0.1) == {
        "train/batch_loss": 3.5,
        "train/grad_norm": 5.0,
        "train/images_per_second": 2.0,
        "train_batch_loss_by_t/quartile_1": 1.5,
        "train_batch_loss_by_t/quartile_2": 3.0,
        "train_batch_loss_by_t/quartile_4": 5.0,
    }
    window.add(torch.tensor([7.0]), one, torch.tensor([600]), torch.tensor(1.0))
    assert window.read(3, 0.1)["train_batch_loss_by_t/quartile_3"] == 7.0  # it began anew
    window.add(torch.tensor([1.0]), one, torch.tensor([0]), torch.tensor(1.0))
    window.add(torch.tensor([1.0]), one, torch.tensor([0]), torch.tensor(float("inf")))
    with pytest.raises(SystemExit) as exit_:
        window.read(5, 0.1)
    line = capsys.readouterr().err
    assert exit_.value.code == 3 and line.count("\n") == 2  # an empty one first, to leave the bar
    assert (
        "step 5: loss 1.0, gradient norm inf, learning rate 0.1, losses before: 1. Training has diverged"
        in line
    )
    window.start()
    window.add(
        torch.tensor([4.0, 1.0]), torch.tensor([0.5, 1.5]), torch.tensor([0, 1]), torch.tensor(1.0)
    )
    scalars = window.read(6, 0.1)  # timesteps drawn by importance weigh less
    assert (
        scalars["train/batch_loss"] == 1.75 and scalars["train_batch_loss_by_t/quartile_1"] == 1.75
    )


def test_importance_sampling_draws_the_timesteps_weighs_the_losses_and_learns_from_them():
    config, _ = train_eval.configure([*SMALL, *UNLABELLED])
    ddpm, taken = train_eval.build(config), []
    draws = torch.arange(4), torch.tensor([0.0, 0.0, 2.0, 2.0])
    state = {
        "optimizer": torch.optim.SGD(ddpm.parameters(), lr=0.0),
        "ema": EMA(ddpm.network),
        "timesteps": SimpleNamespace(
            sample=lambda n: draws, update=lambda *args: taken.append(args)
        ),
    }
    before = []
    state["optimizer"].register_step_pre_hook(
        lambda *args: before.append(ddpm.network.conv_out.bias.grad.clone())
    )
    x0 = torch.rand(4, 3, 32, 32)
    torch.manual_seed(0)
    losses, weights, t, _ = train_eval.train_step(config, ddpm, state, x0, None)
    assert torch.equal(t, draws[0]) and torch.equal(weights, draws[1])
    assert torch.equal(taken[0][0], t) and torch.equal(taken[0][1], losses)
    torch.manual_seed(0)
    ddpm.zero_grad()
    ddpm(x0, t=t, reduction="none")[2:].sum().div(2).backward()
    clip = min(
        1.0,
        1.0
        / torch.stack([p.grad.norm() for p in ddpm.parameters() if p.grad is not None])
        .norm()
        .item(),
    )
    torch.testing.assert_close(
        before[0], ddpm.network.conv_out.bias.grad * clip, rtol=1e-4, atol=1e-6
    )


def test_a_seed_decides_the_run_to_the_bit_and_another_seed_another_run(trained, tmp_path):
    save_dir, flags, _ = trained
    assert train_eval.main([*map(str, flags), "--save_dir", str(tmp_path / "same")]) == 0
    assert same(state(tmp_path / "same"), state(save_dir))
    other = ["--save_dir", str(tmp_path / "other"), "--seed", "1", "--epochs", "1"]
    assert train_eval.main([*map(str, flags), *other]) == 0
    assert not same(state(tmp_path / "other")["train_curve"][0], state(save_dir)["train_curve"][0])
    final = [
        (folder / "samples" / "final.png").read_bytes() for folder in (save_dir, tmp_path / "same")
    ]
    assert final[0] == final[1]


def test_a_finished_run_can_be_made_longer(trained, tmp_path, data_flags):
    flags = [*SMALL, *data_flags, "--save_dir", tmp_path, "--log_every", 1, "--warmup_steps", 100]
    assert train_eval.main([*map(str, flags), "--epochs", "1"]) == 0
    assert train_eval.main(["--save_dir", str(tmp_path), "--resume", *CPU, "--epochs", "2"]) == 0
    _, curves = scalars(tmp_path)
    losses = scalars(tmp_path, "test")[1]["eval/loss"]
    assert list(losses) == [10, 20, 30, 40] and losses[40] < losses[20]
    rate = curves["train/learning_rate"]
    for (
        step,
        value,
    ) in rate.items():  # after two steps of rise, a tenth of the first run, a cosine to zero, twice
        share = (
            (0.75 if step == 1 else 1)
            * (1 + math.cos(math.pi * step / (20 if step <= 20 else STEPS)))
            / 2
        )
        assert value == pytest.approx(PEAK * share, abs=1e-9), step


def test_another_peak_while_the_rate_still_rises_keeps_the_share_of_the_rise(
    tmp_path, data_flags, monkeypatch
):
    step, left = train_eval.train_step, [12]

    def interrupted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_eval, "train_step", interrupted)
    flags = [
        *SMALL,
        *data_flags,
        "--save_dir",
        tmp_path,
        "--log_every",
        1,
        "--sample_every",
        1000,
        "--epochs",
        20,
    ]
    assert (
        train_eval.main([*map(str, flags)]) == 130
    )  # last.pt is of step 10 of 400; the rate rises for 40
    left[0] = 3
    resume = ["--save_dir", str(tmp_path), "--resume", *CPU, "--learning_rate", "2e-3"]
    assert train_eval.main(resume) == 130
    _, curves = scalars(tmp_path)
    for k in (11, 12, 13):
        rise = 1 / 40 + (1 - 1 / 40) * k / 40
        assert curves["train/learning_rate"][k] == pytest.approx(
            2e-3 * rise * (1 + math.cos(math.pi * k / 400)) / 2, rel=1e-5
        ), k


def test_a_last_pt_of_an_older_version_still_goes_on(whole, tmp_path):
    """Older ones have no state of timesteps that need none, no buffers of the shadow, and fewer constants."""
    save_dir, flags = whole
    saved = torch.load(save_dir / "last.pt", weights_only=True)
    assert saved.pop("timesteps") == {} and saved["ema"].pop("buffers") == {}
    del (
        saved["config"]["timestep_spacing"],
        saved["fixed_curve"],
        saved["frechet_curve"],
        saved["config"]["adam_beta2"],
    )
    saved["optimizer"]["param_groups"][0]["betas"] = (0.9, 0.999)
    torch.save(saved, tmp_path / "last.pt")
    shutil.copy(save_dir / "best_model.pt", tmp_path)
    assert train_eval.main(["--resume", "--save_dir", str(tmp_path), *CPU, "--epochs", "3"]) == 0
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    (group,) = last["optimizer"]["param_groups"]
    assert (
        last["step"] == 60 and last["config"]["adam_beta2"] == group["betas"][1] == 0.999
    )  # AdamW's own


def test_an_earlier_run_is_moved_aside_never_overwritten(trained, tmp_path, data_flags, capsys):
    flags = [*map(str, SMALL), *data_flags, "--save_dir", str(tmp_path), "--epochs", "1"]
    train_eval.main(flags)
    before = (tmp_path / "best_model.pt").read_bytes()
    train_eval.main([*flags, "--seed", "1"])
    (aside,) = tmp_path.glob("run_*")
    assert (aside / "best_model.pt").read_bytes() == before and (
        aside / "samples" / "final.png"
    ).exists()
    assert (tmp_path / "best_model.pt").read_bytes() != before and str(
        aside
    ) in capsys.readouterr().out


def test_evaluate_draws_and_measures_the_best_model_again(trained, capsys):
    save_dir, _, done = trained
    before = (save_dir / "samples" / "final.png").read_bytes()
    (save_dir / "samples" / "final.png").unlink()
    assert train_eval.main(["--evaluate", "--save_dir", str(save_dir), *CPU]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("bits per dimension")]
    ddpm = DDPM.load(save_dir / "best_model.pt", "cpu")
    _, images = load_data("mnist" if "mnist" in done.stdout else "glyphs", DATA_DIR, test_size=100)
    bits = ddpm.bits_per_dim(*images.batch(torch.arange(100)), terms=10, seed=0)
    assert line == (
        f"bits per dimension given the label {bits.total:.4f} +- {bits.standard_error:.4f}: prior "
        f"{bits.prior:.4f}, KL terms {bits.kl:.4f}, decoder {bits.decoder:.4f} (100 images, 10 of 10 "
        "terms)"
    )
    assert (save_dir / "samples" / "final.png").read_bytes() == before
    assert train_eval.main(["--evaluate", "--save_dir", str(save_dir), *CPU]) == 0
    again = capsys.readouterr().out
    paths = [
        [Path(re.search(rf"{name}: (\S+)", text)[1]) for text in (out, again)]
        for name in ("samples", "measures")
    ]
    for first, second in paths:
        assert first != second and first.read_bytes() == second.read_bytes()
    assert [line for line in out.splitlines() if "test loss" in line] == [
        line for line in done.stdout.splitlines() if "test loss" in line
    ]
    assert not list(save_dir.glob("run_*"))


def test_evaluate_writes_its_table_as_json_in_tensorboard_and_the_nearest_pairs(trained, capsys):
    """The figures are those of `metrics.measure` for the samples that the model draws."""
    save_dir, _, done = trained
    assert (
        train_eval.main(
            [
                "--evaluate",
                "--save_dir",
                str(save_dir),
                *CPU,
                "--eval_samples",
                "90",
                "--guidance_scale",
                "2",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    path, picture = (
        Path(re.search(rf"{name}: (\S+)", out)[1]) for name in ("measures", "nearest pairs")
    )
    written = json.loads(path.read_text())
    ddpm = DDPM.load(save_dir / "best_model.pt", "cpu")
    y = torch.arange(90) % 10
    samples = (
        ((ddpm.sample(90, y, seed=0, guidance_scale=2) + 1) * 127.5).round().clamp(0, 255).byte()
    )
    train, test = load_data(
        "mnist" if "mnist" in done.stdout else "glyphs", DATA_DIR, train_size=320, test_size=100
    )
    classifier = metrics.load_classifier(train.name, train.images, train.labels, DATA_DIR)
    expected, pairs = metrics.measure(classifier, samples, train.images, test.images, y)
    assert {name: written[name] for name in expected} == expected
    assert written["guidance_scale"] == 2 and written["step"] == STEPS and written["steps"] == 3
    assert written["classifier_accuracy"] == classifier.accuracy(test.images, test.labels)
    row = next(line.split() for line in out.splitlines() if "Fréchet" in line)
    assert row[-2:] == [f"{expected['frechet']:.4f}", f"{expected['frechet_real']:.4f}"]
    assert "90 samples" in out and f"{expected['accuracy']:.4f}" in out and path.parent == save_dir
    assert all(
        f"{expected[name]:.4f}" in out
        for name in ("precision", "recall_real", "copies", "nearest_1st")
    )
    events, _ = scalars(save_dir)
    assert scalars(save_dir, path.stem)[1]["final/frechet"][STEPS] == pytest.approx(
        expected["frechet"]
    )
    assert "nearest" in events.Tags()["images"]
    drawn = torch.from_numpy(np.array(Image.open(picture)))[..., 0]
    assert torch.equal(drawn[2:34, 2:34], pairs[0, 0]) and torch.equal(
        drawn[2:34, 36:68], pairs[1, 0]
    )


def test_a_folder_of_pngs_is_measured_as_a_model_is(data_flags, tmp_path, capsys):
    sizes = [
        "--train_size",
        320,
        "--test_size",
        100,
        "--device",
        "cpu",
        "--save_dir",
        tmp_path / "run",
    ]
    train, test = load_data(data_flags[1], DATA_DIR, train_size=320, test_size=100)
    samples = load_data(data_flags[1], DATA_DIR, train_size=400)[0].images[320:]
    (tmp_path / "mine").mkdir()
    for i, image in enumerate(samples):
        Image.fromarray(image.numpy()).save(tmp_path / "mine" / f"{i:03}.png")
    assert (
        train_eval.main(
            [*map(str, data_flags), *map(str, sizes), "--evaluate", str(tmp_path / "mine")]
        )
        == 0
    )
    written = json.loads((tmp_path / "run" / "evaluation_mine.json").read_text())
    classifier = metrics.load_classifier(train.name, train.images, train.labels, DATA_DIR)
    expected, _ = metrics.measure(classifier, samples, train.images, test.images)
    assert {name: written[name] for name in expected} == expected and "accuracy" not in written
    assert (tmp_path / "run" / "samples" / "nearest_mine.png").exists()
    assert (
        not list((tmp_path / "mine").glob("nearest*")) and "80 samples" in capsys.readouterr().out
    )
    (tmp_path / "else" / "mine" / "3").mkdir(
        parents=True
    )  # another folder of this name: nothing is overwritten
    for i, path in enumerate(sorted((tmp_path / "mine").iterdir())[:60]):
        path.rename(tmp_path / "else" / "mine" / ("3" if i % 2 else "") / path.name)
    (tmp_path / "else" / "mine" / "notes.txt").write_text("")
    assert (
        train_eval.main(
            [*map(str, [*data_flags, *sizes]), "--evaluate", str(tmp_path / "else" / "mine")]
        )
        == 0
    )
    out = capsys.readouterr().out
    again = json.loads((tmp_path / "run" / "evaluation_mine-2.json").read_text())
    assert again["samples"] == 60 and again["samples_from"] == str(tmp_path / "else" / "mine")
    assert (
        "frechet" not in again
        and again["precision"] > 0.3
        and "left out, since there are too few images" in out
    )
    assert "left out, since they are not PNGs: notes.txt\n" in out
    sizes[3] = 59
    line = refused(capsys, *data_flags, *sizes, "--evaluate", tmp_path / "else" / "mine")
    assert "60 PNGs; expected at most 59" in line
    assert "no such folder" in refused(
        capsys, *data_flags, *sizes, "--evaluate", tmp_path / "yours"
    )
    line = refused(
        capsys,
        *data_flags,
        *sizes,
        "--evaluate",
        tmp_path / "mine",
        "--sampler",
        "ddim",
        "--epochs",
        3,
    )
    assert "epochs, sampler: not used with --evaluate FOLDER; leave it out" in line


def test_a_damaged_classifier_is_one_clear_line_before_training_and_before_measuring(
    trained, capsys, monkeypatch, tmp_path
):
    def damaged(*args, **options):
        raise ValueError("assets/classifier.pt: not a readable checkpoint")

    monkeypatch.setattr(metrics, "load_classifier", damaged)
    save_dir, flags, _ = trained
    for command_ in (
        [*flags, "--save_dir", tmp_path],
        [
            "--evaluate",
            "--save_dir",
            save_dir,
            *CPU,
            "--bound_images",
            2,
            "--bound_terms",
            2,
            "--eval_samples",
            4,
        ],
    ):
        assert "assets/classifier.pt: not a readable" in refused(capsys, *command_)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("size", [1, 64, 65])
def test_too_few_images_to_measure_with_cost_a_line_and_not_the_run(
    data_flags, tmp_path, capsys, size
):
    flags = [
        *SMALL,
        *data_flags,
        "--save_dir",
        tmp_path,
        "--train_size",
        80,
        "--test_size",
        size,
        "--epochs",
        1,
        "--num_samples",
        65,
    ]
    assert train_eval.main([*map(str, flags)]) == 0
    assert ("grids are not measured during training" in capsys.readouterr().out) == (size < 65)
    assert any((tmp_path / "tensorboard_logs").glob("*/samples")) == (size >= 65)
    assert (
        train_eval.main(["--evaluate", "--save_dir", str(tmp_path), *CPU, "--bound_images", "2"])
        == 0
    )
    out, written = capsys.readouterr().out, json.loads((tmp_path / "evaluation.json").read_text())
    assert (
        written["samples"] == size
        and ("frechet" in written) == (size >= 65)
        and ("recall" in written) == (size > 3)
    )
    assert ("left out, since there are too few images: Fr" in out) == (size < 65)


@pytest.mark.parametrize(
    "what, words, error",
    [
        (
            "metrics.FrechetMeter.__call__",
            "measuring samples failed",
            RuntimeError("unexpected pos 1 vs 2\nlong story"),
        ),
        ("metrics.frechet_distance", "measuring samples failed", KeyError("frechet")),
        (
            "metrics.load_classifier",
            "measuring samples failed",
            OSError(28, "No space left on device"),
        ),
        (
            "train_eval.test_loss",
            "the test loss failed",
            torch.OutOfMemoryError("CUDA out of memory."),
        ),
        ("train_eval.draw", "a grid of samples failed", MemoryError()),
    ],
)
def test_a_look_that_fails_is_a_warning_and_loses_nothing(
    data_flags, tmp_path, capsys, monkeypatch, what, words, error
):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(what, fail)
    monkeypatch.setattr(train_eval, "draw_final", lambda run: True)  # it draws too
    monkeypatch.setattr(
        metrics, "train_classifier", lambda *args, **options: metrics.Classifier(10)
    )
    flags = [
        *SMALL,
        *data_flags,
        "--save_dir",
        tmp_path,
        "--epochs",
        1,
        "--train_size",
        160,
        "--num_samples",
        65,
    ]
    assert train_eval.main([*map(str, flags)]) == 0
    err = capsys.readouterr().err
    assert (
        f"{words} ({type(error).__name__}" in err
        and "the run goes on" in err
        and "long story" not in err
    )
    assert state(tmp_path)["step"] == 10 and (state(tmp_path)["best_loss"] == math.inf) == (
        what[-9:] == "test_loss"
    )
    assert DDPM.load(tmp_path / "best_model.pt", "cpu").info["step"] == 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_flags):
    """A run that nobody interrupts, with an entry in the curves at every step at which it may be cut."""
    save_dir = tmp_path_factory.mktemp("whole")
    flags = [
        *SMALL,
        *data_flags,
        "--use_conditional_generation",
        "--log_every",
        10,
        "--dropout",
        0.1,
    ]
    assert train_eval.main([*map(str, flags), "--save_dir", str(save_dir)]) == 0
    return save_dir, flags


def test_ctrl_c_in_a_look_waits_for_it_and_the_run_goes_on_to_the_same_bits(
    whole, tmp_path, capsys, monkeypatch
):
    save_dir, flags = whole
    save_best = train_eval.save_best

    def pressed(run, value):
        if run.progress["step"] == 20:
            os.kill(os.getpid(), signal.SIGINT)
        save_best(run, value)

    with monkeypatch.context() as patch:
        patch.setattr(train_eval, "save_best", pressed)
        assert train_eval.main([*map(str, flags), "--save_dir", str(tmp_path)]) == 130
    assert (
        "stopped at step 21; everything is saved" in capsys.readouterr().out
    )  # the step after the look
    assert train_eval.main(["--resume", "--save_dir", str(tmp_path), *CPU]) == 0
    assert same(state(tmp_path), state(save_dir))
    assert same(
        *(
            torch.load(run / "best_model.pt", weights_only=True)["weights"]
            for run in (tmp_path, save_dir)
        )
    )


def test_without_any_test_loss_the_newest_weights_are_kept(whole, tmp_path, monkeypatch):
    """A run stopped before its first look left a best_model.pt; it must not stay because no test loss can be had."""

    def fail(*args):
        raise MemoryError

    save_dir, flags = whole
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log_config", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        assert train_eval.main([*map(str, flags), "--save_dir", str(tmp_path)]) == 130
    assert DDPM.load(tmp_path / "best_model.pt", "cpu").info["step"] == 1
    monkeypatch.setattr(train_eval, "test_loss", fail)
    monkeypatch.setattr(train_eval, "draw_final", lambda run: True)  # it measures the loss too
    assert train_eval.main(["--resume", "--save_dir", str(tmp_path), *CPU]) == 0
    assert DDPM.load(tmp_path / "best_model.pt", "cpu").info["step"] == 40


def test_ctrl_c_before_the_first_step_leaves_a_run_that_goes_on(whole, tmp_path, monkeypatch):
    save_dir, flags = whole
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log_config", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        assert train_eval.main([*map(str, flags), "--save_dir", str(tmp_path)]) == 130
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    assert train_eval.main(["--resume", "--save_dir", str(tmp_path), *CPU]) == 0
    assert same(state(tmp_path), state(save_dir))


def test_a_grid_is_drawn_before_its_step_is_saved(data_flags, tmp_path, monkeypatch):
    """Else a run that is killed between the two goes on without it."""
    save, found = train_eval.save_last, []

    def saved(config, state, progress):
        found.append((tmp_path / "samples" / f"step_{progress['step']:07d}.png").exists())
        save(config, state, progress)

    monkeypatch.setattr(train_eval, "save_last", saved)
    monkeypatch.setattr(train_eval, "draw_final", lambda run: True)
    flags = [*SMALL, *data_flags, "--save_dir", tmp_path, "--epochs", 1]
    assert train_eval.main([*map(str, flags)]) == 0
    assert found == [True] * 2  # at steps 10 and 20


def test_two_runs_in_one_folder(trained, tmp_path, capsys):
    """The second is refused and leaves the folder as it was; evaluating a run that goes on is allowed."""
    save_dir, flags, _ = trained
    before = {path: path.stat().st_mtime_ns for path in save_dir.rglob("*")}
    with RunFolder(save_dir, new=False):
        line = refused(capsys, *flags, "--save_dir", save_dir)
        assert f"in use by process {os.getpid()}" in line and "another --save_dir" in line
        assert "in use by" in refused(capsys, "--resume", "--save_dir", save_dir)
    assert {path: path.stat().st_mtime_ns for path in save_dir.rglob("*")} | before == before


def test_divergence_stops_the_run_names_the_step_and_keeps_the_checkpoint(
    tmp_path, data_flags, capsys
):
    with pytest.raises(SystemExit) as exit_:
        train_eval.main(
            [
                *SMALL,
                *data_flags,
                "--save_dir",
                str(tmp_path),
                "--learning_rate",
                "1e30",
                "--grad_clip=0",
            ]
        )
    err = capsys.readouterr().err
    assert exit_.value.code == 3 and "Training has diverged" in err and "\nstep " in err
    if (tmp_path / "last.pt").exists():
        assert all(torch.isfinite(w).all() for w in state(tmp_path)["network"].values())


def test_help_shows_every_constant_with_its_comment_and_value():
    done = run("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    tree = ast.parse((ROOT / "train_eval.py").read_text())
    first = [
        getattr(node.targets[0], "id", None) for node in tree.body if isinstance(node, ast.Assign)
    ]
    constants = read_constants({})
    assert list(constants) == [name for name in first[: len(constants) + 1] if name != "cuda"]
    for name, (group, value, comment) in constants.items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        assert f"--{name}" in text and f"{comment} (default: {shown})" in text, name
        assert comment and f"{group}:" in text
        assert getattr(train_eval, name) == value


def test_flags_stand_in_for_constants_of_every_type():
    config, given = train_eval.configure(
        [
            "--epochs",
            "3",
            "--learning_rate",
            "3e-4",
            "--channel_mult",
            "1,2,4",
            "--attention_resolutions",
            "none",
            "--no-use_scheduler",
            "--use_augmentation",
            "--beta_schedule",
            "linear",
            "--data_dir",
            "x",
        ]
    )
    assert (
        config.epochs,
        config.learning_rate,
        config.channel_mult,
        config.attention_resolutions,
    ) == (3, 3e-4, (1, 2, 4), ())
    assert (
        config.use_scheduler,
        config.use_augmentation,
        config.beta_schedule,
        config.data_dir,
    ) == (False, True, "linear", "x")
    assert given == {
        "epochs",
        "learning_rate",
        "channel_mult",
        "attention_resolutions",
        "use_scheduler",
        "use_augmentation",
        "beta_schedule",
        "data_dir",
    }


def test_the_device_decides_the_values_below_it():
    """On CUDA the constants are the reference's, and `--device cpu` brings the CPU's, wherever the script runs."""
    constants = read_constants({"device": "cuda", "bf16": True})
    values = {name: value for name, (_, value, _) in constants.items()}
    reference = dict(
        batch_size=16,
        epochs=50,
        learning_rate=1e-4,
        weight_decay=1e-4,
        adam_beta2=0.999,
        use_scheduler=True,
        image_size=32,
        channels=3,
        num_timesteps=1000,
        base_channels=128,
        num_res_blocks=2,
        channel_mult=(1, 2, 4, 8),
        dropout=0.1,
        time_emb_dim=512,
        attention_resolutions=(8, 16),
        patch_size=1,
        use_conditional_generation=False,
        ema_decay=0.999,
        ema_start=5000,
        ema_update_rate=1,
        train_size=60_000,
        test_size=10_000,
        use_augmentation=True,
        beta_schedule="linear",
        prediction="eps",
        loss="mse",
        sampler="ddpm",
        sample_steps=1000,
        warmup_steps=0,
        target_references=0,
        timestep_sampling="uniform",
    )
    assert {name: values[name] for name in reference} == reference
    config, _ = train_eval.configure(["--device", "cpu"])
    assert config.patch_size == 2 and config.prediction == "x0"
    assert (config.sampler, config.sample_steps, config.target_references) == ("sde-dpm++", 6, 4096)
    assert config.timestep_std == 1.0
    config, _ = train_eval.configure(
        ["--device", "cpu", "--no-use_conditional_generation", "--loss", "l1"]
    )
    assert (config.sampler, config.sample_steps, config.target_references) == ("sde-dpm++", 6, 0)
    assert (
        config.timestep_std == 0.8 and config.num_clusters == 256 and config.guidance_scale == 1.1
    )
    config, _ = train_eval.configure(
        ["--device", "cpu", "--no-use_conditional_generation", "--num_clusters", "0"]
    )
    assert (config.sample_steps, config.guidance_scale, config.timestep_std) == (25, 1, 0.6)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--epoch", "3"], ["--epoch: unknown", "did you mean --epochs?"]),
        (["--base-channels=32"], ["--base-channels=32: unknown", "did you mean --base_channels?"]),
        (["--no_use_scheduler"], ["did you mean --no-use_scheduler?"]),
        (["--zzzz"], ["--zzzz", "--help"]),
        (["out.png"], ["out.png"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
        (["--epochs", "0"], ["epochs 0", "at least 1"]),
        (["--channel_mult", "1,x"], ["--channel_mult", "'1,x'"]),
        (["--beta_schedule", "sqrt"], ["--beta_schedule", "'sqrt'", "cosine"]),
        (["--learning_rate", "nan"], ["learning_rate nan"]),
        (["--learning_rate", "-1"], ["learning_rate -1"]),
        (["--batch_size", "0"], ["batch_size 0"]),
        (["--grad_clip", "-1"], ["grad_clip -1"]),
        (["--seed", "-1"], ["seed -1"]),
        (["--dropout", "1"], ["dropout 1"]),
        (["--channels", "0"], ["channels 0"]),
        (["--device", "abacus"], ["device 'abacus'"]),
        (["--ema_decay", "1.5"], ["ema_decay 1.5"]),
        (["--base_channels", "50"], ["base_channels 50", "multiple of 32"]),
        (["--attention_resolutions", "7"], ["attention_resolutions 7"]),
        (["--sample_steps", "1001"], ["steps 1001"]),
        (["--preview_steps", "1001"], ["preview_steps 1001"]),
        (["--guidance_scale", "nan"], ["guidance_scale nan"]),
        ([*UNLABELLED, "--guidance_scale", "2"], ["guidance_scale 2.0", "needs labels"]),
        (["--channels", "2"], ["channels 2", "1 (grey) or 3 (RGB)"]),
        (["--channels", "5"], ["channels 5", "at most 3"]),
        (["--device", "meta"], ["device 'meta'"]),
        (["--resume", "--evaluate"], ["resume and evaluate"]),
        (["--log_every", "1000000000000"], ["log_every 1000000000000", "at most"]),
        (["--train_size", "0"], ["train_size 0"]),
        (["--num_timesteps", "0"], ["num_timesteps 0"]),
        (["--warmup_steps", "-1"], ["warmup_steps -1"]),
        (["--timestep_std", "-0.5"], ["timestep_std -0.5"]),
        (["--target_references", "-1"], ["target_references -1"]),
        (
            ["--target_references", "9", "--loss", "l1"],
            ["target_references 9 with loss 'l1'", "expected 0"],
        ),
    ],
)
def test_a_bad_flag_is_one_clear_line(capsys, tmp_path, flags, words):
    device = [] if "--device" in flags else ["--device", "cpu"]
    line = refused(capsys, *flags, *device, "--dataset", "glyphs", "--save_dir", tmp_path / "new")
    assert all(word in line for word in words), line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "edit, words",
    [
        ("epochs = 2.0", "epochs 2.0: expected a whole number"),
        ("attention_resolutions = (8)", "attention_resolutions 8"),
        ("batch_size = -4", "batch_size -4"),
        (
            "timestep_sampling = 'logitnormal'",
            "timestep_sampling 'logitnormal': expected one of uniform, logit-normal",
        ),
    ],
)
def test_a_constant_edited_to_what_it_cannot_be_is_one_clear_line(tmp_path, edit, words):
    done = subprocess.run(
        [sys.executable, edited(tmp_path, edit), "--dataset", "glyphs"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )


def edited(folder, *lines):
    """The script with lines added at the end of its constants."""
    shutil.copytree(ROOT / "support", folder / "support")
    for path in ROOT.glob("*.py"):
        text = path.read_text().replace(
            "# end of constants", "\n".join([*lines, "# end of constants"]), 1
        )
        (folder / path.name).write_text(text)
    return str(folder / "train_eval.py")


def test_constants_are_edited_as_any_python(tmp_path):
    script = edited(
        tmp_path,
        "epochs += 5",
        "if device:",
        "    batch_size = 7",
        "channel_mult = (  # width # of levels",
        "    1,",
        "    3,",
        ")",
        'data_dir = "a#b"  # another folder',
        "steps: int = 3  # my own",
    )
    code = (
        "import train_eval; c = train_eval.configure(['--epochs', '4'])[0]; "
        "d = train_eval.configure([])[0]; "
        "print(c.epochs, d.epochs, c.batch_size, c.channel_mult, c.data_dir, c.steps)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(script).parent, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[0] == f"4 {train_eval.epochs + 5} 7 (1, 3) a#b 3", done.stderr


def test_a_missing_checkpoint_or_a_flag_that_differs_is_one_clear_line(trained, capsys, tmp_path):
    save_dir, _, _ = trained
    assert "last.pt: no such" in refused(capsys, "--resume", "--save_dir", tmp_path)
    assert "best_model.pt: no such" in refused(capsys, "--evaluate", "--save_dir", tmp_path)
    line = refused(capsys, "--resume", "--save_dir", save_dir, "--base_channels", 64)
    assert "base_channels 64" in line and "32" in line
    DDPM(UNet(base_channels=32, channel_mult=(1,), patch_size=4, attention_resolutions=())).save(
        tmp_path / "best_model.pt"
    )
    assert "not written by train_eval.py" in refused(capsys, "--evaluate", "--save_dir", tmp_path)
    (tmp_path / "last.pt").write_bytes((save_dir / "last.pt").read_bytes()[:3000])
    assert "not a readable checkpoint" in refused(capsys, "--resume", "--save_dir", tmp_path)


def test_no_data_and_bad_data_are_one_clear_line(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, *SMALL, "--dataset", "mnist", "--data_dir", tmp_path / "file")
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"")
    line = refused(
        capsys,
        *SMALL,
        "--dataset",
        "mnist",
        "--data_dir",
        tmp_path / "data",
        "--save_dir",
        tmp_path / "s",
    )
    assert "-ubyte" in line and not (tmp_path / "s").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_line(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "save_dir" in refused(
        capsys, *SMALL, "--dataset", "glyphs", "--save_dir", tmp_path / "file"
    )


def test_glyphs_stand_in_for_missing_mnist_with_a_warning_at_both_ends(
    tmp_path, monkeypatch, capsys
):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (
        train_eval.main(
            [
                *SMALL,
                "--dataset",
                "auto",
                "--data_dir",
                str(tmp_path / "none"),
                "--save_dir",
                str(tmp_path / "run"),
                "--epochs",
                "1",
            ]
        )
        == 0
    )
    assert capsys.readouterr().err.count("THIS IS NOT MNIST") == 2
    assert (
        DDPM.load(tmp_path / "run" / "best_model.pt", "cpu").info["config"]["dataset"] == "glyphs"
    )
    monkeypatch.setattr(
        metrics, "train_classifier", lambda *args, **options: metrics.Classifier(10)
    )
    assert (
        train_eval.main(
            [
                "--evaluate",
                "--save_dir",
                str(tmp_path / "run"),
                *CPU,
                "--bound_images",
                "2",
                "--bound_terms",
                "2",
            ]
        )
        == 0
    )
    again = capsys.readouterr()
    assert again.err.count("THIS IS NOT MNIST") == 2 and "images of glyphs" in again.out


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_every_option_that_trains_trains(device, tmp_path, data_flags):
    for i, options in enumerate(
        (
            "--prediction eps --beta_schedule linear --loss l1 --no-use_scheduler --channels 1 --bf16",
            "--prediction x0 --grad_clip 0 --patch_size 1 --channel_mult 1,1 --attention_resolutions 8 --image_size 16",
            "--num_timesteps 50 --sample_steps 50 --sampler ddim --ema_update_rate 3 --batch_size 50",
        )
    ):
        flags = [
            *SMALL,
            *data_flags,
            *options.split(),
            "--device",
            device,
            "--epochs",
            1,
            "--train_size",
            40,
            "--test_size",
            10,
            "--num_samples",
            2,
        ]  # few: a CPU without bf16 is slow at it
        assert train_eval.main([*map(str, flags), "--save_dir", str(tmp_path / str(i))]) == 0
