"""The script: its steps called directly, and whole runs of it in this process."""

import io
import json
import math
import shutil
import signal
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import configured
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import FLAGS, same
from torch import nn
from torchvision.utils import make_grid

import metrics
import train_eval
from diffusion import DDPM
from support import console, monitor, pictures, processes
from support.monitor import Monitor

UNLABELLED = "--no-use_conditional_generation --num_clusters 0 --guidance_scale 1".split()


def run(*flags):
    """The script with the smallest run's flags and these. Returns the exit status."""
    return train_eval.main([*FLAGS, *map(str, flags)])


def again(folder, *flags):
    """The script for the run in a folder, as --resume and --evaluate need it."""
    where = ["--save_dir", folder, "--device", "cpu", "--no-bf16"]
    return train_eval.main([*map(str, [*where, *flags])])


def last_of(folder):
    """last.pt of a run."""
    return torch.load(folder / "last.pt", weights_only=True)


def prepared(*flags):
    """What training needs, for the smallest run with these flags; no layer's weights are zeros."""
    chosen = configured(*FLAGS, *flags)
    run = train_eval.prepare(chosen.config, chosen.script)
    for parameter in run.ddpm.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return run


@pytest.fixture
def without_plots(monkeypatch):
    """loss_curve.png takes as long as the smallest run."""
    monkeypatch.setattr(pictures, "plot_losses", lambda *args: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_flags):
    """A finished run of 40 steps with every option that takes part in the bits, shared by tests.

    Its folder, its flags, and what it printed.
    """
    folder = tmp_path_factory.mktemp("trained")
    flags = [*data_flags, *"--use_augmentation --dropout 0.1 --num_heads 2 --ema_start 5".split()]
    flags += "--variance learned --timestep_sampling importance --num_timesteps 10".split()
    flags += "--num_samples 70 --warmup_steps 3 --sample_every 10 --save_every 15".split()
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        assert run(*flags, "--save_dir", folder) == 0
    said = {"out": out.getvalue(), "err": err.getvalue()}
    return SimpleNamespace(folder=folder, flags=flags, **said)


# What a run leaves


def test_a_run_leaves_everything_that_it_promises(trained):
    everything = {path.name for path in trained.folder.iterdir()}
    assert everything == {"best_model.pt", "last.pt", "last.previous.pt", "loss_curve.png"} | {
        "samples",
        "tensorboard_logs",
    }
    grids = {f"step_{step:07d}.png" for step in (10, 20, 30, 40)} | {"real.png", "final.png"}
    names = {path.name for path in (trained.folder / "samples").iterdir()}
    assert names == grids | {"denoising.gif", "training.gif"}
    for name in grids:  # seven rows of ten: a column a digit
        assert Image.open(trained.folder / "samples" / name).size == (10 * 18 + 2, 7 * 18 + 2)
    assert last_of(trained.folder)["step"] == 40  # which save_every does not divide


def test_a_run_says_what_it_does_and_what_to_do_next(trained):
    for words in ("160 images to train, 80 to test", "with labels", "device: cpu", "recipe quick"):
        assert words in trained.out
    for words in ("test loss ", "(40 images of mnist", "of 70 read as the digit asked for"):
        assert words in trained.out
    for words in ("train_eval.py --evaluate", "--resume --epochs 4", "tensorboard --logdir"):
        assert words in trained.out
    assert trained.out.splitlines()[-1].endswith("minutes, everything included")
    lines = trained.err.splitlines()  # no terminal: lines, and few of them
    assert "\r" not in trained.err and len(lines) < 5 and "minutes to go" in trained.err
    assert lines[-1].startswith("training: 320 of 320 images, ")
    assert "loss=" in lines[-1] and "frechet=" in lines[-1]


def test_the_curves_of_a_run_are_in_last_pt_and_the_loss_falls(trained):
    last = last_of(trained.folder)
    batches = dict(last["train_curve"])
    assert sorted(batches) == sorted({*range(4, 41, 4), 10, 15, 30}), "entries, looks and saves"
    for name in ("test", "fixed", "frechet"):
        assert [step for step, _ in last[f"{name}_curve"]] == [10, 20, 30, 40]
    assert batches[40] < 0.9 * batches[4]
    (log,) = (trained.folder / "tensorboard_logs").iterdir()
    rates = EventAccumulator(str(log)).Reload().Scalars("train/learning_rate")
    config = configured(*FLAGS, *trained.flags).config
    expected = {step: train_eval.learning_rate_at(config, step - 1, 40) for step in batches}
    assert {event.step: event.value for event in rates} == pytest.approx(expected)
    state = last["timesteps"]
    assert state["counts"].sum() == 320 and state["losses"].all(), "importance learns from all"


