"""Train a DDPM on MNIST, watch it, draw digits: edit the constants, run `python train_eval.py`.

Each constant is also a flag that replaces its line: `python train_eval.py --help` lists them.
"""

import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

import likelihood
import metrics
from dataprocess import load_data
from diffusion import DDPM, LOSSES, SAMPLERS, SETTINGS
from ema import EMA
from process import BETA_SCHEDULES, PREDICTIONS, SPACINGS, VARIANCES
from support import checkpoint, checks, configurator, console, machine, monitor, pictures, processes
from support.configurator import input_errors
from support.datasets import DATASETS, read_folder
from support.files import RunFolder, make_folder
from support.folders import has_labels
from support.machine import COMPILE_MODES, autocast, has_bf16
from support.processes import in_chunks, is_main, on_main
from support.threads import Interrupt, patient_threads
from timesteps import TIMESTEP_SAMPLINGS, make_timesteps
from unet import UNET_SETTINGS, UNet

RECIPES = {"reference": False, "quick": True}  # whether it is the small one
shorthand = None  # the kind of a name that only lines below it use: no flag

# machine
device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
card: shorthand = str(device).startswith("cuda")
data_dir: str = "data"  # folder of the data; what is neither there nor in assets/ is downloaded

# command
save_dir: str = "checkpoints"  # folder for everything that a run leaves
resume: bool = False  # continue the run in save_dir from its last.pt
evaluate: bool | str = False  # only measure best_model.pt of save_dir, or with FOLDER its PNGs
sample: int = 0  # only draw so many images with best_model.pt, a PNG each, into samples/drawn
digits: tuple = ()  # labels that --sample asks for in turn; (): all, in turn

# recipe
recipe: RECIPES = "reference" if card else "quick"  # large, hours of a GPU; or small, minutes
quick: shorthand = RECIPES.get(recipe)
seed: int = 0  # decides the run, on a CPU to the bit; change it for another run of the same kind

# data
dataset: str = "mnist"  # or fashion_mnist, kmnist, cifar10, or a folder of images
train_size: int = 60_000 if dataset in DATASETS else 1_000_000  # use the first N training images
test_size: int = 10_000  # use the first N test images
image_size: int = 32  # height and width that images are resized to, in pixels
channels: int = 3  # 3 keeps colours, and repeats grey as RGB; 1 makes all grey
use_augmentation: bool = not quick  # small random shifts, rotations and scales; for long runs
use_flips: bool = False  # mirror training images at random; wrong for digits and other text

# network
use_conditional_generation: bool = quick and has_labels(dataset)  # so you can ask for a label
# train on so many clusters of similar images, within the labels if it has them; 0 turns this off
num_clusters: int = 256 if quick and not use_conditional_generation else 0
base_channels: int = 32 if quick else 128  # width of the first level; a multiple of 32
channel_mult: tuple = (1, 2, 4) if quick else (1, 2, 4, 8)  # widths of levels / base_channels
num_res_blocks: int = 1 if quick else 2  # residual blocks per level
attention_resolutions: tuple = (8,) if quick else (8, 16)  # heights of maps with attention
dropout: float = 0.0 if quick else 0.1  # dropout probability in each block; for long runs
time_emb_dim: int = 256 if quick else 512  # width of the time embedding
num_heads: int = 1  # heads in each attention layer
adaptive_norm: bool = quick  # the time embedding scales and shifts features; else it is added
patch_size: int = 2 if quick else 1  # 2 works on 2x2 patches, with a quarter of the operations

# diffusion
num_timesteps: int = 1000  # steps from image to noise
beta_schedule: BETA_SCHEDULES = "linear"  # how the noise grows
prediction: PREDICTIONS = "x0" if quick else "eps"  # the noise eps, the velocity v or x0
# assumed error of a predicted x0, beside x_t; less leaves less grain in greys; 0: no x_t
skip_std: float = (0.2 if dataset == "mnist" else 0.1) if prediction == "x0" else 0.0
# mse or l1 between prediction and truth, or the variational bound, vlb or clipped-vlb
loss: LOSSES = "mse"
target_references: int = 4096 if quick and loss == "mse" else 0  # images that average the target
variance: VARIANCES = "fixed_small"  # of a reverse step; learned adds 0.001 of the bound to mse, l1
zero_terminal_snr: bool = False  # end the schedule in pure noise; only for prediction v and x0
min_snr_gamma: float = 0.0  # cap on the SNR that weights the mse loss; 5 is usual, 0 is off
plain: shorthand = loss == "mse" and not min_snr_gamma and skip_std > 0
# extra weight of errors at the clean end: fewer bits; on colours it costs shapes
clean_weight: float = 0.2 if plain and dataset == "mnist" else 0.0
label_dropout: float = 0.1  # share of the labels that training leaves out, for guidance

