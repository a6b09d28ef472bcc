"""What ten minutes on a GPU should settle: `python tests/gpu_check.py`.

Ceilings of the card; a training step eager, compiled and with CUDA graphs, at two batches and in
both layouts: time, how long the device works, launches, memory and the loss beside float32;
sampling; then the CUDA tests, a short run of the reference, the quick run and its evaluation.
`--device cpu` with flags of a tiny network tries the whole on a machine without a card.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_eval  # noqa: E402
from dataprocess import Images  # noqa: E402
from support import configurator, machine, processes  # noqa: E402

LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
STEPS = (  # name, batch, mode of torch.compile or None, layout, flags
    ("eager", 16, None, "NHWC", ()),
    ("compiled", 16, "default", "NHWC", ()),
    ("CUDA graphs", 16, "reduce-overhead", "NHWC", ()),
    ("compiled", 128, "default", "NHWC", ()),
    ("compiled", 16, "default", "NCHW", ()),
    ("eager", 128, None, "NHWC", ()),
    ("eager float32", 16, None, "NHWC", ("--no-bf16",)),
)
RUNS = (  # seconds, name, command
    (90, "tests", "-m pytest -q tests/test_machine.py tests/test_ema.py tests/test_train_eval.py"),
    (
        120,
        "reference",
        "train_eval.py --recipe reference --train_size 9600 --epochs 1 "
        "--log_every 50 --save_every 300 --sample_steps 50 --save_dir {folder}/reference",
    ),
    (120, "quick", "train_eval.py --recipe quick --save_dir {folder}/quick"),
    (60, "evaluation", "train_eval.py --evaluate --save_dir {folder}/quick"),
)


class Bench:
    """Timings on one device; `extra` are flags for every configuration."""

    def __init__(self, device, extra):
        self.device, self.extra = device, extra
        self.cuda = device.startswith("cuda")

    def clock(self, function, calls, rounds=3):
        """Milliseconds of a call, the best of some rounds."""
        times = []
        for _ in range(rounds):
            self.wait()
            began = time.perf_counter()
            for _ in range(calls):
                function()
            self.wait()
            times.append((time.perf_counter() - began) / calls * 1e3)
        return min(times)

    def wait(self):
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def busy(self, function, calls=3):
        """Milliseconds that the GPU works in a call, and the kernels it is handed."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        with profile(activities=activities) as found:
            for _ in range(calls):
                function()
            self.wait()
        events = found.key_averages()
        work = sum(e.self_device_time_total for e in events if e.device_type.name == "CUDA")
        launches = sum(e.count for e in events if "LaunchKernel" in e.key)
        return work / calls / 1e3, launches // calls

    def ceilings(self, n=8192):
        """What the device reaches at most."""
        n = n if self.cuda else 256
        a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        b, c = torch.randn(2, n**2, device=self.device)
        product, copy = self.clock(lambda: a @ a, 20), self.clock(lambda: c.copy_(b), 20)
        rate, width = 2 * n**3 / product / 1e9, 2 * b.nbytes / copy / 1e6
        print(f"ceilings: {rate:.1f} TFLOP/s in bf16, {width:.0f} GB/s", flush=True)

    def step(self, name, batch, mode, layout, flags):
        """One line about the training step of the reference, in one way."""
        flags = ["--device", self.device, "--recipe", "reference", "--batch_size", str(batch)]
        flags += [*self.extra, "--train_size", str(batch), "--epochs", "1", *flags]
        limits = train_eval.LEAST, train_eval.MOST
        script, scope = train_eval.__file__, vars(train_eval)
        config = configurator.configure(script, scope, *limits, flags).config
        pictures = torch.randint(256, (batch, 1, config.image_size, config.image_size)).byte()
        labels = torch.arange(batch) % 10
        images = Images("mnist", pictures, labels, config.channels, num_labels=10)
        images.images, images.labels = (x.to(self.device) for x in (images.images, images.labels))
        images.y, images.device = images.labels, torch.device(self.device)
        train_eval.load_images = lambda config: (images, images)
        torch._dynamo.reset()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run = train_eval.prepare(config, {})
        run.ddpm.to(memory_format=LAYOUTS[layout])
        model = processes.parallel(run.ddpm).train()
        if mode:
            run.ddpm.network.compile(mode=mode)
        x0, y = images.batch(slice(None))
        x0 = x0.contiguous()

        def step():
            return train_eval.train_step(run, model, x0, y, 1e-6)[0].mean()

        began = time.perf_counter()
        step()
        self.wait()
        first = time.perf_counter() - began
        if self.cuda:
            torch.cuda.set_sync_debug_mode("error")  # an error if a step waits for the device
            step()
            torch.cuda.set_sync_debug_mode("default")
        ms = self.clock(step, 30 if self.cuda else 1)
        work, launches = self.busy(step)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0
        print(
            f"{name:14} batch {batch:3} {layout}: {ms:8.2f} ms a step, device busy {work:8.2f}, "
            f"{launches} launches, start {first:.0f} s, peak {peak:.1f} GB, loss {step():.5f}",
            flush=True,
        )
        return run

    def sampling(self, run, n):
        """The time of a call of the network in sampling, and what an evaluation would take."""
        with machine.autocast(run.config):
            ms = self.clock(lambda: run.ddpm.sample(n, steps=5, sampler="ddpm"), 1) / 5
        minutes = ms * 10_000 * 1000 / n / 6e4
        print(f"sampling {n}: {ms:.1f} ms a call; 10,000 images of 1000 steps {minutes:.1f} min")


def main(argv=None):
    """Print all lines. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", default="gpu_check", help="where the runs leave their files")
    parser.add_argument("--steps_only", action="store_true", help="leave out tests and runs")
    args, extra = parser.parse_known_args(argv)
    bench = Bench(args.device, extra)
    bench.ceilings()
    for name, batch, mode, layout, flags in STEPS if bench.cuda else STEPS[::6]:
        run = bench.step(name, batch, mode, layout, flags)
    bench.sampling(run, 256 if bench.cuda else 2)
    for seconds, name, command in () if args.steps_only else RUNS:
        command = [sys.executable, *command.format(folder=args.folder).split()]
        print(f"== {name}", flush=True)
        try:
            subprocess.run(command, cwd=ROOT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: not done in {seconds} seconds", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
