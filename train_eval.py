"""Train a DDPM on MNIST, watch it, draw digits: edit the constants and run `python train_eval.py`.

Each constant is also a flag that stands in for its line: `python train_eval.py --help` lists them.
"""

import argparse
import ast
import ctypes
import difflib
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

# system
device = "cuda" if torch.cuda.is_available() else "cpu"  # where to run; the values below follow it
cuda = device.startswith("cuda")
amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
seed = 0  # decides a CPU run to the bit
bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else amx  # compute in bfloat16
use_compile = cuda  # torch.compile the network: minutes at the start, and faster steps; on a CPU rarely worth it
save_dir = "checkpoints"  # folder for everything that a run leaves
resume = False  # go on with the run in save_dir from its last.pt
evaluate = False  # no training: measure save_dir's best_model.pt, or the PNGs in a folder: --evaluate FOLDER

# data
dataset = "auto"  # auto is mnist, and glyphs where there is neither a copy nor a network
data_dir = "data"  # folder of the data; downloaded when missing
train_size = 60_000  # images to train on: the first so many
test_size = 10_000  # images to test on: the first so many
image_size = 32  # height and width that images are resized to, in pixels
channels = 3  # 3 repeats the grey image as RGB, 1 leaves it grey
use_augmentation = cuda  # small random shifts, rotations and scales; a short run sees too few images to need them

# network
use_conditional_generation = not cuda  # condition on the digit: one can ask for it, and it is sooner learnt
base_channels = 128 if cuda else 32  # width of the first level
channel_mult = (1, 2, 4, 8) if cuda else (1, 2, 4)  # width of each level, as multiples of base_channels
num_res_blocks = 2 if cuda else 1  # residual blocks a level
attention_resolutions = (8, 16) if cuda else (8,)  # heights of the feature maps with attention after each block
dropout = 0.1 if cuda else 0.0  # probability, in each residual block
time_emb_dim = 512 if cuda else 256  # width of the time embedding
num_heads = 1  # of each attention
adaptive_norm = not cuda  # the time embedding scales and shifts after a norm, not added before it; better digits
patch_size = 1 if cuda else 2  # pixels folded into channels on the way in: 2 works at half the resolution inside

# diffusion
num_timesteps = 1000  # steps from image to noise
beta_schedule = "linear"  # how noise grows: linear or cosine
prediction = "eps" if cuda else "x0"  # what the network predicts: eps, v or x0; x0 learns clean digits soonest
loss = "mse"  # distance of prediction and truth: mse or l1; vlb is the variational bound instead
target_references = 0 if cuda or loss != "mse" else 4096  # images to average the target over, by likelihood; 0: none
variance = "fixed_small"  # of the reverse steps: fixed_small, fixed_large, or learned, with the hybrid loss
zero_terminal_snr = False  # the last step is noise alone; for v and x0
min_snr_gamma = 0.0  # weighs the loss as min(SNR, this) weighs errors of x0; 5 is usual, 0 leaves it unweighted

# training
batch_size = 16  # images a step
timestep_sampling = "uniform" if cuda else "logit-normal"  # of training: uniform, logit-normal, importance (for vlb)
timestep_std = 1.0 if use_conditional_generation else 0.6  # standard deviation of logit-normal timesteps' logits
epochs = 50 if cuda else 2  # passes over the training images
learning_rate = 1e-4 if cuda else 1e-3  # peak; of AdamW
weight_decay = 1e-4  # of AdamW
warmup_steps = 0 if cuda else 100  # steps in which the learning rate rises to its peak; at most a tenth of the run
use_scheduler = True  # CosineAnnealingLR, a step at a time, to zero over the whole run
grad_clip = 1.0  # largest norm of the gradient; 0 turns clipping off
ema_decay = 0.999 if cuda else 0.997  # of the shadow weights, with which samples are drawn
ema_start = 5000 if cuda else 0  # steps before averaging begins
ema_update_rate = 1  # steps from one update of the shadow weights to the next

# sampling
sampler = "ddpm" if cuda or use_conditional_generation else "sde-dpm++"  # of the model: ddpm, ddim, dpm++ or sde-dpm++
sample_steps = 1000 if cuda else 16 if use_conditional_generation else 25  # network calls an image, of best_model.pt
timestep_spacing = "trailing"  # which timesteps fewer calls visit: trailing, or linspace, down to the clean end
guidance_scale = 1.0 if cuda or not use_conditional_generation else 1.15  # s in uncond + s (cond - uncond)
num_samples = 100  # images in a grid
preview_steps = 20 if cuda else 10  # network calls an image, of the grids drawn during training, by DDIM

# evaluation
eval_every = 1  # epochs from one small measurement of the samples to the next, for a curve; 0 leaves them out
eval_samples = 10_000 if cuda else 2000  # images that --evaluate draws and measures
bound_images = 1000  # test images, the first so many, of which --evaluate measures bits per dimension
bound_terms = 50  # of the num_timesteps terms of the bound that it computes for each, if there are more