# training
epochs: int = 2 if quick else 50  # passes over the training images; more give better digits
batch_size: int = 16  # images per step, of all processes together
learning_rate: float = 1e-3 if quick else 1e-4  # peak learning rate of AdamW
warmup_steps: int = 100 if quick else 0  # steps to rise to the peak; at most a tenth of the run
grad_accumulation: int = 1  # parts that a batch is computed in, one by one, for less memory
bound: shorthand = loss in ("vlb", "clipped-vlb") or variance == "learned"
# which timesteps training sees; logit-normal sees more of the middle
timestep_sampling: TIMESTEP_SAMPLINGS = "logit-normal" if quick and not bound else "uniform"
# how widely logit-normal spreads
timestep_std: float = 1.0 if use_conditional_generation else 0.8 if num_clusters else 0.6
weight_decay: float = 1e-4  # AdamW's weight decay
adam_beta2: float = 0.95 if quick else 0.999  # decay of AdamW's average of squared gradients
use_scheduler: bool = True  # lower the learning rate to zero over the run, along a cosine
grad_clip: float = 1.0  # largest norm of the gradient; 0 turns clipping off
ema_decay: float = 0.997 if quick else 0.999  # of the averaged weights, which draw the samples
ema_start: int = 0 if quick else 5000  # steps before averaging begins
ema_update_rate: int = 1  # steps between updates of the averaged weights

# sampling
labelled: shorthand = use_conditional_generation or num_clusters > 0
guided: shorthand = quick and labelled and label_dropout != 0
sampler: SAMPLERS = "sde-dpm++" if quick else "ddpm"  # of final grids; others use sde-dpm++
# sampling steps; six are enough for digits of a network that is told what they are
sample_steps: int = (6 if labelled and dataset == "mnist" else 25) if quick else 1000
timestep_spacing: SPACINGS = "trailing"  # timesteps of a short sampler; linspace goes down to 0
# 1 is no guidance; larger values give clearer, less varied digits
guidance_scale: float = (1.2 if use_conditional_generation else 1.1) if guided else 1.0
num_samples: int = 100  # images in a grid
preview_steps: int = 5 if quick and dataset == "mnist" else 20  # steps of grids in training

# evaluation
eval_samples: int = 2000 if quick else 10_000  # images that --evaluate draws and measures
bound_images: int = 1000  # test images for bits per dimension, and for the test loss of a bound
bound_terms: int = 50  # terms of the bound that it computes for each, at most num_timesteps

# rhythm
log_every: int = 50 if quick else 100  # steps between TensorBoard entries
# steps between looks: a grid, losses; first at 200; a card does 1500 quick steps in ten seconds
sample_every: int = (1500 if card else 750) if quick else 2500
save_every: int = 500 if quick else 5000  # steps between saves; Ctrl-C and the end save too

# hardware
bf16: bool = has_bf16(device)  # compute in bfloat16, where that pays: GPUs since Ampere, AMX
use_compile: bool = card and not quick  # slow start, then faster steps
compile_mode: COMPILE_MODES = "default"  # of torch.compile; reduce-overhead takes CUDA graphs
# end of constants

FIRST_LOOK, FEW_IMAGES = 200, 128  # step of the first look; images whose loss it measures
# Smallest values, where a whole number of 1 or another of 0 is not the smallest; largest ones.
LEAST = dict.fromkeys(
    ("seed", "sample", "num_clusters", "target_references", "warmup_steps", "ema_start"), 0
)
LEAST |= dict.fromkeys(("test_size", "bound_images", "bound_terms"), 2)
MOST = {"seed": 2**32 - 1, "adam_beta2": 0.99999, "num_samples": 1000, "log_every": 100_000}
OF_THE_MACHINE = {"machine", "command", "hardware"}  # groups that a saved run does not keep
# Groups and names that may differ from the saved run.
FREE_TO_RESUME = {"evaluation", "rhythm", "epochs", "learning_rate", "grad_accumulation"}
FREE_TO_RESUME |= {"grad_clip", "num_samples", "preview_steps"}
FREE_TO_EVALUATE = {"evaluation", "sampling", "seed", "train_size", "test_size"}
USED_FOR_A_FOLDER = {"machine", "command", "dataset", "train_size", "test_size"}
USED_FOR_A_FOLDER |= {"image_size", "channels"}


