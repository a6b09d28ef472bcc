"""README and docs: commands and Python blocks run, links and names exist, constants are those of the script.

A command runs on few images and a small network. What cannot run here is parsed by its own program. A command, or
another piece of code, of a kind that this file does not know is an error: teach it, so that nothing goes untested.
"""

import ast
import functools
import importlib
import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import benchmark
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import read_constants
from PIL import Image
from torch.distributed.run import get_args_parser

import dataprocess
import likelihood
import metrics
import train_eval
from diffusion import DDPM
from support import configurator, pictures
from unet import UNet

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
PROGRAMS = ("python", "pip", "ruff", "torchrun", "tensorboard", "kill")
# A short run: flags that a command may replace, and flags that replace those of a command.
SHORT = (
    "--channel_mult 1 --num_res_blocks 1 --time_emb_dim 32 --patch_size 4 --attention_resolutions none "
    "--sample_steps 3 --preview_steps 3 --num_samples 10 --save_every 1"
).split()
SMALL = (
    "--device cpu --train_size 70 --test_size 70 --base_channels 32 --batch_size 35 --epochs 1 --no-bf16"
).split()
EVALUATION = "--device cpu --no-bf16 --num_samples 10 --eval_samples 70 --bound_images 2 --bound_terms 2".split()
# Code in the text that is no name, file or command of ours.
OTHERS = {
    "diffusers",
    "UNet2DModel",
    "Unet",
    "torch.profiler",
    "DataLoader",  # other libraries
    "total_params: 452364806",  # the reference's log
    "data/",
    "data/MNIST/raw",
    "MNIST/raw",
}  # what a download leaves


def blocks(text, language):
    """The blocks of code in this language."""
    return [body for name, body in BLOCK.findall(text) if name == language]


