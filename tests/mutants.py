"""Does the test suite notice faults? Plant small ones, one at a time, and see which tests fail.

`python tests/mutants.py [NAMES]` works in a copy of this folder. NAMES are names or files of
faults, or patterns of them, such as 'ema*'; without any, all faults are planted. A fault that no
test notices has SURVIVED: a test is missing.
"""

import argparse
import fnmatch
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", "checkpoints", "images", "data", "shared", "__pycache__", ".*_cache")
PYTEST = [sys.executable, *"-m pytest -n 0 -q -p no:cacheprovider --tb=no".split()]


class Mutant(NamedTuple):
    """A fault: in `file` the text `old`, which occurs there once, becomes `new`.

    `tests` are the test files that should notice, without test_ and .py; `only` is for pytest's -k.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    only: str


def main(argv=None):
    """Returns the exit status: 0, 1 if a fault survives, 2 if faults or tests are not in order."""
    parser = argparse.ArgumentParser(prog="mutants.py", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="names or files of faults, or patterns of them")
    parser.add_argument("--list", action="store_true", help="print the names and files alone")
    parser.add_argument("--count", action="store_true", help="count all tests that notice")
    parser.add_argument("--jobs", type=int, default=1, help="faults at once (default: 1)")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for a fault's tests")
    options = parser.parse_args(argv)
    mutants = [
        Mutant(name, file, *texts, tests, ONLY.get(only, only))
        for where, faults in FAULTS.items()
        for file, tests, only in [where.split(" | ")]
        for name, texts in faults.items()
    ]
    paths = {m.file: ROOT / m.file for m in mutants}
    texts = {name: path.read_text("utf-8") if path.exists() else "" for name, path in paths.items()}
    names = [m.name for m in mutants]
    if wrong := [m.name for m in mutants if texts[m.file].count(m.old) * names.count(m.name) != 1]:
        print(f"not once in its file, or two of one name: {', '.join(wrong)}", file=sys.stderr)
        return 2
    patterns = options.names or ["*"]
    mutants = [m for m in mutants if any(fnmatch.fnmatch(x, p) for x in m[:2] for p in patterns)]
    if options.list:
        print("\n".join(f"{m.name:48} {m.file}" for m in mutants))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copies = queue.Queue()
        for k in range(options.jobs):
            folder = shutil.copytree(
                ROOT, Path(scratch, str(k)), ignore=shutil.ignore_patterns(*LEFT_OUT)
            )
            copies.put(folder)
        chosen = {}  # {test files: -k expressions}
        for m in mutants:
            chosen.setdefault(m.tests, {})[m.only] = None
        for tests, only in chosen.items():
            together = "" if "" in only else " or ".join(f"({part})" for part in only)
            failed, first = run_tests(folder, tests, together, options)
            if failed:
                print(f"without a fault, {len(failed)} tests fail, such as {first}")
                return 2
        print("without a fault all these tests pass", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            survivors = [*filter(None, pool.map(lambda m: try_out(m, copies, options), mutants))]
    print(f"{len(mutants)} faults, {len(survivors)} survived: {', '.join(survivors) or 'none'}")
    return 1 if survivors else 0


def try_out(mutant, copies, options):
    """Plant a fault in a copy, run its tests, print a line. Returns the name if it survives."""
    folder, began = copies.get(), time.monotonic()
    path = folder / mutant.file
    text = path.read_text("utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    failed, first = run_tests(folder, mutant.tests, mutant.only, options)
    path.write_text(text, "utf-8")
    copies.put(folder)
    said = f"killed by {len(failed)} test{'s' * (len(failed) > 1)}" if failed else "SURVIVED"
    print(f"{mutant.name:48} {said:20} {time.monotonic() - began:4.0f} s  {first}", flush=True)
    return None if failed else mutant.name


def run_tests(folder, tests, only, options):
    """Run test files in a copy. Returns the ids of those that failed, and the first or a remark."""
    command = [*PYTEST, *(f"tests/test_{name}.py" for name in tests.split()), "-k", only]
    env = {"DDPM_DATA_DIR": str(ROOT / "data")} | os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command if options.count else [*command, "-x"],
        cwd=folder,
        env=env | ({"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {}),
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that a timeout ends what the tests have started, too
    )
    try:
        said, _ = process.communicate(timeout=options.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return ["timeout"], f"no end after {options.timeout} seconds"
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.M)
    if process.returncode == 5:
        return [], "no test fits its -k expression"
    if process.returncode and not failed:
        failed = [f"pytest ended with {process.returncode}"]
    return failed, failed[0] if failed else ""


# Common -k expressions: of test_diffusion.py the maths, without the slowest of many tests of one
# thing; of test_likelihood.py all but the slowest.
ONLY = {
    "MATHS": "not (1000 or wrapped or saved or compiled or file or one_line or clear_line)",
    "BOUND": "not short_hybrid_run",
    "all": "",
}
# The faults: {"file | test files | -k expression": {name: (old text, new text)}}.
FAULTS = {
    "process.py | diffusion | MATHS": {
        "linear-schedule-ends-too-early": ("0.02 * scale", "0.01 * scale"),
        "linear-schedule-begins-too-late": ("1e-4 * scale", "1e-3 * scale"),
        "linear-schedule-not-scaled": ("scale = 1000 / num_timesteps", "scale = 1.0"),
        "cosine-schedule-without-offset": ("(t + 0.008) / 1.008 * math.pi", "t * math.pi"),
        "cosine-schedule-not-squared": ("* math.pi / 2) ** 2", "* math.pi / 2)"),
        "cosine-schedule-not-capped": ("f[:-1]).clamp(max=0.999)", "f[:-1])"),
        "alpha-bar-one-timestep-off": (
            "self.alphas_cumprod[t.clamp(min=0)]",
            "self.alphas_cumprod[(t - 1).clamp(min=0)]",
        ),
        "first-timestep-taken-for-the-image": (
            "torch.where(t < 0, 1.0,",
            "torch.where(t <= 0, 1.0,",
        ),
        "q-sample-coefficients-swapped": (
            "return _times(alpha_bar.sqrt(), x0) + _times((1 - alpha_bar).sqrt(), eps)",
            "return _times((1 - alpha_bar).sqrt(), x0) + _times(alpha_bar.sqrt(), eps)",
        ),
        "q-sample-sqrt-forgotten": (
            "_times((1 - alpha_bar).sqrt(), eps)",
            "_times(1 - alpha_bar, eps)",
        ),
        "posterior-coefficients-swapped": (
            "(1 - alpha_bar_t), x0) + _times(\n"
            "            alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t), xt",
            "(1 - alpha_bar_t), xt) + _times(\n"
            "            alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t), x0",
        ),
        "posterior-sqrt-forgotten": (
            "alpha.sqrt() * (1 - alpha_bar_s)",
            "alpha * (1 - alpha_bar_s)",
        ),
        "posterior-variance-is-beta": (
            "variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta",
            "variance = beta",
        ),
        "posterior-always-of-one-step": ("t - 1 if s is None else s", "t - 1"),
        "posterior-t-for-t-1": ("t - 1 if s is None else s", "t if s is None else s"),
        "posterior-mean-sqrt-forgotten": (
            "(alpha_bar.sqrt() / (1 - alpha_bar)).to",
            "(alpha_bar / (1 - alpha_bar)).to",
        ),
        "posterior-mean-size-not-halved": (
            "(alpha_bar / (1 - alpha_bar) / 2)",
            "(alpha_bar / (1 - alpha_bar))",
        ),
        "posterior-mean-size-not-squared": (
            "for images in candidates]).square()",
            "for images in candidates])",
        ),
        "posterior-mean-of-those-not-allowed": (
            "masked_fill(~allowed, -math.inf)",
            "masked_fill(allowed, -math.inf)",
        ),
        "posterior-mean-softmax-over-batch": ("logits.softmax(dim=1)", "logits.softmax(dim=0)"),
        "v-target-sign": (
            "return _times(alpha_bar.sqrt(), eps) - _times(",
            "return _times(alpha_bar.sqrt(), eps) + _times(",
        ),
        "v-target-coefficients-swapped": (
            "return _times(alpha_bar.sqrt(), eps) - _times(\n"
            "                (1 - alpha_bar).sqrt(), x0",
            "return _times((1 - alpha_bar).sqrt(), eps) - _times(\n"
            "                alpha_bar.sqrt(), x0",
        ),
        "x0-from-eps-sign": (
            "return _times(1 / alpha_bar.sqrt(), xt) - _times(",
            "return _times(1 / alpha_bar.sqrt(), xt) + _times(",
        ),
        "x0-from-eps-coefficient": (
            "(1 / alpha_bar - 1).sqrt(), output",
            "(1 - alpha_bar).sqrt(), output",
        ),
        "x0-from-v-coefficients-swapped": (
            "return _times(alpha_bar.sqrt(), xt) - _times((1 - alpha_bar).sqrt(), output)",
            "return _times((1 - alpha_bar).sqrt(), xt) - _times(alpha_bar.sqrt(), output)",
        ),
        "eps-from-x0-sqrt-forgotten": (
            "(alpha_bar / (1 - alpha_bar)).sqrt(), x0",
            "(alpha_bar / (1 - alpha_bar)), x0",
        ),
        "eps-from-x0-coefficient": (
            "(alpha_bar / (1 - alpha_bar)).sqrt(), x0",
            "(1 / (1 - alpha_bar)).sqrt(), x0",
        ),
        "step-eta-not-squared": ("sigma2 = eta**2 *", "sigma2 = eta *"),
        "step-eps-as-without-noise": (
            "(1 - alpha_bar_s - sigma2).clamp",
            "(1 - alpha_bar_s).clamp",
        ),
        "step-coefficients-swapped": (
            "xs = _times(alpha_bar_s.sqrt(), x0)",
            "xs = _times((1 - alpha_bar_s).sqrt(), x0)",
        ),
        "step-variance-for-sigma": (
            "(self.log_variance(t, s, variance_fraction) / 2).exp()",
            "self.log_variance(t, s, variance_fraction).exp()",
        ),
        "step-noise-without-eta": ("std = eta * (self", "std = (self"),
        "step-noise-on-the-image": (
            "_times(std * (s >= 0)[:, None, None, None], noise)",
            "_times(std, noise)",
        ),
        "step-no-noise-at-timestep-0": ("(s >= 0)[:, None", "(s > 0)[:, None"),
        "extrapolation-ratio-inverted": (
            "(after - now) / (now - before) / 2",
            "(now - before) / (after - now) / 2",
        ),
        "extrapolation-not-halved": (
            "(after - now) / (now - before) / 2",
            "(after - now) / (now - before)",
        ),
        "extrapolation-backwards": ("x0 - x0_before)", "x0_before - x0)"),
        "extrapolation-in-log-alpha-bar": ("self.alpha_bar(u).logit()", "self.alpha_bar(u).log()"),
        "trailing-spacing-one-off": (
            "            - 1\n        ).tolist()",
            "        ).clamp(max=start).tolist()",
        ),
        "trailing-spacing-down-to-the-clean-end": ("(start + 1) / steps, steps", "1, steps"),
        "linspace-spacing-not-down-to-0": (
            "torch.linspace(start, 0, steps",
            "torch.linspace(start, min(1, start), steps",
        ),
        "spacings-exchanged": ('if spacing == "linspace":', 'if spacing != "linspace":'),
        "seed-of-sampling-ignored": (
            "torch.Generator(device).manual_seed(int(seed))",
            "torch.Generator(device)",
        ),
    },
    "process.py | likelihood | BOUND": {
        "zero-terminal-snr-not-shifted": ("((root - root[-1]) * root[0]", "(root * root[0]"),
        "zero-terminal-snr-not-squared": (
            "/ (root[0] - root[-1])) ** 2",
            "/ (root[0] - root[-1]))",
        ),
        "zero-terminal-snr-begins-elsewhere": (
            "(root - root[-1]) * root[0] / (root[0] - root[-1])",
            "(root - root[-1]) / (1 - root[-1])",
        ),
        "min-snr-ratio-of-v": ('"v": snr + 1}', '"v": snr}'),
        "min-snr-ratio-of-eps": ('"eps": snr, ', '"eps": 1.0, '),
        "min-snr-is-a-floor": ("snr.clamp(max=gamma)", "snr.clamp(min=gamma)"),
        "fixed-variances-exchanged": (
            "return torch.where(s[:, None, None, None] < 0, smallest, small).log(), large.log()",
            "return large.log(), torch.where(s[:, None, None, None] < 0, smallest, small).log()",
        ),
        "small-variance-is-large": (
            "small = (1 - alpha_bar_s) / (1 - alpha_bar_t) * large",
            "small = large",
        ),
        "variance-of-the-decoder-is-beta": (
            "self.betas[0] * self.betas[1] / (1 - self.alphas_cumprod[1])",
            "self.betas[0]",
        ),
        "learned-variance-reversed": (
            "return variance_fraction * large + (1 - variance_fraction) * small",
            "return variance_fraction * small + (1 - variance_fraction) * large",
        ),
        "fixed-large-variance-at-the-last-step": (
            "return torch.where(s[:, None, None, None] < 0, small, large)",
            "return large",
        ),
    },
    "process.py | diffusion likelihood | settings or zero_terminal": {
        "zero-terminal-snr-for-eps-taken": (
            'if zero_terminal_snr and prediction == "eps":',
            "if False:",
        ),
    },
    "process.py | process diffusion | float64": {
        "tables-cast-to-float32": ("if self.betas.dtype != torch.float64:", "if False:"),
    },
    "process.py | bad_input | argument_that": {
        "label-one-too-large-taken": (
            "most = num_classes if no_label else num_classes - 1",
            "most = num_classes",
        ),
        "negative-label-taken": ("(y.min() < 0 or y.max() > most)", "y.max() > most"),
        "timestep-too-large-taken": (
            "if least < low or high is not None and most > high:",
            "if least < low:",
        ),
    },
    "diffusion.py | diffusion | MATHS": {
        "labels-mostly-dropped": (
            "torch.rand(n, device=device) < LABEL_DROPOUT",
            "torch.rand(n, device=device) > LABEL_DROPOUT",
        ),
        "labels-never-dropped": ("torch.where(drop, self.num_classes, y)", "y"),
        "labels-dropped-at-evaluation": (
            "if y is not None and self.training and drop is None",
            "if y is not None and drop is None",
        ),
        "mse-and-l1-exchanged": (
            'difference.square() if self.loss == "mse" else difference.abs()',
            'difference.abs() if self.loss == "mse" else difference.square()',
        ),
        "references-whatever-their-label": ("allowed=same_label", "allowed=None"),
        "references-without-the-batch": (
            "xt, t, batch[:, : images.shape[1]], images, allowed=same_label",
            "xt, t, images, allowed=None if y is None else same_label[:, len(batch) :]",
        ),
        "references-target-with-the-old-eps": (
            "self.target(mean, self.eps_from_x0(mean, xt, t), t)",
            "self.target(mean, eps, t)",
        ),
        "x0-not-clipped": (
            "self.x0_from_output(output, xt, t).clamp(-1, 1)",
            "self.x0_from_output(output, xt, t)",
        ),
        "eps-of-the-unclipped-x0": (
            "return x0, self.eps_from_x0(x0, xt, t), variance_fraction",
            "return (\n"
            "            x0,\n"
            "            self.eps_from_x0(self.x0_from_output(output, xt, t), xt, t),\n"
            "            variance_fraction,\n"
            "        )",
        ),
        "guidance-sign": (
            "uncond + guidance_scale * (cond - uncond)",
            "uncond - guidance_scale * (cond - uncond)",
        ),
        "guidance-one-too-strong": (
            "uncond + guidance_scale * (cond - uncond)",
            "cond + guidance_scale * (cond - uncond)",
        ),
        "guidance-halves-exchanged": (
            "cond, uncond = output.chunk(2)",
            "uncond, cond = output.chunk(2)",
        ),
        "guidance-0-and-1-exchanged": (
            "no_label if y is None or guidance_scale == 0 else y",
            "no_label if y is None or guidance_scale == 1 else y",
        ),
        "guidance-0-sees-the-labels": (
            "no_label if y is None or guidance_scale == 0 else y",
            "no_label if y is None else y",
        ),
        "class-shares-ignored": (
            "shares = shares if self.class_shares is None else",
            "shares = shares if True else",
        ),
        "ddpm-without-noise": ('"ddpm": (1.0, 1)', '"ddpm": (0.0, 1)'),
        "ddim-with-noise": ('"ddim": (0.0, 1)', '"ddim": (1.0, 1)'),
        "dpm-of-order-1": ('"dpm++": (0.0, 2),', '"dpm++": (0.0, 1),'),
        "eta-given-is-ignored": (
            "SAMPLERS[sampler][0] if eta is None else eta",
            "SAMPLERS[sampler][0]",
        ),
        "steps-from-a-lower-start-one-off": (
            "(start + 1) / self.num_timesteps",
            "start / self.num_timesteps",
        ),
        "second-order-on-the-last-step": (
            "x0_before is not None and after >= 0",
            "x0_before is not None",
        ),
        "extrapolated-x0-remembered": (
            "x0_before, t_before = predicted, t",
            "x0_before, t_before = x0, t",
        ),
        "extrapolated-x0-with-the-old-eps": ("eps = ddpm.eps_from_x0(x0, xt, t)", "pass"),
        "sampling-with-gradients": (
            "            torch.no_grad(),\n            evaluating(self),",
            "            evaluating(self),",
        ),
        "sampling-with-dropout": ("            evaluating(self),\n", ""),
        "returned-x0-and-xt-exchanged": (
            'sequence.append(xt if return_sequence == "xt" else x0)',
            'sequence.append(x0 if return_sequence == "xt" else xt)',
        ),
        "interpolation-weights-swapped": (
            "torch.lerp(xt, xt_other, weight)",
            "torch.lerp(xt_other, xt, weight)",
        ),
        "interpolation-from-pure-noise": ("xT=mixed, start=t,", "xT=mixed, start=None,"),
        "interpolation-draws-labels": ('options["guidance_scale"] = 0', "pass"),
    },
    "diffusion.py | likelihood | BOUND": {
        "hybrid-loss-not-detached": ("output = output.detach()", "output = output + 0"),
        "hybrid-loss-weight": ("else VLB_WEIGHT * bound)", "else bound)"),
        "hybrid-loss-weight-constant": ("VLB_WEIGHT = 0.001", "VLB_WEIGHT = 0.01"),
        "vlb-not-times-timesteps": (
            "bound = self.num_timesteps * likelihood.bound_term(",
            "bound = likelihood.bound_term(",
        ),
        "min-snr-weights-ignored": ("if self.min_snr_gamma:", "if False:"),
        "guidance-of-the-learned-variance": (
            "output[:, self.channels :] = cond[:, self.channels :]",
            "pass",
        ),
        "learned-variance-not-from-0-to-1": (
            "(output[:, self.channels :] + 1) / 2",
            "output[:, self.channels :]",
        ),
    },
    "diffusion.py | bad_input diffusion | argument_that or one_line or clear_line": {
        "network-output-of-another-shape-taken": (
            "(len(inputs[0]), expected, *xt.shape[2:])",
            "(None,) * 4",
        ),
    },
    "diffusion.py | processes | one_does": {
        "noise-of-a-share-not-that-of-the-whole": (
            "[rows] if eta else None",
            "[: len(xt)] if eta else None",
        ),
    },
    "diffusion.py | diffusion | wrapped or saved or compiled": {
        "loaded-model-in-training-mode": (
            "return ddpm.to(device).eval()",
            "return ddpm.to(device)",
        ),
    },
    "diffusion.py | diffusion likelihood | dropout or mode or bound": {
        "bound-with-dropout": (
            "        with evaluating(self):\n            return likelihood",
            "        with torch.no_grad():\n            return likelihood",
        ),
    },
    "likelihood.py | likelihood | BOUND": {
        "bound-in-nats": (
            "return terms.flatten(1).mean(dim=1) / math.log(2)",
            "return terms.flatten(1).mean(dim=1)",
        ),
        "prior-sign": ("- torch.log1p(-alpha_bar)", "+ torch.log1p(-alpha_bar)"),
        "prior-at-the-wrong-end": ("process.alphas_cumprod[-1]", "process.alphas_cumprod[0]"),
        "prior-left-out-of-the-bound": (
            "bits.mean(dim=1), bits.sum(dim=0)",
            "bits.mean(dim=1), bits[1:].sum(dim=0)",
        ),
        "kl-direction": (
            "difference = true_log_variance - log_variance",
            "difference = log_variance - true_log_variance",
        ),
        "kl-minus-one-forgotten": (
            "difference.exp() - 1 - difference",
            "difference.exp() - difference",
        ),
        "kl-not-halved": ("    ) / 2\n    nll", "    )\n    nll"),
        "kl-mean-by-sigma": (
            "(true_mean - mean).square() * (-log_variance).exp()",
            "(true_mean - mean).square() * (-log_variance / 2).exp()",
        ),
        "decoder-at-timestep-1-too": ("torch.where((t == 0)[:", "torch.where((t <= 1)[:"),
        "decoder-upper-edge": ("(1 / 255 - off.abs()) * scale,", "(1 / 256 - off.abs()) * scale,"),
        "decoder-tails-exchanged": (
            "darkest, torch.where(x0 > 0.999, brightest, inside",
            "brightest, torch.where(x0 > 0.999, darkest, inside",
        ),
        "decoder-black-without-tail": (
            "torch.where(x0 < -0.999, darkest",
            "torch.where(x0 < -1, darkest",
        ),
        "decoder-variance-for-sigma": (
            "scale = (-log_variance.double() / 2).exp()",
            "scale = (-log_variance.double()).exp()",
        ),
        "bound-interval-not-weighted": (
            "(high - low)\n                        * bound_term",
            "1\n                        * bound_term",
        ),
        "bound-interval-always-at-its-start": (
            "t = torch.randint(low, high, (len(x0),)",
            "t = torch.randint(low, low + 1, (len(x0),)",
        ),
        "bound-ignores-labels": (
            "xt, t[part], None if y is None else y[part]",
            "xt, t[part], None",
        ),
        "bound-error-not-by-sqrt-n": ("math.sqrt(len(x0))", "len(x0)"),
        "bound-rmse-in-wrong-units": ("127.5 * errors", "255 * errors"),
    },
    "likelihood.py | bad_input likelihood | argument_that or bound_of": {
        "bound-of-images-out-of-range-taken": ('check_values("x0", x0, -1, 1)', "pass"),
    },
    "timesteps.py | timesteps | all": {
        "uniform-without-the-last-timestep": (
            "torch.randint(self.num_timesteps, (n,)",
            "torch.randint(self.num_timesteps - 1, (n,)",
        ),
        "logit-normal-without-its-std": (
            "(self.std * torch.randn(n, device=self.device)).sigmoid()",
            "torch.randn(n, device=self.device).sigmoid()",
        ),
        "importance-weights-inverted": ("(1 / (len(p) * p[t])).float()", "(len(p) * p[t]).float()"),
        "importance-weights-forgotten": (
            "(1 / (len(p) * p[t])).float()",
            "torch.ones(n, device=t.device)",
        ),
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
    "timesteps.py | timesteps train_eval | law or logit_normal_timestep": {
        "logit-normal-one-too-far": (".long().clamp(max=self.num_timesteps - 1)", ".long()"),
    },
    "ema.py | ema | all": {
        "ema-start-one-off": ("if self.step <= self.start:", "if self.step < self.start:"),
        "ema-decay-without-ramp": (
            "decay = min(self.decay, (1 + k) / (10 + k))",
            "decay = self.decay",
        ),
        "ema-decay-beyond-its-value": (
            "decay = min(self.decay, (1 + k) / (10 + k))",
            "decay = (1 + k) / (10 + k)",
        ),
        "ema-ramp-counted-from-step-0": (
            "k = (self.step - self.start) // self.update_rate",
            "k = self.step // self.update_rate",
        ),
        "ema-decay-and-its-rest-exchanged": (
            "self.parameters, 1 - decay)",
            "self.parameters, decay)",
        ),
        "ema-update-rate-ignored": (
            "elif self.step % self.update_rate == 0 and self.shadow:",
            "elif self.shadow:",
        ),
        "ema-buffers-not-copied": (
            "1 - decay)\n"
            "        self.buffers = [b.detach().clone() for b in self._module_buffers()]",
            "1 - decay)",
        ),
        "ema-weights-not-restored": ("_copy(self.parameters, weights)", "pass"),
        "ema-buffers-not-restored": ("_copy(self._module_buffers(), buffers)", "pass"),
        "ema-weights-not-applied": ("_copy(self.parameters, self.shadow)", "pass"),
        "ema-step-not-loaded": ("        self.step = step\n", ""),
        "ema-state-of-another-shape-taken": ("if theirs[name].shape != tensor.shape:", "if False:"),
    },
    "unet.py | unet | all": {
        "attention-not-scaled": (" * q.shape[1] ** -0.5", ""),
        "attention-softmax-over-queries": (
            "q.shape[1] ** -0.5, dim=-1",
            "q.shape[1] ** -0.5, dim=-2",
        ),
        "attention-weights-transposed": (
            "torch.bmm(v, weights.transpose(1, 2))",
            "torch.bmm(v, weights)",
        ),
        "attention-without-residual": ("return x + self.out(", "return self.out("),
        "attention-at-the-wrong-resolutions": (
            "block(width, base_channels * mult, resolution in attention_resolutions)",
            "block(width, base_channels * mult, resolution * 2 in attention_resolutions)",
        ),
        "attention-missing-in-the-middle": (
            "block(width, width, True), ",
            "block(width, width, False), ",
        ),
        "skip-connections-in-the-wrong-order": (
            "torch.cat([h, skips.pop()], dim=1)",
            "torch.cat([h, skips.pop(0 if skips[0].shape == skips[-1].shape else -1)], dim=1)",
        ),
        "zero-init-of-blocks-forgotten": (
            "self.conv2 = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))",
            "self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)",
        ),
        "zero-init-of-attention-forgotten": (
            "self.out = _zero(nn.Conv2d(channels, channels, 1))",
            "self.out = nn.Conv2d(channels, channels, 1)",
        ),
        "zero-init-of-the-output-forgotten": (
            "_zero(nn.Conv2d(width, out_channels * patch_size**2, 3, padding=1))",
            "nn.Conv2d(width, out_channels * patch_size**2, 3, padding=1)",
        ),
        "time-sines-and-cosines-exchanged": (
            "torch.cat([angles.sin(), angles.cos()], dim=-1)",
            "torch.cat([angles.cos(), angles.sin()], dim=-1)",
        ),
        "time-frequencies-one-off": (
            "torch.arange(dim // 2) / (dim // 2)",
            "torch.arange(dim // 2) / (dim // 2 - 1)",
        ),
        "time-frequencies-too-high": ("-math.log(10000)", "-math.log(1000)"),
        "time-not-told-to-the-blocks": ("h = self.norm2(h + conditioning)", "h = self.norm2(h)"),
        "adaptive-norm-without-one-plus": (
            "self.norm2(h) * (1 + scale) + shift",
            "self.norm2(h) * scale + shift",
        ),
        "adaptive-norm-shift-sign": (
            "self.norm2(h) * (1 + scale) + shift",
            "self.norm2(h) * (1 + scale) - shift",
        ),
        "no-label-is-label-0": (
            "y = torch.full_like(t, self.num_classes)",
            "y = torch.zeros_like(t)",
        ),
        "label-embedding-one-row-less": (
            "nn.Embedding(num_classes + 1, time_emb_dim)",
            "nn.Embedding(num_classes, time_emb_dim)",
        ),
        "label-not-told-to-the-network": (
            "embedding = embedding + self.label_embedding(y)",
            "embedding = embedding + 0 * self.label_embedding(y)",
        ),
        "shortcut-left-out": (
            "return self.attention(h + self.shortcut(x))",
            "return self.attention(h)",
        ),
        "upsampling-smooth": (
            'F.interpolate(x, scale_factor=2, mode="nearest")',
            'F.interpolate(x, scale_factor=2, mode="bilinear")',
        ),
    },
    "unet.py | unet diffusion | residual or block or dropout": {
        "dropout-ignored": ("h = self.conv2(self.dropout(F.silu(h)))", "h = self.conv2(F.silu(h))"),
    },
    "unet.py | bad_input | argument_that": {
        "network-takes-labels-beyond-no-label": ("(len(xt),), 0, self.num_classes)", "(len(xt),))"),
    },
    "metrics.py | metrics | frechet": {
        "frechet-without-means": (
            "distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace()",
            "distance = cov_a.trace()",
        ),
        "frechet-cross-term-once": ("cov_b.trace() - 2 * overlap", "cov_b.trace() - overlap"),
        "frechet-without-cross-term": ("cov_b.trace() - 2 * overlap", "cov_b.trace()"),
        "frechet-overlap-without-sqrt": (
            "root @ cov_b @ root).clamp(min=0).sqrt().sum()",
            "root @ cov_b @ root).clamp(min=0).sum()",
        ),
    },
    "metrics.py | metrics | frechet or covariance": {
        "frechet-of-too-few-images-taken": ("if n <= dim:", "if False:"),
    },
    "metrics.py | metrics | precision or recall": {
        "precision-and-recall-exchanged": (
            "return among(samples, real), among(real, samples)",
            "return among(real, samples), among(samples, real)",
        ),
        "neighbour-one-off": ("d.kthvalue(k + 1, dim=1)", "d.kthvalue(k, dim=1)"),
        "neighbour-at-the-radius-left-out": ("(d <= radii).any(dim=1)", "(d < radii).any(dim=1)"),
    },
    "metrics.py | metrics | nearest": {
        "nearest-without-sqrt": (
            "difference.square().mean(dim=1).sqrt()",
            "difference.square().mean(dim=1)",
        ),
        "nearest-by-a-wrong-distance": (
            "squares - 2 * part @ others.T",
            "squares - part @ others.T",
        ),
    },
    "metrics.py | metrics | reads_it or learns_to_read": {
        "accuracy-inverted": (
            "(self.read(images)[1].argmax(dim=1) == labels.cpu())",
            "(self.read(images)[1].argmax(dim=1) != labels.cpu())",
        ),
    },
    "metrics.py | metrics | measure or swapped": {
        "accuracy-of-samples-inverted": (
            "(probabilities.argmax(dim=1) == labels.cpu())",
            "(probabilities.argmax(dim=1) != labels.cpu())",
        ),
    },
    "metrics.py | metrics | measure or copies": {
        "copies-are-the-others": (
            '(distances < report["nearest_1st_real"])',
            '(distances > report["nearest_1st_real"])',
        ),
    },
    "metrics.py | metrics | measure or copies or pairs": {
        "copies-of-test-images-are-sought": (
            "distances, index = nearest(samples, train)",
            "distances, index = nearest(samples, test)",
        ),
    },
    "metrics.py | metrics | all": {
        "classifier-reads-in-training-mode": (
            "        self.eval()\n        device",
            "        device",
        ),
    },
    "metrics.py | metrics train_eval | bytes or meter or folder_of_pngs": {
        "samples-cut-not-rounded-to-bytes": (
            "((images + 1) * 127.5).round().clamp(0, 255).byte()",
            "((images + 1) * 127.5).clamp(0, 255).byte()",
        ),
    },
    "metrics.py | metrics | reads_it or measure or classifier_sees or nearest": {
        "classifier-sees-another-range": ("return x / 127.5 - 1", "return x / 255"),
    },
    "metrics.py | metrics | refused": {
        "more-samples-than-real-images-taken": ("if n > len(real):", "if False:"),
    },
    "dataprocess.py | dataprocess | all": {
        "augmentation-in-the-test-split": ("augment and train, seed", "augment, seed"),
        "augmentation-after-normalisation": (
            "        if self.augment:\n"
            "            x = _augment(x)\n"
            "        x0 = x.div_(127.5).sub_(1)",
            "        x = x.div_(127.5).sub_(1)\n        x0 = _augment(x) if self.augment else x",
        ),
        "augmentation-turns-too-far": ("turn * math.radians(5)", "turn * math.radians(10)"),
        "augmentation-flips": (
            "torch.stack([cos, -sin, shift_x, sin, cos, shift_y]",
            "torch.stack([-cos, sin, shift_x, sin, cos, shift_y]",
        ),
        "images-from-0-to-1": ("x.div_(127.5).sub_(1)", "x.div_(255)"),
        "images-divided-by-128": ("x.div_(127.5).sub_(1)", "x.div_(128).sub_(1)"),
        "order-the-same-in-every-epoch": (
            "default_rng((epoch, self.seed))",
            "default_rng((0, self.seed))",
        ),
        "order-the-same-for-every-seed": (
            "default_rng((epoch, self.seed))",
            "default_rng((epoch, 0))",
        ),
        "last-partial-batch-dropped": (
            "order.split(int(batch_size))[start:]",
            "order[: len(order) // batch_size * batch_size].split(int(batch_size))[start:]",
        ),
        "batches-already-seen-again-after-resume": (
            "order.split(int(batch_size))[start:]",
            "order.split(int(batch_size))",
        ),
        "few-images-not-spread": (
            "index = torch.arange(n, device=self.device) * len(self) // n",
            "index = torch.arange(n, device=self.device)",
        ),
        "last-images-taken": ("labels[:size], channels", "labels[-size:], channels"),
        "clusters-by-a-wrong-distance": (
            "centres.square().sum(dim=1) - 2 * part",
            "centres.square().sum(dim=1) + 2 * part",
        ),
        "clusters-that-are-empty-become-black": (
            "torch.where(count[:, None] > 0, sums / count[:, None].clamp(min=1), centres)",
            "sums / count[:, None].clamp(min=1)",
        ),
        "clusters-whatever-the-seed": (
            "np.random.default_rng(self.seed).permutation(len(x))[:k]",
            "np.random.default_rng(0).permutation(len(x))[:k]",
        ),
    },
    "dataprocess.py | bad_input | label_ten": {
        "label-10-taken": ("if y.max() >= Images.num_classes:", "if y.max() > Images.num_classes:"),
    },
    "dataprocess.py | bad_input | data_files": {
        "data-file-longer-than-its-header-says-taken": (
            "if length != expected:",
            "if length < expected:",
        ),
        "data-file-of-another-kind-taken": ("if (magic, *size) != fixed:", "if False:"),
    },
    "train_eval.py | train_eval | not help": {
        "ema-one-step-late": (
            '    state["optimizer"].step()\n'
            '    state["optimizer"].zero_grad()\n'
            '    for name in ("warmup", "scheduler"):\n'
            "        if name in state:\n"
            "            state[name].step()\n"
            '    state["ema"].update()\n',
            '    state["ema"].update()\n'
            '    state["optimizer"].step()\n'
            '    state["optimizer"].zero_grad()\n'
            '    for name in ("warmup", "scheduler"):\n'
            "        if name in state:\n"
            "            state[name].step()\n",
        ),
        "zero-grad-forgotten": ('    state["optimizer"].zero_grad()\n', ""),
    },
    "train_eval.py | train_eval | training_step": {
        "gradient-not-clipped": ("config.grad_clip or math.inf", "math.inf"),
        "ema-never-updated": ('state["ema"].update()', "pass"),
    },
    "train_eval.py | train_eval | importance": {
        "weights-of-the-losses-ignored": ("(weights[rows] * part).sum()", "part.sum()"),
        "sampler-of-timesteps-learns-nothing": ('state["timesteps"].update(t, losses)', "pass"),
    },
    "train_eval.py | train_eval | adamw": {
        "adam-beta2-not-the-constant": ("betas=(0.9, config.adam_beta2)", "betas=(0.9, 0.999)"),
        "weight-decay-not-the-constant": ("        weight_decay=config.weight_decay,\n", ""),
    },
    "train_eval.py | train_eval | made_longer": {
        "learning-rate-cosine-of-an-epoch": (
            "optimizer, T_max=total_steps",
            "optimizer, T_max=steps_per_epoch",
        ),
        "learning-rate-cosine-not-to-zero": (
            "optimizer, T_max=total_steps",
            "optimizer, T_max=total_steps, eta_min=0.1 * config.learning_rate",
        ),
        "learning-rate-cosine-one-step-off": (
            "optimizer, T_max=total_steps",
            "optimizer, T_max=total_steps - 1",
        ),
    },
    "train_eval.py | train_eval | made_longer or another_peak": {
        "learning-rate-without-warm-up": (
            "LinearLR(optimizer, 1 / warmup,",
            "LinearLR(optimizer, 1.0,",
        ),
        "learning-rate-warm-up-one-step-off": ("total_iters=warmup)", "total_iters=warmup + 1)"),
        "learning-rate-warm-up-not-limited": (
            "max(1, min(config.warmup_steps, total_steps // 10))",
            "max(1, config.warmup_steps)",
        ),
    },
    "train_eval.py | train_eval | seed_decides": {
        "seed-of-a-run-ignored": ("torch.manual_seed(config.seed)", "pass"),
    },
    "train_eval.py | train_eval | ctrl_c or clips": {
        "training-in-evaluation-mode": ("    model.train()\n", ""),
    },
    "train_eval.py | train_eval processes | one_does or option or training_step or cluster": {
        "clusters-not-told-to-the-network": (
            "y if config.use_conditional_generation or config.num_clusters else None",
            "y if config.use_conditional_generation else None",
        ),
    },
    "train_eval.py | train_eval | references": {
        "references-the-same-at-every-step": (
            "torch.randint(len(train_images), (config.target_references,), device=device)",
            "torch.arange(config.target_references, device=device) % len(train_images)",
        ),
    },
    "train_eval.py | train_eval | ctrl_c": {
        "resumed-epoch-begins-anew": (
            'epoch, start = divmod(progress["step"], run.steps_per_epoch)',
            'epoch, start = progress["step"] // run.steps_per_epoch, 0',
        ),
        "ctrl-c-not-saved": ("if saving or asked:", "if saving:"),
        "ctrl-c-does-not-stop-training": (
            'stopped := asked == "stop" or last and',
            'stopped := asked == "now" or last and',
        ),
        "exit-status-0-after-ctrl-c": ("return 0 if finished else interrupt.status", "return 0"),
    },
    "train_eval.py | never_lose_a_run | stopped_anywhere or sigusr1": {
        "last-step-not-saved": (
            "saving = last or step % config.save_every == 0",
            "saving = step % config.save_every == 0",
        ),
    },
    "train_eval.py | train_eval | best_model or everything": {
        "best-model-of-the-highest-loss": (
            'value < progress["best_loss"] or',
            'value > progress["best_loss"] or',
        ),
    },
    "train_eval.py | train_eval | best_model": {
        "best-loss-not-remembered": (
            'progress["best_loss"] = min(progress["best_loss"], value)',
            "pass",
        ),
        "best-model-without-ema": (
            'with watch.doing("evaluating"), run.ema.applied():',
            'with watch.doing("evaluating"):',
        ),
    },
    "train_eval.py | train_eval | seed_decides or evaluate": {
        "test-loss-with-new-noise-each-time": (
            "generator = torch.Generator().manual_seed(0)\n    n = len(images)",
            "generator = torch.Generator()\n    generator.seed()\n    n = len(images)",
        ),
    },
    "train_eval.py | train_eval | ctrl_c or best_model or evaluate": {
        "test-loss-with-dropout": ("    ddpm.eval()\n    generator", "    generator"),
    },
    "train_eval.py | train_eval | evaluate or best_model": {
        "test-loss-of-batches-not-images": (
            "    return total / n\n",
            "    return total / (-(-n // 64) * 64)\n",
        ),
    },
    "train_eval.py | train_eval | grid": {
        "grids-with-new-noise-each-time": (
            "ddpm.sample(n, y, seed=config.seed, rows",
            "ddpm.sample(n, y, seed=None, rows",
        ),
        "grids-of-one-digit": (
            "y = torch.arange(n) % ddpm.num_classes if",
            "y = torch.arange(n) * 0 if",
        ),
    },
    "train_eval.py | train_eval | folder": {
        "folder-with-too-many-images-taken": (
            "if len(samples) > (most := min(len(train_images), len(test_images))):",
            "if False:",
        ),
    },
    "train_eval.py | train_eval | other_timesteps": {
        "evaluation-ignores-its-spacing": (
            "ddpm.timestep_spacing = config.timestep_spacing",
            "pass",
        ),
    },
    "support/checks.py | bad_input | argument_that": {
        "whole-number-below-its-range-taken": (
            "    if not low <= value <= high:",
            "    if not value <= high:",
        ),
        "true-taken-for-a-whole-number": (
            "if not isinstance(value, numbers.Integral) or isinstance(value, bool):",
            "if not isinstance(value, numbers.Integral):",
        ),
        "infinite-number-taken": ("finite = math.isfinite(value)", "finite = True"),
        "number-out-of-its-range-taken": (
            "if not finite or not low <= value <= high:",
            "if not finite:",
        ),
        "images-with-nan-taken": (
            "if not (math.isfinite(least) and math.isfinite(most)):",
            "if False:",
        ),
        "switch-of-another-kind-taken": (
            "isinstance(value, (bool, np.bool_))",
            "isinstance(value, (bool, np.bool_, int, str))",
        ),
        "unknown-name-taken": (
            "if not isinstance(value, str) or value not in choices:",
            "if not isinstance(value, str):",
        ),
        "device-unchecked": ("torch.empty(0, device=device)", "pass"),
        "tensor-of-another-shape-taken": (
            "size is None or isinstance(size, str) or size == found",
            "True",
        ),
    },
    "support/checks.py | diffusion | shares": {
        "class-shares-of-another-number-taken": ("        or len(shares) != num_classes\n", ""),
        "negative-class-share-taken": (
            "is_number(share) and 0 <= share < math.inf",
            "is_number(share) and share < math.inf",
        ),
    },
    "support/checks.py | diffusion | interpolation": {
        "weights-beyond-1-taken": (
            "all(0 <= weight <= 1 for weight in weights)",
            "all(0 <= weight for weight in weights)",
        ),
    },
    "support/checks.py | diffusion | references": {
        "references-for-l1-taken": ('if loss != "mse":', "if False:"),
    },
    "support/configurator.py | bad_input | every_constant": {
        "true-taken-for-a-whole-constant": (
            "if name in WHOLE and type(value) is not int:",
            "if name in WHOLE and not isinstance(value, int):",
        ),
        "text-taken-for-a-switch": (
            "elif name in SWITCHES and type(value) is not bool:",
            "elif False:",
        ),
    },
    "support/configurator.py | configurator | all": {
        "constant-out-of-its-range-taken": (
            "elif name in WHOLE | NUMBERS and not (low <= value <= high and value != INF):",
            "elif False:",
        ),
        "constants-that-do-not-fit-together-taken": (
            "if config.grad_accumulation > config.batch_size:",
            "if False:",
        ),
        "clusters-beside-labels-taken": (
            "if config.num_clusters and config.use_conditional_generation:",
            "if False:",
        ),
        "flag-that-is-free-on-resume-ignored": (
            "for name in NOT_SAVED | given & free}",
            "for name in NOT_SAVED}",
        ),
        "exit-status-of-a-mistake": (
            "raise SystemExit(2) from None",
            "raise SystemExit(1) from None",
        ),
    },
    "support/configurator.py | bad_input configurator | line_break or flag": {
        "unknown-flag-taken": ("if unknown:", "if False:"),
    },
    "support/configurator.py | train_eval | bad_flag": {
        "resume-and-evaluate-taken": ('if values["resume"] and values["evaluate"]:', "if False:"),
        "flags-without-meaning-taken": ("if given - used:", "if False:"),
    },
    "support/configurator.py | configurator train_eval | saved_run or flag_that_differs": {
        "flag-that-is-not-free-on-resume-taken": (
            "if getattr(config, name) != saved.get(name):",
            "if False:",
        ),
    },
    "support/configurator.py | bad_input | cannot_go_on": {
        "saved-constants-unchecked": (
            "check_kinds({name: adopted[name] for name in vars(config)}, choices or {})",
            "pass",
        ),
    },
    "support/checkpoint.py | checkpoint | all": {
        "lock-not-taken": ("                self._acquire()\n", ""),
        "lock-not-released": (
            "        if self.lock is not None:\n            try:",
            "        if False:\n            try:",
        ),
        "earlier-run-overwritten": (
            "                    self._move_earlier_run()\n",
            "                    pass\n",
        ),
        "damaged-archive-loaded": ("return archive.testzip() is None", "return True"),
        "objects-saved-in-a-checkpoint": ('_check_plain(state, "")', "pass"),
        "damaged-save-ends-the-run": (
            "        if not previous.exists():\n            raise\n",
            "        raise\n",
        ),
    },
    "support/checkpoint.py | diffusion never_lose_a_run | runs_code": {
        "pickle-that-runs-code-loaded": ("weights_only=True", "weights_only=False"),
    },
    "support/checkpoint.py | bad_input | cannot_be_loaded or cannot_go_on": {
        "checkpoint-of-another-kind-loaded": (
            "if not isinstance(saved, dict) or not set(keys) <= set(saved):",
            "if not isinstance(saved, dict):",
        ),
    },
    "support/checkpoint.py | train_eval | ctrl_c": {
        "random-state-not-restored": ('torch.set_rng_state(saved["rng"]["cpu"])', "pass"),
        "optimizer-not-restored": (
            "            name in saved\n        ):",
            '            name in saved and name != "optimizer"\n        ):',
        ),
        "ema-not-restored": (
            "            name in saved\n        ):",
            '            name in saved and name != "ema"\n        ):',
        ),
        "step-not-restored": (
            "for name in progress if name in saved})",
            'for name in progress if name in saved and name != "step"})',
        ),
        "best-loss-not-restored": (
            "for name in progress if name in saved})",
            'for name in progress if name in saved and name != "best_loss"})',
        ),
    },
    "support/files.py | checkpoint | all": {
        "fsync-forgotten": ("os.fsync(descriptor)", "pass"),
        "named-before-it-is-on-the-disk": ("        flush(partial)\n", ""),
        "previous-file-not-kept": (
            "if previous is not None and os.path.exists(path):",
            "if False:",
        ),
        "half-a-file-left-behind": (
            "        if os.path.exists(partial):\n            os.remove(partial)",
            "        pass",
        ),
        "refused-rename-not-tried-again": ("if time.monotonic() > end:", "if True:"),
    },
    "support/machine.py | diffusion | wrapped or saved or compiled": {
        "names-of-the-compiler-saved": (
            'return {name.replace("_orig_mod.", ""): value for',
            "return {name: value for",
        ),
        "compiled-layers-not-loaded": (
            'own_names = {name.replace("_orig_mod.", ""): name for',
            "own_names = {name: name for",
        ),
        "one-wrapper-alone-is-unwrapped": (
            'while isinstance(network, parallel) or "_orig_mod" in network._modules:',
            'if isinstance(network, parallel) or "_orig_mod" in network._modules:',
        ),
    },
    "support/machine.py | diffusion | MATHS": {
        "parts-not-put-back-into-training-mode": ("part.training = mode", "pass"),
    },
    "support/machine.py | processes | shares_and_parts": {
        "share-of-a-rank-shifted-by-one": (
            "return slice(rank * n // number, (rank + 1) * n // number) if",
            "return slice(rank * n // number + (rank > 0), (rank + 1) * n // number) if",
        ),
        "gradient-of-a-rank-not-scaled": ("(number if n >= number else 1) / n", "1 / n"),
        "gradient-of-parts-scaled-twice": (
            "(number if n >= number else 1) / n",
            "(number if n >= number else 1) / n / min(parts, size)",
        ),
        "last-part-of-a-batch-one-short": (
            "rows.start + (k + 1) * size // parts)",
            "rows.start + (k + 1) * size // parts - last)",
        ),
    },
    "support/machine.py | processes | drops_out": {
        "dropout-alike-in-all-ranks": ('"big") + world()[0])', '"big"))'),
        "parts-of-the-whole-not-gathered": ("    dist.all_reduce(whole)\n", ""),
    },
    "support/machine.py | processes | told_which": {
        "ranks-with-other-flags-go-on": ("    if different:\n", "    if False:\n"),
    },
    "support/machine.py | machine | signal or asked or handlers": {
        "ctrl-c-ignored": (
            "asked = torch.tensor(self.signum or int(self.save))",
            "asked = torch.tensor(int(self.save))",
        ),
        "second-ctrl-c-ignored": ("if again or self.immediate:", "if self.immediate:"),
        "save-asked-for-again-and-again": (
            "        self.save = False\n        if asked",
            "        if asked",
        ),
        "signal-handlers-not-put-back": ("signal.signal(signum, handler)\n", "pass\n"),
        "exit-status-of-a-signal": ("return 128 + (self.signum or signal.SIGINT)", "return 1"),
    },
    "support/machine.py | train_eval | bf16": {
        "autocast-never": (
            "torch.bfloat16, enabled=config.bf16)",
            "torch.bfloat16, enabled=False)",
        ),
        "autocast-always": (
            "torch.bfloat16, enabled=config.bf16)",
            "torch.bfloat16, enabled=True)",
        ),
    },
    "support/machine.py | machine | cannot_be_used": {
        "device-of-a-run-unchecked": (
            "torch.zeros(1, dtype=torch.float64, device=device).cpu()",
            "pass",
        ),
    },
    "support/monitor.py | train_eval | window": {
        "quartiles-off": (
            "quartile = t * 4 // self.num_timesteps",
            "quartile = (t - 1).clamp(min=0) * 4 // self.num_timesteps",
        ),
        "loss-of-a-batch-not-weighted": (
            "self.steps[0, self.count] = (weights * losses).mean()",
            "self.steps[0, self.count] = losses.mean()",
        ),
    },
    "support/monitor.py | train_eval | window or divergence": {
        "nan-check-removed": ("if not (math.isfinite(loss) and math.isfinite(norm)):", "if False:"),
        "gradient-norm-not-checked": (
            "if not (math.isfinite(loss) and math.isfinite(norm)):",
            "if not math.isfinite(loss):",
        ),
        "exit-status-of-divergence": ("raise SystemExit(3)", "raise SystemExit(1)"),
    },
    "support/monitor.py | monitor | all": {
        "losses-since-the-last-entry-lost-on-resume": (
            'self.steps[:, :count] = state["steps"]',
            "pass",
        ),
    },
    "support/png.py | metrics | png": {
        "transparent-png-taken": ("elif _is_transparent(image, path):", "elif False:"),
        "animated-png-taken": ("if frames > 1:", "if False:"),
        "png-of-16-bits-not-rounded": (
            "(np.asarray(image).astype(np.int64) + 128) // 257",
            "np.asarray(image).astype(np.int64) // 256",
        ),
    },
    "support/png.py | bad_input | folder_of_pngs": {
        "png-with-too-few-rows-taken": ("_check_rows(path.read_bytes())", "pass"),
    },
    "support/png.py | metrics bad_input | png": {
        "png-with-wrong-checksum-taken": ("image.verify()", "pass"),
        "pngs-of-several-sizes-unchecked": ("if images[-1].shape != images[0].shape:", "if False:"),
    },
}

if __name__ == "__main__":
    sys.exit(main())