def test_best_model_has_the_ema_weights_of_the_lowest_test_loss(trained):
    best, last = DDPM.load(trained.folder / "best_model.pt", "cpu"), last_of(trained.folder)
    losses = {step: loss for step, loss in last["test_curve"]}
    assert best.info["test_loss"] == last["best_loss"] == min(losses.values())
    assert best.info["step"] == 40 and losses[40] == last["best_loss"]
    assert same(dict(best.network.state_dict()), dict(last["ema"]["shadow"]))
    assert not same(dict(best.network.state_dict()), dict(last["network"]))
    assert best.sample_steps == 2 and best.info["config"]["use_conditional_generation"] is True


def test_grids_during_training_are_of_the_ema_weights_and_measured(trained, data_flags):
    """The last grid, drawn again from best_model.pt, which has the same weights."""
    config = configured(*FLAGS, *trained.flags).config
    best = DDPM.load(trained.folder / "best_model.pt", "cpu")
    how = {"sampler": "sde-dpm++", "steps": 2, "guidance_scale": 1.0}
    images, _ = train_eval.draw(config, best, 70, **how)
    drawn = np.array(Image.open(trained.folder / "samples" / "step_0000040.png"))
    expected = 255 * make_grid((images + 1) / 2, nrow=10).clamp(0, 1)
    assert (torch.from_numpy(drawn).permute(2, 0, 1) - expected).abs().max() < 1
    train, test = train_eval.load_images(config)
    classifier = train_eval.load_classifier(config, train)
    features = [classifier.read(x)[0] for x in (metrics.as_bytes(images), test.images)]
    found = dict(last_of(trained.folder)["frechet_curve"])[40]
    assert found == pytest.approx(metrics.frechet_distance(*features), rel=1e-6)


# The same run again


def test_a_run_stopped_twice_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch, capsys):
    """Ctrl-C before the first step, then in the look at step 20, then on to the end."""
    log_config, look = Monitor.log_config, train_eval.look

    def press(*args):
        signal.raise_signal(signal.SIGINT)
        log_config(*args)

    def press_in_the_look(run, watch):
        if run.progress["step"] == 20:
            signal.raise_signal(signal.SIGINT)
        look(run, watch)

    monkeypatch.setattr(Monitor, "log_config", press)
    assert run(*trained.flags, "--save_dir", tmp_path) == 130
    assert last_of(tmp_path)["step"] == 1
    assert DDPM.load(tmp_path / "best_model.pt", "cpu").info["step"] == 1
    monkeypatch.setattr(train_eval, "look", press_in_the_look)
    assert again(tmp_path, "--resume") == 130
    out = capsys.readouterr().out
    assert "stopped at step 21; everything is saved" in out  # the step after the look
    assert f"python train_eval.py --resume --save_dir={tmp_path}" in out
    monkeypatch.undo()
    assert again(tmp_path, "--resume") == 0
    found, expected = last_of(tmp_path), last_of(trained.folder)
    for last in (found, expected):
        last["config"] = {**last["config"], "save_dir": None, "data_dir": None}
        del last["log"], last["train_curve"]  # it has entries where the run was stopped
    assert found.keys() == expected.keys()
    assert [name for name in found if not same(found[name], expected[name])] == []
    for name in ("samples/final.png", "samples/training.gif"):
        assert (tmp_path / name).read_bytes() == (trained.folder / name).read_bytes()


def test_another_seed_is_another_run(data_flags):
    def start(seed):
        run = prepared(*data_flags, "--seed", seed)
        x0, y = next(run.train_images.epoch(8, 0))
        return run.ddpm.state_dict(), x0, y, torch.rand(3)

    assert same(start(0), start(0))
    assert not any(map(same, start(0), start(1)))


