"""The tables of docs/recipe.md: `python tests/experiments.py TABLE`, or `--list`.

Each row trains the quick recipe and measures it by `train_eval.py --evaluate`. Complete trainings
are used again, stopped ones go on. Flags that are not listed follow those of each training.
`--renew FOLDER` makes of a run of the default what the repository keeps: assets/quick.pt, and the
README's pictures.
"""

import argparse
import io
import json
import re
import signal
import subprocess
import sys
import zlib
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataprocess import load_data  # noqa: E402
from diffusion import DDPM  # noqa: E402
from support import checkpoint, pictures  # noqa: E402

HEADS = {"frechet": "Fréchet", "accuracy": "read as asked", "bits_per_dim": "bits per dimension"}
FORMATS = {"accuracy": "{:.1%}", "bits_per_dim": "{:#.4g}"}  # of others: three digits
ALL = "frechet precision recall accuracy"
SHORT = "--train_size 40000 --epochs 1"  # a third of a whole run
# minutes at 8,000 images a minute, and flags; the schedule of each run ends there
LENGTHS = [(n, f"--train_size {n * 8000} --epochs 1") for n in (1, 2, 5)]
LENGTHS += [(10, "--train_size 40000 --epochs 2"), (15, "")]
FINER = "--num_clusters 250 --timestep_std 0.9"
SLOW, NONE = "--adam_beta2 0.999", "--no-use_conditional_generation"
USUAL = "--num_clusters 0 --no-adaptive_norm --timestep_sampling uniform --target_references 0 "
USUAL += f"--warmup_steps 0 --prediction v --beta_schedule cosine {SLOW}"
BOUND = f"{USUAL} --learning_rate 2e-3 {SHORT}"
GREY = "--channels 1 --image_size 28 --channel_mult 1,4 --attention_resolutions 7 --prediction v "
GREY += f"{NONE} --num_clusters 0 --target_references 0 --beta_schedule cosine --variance learned"
PIXELS = "--patch_size 1 --channel_mult 1,2,4 --beta_schedule straight --num_timesteps 400 "
PIXELS += "--timestep_sampling importance"
FEW_TERMS = "--bound_terms 10 --eval_samples 500"
GREY_BOUND = f"--bound_images 10000 {FEW_TERMS}"
TINY, CLIPPED = "--train_size 8000 --epochs 1", "--loss clipped-vlb"


def drawn(ways, training="", label=""):
    """A row for each way to sample one run, from "sampler steps guidance, ..."; 6/8 is 6 and 8."""
    label += "`{}`, {} steps, guidance {}"
    flags = "--sampler {} --sample_steps {} --guidance_scale {}"
    ways = [way.replace("sde", "sde-dpm++").split() for way in ways.split(", ")]
    ways = [one for way in ways for one in product(*(part.split("/") for part in way))]
    return [(label.format(*way), training, flags.format(*way)) for way in ways]


TABLES = {  # question, columns, rows of (label, flags to train, flags to --evaluate)
    "default": ["How good is it, by steps?", ALL, *drawn("sde 6 1.2/1.1/1")],
    "longer": ["Does a longer run pay?", ALL, *drawn("sde 6 1.2/1.1/1", "--epochs 6")],
    "time_to_quality": ["How good is a run of 1 to 15 minutes?", ALL]
    + [(f"{minutes} min, `{flags or 'no flags'}`", flags, "") for minutes, flags in LENGTHS],
    "skip": ["What does the skip give?", f"{ALL} bits_per_dim"]
    + drawn("sde 6 1.2/1", "--skip_std 0", "without it, ")
    + drawn("sde 6 1.2/1", "", "with it, "),
    "clusters": ["What do clusters within labels give?", ALL]
    + drawn("sde 6 1.2/1", SHORT, "labels alone, ")
    + drawn("sde 6 1.2/1", f"{SHORT} {FINER}", "250 clusters, "),
    "unlabelled": ["How good is the recipe without labels?", "frechet precision recall"]
    + drawn("sde 6 1.1/1", NONE),
    "schedules": ["Which schedule, at how many steps?", ALL]
    + drawn("sde 6/10 1.2", SHORT, "linear, ")
    + drawn("sde 6/10 1.2", f"{SHORT} --beta_schedule straight", "straight, "),
    "ddpm1000": ["Do DDPM's 1000 steps pay? (200 samples)", ALL]
    + [(*row, f"{how} --eval_samples 200") for *row, how in drawn("ddpm 1000 1, sde 6 1")],
    "likelihood": ["How many bits?", "bits_per_dim", ("no flags", "", "")]
    + [("`--variance fixed_small`", BOUND, "")]
    + [("`--variance learned`", f"{BOUND} --variance learned", "")],
    "grey28": ["How many bits does a grey image of 28x28 take?", "bits_per_dim"]
    + [("`--loss vlb`, 8,000 images", f"{GREY} {TINY} --loss vlb", FEW_TERMS)]
    + [(f"`{CLIPPED}`, 8,000 images", f"{GREY} {TINY} {CLIPPED}", FEW_TERMS)]
    + [("`--loss mse`, 40,000 images", f"{GREY} {SHORT}", GREY_BOUND)]
    + [(f"`{CLIPPED}` on pixels, a whole run", f"{GREY} {CLIPPED} {PIXELS}", GREY_BOUND)],
}


