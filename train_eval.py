"""Train a DDPM on MNIST, watch it, draw digits: edit the constants and run `python train_eval.py`.

Each constant is also a flag that replaces its line: `python train_eval.py --help` lists them.
"""

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import metrics
from dataprocess import DATASETS, Images, load_data
from diffusion import DDPM, LOSSES, SAMPLERS, SETTINGS, draw_dropped
from ema import EMA
from process import BETA_SCHEDULES, PREDICTIONS, SPACINGS, VARIANCES
from support import configurator, console, machine, monitor, pictures
from support.checkpoint import RunFolder, load_last, restore, save_last
from support.machine import autocast, gather, has_bf16, on_main, share, warning_if_it_fails
from support.png import read_folder
from support.threads import patient_threads
from timesteps import TIMESTEP_SAMPLINGS, make_timesteps
from unet import UNET_SETTINGS, UNet

# run
device = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # where to run; the defaults below depend on it
cuda = str(device).startswith("cuda")
seed = 0  # decides the run, on a CPU to the bit; change it for another run of the same kind
save_dir = "checkpoints"  # folder for everything that a run leaves
resume = False  # continue the run in save_dir from its last.pt
evaluate = (
    False  # do not train. Alone: measure best_model.pt of save_dir. With FOLDER: measure its PNGs
)

# data
dataset = (
    "auto"  # auto takes mnist, or glyphs if MNIST is neither in data_dir nor can be downloaded
)
data_dir = "data"  # folder of the data; what is missing is downloaded
train_size = 60_000  # use the first N training images; fewer make a run short
test_size = 10_000  # use the first N test images
image_size = 32  # height and width that images are resized to, in pixels
channels = 3  # 3 repeats the grey image as RGB, 1 keeps it grey
use_augmentation = cuda  # small random shifts, rotations and scales; for long runs

# network
use_conditional_generation = (
    not cuda
)  # train on labels too, so you can ask for a digit; it also learns faster
num_clusters = (
    0 if cuda or use_conditional_generation else 256
)  # without labels: train on clusters instead; 0 is off
base_channels = 128 if cuda else 32  # width of the first level; a multiple of 32
channel_mult = (
    (1, 2, 4, 8) if cuda else (1, 2, 4)
)  # width of each level, as multiples of base_channels
num_res_blocks = 2 if cuda else 1  # residual blocks per level
attention_resolutions = (8, 16) if cuda else (8,)  # heights of the feature maps that get attention
dropout = 0.1 if cuda else 0.0  # dropout probability in each residual block; for long runs
time_emb_dim = 512 if cuda else 256  # width of the time embedding
num_heads = 1  # heads in each attention layer
adaptive_norm = (
    not cuda
)  # the time embedding scales and shifts features after a norm instead of being added
patch_size = (
    1 if cuda else 2
)  # 2 folds 2x2 pixels into channels: half the resolution inside, a quarter of the work

# diffusion
num_timesteps = 1000  # steps from image to noise
beta_schedule = "linear"  # how the noise grows: linear or cosine
prediction = (
    "eps" if cuda else "x0"
)  # what the network predicts: eps, v or x0; x0 learns clean digits soonest
loss = "mse"  # mse or l1 between prediction and truth, or vlb, the variational bound
target_references = (
    0 if cuda or loss != "mse" else 4096
)  # extra images that each target is averaged over; 0 is off
variance = "fixed_small"  # variance of a reverse step: fixed_small, fixed_large, or learned (adds 0.001 of the bound)
zero_terminal_snr = False  # end the schedule in pure noise; only for prediction v and x0
min_snr_gamma = 0.0  # cap on the SNR that weights the mse loss; 5 is usual, 0 turns the weights off