# rhythm
log_every = 100 if cuda else 50  # steps from one TensorBoard entry to the next
sample_every = 5000 if cuda else 1000  # steps from one grid to the next; the first comes after 200
save_every = 5000 if cuda else 500  # steps from one last.pt to the next; each epoch and Ctrl-C write it too
# end of constants

NUM_CLASSES = 10  # of every data set here
FIRST_SAMPLE = 200  # steps
FEW_SAMPLES = 500  # of the small measurements in training
RANGES = {  # of what the modules do not check themselves: smallest, largest
    "seed": (0, 2**63 - 1), "channels": (1, 3), "target_references": (0, math.inf), "batch_size": (1, math.inf),
    "timestep_std": (0, math.inf), "epochs": (1, math.inf), "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf), "warmup_steps": (0, math.inf), "grad_clip": (0, math.inf),
    "guidance_scale": (0, math.inf), "sample_steps": (1, math.inf), "preview_steps": (1, math.inf),
    "num_samples": (1, 10_000), "eval_every": (0, math.inf), "eval_samples": (1, math.inf),
    "bound_images": (2, math.inf), "bound_terms": (2, math.inf), "log_every": (1, 100_000),
    "sample_every": (1, math.inf), "save_every": (1, math.inf),
}
FLOATS = {"learning_rate", "weight_decay", "grad_clip", "dropout", "ema_decay", "guidance_scale", "min_snr_gamma",
          "timestep_std"}
TUPLES = {"channel_mult", "attention_resolutions"}
# Constants that a saved run does not bring with it, and flags that may differ from those that it began with.
HERE = {"save_dir", "resume", "evaluate"}
FREE_TO_RESUME = HERE | {"device", "bf16", "use_compile", "data_dir", "epochs", "learning_rate", "grad_clip",
                         "num_samples", "preview_steps", "eval_every", "eval_samples", "bound_images", "bound_terms",
                         "log_every", "sample_every", "save_every"}
FREE_TO_EVALUATE = HERE | {"device", "data_dir", "bf16", "use_compile", "seed", "train_size", "test_size",
                           "num_samples", "sampler", "sample_steps", "timestep_spacing", "guidance_scale",
                           "eval_samples", "bound_images", "bound_terms"}
TIMESTEP_SAMPLINGS = ("uniform", "logit-normal", "importance")
FIELDS = (  # of the reference's log, in its order
    "device", "batch_size", "epochs", "save_dir", "optimizer_type", "learning_rate", "weight_decay", "use_scheduler",
    "scheduler_type", "total_params", "image_size", "channels", "num_timesteps", "base_channels", "num_res_blocks",
    "channel_mult", "dropout", "time_emb_dim", "use_conditional_generation", "num_classes", "ema_decay", "ema_start",
    "ema_update_rate", "train_size", "test_size", "use_augmentation", "normalization", "convert_to_rgb",
)


# From the command line to the config


def configure(argv):
    """Command line -> (config, given): every constant as an attribute, and the names that flags set."""
    given = vars(make_parser(read_constants({})).parse_args(argv))
    config = argparse.Namespace(**{name: value for name, (_, value, _) in read_constants(given).items()})
    config.save_dir = os.path.expanduser(config.save_dir)
    return config, set(given)


def read_constants(flags):
    """The constants above as {name: (group, value, comment)}, read from this file.

    A flag's value stands in for its line, so that the lines below see it: `--device cpu` brings the CPU's values.
    """
    source = Path(__file__).read_text(encoding="utf-8")
    lines = source[:source.index("# end of constants")].splitlines()
    scope, described = {**globals(), **flags}, {}
    for node in ast.parse("\n".join(lines)).body:
        if node.lineno <= lines.index("# system"):
            continue  # imports
        exec(compile(ast.Module([node], []), __file__, "exec"), scope)
        scope.update(flags)
        group = next(line for line in reversed(lines[:node.lineno - 1]) if line.startswith("# "))
        comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and part.id not in ("cuda", "amx"):
                described.setdefault(part.id, (group.lstrip("# "), comment.lstrip("# ")))
    return {name: (group, scope[name], comment) for name, (group, comment) in described.items()}


class Parser(argparse.ArgumentParser):
    """argparse, with one-line errors that name the nearest flag."""

    def error(self, message):
        """One line, without the usage, and exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, argv=None):
        """As argparse's; an unknown flag is answered with the nearest one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = {name.replace("-", "_"): name for name in self._option_string_actions if name.startswith("--")}
            near = difflib.get_close_matches(flag.replace("-", "_"), known, n=1)
            self.error(f"{unknown[0]}: unknown; "
                       + (f"did you mean {known[near[0]]}?" if near else "--help lists the flags"))
        return args