def test_a_finished_run_can_be_made_longer(trained, tmp_path, capsys, without_plots):
    shutil.copytree(trained.folder, tmp_path / "run")
    assert again(tmp_path / "run", "--resume", "--epochs", 3) == 0
    assert "changed since this run began: epochs 2 -> 3\n" in capsys.readouterr().out
    last = last_of(tmp_path / "run")
    assert last["step"] == 60 and last["config"]["epochs"] == 3 and last["script"]
    assert [step for step, _ in last["test_curve"]] == [10, 20, 30, 40, 50, 60]
    config = SimpleNamespace(**last["config"])  # the cosine is that of the longer run
    (group,) = last["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(train_eval.learning_rate_at(config, 59, 60))


# What a training step does


@pytest.mark.parametrize("steps, warmup, limited", [(60, 0, 1), (60, 4, 4), (60, 9, 6), (5, 9, 1)])
@pytest.mark.parametrize("cosine", [True, False])
def test_the_learning_rate_is_linear_lr_times_cosine_annealing_lr(steps, warmup, limited, cosine):
    config = SimpleNamespace(learning_rate=3e-4, warmup_steps=warmup, use_scheduler=cosine)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 1 / limited, total_iters=limited)]
    if cosine:
        schedulers.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))
    for step in range(steps + 1):
        expected = pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        assert train_eval.learning_rate_at(config, step, steps) == expected
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def test_adamw_has_the_constants_and_its_fused_form(data_flags):
    run = prepared(*data_flags, "--weight_decay", 0.03, "--adam_beta2", 0.9)
    (group,) = run.parts["optimizer"].param_groups
    assert type(run.parts["optimizer"]) is torch.optim.AdamW and group["fused"]
    assert group["weight_decay"] == 0.03 and group["betas"] == (0.9, 0.9)


@pytest.mark.parametrize("clip, parts", [(0, 1), (0.01, 1), (0.01, 3)])
def test_a_step_descends_the_weighted_mean_of_the_losses(data_flags, clip, parts):
    """One step of plain SGD against autograd; then come the average and the timesteps' sampler."""
    flags = ["--grad_clip", clip, "--grad_accumulation", parts, "--target_references", 0]
    run = prepared(*data_flags, *UNLABELLED, *flags)
    drawn, taken = (torch.arange(8) * 2, torch.arange(8) / 4), []
    run.parts["timesteps"] = SimpleNamespace(
        sample=lambda n: drawn, update=lambda *args: taken.append(args)
    )
    parameters = list(run.ddpm.parameters())
    run.parts["optimizer"] = torch.optim.SGD(parameters, lr=9.0)
    x0, y = run.train_images.batch(slice(8))
    before = [p.detach().clone() for p in parameters]
    shadow = [p.clone() for p in run.parts["ema"].shadow.parameters()]
    torch.manual_seed(0)
    expected = run.ddpm.losses(x0, None, drawn[0], torch.randn_like(x0))
    gradients = torch.autograd.grad((drawn[1] * expected).mean(), parameters)
    size = torch.cat([g.flatten() for g in gradients]).norm()
    torch.manual_seed(0)
    losses, weights, t, norm = train_eval.train_step(run, run_model(run), x0, y, 0.5)
    assert same((t, weights), drawn) and same(taken[0], (t, losses))
    close = dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((losses, norm), (expected.detach(), size), **close)
    assert size > 0.01
    rate = 0.5 * (clip / size if clip else 1)
    averages = run.parts["ema"].shadow.parameters()
    for p, old, gradient, average, past in zip(parameters, before, gradients, averages, shadow):
        torch.testing.assert_close(p.detach(), old - rate * gradient, **close)
        torch.testing.assert_close(average, past.lerp(p.detach(), 9 / 11), **close)
        assert p.grad is None or not p.grad.any()


def run_model(run):
    """The model as `train` hands it to `train_step`."""
    return processes.parallel(run.ddpm).train()


LABELS = {  # flags: the label of 'no label'
    "--use_conditional_generation": 10,
    "--no-use_conditional_generation --num_clusters 6": 6,
    " ".join(UNLABELLED): None,
}


@pytest.mark.parametrize("flags, no_label", LABELS.items())
def test_the_network_is_told_the_labels_but_for_a_share(data_flags, flags, no_label):
    run, seen = prepared(*data_flags, *flags.split(), "--label_dropout", 0.5), []
    run.ddpm.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs))
    x0, y = run.train_images.batch(slice(80))
    _, _, t, _ = train_eval.train_step(run, run_model(run), x0, y, 0.0)
    ((_, t_seen, y_seen),) = seen
    assert torch.equal(t_seen, t)
    if no_label is None:
        assert y_seen is None
    else:
        dropped = y_seen == no_label
        assert torch.equal(y_seen[~dropped], y[~dropped]) and 20 < dropped.sum() < 60
        assert len(y.unique()) == no_label


