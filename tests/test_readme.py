"""README, docs and assets/README: commands and Python blocks work, names exist, values are true."""

import hashlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import experiments
from tiny import FLAGS
from torch.distributed.run import get_args_parser

import train_eval
from support import configurator, datasets

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "assets/README.md")
}
README = PAGES["README.md"]
BLOCKS = [
    (kind, text)
    for page in PAGES.values()
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S)
]
PROSE = "\n".join(re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S) for page in PAGES.values())
INLINE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", PROSE)]
PLACES = {"FOLDER": "x", "PID": "1", "FIRST": "host", "N": "2"}
# A short run of a model that the README's Python block can use.
SHORT = [*FLAGS, *"--image_size 32 --channels 3 --num_timesteps 1000 --epochs 1".split()]


def constants(**flags):
    return configurator.read_constants(train_eval.__file__, vars(train_eval), flags)


def commands():
    """Every command of the pages, as words; a code that begins with a flag is one of the script."""
    blocks = [text.replace("\\\n", " ") for kind, text in BLOCKS if kind == "bash"]
    lines = [line for text in blocks for line in text.splitlines()]
    starts = ("python ", "python3 ", "pip ", "ruff ", "torchrun ", "tensorboard ")
    lines += [code for code in INLINE if code.startswith(starts)]
    lines += [f"python train_eval.py {code}" for code in INLINE if re.match(r"--(?!node)\w+", code)]
    found = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [
        [PLACES.get(word, word) for word in words if word not in ("...", "--help")]
        for words in found
        if words
    ]


def test_every_command_is_one_that_its_program_takes():
    parser = configurator.make_parser(constants())
    assert len(commands()) > 30
    for program, *words in commands():
        if program == "torchrun":
            program, words = "python", get_args_parser().parse_args(words)
            words = [words.training_script, *words.training_script_args]
        if program == "pip":
            files = [after for word, after in zip(words, words[1:]) if word == "-r"]
            assert words[0] == "install" and all((ROOT / file).is_file() for file in files)
        elif program in ("python", "python3") and words[0] != "-m":
            source = (ROOT / words[0]).read_text(encoding="utf-8")
            if words[0] == "train_eval.py" and len(words) == 2 and words[1].startswith("--"):
                tools = "".join(path.read_text("utf-8") for path in ROOT.glob("tests/*.py"))
                assert words[1] in parser._option_string_actions or f'"{words[1]}"' in tools, words
            elif words[0] == "train_eval.py":
                parser.parse_args(words[1:])
            for flag in words[1:] if words[0] != "train_eval.py" else ():
                assert not flag.startswith("--") or f'"{flag}"' in source, flag
        elif program == "python":
            assert words[1] == "pytest"
        else:
            assert program in ("ruff", "tensorboard")


def test_every_table_of_the_recipe_is_one_of_experiments():
    parser, recipe = configurator.make_parser(constants()), PAGES["docs/recipe.md"]
    made = re.findall(r"^`python tests/experiments.py (\w+)`.*\n\n((?:\|.*\n)+)", recipe, re.M)
    assert {"default", "skip", "likelihood"} <= dict(made).keys() <= experiments.TABLES.keys()
    for name, table in made:
        _, columns, *rows = experiments.TABLES[name]
        for _, *flags in rows:
            parser.parse_args(" ".join(flags).split())
        shown = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
        assert not rows or shown == [label for label, *_ in rows], name
        head = [experiments.HEADS.get(column, column) for column in columns.split()]
        assert table.splitlines()[0] == f"| | {' | '.join(head)} |"


def test_the_commands_and_the_python_block_work(tmp_path, data_flags, monkeypatch, capsys):
    """As a person runs them, but short and on the first digits."""
    (tmp_path / "data").symlink_to(data_flags[1])
    monkeypatch.chdir(tmp_path)
    assert train_eval.main(SHORT) == 0
    few = "--eval_samples 80 --bound_images 2".split()
    run = [words[2:] for words in commands() if words[:2] == ["python", "train_eval.py"]]
    longer = next(flags for flags in run if "--resume" in flags and "--epochs" in flags)
    sampled = next(flags for flags in run if "--sampler" in flags)
    assert train_eval.main([*longer[:-1], "2"]) == 0
    assert train_eval.main(["--evaluate", *few, *sampled]) == 0
    assert "Fréchet distance to the test set" in capsys.readouterr().out
    names = "best_model.pt last.pt samples loss_curve.png evaluation.json tensorboard_logs"
    assert all(Path("checkpoints", name).exists() for name in names.split())

    block = "".join(text for kind, text in BLOCKS[:4] if kind == "python")  # of README
    Path("block.py").write_text(block, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    found = runpy.run_path("block.py")
    assert found["images"].shape == (16, 3, 32, 32) and found["digits"].shape == (10, 3, 32, 32)
    assert found["mixed"].shape == (2, 8, 3, 32, 32) and found["bits"].total > 0


def test_the_table_of_constants_has_the_values_of_both_recipes():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.+?) \| (.+?) \| ", README, re.M)
    recipes = [constants(device="cpu", recipe=recipe) for recipe in ("reference", "quick")]
    seen = 0
    for names, *texts in rows:
        names = re.findall(r"\w+", names)
        if not set(names) <= recipes[0].keys() or len(texts) != 2:
            continue
        for text, values in zip((texts[0], texts[1].replace("the same", texts[0])), recipes):
            value = eval(f"({text.partition(';')[0]},)")  # without what else holds
            assert list(value) == [values[name].value for name in names], (names, text)
            seen += 1
    assert seen >= 20


def test_links_files_and_hashes_are_there():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)[)#]", text):
            assert (ROOT / page).parent.joinpath(link).exists(), (page, link)
    files = {code for code in INLINE if re.fullmatch(r"[\w/]+\.(py|md|ipynb)|\w+/", code)}
    left = {"checkpoints/", "samples/", "run_DATE/", "tensorboard_logs/", "data/"}
    missing = [name for name in files - left if not (ROOT / name).exists()]
    assert [name for name in missing if not list(ROOT.glob(f"*/{name}"))] == []
    hashes = dict(re.findall(r"`(\S+-ubyte)` \| (\w{32})", PAGES["assets/README.md"]))
    data = datasets._read_archive(datasets.MNIST)
    assert hashes == {path.name: hashlib.md5(text).hexdigest() for path, text in data.items()}