def make_parser(constants):
    """A flag for each constant, with its comment as help. What is not given is absent from the result."""
    from dataprocess import DATASETS
    from diffusion import BETA_SCHEDULES, LOSSES, PREDICTIONS, SAMPLERS, SPACINGS, VARIANCES

    choices = {"dataset": DATASETS, "beta_schedule": BETA_SCHEDULES, "prediction": PREDICTIONS, "loss": LOSSES,
               "variance": VARIANCES, "timestep_sampling": TIMESTEP_SAMPLINGS, "sampler": tuple(SAMPLERS),
               "timestep_spacing": SPACINGS}
    parser = Parser(prog="train_eval.py", usage="train_eval.py [--CONSTANT VALUE ...]",
                    description="Train a DDPM on MNIST, watch it, draw digits. Each flag stands in for the line "
                    "of that constant at the top of train_eval.py.",
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    groups = {}
    for name, (group, value, comment) in constants.items():
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        options = {"help": f"{comment} (default: {text})".replace("%", "%%")}
        if name == "evaluate":
            options |= {"nargs": "?", "const": True, "metavar": "FOLDER"}
        elif isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif name in TUPLES:
            options |= {"type": integers, "metavar": "INT,INT"}
        elif name in choices:
            options["choices"] = choices[name]
        else:
            kind = float if name in FLOATS else type(value)
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        groups[group].add_argument(f"--{name}", **options)
    return parser


def integers(text):
    """'1,2,4' -> (1, 2, 4); 'none' -> ()."""
    return () if text in ("", "none") else tuple(int(part) for part in text.split(","))


def check(config):
    """ValueError for a constant of the wrong kind or out of its range, or a device that is not there."""
    for name, value in vars(config).items():
        if name in TUPLES and not (isinstance(value, tuple) and all(isinstance(part, int) for part in value)):
            raise ValueError(f"{name} {value}: expected whole numbers in brackets, with a comma even after one: (8,)")
        if isinstance(value, float) and name not in FLOATS:
            raise ValueError(f"{name} {value}: expected a whole number")
    for name, (low, high) in RANGES.items():
        value = getattr(config, name)
        if not low <= value <= high or value != value or value == math.inf:
            limit = "" if high == math.inf else f" and at most {high}"
            raise ValueError(f"{name} {value}: expected at least {low}{limit}")
    if config.resume and config.evaluate:
        raise ValueError("resume and evaluate: expected one of them; --evaluate alone does not train")
    for name in ("sample_steps", "preview_steps"):
        if getattr(config, name) > config.num_timesteps:
            raise ValueError(f"{name} {getattr(config, name)}: expected at most num_timesteps {config.num_timesteps}")
    if not config.evaluate and config.timestep_sampling not in TIMESTEP_SAMPLINGS:
        raise ValueError(f"timestep_sampling {config.timestep_sampling!r}: expected one of "
                         f"{', '.join(TIMESTEP_SAMPLINGS)}")
    if not config.evaluate and config.target_references and config.loss != "mse":
        raise ValueError(f"target_references {config.target_references} with loss {config.loss!r}: their mean is the "
                         "truth of 'mse' alone; expected 0")
    if config.channels == 2:
        raise ValueError("channels 2: expected 1 (grey) or 3 (RGB)")
    if config.guidance_scale != 1 and not config.use_conditional_generation:
        raise ValueError(f"guidance_scale {config.guidance_scale}: guidance needs labels; expected 1, or "
                         "--use_conditional_generation")
    try:
        torch.zeros(1, dtype=torch.float64, device=config.device).cpu()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {config.device!r}: cannot be used here ({reason}); try --device cpu") from None


def adopt(config, given, saved, free):
    """The config of a saved run, a dict, with this command's flags where they are free to differ.

    Raises:
        ValueError: for a flag that differs and is not free.
    """
    for name in sorted(given - free):
        if getattr(config, name) != saved.get(name):
            raise ValueError(f"{name} {getattr(config, name)}: the run in {config.save_dir} has {saved.get(name)}; "
                             "leave the flag out, or start another run in another --save_dir")
    if "device" in given and config.device != saved.get("device"):
        given = given | {"bf16", "use_compile"}  # what the device is good at
    ours = {name: getattr(config, name) for name in HERE | given & free}
    ignored = [f"{name} {value}" for name, value in vars(config).items()
               if name not in HERE | given and value != saved.get(name, value)]
    if ignored:
        print(f"the saved run keeps its own constants; not used from {Path(__file__).name}: {', '.join(ignored)}")
    return argparse.Namespace(**{**vars(config), **saved, **ours})


# The story


def main(argv=None):
    """Train, go on, or only evaluate. Returns the exit status: 0 when done, 130 when interrupted."""
    warning, begun = None, time.perf_counter()
    keep_freed_memory()
    try:
        try:
            config, saved, ddpm, ema, train_images, test_images, samples, warning = prepare(*configure(argv))
        except ValueError as error:  # the user's mistake; one further on would be ours
            Parser(prog="train_eval.py").error(error)
        if warning:
            print(warning, file=sys.stderr)
        if config.evaluate or train(config, ddpm, ema, train_images, test_images, saved):
            if samples is None:
                finish(config, train_images, test_images)
            else:
                report(config, samples, None, train_images, test_images)
            print(f"{(time.perf_counter() - begun) / 60:.1f} minutes, everything included")
            return 0
    except KeyboardInterrupt:
        print("\nstopped at once; what was saved before is whole", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"train_eval.py: {str(error).partition(chr(10))[0]} Try a smaller --batch_size or "
                         "--base_channels") from None
    except OSError as error:  # a full disk, most likely
        raise SystemExit(f"train_eval.py: {error}; what was saved before is whole") from None
    finally:
        if warning:
            print(warning, file=sys.stderr)
    return 130


def keep_freed_memory():
    """Have glibc keep what is freed for what comes next, instead of handing it back to the system.

    Each step frees and asks for the same 30 MB; the page faults of that were a tenth of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: bytes free at the end of the heap before it shrinks
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: bytes of what is mapped by itself, at the most that it may be


def prepare(config, given):
    """All that can go wrong by the user's hand: config, checkpoint, folder, data, model."""
    from dataprocess import load_data
    from diffusion import DDPM, load_checkpoint
    from ema import EMA
    from metrics import NUM_FEATURES, read_folder

    save_dir, saved, samples, warning = Path(config.save_dir), None, None, None
    check(config)
    if config.resume:
        saved = load_checkpoint(save_dir / "last.pt", ("config", "step", "network", "optimizer", "warmup"))
        config, warning = adopt(config, given, saved["config"], FREE_TO_RESUME), saved["warning"]
    elif isinstance(config.evaluate, str):
        samples = read_folder(config.evaluate)
    elif config.evaluate:
        info = DDPM.load(save_dir / "best_model.pt", "cpu").info
        if "config" not in info:
            raise ValueError(f"{save_dir / 'best_model.pt'}: not written by train_eval.py; load it with DDPM.load")
        config, warning = adopt(config, given, info["config"], FREE_TO_EVALUATE), info["warning"]
    check(config)  # the device of the saved run may not be here
    torch.manual_seed(config.seed)
    ddpm = ema = None
    if not config.evaluate:
        ddpm = build(config)
        ema = EMA(ddpm.network, config.ema_decay, config.ema_start, config.ema_update_rate)
    train_images, test_images = load_data(
        config.dataset, config.data_dir, image_size=config.image_size, channels=config.channels,
        train_size=config.train_size, test_size=config.test_size, augment=config.use_augmentation, seed=config.seed,
        device=config.device)
    config.dataset, config.train_size, config.test_size = train_images.name, len(train_images), len(test_images)
    least, most = NUM_FEATURES + 1, min(len(train_images), len(test_images))
    if samples is not None and not least <= len(samples) <= most:
        raise ValueError(f"evaluate {config.evaluate!r}: {len(samples)} PNGs; expected from {least} to {most}, the "
                         "number of real images to compare with")
    if (config.evaluate or config.eval_every) and min(config.eval_samples, most) < least:
        raise ValueError(f"eval_samples {config.eval_samples}, train_size {len(train_images)}, test_size "
                         f"{len(test_images)}: expected at least {least} of each to measure samples; "
                         "--eval_every 0 trains without")
    make_room(save_dir, keep=config.resume or config.evaluate)
    return config, saved, ddpm, ema, train_images, test_images, samples, train_images.warning or warning


def build(config):
    """The model of the config, on its device, in the layout that its convolutions are fast in."""
    from diffusion import DDPM
    from unet import UNet

    network = UNet(
        image_size=config.image_size, channels=config.channels, base_channels=config.base_channels,
        channel_mult=config.channel_mult, num_res_blocks=config.num_res_blocks,
        attention_resolutions=config.attention_resolutions, dropout=config.dropout, time_emb_dim=config.time_emb_dim,
        num_classes=NUM_CLASSES if config.use_conditional_generation else None, patch_size=config.patch_size,
        num_heads=config.num_heads, adaptive_norm=config.adaptive_norm,
        out_channels=config.channels * (2 if config.variance == "learned" else 1))
    ddpm = DDPM(
        network, image_size=config.image_size, channels=config.channels, num_timesteps=config.num_timesteps,
        beta_schedule=config.beta_schedule, prediction=config.prediction, loss=config.loss, variance=config.variance,
        zero_terminal_snr=config.zero_terminal_snr, min_snr_gamma=config.min_snr_gamma, sampler=config.sampler,
        sample_steps=config.sample_steps, timestep_spacing=config.timestep_spacing,
        guidance_scale=config.guidance_scale)
    # In float32 on a CPU the plain layout makes a step a tenth faster; all else is faster channels-last.
    plain = torch.device(config.device).type == "cpu" and not config.bf16
    return ddpm.to(config.device, memory_format=torch.contiguous_format if plain else torch.channels_last)


def compile_network(config, ddpm):
    """`torch.compile` the network, tried on one batch; where that fails, a line says so and the run goes on without."""
    if not config.use_compile:
        return
    ddpm.network.compile()
    x0 = torch.zeros(config.batch_size, config.channels, config.image_size, config.image_size, device=config.device)
    y = torch.zeros(len(x0), dtype=torch.long, device=config.device) if config.use_conditional_generation else None
    try:
        with torch.random.fork_rng([x0.device] if x0.is_cuda else []), autocast(config):
            ddpm(x0, y).backward()
    except Exception as error:  # compilers fail in too many ways to list
        ddpm.network.compile(disable=True)
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        print(f"torch.compile failed ({type(error).__name__}: {reason}); going on without it", file=sys.stderr)
    ddpm.zero_grad()


def make_room(save_dir, keep):
    """The folder of the run, with what an earlier run left moved aside in it unless it is to be kept."""
    try:
        (save_dir / "samples").mkdir(parents=True, exist_ok=True)
        if not os.access(save_dir, os.W_OK):
            raise PermissionError("not writable")
        earlier = [path for name in ("last.pt", "best_model.pt") if (path := save_dir / name).exists()]
        if earlier and not keep:
            stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(max(path.stat().st_mtime for path in earlier)))
            aside = save_dir / f"run_{stamp}"
            aside.mkdir()
            for path in (*earlier, save_dir / "samples", save_dir / "loss_curve.png"):
                if path.exists():
                    path.rename(aside / path.name)
            (save_dir / "samples").mkdir()
            print(f"the earlier run in {save_dir} is now in {aside} (to go on with a run: --resume)")
    except OSError as error:
        raise ValueError(f"save_dir {str(save_dir)!r}: {error.strerror or error}; expected a folder that can be "
                         "written") from None