def measured(args, columns, training, sampling, seed):
    """The figures of a row by --evaluate. Its training is run to its end, unless that is done."""
    flags = f"{training} {args.flags} --seed {seed}"
    folder = Path(args.folder, re.sub(r"\W+", "_", flags)[:80] + f"-{zlib.crc32(flags.encode())}")
    done = [folder / name for name in ("last.pt", "best_model.pt", "samples/final.png")]
    if not all(path.exists() for path in done):
        script(args, folder, "--resume" if done[0].exists() else flags)
    few = " --bound_images 2" * ("bits_per_dim" not in columns)  # it takes longer than the samples
    script(args, folder, f"--evaluate {sampling}{few}")
    newest = max(folder.glob("evaluation*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = json.loads(newest.read_text(encoding="utf-8"))
    forms = [(found.get(name), FORMATS.get(name, "{:#.3g}")) for name in columns]
    return ["" if x is None else form.format(x).replace("%", " %") for x, form in forms]


def script(args, folder, flags):
    """Run train_eval.py in a folder and return what it prints; if it fails, so do we."""
    words = [sys.executable, str(ROOT / "train_eval.py")]
    words += ["--recipe", "quick", "--data_dir", args.data_dir, "--save_dir", str(folder)]
    print(*words, flags, file=sys.stderr, flush=True)
    run = subprocess.run(words + flags.split(), stdout=subprocess.PIPE, encoding="utf-8")
    return sys.exit(run.returncode) if run.returncode else run.stdout


def renew(folder, data_dir, root=ROOT):
    """Write assets/quick.pt, a run's best model in half precision, and the README's pictures."""
    saved = checkpoint.load_checkpoint(Path(folder, "best_model.pt"), ("weights",))
    saved["weights"] = {name: value.half() for name, value in saved["weights"].items()}
    for constants in (saved["info"]["config"], saved["info"]["script"]):
        constants |= {"data_dir": "data", "save_dir": "checkpoints"}  # not those of a machine
    checkpoint.save_checkpoint(root / "assets" / "quick.pt", saved)
    ddpm = DDPM.load(root / "assets" / "quick.pt")
    n, generator = 6 * pictures.COLUMNS, torch.Generator(ddpm.device).manual_seed(0)
    noise = ddpm.draw_noise(n, generator)
    y = ddpm.draw_classes(n, torch.arange(n, device=ddpm.device) % 10, generator)
    steps = pictures.FRAMES  # more than its own, for a smooth film
    how = ddpm.sampler, None, ddpm.guidance_scale, generator
    _, frames = pictures.watch(noise, ddpm.walk(noise, ddpm.timesteps(steps), y, *how), steps)
    pictures.write_denoising(frames, root / "images" / "denoising.gif", 600_000)
    sizes = {"image_size": ddpm.image_size, "channels": ddpm.channels}
    x0, y = load_data("mnist", data_dir, **sizes)[1].batch(slice(3))
    film_strip(ddpm, x0, y, root / "images" / "process.png")


def film_strip(ddpm, x0, y, path):
    """A PNG: how noise is added to images, (N, C, H, W), and removed to N samples of labels y."""
    columns, steps = 9, min(100, ddpm.num_timesteps)
    sequence = ddpm.sample(len(x0), y, steps=steps, seed=0, return_sequence="xt")
    times = torch.tensor([*ddpm.timesteps(steps)[1:], -1], device=ddpm.device)
    angles = ddpm.alpha_bar(times).flatten().sqrt().acos()
    even = torch.linspace(angles[0], 0, columns)
    picked = [(angles - angle).abs().argmin().item() for angle in even]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(ddpm.device)
    x0 = x0.to(ddpm.device)
    forward = [ddpm.q_sample(x0, times[i].expand(len(x0)), eps) for i in reversed(picked)]
    halves = {
        "Forward: noise is added to real digits": (torch.stack(forward), picked[::-1]),
        "Reverse: the network removes noise": (sequence[picked], picked),
    }
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    for axis, (title, (images, at)) in zip(figure.subplots(2), halves.items()):
        images = images.transpose(0, 1).mean(dim=2).flatten(0, 1)[:, None]  # a row for each image
        picture = make_grid(images.clamp(-1, 1).cpu(), nrow=len(at), pad_value=1)[0]
        axis.imshow(picture.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        names = ["image" if (t := times[i].item()) < 0 else f"t = {t}" for i in at]
        width = picture.shape[1] / len(at)
        axis.set_xticks([width * (i + 0.5) for i in range(len(at))], names)
        axis.set(yticks=[], title=title, frame_on=False)
        axis.tick_params(length=0)
    figure.savefig(buffer := io.BytesIO(), dpi=160, format="png")
    Image.open(buffer).convert("L").quantize(16).save(path, format="png", optimize=True)


def main():
    """Print a table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", nargs="?", choices=TABLES, metavar="TABLE", help="see --list")
    parser.add_argument("--list", action="store_true", help="names and questions of the tables")
    parser.add_argument("--renew", metavar="FOLDER", help="a run of the default recipe")
    parser.add_argument("--data_dir", default="data", help="folder of the data")
    parser.add_argument("--folder", default="experiments", help="where the runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    args, flags = parser.parse_known_args()
    args.flags = " ".join(flags)
    if args.renew:
        return renew(args.renew, args.data_dir)
    if args.list or not args.table:
        return print("\n".join(f"{name:16}{table[0]}" for name, table in TABLES.items()))
    signal.signal(signal.SIGINT, lambda *_: None)  # the script saves and stops, and then we do
    columns, rows = TABLES[args.table][1].split(), TABLES[args.table][2:]
    print("| |", " | ".join(HEADS.get(column, column) for column in columns), "|")
    print("|" + " --- |" * (1 + len(columns)))
    for label, *flags in rows:
        found = zip(*(measured(args, columns, *flags, seed) for seed in args.seeds))
        cells = [", ".join(filter(None, texts)) for texts in found]
        print(f"| {label} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