def snippets(text):
    """The pieces of code in the text."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def is_command(snippet):
    return snippet.startswith("-") or snippet.split()[0] in PROGRAMS


def commands():
    """Every command of all pages once. Flags in the text count as a command."""
    found = {}
    for text in PAGES.values():
        for block in blocks(text, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
                    found[command] = None
        found.update(
            dict.fromkeys(
                part
                for snippet in snippets(text)
                if is_command(snippet)
                for part in snippet.split(" && ")
            )
        )
    return [command.removesuffix(" ...") for command in found if command]


def tables(text):
    """Every table as its rows of cells, and the text before it in its section."""
    for section in re.split(r"^## ", text, flags=re.M):
        for match in re.finditer(r"(?:^\|.*\n)+", section + "\n", re.M):
            rows = [
                [cell.strip() for cell in line.strip("|").split("|")]
                for line in match[0].splitlines()
            ]
            yield [rows[0], *rows[2:]], section[: match.start()]


def slugs(text):
    """The anchors that GitHub gives to the headings."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.M)
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_flags):
    """A folder in which checkpoints/ has a second run, evaluated twice, and what there was before."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_classifier(patch)
        for flags in 2 * [[*SHORT, *SMALL]] + 2 * [["--evaluate", *EVALUATION]]:
            assert train_eval.main([*flags, *data_flags]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A folder of a test's own, the current one, with the trained run in checkpoints/."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    small_classifier(monkeypatch)
    return tmp_path


def small_classifier(patch):
    """Without MNIST, a classifier would be trained for a minute."""
    patch.setattr(metrics, "train_classifier", lambda *args, **options: metrics.Classifier(10))


def test_every_block_is_a_command_or_python():
    for page, text in PAGES.items():
        assert {language for language, _ in BLOCK.findall(text)} <= {"bash", "python"}, page
        assert text.count("```") == 2 * len(BLOCK.findall(text)), page


@pytest.mark.parametrize("command", commands())
def test_a_command_does_what_it_should(command, here, data_flags, monkeypatch, capsys):
    program, *rest = shlex.split(command)
    if program.startswith("-"):
        check_flags([program, *rest], data_flags, capsys)
    elif program == "python" and rest[0] == "train_eval.py":
        check_run(rest[1:], data_flags)
    elif program == "python" and rest[0] == "tests/benchmark.py":
        check_benchmark(rest[1:], ["whole_run" if "--whole_run" in rest else "on_paper"])
    elif (program, *rest) == ("python", "-m", "support.train_classifier"):
        check_train_classifier(monkeypatch, here)
    elif (program, *rest[:2]) == ("python", "-m", "support.pictures"):
        assert (
            pictures.main([*rest[2:], *data_flags[2:]]) == 0
            and Path("images", "denoising.gif").exists()
        )
    elif program == "torchrun":
        script, flags = check_torchrun(rest)
        assert script == "train_eval.py"
        check_run(flags, data_flags)
    elif program == "tensorboard":
        assert Path(check_tensorboard(rest).logdir).is_dir()
    elif program == "kill":
        check_kill([program, *rest], data_flags, monkeypatch)
    elif program == "pip":
        check_pip(rest)
    else:  # what the commands of .ci/run are is run there
        assert command in (ROOT / ".ci" / "run").read_text().splitlines(), (
            f"{command}: no test knows this command"
        )


def check_run(flags, data_flags):
    """Run the script, a short run. The model of the command as written is built, too."""
    if flags == ["--help"]:
        with pytest.raises(SystemExit) as exit_:
            train_eval.main(flags)
        assert exit_.value.code == 0
        return
    config = check_model(flags)
    if config.evaluate is not True and config.evaluate:
        for i in range(3):
            folder = Path(config.evaluate, str(i))
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / "image.png")
        flags = [*flags, *SMALL[:6]]
    elif config.evaluate:
        flags = [*flags, *EVALUATION]
    elif config.resume:
        flags = [*flags, "--device", "cpu"]
    else:
        flags = [*SHORT, *flags, *SMALL]
    before = len(list(Path("checkpoints").glob("run_*")))
    assert train_eval.main([*flags, *data_flags, "--save_dir", "checkpoints"]) == 0
    assert len(list(Path("checkpoints").glob("run_*"))) == before + (
        not config.evaluate and not config.resume
    )


def check_model(flags):
    """Build the model that flags of the script ask for. Returns the config."""
    config, _ = train_eval.configure([*flags, "--device", "cpu"])
    configurator.check_together(config)
    train_eval.build(config)
    return config


def check_flags(flags, data_flags, capsys):
    """Flags of the script must fit it; those of a whole run, such as --resume, run. Others belong to other programs."""
    parser = configurator.make_parser(read_constants({}), train_eval.CHOICES)
    flag = parser._option_string_actions.get(flags[0])
    if flag and {"--resume", "--evaluate", "--help"} & {*flags}:
        check_run(flags, data_flags)
    elif flag and (len(flags) > 1 or flag.nargs == 0):
        check_model(flags)
    elif not flag:
        others = [
            lambda: check_torchrun([*flags, "train_eval.py"]),
            lambda: check_benchmark(flags),
            lambda: check_tensorboard(["--logdir", "x", *flags]),
        ]
        assert any(map(accepted, others)), f"{flags[0]}: no program knows this flag"
        capsys.readouterr()


def accepted(check):
    try:
        check()
        return True
    except SystemExit:
        return False


def check_benchmark(flags, parts=()):
    """Its flags, and these parts of it, with the small network in place of the reference."""
    settings, run = benchmark.settings, subprocess.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark.py", *flags])
        patch.setattr(benchmark, "settings", lambda name, device: settings("small", device))
        for name in {
            "ceilings",
            "counts",
            "small_steps",
            "memory_kept",
            "busy",
            "sampling",
            "loader",
            "after_backward",
            "start_up",
            "growth",
            "reference_steps",
            "on_paper",
            "whole_run",
        } - {*parts}:

            def skip(bench):
                pass

            patch.setattr(benchmark.Bench, name, skip)
        patch.setattr(
            subprocess, "run", lambda command, **options: run([*command, *SHORT, *SMALL], **options)
        )
        if not parts:
            patch.setattr(benchmark, "print_table", lambda bench: None)
        benchmark.main()


def check_train_classifier(monkeypatch, folder):
    """With few images, and not into assets/."""
    real = dataprocess.load_data
    monkeypatch.setattr(
        dataprocess,
        "load_data",
        lambda *args, **options: real("glyphs", train_size=64, test_size=64),
    )
    monkeypatch.setattr(metrics, "MNIST_CLASSIFIER", folder / "classifier.pt")
    monkeypatch.setattr(sys, "argv", ["train_classifier"])
    runpy.run_module("support.train_classifier", run_name="__main__")
    shapes = {
        name: value.shape
        for name, value in torch.load(folder / "classifier.pt", weights_only=True).items()
    }
    saved = torch.load(ROOT / "assets" / "classifier.pt", weights_only=True)
    assert shapes == {name: value.shape for name, value in saved.items()}


def check_torchrun(flags):
    """What it would start: tests/test_processes.py starts it."""
    parser = get_args_parser()
    parser.allow_abbrev = False
    args = parser.parse_args(flags)
    return args.training_script, args.training_script_args


def check_tensorboard(flags):
    from tensorboard import default, program

    board = program.TensorBoard(default.get_plugins())
    board.configure(argv=["tensorboard", *flags])
    return board.flags


def check_kill(command, data_flags, monkeypatch):
    """In the first step of a run."""
    step, left = train_eval.train_step, [command]

    def killed(*args):
        if left:
            subprocess.run(
                [word.replace("PID", str(os.getpid())) for word in left.pop()], check=True
            )
        return step(*args)

    monkeypatch.setattr(train_eval, "train_step", killed)
    status = train_eval.main([*SHORT, *SMALL, *data_flags, "--save_dir", "killed"])
    assert status == (0 if "-USR1" in command else 143) and Path("killed", "last.pt").exists()


def check_pip(rest):
    """Files of requirements exist; .ci/run installs those of tests. The CPU build of PyTorch has its own index."""
    if rest == "install torch torchvision --index-url https://download.pytorch.org/whl/cpu".split():
        return
    if rest == ["install", "notebook"]:  # an application, to open explore.ipynb with
        return
    assert rest[:2] == ["install", "-r"], f"pip {shlex.join(rest)}: no test knows this command"
    for path in rest[2:]:
        lines = (ROOT / path).read_text().splitlines()
        assert all(re.match(r"-r \S+$|[\w-]+([>=]=|<)[\d.]+( +#.*)?$|#", line) for line in lines), (
            path
        )


@pytest.mark.parametrize(
    "page, block",
    [(page, block) for page, text in PAGES.items() for block in blocks(text, "python")],
)
def test_a_python_block_runs(page, block, here, monkeypatch):
    few_terms = functools.partial(likelihood.bits_per_dim, terms=10)
    monkeypatch.setattr(likelihood, "bits_per_dim", few_terms)
    names = {
        "x0": torch.rand(1, 3, 32, 32) * 2 - 1,
        "other": torch.rand(1, 3, 32, 32) * 2 - 1,
        "network": UNet(
            base_channels=32,
            channel_mult=(1,),
            num_res_blocks=1,
            patch_size=4,
            attention_resolutions=(),
        ),
    }
    exec(compile(block, page, "exec"), names)
    plt.close("all")
    for name, shape in re.findall(r"^(\w+) = .*# (\([\d, ]+\))", block, re.M):
        assert names[name].shape == ast.literal_eval(shape), name


@pytest.mark.parametrize("page", PAGES)
def test_links_and_their_anchors_exist(page):
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)]*)\)", BLOCK.sub("", PAGES[page])):
        if target.startswith("https://"):
            if re.fullmatch(r"\d{4}\.\d{5}", text):
                assert target == f"https://arxiv.org/abs/{text}"
            continue
        path, _, anchor = target.partition("#")
        path = (ROOT / page).parent / path if path else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in slugs(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page, trained):
    run = [path.relative_to(trained).as_posix() for path in trained.rglob("*")]
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")] + run
    unknown = [
        code for code in snippets(PAGES[page]) if not is_command(code) and not is_name(code, files)
    ]
    assert not unknown, (
        f"neither a name nor a file of ours, nor a command that a test knows: {unknown}"
    )


def is_name(code, files):
    """Whether this is a constant, perhaps with a value; a value; an argument; a file; or a function with arguments."""
    constants = read_constants({})
    scope = {"ddpm": DDPM, "network": UNet, "sample": DDPM.sample, "busy": benchmark.Bench.busy}
    for path in ROOT.glob("*.py"):
        module = importlib.import_module(path.stem)
        scope = {path.stem: module} | vars(module) | scope
    arguments = {
        name
        for function in (DDPM.sample, DDPM.interpolate, DDPM.bits_per_dim, likelihood.bits_per_dim)
        for name in inspect.signature(function).parameters
    }
    choices = {choice for values in train_eval.CHOICES.values() for choice in values}
    if code in OTHERS or code in constants or code in arguments or code.strip('"') in choices:
        return True
    if match := re.fullmatch(r"([A-Z_]+)=\w+", code):  # a variable of the environment
        return any(
            f'"{match[1]}"' in (ROOT / path).read_text()
            for path in ("tests/conftest.py", "support/threads.py")
        )
    if match := re.fullmatch(r"(\w+)=([\w.]*)", code):
        return match[1] in arguments
    if match := re.fullmatch(r"(\w+) = (.+)", code):
        name, value = match[1], ast.literal_eval(match[2])
        switch = f"--{name}" if value else f"--no-{name}"
        train_eval.configure([switch if isinstance(value, bool) else f"--{name}={value}"])
        return name in constants
    pattern = code.rstrip("/").replace("DATE", "*")
    if any(fnmatch(path, pattern) or fnmatch(path, f"*/{pattern}") for path in files):
        return True
    try:
        tree = ast.parse(code, mode="eval").body
    except SyntaxError:
        return False
    function, keywords = (tree.func, tree.keywords) if isinstance(tree, ast.Call) else (tree, [])
    found = scope.get(ast.unparse(function).partition(".")[0])
    for part in ast.unparse(function).split(".")[1:]:
        found = getattr(found, part, None)
    return found is not None and {word.arg for word in keywords} <= (
        inspect.signature(found).parameters.keys() if keywords else set()
    )


def test_the_constants_are_those_of_the_script():
    (table,) = (rows for rows, _ in tables(README) if rows[0][0] == "constant")

    def check(names, cell, flags):
        constants = read_constants(flags)
        values = ast.literal_eval(f"[{cell}]")
        assert [constants[name][1] for name in names] == values, (names, cell)

    for names, cuda, cpu, _ in table[1:]:
        names = re.findall(r"`(\w+)`", names)
        cpu, _, unlabelled = cpu.partition("; ")
        check(names, cuda, {"device": "cuda", "bf16": True})
        check(names, cuda if cpu == "the same" else cpu, {"device": "cpu"})
        if unlabelled:
            value = re.fullmatch(r"(?:without labels|clusters) (.*)", unlabelled)[1]
            check(names, value, {"device": "cpu", "use_conditional_generation": False})


def test_the_table_of_sample_has_its_arguments():
    (table,) = (rows for rows, _ in tables(README) if rows[0][0] == "argument of `sample`")
    names = {name for row in table[1:] for name in re.findall(r"`(\w+)`", row[0])}
    own = {"self", "n", "rows"}  # `rows` is for several processes
    assert names == inspect.signature(DDPM.sample).parameters.keys() - own


def test_the_layout_names_every_file():
    names = {
        Path(code).name
        for code in snippets(README[README.index("\n## Layout") :].split("\n## ")[1])
    }
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        assert path.name in names or path.name == "__init__.py", path.name


def test_parameters_are_counted_right():
    with torch.device("meta"):
        networks = [UNet(), UNet(attention_resolutions=()), metrics.Classifier(10)]
    networks.append(train_eval.build(train_eval.configure(["--device", "cpu"])[0]).network)
    counts = {
        f"{sum(parameter.numel() for parameter in network.parameters()):,}" for network in networks
    }
    for text in PAGES.values():
        assert {*re.findall(r"(\d+(?:,\d{3})+) parameters", text)} <= counts


SOURCE = re.compile(
    r"`python |^```bash|source(:| is) (a|the) (command|script)|by the same kind of\nruns|"
    r"of the benchmark|was measured|as many training images",
    re.M | re.I,
)
FIGURE = re.compile(r"\d[\d,.]* ?(%|ms|s|MB|min|G.*/s|\(.*|\+- .*)?$")


@pytest.mark.parametrize("page", PAGES)
def test_figures_stand_beside_what_printed_them(page):
    """A table with figures has a command or a script above it in its section, or the page has one for all."""
    for rows, before in tables(PAGES[page]):
        figures = [cell for row in rows[1:] for cell in row[1:] if FIGURE.match(cell)]
        if figures and rows[0][0] != "constant" and "\n## How it was measured" not in PAGES[page]:
            assert SOURCE.search(before), rows[0]