def train(config, ddpm, ema, train_images, test_images, saved=None):
    """Train from `saved`, or from the beginning. Returns whether it came to the end; False after Ctrl-C."""
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    from diffusion import ImportanceSampler

    torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16, on GPUs that have it
    torch.backends.cudnn.benchmark = True
    steps_per_epoch = math.ceil(len(train_images) / config.batch_size)
    total_steps = steps_per_epoch * config.epochs
    optimizer = torch.optim.AdamW(ddpm.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
                                  fused=True)
    warmup = max(1, min(config.warmup_steps, total_steps // 10))
    parts = {"network": ddpm.network, "ema": ema, "optimizer": optimizer,
             "warmup": torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)}
    if config.use_scheduler:  # the two multiply
        parts["scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)
    if config.timestep_sampling == "importance":
        parts["timesteps"] = ImportanceSampler(config.num_timesteps).to(config.device)
    progress = {"step": 0, "best_loss": math.inf, "train_curve": [], "test_curve": [],
                "warning": train_images.warning, "log": time.strftime("%Y-%m-%d_%H-%M-%S")}
    resumed = saved is not None
    if resumed:
        restore(config, parts, progress, saved, total_steps)
        saved.clear()  # gigabytes, for the reference
    epoch, start = divmod(progress["step"], steps_per_epoch)
    seen = epoch * len(train_images) + start * config.batch_size
    window = Window(config)
    save_dir = Path(config.save_dir)
    print(f"{config.dataset}: {len(train_images):,} images to train, {len(test_images):,} to test; network: "
          f"{sum(p.numel() for p in ddpm.parameters()):,} parameters in {'bf16' if config.bf16 else 'fp32'} on "
          f"{config.device}; {total_steps:,} steps, {progress['step']:,} done\n"
          f"watch: tensorboard --logdir {save_dir / 'tensorboard_logs'}")

    compile_network(config, ddpm)
    with (interruptible() as stop,
          SummaryWriter(save_dir / "tensorboard_logs" / progress["log"], flush_secs=10,
                        purge_step=progress["step"] + 1 if resumed else None) as writer,
          tqdm(total=config.epochs * len(train_images), initial=seen, unit="img", smoothing=0.05,
               mininterval=0.5) as bar):
        if not resumed:
            log_start(writer, config, ddpm, test_images)
        for x0, y in batches(config, train_images, epoch, start):
            window.add(*train_step(config, ddpm, parts, x0, y, draw_references(config, train_images)))
            progress["step"] = step = progress["step"] + 1
            bar.update(len(x0))

            stopping = bool(stop)
            ending = step % steps_per_epoch == 0
            drawing = step == FIRST_SAMPLE or step % config.sample_every == 0
            saving = stopping or ending or step % config.save_every == 0
            if drawing or saving or step % config.log_every == 0:
                log_step(writer, bar, progress, window.read(step), optimizer.param_groups[0]["lr"])
            if drawing:
                with ema.applied():
                    images, _ = draw(config, ddpm, config.num_samples, sampler="ddim", steps=config.preview_steps)
                write_grid(images, save_dir / "samples" / f"step_{step:07d}.png", writer, "samples", step)
            if ending:
                evaluate_epoch(config, ddpm, ema, train_images, test_images, progress, step // steps_per_epoch, writer)
            if saving:
                save_last(config, parts, progress)
            if drawing or saving:
                window.start()  # so that images a second leave these out
            if stopping:
                break

    plot_losses(config, progress, save_dir / "loss_curve.png")
    if not (save_dir / "best_model.pt").exists():  # stopped before the first epoch was over
        save_best(config, ddpm, ema, progress, epoch=0)
    if stop:
        print(f"stopped at step {progress['step']:,}; everything is saved. To go on: python train_eval.py --resume"
              + (f" --save_dir {save_dir}" if config.save_dir != "checkpoints" else ""))
    return not stop


def batches(config, train_images, first, start):
    """The batches (x0, y) of all epochs from number `start` of epoch `first` on."""
    for epoch in range(first, config.epochs):
        yield from train_images.epoch(config.batch_size, epoch, start)
        start = 0


def draw_references(config, train_images):
    """Grey images, (M, 1, H, W), and labels of which x0 might be any, anew for each step; None for none."""
    if not config.target_references:
        return None
    device = train_images.images.device
    x0, y = train_images.batch(torch.randint(len(train_images), (config.target_references,), device=device))
    return x0[:, :1], y  # channels are alike


def train_step(config, ddpm, parts, x0, y, references=None):
    """One step of AdamW.

    Returns what happened, left on the device: losses, their weights and timesteps, (N,), and the gradient's norm, ().
    """
    ddpm.train()
    if "timesteps" in parts:
        t, weights = parts["timesteps"].sample(len(x0))
    else:
        t = torch.randint(config.num_timesteps, (len(x0),), device=x0.device)
        if config.timestep_sampling == "logit-normal":  # mostly the middle, where strokes take shape (2403.03206 3.1)
            t = (config.timestep_std * torch.randn(len(x0), device=x0.device)).sigmoid()
            t = (config.num_timesteps * t).long().clamp(max=config.num_timesteps - 1)  # a sigmoid may round to 1
        weights = torch.ones_like(x0[:, 0, 0, 0])
    with autocast(config):
        losses = ddpm(x0, y if config.use_conditional_generation else None, t=t, references=references,
                      reduction="none")
    (weights * losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(ddpm.parameters(), config.grad_clip or math.inf)
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()
    for name in ("warmup", "scheduler"):
        if name in parts:
            parts[name].step()
    parts["ema"].update()
    if "timesteps" in parts:
        parts["timesteps"].update(t, losses)
    return losses.detach(), weights, t, norm


def autocast(config):
    """bf16 for convolutions and matrix products, where the config says so."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16)


class Window:
    """What the steps since the last entry did, kept on the device, so that no step waits to tell."""

    def __init__(self, config):
        self.num_timesteps = config.num_timesteps
        self.steps = torch.zeros(2, config.log_every, device=config.device)  # loss and gradient norm of each
        self.quartiles = torch.zeros(2, 4, dtype=torch.float64, device=config.device)  # by t: sums of losses, weights
        self.start()

    def start(self):
        """Begin anew."""
        self.steps.zero_()
        self.quartiles.zero_()
        self.count = self.images = 0
        self.clock = time.perf_counter()

    def add(self, losses, weights, t, norm):
        """Take a step in: losses, their weights and timesteps, (N,), gradient norm ()."""
        self.steps[0, self.count] = (weights * losses).mean()
        self.steps[1, self.count] = norm
        quartile = t * 4 // self.num_timesteps
        self.quartiles[0].index_add_(0, quartile, (weights * losses).double())
        self.quartiles[1].index_add_(0, quartile, weights.double())
        self.count += 1
        self.images += len(losses)

    def read(self, step):
        """The window's TensorBoard scalars; `step` is its last. Begins anew.

        Raises:
            SystemExit: where a loss or a gradient was not finite.
        """
        losses, norms = self.steps[:, :self.count].tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise SystemExit(f"\nstep {step - self.count + i + 1}: loss {loss}, gradient norm {norm}: training has "
                                 "diverged and stops. A last.pt is from before: go on from it with --resume and a "
                                 "lower --learning_rate or --grad_clip")
        scalars = {"train/loss": sum(losses) / self.count, "train/grad_norm": sum(norms) / self.count,
                   "train/images_per_second": self.images / (time.perf_counter() - self.clock)}
        for quartile, (total, weight) in enumerate(self.quartiles.T.tolist(), start=1):
            if weight:
                scalars[f"train_loss_by_t/quartile_{quartile}"] = total / weight
        self.start()
        return scalars


@contextmanager
def interruptible():
    """A list that is empty until Ctrl-C or SIGTERM comes: the loop then ends after its step. A second one raises."""
    stop = []

    def handler(signum, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(signum)
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


# Checkpoints


def save_last(config, parts, progress):
    """last.pt: all that going on exactly needs."""
    from diffusion import save_checkpoint

    rng = {"cpu": torch.get_rng_state()}
    if torch.device(config.device).type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(config.device)
    save_checkpoint(Path(config.save_dir) / "last.pt", {
        "config": vars(config), **progress, "rng": rng, **{name: part.state_dict() for name, part in parts.items()}})


def restore(config, parts, progress, saved, total_steps):
    """Put what `save_last` wrote back in place; learning rate and length of the run are the config's."""
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    progress.update({name: saved[name] for name in progress})
    torch.set_rng_state(saved["rng"]["cpu"])
    if "cuda" in saved["rng"] and torch.device(config.device).type == "cuda":
        torch.cuda.set_rng_state(saved["rng"]["cuda"], config.device)
    if any(saved["config"][name] != getattr(config, name) for name in ("epochs", "learning_rate")):
        cosine = (1 + math.cos(math.pi * min(progress["step"] / total_steps, 1))) / 2 if config.use_scheduler else 1
        warmup = parts["warmup"]
        rise = warmup.start_factor + (1 - warmup.start_factor) * min(progress["step"] / warmup.total_iters, 1)
        for group in parts["optimizer"].param_groups:
            group["initial_lr"], group["lr"] = config.learning_rate, config.learning_rate * cosine * rise
        if config.use_scheduler:
            parts["scheduler"].T_max, parts["scheduler"].base_lrs = total_steps, [config.learning_rate]


def save_best(config, ddpm, ema, progress, epoch):
    """best_model.pt: the EMA weights, and how they came to be."""
    with ema.applied():
        ddpm.save(Path(config.save_dir) / "best_model.pt", config=vars(config), epoch=epoch, step=progress["step"],
                  test_loss=progress["best_loss"], warning=progress["warning"], log=progress["log"])


# Evaluation


def evaluate_epoch(config, ddpm, ema, train_images, test_images, progress, epoch, writer):
    """Test loss of the EMA weights, the best of which become best_model.pt, and Fréchet distance of a few samples."""
    with ema.applied():
        value = test_loss(config, ddpm, test_images)
        if config.eval_every and epoch % config.eval_every == 0:
            n = min(FEW_SAMPLES, len(train_images), len(test_images))
            samples, _ = draw(config, ddpm, n, sampler="ddim", steps=config.preview_steps)
            result, _, _ = measure(config, samples, None, train_images, test_images, frechet_only=True)
            writer.add_scalar("samples/frechet", result["frechet"], progress["step"])
            writer.add_scalar("samples/frechet_real", result["frechet_real"], progress["step"])
    writer.add_scalar("test/loss", value, progress["step"])
    progress["test_curve"].append([progress["step"], value])
    if value < progress["best_loss"]:
        progress["best_loss"] = value
        save_best(config, ddpm, ema, progress, epoch)


@torch.no_grad()
def test_loss(config, ddpm, test_images):
    """Mean loss over the test images, with the same noise and timesteps each time, so that epochs and runs compare."""
    ddpm.eval()
    generator = torch.Generator().manual_seed(0)
    n = len(test_images)
    timesteps = (torch.arange(n) * config.num_timesteps // n)[torch.randperm(n, generator=generator)]
    total = 0.0
    for index in torch.arange(n).split(256):
        x0, y = test_images.batch(index)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        with autocast(config):
            losses = ddpm(x0, y if config.use_conditional_generation else None, t=timesteps[index].to(x0.device),
                          eps=eps, reduction="none")
        total += losses.double().sum().item()
    return total / n


def bits_per_dim(config, ddpm, test_images):
    """The variational bound of the first `bound_images` test images, the same noise each time."""
    x0, y = test_images.batch(torch.arange(min(config.bound_images, len(test_images))))
    with autocast(config):
        return ddpm.bits_per_dim(x0, y if config.use_conditional_generation else None, seed=config.seed,
                                 terms=min(config.bound_terms, config.num_timesteps), progress=True)


def draw(config, ddpm, n, **options):
    """n images from the same noise each time, and their labels: the digits in turn, None for an unconditional model."""
    y = torch.arange(n) % NUM_CLASSES if config.use_conditional_generation else None
    with autocast(config):
        return ddpm.sample(n, y, seed=config.seed, **options), y


def finish(config, train_images, test_images):
    """What the run came to, from best_model.pt: its loss, a grid by its own sampler and, to evaluate, its measures."""
    from torch.utils.tensorboard import SummaryWriter

    from diffusion import DDPM

    save_dir = Path(config.save_dir)
    ddpm = DDPM.load(save_dir / "best_model.pt", config.device)
    ddpm.timestep_spacing = config.timestep_spacing
    compile_network(config, ddpm)
    loss = test_loss(config, ddpm, test_images) if config.evaluate else ddpm.info["test_loss"]
    sampling = dict(sampler=config.sampler, steps=config.sample_steps, guidance_scale=config.guidance_scale)
    images, _ = draw(config, ddpm, config.num_samples, progress=True, **sampling)
    path = save_dir / "samples" / "final.png"
    with SummaryWriter(save_dir / "tensorboard_logs" / ddpm.info["log"]) as writer:
        write_grid(images, path, writer, "samples/final", ddpm.info["step"])
    print(f"test loss {loss:.5f} ({ddpm.info['epoch']} epochs, {len(test_images):,} images of {config.dataset}, EMA "
          "weights)")
    if config.evaluate:
        bits = bits_per_dim(config, ddpm, test_images)
        print(f"bits per dimension {bits.total:.4f} +- {bits.standard_error:.4f}: prior {bits.prior:.4f}, KL terms "
              f"{bits.kl:.4f}, decoder {bits.decoder:.4f} ({min(config.bound_images, len(test_images)):,} images, "
              f"{min(config.bound_terms, config.num_timesteps)} of {config.num_timesteps} terms)")
        samples, y = draw(config, ddpm, min(config.eval_samples, len(train_images), len(test_images)), progress=True,
                          **sampling)
        report(config, samples, y, train_images, test_images, ddpm.info, **sampling, test_loss=loss,
               bits_per_dim=bits.total, bits_per_dim_error=bits.standard_error)
    print(f"model: {save_dir / 'best_model.pt'}   samples: {path}")


def measure(config, samples, y, train_images, test_images, frechet_only=False):
    """`metrics.measure` of samples in [-1, 1] or uint8, (N, C, H, W), and the classifier that it went by."""
    import metrics

    if samples.is_floating_point():
        samples = ((samples + 1) * 127.5).round().clamp(0, 255).byte()  # as a PNG keeps them
    classifier = metrics.load_classifier(train_images.images, train_images.labels, config.save_dir,
                                         device=config.device, progress=True)
    result, pairs = metrics.measure(classifier, samples, train_images.images, test_images.images, y,
                                    frechet_only=frechet_only)
    return result, pairs, classifier


def report(config, samples, y, train_images, test_images, info=None, **known):
    """Measure samples: a table, the same as JSON, a picture of those nearest to training images.

    `info` is that of the model which drew them, and adds all this to TensorBoard; None is for a folder of PNGs.
    `known` goes into the JSON.
    """
    from torch.utils.tensorboard import SummaryWriter

    result, pairs, classifier = measure(config, samples, y, train_images, test_images)
    pairs, accuracy = pairs.float() / 127.5 - 1, classifier.accuracy(test_images.images, test_images.labels)
    save_dir, name = Path(config.save_dir), "" if info else f"_{Path(config.evaluate).resolve().name}"
    path, picture = save_dir / f"evaluation{name}.json", save_dir / "samples" / f"nearest{name}.png"
    known |= {"dataset": config.dataset, "classifier_accuracy": accuracy}
    if info:
        known |= {"seed": config.seed, "epoch": info["epoch"], "step": info["step"]}
    path.write_text(json.dumps(known | result, indent=2) + "\n", encoding="utf-8")
    if info:
        with SummaryWriter(save_dir / "tensorboard_logs" / info["log"]) as writer:
            for tag, value in result.items():
                if not isinstance(value, list):
                    writer.add_scalar(f"evaluation/{tag}", value, info["step"])
            write_grid(pairs, picture, writer, "samples/nearest", info["step"])
    else:
        write_grid(pairs, picture)
    print(table(result, config.dataset, accuracy))
    print(f"measures: {path}   nearest pairs: {picture}")


# What a person looks at


def log_start(writer, config, ddpm, test_images):
    """The config as a table, the reference's fields first, and a grid of real data."""
    known = vars(config) | {
        "optimizer_type": "AdamW", "scheduler_type": "CosineAnnealingLR" if config.use_scheduler else None,
        "total_params": 2 * sum(p.numel() for p in ddpm.parameters()),  # network and shadow
        "num_classes": ddpm.num_classes, "normalization": "[-1, 1]", "convert_to_rgb": config.channels == 3}
    names = [*FIELDS, *(name for name in known if name not in FIELDS)]
    writer.add_text("config", "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {known[name]} |" for name in names)]))
    x0, _ = test_images.batch(torch.arange(min(config.num_samples, len(test_images))))
    write_grid(x0, Path(config.save_dir) / "samples" / "real.png", writer, "real", 0)


def log_step(writer, bar, progress, scalars, rate):
    """A window's scalars, and the learning rate, to TensorBoard, the progress bar and the loss curve."""
    for tag, value in (scalars | {"train/learning_rate": rate}).items():
        writer.add_scalar(tag, value, progress["step"])
    bar.set_postfix(loss=f"{scalars['train/loss']:.4f}")
    progress["train_curve"].append([progress["step"], scalars["train/loss"]])


def table(result, dataset, accuracy):
    """The result of `metrics.measure` as text: each figure of the samples beside that of real images."""
    result = result | {f"{name}_digit{suffix}": pick(result[f"digits{suffix}"])
                       for name, pick in (("rarest", min), ("commonest", max)) for suffix in ("", "_real")}
    names = {
        "frechet": "Fréchet distance to the test set", "precision": "precision", "recall": "recall",
        "accuracy": "read as the digit asked for", "confidence": "confidence of the classifier",
        "rarest_digit": "share of the rarest digit", "commonest_digit": "share of the commonest digit",
        "colour": "deviation from grey, in grey levels", "nearest": "to the nearest training image, in grey levels",
        "nearest_1st": "the same, first percentile", "copies": "nearer than 99 % of test digits"}
    lines = [f"{result['samples']:,} samples, as many real digits: {'':14}samples      real"]
    for name, text in names.items():
        if name in result:
            real = result.get(f"{name}_real")
            lines.append(f"  {text:48}{result[name]:10.4f}" + (f"{real:10.4f}" if real is not None else ""))
    lines.append(f"features and readings: a classifier of {dataset} with {accuracy:.2%} test accuracy")
    return "\n".join(lines)


def write_grid(images, path, writer=None, tag=None, step=None):
    """Images in [-1, 1], (N, C, H, W), as a PNG with ten columns and, given a writer, in TensorBoard."""
    from torchvision.utils import make_grid, save_image

    grid = make_grid((images.float().cpu() + 1) / 2, nrow=10)
    save_image(grid, path)
    if writer is not None:
        writer.add_image(tag, grid.clamp(0, 1), step)


def plot_losses(config, progress, path):
    """Training and test loss over the steps; with averaged targets that of training is lower by nature, and says so."""
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
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
