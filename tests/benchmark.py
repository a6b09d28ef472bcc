"""How fast, against what this machine can do and what else there is: `python tests/benchmark.py`.

Prints one table. Every comparison runs ours and the other in turn in one process, for several
rounds; times are medians, ratios the median of the rounds' ratios with the smallest and the largest
behind it. Ratios are the other's time over ours: above 1 ours is faster. The peers are diffusers
and denoising_diffusion_pytorch; neither is needed.
"""

import argparse
import gc
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from contestants import (  # noqa: E402
    NAMES,
    changed,
    flipped,
    library,
    make,
    make_pipeline,
    plain,
    precision,
    python_ema,
    settings,
    speed,
    stepper,
)

import train_eval  # noqa: E402
from dataprocess import load_data  # noqa: E402
from ema import EMA  # noqa: E402
from support import machine  # noqa: E402
from support.datasets import read_dataset  # noqa: E402
from support.threads import patient_threads  # noqa: E402

# A parameter, float32: read, written; gradient written, read; two moments and shadow read, written.
STEP_BYTES = 40
# On a card, with bf16: casts 12, copies in bf16 6, norm and clipping 12, AdamW 28, EMA 12.
CARD_BYTES = 70
CARDS = {  # operations a second of dense products, bytes a second: data sheets
    "H100, bf16": (989e12, 3.35e12),
    "RTX 4090, bf16": (165e12, 1.01e12),
    "RTX 3060, bf16": (25e12, 0.36e12),
    "T4, float32": (8.1e12, 0.32e12),
}
COLUMNS = {
    "what": "{}",
    "ms": "{:.4g}",
    "images_s": "{:.4g}",
    "ratio": "{}",
    "equal_ops": "{:.2f}",
    "params_m": "{:.3f}",
    "gflop": "{:.4g}",
    "ceiling": "{:.1%}",
    "peak_mb": "{:.0f}",
    "note": "{}",
}


def make_parser():
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison (default: 5)")
    parser.add_argument(
        "--skip_reference", action="store_true", help="do not time the 233M network: slow on a CPU"
    )
    parser.add_argument(
        "--whole_run",
        action="store_true",
        help="only a whole default run: how much of it is training? 15 minutes on a CPU",
    )
    parser.add_argument("--data_dir", default=str(ROOT / "data"), help="folder of the data")
    parser.add_argument("--device", default=train_eval.device)
    # what a child process does, as JSON: see steps_here
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def main():
    """Measure all parts, then print them."""
    args = make_parser().parse_args()
    if args.child:
        return print(json.dumps(steps_here(args.device, **json.loads(args.child))))
    bench = Bench(args)
    parts = [
        bench.ceilings,
        bench.counts,
        bench.quick_steps,
        bench.memory_kept,
        bench.busy,
        bench.sampling,
        bench.loader,
        bench.after_backward,
        bench.start_up,
        bench.growth,
        bench.on_paper,
    ]
    if not args.skip_reference:
        parts.insert(3, bench.reference_steps)
    if args.whole_run:
        parts = [bench.whole_run]
    try:
        for part in parts:
            print(f"{part.__name__} ...", file=sys.stderr, flush=True)
            part()
    finally:  # what there is, even after Ctrl-C
        if args.json:
            print(json.dumps({"machine": bench.machine, "rows": bench.rows}, indent=1))
        else:
            print_table(bench)


