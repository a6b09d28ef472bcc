"""README and docs: commands fit their programs, four of them run, code and names are true."""

import ast
import functools
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import benchmark
import mutants
import pytest
import torch
from conftest import configured
from tiny import FLAGS, tiny_ddpm, tiny_unet
from torch.distributed.run import get_args_parser

import metrics
import train_eval
from support import configurator, pictures

ROOT = Path(__file__).parent.parent
FILES = ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "assets" / "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
README = PAGES["README.md"]
BLOCK = re.compile(r"^```(\w*)\n((?:.*\n)*?)```$", re.M)
READ = functools.partial(configurator.read_constants, train_eval.__file__, vars(train_eval))


def snippets(text):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def commands():
    """Every command of all pages once, as words. Flags in the text count as a command."""
    found, programs = [], {begin.split()[0] for begin in ACCEPTS}
    for text in PAGES.values():
        for language, block in BLOCK.findall(text):
            found += block.replace("\\\n", " ").splitlines() if language == "bash" else []
        found += [x for x in snippets(text) if x.split()[0] in programs or x.startswith("--")]
    parts = [part for line in found for part in re.sub(r"\s#.*", "", line).split(" && ")]
    return [shlex.split(part.removesuffix(" ...")) for part in dict.fromkeys(parts) if part.strip()]


def script(*flags):
    return configured(*[flag for flag in flags if flag != "--help"])


def tensorboard(*flags):
    from tensorboard import default, program

    return program.TensorBoard(default.get_plugins()).configure(["", *flags]) or True


def some_flags(*words):
    """Flags in the text: of the script, where one alone may leave its value out, or of others."""
    names = {word for word in words if word.startswith("--")}
    parsers = configurator.make_parser(READ({})), benchmark.make_parser(), get_args_parser()
    known = [names <= parser._option_string_actions.keys() for parser in parsers]
    return script(*words) if known[0] and len(words) > 1 else any(known)


ACCEPTS = {  # how a command begins: whether its program takes the rest; teach it others here
    "python train_eval.py": script,
    "python tests/benchmark.py": lambda *flags: benchmark.make_parser().parse_args(flags),
    "python tests/mutants.py": lambda *flags: mutants.main([*flags, "--list"]) is not None,
    "python -m support.pictures": lambda *folder: not folder,
    "python -m pytest": lambda *flags: flags in ((), ("-m", "slow or not slow")),
    "ruff": lambda *words: words in (("check", "."), ("format", "--check", ".")),
    "torchrun": lambda *x: script(*get_args_parser().parse_args(x).training_script_args),
    "tensorboard": tensorboard,
    "pip install -r": lambda path: (ROOT / path).exists(),
    "pip install torch torchvision --index-url": lambda url: url.endswith("whl/cpu"),
    "kill": lambda *words: words in (("PID",), ("-USR1", "PID")),
    "--": some_flags,
}


def test_every_command_fits_its_program(capsys):
    for words in commands():
        begin = next((begin for begin in ACCEPTS if shlex.join(words).startswith(begin)), "")
        assert ACCEPTS[begin](*words[0 if begin == "--" else len(begin.split()) :]), words


def test_four_commands_run_and_leave_the_files_that_readme_names(tmp_path, data_flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documented = [shlex.join(words) for words in commands()]
    for flags, short in (([], FLAGS), (["--resume"], FLAGS[:3]), (["--evaluate"], FLAGS[:3])):
        assert shlex.join(["python", "train_eval.py", *flags]) in documented
        assert train_eval.main([*short, *flags, *data_flags]) == 0
    assert "python -m support.pictures" in documented and pictures.main(data_flags) == 0
    there = [*ROOT.rglob("*"), *tmp_path.rglob("*")]
    kinds = r"[\w./-]+(/|\.(py|md|txt|ipynb|pt|png|gif|json))"
    names = [name for name in snippets(README) if re.fullmatch(kinds, name) and "DATE" not in name]
    for name in names + re.findall(r"\]\((?!https:|#)([^)#]*)", README):
        pattern = "*/" + re.sub(r"-\d(?=\.)", "", name.rstrip("/"))  # -2 of a name that is taken
        assert any(fnmatch(path.as_posix(), pattern) for path in there), name


@pytest.mark.parametrize("page", [x for x in PAGES if "```python" in PAGES[x]])
def test_python_blocks_run(page, tmp_path, data_flags, monkeypatch):
    """With a small model, few digits, and a classifier that is not trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data_flags[1])
    monkeypatch.setattr(metrics, "MNIST_CLASSIFIER", tmp_path / "classifier.pt")
    monkeypatch.setattr(metrics, "train_classifier", lambda *data, **how: metrics.Classifier(10))
    network = tiny_unet(image_size=32, channels=3, patch_size=8, num_classes=10)
    sizes = dict(image_size=32, channels=3, num_timesteps=1000, sample_steps=3)
    (tmp_path / "checkpoints").mkdir()
    tiny_ddpm(network=network, **sizes).save("checkpoints/best_model.pt")
    for block in [body for language, body in BLOCK.findall(PAGES[page]) if language == "python"]:
        exec(compile(block, page, "exec"), names := {})
        for name, shape in re.findall(r"^(\w+) = .*# (\([\d, ]+\))", block, re.M):
            assert names[name].shape == ast.literal_eval(shape), name
    assert page == "README.md" or torch.load("classifier.pt")["head.bias"].dtype == torch.half


def test_the_constants_of_the_recipes_are_those_of_the_script():
    table = README[README.index("| constant |") :].split("\n\n")[0]
    recipes = [{"recipe": "reference"}, {"recipe": "quick"}]
    recipes += [{"recipe": "quick", "use_conditional_generation": False}]
    for names, *cells in re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|", table, re.M):
        quick, _, unlabelled = cells[1].partition("; ")
        cells = cells[0], quick.replace("the same", cells[0]), re.sub(r"^\D* ", "", unlabelled)
        for cell, flags in zip(filter(None, cells), recipes):
            found = READ(flags)
            values = [found[name].value for name in re.findall(r"`(\w+)`", names)]
            assert values == ast.literal_eval(f"[{cell}]"), (names, cell)
