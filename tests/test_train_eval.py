"""The script: its steps called directly, and whole runs of it in this process."""

import io
import json
import math
import shutil
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from types import SimpleNamespace

import experiments
import numpy as np
import pytest
import torch
from conftest import configured
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import FLAGS, OwnNetwork, gaussian, same
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

import metrics
import train_eval
from dataprocess import Images
from diffusion import DDPM
from support import checkpoint, configurator, console, pictures, processes
from timesteps import UniformSampler

PICTURES = ["denoising.gif", "process.png"]  # of README
UNLABELLED = "--no-use_conditional_generation --num_clusters 0 --guidance_scale 1".split()
CLUSTERS = "--no-use_conditional_generation --num_clusters 6".split()


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
    """What `train` begins with, for the smallest run with these flags; no layer is all zeros."""
    chosen = configured(*FLAGS, *flags)
    run = train_eval.prepare(chosen.config, chosen.script)
    for parameter in run.ddpm.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    run.model = processes.parallel(run.ddpm).train()
    return run


@pytest.fixture
def without_plots(monkeypatch):
    """loss_curve.png takes as long as the smallest run."""
    monkeypatch.setattr(pictures, "plot_losses", lambda *args: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_flags):
    """A finished run of 40 steps that tests share, with all options that take part in the bits."""
    folder = tmp_path_factory.mktemp("trained")
    options = "--use_augmentation --dropout 0.1 --num_heads 2 --ema_start 5 --variance learned "
    options += "--timestep_sampling importance --num_timesteps 10 --num_samples 70 "
    options += "--warmup_steps 3 --sample_every 10 --save_every 15"
    flags = [*data_flags, *options.split()]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        assert run(*flags, "--save_dir", folder) == 0
    return SimpleNamespace(folder=folder, flags=flags, out=out.getvalue(), err=err.getvalue())


# What a run leaves


def test_a_run_leaves_everything_that_it_promises(trained):
    names = {".lock", "best_model.pt", "last.pt", "last.previous.pt", "loss_curve.png"}
    names |= {"samples", "tensorboard_logs"}
    assert {path.name for path in trained.folder.iterdir()} == names
    grids = {f"step_{step:07d}.png" for step in (10, 20, 30, 40)} | {"real.png", "final.png"}
    names = {path.name for path in (trained.folder / "samples").iterdir()}
    assert names == grids | {"denoising.gif", "training.gif"}
    for name in grids:  # seven rows of ten: a column a digit
        assert Image.open(trained.folder / "samples" / name).size == (10 * 18 + 2, 7 * 18 + 2)
    assert last_of(trained.folder)["step"] == 40  # which save_every does not divide


def test_a_run_says_what_it_does_and_what_to_do_next(trained):
    said = ["160 images to train, 80 to test, 10 labels, 0.00 GB", "device: cpu", "recipe quick"]
    said += ["test loss ", "(40 images of mnist", "of 70 read as the label asked for"]
    said += ["train_eval.py --evaluate", "--resume --epochs 4", "tensorboard --logdir"]
    assert [words for words in said if words not in trained.out] == []
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


def test_another_seed_is_another_run(data_flags):
    def start(seed):
        run = prepared(*data_flags, "--seed", seed)
        x0, y = next(run.train_images.epoch(8, 0))
        return run.ddpm.state_dict(), x0, y, torch.rand(3)

    assert same(start(0), start(0))
    assert not any(map(same, start(0), start(1)))


def test_one_command_begins_a_run_or_resumes_it(data_flags, tmp_path, capsys, without_plots):
    flags = [*data_flags, "--save_dir", tmp_path / "new", "--resume", "--epochs", 1]
    assert run(*flags) == 0
    assert f"nothing to resume in {tmp_path / 'new'}: a new run begins" in capsys.readouterr().out
    assert run(*flags) == 0
    out = capsys.readouterr().out
    assert "nothing to resume" not in out and "20 steps of 8 images, 20 done" in out


