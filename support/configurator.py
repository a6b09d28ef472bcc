"""A script's constants become checked flags: read from its source, shown by --help, replaced.

A constant is an annotated assignment, `epochs: int = 2  # passes over the images`, between the
comments '# machine' and '# end of constants'. The annotation is its kind: int, float, bool, str,
tuple (of whole numbers), `bool | str` (a switch that may name a folder), or the dictionary or tuple
of the names that can be chosen; None is the kind of a shorthand, which is no flag. A comment stands
behind it, or in the line above. A comment after an empty line names a group.
"""

import argparse
import ast
import difflib
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support import checks
from support.folders import has_labels

EXPECTED = {
    str: "text that is not empty, in quotes in the script",
    tuple: "a tuple of whole numbers, for example (8,)",
    bool | str: "True, False or the name of a folder",
}


class Constant(NamedTuple):
    """A constant of a script."""

    group: str
    kind: object
    value: object
    comment: str


class Chosen(NamedTuple):
    """What a person has chosen: by the lines of the script, and by flags."""

    config: argparse.Namespace  # every constant as an attribute
    given: set  # names that flags replaced
    script: dict  # values as the script has them, without flags
    read: object  # flags, a dict -> {name: Constant}

    def names(self, groups):
        """The names of these groups of constants; names stand for themselves."""
        constants = self.read({})
        return {name for name in constants if {name, constants[name].group} & groups}


def configure(script, scope, least, most, argv):
    """Command line -> `Chosen`.

    Args:
        script: path of the script.
        scope: the names that the lines of the constants may use.
        least, most: smallest and largest values, {name: number}; without one a whole number is
            at least 1, another at least 0.
        argv: the flags; None means those of the process.

    Raises:
        ValueError: a constant is of the wrong kind, or out of its limits.
    """

    def read(flags):
        return read_constants(script, scope, flags)

    # Twice, so that --help shows what the other flags bring.
    first, _ = make_parser(read({}), add_help=False).parse_known_args(argv)
    constants = read(vars(first))
    given = vars(make_parser(constants).parse_args(argv))
    for name, constant in read(given).items():
        whole = constant.kind is int
        limits = least.get(name, int(whole)), most.get(name, 2**31 - 1 if whole else math.inf)
        check_kind(name, constant.value, constant.kind, *limits)
    config = argparse.Namespace(**values_of(constants))
    asked = [name for name in ("resume", "evaluate", "sample") if vars(config).get(name)]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)}: expected one of them; only --resume trains")
    if config.digits and not config.sample:
        raise ValueError(f"digits {config.digits}: expected --sample beside them")
    config.save_dir = os.path.expanduser(config.save_dir)
    if isinstance(config.evaluate, str):
        config.evaluate = os.path.expanduser(config.evaluate)
    return Chosen(config, set(given), values_of(read({})), read)


def values_of(constants):
    """{name: value}."""
    return {name: constant.value for name, constant in constants.items()}


def read_constants(script, scope, flags):
    """The constants of a script, {name: Constant}.

    A flag's value replaces the constant's line, so that the lines below see it: `--recipe quick`
    brings the values of that recipe.
    """
    source = Path(script).read_text(encoding="utf-8")
    lines = source[: source.index("# end of constants")].splitlines()
    scope, constants, start = {**scope, **flags}, {}, lines.index("# machine")
    for node in ast.parse("\n".join(lines)).body:
        if node.lineno <= start:
            continue  # imports
        exec(compile(ast.Module([node], []), script, "exec"), scope)
        scope.update(flags)
        if isinstance(node, ast.Assign):
            raise ValueError(f"{ast.unparse(node)}: expected its kind too, as in epochs: int = 2")
        if not isinstance(node, ast.AnnAssign):
            continue
        headings = [i for i in range(node.lineno) if lines[i].startswith("# ")]
        group = next(lines[i] for i in reversed(headings) if not i or not lines[i - 1].strip())
        kind = eval(compile(ast.Expression(node.annotation), script, "eval"), scope)
        if kind is None:
            continue
        comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        comment = comment or lines[node.lineno - 2]  # behind the constant, or above it
        constants[node.target.id] = (group.lstrip("# "), kind, comment.lstrip("# "))
    return {
        name: Constant(group, kind, scope[name], comment)
        for name, (group, kind, comment) in constants.items()
    }


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest flag."""

    def error(self, message):
        """One line, without the usage, and exit status 2."""
        self.exit(2, f"{self.prog}: error: {_on_one_line(message)}\n")

    def parse_args(self, argv=None):
        """As argparse's; an unknown flag is answered with the nearest one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0].replace("-", "_")
            names = [name for name in self._option_string_actions if name.startswith("--")]
            known = {name.replace("-", "_"): name for name in names}
            near = difflib.get_close_matches(flag, known, n=1)
            advice = f"did you mean {known[near[0]]}?" if near else "--help lists the flags"
            self.error(f"{unknown[0]}: unknown; {advice}")
        return args


def make_parser(constants, add_help=True):
    """A flag for each constant, with its comment as help. Flags not given are left out."""
    parser = Parser(
        prog="train_eval.py",
        usage="train_eval.py [--CONSTANT VALUE ...]",
        description="Train a DDPM on MNIST, watch it, draw digits. Each flag replaces the line of "
        "that constant at the top of train_eval.py.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=add_help,
    )
    groups = {}
    for name, (group, kind, value, comment) in constants.items():
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        options = {"help": f"{comment} (default: {text})".replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"type": integers, "metavar": "INT,INT"}
        elif kind == bool | str:
            options |= {"nargs": "?", "const": True, "metavar": "FOLDER"}
        elif isinstance(kind, type):
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        else:
            options["choices"] = list(kind)
        groups[group].add_argument(f"--{name}", **options)
    return parser