# training
epochs = 50 if cuda else 2  # passes over the training images; more give better digits
batch_size = 16  # images per step, of all processes together
learning_rate = 1e-4 if cuda else 1e-3  # peak learning rate of AdamW
warmup_steps = (
    0 if cuda else 100
)  # steps in which the learning rate rises to its peak; at most a tenth of the run
grad_accumulation = (
    1  # parts that a batch is computed in, one after the other; more take less memory
)
timestep_sampling = (
    "uniform" if cuda or loss == "vlb" or variance == "learned" else "logit-normal"
)  # how t is drawn
timestep_std = (
    1.0 if use_conditional_generation else 0.8 if num_clusters else 0.6
)  # how widely logit-normal spreads
weight_decay = 1e-4  # AdamW's weight decay
adam_beta2 = (
    0.999 if cuda else 0.95
)  # decay of AdamW's average of squared gradients; lower ones suit short runs
use_scheduler = True  # lower the learning rate to zero over the run, along a cosine
grad_clip = 1.0  # largest norm of the gradient; 0 turns clipping off
ema_decay = 0.999 if cuda else 0.997  # decay of the averaged weights; samples are drawn with them
ema_start = 5000 if cuda else 0  # steps before averaging begins
ema_update_rate = 1  # steps between updates of the averaged weights

# sampling
sampler = "ddpm" if cuda else "sde-dpm++"  # ddpm, ddim, dpm++ or sde-dpm++
sample_steps = (
    1000 if cuda else 6 if use_conditional_generation or num_clusters else 25
)  # sampling steps
timestep_spacing = (
    "trailing"  # which timesteps a short sampler visits: trailing, or linspace down to t = 0
)
guidance_scale = (
    1.0 if cuda else 1.2 if use_conditional_generation else 1.1 if num_clusters else 1.0
)  # 1 is off
num_samples = 100  # images in a grid
preview_steps = 20 if cuda else 5  # sampling steps of the grids during training

# evaluation
eval_samples = 10_000 if cuda else 2000  # number of images that --evaluate draws and measures
bound_images = 1000  # number of test images whose bits per dimension --evaluate measures
bound_terms = 50  # terms of the variational bound computed for each of them, at most num_timesteps

# rhythm
log_every = 100 if cuda else 50  # steps between TensorBoard entries
sample_every = (
    2500 if cuda else 750
)  # steps between looks: a grid, its Fréchet distance, losses; the first at 200
save_every = 5000 if cuda else 500  # steps between saves of last.pt; Ctrl-C and the end save it too

# hardware
bf16 = has_bf16(device)  # compute in bfloat16, where that pays: GPUs since Ampere, CPUs with AMX
use_compile = (
    cuda  # torch.compile the network: minutes at the start, then faster steps; rarely pays on a CPU
)
# end of constants

FIRST_LOOK, FEW_IMAGES = (
    200,
    128,
)  # step of the first look; number of images whose loss is measured then
CHOICES = {
    "dataset": DATASETS,
    "beta_schedule": BETA_SCHEDULES,
    "prediction": PREDICTIONS,
    "variance": VARIANCES,
    "loss": LOSSES,
    "timestep_sampling": TIMESTEP_SAMPLINGS,
    "sampler": SAMPLERS,
    "timestep_spacing": SPACINGS,
}


def main(argv=None):
    """Train, continue a run, or measure samples. Returns the exit status: 0, or 130 after Ctrl-C, 143 after SIGTERM."""
    started = time.perf_counter()
    machine.prepare_process()
    interrupt, finished = machine.Interrupt(), False
    try:
        with interrupt, machine.errors_in_one_line():
            config, given = configure(argv)
            with machine.processes(config), patient_threads():
                if isinstance(config.evaluate, str):
                    finished = evaluate_folder(config, given)
                elif config.evaluate:
                    finished = evaluate_model(config, given)
                else:
                    finished = (resume_training if config.resume else start_training)(
                        config, given, interrupt
                    )
                if finished:
                    print(
                        f"{(time.perf_counter() - started) / 60:.1f} minutes, everything included"
                    )
    except KeyboardInterrupt:
        print("\nstopped at once; what was saved before is whole", file=sys.stderr)
    return 0 if finished else interrupt.status