def test_a_finished_run_can_be_made_longer_not_shorter(trained, tmp_path, capsys, without_plots):
    shutil.copytree(trained.folder, tmp_path / "run")
    with pytest.raises(SystemExit):
        again(tmp_path / "run", *trained.flags[:2], "--resume", "--epochs", 1)
    assert "epochs 1: 20 steps, but the run in" in (line := capsys.readouterr().err)
    assert "has done 40; expected more epochs" in line and line.count("\n") == 1
    assert again(tmp_path / "run", *trained.flags[:2], "--resume", "--epochs", 3) == 0
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
    schedulers = [LinearLR(optimizer, 1 / limited, total_iters=limited)]
    if cosine:
        schedulers.append(CosineAnnealingLR(optimizer, steps))
    for step in range(steps + 1):
        expected = pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        assert train_eval.learning_rate_at(config, step, steps) == expected
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("clip, parts", [(0, 1), (0.01, 1), (0.01, 3)])
def test_a_step_descends_the_weighted_mean_of_the_losses(data_flags, clip, parts):
    """One step of plain SGD against autograd; then come the average and the timesteps' sampler."""
    flags = ["--grad_clip", clip, "--grad_accumulation", parts, "--target_references", 0]
    run = prepared(*data_flags, *UNLABELLED, *flags)
    drawn, taken = (torch.arange(8) * 2, torch.arange(8) / 4), []
    sampler = {"sample": lambda n: drawn, "update": lambda *args: taken.append(args)}
    run.parts["timesteps"] = SimpleNamespace(**sampler)
    parameters, calls = list(run.ddpm.parameters()), []
    run.parts["optimizer"] = torch.optim.SGD(parameters, lr=9.0)
    x0, y = run.train_images.batch(slice(8))
    before = [p.detach().clone() for p in parameters]
    shadow = [p.clone() for p in run.parts["ema"].shadow.parameters()]
    torch.manual_seed(0)
    expected = run.ddpm.losses(x0, None, drawn[0], torch.randn_like(x0))
    gradients = torch.autograd.grad((drawn[1] * expected).mean(), parameters)
    size = torch.cat([g.flatten() for g in gradients]).norm()
    torch.manual_seed(0)
    run.ddpm.network.register_forward_hook(lambda *call: calls.append(call))
    losses, weights, t, norm = train_eval.train_step(run, run.model, x0, y, 0.5)
    assert same((t, weights), drawn) and same(taken[0], (t, losses))
    close = dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((losses, norm), (expected.detach(), size), **close)
    assert size > 0.01 and len(calls) == parts
    rate = 0.5 * (clip / size if clip else 1)
    averages = run.parts["ema"].shadow.parameters()
    for p, old, gradient, average, past in zip(parameters, before, gradients, averages, shadow):
        torch.testing.assert_close(p.detach(), old - rate * gradient, **close)
        torch.testing.assert_close(average, past.lerp(p.detach(), 9 / 11), **close)
        assert p.grad is None or not p.grad.any()


@pytest.mark.parametrize(
    "flags, no_label", [([], 10), (["--num_clusters", 10], 20), (CLUSTERS, 6), (UNLABELLED, None)]
)
def test_the_network_is_told_the_labels_but_for_a_share(data_flags, flags, no_label):
    run, seen = prepared(*data_flags, *flags, "--label_dropout", 0.4), []
    run.ddpm.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs))
    x0, y = run.train_images.batch(slice(80))
    _, _, t, _ = train_eval.train_step(run, run.model, x0, y, 0.0)
    ((_, t_seen, y_seen),) = seen
    assert torch.equal(t_seen, t) and (y_seen is None) == (no_label is None)
    if y_seen is not None:
        dropped = y_seen == no_label
        told = (y_seen == y) | (y_seen == run.ddpm.label_of[y])
        assert told[~dropped].all() and 5 < dropped.sum() < 60
        assert len(y.unique()) == (6 if flags == CLUSTERS else 10)


