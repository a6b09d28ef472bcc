"""A script's constants become checked flags: read from its source, shown by --help, replaced by the command line."""

import argparse
import ast
import difflib
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from support.machine import check_device

INF = math.inf
MOST = 2**31 - 1  # what torch takes as a size everywhere
# Kind and range of each constant; the modules check further. One that is not named here has the kind of its value.
WHOLE = {  # smallest and largest
    "seed": (0, 2**32 - 1),
    "train_size": (1, MOST),
    "test_size": (1, MOST),
    "image_size": (1, MOST),
    "channels": (1, 3),
    "base_channels": (1, MOST),
    "num_res_blocks": (1, MOST),
    "time_emb_dim": (1, MOST),
    "num_heads": (1, MOST),
    "patch_size": (1, MOST),
    "num_timesteps": (1, MOST),
    "target_references": (0, MOST),
    "batch_size": (1, MOST),
    "grad_accumulation": (1, MOST),
    "epochs": (1, MOST),
    "warmup_steps": (0, MOST),
    "ema_start": (0, MOST),
    "num_clusters": (0, MOST),
    "ema_update_rate": (1, MOST),
    "sample_steps": (1, MOST),
    "num_samples": (1, 1000),
    "preview_steps": (1, MOST),
    "eval_samples": (1, MOST),
    "bound_images": (2, MOST),
    "bound_terms": (2, MOST),
    "log_every": (1, 100_000),
    "sample_every": (1, MOST),
    "save_every": (1, MOST),
}
NUMBERS = {
    "dropout": (0, 1),
    "min_snr_gamma": (0, INF),
    "timestep_std": (0, INF),
    "learning_rate": (0, INF),
    "weight_decay": (0, INF),
    "adam_beta2": (0, 0.99999),
    "grad_clip": (0, INF),
    "ema_decay": (0, 1),
    "guidance_scale": (0, INF),
}
TUPLES = {"channel_mult", "attention_resolutions"}
SWITCHES = {
    "bf16",
    "use_compile",
    "resume",
    "use_augmentation",
    "use_conditional_generation",
    "adaptive_norm",
    "zero_terminal_snr",
    "use_scheduler",
}
TEXTS = {"device", "save_dir", "data_dir"}
CHANGED_FIRST = (
    "run",
    "training",
    "sampling",
)  # groups that --help shows first; the others in the script's order
# NOT_SAVED: never read back from a saved run. FREE_TO_*: flags that may differ from the saved run.
NOT_SAVED = {"save_dir", "resume", "evaluate"}
FREE_TO_RESUME = NOT_SAVED | {
    "device",
    "bf16",
    "use_compile",
    "data_dir",
    "epochs",
    "grad_accumulation",
    "learning_rate",
    "grad_clip",
    "num_samples",
    "preview_steps",
    "eval_samples",
    "bound_images",
    "bound_terms",
    "log_every",
    "sample_every",
    "save_every",
}
FREE_TO_EVALUATE = NOT_SAVED | {
    "device",
    "data_dir",
    "bf16",
    "use_compile",
    "seed",
    "train_size",
    "test_size",
    "num_samples",
    "sampler",
    "sample_steps",
    "timestep_spacing",
    "guidance_scale",
    "eval_samples",
    "bound_images",
    "bound_terms",
}
USED_FOR_A_FOLDER = {
    "evaluate",
    "save_dir",
    "device",
    "dataset",
    "data_dir",
    "train_size",
    "test_size",
    "image_size",
}


def configure(script, scope, choices, argv):
    """Command line -> (config, given): every constant as an attribute, and the names that flags set.

    Args:
        script: path of the script whose constants stand between '# run' and '# end of constants'.
        scope: the names that the lines of the constants may use.
        choices: the possible values of some constants, {name: values}.
        argv: the flags; None means those of the process.
    """
    with input_errors():
        given = vars(make_parser(read_constants(script, scope, {}), choices).parse_args(argv))
        values = {
            name: value for name, (_, value, _) in read_constants(script, scope, given).items()
        }
        check_kinds(values, choices)
        if values["resume"] and values["evaluate"]:
            raise ValueError(
                "resume and evaluate: expected one of them; --evaluate alone does not train"
            )
        config = argparse.Namespace(**values)
        config.save_dir = os.path.expanduser(config.save_dir)
        return config, set(given)