def test_a_step_has_candidates_of_its_own_from_the_training_images(data_flags):
    run, model = prepared(*data_flags, "--channels", 3, "--target_references", 50), []
    x0, y = run.train_images.batch(slice(8))
    drawn = [train_eval.draw_candidates(run.config, run.train_images, x0, y) for _ in range(2)]
    (batch, others), labels = drawn[0]
    assert torch.equal(batch, x0[:, :1]) and torch.equal(labels[:8], y)
    assert len(others) == 50 and not same(others, drawn[1][0][1])
    every = run.train_images.batch(slice(None))[0][:, :1]
    index = torch.cdist(others.flatten(1), every.flatten(1)).argmin(dim=1)
    assert same((others, labels[8:]), (every[index], run.train_images.y[index]))
    assert len(index.unique()) > 30

    class Model(nn.Module):
        def forward(self, *batch):
            model.append(batch[4])
            return run.ddpm.losses(*batch)

    torch.manual_seed(0)
    expected = train_eval.draw_candidates(run.config, run.train_images, x0, y)
    torch.manual_seed(0)
    stand_in = Model()
    stand_in.ddpm = run.ddpm
    train_eval.train_step(run, stand_in, x0, y, 0.0)
    assert same(model[0], expected)
    run.config.target_references = 0
    assert train_eval.draw_candidates(run.config, run.train_images, x0, y) is None


def test_in_bf16_loss_and_gradient_are_those_of_float32_within_its_error(data_flags):
    run, found = prepared(*data_flags, "--target_references", 0), {}
    x0, y = run.train_images.batch(slice(16))
    t, eps, weights = torch.arange(16), torch.randn_like(x0), torch.ones(16)
    for bf16 in (False, True):
        run.config.bf16 = bf16
        loss = train_eval.backward(run.config, run_model(run), x0, y, t, eps, weights).mean()
        gradient = torch.cat([p.grad.flatten() for p in run.ddpm.parameters()])
        found[bf16] = loss.item(), gradient
        run.ddpm.zero_grad()
    (loss, gradient), (coarse, coarse_gradient) = found.values()
    assert 0 < abs(coarse - loss) < 0.01 * loss
    assert 0 < (coarse_gradient - gradient).norm() < 0.05 * gradient.norm()
    assert loss == run.ddpm.losses(x0, y, t, eps).mean()


def test_every_constant_of_the_model_reaches_it(data_flags):
    flags = dict(num_heads=2, patch_size=2, prediction="v", beta_schedule="cosine", loss="l1")
    flags |= dict(target_references=0, variance="learned", timestep_spacing="linspace")
    flags |= dict(timestep_sampling="uniform", sampler="dpm++", sample_steps=7, num_timesteps=50)
    flags |= dict(guidance_scale=2.5, label_dropout=0.2, timestep_std=0.3, ema_decay=0.5)
    flags |= dict(ema_start=7, ema_update_rate=3)
    run = prepared(*data_flags, *(f"--{name}={value}" for name, value in flags.items()))
    places = [vars(run.ddpm), run.ddpm.network.config, vars(run.parts["timesteps"])]
    places.append({f"ema_{name}": value for name, value in vars(run.parts["ema"]).items()})
    places.append(vars(run.config))
    for name, value in flags.items():
        found = next(place[name] for place in places if name in place)
        assert found == value, name
    assert run.ddpm.network.config["out_channels"] == 2 and run.ddpm.num_classes == 10
    assert type(run.parts["timesteps"]).__name__ == "UniformSampler"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_step_never_waits_for_the_device(data_flags):
    flags = ["--device", "cuda", "--bf16", "--timestep_sampling", "importance"]
    run = prepared(*data_flags, *flags)
    model, stats = run_model(run), run.parts["stats"]
    batches = list(run.train_images.epochs(8, 1))[:6]
    for k, (x0, y) in enumerate(batches):
        if k == 3:  # the allocator and the kernels have had their say
            stats.start()
            torch.cuda.set_sync_debug_mode("error")
        try:
            stats.add(*train_eval.train_step(run, model, x0, y, 1e-3))
        finally:
            torch.cuda.set_sync_debug_mode("default" if k in (2, 5) else "error" if k > 2 else 0)