def test_a_step_has_candidates_of_its_own_from_the_training_images(data_flags):
    run, seen = prepared(*data_flags, "--channels", 3, "--target_references", 50), []
    x0, y = run.train_images.batch(slice(8))
    drawn = [train_eval.draw_candidates(run.config, run.train_images, x0, y) for _ in range(2)]
    (batch, others), labels = drawn[0]
    assert torch.equal(batch, x0[:, :1]) and torch.equal(labels[:8], y)
    assert len(others) == 50 and not same(others, drawn[1][0][1])
    every = run.train_images.batch(slice(None))[0][:, :1]
    index = torch.cdist(others.flatten(1), every.flatten(1)).argmin(dim=1)
    assert same((others, labels[8:]), (every[index], run.train_images.y[index]))
    assert len(index.unique()) > 30
    losses = run.ddpm.losses
    run.ddpm.losses = lambda *batch: seen.append(batch[4]) or losses(*batch)
    torch.manual_seed(0)
    expected = train_eval.draw_candidates(run.config, run.train_images, x0, y)
    torch.manual_seed(0)
    train_eval.train_step(run, run.model, x0, y, 0.0)
    assert same(seen[0], expected)
    run.train_images.images = run.train_images.images.repeat(1, 3, 1, 1)  # as colours
    drawn, _ = train_eval.draw_candidates(run.config, run.train_images, x0, y)
    assert [x.shape[1] for x in drawn] == [3, 3]
    run.config.target_references = 0
    assert train_eval.draw_candidates(run.config, run.train_images, x0, y) is None


def test_in_bf16_loss_and_gradient_are_those_of_float32_within_its_error(data_flags):
    run, found = prepared(*data_flags, "--target_references", 0), {}
    x0, y = run.train_images.batch(slice(16))
    t, eps, weights = 4 + torch.arange(16), torch.randn_like(x0), torch.ones(16)
    for bf16 in (False, True):
        run.config.bf16 = bf16
        loss = train_eval.backward(run.config, run.model, x0, y, t, eps, weights).mean()
        gradient = torch.cat([p.grad.flatten() for p in run.ddpm.parameters()])
        found[bf16] = loss.item(), gradient
        run.ddpm.zero_grad()
    (loss, gradient), (coarse, coarse_gradient) = found.values()
    assert 0 < abs(coarse - loss) < 0.01 * loss  # bf16 is coarse beside the noise of t < 4
    assert 0 < (coarse_gradient - gradient).norm() < 0.15 * gradient.norm()
    assert loss == run.ddpm.losses(x0, y, t, eps).mean()


def test_every_constant_reaches_what_it_is_for(data_flags):
    flags = dict(num_heads=2, patch_size=2, prediction="v", beta_schedule="cosine", loss="l1")
    flags |= dict(target_references=0, variance="learned", timestep_spacing="linspace")
    flags |= dict(timestep_sampling="uniform", sampler="dpm++", sample_steps=7, num_timesteps=50)
    flags |= dict(guidance_scale=2.5, label_dropout=0.2, timestep_std=0.3, ema_decay=0.5)
    flags |= dict(ema_start=7, ema_update_rate=3, weight_decay=0.03, adam_beta2=0.9)
    run = prepared(*data_flags, *(f"--{name}={value}" for name, value in flags.items()))
    optimizer, ema = run.parts["optimizer"], vars(run.parts["ema"])
    (group,) = optimizer.param_groups
    found = vars(run.config) | {f"ema_{name}": value for name, value in ema.items()}
    found |= vars(run.parts["timesteps"]) | {"timestep_std": run.parts["timesteps"].std}
    found |= run.ddpm.network.config | vars(run.ddpm) | group | {"adam_beta2": group["betas"][1]}
    assert {name: found[name] for name in flags} == flags
    assert found["out_channels"] == 2 and found["num_classes"] == 10 and group["betas"][0] == 0.9
    assert type(optimizer) is torch.optim.AdamW and found["fused"]
    assert type(run.parts["timesteps"]) is UniformSampler


# Looks


def silent_watch(log_losses=lambda *losses: None):
    """A `Monitor` that shows and writes nothing."""
    others = dict.fromkeys(("log_samples", "log_frechet"), lambda *args: None)
    return SimpleNamespace(doing=nullcontext, log_losses=log_losses, **others)