def read_constants(script, scope, flags):
    """The constants of a script as {name: (group, value, comment)}.

    A flag's value replaces the constant's line, so that the lines below see it: `--device cpu` brings the CPU's values.
    """
    source = Path(script).read_text(encoding="utf-8")
    lines = source[: source.index("# end of constants")].splitlines()
    scope, described = {**scope, **flags}, {}
    for node in ast.parse("\n".join(lines)).body:
        if node.lineno <= lines.index("# run"):
            continue  # imports
        exec(compile(ast.Module([node], []), script, "exec"), scope)
        scope.update(flags)
        group = next(
            lines[i]
            for i in reversed(range(node.lineno - 1))
            if lines[i].startswith("# ") and (i == 0 or not lines[i - 1].strip())
        )  # a comment under a blank line
        comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and part.id != "cuda":
                described.setdefault(part.id, (group.lstrip("# "), comment.lstrip("# ")))
    return {name: (group, scope[name], comment) for name, (group, comment) in described.items()}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest flag."""

    def error(self, message):
        """One line, without the usage, and exit status 2."""
        self.exit(2, f"{self.prog}: error: {_on_one_line(message)}\n")

    def parse_args(self, argv=None):
        """As argparse's; an unknown flag is answered with the nearest one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = {
                name.replace("-", "_"): name
                for name in self._option_string_actions
                if name.startswith("--")
            }
            near = difflib.get_close_matches(flag.replace("-", "_"), known, n=1)
            self.error(
                f"{unknown[0]}: unknown; "
                + (f"did you mean {known[near[0]]}?" if near else "--help lists the flags")
            )
        return args


def make_parser(constants, choices):
    """A flag for each constant, with its comment as help. Flags that were not given are left out of the result."""
    parser = Parser(
        prog="train_eval.py",
        usage="train_eval.py [--CONSTANT VALUE ...]",
        description="Train a DDPM on MNIST, watch it, draw digits. Each flag replaces the line of that "
        "constant at the top of train_eval.py.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = {
        group: parser.add_argument_group(group)
        for group in dict.fromkeys([*CHANGED_FIRST, *(group for group, _, _ in constants.values())])
    }
    for name, (group, value, comment) in constants.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        options = {"help": f"{comment} (default: {text})".replace("%", "%%")}
        if name == "evaluate":
            options |= {"nargs": "?", "const": True, "metavar": "FOLDER"}
        elif name in SWITCHES or isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif name in TUPLES or isinstance(value, tuple):
            options |= {"type": integers, "metavar": "INT,INT"}
        elif name in choices:
            options["choices"] = choices[name]
        else:
            kind = (
                int
                if name in WHOLE
                else float
                if name in NUMBERS
                else str
                if name in TEXTS
                else type(value)
            )
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        groups[group].add_argument(f"--{name}", **options)
    return parser


def integers(text):
    """'1,2,4' -> (1, 2, 4); 'none' -> ()."""
    return () if text in ("", "none") else tuple(int(part) for part in text.split(","))


def check_kinds(values, choices):
    """ValueError for a constant that is of the wrong kind or out of its range."""
    for name, value in values.items():
        low, high = WHOLE.get(name) or NUMBERS.get(name) or (-INF, INF)
        expected = None
        if name in WHOLE and type(value) is not int:
            expected = "a whole number"
        elif name in NUMBERS and type(value) not in (int, float):
            expected = "a number"
        elif name in WHOLE | NUMBERS and not (low <= value <= high and value != INF):
            expected = f"at least {low}" + (
                " and finite" if high == INF else f" and at most {high}"
            )
        elif name in TUPLES and not (
            type(value) is tuple and all(type(part) is int for part in value)
        ):
            expected = "a tuple of whole numbers, for example (8,)"
        elif name in SWITCHES and type(value) is not bool:
            expected = "True or False"
        elif name in TEXTS and not (type(value) is str and value and "\0" not in value):
            expected = "text that is not empty, in quotes in the script"
        elif name in choices and value not in [*choices[name]]:  # a dict would hash it
            expected = f"one of {', '.join(choices[name])}"
        elif name == "evaluate" and not (type(value) is bool or type(value) is str and value):
            expected = "True, False or the name of a folder"
        elif type(value) not in (int, float, str, bool, tuple):
            expected = "a number, text, True, False or a tuple"
        if expected:
            raise ValueError(f"{name} {value!r}: expected {expected}")


