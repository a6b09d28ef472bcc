"""Does the test suite notice faults? Plant small ones, one at a time, and see which tests fail.

`python tests/mutants.py [NAMES]` works in copies of this folder, on Linux. NAMES are names or files
of faults, or patterns of them, such as 'ema*'; without any, all faults are planted. A fault that no
test notices has SURVIVED: a test is missing.
"""

import argparse
import fnmatch
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", "checkpoints", "images", "data", "shared", "__pycache__", ".*_cache")
PYTEST = ["-n", "0", "-m", "slow or not slow", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
# Imported once: the tests of each fault run in a fork, which begins with these.
IMPORTED = ("pytest", "matplotlib.figure", "torch._dynamo", "torch.utils.tensorboard")
IMPORTED += ("torchvision.transforms.v2",)


class Fault(NamedTuple):
    """In `file` the text `old`, which occurs there once, becomes `new`.

    `tests` are the test files that should notice, without test_ and .py; `only` is for pytest's -k.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    only: str = ""


def main(argv=None):
    """Returns the exit status: 0, 1 if a fault survives, 2 if faults or tests are not in order."""
    parser = argparse.ArgumentParser(prog="mutants.py", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="names or files of faults, or patterns of them")
    parser.add_argument("--list", action="store_true", help="print the names and files alone")
    parser.add_argument("--jobs", type=int, default=1, help="faults at once (default: 1)")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for a fault's tests")
    options = parser.parse_args(argv)
    faults = []
    for where, texts in FAULTS.items():
        file, *tests = where.split(" | ")
        faults += [Fault(name, file, *texts[name], *tests) for name in texts]
    names, texts = [f.name for f in faults], {f.file: (ROOT / f.file).read_text() for f in faults}
    wrong = [f.name for f in faults if texts[f.file].count(f.old) * names.count(f.name) != 1]
    if wrong:
        print(f"not once in its file, or two of one name: {', '.join(wrong)}", file=sys.stderr)
        return 2
    patterns = options.names or ["*"]
    faults = [f for f in faults if any(fnmatch.fnmatch(x, p) for x in f[:2] for p in patterns)]
    if options.list:
        print("\n".join(f"{fault.name:45} {fault.file}" for fault in faults))
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # bytecode of before could hide a fault
    for name in IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        folders = [Path(scratch, str(k)) for k in range(options.jobs)]
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        whole = {f[4:]: f._replace(old="", new="") for f in faults}  # no fault for these tests
        for fault, failed, _ in plant([*whole.values()], folders, options):
            if failed:
                print(f"without a fault, {fault.tests} | {fault.only}: {failed}")
                return 2
        print("without a fault all these tests pass", flush=True)
        survivors = []
        for fault, failed, seconds in plant(faults, folders, options):
            print(f"{fault.name:45} {seconds:4.0f} s  {failed or 'SURVIVED'}", flush=True)
            survivors += [] if failed else [fault.name]
    print(f"{len(faults)} faults, {len(survivors)} survived: {', '.join(survivors) or 'none'}")
    return 1 if survivors else 0


def plant(faults, folders, options):
    """Plant each fault in a free folder. Yields (fault, the first test that fails, seconds)."""
    waiting, free, running = faults[::-1], list(folders), {}
    try:
        while waiting or running:
            if waiting and free:
                fault, folder, began = waiting.pop(), free.pop(), time.monotonic()
                text = (folder / fault.file).read_text("utf-8")
                (folder / fault.file).write_text(text.replace(fault.old, fault.new), "utf-8")
                running[run_tests(folder, fault, options)] = fault, folder, text, began
                continue
            pid = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT).si_pid
            os.killpg(pid, signal.SIGKILL)  # what the tests have left running
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            fault, folder, text, began = running.pop(pid)
            (folder / fault.file).write_text(text, "utf-8")
            said = (folder / "said").read_text("utf-8", errors="replace")
            failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.M)
            failed += [f"pytest ended with {status}"] * bool(status)
            free.append(folder)
            yield fault, "".join(failed[:1]), time.monotonic() - began
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run_tests(folder, fault, options):
    """Have a process run the tests in a folder, and write to its file `said`. Returns its id."""
    if pid := os.fork():
        os.setpgid(pid, pid)  # with all that the tests start
        return pid
    status = 1
    try:
        signal.alarm(options.timeout)
        os.chdir(folder)
        for number, name in enumerate((os.devnull, "said", "said")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
        sys.path[0], sys.modules["__main__"] = str(folder), types.ModuleType("__main__")
        files = [f"tests/test_{name}.py" for name in fault.tests.split()]
        status = sys.modules["pytest"].main([*PYTEST, *files, "-k", fault.only])
        sys.stdout.flush()
    finally:
        os._exit(status)


# The faults: {"file | test files | -k expression, if any": {name: (old text, new text)}}.
FAULTS = {
    "process.py | against_diffusers": {
        "cosine-schedule-without-offset": ("(t + 0.008) / 1.008 * math.pi", "t * math.pi"),
        "schedule-that-stands-for-another": ('"cosine": cosine_betas', '"cosine": linear_betas'),
    },
    "process.py | process": {
        "linear-schedule-not-scaled": ("scale = 1000 / num_timesteps", "scale = 1.0"),
        "straight-schedule-not-of-unit-variance": (
            "(1 - u) ** 2 / ((1 - u) ** 2 + u**2)",
            "(1 - u) ** 2",
        ),
        "skip-weights-exchanged": (
            "times(alpha_bar.sqrt(), own * xt) + noise * x0",
            "times(alpha_bar.sqrt(), noise * xt) + own * x0",
        ),
        "skip-alike-for-grey-and-black": ("(1.01 - x0.clamp(-1, 1) ** 2)", "torch.ones_like(x0)"),
        "cosine-schedule-not-capped": ("f[:-1]).clamp(max=0.999)", "f[:-1])"),
        "zero-terminal-snr-not-shifted": ("((root - root[-1]) * root[0]", "(root * root[0]"),
        "tables-cast-to-float32": ("if self.betas.dtype != torch.float64:", "if False:"),
        "alpha-bar-one-timestep-off": (
            "self.alphas_cumprod[t.clamp(min=0)]",
            "self.alphas_cumprod[(t - 1).clamp(min=0)]",
        ),
        "first-timestep-taken-for-the-image": ("where(t < 0, 1.0,", "where(t <= 0, 1.0,"),
        "q-sample-coefficients-swapped": (
            "times(alpha_bar.sqrt(), x0) + times((1 - alpha_bar).sqrt(), eps)",
            "times((1 - alpha_bar).sqrt(), x0) + times(alpha_bar.sqrt(), eps)",
        ),
        "posterior-coefficients-swapped": (
            "(1 - alpha_bar_t), x0) + times(\n"
            "            alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t), xt",
            "(1 - alpha_bar_t), xt) + times(\n"
            "            alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t), x0",
        ),
        "posterior-always-of-one-step": ("t - 1 if s is None else s", "t - 1"),
        "posterior-mean-size-not-halved": (
            "(alpha_bar / (1 - alpha_bar) / 2)",
            "(alpha_bar / (1 - alpha_bar))",
        ),
        "v-target-sign": ("(-(1 - alpha_bar).sqrt(), alpha", "((1 - alpha_bar).sqrt(), alpha"),
        "x0-from-eps-coefficient": ("- times(noise / determinant,", "- times(noise * determinant,"),
        "eps-from-x0-sqrt-forgotten": ("times(self.snr(t).sqrt(), x0)", "times(self.snr(t), x0)"),
        "min-snr-ratio-of-v": ("(of_x0 - of_eps * snr.sqrt())", "(of_eps * snr.sqrt())"),
        "fixed-variances-exchanged": (
            "return torch.where(s[:, None, None, None] < 0, smallest, small).log(), large.log()",
            "return large.log(), torch.where(s[:, None, None, None] < 0, smallest, small).log()",
        ),
        "variance-of-the-decoder-is-beta": (
            "self.betas[0] * self.betas[1] / (1 - self.alphas_cumprod[1])",
            "self.betas[0]",
        ),
        "fixed-large-variance-at-the-last-step": ("(s >= 0).double()[", "(s > -2).double()["),
        "step-eta-not-squared": ("sigma2 = eta**2 *", "sigma2 = eta *"),
        "step-eps-as-without-noise": (
            "(1 - alpha_bar_s - sigma2).clamp",
            "(1 - alpha_bar_s).clamp",
        ),
        "step-variance-for-sigma": (
            "(self.log_variance(t, s, variance_fraction) / 2).exp()",
            "self.log_variance(t, s, variance_fraction).exp()",
        ),
        "step-noise-on-the-image": ("std * (s >= 0)[:, None, None, None]", "std"),
        "extrapolation-in-log-alpha-bar": ("self.alpha_bar(u).logit()", "self.alpha_bar(u).log()"),
        "trailing-spacing-one-off": (".round() - 1\n", ".round().clamp(max=start)\n"),
        "linspace-spacing-not-down-to-0": (
            "torch.linspace(start, 0, steps",
            "torch.linspace(start, min(1, start), steps",
        ),
        "spacings-exchanged": (
            "SPACINGS[self.timestep_spacing](",
            'SPACINGS[{"trailing": "linspace"}.get(self.timestep_spacing, "trailing")](',
        ),
    },
    "diffusion.py | process": {
        "eta-given-is-ignored": ("eta = own_eta if eta is None else eta", "eta = own_eta"),
        "ddpm-without-noise": ('"ddpm": (1.0, 1)', '"ddpm": (0.0, 1)'),
        "dpm-of-order-1": ('"dpm++": (0.0, 2),', '"dpm++": (0.0, 1),'),
        "second-order-on-the-last-step": (
            "x0_before is not None and after >= 0",
            "x0_before is not None",
        ),
        "extrapolated-x0-remembered": ("t_before = predicted, t", "t_before = x0, t"),
        "extrapolated-x0-with-the-old-eps": (" eps = self.eps_from_x0(x0, xt, t)\n", " pass\n"),
    },
    "diffusion.py | likelihood": {
        "vlb-not-times-timesteps": ("bound_weight * self.num_timesteps *", "bound_weight *"),
    },
    "diffusion.py | diffusion": {
        "clipped-bound-not-clipped": (' == "clipped-vlb"', ' == "clipped"'),
        "clipping-stops-the-gradient": ("x0 + (inside - x0).detach()", "inside"),
        "a-right-black-is-driven-on": ("inside == true, inside,", "inside != inside, inside,"),
        "skip-not-clipped-in-training": ("clipped(output, target)", "output"),
        "clean-weight-ignored": ("elif self.clean_weight:", "if False:"),
        "error-in-units-of-no-noise": ("times(weight.sqrt(), clipped", "times(weight, clipped"),
        "labels-mostly-dropped": (
            "torch.where(drawn < self.label_dropout",
            "torch.where(drawn > self.label_dropout",
        ),
        "labels-dropped-at-evaluation": (
            "self.drop_labels(y) if self.training else y",
            "self.drop_labels(y)",
        ),
        "mse-and-l1-exchanged": (
            '"mse": (torch.square, 0.001), "l1": (torch.abs, 0.001)',
            '"mse": (torch.abs, 0.001), "l1": (torch.square, 0.001)',
        ),
        "references-whatever-their-label": ("*images, allowed=allowed)", "*images)"),
        "references-target-with-the-old-eps": ("self.eps_from_x0(mean, xt, t)", "eps"),
        "hybrid-loss-not-detached": ("output = output.detach()", "pass"),
        "hybrid-loss-weight-constant": (
            '"mse": (torch.square, 0.001)',
            '"mse": (torch.square, 0.01)',
        ),
        "min-snr-weights-ignored": ("            if self.min_snr_gamma:", "            if False:"),
        "x0-not-clipped": (
            "self.x0_from_output(output, xt, t).clamp(-1, 1)",
            "self.x0_from_output(output, xt, t)",
        ),
        "eps-of-the-unclipped-x0": (
            "return x0, self.eps_from_x0(x0, xt, t)",
            "return x0, self.eps_from_x0(self.x0_from_output(output, xt, t), xt, t)",
        ),
        "guidance-one-too-strong": (
            "uncond + guidance_scale * (cond - uncond)",
            "cond + guidance_scale * (cond - uncond)",
        ),
        "guidance-0-sees-the-labels": (
            "no_label if y is None or guidance_scale == 0 else y",
            "no_label if y is None else y",
        ),
        "guidance-of-the-learned-variance": (
            "output[:, self.channels :] = cond[:, self.channels :]",
            "pass",
        ),
        "learned-variance-not-from-0-to-1": (
            "(output[:, self.channels :] + 1) / 2",
            "output[:, self.channels :]",
        ),
        "network-output-of-another-shape-taken": (
            "        output = output.view(len(inputs[0]), self.outputs, *xt.shape[2:])\n",
            "",
        ),
        "class-shares-ignored": ("self.class_shares or [[1]", "[[1]"),
        "clusters-drawn-whatever-the-label": (
            "if y is None else shares[y]",
            "if False else shares[0 * y]",
        ),
        "clusters-of-the-first-label-alone": ("else y * shares.shape[1] + drawn", "else drawn"),
        "clusters-numbered-without-the-labels": (
            "self.num_classes - shares.numel() + drawn",
            "drawn",
        ),
        "clusters-never-become-their-label": ("self.label_of[y], y)", "y, y)"),
        "candidates-of-a-label-without-its-clusters": ("self.label_of[classes])", "classes)"),
        "skip-not-taken": ("if self.skip_std else prediction", "if False else prediction"),
        "steps-from-a-lower-start-one-off": (
            "(start + 1) / self.num_timesteps",
            "start / self.num_timesteps",
        ),
        "sampling-with-gradients": ("    @torch.no_grad()\n    def walk", "    def walk"),
        "sampling-with-dropout": (
            "with evaluating(self):\n                predicted",
            "with torch.no_grad():\n                predicted",
        ),
        "returned-x0-and-xt-exchanged": (
            'xt if return_sequence == "xt" else x0',
            'x0 if return_sequence == "xt" else xt',
        ),
        "interpolation-from-pure-noise": ("xT=mixed, start=t,", "xT=mixed,"),
        "interpolation-draws-labels": ('options["guidance_scale"] = 0', "pass"),
        "loaded-model-in-training-mode": ("ddpm.to(device).eval()", "ddpm.to(device)"),
    },
    "likelihood.py | likelihood": {
        "bound-in-nats": (
            "terms.flatten(1).mean(dim=1) / math.log(2)",
            "terms.flatten(1).mean(dim=1)",
        ),
        "prior-left-out-of-the-bound": (
            "bits.mean(dim=1), bits.sum(dim=0)",
            "bits.mean(dim=1), bits[1:].sum(dim=0)",
        ),
        "kl-direction": (
            "difference = true_log_variance - log_variance",
            "difference = log_variance - true_log_variance",
        ),
        "decoder-at-timestep-1-too": ("torch.where((t == 0)[:", "torch.where((t <= 1)[:"),
        "decoder-tails-exchanged": (
            "brightest, inside)\n    return torch.where(x0 < -0.999, darkest",
            "darkest, inside)\n    return torch.where(x0 < -0.999, brightest",
        ),
        "bound-interval-not-weighted": ("(high - low) * term.double()", "term.double()"),
        "bound-ignores-labels": ("ddpm.denoise(xt, t, y)", "ddpm.denoise(xt, t)"),
    },
    "timesteps.py | timesteps": {
        "uniform-without-the-last-timestep": (
            "torch.randint(self.num_timesteps, (n,)",
            "torch.randint(self.num_timesteps - 1, (n,)",
        ),
        "clean-end-left-out": ("drawn < self.CLEAN_SHARE", "drawn < 0"),
        "logit-normal-one-too-far": (".long().clamp(max=self.num_timesteps - 1)", ".long()"),
        "importance-weights-inverted": ("(1 / (len(p) * p[t])).float()", "(len(p) * p[t]).float()"),
        "importance-by-the-mean": (
            "self.losses.square().mean(dim=1).sqrt()",
            "self.losses.mean(dim=1)",
        ),
        "importance-begins-too-early": (
            "(self.counts >= self.HISTORY).all()",
            "(self.counts >= self.HISTORY).any()",
        ),
        "importance-without-uniform-share": (
            "p = (1 - self.UNIFORM_SHARE) * size / size.sum() + self.UNIFORM_SHARE / len(size)",
            "p = size / size.sum()",
        ),
        "importance-losses-of-a-batch-overwritten": (
            "(self.counts[t] + earlier) % self.HISTORY",
            "self.counts[t] % self.HISTORY",
        ),
        "importance-remembers-nan": (
            "finite = losses.isfinite()",
            "finite = torch.ones_like(t, dtype=torch.bool)",
        ),
    },
    "ema.py | ema": {
        "ema-start-one-off": ("if self.step == self.start:", "if self.step - 1 == self.start:"),
        "ema-not-copied-before-start": ("if self.step < self.start:", "if False:"),
        "ema-decay-beyond-its-value": (
            "min(self.decay, (1 + k) / (10 + k))",
            "(1 + k) / (10 + k)",
        ),
        "ema-ramp-counted-from-step-0": (
            "k = (self.step - self.start) // self.update_rate",
            "k = self.step // self.update_rate",
        ),
        "ema-update-rate-ignored": (" and self.step % self.update_rate == 0", ""),
        "ema-buffers-not-copied": ("copied.copy_(buffer)", "pass"),
        "ema-weights-not-restored": (
            "finally:\n            self._swap()",
            "finally:\n            pass",
        ),
        "ema-step-not-loaded": ('self.step = state["step"]', "pass"),
    },
    "unet.py | unet": {
        "attention-not-scaled": (" * q.shape[1] ** -0.5", ""),
        "attention-at-the-wrong-resolutions": (
            "resolution in attention_resolutions))",
            "resolution * 2 in attention_resolutions))",
        ),
        "skip-connections-in-the-wrong-order": (
            "torch.cat([h, skips.pop()], dim=1)",
            "torch.cat([h, skips.pop(0 if skips[0].shape == skips[-1].shape else -1)], dim=1)",
        ),
        "zero-init-of-blocks-forgotten": (
            "self.conv2 = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))",
            "self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)",
        ),
        "time-frequencies-one-off": (
            "torch.arange(dim // 2) / (dim // 2)",
            "torch.arange(dim // 2) / (dim // 2 - 1)",
        ),
        "time-not-told-to-the-blocks": ("self.norm2(h + conditioning)", "self.norm2(h)"),
        "adaptive-norm-without-one-plus": ("* (1 + scale) + shift", "* scale + shift"),
        "no-label-is-label-0": ("torch.full_like(t, self.num_classes)", "torch.zeros_like(t)"),
        "label-not-told-to-the-network": (
            "embedding = embedding + self.label_embedding(y)",
            "embedding = embedding + 0 * self.label_embedding(y)",
        ),
        "dropout-ignored": ("self.dropout(F.silu(h))", "F.silu(h)"),
    },
    "metrics.py | metrics": {
        "frechet-cross-term-once": ("cov_b.trace() - 2 * overlap", "cov_b.trace() - overlap"),
        "precision-and-recall-exchanged": (
            "return among(samples, real), among(real, samples)",
            "return among(real, samples), among(samples, real)",
        ),
        "neighbour-one-off": ("d.kthvalue(k + 1, dim=1)", "d.kthvalue(k, dim=1)"),
        "copies-of-test-images-are-sought": (
            "distances, index = nearest(samples, train)",
            "distances, index = nearest(samples, test)",
        ),
        "classifier-reads-in-training-mode": (
            "        self.eval()\n        device",
            "        device",
        ),
        "samples-cut-not-rounded-to-bytes": ("* 127.5).round().clamp", "* 127.5).clamp"),
    },
    "metrics.py | machine | metrics_mix": {
        "samples-left-on-their-device": ("images.to(others.device)", "images"),
        "features-left-on-their-device": ("    samples = samples.to(real)\n", ""),
    },
    "dataprocess.py | dataprocess": {
        "augmentation-in-the-test-split": ("        switches = {}  #", "        #"),
        "colours-end-in-black": ('"zeros" if on_black else "border"', '"zeros"'),
        "augmentation-after-normalisation": (
            "            x = augment(x, ",
            "            x = 127.5 + 127.5 * augment(x / 127.5 - 1, ",
        ),
        "order-the-same-in-every-epoch": ("((epoch, self.seed))", "((0, self.seed))"),
        "last-partial-batch-dropped": (
            "order.split(batch_size)[start:]",
            "order[: len(order) // batch_size * batch_size].split(batch_size)[start:]",
        ),
        "few-images-not-spread": ("device=self.device) * len(self) // n", "device=self.device)"),
        "clusters-that-are-empty-become-black": (
            "torch.where(count > 0, sums / count.clamp(min=1), centres)",
            "sums / count.clamp(min=1)",
        ),
        "clusters-across-labels": (
            "if within_labels:\n            groups",
            "if False:\n            groups",
        ),
    },
    "support/datasets.py | dataprocess": {
        "hidden-folders-measured": (
            'folders[:] = [name for name in folders if not name.startswith(".")]',
            "pass",
        ),
        "grids-measured-as-images": ('png.name in ("real.png", "final.png")', "False"),
        "labels-of-the-archive-exchanged": (
            "archive.extractfile(name).read() for name in FILES",
            "archive.extractfile(of).read() for name, of in zip(FILES, (FILES * 3)[::3])",
        ),
        "splits-of-the-archive-exchanged": (
            "archive.extractfile(name).read() for name in FILES",
            "archive.extractfile(of).read() for name, of in zip(FILES, FILES[2:] + FILES[:2])",
        ),
        "data-file-longer-than-its-header-says-taken": (
            "len(data) != length",
            "len(data) < length",
        ),
        "png-with-wrong-checksum-taken": ("image.verify()", "pass"),
    },
    "support/folders.py | folders": {
        "val-taken-for-a-label": ('"test", "val", "valid"', '"test", "valid"'),
        "labels-by-the-deepest-folder": ("return file.parts[split] if", "return file.parts[-2] if"),
        "last-image-of-a-label-in-training-too": ("parts[0] += group[:-last]", "parts[0] += group"),
        "labels-in-order-without-the-shuffle": (
            "np.random.default_rng(0).permutation(len(split))[:limit]",
            "np.arange(len(split))[:limit]",
        ),
        "labels-of-broken-images-kept": ("torch.tensor(labels)[kept]", "torch.tensor(labels)"),
        "photos-not-turned": ("ImageOps.exif_transpose(image)", "image"),
        "transparent-pixels-show-their-colour": ("Image.alpha_composite(", "(lambda a, b: b)("),
        "last-channel-not-looked-at": ("(part == part[:, :1])", "(part[:, 1] == part[:, 0])"),
    },
    "train_eval.py | train_eval | own_images": {
        "changed-images-resumed": ('if progress["images"] != len(train_images):', "if False:"),
        "clusters-asked-for-not-kept": (
            "    labels = train_images.num_labels if",
            "        config.num_clusters = len(shares[0])\n    labels = train_images.num_labels if",
        ),
    },
    "train_eval.py | train_eval | step_descends": {
        "ema-one-step-late": (
            '    parts["optimizer"].step()\n'
            '    parts["optimizer"].zero_grad()\n'
            '    parts["ema"].update()\n',
            '    parts["ema"].update()\n'
            '    parts["optimizer"].step()\n'
            '    parts["optimizer"].zero_grad()\n',
        ),
        "zero-grad-forgotten": ('    parts["optimizer"].zero_grad()\n', ""),
        "gradient-not-clipped": ("config.grad_clip or math.inf", "math.inf"),
        "weights-of-the-losses-ignored": ("(weights[part] * found).sum()", "found.sum()"),
        "sampler-of-timesteps-learns-nothing": ('parts["timesteps"].update(t, losses)', "pass"),
    },
    "train_eval.py | train_eval | learning_rate": {
        "learning-rate-warm-up-not-limited": (
            "min(config.warmup_steps, total_steps // 10)",
            "config.warmup_steps",
        ),
    },
    "train_eval.py | train_eval | told_the_labels or candidates or every_constant": {
        "clusters-not-told-to-the-network": (
            "y = None if ddpm.num_classes is None else y",
            "y = y if config.use_conditional_generation else None",
        ),
        "references-the-same-at-every-step": (
            "torch.randint(len(train_images), size, device=train_images.device)",
            "torch.arange(*size, device=train_images.device) % len(train_images)",
        ),
        "references-without-the-batch": (
            "(x0[:, :held], others[:, :held]), None if y is None else torch.cat([y, labels])",
            "(others[:, :held],), None if y is None else labels",
        ),
        "adam-beta2-not-the-constant": ("(0.9, config.adam_beta2)", "(0.9, 0.999)"),
    },
    "train_eval.py | never_lose_a_run | signals": {
        "resumed-epoch-begins-anew": (
            'divmod(progress["step"], run.steps_per_epoch)',
            'progress["step"] // run.steps_per_epoch, 0',
        ),
        "ctrl-c-not-saved": ("if asked or last or saving and", "if last or saving and"),
    },
    "train_eval.py | train_eval | promises or curves or no_mistake or another_seed": {
        "learning-rate-cosine-of-an-epoch": (
            'learning_rate_at(config, progress["step"], run.total_steps)',
            'learning_rate_at(config, progress["step"], run.steps_per_epoch)',
        ),
        "last-step-not-saved": ("if asked or last or saving and", "if asked or saving and"),
        "seed-of-a-run-ignored": ("torch.manual_seed(config.seed)", "pass"),
        "training-in-evaluation-mode": (
            "processes.parallel(run.ddpm).train()",
            "processes.parallel(run.ddpm).eval()",
        ),
    },
    "train_eval.py | train_eval | best_model or lowest_test or test_loss_is or digits_in_turn": {
        "best-loss-not-remembered": (
            'progress["best_loss"] = min(progress["best_loss"], value)',
            "pass",
        ),
        "best-model-without-ema": (
            'with watch.doing("evaluating"), run.parts["ema"].applied():',
            'with watch.doing("evaluating"):',
        ),
        "test-loss-with-dropout": (
            "machine.evaluating(ddpm):\n            if LOSSES",
            "torch.no_grad():\n            if LOSSES",
        ),
        "test-loss-of-the-bound-by-one-term": (" " * 8 + "if LOSSES", " " * 8 + "if 0 and LOSSES"),
        "grids-with-new-noise-each-time": ("labels, seed=seed, **how", "labels, seed=None, **how"),
    },
    "train_eval.py | train_eval | one_command or shorter or samples_become": {
        "nothing-to-resume-is-an-error": ("if config.resume and not any(", "if False and not any("),
        "run-made-shorter-than-it-is": (
            'if progress["step"] > steps_per_epoch',
            "if 0 > steps_per_epoch",
        ),
        "digits-that-were-asked-for-ignored": ("config.digits or range", "range"),
    },
    "train_eval.py | train_eval | evaluation_measures or samples_become or other_options": {
        "evaluation-ignores-its-spacing": (', "timestep_spacing"):', "):"),
        "sampling-flags-unchecked": ("checks.ddpm(ddpm, SAMPLERS)", "pass"),
        "bound-of-all-test-images": ("images.split(config.bound_images)[0]", "images"),
        "test-loss-of-the-images-that-choose": (
            "measure_and_draw(run.config, run.ddpm, run.measuring_images,",
            "measure_and_draw(run.config, run.ddpm, run.choosing_images,",
        ),
    },
    "train_eval.py | configurator | decide_those_below": {
        "guided-by-a-class-never-trained": ("labelled and label_dropout != 0", "labelled"),
    },
    "support/checks.py | bad_input": {
        "clusters-never-left-out": ("if not 0 < ddpm.label_dropout < 1:", "if False:"),
        "bound-of-augmented-images": ("if off > 255 *", "if False and off > 255 *"),
        "infinite-number-taken": ("not size <= sys.float_info.max or not low", "not low"),
        "unknown-name-taken": ("not isinstance(value, str) or value not in choices", "False"),
        "tensor-of-another-shape-taken": ("a != b for a, b", "False for a, b"),
        "zero-terminal-snr-for-eps-taken": (
            'if process.zero_terminal_snr and process.prediction == "eps":',
            "if False:",
        ),
        "label-one-too-large-taken": ("else ddpm.num_labels - 1)", "else ddpm.num_labels)"),
    },
    "support/checks.py | diffusion": {
        "seed-of-sampling-ignored": (".manual_seed(int(seed))", ""),
    },
    "support/configurator.py | configurator": {
        "constant-out-of-its-range-taken": (
            "checks.whole(name, value, low, high)",
            "checks.whole(name, value, -math.inf)",
        ),
        "constants-that-do-not-fit-together-taken": (
            "if config.preview_steps > config.num_timesteps:",
            "if False:",
        ),
        "folder-that-is-gone-an-edit": ("chosen.read(then | {name", "chosen.read({name"),
        "flags-without-meaning-taken": ("sorted(chosen.given - chosen.names(used))", "[]"),
        "exit-status-of-a-mistake": ("SystemExit(2) from None", "SystemExit(1) from None"),
        "edit-in-the-script-ignored-on-resume": ("in edited | flags.keys()", "in flags.keys()"),
        "edit-read-as-another-recipe": ("chosen.read(kept | flags)", "chosen.read(saved | flags)"),
        "flag-that-is-free-on-resume-ignored": ("read(kept | flags)", "read(kept)"),
        "flag-that-is-not-free-on-resume-taken": (" and name not in free:", " and False:"),
        "machine-constant-taken-from-the-file": ("- own - edited}", "- edited}"),
        "saved-constants-unchecked": (
            "check_kind(name, constant.value, constant.kind)\n",
            "pass\n",
        ),
    },
    "support/checkpoint.py | checkpoint": {
        "objects-saved-in-a-checkpoint": ('_check_plain(state, "")', "pass"),
        "damaged-archive-loaded": ("return archive.testzip() is None", "return True"),
        "damaged-save-ends-the-run": (
            "        if not previous.exists():\n            raise\n",
            "        raise\n",
        ),
        "pickle-that-runs-code-loaded": ("weights_only=True", "weights_only=False"),
        "random-state-not-restored": ('torch.set_rng_state(saved["rng"]["cpu"])', "pass"),
        "optimizer-not-restored": (
            "            part.load_state_dict(saved[name])",
            '            name == "optimizer" or part.load_state_dict(saved[name])',
        ),
        "moments-in-another-layout": ('match_layouts(parts["optimizer"])', "pass"),
    },
    "support/checkpoint.py | diffusion | wrapped": {
        "names-of-the-compiler-saved": (
            'return {name.replace("_orig_mod.", ""): value for',
            "return {name: value for",
        ),
    },
    "support/files.py | checkpoint": {
        "lock-not-taken": ("                self._acquire()\n", ""),
        "earlier-run-overwritten": (
            "                self._move_earlier_run()\n",
            "                pass\n",
        ),
        "named-before-it-is-on-the-disk": (
            "        flush(partial)\n        if previous",
            "        if previous",
        ),
        "previous-file-not-kept": (
            "if previous is not None and os.path.exists(path):",
            "if False:",
        ),
        "half-a-file-left-behind": (
            "        if os.path.exists(partial):\n            os.remove(partial)",
            "        pass",
        ),
    },
    "support/machine.py | diffusion | wrapped": {
        "one-wrapper-alone-is-unwrapped": ("while isinstance(network,", "if isinstance(network,"),
    },
    "support/machine.py | machine | not_used": {
        "code-for-older-generations-taken": ("built[0] == capability[0]", "True"),
    },
    "support/machine.py | machine | fast_layout": {
        "channels-last-on-old-cards": ("fast and (config.bf16 or", "fast and (True or"),
    },
    "support/machine.py | machine | more_graphs": {
        "odd-batches-compiled-too": ("config.use_compile and n != config.batch_size", "False"),
    },
    "support/machine.py | diffusion | without_dropout": {
        "parts-not-put-back-into-training-mode": ("part.training = mode", "pass"),
    },
    "support/processes.py | processes | gpus": {
        "all-processes-on-the-first-card": ("torch.cuda.set_device(local_rank)", "pass"),
    },
    "support/processes.py | processes | shares_and_parts or each_chunk or each_process": {
        "share-of-a-rank-shifted-by-one": (
            "slice(rank * n // number, ",
            "slice(rank * n // number + (rank > 0), ",
        ),
        "gradient-of-a-rank-not-scaled": ("(number if n >= number else 1) / n", "1 / n"),
        "dropout-alike-in-all-ranks": ('"big") + world()[0])', '"big"))'),
        "parts-of-the-whole-not-gathered": ("    dist.all_reduce(whole)\n", ""),
        "ranks-with-other-flags-go-on": ("    if different:\n", "    if False:\n"),
        "seed-of-a-chunk-ignores-the-chunk": ("SeedSequence((seed, k))", "SeedSequence((seed, 0))"),
        "chunks-of-a-rank-shifted": ("range(rank, math.ceil", "range(2 * rank, math.ceil"),
    },
    "support/threads.py | threads": {
        "lost-terminal-ends-the-run": ("self.HANGUP, self.SAVE)):", "self.SAVE)):"),
        "nohup-not-heeded": ("signal.getsignal(signum) != signal.SIG_IGN", "True"),
        "processes-wait-at-every-step": ("if self.several and step % 10:", "if False:"),
        "quota-of-a-container-ignored": (
            "cores = min(cores, max(1, int(time_) // int(period)))",
            "pass",
        ),
        "second-ctrl-c-ignored": ("if again or self.immediate:", "if self.immediate:"),
        "save-asked-for-again-and-again": (
            "        self.save = False\n        if asked",
            "        if asked",
        ),
        "signal-handlers-not-put-back": ("signal.signal(signum, handler)\n", "pass\n"),
    },
    "support/console.py | monitor": {
        "moved-run-begins-another-log": (
            "return above if above.exists() and",
            "return above if False and",
        ),
    },
    "support/monitor.py | monitor": {
        "first-session-of-a-log-not-begun": (
            "step + 1 if step else 0",
            "step + 1 if step else None",
        ),
        "slow-saves-as-often-as-quick-ones": (
            "seconds < 1 or seconds < share",
            "True or seconds < share",
        ),
        "quartiles-off": (
            "quartile = t * 4 // self.num_timesteps",
            "quartile = (t - 1).clamp(min=0) * 4 // self.num_timesteps",
        ),
        "gradient-norm-not-checked": (
            "(math.isfinite(loss) and math.isfinite(norm))",
            "math.isfinite(loss)",
        ),
        "losses-since-the-last-entry-lost-on-resume": (
            'self.steps[:, : self.count] = state["steps"]',
            "pass",
        ),
    },
}

if __name__ == "__main__":
    sys.exit(main())