def test_the_weights_of_the_lowest_test_loss_are_kept(data_flags, tmp_path, monkeypatch):
    run = prepared(*data_flags, "--save_dir", tmp_path)
    losses = {10: 3.0, 20: 2.0, 30: math.nan, 40: 2.5}

    def test_loss(config, ddpm, images):
        return losses[run.progress["step"]] if images is run.choosing_images else 9.0

    monkeypatch.setattr(train_eval, "test_loss", test_loss)
    logged, inside = [], [p.detach().clone() for p in run.ddpm.parameters()]
    for run.progress["step"] in losses:
        for average in run.parts["ema"].shadow.parameters():
            average.fill_(run.progress["step"] / 1000)
        train_eval.look(run, silent_watch(log_losses=lambda *both: logged.append(both)))
    best = DDPM.load(tmp_path / "best_model.pt", "cpu")
    assert best.info["step"] == 20 and best.info["test_loss"] == run.progress["best_loss"] == 2.0
    assert all((p == 0.02).all() for p in best.network.parameters())
    assert logged[:2] == [(9.0, 3.0), (9.0, 2.0)]  # training images, test images
    assert same(inside, [p.detach() for p in run.ddpm.parameters()])


FAILURES = {
    "test_loss": ("the test loss failed (MemoryError", MemoryError()),
    "draw": ("a grid of samples failed (RuntimeError: odd)", RuntimeError("odd\nlong story")),
    "metrics.as_bytes": ("a grid of samples failed (OSError", OSError(28, "No space left")),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_look_that_fails_is_one_warning(data_flags, tmp_path, capsys, monkeypatch, what):
    def fail(*args, **options):
        raise error

    words, error = FAILURES[what]
    monkeypatch.setattr(console, "WARNED", set())
    monkeypatch.setattr(f"train_eval.{what}", fail)
    run = prepared(*data_flags, "--save_dir", tmp_path)
    run.meter = lambda samples: 1.0
    run.meter.real = 0.0
    for run.progress["step"] in (10, 20):
        train_eval.look(run, silent_watch())
        assert all(part.training for part in run.model.modules()), "of the steps that follow"
    err = capsys.readouterr().err
    assert err.count(words) == err.count("the run goes on without it") == 1
    best = DDPM.load(tmp_path / "best_model.pt", "cpu").info
    if what == "test_loss":  # without any, the newest weights are kept
        assert best["step"] == 20 and run.progress["best_loss"] == math.inf
    else:
        assert best["step"] == 10 and best["test_loss"] == run.progress["best_loss"]


@pytest.mark.parametrize("flag", ["num_samples", "train_size", "test_size"])
def test_with_too_few_images_grids_are_not_measured(data_flags, capsys, monkeypatch, flag):
    monkeypatch.setattr(console, "WARNED", set())
    enough = ["--num_samples", 65, "--test_size", 65]
    assert train_eval.make_meter(prepared(*data_flags, *enough)).real > 0
    assert capsys.readouterr().err == ""
    assert train_eval.make_meter(prepared(*data_flags, *enough, f"--{flag}", 64)) is None
    assert "measuring grids, which needs more than 64 images, failed" in capsys.readouterr().err


# Measuring a model


@pytest.mark.parametrize("flags", [[], CLUSTERS])
def test_the_test_loss_is_a_mean_over_images_with_the_same_noise_each_time(flags):
    config, calls = configured(*FLAGS, *flags).config, []

    class Model(nn.Module):
        def losses(self, x0, y, t, eps):
            calls.append((x0, y, t, eps))
            assert not self.training, "dropout"
            return x0.mean(dim=(1, 2, 3))

    model, generator = Model().train(), torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (100, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images = Images("mnist", pixels, torch.arange(100) % 10, channels=1)
    found = [train_eval.test_loss(config, model, images) for state_moves_on in torch.rand(2)]
    assert model.training and found[0] == found[1]
    assert found[0] == pytest.approx(images.batch(slice(None))[0].double().mean().item())
    half = len(calls) // 2
    assert same(calls[:half], calls[half:])
    x0, y, t, eps = zip(*calls[:half])
    assert same(torch.cat(x0), images.batch(slice(None))[0])
    assert y == (None,) * half if flags else same(torch.cat(y), images.labels)
    even, t, eps = torch.arange(100) * 20 // 100, torch.cat(t), torch.cat(eps)
    assert same(t.sort().values, even) and not same(t, even)
    assert abs(eps.std() - 1) < 0.05 and len(eps.flatten(1)[:, 0].unique()) == 100


def test_for_the_bound_the_test_loss_is_an_estimate_of_bits_per_dim():
    config = configured(*FLAGS, *UNLABELLED, "--num_timesteps", 1000, "--loss", "vlb").config
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.randn(100, 1, 8, 8, generator=generator) * 12.75 + 165.75).round().byte()
    ddpm = gaussian(prediction="x0", loss="vlb", num_timesteps=1000)
    images = Images("mnist", pixels, torch.zeros(100, dtype=torch.int64), channels=1)
    bits = ddpm.bits_per_dim(images.batch(slice(None))[0], terms=100, seed=0).total
    assert train_eval.test_loss(config, ddpm, images) == pytest.approx(bits, rel=0.05)


def test_samples_are_of_the_digits_in_turn_and_of_the_same_noise_each_time():
    config, asked = configured("--device", "cpu", "--seed", 7).config, []

    def sample(n, y, **how):
        asked.append((n, y, how))
        return torch.full((n, 1, 2, 2), len(asked))

    def draw():
        asked.clear()
        images, y = train_eval.draw(config, model, 250, steps=3)
        assert images[:, 0, 0, 0].tolist() == [1] * 100 + [2] * 100 + [3] * 50
        return y, [labels for _, labels, _ in asked], [how.pop("seed") for *_, how in asked]

    model = SimpleNamespace(num_labels=10, sample=sample)
    y, labels, seeds = draw()
    assert y.tolist() == [*range(10)] * 25 and torch.equal(torch.cat(labels), y)
    assert len(set(seeds)) == 3 and draw()[2] == seeds
    assert [how for *_, how in asked] == [{"steps": 3}] * 3
    config.seed = 8
    assert not {*draw()[2]} & {*seeds}
    config.use_conditional_generation = False
    assert draw()[:2] == (None, [None] * 3)


def test_evaluation_measures_the_best_model_as_its_run_would(trained, tmp_path, capsys):
    shutil.copytree(trained.folder, tmp_path / "run")
    assert again(tmp_path / "run", *trained.flags[:2], "--evaluate") == 0
    out = capsys.readouterr().out
    (line,) = [line for line in trained.out.splitlines() if line.startswith("test loss")]
    assert line in out.splitlines()
    samples = tmp_path / "run" / "samples"
    assert (samples / "final-2.png").read_bytes() == (samples / "final.png").read_bytes()
    where = ["--save_dir", tmp_path / "run", *trained.flags[:2], "--device", "cpu", "--no-bf16"]
    spaced = train_eval.load_best(configured(*where, "--timestep_spacing", "linspace"))
    assert spaced[1].timestep_spacing == "linspace"
    config, best = train_eval.load_best(configured(*where))
    train, test = train_eval.load_images(config)
    seed = int(np.random.SeedSequence((0, 0)).generate_state(1)[0])  # of the first 100 images
    bits = best.bits_per_dim(*test.batch(slice(8)), terms=4, seed=seed)
    total, error = f"{bits.total:.4f}", f"{bits.standard_error:.4f}"
    assert f"\nbits per dimension given the label {total} +- {error}: prior {bits.prior:.4f}" in out
    assert "(8 images, 4 of 10 terms)" in out
    drawn, y = train_eval.draw(config, best, 80)
    classifier, drawn = train_eval.load_classifier(config, train), metrics.as_bytes(drawn)
    expected, _ = metrics.measure(classifier, drawn, train.images, test.images, y)
    expected |= {"bits_per_dim": bits.total, "step": 40, "steps": 2, "guidance_scale": 1.2}
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {name: written[name] for name in expected} == expected
    assert written["classifier_accuracy"] == classifier.accuracy(test.images, test.labels)
    (row,) = [line.split() for line in out.splitlines() if "Fréchet" in line]
    found = [f"{expected[name]:.3f}" for name in ("frechet", "frechet_real", "frechet_real_std")]
    assert row[-4:] == [*found[:2], "+-", found[2]]


def test_samples_become_files_that_measure_as_their_model_does(trained, tmp_path, capsys):
    shutil.copytree(trained.folder, tmp_path / "run")
    data, drawn = trained.flags[:2], tmp_path / "run" / "samples" / "drawn"
    for _ in range(2):
        assert again(tmp_path / "run", *data, "--sample", 70, "--guidance_scale", 1.5) == 0
    names = sorted(path.name for path in drawn.iterdir())
    assert names[:2] == ["00000_0.png", "00001_1.png"] and len(names) == 70
    assert Image.open(drawn / names[0]).size == (16, 16)
    assert drawn.with_suffix(".png").exists()
    again_ = drawn.with_name("drawn-2")
    assert all((drawn / name).read_bytes() == (again_ / name).read_bytes() for name in names)
    assert again(tmp_path / "run", *data, "--sample", 4, "--digits", "3,1") == 0
    names = [path.name for path in drawn.with_name("drawn-3").iterdir()]
    assert sorted(names) == ["00000_3.png", "00001_1.png", "00002_3.png", "00003_1.png"]
    flags = ["--evaluate", "--eval_samples", 70, "--guidance_scale", 1.5]
    assert again(tmp_path / "run", *data, *flags) == 0
    (log,) = (tmp_path / "run" / "tensorboard_logs").iterdir()
    assert (log / "evaluation").is_dir(), "other constants are a row of their own"
    (drawn / "notes.txt").write_text("")
    capsys.readouterr()
    sizes = "--train_size 160 --test_size 80 --image_size 16".split()
    where = ["--device", "cpu", "--save_dir", str(tmp_path / "run")]
    assert train_eval.main([*where, *data, *sizes, "--evaluate", str(drawn)]) == 0
    files = [tmp_path / "run" / f"evaluation{name}.json" for name in ("", "_drawn")]
    of_model, of_files = (json.loads(path.read_text()) for path in files)
    assert "left out, since they are not PNGs: notes.txt\n" in capsys.readouterr().out
    assert of_files.pop("samples_from") == str(drawn) and "accuracy" in of_model.keys()
    assert of_files == {name: of_model[name] for name in of_files}
    assert {"frechet", "precision", "nearest", "copies"} < of_files.keys()
    bad = {"--digits 3,10": "digits (3, 10): exp", "--sample_steps 11": "1 to 10"}
    for flags, words in bad.items():
        with pytest.raises(SystemExit):
            again(tmp_path / "run", *data, "--sample", 4, *flags.split())
        assert words in capsys.readouterr().err


def test_measures_are_printed_where_nothing_can_be_written(trained, tmp_path, capsys, monkeypatch):
    shutil.copytree(trained.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "samples")
    (tmp_path / "run" / "samples").write_text("in the way")
    monkeypatch.setattr(console, "WARNED", set())
    assert again(tmp_path / "run", *trained.flags[:2], "--evaluate") == 0
    out, err = capsys.readouterr()
    assert "Fréchet distance to the test set" in out and "bits per dimension" in out
    assert "writing the measures failed" in err and "writing a picture failed" in err


def test_a_run_from_another_machine_is_measured_with_what_is_here(trained, tmp_path, capsys):
    """Its device, data and precision were those of a GPU machine."""
    (tmp_path / "run").mkdir()
    model = torch.load(trained.folder / "best_model.pt", weights_only=True)
    theirs = {"device": "cuda:3", "data_dir": str(tmp_path / "theirs"), "save_dir": "/theirs"}
    model["info"]["script"] = configurator.values_of(configured().read(theirs))
    model["info"]["config"] |= theirs | {"bf16": True, "use_compile": True}
    torch.save(model, tmp_path / "run" / "best_model.pt")
    few = ["--bound_images", 2, "--eval_samples", 70]
    assert again(tmp_path / "run", *trained.flags[:2], "--evaluate", *few) == 0
    (line,) = [line for line in trained.out.splitlines() if line.startswith("test loss")]
    assert line in capsys.readouterr().out and not (tmp_path / "theirs").exists()


def test_the_stored_model_is_of_the_recipe_of_today():
    info = checkpoint.load_checkpoint(checkpoint.STORED, ("info",))["info"]
    chosen = configured("--device", "cpu", "--recipe", "quick")
    own = chosen.names(train_eval.OF_THE_MACHINE)
    expected = {name: value for name, value in vars(chosen.config).items() if name not in own}
    assert {name: info["config"].get(name) for name in expected} == expected


def test_without_a_run_the_stored_model_is_taken(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "STORED", tmp_path / "assets" / "quick.pt")
    for name in ("assets", "images"):
        (tmp_path / name).mkdir()
    experiments.renew(trained.folder, trained.flags[1], tmp_path)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == PICTURES
    whole, stored = trained.folder / "best_model.pt", checkpoint.STORED
    assert stored.stat().st_size < 0.7 * whole.stat().st_size
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    best, half = DDPM.load(whole, "cpu"), DDPM.load(device="cpu")
    assert "no run in checkpoints: this is assets/quick.pt" in capsys.readouterr().out
    assert half.info["step"] == best.info["step"] == 40 and half.dtype == torch.float32
    torch.testing.assert_close(half.sample(4, seed=0), best.sample(4, seed=0), rtol=0, atol=0.05)
    assert again("checkpoints", *trained.flags[:2], "--sample", 2) == 0
    assert len([*(tmp_path / "checkpoints" / "samples" / "drawn").iterdir()]) == 2
    with pytest.raises(SystemExit):  # a folder that was named is meant
        again("mine", *trained.flags[:2], "--sample", 2)
    assert "mine/best_model.pt: no such checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        again("checkpoints", *trained.flags[:2], "--sample", 2, "--dropout", 0.5)
    assert "the run in " in (err := capsys.readouterr().err) and "assets/quick.pt has" in err


# Other runs, to their end and to a table of measures


def test_ones_own_network_trains_and_is_measured(data_flags, tmp_path, monkeypatch, without_plots):
    monkeypatch.setattr(train_eval, "build_network", lambda config: OwnNetwork())
    flags = [*data_flags, "--save_dir", tmp_path, "--train_size", 80, "--num_clusters", 0]
    assert run(*flags) == 0
    assert again(tmp_path, *data_flags, "--evaluate") == 0
    best = DDPM.load(tmp_path / "best_model.pt", "cpu", OwnNetwork())
    assert best.info["step"] == 20 and best.sample(2, y=[3, 7]).shape == (2, 1, 16, 16)


OPTIONS = {
    "reference": "--recipe reference --channels 3 --bf16 --no-use_scheduler --loss clipped-vlb "
    "--no-use_compile",
    "clusters": " ".join(CLUSTERS) + " --prediction v --loss l1 --beta_schedule cosine "
    "--zero_terminal_snr --grad_clip 0 --ema_update_rate 3 --sampler ddim",
}


@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS)
def test_other_options_train_and_are_measured(data_flags, tmp_path, capsys, without_plots, flags):
    flags = [*flags.split(), *"--train_size 44 --epochs 1 --target_references 0".split()]
    assert run(*data_flags, "--save_dir", tmp_path, *flags) == 0
    out = capsys.readouterr().out
    assert ("told 1 clusters" in out) == ("(8 images of" not in out) == ("--num_clusters" in flags)
    assert again(tmp_path, *data_flags, "--evaluate") == 0
    out = capsys.readouterr().out
    assert "\nbits per dimension " in out and "given the label" not in out
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["samples"] == 44 and "recall" in written and "accuracy" not in written
    assert "left out, since there are too few images: Fréchet" in out and "frechet" not in written
    best = DDPM.load(tmp_path / "best_model.pt", "cpu")
    for name, value in vars(best).items():
        assert best.info["config"].get(name, value) == value, name
    assert best.info["step"] == 6 and sum(map(sum, best.class_shares or [[1]])) == pytest.approx(1)