def main(argv=None):
    """Train, continue, measure or draw. Returns 0, or 128 + the signal that ended it."""
    began = time.perf_counter()
    interrupt, finished = Interrupt(processes.largest, processes.launched()), False
    try:
        with interrupt, machine.prepared_process(), machine.errors_in_one_line():
            with input_errors():
                chosen = configurator.configure(__file__, globals(), LEAST, MOST, argv)
                processes.check_device(chosen.config.device)
            with processes.joined(chosen.config), patient_threads():
                if isinstance(chosen.config.evaluate, str):
                    finished = evaluate_folder(chosen)
                elif chosen.config.evaluate:
                    finished = evaluate_model(chosen)
                elif chosen.config.sample:
                    finished = draw_files(chosen)
                else:
                    finished = run_training(chosen, interrupt)
                if finished:
                    minutes = (time.perf_counter() - began) / 60
                    print(f"{minutes:.1f} minutes, everything included")
    except KeyboardInterrupt:
        print("\nstopped at once; what was saved before is whole", file=sys.stderr)
    return 0 if finished else interrupt.status


def run_training(chosen, interrupt):
    """A new run, or that of save_dir from its last.pt on. Returns whether it came to its end."""
    config, run = chosen.config, None
    if config.resume and not any(Path(config.save_dir).glob("last*.pt")):
        print(f"nothing to resume in {config.save_dir}: a new run begins")
        config.resume = False
    with input_errors():
        if not config.resume:  # before the folder: what is refused moves no earlier run
            run = prepare(config, chosen.script)
        folder = on_main(RunFolder)(config.save_dir, new=not config.resume)
    with folder or nullcontext():
        processes.barrier()
        if config.resume:
            with input_errors():
                saved = checkpoint.load_last(config.save_dir)
                free = FREE_TO_RESUME, OF_THE_MACHINE
                config = configurator.adopt(chosen, saved, config.save_dir, *free)
                run = prepare(config, saved["script"], saved)
        return train(run, interrupt) and draw_final(run)