class Bench:
    """The parts of the benchmark, and the rows that they found."""

    def __init__(self, args):
        self.rounds, self.device, self.data_dir = (
            args.rounds,
            args.device,
            str(Path(args.data_dir).resolve()),
        )
        self.skip_reference, self.rows, self.rates = args.skip_reference, [], {}
        self.cuda = torch.device(self.device).type == "cuda"
        chip = torch.cuda.get_device_name() if self.cuda else processor()
        self.machine = (
            f"{chip}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch "
            f"{torch.__version__}, Python {platform.python_version()}, {args.rounds} rounds"
        )
        self.quick = settings("quick", self.device)
        self.reference = settings("reference", self.device)

    def row(self, part, what, **values):
        """Add a row to the table; the names of its values are in COLUMNS."""
        self.rows.append({"part": part, "what": what, **values})

    def clock(self, function, calls=1):
        """Seconds a call, with the device waited for."""
        synchronize = torch.cuda.synchronize if self.cuda else int
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - start) / calls

    def interleave(self, *functions):
        """Seconds a call, for each function a list: in turn, to and fro, after a warm-up."""
        calls = []
        for function in functions:
            first = self.clock(function)
            calls.append(1 if first > 1 else max(1, min(50, int(0.3 / self.clock(function)))))
        times = [[] for _ in functions]
        for number in range(self.rounds):
            for i in range(len(functions))[:: 1 if number % 2 == 0 else -1]:
                times[i].append(self.clock(functions[i], calls[i]))
        return times

    def timed(self, part, what, config, operations, times, ours=None, images=None, **values):
        """Add a row of something timed: `images` of `operations`, against `ours` if given."""
        seconds, kind = statistics.median(times), precision(config)
        self.row(
            part,
            what,
            ms=1e3 * seconds,
            images_s=(images or config.batch_size) / seconds,
            **({} if ours is None else ratio(ours, times)),
            gflop=operations / 1e9,
            ceiling=operations / seconds / self.rates[kind],
            of=kind,
            **values,
        )

    # Ceilings and counts

    def ceilings(self):
        """Matrix products and copies, the best of many."""

        def best(function, most):
            seconds = min(self.clock(function) for _ in range(2))
            return min(
                [seconds] + [self.clock(function) for _ in range(min(most, int(2 / seconds)))]
            )

        def product(n, dtype):
            a = torch.rand(n, n, device=self.device).to(dtype)
            return lambda: a @ a

        for kind in ("fp32", "bf16", "tf32") if self.cuda else ("fp32", "bf16"):
            torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
            n, top, dtype = (
                256,
                8192 if self.cuda else 2048,
                torch.bfloat16 if kind == "bf16" else torch.float32,
            )
            while (
                n < top and 8 * best(product(n, dtype), 0) < 2
            ):  # seconds: bf16 crawls on some CPUs
                n *= 2
            seconds = best(product(n, dtype), 50)
            self.rates[kind] = 2 * n**3 / seconds
            self.row(
                "ceilings",
                f"{kind} product, {n}x{n}",
                ms=1e3 * seconds,
                note=f"{self.rates[kind] / 1e9:.4g} GFLOP/s",
            )
        a, b = torch.rand(2, 2**27, device=self.device)
        seconds = best(lambda: b.copy_(a), 10)
        self.rates["copy"] = 2 * a.nbytes / seconds
        self.row(
            "ceilings",
            "copy of 512 MiB",
            ms=1e3 * seconds,
            note=f"{self.rates['copy'] / 1e9:.4g} GB/s, read and written",
        )

    def counts(self):
        """Operations and bytes of our steps, and the least that they can take here."""
        for name, config in (("reference", self.reference), ("quick", self.quick)):
            for what, sampling in (("training step", False), ("sampling step", True)):
                operations, moved, params, saved = count("ours", config, sampling)
                kind = precision(config)
                floor, bound = max(
                    (operations / self.rates[kind], kind), (moved / self.rates["copy"], "copy")
                )
                note = (
                    f": {STEP_BYTES} B a parameter, 2 x {saved / 1e6:.4g} MB saved for backward"
                    if not sampling
                    else "; guided: 2 network inputs an image"
                    if config.guidance_scale != 1
                    else ""
                )
                self.row(
                    "floors",
                    f"{name}, {what}, batch {config.batch_size}",
                    ms=1e3 * floor,
                    params_m=params / 1e6,
                    gflop=operations / 1e9,
                    note=f"bound by {bound}; {moved / 1e9:.4g} GB at least{note}",
                )

    # Training steps

    def quick_steps(self):
        """The quick recipe."""
        self.steps("training step, the quick recipe", "quick", self.quick)

    def memory_kept(self):
        """What keeping freed memory is worth; no other part keeps it, as one cannot go back."""
        if self.cuda:
            return
        rounds = [
            [child(self.device, "ours", "quick", {}, 40, keep) for keep in (True, False)]
            for _ in range(self.rounds)
        ]
        if not all(map(all, rounds)):
            return self.row(
                "training step, freed memory", "ours", note="a process of its own failed"
            )
        times = [[found["seconds"] for found in each] for each in zip(*rounds)]
        for name, each, found in zip(("kept", "handed back"), times, rounds[0]):
            self.timed(
                "training step, freed memory",
                name,
                self.quick,
                count("ours", self.quick)[0],
                each,
                None if each is times[0] else times[0],
                peak_mb=found["peak_mb"],
            )

    def busy(self):
        """Our step beside a busy program, and two runs at once, without `patient_threads` too."""
        if self.cuda:
            return
        part = "training step, on a busy machine"
        call = dict(
            device=self.device,
            kind="ours",
            model="quick",
            changes={},
            steps=100,
            keep=True,
            seconds=15,
        )
        for patient in (True, False):
            threads = "train_eval.py's threads" if patient else "threads as OpenMP has them"
            alone = child(**call, patient=patient)
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
                beside = child(**call, patient=patient)
                other.kill()
            with ThreadPoolExecutor(2) as pool:
                runs = [pool.submit(child, **call, patient=patient) for _ in range(2)]
                two = [run.result() for run in runs]
            if not all((alone, beside, *two)):
                return self.row(part, threads, note="a process of its own failed")
            quiet = alone["seconds"]
            for what, found in (
                ("alone", [alone]),
                ("beside a busy program", [beside]),
                ("two at once, the slower", two),
            ):
                seconds = max(one["seconds"] for one in found)
                self.row(
                    part,
                    f"{what}, {threads}",
                    ms=1e3 * seconds,
                    note=f"{seconds / quiet:.2f} times that alone",
                )

    def reference_steps(self):
        """The 233M network."""
        self.steps("training step, the reference", "reference", self.reference)

    def steps(self, part, model, config):
        """Ours against each other, two at a time: the reference would not fit four times."""
        mine, found = [], {}
        units = getattr(torch.cpu, "get_capabilities", dict)()
        both = config.bf16 or not self.cuda and units.get("avx512_bf16", False)
        names = {kind: name for kind, name in NAMES.items() if both or kind != "flipped"}
        for kind in list(names)[1:]:
            try:
                pair = [stepper("ours", config), stepper(kind, config)]
            except ImportError as error:
                found[kind] = str(error)
                continue
            ours, theirs = self.interleave(*pair)
            mine += ours
            found[kind] = ours, theirs
            del pair
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
        all_ours = count("ours", config)[0]
        for kind, name in names.items():
            if isinstance(found.get(kind), str):
                self.row(part, name, note=found[kind])
                continue
            operations, _, params, _ = count(kind, config)
            common = {"params_m": params / 1e6, "peak_mb": peak(self.device, kind, model)}
            if kind == "ours":
                self.timed(part, name, config, operations, mine, **common)
                continue
            ours, theirs = found[kind]
            theirs_is = flipped(config) if kind == "flipped" else plain(config)
            self.timed(
                part,
                name,
                theirs_is,
                operations,
                theirs,
                ours,
                **common,
                equal_ops=ratio(ours, theirs)["ratio"] * all_ours / operations,
            )

    # Sampling

    def sampling(self):
        """Sixteen images of the quick recipe, its own way and others."""
        config, n, steps = self.quick, 16, self.quick.sample_steps
        ddpm, y = train_eval.build(config), torch.arange(16, device=self.device) % 10
        machine.compile_network(config, ddpm)
        xT = torch.randn(
            n, config.channels, config.image_size, config.image_size, device=self.device
        )

        def draw(**options):
            speed("ours")
            with machine.autocast(config):
                ddpm.sample(n, y, **options)

        guidance = config.guidance_scale
        once = count("ours", changed(config, guidance_scale=1), sampling=True)[0]
        part = "sampling, 16 images by the quick recipe"
        tries = [  # what, function, times that must be scaled, network inputs an image, note
            (f"ours: {config.sampler}, {steps} steps, guidance {guidance}", draw, 1, 2 * steps, ""),
            (
                f"ours: {config.sampler}, {steps} steps, no guidance",
                lambda: draw(guidance_scale=1),
                1,
                steps,
                "",
            ),
            (
                f"ours: ancestral, 1000 steps, guidance {guidance}",
                lambda: draw(sampler="ddpm", steps=50, start=49, xT=xT),
                20,
                2000,
                "the last 50 timed, times 20",
            ),
        ]
        try:
            pipeline = make_pipeline(config, steps)
            tries.append(
                (
                    f"diffusers DDPMPipeline, {steps} steps, no guidance",
                    pipeline,
                    1,
                    steps,
                    "ratio to ours without guidance: equal operations",
                )
            )
        except ImportError as error:
            self.row(part, "diffusers DDPMPipeline", note=str(error))
        times = self.interleave(*(function for _, function, *_ in tries))
        times = [
            [seconds * scale for seconds in each] for each, (_, _, scale, *_) in zip(times, tries)
        ]
        for i, (what, _, _, inputs, note) in enumerate(tries):
            self.timed(
                part,
                what,
                config if i < 3 else plain(config),
                once * inputs,
                times[i],
                (None, times[0], times[0], times[1])[i],
                images=n,
                note=note,
            )

    # What surrounds the network

    def loader(self):
        """A batch of images, and its share of the quick recipe's step, timed without it."""
        self.quick_step = statistics.median(self.interleave(stepper("ours", self.quick))[0])
        images, moved = (
            load_data(data_dir=self.data_dir, augment=augment, device=self.device)[0]
            for augment in (False, True)
        )
        ours, augmented = endless(images, self.quick), endless(moved, self.quick)
        theirs = torchvision_loader(self.data_dir)
        calls = {
            "dataprocess.Images.epoch": lambda: next(ours),
            "the same, augmenting": lambda: next(augmented),
            "DataLoader, torchvision's MNIST, 2 workers": lambda: [
                part.to(self.device) for part in next(theirs)
            ],
        }
        times = self.interleave(*calls.values())
        for name, each in zip(calls, times):
            self.row("a batch of 16", name, **self.of_step(each, times[0]))
        self.candidates(images)

    def candidates(self, images):
        """What it takes to draw the candidates of a step, and to average the target over them."""
        config, (x0, y) = changed(self.quick, target_references=4096), images.batch(slice(16))
        ddpm, t = train_eval.build(config), torch.arange(len(x0), device=self.device) * 60
        xt, drawn = ddpm.q_sample(x0, t, torch.randn_like(x0)), images.batch(slice(4096))[0][:, :1]
        calls = {
            "drawn": lambda: train_eval.draw_candidates(config, images, x0, y),
            "averaged": lambda: ddpm.posterior_mean(xt, t, x0[:, :1], drawn),
        }
        for name, each in zip(calls, self.interleave(*calls.values())):
            self.row("4,096 references", name, **self.of_step(each, each))

    def after_backward(self):
        """Shadow weights and optimiser."""
        for model in ("quick",) if self.skip_reference else ("quick", "reference"):
            self.updates(model, getattr(self, model))
            gc.collect()

    def updates(self, model, config):
        """Those of one model."""
        ddpm = train_eval.build(config)
        for p in ddpm.parameters():
            p.grad = torch.full_like(p, 1e-8)
        ema, shadow = (
            EMA(ddpm.network, config.ema_decay, start=0),
            [p.detach().clone() for p in ddpm.parameters()],
        )
        optimizer = torch.optim.AdamW(ddpm.parameters(), lr=1e-8, fused=True)
        calls = {
            "EMA.update": ema.update,
            "mul_ and add_ in a loop": python_ema(ddpm, shadow, config.ema_decay),
            "AdamW and EMA.update": lambda: (optimizer.step(), ema.update()),
        }
        times = self.interleave(*calls.values())
        for i, (name, each) in enumerate(zip(calls, times)):
            values = self.of_step(each, times[0] if i == 1 else each)
            self.row(
                f"after backward, {model} model",
                name,
                **values | ({} if model == "quick" else {"note": ""}),
            )

    def of_step(self, times, ours):
        """Time, ratio to ours, and share of our step of the quick recipe."""
        seconds = statistics.median(times)
        return {
            "ms": 1e3 * seconds,
            **({} if times is ours else ratio(ours, times)),
            "note": f"{seconds / self.quick_step:.2%} of our step",
        }

    def start_up(self):
        """From the command to the help, and to the end of the first step of the default run."""
        first_step = (
            "import os, sys, train_eval\ninner = train_eval.train_step\ndef step(*args):\n"
            "    inner(*args)[-1].item()\n    os._exit(0)\ntrain_eval.train_step = step\n"
            "train_eval.main(sys.argv[1:])"
        )

        def run(*command):
            with tempfile.TemporaryDirectory() as folder:
                flags = [] if "--help" in command else ["--save_dir", folder]
                subprocess.run(
                    [sys.executable, *command, *flags],
                    cwd=ROOT,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )

        where = ["--device", self.device, "--data_dir", self.data_dir]
        help_, step = self.interleave(
            lambda: run("train_eval.py", "--help"),
            lambda: run("-c", first_step, *where),
        )
        self.row("start", "python train_eval.py --help", ms=1e3 * statistics.median(help_))
        what = "to the end of the first step, all data in place"
        self.row("start", what, ms=1e3 * statistics.median(step))

    # Growth

    def growth(self):
        """Our step against batch, width and resolution."""
        part, base = "growth of the quick recipe", stepper("ours", self.quick)
        before = count("ours", self.quick)[0]
        for changes in (
            {},
            {"batch_size": 4},
            {"batch_size": 64},
            {"base_channels": 64},
            {"patch_size": 1},
        ):
            config = changed(self.quick, **changes)
            operations, _, params, _ = count("ours", config)
            ours, grown = self.interleave(base, stepper("ours", config))
            what = ", ".join(
                f"{name} {getattr(config, name)}"
                for name in changes or ("batch_size", "base_channels", "patch_size")
            )
            self.timed(
                part,
                what,
                config,
                operations,
                grown,
                ours if changes else None,
                params_m=params / 1e6,
                peak_mb=peak(self.device, "ours", "quick", **changes),
                note=f"{operations / before:.2f} times the operations" if changes else "",
            )

    def whole_run(self):
        """`python train_eval.py`, and the share of its time that training steps take."""
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            said = subprocess.run(
                [
                    sys.executable,
                    ROOT / "train_eval.py",
                    "--save_dir",
                    folder,
                    "--data_dir",
                    self.data_dir,
                    "--device",
                    self.device,
                ],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            minutes = (time.perf_counter() - start) / 60
        steps = float(re.search(r"training steps took ([\d.]+) minutes", said.stdout)[1])
        self.row(
            "python train_eval.py",
            "from start to end",
            note=f"{minutes:.2f} minutes; training steps {steps:.2f}, {steps / minutes:.1%} of it",
        )

    def on_paper(self):
        """The reference on cards: counts over the data sheets' numbers, nothing measured."""
        for batch, (card, (rate, width)) in itertools.product((16, 128), CARDS.items()):
            config = changed(self.reference, batch_size=batch, bf16="bf16" in card)
            operations, moved, params, saved = count("ours", config)
            moved += (CARD_BYTES - STEP_BYTES) * params
            compute, memory = operations / rate, moved / width
            seconds, steps = max(compute, memory), math.ceil(60_000 / batch) * 50
            times = f"{1e3 * compute:.3g} ms products, {1e3 * memory:.3g} ms memory"
            note = f"{times} ({moved / 1e9:.3g} GB); 50 epochs {steps * seconds / 3600:.2g} h"
            self.row(
                "reference on one card, on paper",
                f"{card}, batch {batch}",
                ms=1e3 * seconds,
                images_s=batch / seconds,
                params_m=params / 1e6,
                gflop=operations / 1e9,
                ceiling=compute / seconds,
                of=card.partition(", ")[2],
                peak_mb=(20 * params + saved) / 1e6,
                note=note,
            )


# Measuring


def count(kind, config, sampling=False):
    """Operations of a step, bytes that it must move at least, parameters, bytes saved.

    A multiply-accumulate is two operations. Nothing is computed: the tensors are fake. A training
    step moves STEP_BYTES a parameter, and writes and reads what is saved for the backward pass; a
    sampling step reads the parameters, and reads and writes the images.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = changed(config, device="cpu")
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        FakeTensorMode(),
        mock.patch.object(nn.Module, "to", lambda self, *args, **options: self),
        sdpa_kernel(SDPBackend.MATH),
        machine.autocast(config),
        FlopCounterMode(display=False) as counter,
    ):
        ddpm = make(kind, config)
        x0 = torch.zeros(config.batch_size, config.channels, config.image_size, config.image_size)
        t = torch.zeros(len(x0), dtype=torch.long)
        y = t if ddpm.num_classes is not None else None
        params = sum(p.numel() for p in ddpm.parameters())
        if sampling:
            with torch.no_grad():
                ddpm.eval().denoise(x0, t, y, config.guidance_scale)
            return counter.get_total_flops(), 4 * params + 2 * x0.nbytes, params, 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ddpm.losses(x0, y, t, x0).mean().backward()
        for p in ddpm.parameters():
            saved.pop(p.untyped_storage()._cdata, None)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        return counter.get_total_flops(), STEP_BYTES * params + 2 * kept, params, kept


def ratio(ours, theirs):
    """The other's time over ours: median over the rounds, smallest, largest."""
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    return {"ratio": statistics.median(ratios), "ratio_range": [ratios[0], ratios[-1]]}


def child(device, kind, model, changes, steps=2, keep=False, **options):
    """What `steps_here` returns in a process of its own; None where that failed."""
    asked = json.dumps(
        dict(kind=kind, model=model, changes=changes, steps=steps, keep=keep, **options)
    )
    done = subprocess.run(
        [sys.executable, __file__, "--device", device, "--child", asked],
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def peak(device, kind, model, **changes):
    """Peak memory of two training steps, in MB."""
    found = child(device, kind, model, changes)
    return found and found["peak_mb"]


def steps_here(device, kind, model, changes, steps, keep, seconds=math.inf, patient=False):
    """Median seconds of training steps, and their peak memory in MB.

    That is on CUDA of tensors, on a CPU of the process over what imports took. `keep` is with freed
    memory kept, `patient` with `patient_threads`, as train_eval.py has them. It stops after so many
    `seconds`; the median is of the second half.
    """
    if kind not in ("ours", "flipped", "plain"):
        library(kind)
    if keep:
        machine.keep_freed_memory()
    before = memory("VmRSS")
    step, times = stepper(kind, changed(settings(model, device), **changes)), []
    with patient_threads() if patient else nullcontext():
        while len(times) < 2 or len(times) < steps and sum(times) < seconds:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    cuda = torch.device(device).type == "cuda"
    peak_mb = torch.cuda.max_memory_allocated() / 1e6 if cuda else memory("VmHWM") - before
    return {"seconds": statistics.median(times[len(times) // 2 :]), "peak_mb": peak_mb}


def memory(field):
    """A field of /proc/self/status in MB; unlike ru_maxrss, not with the parent's peak."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024 / 1e6


def endless(images, config):
    """Batches of our loader, epoch after epoch."""
    return itertools.chain.from_iterable(
        images.epoch(config.batch_size, epoch) for epoch in itertools.count()
    )


class Digits(torch.utils.data.Dataset):
    """The training digits as torchvision's MNIST gives them out, wherever they lie."""

    def __init__(self, data_dir, transform):
        (self.images, self.labels), _ = read_dataset("mnist", data_dir)
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i, 0].numpy())), int(self.labels[i])


def torchvision_loader(data_dir):
    """Batches as most load them, epoch after epoch."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.Grayscale(3),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    digits, how = Digits(data_dir, transform), dict(num_workers=2, persistent_workers=True)
    loader = torch.utils.data.DataLoader(digits, batch_size=16, shuffle=True, **how)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def processor():
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_table(bench):
    """The rows below their parts, in columns of the same width."""
    lines = []
    for row in bench.rows:
        cells = {
            name: form.format(row[name]) if row.get(name) is not None else ""
            for name, form in COLUMNS.items()
        }
        if row.get("ratio") is not None:
            low, high = row["ratio_range"]
            cells["ratio"] = f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
        if row.get("ceiling") is not None:
            cells["ceiling"] += f" {row['of']}"
        lines.append((row["part"], list(cells.values())))
    widths = [
        max([len(name), *(len(cells[i]) for _, cells in lines)]) for i, name in enumerate(COLUMNS)
    ]

    def show(cells):
        print(
            "  ".join(
                cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths))
            ).rstrip()
        )

    print(bench.machine)
    show(COLUMNS)
    part = None
    for name, cells in lines:
        if name != part:
            print(f"\n{name}")
        show(cells)
        part = name


if __name__ == "__main__":
    main()