@pytest.mark.parametrize("labels", ["ab", "."])
def test_ones_own_images_train_in_colour_and_are_measured(tmp_path, capsys, without_plots, labels):
    """With labels a classifier measures them; without, clusters are trained on."""
    own, data, drawn = tmp_path / "own", ["--data_dir", tmp_path], tmp_path / "samples" / "drawn"
    for k in range(80):
        path = own / labels[k % len(labels)] / f"{k:02}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (20, 24), (200 * (k % 2), 3 * k, 99)).save(path)
    flags = [*data, "--dataset", own, "--save_dir", tmp_path, "--num_clusters", 50]
    assert run(*flags, "--channels", 3, "--epochs", 1) == 0
    out = capsys.readouterr().out
    told = "2 labels" if len(labels) > 1 else "no labels"
    assert f"72 images to train, 8 to test, {told}, 0.00 GB" in out
    path.with_name("more.png").write_bytes(path.read_bytes())
    with pytest.raises(SystemExit):
        again(tmp_path, *flags, "--resume", "--epochs", 2)
    assert "73 images, but the run in" in capsys.readouterr().err
    path.with_name("more.png").unlink()
    assert again(tmp_path, *flags, "--resume", "--epochs", 2) == 0, "the clusters asked for"
    capsys.readouterr()
    assert again(tmp_path, *data, "--evaluate") == 0
    written, out = json.loads((tmp_path / "evaluation.json").read_text()), capsys.readouterr().out
    assert {"nearest", "copies", "bits_per_dim", "test_loss"} < written.keys()
    assert "colour" not in written and ("precision" in written) == (len(labels) > 1)
    assert ("torch-fidelity or clean-fid" in out) == (written["classifier"] is None)
    own.rename(tmp_path / "moved")
    assert again(tmp_path, *data, "--sample", 3) == 0, "which needs no data"
    names = [path.name for path in sorted(drawn.iterdir())]
    assert names == [f"0000{k}{f'_{k % 2}' * (len(labels) > 1)}.png" for k in range(3)]
    assert np.array(Image.open(drawn / names[0])).std(axis=2).max() > 0
    sizes = ["--dataset", tmp_path / "moved", "--image_size", 16, "--evaluate", drawn]
    assert train_eval.main([*map(str, [*data, "--save_dir", tmp_path, *sizes])]) == 0
    assert (tmp_path / "evaluation_drawn.json").exists()
    with pytest.raises(SystemExit):
        if len(labels) > 1:
            again(tmp_path, *data, "--sample", 1, "--digits", "1,2")
        else:
            run(*flags, "--dataset", tmp_path / "moved", "--use_conditional_generation")
    words = "expected labels below 2" if len(labels) > 1 else "moved has no labels"
    assert words in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(data_flags, tmp_path, capsys):
    flags = ["--learning_rate", 1e30, "--grad_clip", 0, "--warmup_steps", 0, "--save_every", 1]
    with pytest.raises(SystemExit) as exit_:
        run(*data_flags, "--save_dir", tmp_path, *flags)
    err, last = capsys.readouterr().err, last_of(tmp_path)
    assert exit_.value.code == 3 and "Training has diverged and stops" in err
    assert f"\nstep {last['step'] + 1}: loss " in err
    assert all(weights.isfinite().all() for weights in last["network"].values())


def test_an_error_of_the_code_is_no_mistake_of_the_person(data_flags, tmp_path, monkeypatch):
    def fault(run, model, *batch):
        raise ValueError(f"ours {model.training}")

    monkeypatch.setattr(train_eval, "train_step", fault)
    with pytest.raises(ValueError, match="^ours True$"):
        run(*data_flags, "--save_dir", tmp_path)