def configure(argv):
    """Command line -> (config, given): the constants as attributes, and the names of those that flags replaced."""
    return configurator.configure(__file__, globals(), CHOICES, argv)


def start_training(config, given, interrupt):
    """A new run. Returns whether it came to its end."""
    run = prepare(config)
    with configurator.input_errors():
        folder = RunFolder(config.save_dir, new=True)
    with folder, console.shown_at_both_ends(run.warning):
        return train(run, interrupt) and draw_final(run)


def resume_training(config, given, interrupt):
    """Continue the run in save_dir from its last.pt. Returns whether it came to its end."""
    with configurator.input_errors():
        folder = RunFolder(config.save_dir, new=False)
    with folder:
        with configurator.input_errors():
            saved = load_last(config.save_dir)
            config = configurator.adopt(
                config, given, saved["config"], configurator.FREE_TO_RESUME, CHOICES
            )
        run = prepare(config, saved)
        with console.shown_at_both_ends(run.warning):
            return train(run, interrupt) and draw_final(run)


def prepare(config, saved=None):
    """Everything that training needs, from the constants, as one namespace; `saved` is the last.pt to continue."""
    with configurator.input_errors():
        configurator.check_together(config)
        train_images, test_images = load_images(config)
        torch.manual_seed(config.seed)
        ddpm = build(
            config, train_images.use_clusters(config.num_clusters) if config.num_clusters else None
        )
        ema = EMA(ddpm.network, config.ema_decay, config.ema_start, config.ema_update_rate)
    optimizer = torch.optim.AdamW(
        ddpm.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    steps_per_epoch = math.ceil(len(train_images) / config.batch_size)
    total_steps = steps_per_epoch * config.epochs
    warmup = max(1, min(config.warmup_steps, total_steps // 10))
    state = {
        "network": ddpm.network,
        "ema": ema,
        "optimizer": optimizer,
        "stats": monitor.RunningStats(config),
        "timesteps": make_timesteps(
            config.timestep_sampling, config.num_timesteps, config.timestep_std, config.device
        ),
        "warmup": torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
    }
    if config.use_scheduler:  # the two multiply
        state["scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=total_steps
        )
    progress = {
        "step": 0,
        "best_loss": math.inf,
        "train_curve": [],
        "test_curve": [],
        "fixed_curve": [],
        "frechet_curve": [],
        "warning": train_images.warning,
        "log": time.strftime("%Y-%m-%d_%H-%M-%S"),
    }
    if saved is not None:
        with configurator.input_errors():
            restore(config, state, progress, saved, total_steps)
        saved.clear()  # gigabytes, for the reference
    return SimpleNamespace(
        config=config,
        ddpm=ddpm,
        ema=ema,
        state=state,
        progress=progress,
        train_images=train_images,
        test_images=test_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warning=train_images.warning or progress["warning"],
    )


def build(config, class_shares=None):
    """The model of the constants, on its device. UNet and DDPM take the constants that bear their arguments' names."""
    constants = vars(config) | {
        "num_classes": config.num_clusters
        or (Images.num_classes if config.use_conditional_generation else None),
        "class_shares": class_shares,
        "out_channels": config.channels * (2 if config.variance == "learned" else 1),
    }
    network = UNet(**{name: constants[name] for name in UNET_SETTINGS})
    return machine.place(DDPM(network, **{name: constants[name] for name in SETTINGS}), config)


def load_images(config):
    """Load both splits. Also writes the name and the sizes of what was loaded into the config."""
    names = ("data_dir", "image_size", "channels", "train_size", "test_size", "seed", "device")
    with machine.main_first():
        train_images, test_images = load_data(
            config.dataset,
            **{name: getattr(config, name) for name in names},
            augment=config.use_augmentation,
        )
    config.dataset, config.train_size, config.test_size = (
        train_images.name,
        len(train_images),
        len(test_images),
    )
    machine.check_same(vars(config) | {"torch": torch.__version__})
    return train_images, test_images


# Train


def train(run, interrupt):
    """Train to the end of the run, or until Ctrl-C. Returns whether the end was reached; everything is saved."""
    config, progress, stopped = run.config, run.progress, False
    epoch, start = divmod(progress["step"], run.steps_per_epoch)
    console.print_start(run)
    run.meter = make_meter(run)
    machine.compile_network(config, run.ddpm)
    model = machine.parallel(config, run.ddpm)
    with (
        interrupt.after_the_step(),
        monitor.Monitor(
            config,
            progress,
            run.state["stats"],
            config.epochs * len(run.train_images),
            epoch * len(run.train_images) + start * config.batch_size,
        ) as watch,
    ):
        if not progress["step"]:
            watch.log_config(run.ddpm, run.test_images.batch(slice(config.num_samples))[0])
        for x0, y in run.train_images.epochs(config.batch_size, config.epochs, epoch, start):
            watch.add(
                *train_step(
                    config, model, run.state, x0, y, draw_references(config, run.train_images)
                )
            )
            progress["step"] = step = progress["step"] + 1
            rate, asked, last = (
                run.state["optimizer"].param_groups[0]["lr"],
                interrupt.asked(),
                step == run.total_steps,
            )
            looking = last or step == FIRST_LOOK or step % config.sample_every == 0
            saving = last or step % config.save_every == 0
            if looking or saving or step % config.log_every == 0:
                watch.log(rate)
            elif asked:
                watch.stats.check(step, rate)
            if looking:  # before the save: a run that is killed in between looks again
                look(run, watch)
            if saving or asked:
                with watch.doing("saving"):
                    save_last(config, run.state, progress)
                console.print_saved(progress, asked)
            if (
                stopped := asked == "stop" or last and interrupt.asked() == "stop"
            ):  # in the last look or save
                break
            if looking or saving:
                watch.stats.start()  # so that images per second leave these out
    if not Path(config.save_dir, "best_model.pt").exists():  # stopped before the first look
        with run.ema.applied():
            save_best(run, math.nan)
    pictures.write_training(config, progress)
    if stopped:
        console.print_stopped(config, progress)
    return not stopped


def draw_references(config, train_images):
    """Grey images, (M, 1, H, W), and their labels, drawn anew for each step to average the target over; or None."""
    if not config.target_references:
        return None
    device = train_images.images.device
    x0, y = train_images.batch(
        torch.randint(len(train_images), (config.target_references,), device=device)
    )
    return x0[:, :1], y  # all channels are equal


def train_step(config, model, state, x0, y, references=None):
    """One step of AdamW; `model` is the DDPM, or DistributedDataParallel around it.

    Returns what happened, left on the device: losses, their weights and timesteps, (N,), and the gradient's norm, ().
    """
    model.train()
    n, y = len(x0), y if config.use_conditional_generation or config.num_clusters else None
    t, weights = state["timesteps"].sample(n)
    eps = torch.randn_like(x0)
    drop, losses = None if y is None else draw_dropped(n, x0.device), []
    for rows, scale in machine.micro_batches(model, n, config.grad_accumulation):
        with autocast(config):
            part = model(
                x0, y, t=t, eps=eps, drop=drop, references=references, rows=rows, reduction="none"
            )
        (scale * (weights[rows] * part).sum()).backward()
        losses.append(part.detach())
    losses = gather(torch.cat(losses), n)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    for name in ("warmup", "scheduler"):
        if name in state:
            state[name].step()
    state["ema"].update()
    state["timesteps"].update(t, losses)
    return losses, weights, t, norm


@on_main
def make_meter(run):
    """What measures the grids during training, or None. Other data sets than MNIST train its classifier once."""
    if (
        min(run.config.num_samples, len(run.train_images), len(run.test_images))
        <= metrics.NUM_FEATURES
    ):
        console.print_unmeasured(metrics.NUM_FEATURES)
        return None
    with warning_if_it_fails("measuring samples"):
        return metrics.FrechetMeter(
            load_classifier(run.config, run.train_images),
            run.test_images.few(2000),
            run.train_images.few(run.config.num_samples),
        )


def look(run, watch):
    """Look at the EMA weights: losses of a few fixed images, a grid of samples and its Fréchet distance.

    The lowest test loss so far makes them best_model.pt. A measurement that fails is only a warning.
    """
    config, ddpm, progress, value = run.config, run.ddpm, run.progress, math.nan
    with watch.doing("evaluating"), run.ema.applied():
        with warning_if_it_fails("the test loss"):
            value = test_loss(config, ddpm, run.test_images.few(FEW_IMAGES))
            watch.log_losses(test_loss(config, ddpm, run.train_images.few(FEW_IMAGES)), value)
        if (
            value < progress["best_loss"] or progress["best_loss"] == math.inf
        ):  # no test loss so far
            save_best(run, value)
            progress["best_loss"] = min(progress["best_loss"], value)  # a NaN leaves it as it is
        with warning_if_it_fails("a grid of samples"):
            images, _ = draw(
                config,
                ddpm,
                config.num_samples,
                sampler="sde-dpm++",
                steps=config.preview_steps,
                guidance_scale=1.0,
            )
            watch.log_samples(images)
            if run.meter:
                watch.log_frechet(run.meter(metrics.as_bytes(images)), run.meter.real)


# Evaluate


@on_main
def save_best(run, value):
    """Save the weights now in the network, with their test loss. Call this only inside `ema.applied()`."""
    config, progress = run.config, run.progress
    run.ddpm.save(
        Path(config.save_dir) / "best_model.pt",
        config=vars(config),
        step=progress["step"],
        test_loss=value,
        warning=progress["warning"],
        log=progress["log"],
    )


@torch.no_grad()
def test_loss(config, ddpm, images):
    """Mean loss with plain targets, without clusters, and with the same noise and timesteps each time."""
    ddpm.eval()
    generator = torch.Generator().manual_seed(0)
    n = len(images)
    timesteps = (torch.arange(n) * config.num_timesteps // n)[
        torch.randperm(n, generator=generator)
    ]
    total = 0.0
    for index in torch.arange(n).split(64):  # on a CPU faster than 256
        x0, y = images.batch(index)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        with autocast(config):
            losses = ddpm(
                x0,
                y if config.use_conditional_generation else None,
                t=timesteps[index].to(x0.device),
                eps=eps,
                rows=share(len(index)),
                reduction="none",
            )
        total += gather(losses, len(index)).double().sum().item()
    return total / n


def draw(config, ddpm, n, **options):
    """n images from the same noise each time, and their labels: the digits in turn, None for an unconditional model."""
    y = torch.arange(n) % ddpm.num_classes if config.use_conditional_generation else None
    with autocast(config):
        images = ddpm.sample(n, y, seed=config.seed, rows=share(n), **options).transpose(
            0, -4
        )  # a sequence: by image
    return gather(images, n).transpose(0, -4), y


def draw_final(run):
    """After training: the whole test loss of best_model.pt, and a grid by its own sampler. Returns True."""
    machine.barrier()  # until it is written
    ddpm = machine.place(
        DDPM.load(Path(run.config.save_dir) / "best_model.pt", run.config.device), run.config
    )
    machine.compile_network(run.config, ddpm, training=False)
    loss = test_loss(run.config, ddpm, run.test_images)
    console.print_end(run, loss, ddpm.info, *draw_grid(run.config, ddpm, loss))
    return True


def evaluate_model(config, given):
    """Measure best_model.pt of save_dir: test loss, bits per dimension, samples. Returns True."""
    with configurator.input_errors():
        ddpm = DDPM.load(path := Path(config.save_dir) / "best_model.pt", "cpu")
        if not {"config", "step", "log", "warning"} <= (info := ddpm.info).keys():
            raise ValueError(f"{path}: not written by train_eval.py; load it with DDPM.load")
        config = configurator.adopt(
            config, given, info["config"], configurator.FREE_TO_EVALUATE, CHOICES
        )
        configurator.check_together(config)
        train_images, test_images = load_images(config)
    ddpm = machine.place(ddpm, config)
    ddpm.timestep_spacing = config.timestep_spacing
    machine.compile_network(config, ddpm, training=False)
    with console.shown_at_both_ends(train_images.warning or info["warning"]):
        console.print_test_loss(config, loss := test_loss(config, ddpm, test_images), info)
        draw_grid(config, ddpm, loss)
        bits = bits_per_dim(config, ddpm, test_images)
        n = min(config.eval_samples, len(train_images), len(test_images))
        samples, y = draw(config, ddpm, n, progress=console.at_a_terminal(), **sampling(config))
        monitor.report(
            config,
            measure(config, samples, y, train_images, test_images),
            info,
            **sampling(config),
            test_loss=loss,
            bits_per_dim=bits.total,
            bits_per_dim_error=bits.standard_error,
        )
    return True


def evaluate_folder(config, given):
    """Measure the PNGs of a folder, one an image. Returns True."""
    with configurator.input_errors():
        configurator.refuse_unused(given, "--evaluate FOLDER", configurator.USED_FOR_A_FOLDER)
        configurator.check_together(config)
        samples, left_out = read_folder(config.evaluate)
        train_images, test_images = load_images(config)
        if len(samples) > (most := min(len(train_images), len(test_images))):
            raise ValueError(
                f"{config.evaluate}: {len(samples)} PNGs; expected at most {most}, like the real images"
            )
    console.print_left_out(left_out)
    with console.shown_at_both_ends(train_images.warning):
        monitor.report(
            config,
            measure(config, samples, None, train_images, test_images),
            samples_from=str(Path(config.evaluate).resolve()),
        )
    return True


def sampling(config):
    """The sampler of the config, as `DDPM.sample` takes it."""
    return dict(
        sampler=config.sampler, steps=config.sample_steps, guidance_scale=config.guidance_scale
    )


def draw_grid(config, ddpm, loss):
    """A grid by the config's sampler, returned with its labels, and its film: new files. TensorBoard gets the loss."""
    sequence, y = draw(
        config,
        ddpm,
        config.num_samples,
        progress=console.at_a_terminal(),
        **sampling(config),
        **pictures.sequence_options(config.sample_steps),
    )
    monitor.write_final(config, ddpm, sequence, loss)
    return sequence[-1], y


def bits_per_dim(config, ddpm, test_images):
    """The variational bound of the first `bound_images` test images, with the same noise each time."""
    x0, y = test_images.batch(slice(config.bound_images))
    terms = min(config.bound_terms, config.num_timesteps)
    with autocast(config):
        bits = ddpm.bits_per_dim(
            x0,
            y if config.use_conditional_generation else None,
            seed=config.seed,
            terms=terms,
            rows=share(len(x0)),
            gather=lambda part: gather(part, len(x0)),
            progress=console.at_a_terminal(),
        )
    console.print_bits(config, bits, len(x0), terms)
    return bits


@on_main
def measure(config, samples, y, train_images, test_images):
    """`metrics.measure` of samples in [-1, 1] or uint8, (N, C, H, W); name and test accuracy of the classifier too."""
    classifier = load_classifier(config, train_images)
    result, pairs = metrics.measure(
        classifier, metrics.as_bytes(samples), train_images.images, test_images.images, y
    )
    return (
        result | {"classifier": classifier.name},
        pairs,
        classifier.accuracy(test_images.images, test_images.labels),
    )


def load_classifier(config, train_images):
    """The classifier whose features measure samples of this data set."""
    with configurator.input_errors():  # assets/ may be damaged
        return metrics.load_classifier(
            config.dataset,
            train_images.images,
            train_images.labels,
            config.data_dir,
            device=config.device,
            progress=console.at_a_terminal(),
        )


if __name__ == "__main__":
    sys.exit(main())