def check_together(config):
    """ValueError for constants that do not fit together, or a device that cannot be used here."""
    for name in ("sample_steps", "preview_steps"):
        if getattr(config, name) > config.num_timesteps:
            raise ValueError(
                f"{name} {getattr(config, name)}: expected at most num_timesteps {config.num_timesteps}"
            )
    if config.channels == 2:
        raise ValueError("channels 2: expected 1 (grey) or 3 (RGB)")
    if config.grad_accumulation > config.batch_size:
        raise ValueError(
            f"grad_accumulation {config.grad_accumulation}: expected at most batch_size "
            f"{config.batch_size}, the images that there are"
        )
    if config.num_clusters and config.use_conditional_generation:
        raise ValueError(
            f"num_clusters {config.num_clusters}: clusters stand in for labels; expected 0, or "
            "--no-use_conditional_generation"
        )
    if (
        config.guidance_scale != 1
        and not config.use_conditional_generation
        and not config.num_clusters
    ):
        raise ValueError(
            f"guidance_scale {config.guidance_scale}: guidance needs labels; expected 1, or "
            "--use_conditional_generation, or --num_clusters 256"
        )
    if not config.evaluate:
        if config.target_references and config.loss != "mse":
            raise ValueError(
                f"target_references {config.target_references} with loss {config.loss!r}: their mean is "
                "the target of 'mse' alone; expected 0"
            )
        if config.timestep_sampling == "logit-normal":
            if config.loss == "vlb" or config.variance == "learned":
                raise ValueError(
                    f"timestep_sampling 'logit-normal' with loss {config.loss!r} and variance "
                    f"{config.variance!r}: it would change the weights of the bound's terms; expected "
                    "uniform or importance"
                )
            if not config.timestep_std:
                raise ValueError(
                    "timestep_std 0.0: one timestep alone would be trained; expected a number above 0"
                )
    check_device(config.device)


def refuse_unused(given, flag, used):
    """ValueError if a flag was given that has no meaning beside another one."""
    if given - used:
        raise ValueError(f"{', '.join(sorted(given - used))}: not used with {flag}; leave it out")


def adopt(config, given, saved, free, choices=None):
    """The config of a saved run, a dict, with the flags of this command that are free to differ from it.

    Raises:
        ValueError: a flag differs and is not free, or the saved run has a constant that cannot be.
    """
    if not isinstance(saved, dict):
        raise ValueError(
            f"the run saved in {config.save_dir}: its config is no dictionary; expected its constants"
        )
    same = {"dataset"} if config.dataset == "auto" else set()  # the saved run says what auto found
    for name in sorted(given - free - same):
        if getattr(config, name) != saved.get(name):
            raise ValueError(
                f"{name} {getattr(config, name)}: the run in {config.save_dir} has {saved.get(name)}; "
                "leave the flag out, or start another run in another --save_dir"
            )
    if "device" in given and config.device != saved.get("device"):
        given = given | {"bf16", "use_compile"}  # the device decides these
    ours = {name: getattr(config, name) for name in NOT_SAVED | given & free}
    adopted = {**vars(config), **saved, **ours}
    try:
        check_kinds({name: adopted[name] for name in vars(config)}, choices or {})
    except ValueError as error:
        raise ValueError(f"the run saved in {config.save_dir}: {error}") from None
    ignored = [
        f"{name} {value}"
        for name, value in vars(config).items()
        if name not in NOT_SAVED | given | same and value != saved.get(name, value)
    ]
    if ignored:
        print(
            f"the saved run keeps its own constants; not used from train_eval.py: {', '.join(ignored)}"
        )
    return argparse.Namespace(**adopted)


@contextmanager
def input_errors():
    """A ValueError inside is a mistake in what the person gave: one line on stderr and exit status 2."""
    try:
        yield
    except ValueError as error:
        print(f"train_eval.py: error: {_on_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _on_one_line(message):
    """A message with its line breaks, for example those in the name of a file, written as \\n."""
    return "\\n".join(str(message).splitlines())