def prepare(config, script, saved=None):
    """Everything that training needs, from the constants, as one namespace.

    `script` are the constants as the script had them when the run began, without flags; `saved` is
    the last.pt to continue.
    """
    configurator.check_together(config)
    train_images, test_images = load_images(config)
    torch.manual_seed(config.seed)
    shares = None
    if config.num_clusters:
        within = config.use_conditional_generation
        shares = train_images.use_clusters(config.num_clusters, within)
    labels = train_images.num_labels if config.use_conditional_generation else 0
    config.num_classes = labels + sum(map(len, shares or [])) or None
    ddpm = build(config, shares)
    how = {"betas": (0.9, config.adam_beta2), "weight_decay": config.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(ddpm.parameters(), **how)
    spread = config.num_timesteps, config.timestep_std, config.device
    parts = {  # what has a state
        "network": ddpm.network,
        "ema": EMA(ddpm.network, config.ema_decay, config.ema_start, config.ema_update_rate),
        "optimizer": optimizer,
        "timesteps": make_timesteps(config.timestep_sampling, *spread),
        "stats": monitor.RunningStats(config),
    }
    log = time.strftime("%Y-%m-%d_%H-%M-%S")
    progress = {"step": 0, "images": len(train_images), "best_loss": math.inf, "log": log}
    progress |= {f"{name}_curve": [] for name in ("train", "test", "fixed", "frechet")}
    if saved is not None:
        checkpoint.restore(config, parts, progress, saved)
        saved.clear()  # gigabytes, for the reference
    choosing, measuring = split_test(test_images)
    steps_per_epoch = math.ceil(len(train_images) / config.batch_size)
    if progress["images"] != len(train_images):
        raise ValueError(
            f"dataset {config.dataset}: {len(train_images)} images, but the run in "
            f"{config.save_dir} began with {progress['images']}; expected the same images"
        )
    if progress["step"] > steps_per_epoch * config.epochs:
        raise ValueError(
            f"epochs {config.epochs}: {steps_per_epoch * config.epochs} steps, but the run in "
            f"{config.save_dir} has done {progress['step']}; expected more epochs"
        )
    return SimpleNamespace(
        config=config,
        constants={"config": vars(config), "script": script},
        ddpm=ddpm,
        parts=parts,
        progress=progress,
        train_images=train_images,
        few_train_images=train_images.split(FEW_IMAGES)[0],
        choosing_images=choosing,  # test images that choose the weights
        measuring_images=measuring,  # the others
        test_images=test_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * config.epochs,
        meter=None,
    )


def split_test(test_images):
    """The test images that choose the weights, 128 or of few the half, and those that measure."""
    return test_images.split(min(FEW_IMAGES, len(test_images) // 2))


def build(config, class_shares=None):
    """The model of the constants, on its device."""
    constants = vars(config) | {"class_shares": class_shares}
    ddpm = DDPM(build_network(config), **{name: constants[name] for name in SETTINGS})
    return machine.place(ddpm, config)


def build_network(config):
    """The network of the constants; put your own here. It is told one of `config.num_classes`."""
    outputs = config.channels * (2 if config.variance == "learned" else 1)
    constants = vars(config) | {"out_channels": outputs}
    return UNet(**{name: constants[name] for name in UNET_SETTINGS})


def load_images(config):
    """Load both splits."""
    names = ("data_dir", "image_size", "channels", "train_size", "test_size", "seed", "device")
    settings = {name: getattr(config, name) for name in names}
    with processes.main_first():
        switches = {"augment": config.use_augmentation, "flips": config.use_flips}
        splits = load_data(config.dataset, **settings, **switches)
    found = {"images": [*map(len, splits)], "torch": torch.__version__}
    processes.check_same(vars(config) | found)
    return splits


# Train


def train(run, interrupt):
    """Train to the end of the run, or until Ctrl-C. Returns whether the end was reached."""
    config, progress, stopped = run.config, run.progress, False
    epoch, first = divmod(progress["step"], run.steps_per_epoch)
    seen = epoch * len(run.train_images) + first * config.batch_size
    console.print_start(run)
    run.meter = make_meter(run) if run.train_images.num_labels else None
    model = processes.parallel(run.ddpm).train()
    machine.compile_network(config, run.ddpm, lambda n: warm_up(config, model, n))
    images = config.epochs * len(run.train_images)
    watch = monitor.Monitor(config, progress, run.parts["stats"], images, seen, is_main())
    with interrupt.after_the_step(), watch:
        if not progress["step"]:
            watch.log_config(run.ddpm, run.test_images.batch(slice(config.num_samples))[0])
        for x0, y in run.train_images.epochs(config.batch_size, config.epochs, epoch, first):
            rate = learning_rate_at(config, progress["step"], run.total_steps)
            watch.add(*train_step(run, model, x0, y, rate))
            progress["step"] = step = progress["step"] + 1
            asked, last = interrupt.asked(step), step == run.total_steps
            looking = last or step == FIRST_LOOK or step % config.sample_every == 0
            saving = step % config.save_every == 0
            if looking or saving or step % config.log_every == 0:
                watch.log(rate)
            elif asked:
                watch.stats.check(step, rate)
            if looking:  # before the save: a run that is killed in between looks again
                look(run, watch)
            if asked or last or saving and watch.affordable("saving"):
                with watch.doing("saving"):
                    on_main(checkpoint.save_last)(config, run.parts, run.constants | progress)
                if asked == "save":
                    on_main(print)(f"\nsaved at step {step:,}", file=sys.stderr)
            # the second question: during the last look or save
            if stopped := asked == "stop" or last and interrupt.asked() == "stop":
                break
            if looking or saving:
                watch.stats.start()  # so that images per second leave these out
    if not Path(config.save_dir, "best_model.pt").exists():  # stopped before the first look
        with run.parts["ema"].applied():
            save_best(run, math.nan)
    on_main(pictures.write_training)(config, progress)
    if stopped:
        console.print_stopped(config, progress)
    return not stopped


def learning_rate_at(config, step, total_steps):
    """The learning rate of a step, from 0: a linear rise, times a cosine that ends at zero."""
    warmup = max(1, min(config.warmup_steps, total_steps // 10))
    rise = 1 / warmup + (1 - 1 / warmup) * min(step / warmup, 1)
    fall = (1 + math.cos(math.pi * step / total_steps)) / 2 if config.use_scheduler else 1
    return config.learning_rate * (rise * fall)


def train_step(run, model, x0, y, rate):
    """One step of AdamW on a batch, with what is random about it drawn here for all processes.

    Returns what happened, left on the device: losses, their weights and timesteps, (N,), and the
    gradient's norm, ().
    """
    config, ddpm, parts = run.config, run.ddpm, run.parts
    y = None if ddpm.num_classes is None else y
    candidates = draw_candidates(config, run.train_images, x0, y)
    t, weights = parts["timesteps"].sample(len(x0))
    eps = torch.randn_like(x0)
    losses = backward(config, model, x0, ddpm.drop_labels(y), t, eps, weights, candidates)
    (group,) = parts["optimizer"].param_groups
    norm = torch.nn.utils.clip_grad_norm_(group["params"], config.grad_clip or math.inf)
    group["lr"] = rate
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()
    parts["ema"].update()
    parts["timesteps"].update(t, losses)
    return losses, weights, t, norm


def draw_candidates(config, train_images, x0, y):
    """What may be behind a noisy image: the batch and others, grey if all are; their classes."""
    if not config.target_references:
        return None
    size = (config.target_references,)
    index = torch.randint(len(train_images), size, device=train_images.device)
    others, labels = train_images.batch(index)
    held = train_images.images.shape[1]  # the other channels repeat it
    return (x0[:, :held], others[:, :held]), None if y is None else torch.cat([y, labels])


def backward(config, model, x0, y, t, eps, weights, candidates=None):
    """Add the gradient of the mean of weights times losses. Returns the losses, (N,)."""
    losses = []
    for part, scale in processes.micro_batches(model, len(x0), config.grad_accumulation):
        labels = None if y is None else y[part]
        with autocast(config), machine.compiled_if_usual(config, len(x0)):
            found = model(x0[part], labels, t[part], eps[part], candidates)
        (scale * (weights[part] * found).sum()).backward()
        losses.append(found.detach())
    return processes.gather(torch.cat(losses), len(x0))


def warm_up(config, model, n):
    """What `train_step` compiles, for a batch of n images; leaves gradients."""
    zeros = torch.zeros(n, config.channels, config.image_size, config.image_size)
    zeros, t = zeros.to(config.device), torch.zeros(n, dtype=torch.long, device=config.device)
    labelled = config.use_conditional_generation or config.num_clusters
    backward(config, model, zeros, t if labelled else None, t, zeros, torch.ones_like(t))


@on_main
def make_meter(run):
    """What measures the grids during training; None if there are too few images for it."""
    n = run.config.num_samples
    with console.warning_if_it_fails("measuring grids, which needs more than 64 images,"):
        classifier = load_classifier(run.config, run.train_images)
        real, evenly = run.train_images, run.config.use_conditional_generation
        draws = metrics.real_draws(real.images, real.labels, n, evenly)  # as the samples are
        return metrics.FrechetMeter(classifier, run.test_images.split(2000)[0].images, draws)


def look(run, watch):
    """Look at the EMA weights: losses of a few fixed images, a grid and its Fréchet distance.

    The lowest test loss so far makes them best_model.pt. A measurement that fails is a warning.
    """
    config, ddpm, progress, value = run.config, run.ddpm, run.progress, math.nan
    errors = processes.tolerable_errors()
    with watch.doing("evaluating"), run.parts["ema"].applied():
        with console.warning_if_it_fails("the test loss", errors):
            value = test_loss(config, ddpm, run.choosing_images)
            watch.log_losses(test_loss(config, ddpm, run.few_train_images), value)
        if value < progress["best_loss"] or progress["best_loss"] == math.inf:  # none so far
            save_best(run, value)
            progress["best_loss"] = min(progress["best_loss"], value)  # a NaN leaves it as it is
        with console.warning_if_it_fails("a grid of samples", errors):
            how = dict(sampler="sde-dpm++", steps=config.preview_steps, guidance_scale=1.0)
            images, _ = draw(config, ddpm, config.num_samples, **how)
            watch.log_samples(images)
            if run.meter:
                watch.log_frechet(run.meter(metrics.as_bytes(images)), run.meter.real)


@on_main
def save_best(run, value):
    """Save the weights now in the network, with their test loss; call it in `ema.applied()`."""
    step, log = run.progress["step"], run.progress["log"]
    path = Path(run.config.save_dir) / "best_model.pt"
    run.ddpm.save(path, **run.constants, test_loss=value, step=step, log=log)


# Evaluate


@torch.no_grad()
def test_loss(config, ddpm, images):
    """Mean loss with plain targets, by labels, with the same noise and t each time.

    For both losses of the bound: that of `bits_per_dim`, x0 clipped, by eight terms of each image.
    One term, times `num_timesteps`, would be mostly chance.
    """
    n, order = len(images), torch.Generator().manual_seed(0)
    t = (torch.arange(n) * config.num_timesteps // n)[torch.randperm(n, generator=order)]

    def losses(part, seed):
        x0, y = images.batch(part)
        labels = y if config.use_conditional_generation else None
        with autocast(config), machine.evaluating(ddpm):
            if LOSSES[config.loss][0] is None:
                generator = torch.Generator(ddpm.device).manual_seed(seed)
                terms = min(8, config.num_timesteps)
                return likelihood.bound_terms(ddpm, x0, labels, terms, generator)[0].sum(dim=0)
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0.device)
            return ddpm.losses(x0, labels, t[part].to(x0.device), eps)

    return in_chunks(n, 0, losses, size=64).double().mean().item()  # faster on a CPU than 256


def asked_labels(config, ddpm, n):
    """The labels in turn, int64, (n,), or None for a model without."""
    if not config.use_conditional_generation:
        return None
    digits = torch.tensor(config.digits or range(ddpm.num_labels))
    return digits[torch.arange(n) % len(digits)]


def draw(config, ddpm, n, advice="", **how):
    """n images from the same noise each time, and their labels in turn, or None."""
    y = asked_labels(config, ddpm, n)

    def images(part, seed):
        labels = None if y is None else y[part]
        with autocast(config):
            return ddpm.sample(part.stop - part.start, labels, seed=seed, **how)

    return in_chunks(n, config.seed, images, advice=advice), y


def draw_final(run):
    """After training: the test loss of best_model.pt, and a grid by its own sampler."""
    processes.barrier()  # until it is written
    path = Path(run.config.save_dir, "best_model.pt")
    best = checkpoint.load_checkpoint(path, ("weights", "info"))
    checkpoint.load_weights(run.ddpm.network, best["weights"])
    run.ddpm.info = best["info"]
    measure_and_draw(run.config, run.ddpm, run.measuring_images, run.meter)
    console.print_end(run)
    return True


def measure_and_draw(config, ddpm, images, meter=None):
    """The test loss, which is returned; a grid by the config's sampler and its film, new files."""
    if LOSSES[config.loss][0] is None:  # eight terms each; for all images that takes long
        images = images.split(config.bound_images)[0]
    loss = test_loss(config, ddpm, images)
    console.print_test_loss(config, loss, len(images), ddpm.info)
    on_main(draw_grid)(config, ddpm, loss, meter)
    return loss


def draw_grid(config, ddpm, loss, meter):
    """A grid by the config's sampler, and its film; TensorBoard gets the loss too."""
    n, generator = config.num_samples, torch.Generator(config.device).manual_seed(config.seed)
    y = asked_labels(config, ddpm, n)
    classes = ddpm.draw_classes(n, None if y is None else y.to(config.device), generator)
    noise = ddpm.draw_noise(n, generator)
    how = config.sampler, None, config.guidance_scale, generator
    with autocast(config):
        walk = ddpm.walk(noise, ddpm.timesteps(config.sample_steps), classes, *how)
        images, frames = pictures.watch(noise, walk, config.sample_steps)
    monitor.write_final(config, ddpm, images, frames, loss)
    if meter and config.use_conditional_generation:
        read = meter.classifier.accuracy(metrics.as_bytes(images), y)
        print(f"final grid: {read:.0%} of {n} read as the label asked for")


def load_best(chosen):
    """The constants of the run of best_model.pt, or of that in assets/, and the model."""
    path = checkpoint.best_model(chosen.config.save_dir)
    info = checkpoint.load_checkpoint(path, ("info",))["info"]
    known = {"config", "script", "step", "log"} <= info.keys()
    if not (known and "num_classes" in info["config"]):
        raise ValueError(f"{path}: not written by this train_eval.py; load it with DDPM.load")
    config = configurator.adopt(chosen, info, path, FREE_TO_EVALUATE, OF_THE_MACHINE)
    config.num_classes = info["config"]["num_classes"]
    configurator.check_together(config)
    ddpm = machine.place(DDPM.load(path, config.device, build_network(config)), config)
    for name in ("sampler", "sample_steps", "guidance_scale", "timestep_spacing"):
        setattr(ddpm, name, getattr(config, name))
    checks.ddpm(ddpm, SAMPLERS)
    machine.compile_network(config, ddpm)
    return config, ddpm


def draw_files(chosen):
    """Draw `sample` images with best_model.pt: PNGs in a new folder, and a grid. Returns True."""
    with input_errors():
        config, ddpm = load_best(chosen)
        if not {*config.digits} <= {*range(ddpm.num_labels or 0)}:
            raise ValueError(f"digits {config.digits}: expected labels below {ddpm.num_labels}")
        on_main(make_folder)(Path(config.save_dir) / "samples")  # or it fails before the work
    images, y = draw(config, ddpm, config.sample)
    on_main(pictures.write_files)(config, metrics.as_bytes(images), y)
    return True


def evaluate_model(chosen):
    """Measure best_model.pt of save_dir: test loss, bits per dimension, samples. Returns True."""
    with input_errors():
        config, ddpm = load_best(chosen)
        train_images, test_images = load_images(config)
    loss = measure_and_draw(config, ddpm, split_test(test_images)[1])
    bits = bits_per_dim(config, ddpm, test_images)
    n = min(config.eval_samples, len(train_images), len(test_images))
    advice = "--eval_samples 2000 shortens it, and makes its figures rougher"
    if config.sample_steps > 100:
        advice = f"--sample_steps 100 or {advice}"
    samples, y = draw(config, ddpm, n, advice)
    known = {name: vars(config)[name] for name in ("sampler", "guidance_scale", "seed")}
    known |= {"bits_per_dim": bits.total, "bits_per_dim_error": bits.standard_error}
    known |= {"steps": config.sample_steps, "step": ddpm.info["step"], "test_loss": loss}
    decisive = chosen.names(FREE_TO_EVALUATE) - {"num_samples", "preview_steps"}
    own = all(vars(config)[name] == ddpm.info["config"].get(name) for name in decisive)
    measure(config, metrics.as_bytes(samples), y, train_images, test_images, known, ddpm.info, own)
    return True


def evaluate_folder(chosen):
    """Measure the PNGs of a folder, one an image. Returns True."""
    config = chosen.config
    known = {"samples_from": str(Path(config.evaluate).resolve())}
    with input_errors():
        configurator.refuse_unused(chosen, "--evaluate FOLDER", USED_FOR_A_FOLDER)
        samples, left_out = read_folder(config.evaluate, metrics.SIZE)
        console.print_left_out(left_out, "they are not PNGs")
        measure(config, samples, None, *load_images(config), known)
    return True


def bits_per_dim(config, ddpm, test_images):
    """The variational bound of the first `bound_images` test images, with the same noise."""
    x0, y = test_images.batch(slice(config.bound_images))
    terms = min(config.bound_terms, config.num_timesteps)

    def bound(part, seed):
        labels = y[part] if config.use_conditional_generation else None
        generator = torch.Generator(config.device).manual_seed(seed)
        with autocast(config), machine.evaluating(ddpm):
            found = likelihood.bound_terms(ddpm, x0[part], labels, terms, generator)
        return torch.cat(found).T

    found = in_chunks(len(x0), config.seed, bound).T
    bits = likelihood.summarise(found[: 1 + terms], found[1 + terms :])
    console.print_bits(config, bits, len(x0), terms)
    return bits


@on_main
def measure(config, samples, y, train_images, test_images, known, info=None, own=True):
    """Measure samples, uint8, (N, C, H, W), and report; for the rest see `monitor.report`."""
    classifier = load_classifier(config, train_images) if train_images.num_labels else None
    real = train_images.images, test_images.images
    result, pairs = metrics.measure(classifier, samples, *real, y)
    accuracy = classifier and classifier.accuracy(test_images.images, test_images.labels)
    result["classifier"] = classifier and classifier.name
    monitor.report(config, (result, pairs, accuracy), known, info, own)


def load_classifier(config, train):
    """The classifier whose features measure samples of this data set."""
    where = {"device": config.device, "progress": console.at_a_terminal()}
    with input_errors():  # assets/ may be damaged
        data = config.dataset, train.images, train.labels, config.data_dir
        return metrics.load_classifier(*data, **where)


if __name__ == "__main__":
    sys.exit(main())