def integers(text):
    """'1,2,4' -> (1, 2, 4); 'none' -> ()."""
    return () if text in ("", "none") else tuple(int(part) for part in text.split(","))


def check_kind(name, value, kind, low=-math.inf, high=math.inf):
    """ValueError if a constant is not of its kind or out of its limits."""
    if kind is int:
        return checks.whole(name, value, low, high)
    if kind is float:
        return checks.number(name, value, low, high)
    if kind is bool:
        return checks.switch(name, value)
    if isinstance(kind, (dict, tuple)):
        return checks.choice(name, value, kind)
    if kind is tuple:
        fits = type(value) is tuple and all(type(part) is int for part in value)
    else:  # text, or a switch that may name a folder
        fits = type(value) is str and value and "\0" not in value
        fits = fits or kind is not str and type(value) is bool
    if not fits:
        checks.refuse(name, value, EXPECTED[kind])


def check_together(config):
    """ValueError for constants that do not fit together, where no constructor would see it."""
    if config.preview_steps > config.num_timesteps:
        expected = f"at most num_timesteps {config.num_timesteps}"
        checks.refuse("preview_steps", config.preview_steps, expected)
    if config.digits and not config.use_conditional_generation:
        checks.refuse("digits", config.digits, "none: the model was trained without labels")
    if config.use_conditional_generation and not has_labels(config.dataset):
        expected = f"False, or two subfolders of images or more: {config.dataset} has no labels"
        checks.refuse("use_conditional_generation", True, expected)
    if config.channels not in (1, 3):
        checks.refuse("channels", config.channels, "1 (grey) or 3 (RGB)")
    graphs = config.use_compile and config.compile_mode == "reduce-overhead"
    if graphs and config.grad_accumulation > 1:  # gradients would be overwritten (pytorch#169545)
        expected = "1 with compile_mode 'reduce-overhead', CUDA graphs"
        checks.refuse("grad_accumulation", config.grad_accumulation, expected)
    if config.target_references and config.loss != "mse":
        checks.refuse("target_references", config.target_references, "0, or loss 'mse'")
    bound = config.loss in ("vlb", "clipped-vlb") or config.variance == "learned"
    if config.timestep_sampling == "logit-normal" and bound:  # it would weigh the bound's terms
        expected = f"another one with loss {config.loss!r} and variance {config.variance!r}"
        checks.refuse("timestep_sampling", "logit-normal", expected)


def adopt(chosen, run, path, free, machine):
    """The config of a saved run, with what the person has changed: by a flag, or in the script.

    A constant was edited if its line differs from the one that the run began with, on the machine
    that the run began on. What is changed must be free to change.

    Args:
        chosen: the `Chosen` of this command.
        run: the saved run, a dict: 'config' are its constants, 'script' those of its script as
            they stood, without flags.
        path: where it was found, for a person.
        free: names of constants, and of groups, that may differ from the saved run.
        machine: groups that belong to the machine, or to this command alone: never saved ones.

    Raises:
        ValueError: a constant was changed and is not free, or the saved run has one that cannot be.
    """
    saved, script = run["config"], run["script"]
    if not isinstance(saved, dict) or not isinstance(script, dict):
        raise ValueError(f"the run in {path}: its constants are no dictionaries")
    own, free = chosen.names(machine), chosen.names(free)
    # a folder of images that is not here any more, or has changed, is no edit
    then = {"has_labels": lambda dataset: script.get("use_conditional_generation")}
    then = chosen.read(then | {name: script[name] for name in own if name in script})
    flags = {name: vars(chosen.config)[name] for name in chosen.given}
    edited = {name for name, constant in then.items() if constant.value != script.get(name)}
    edited &= script.keys() - own
    kept = {name: saved[name] for name in saved.keys() & then.keys() - own - edited}
    constants = chosen.read(kept | flags)
    changed = {
        name: constants[name].value for name in constants if name in edited | flags.keys() - own
    }
    for name, value in changed.items():
        if value != saved.get(name) and name not in free:
            raise ValueError(
                f"{name} {value}: the run in {path} has {saved.get(name)}; take the flag or the "
                "edit back, or start another run in another --save_dir"
            )
    for name, constant in constants.items():
        try:
            check_kind(name, constant.value, constant.kind)
        except ValueError as error:
            raise ValueError(f"the run in {path}: {error}") from None
    news = [
        f"{name} {saved[name]} -> {value}"
        for name, value in changed.items()
        if saved.get(name, value) != value
    ]
    if news:
        print(f"changed since this run began: {', '.join(news)}")
    config = argparse.Namespace(**values_of(constants))
    config.save_dir = chosen.config.save_dir
    return config


def refuse_unused(chosen, flag, used):
    """ValueError if a flag was given that has no meaning beside another one."""
    if unused := sorted(chosen.given - chosen.names(used)):
        raise ValueError(f"{', '.join(unused)}: not used with {flag}; leave it out")


@contextmanager
def input_errors():
    """A ValueError inside is a person's mistake: one line on stderr and exit status 2."""
    try:
        yield
    except ValueError as error:
        print(f"train_eval.py: error: {_on_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _on_one_line(message):
    """A message with its line breaks, such as those in the name of a file, written as \\n."""
    return "\\n".join(str(message).splitlines())
