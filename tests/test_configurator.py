"""Constants become checked flags: kinds, ranges, what fits together, and what a saved run allows."""

import argparse
import math
import subprocess
import sys
from pathlib import Path, PurePath

import numpy as np
import pytest
import torch
from conftest import read_constants

import train_eval
from support import configurator
from support.configurator import check_kinds

ROOT = Path(__file__).parent.parent
VALUES = {name: value for name, (_, value, _) in read_constants({"device": "cpu"}).items()}


def test_every_constant_has_a_kind():
    known = (
        (configurator.WHOLE | configurator.NUMBERS).keys()
        | configurator.TUPLES
        | configurator.SWITCHES
    )
    assert known | configurator.TEXTS | train_eval.CHOICES.keys() | {"evaluate"} == VALUES.keys()
    for device in ("cpu", "cuda"):
        check_kinds(
            {name: value for name, (_, value, _) in read_constants({"device": device}).items()},
            train_eval.CHOICES,
        )


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("epochs", "3", "a whole number"),
        ("epochs", 2.0, "a whole number"),
        ("epochs", None, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", 0, "at least 1"),
        ("batch_size", -4, "at least 1"),
        ("seed", np.int64(3), "a whole number"),
        ("seed", -1, "at least 0 and at most"),
        ("log_every", [50], "a whole"),
        ("epochs", 10**400, "at most 2147483647"),
        ("batch_size", 2**31, "at least 1 and at most 2147483647"),
        ("seed", 2**32, "at least 0 and at most 4294967295"),
        ("save_dir", "a\0b", "text that is not empty"),
        ("learning_rate", math.inf, "at least 0 and finite"),
        ("num_timesteps", 1e3, "a whole number"),
        ("channels", 4, "at least 1 and at most 3"),
        ("grad_clip", None, "a number"),
        ("grad_clip", "1", "a number"),
        ("learning_rate", "1e-3", "a number"),
        ("learning_rate", math.nan, "at least 0"),
        ("weight_decay", math.inf, "at least 0"),
        ("dropout", (0,), "a number"),
        ("ema_decay", np.float64(0.9), "a number"),
        ("guidance_scale", True, "a number"),
        ("dropout", 1.5, "at most 1"),
        ("min_snr_gamma", torch.tensor(5.0), "a number"),
        ("adam_beta2", 1, "at most 0.99999"),
        ("channel_mult", [1, 2], "a tuple of whole numbers"),
        ("channel_mult", 2, "a tuple of whole numbers"),
        ("attention_resolutions", (8.0,), "a tuple of whole numbers"),
        ("channel_mult", (1, True), "a tuple of"),
        ("use_scheduler", 1, "True or False"),
        ("resume", "yes", "True or False"),
        ("bf16", None, "True or False"),
        ("save_dir", PurePath("x"), "text that is"),
        ("data_dir", None, "text that is"),
        ("save_dir", "", "text that"),
        ("device", torch.device("cpu"), "text that is"),
        ("device", 0, "text that is"),
        ("beta_schedule", None, "one of linear, cosine"),
        ("loss", "MSE", "one of mse, l1, vlb"),
        ("sampler", 3, "one of ddpm"),
        ("timestep_sampling", "logitnormal", "one of uniform, logit-normal"),
        ("evaluate", 3, "True, False or the name of a folder"),
        ("evaluate", None, "True, False or"),
    ],
)
def test_a_constant_of_the_wrong_kind_is_one_line(name, value, expected):
    with pytest.raises(ValueError) as error:
        check_kinds(VALUES | {name: value}, train_eval.CHOICES)
    line = str(error.value)
    assert line.startswith(f"{name} {value!r}: expected ") and expected in line and "\n" not in line


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            "--loss vlb --timestep_sampling logit-normal --target_references 0",
            "'logit-normal' with loss 'vlb'",
        ),
        (
            "--variance learned --timestep_sampling logit-normal",
            "variance 'learned': it would change the weights",
        ),
        ("--timestep_std 0", "timestep_std 0.0: one timestep alone would be trained"),
        ("--loss l1 --target_references 9", "target_references 9 with loss 'l1'"),
        ("--loss vlb --target_references 9", "target_references 9 with loss 'vlb'"),
        (
            "--no-use_conditional_generation --num_clusters 0 --guidance_scale 2",
            "guidance_scale 2.0: guidance needs",
        ),
        ("--num_clusters 8", "num_clusters 8: clusters stand in for labels; expected 0"),
        ("--num_timesteps 4 --sample_steps 4", "preview_steps 5: expected at most num_timesteps 4"),
        ("--channels 2", "channels 2: expected 1 (grey) or 3 (RGB)"),
        ("--zero_terminal_snr --min_snr_gamma 5", "min_snr_gamma 5.0 with zero_terminal_snr"),
        ("--zero_terminal_snr --prediction eps", "zero_terminal_snr with prediction 'eps'"),
        ("--min_snr_gamma 5 --loss vlb", "min_snr_gamma 5.0 with loss 'vlb'"),
    ],
)
def test_constants_that_do_not_work_together_are_one_line(flags, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        train_eval.main(
            [
                *flags.split(),
                "--device",
                "cpu",
                "--dataset",
                "glyphs",
                "--save_dir",
                str(tmp_path / "new"),
            ]
        )
    line = capsys.readouterr().err
    assert (
        exit_.value.code == 2
        and words in line
        and line.count("\n") == 1
        and not (tmp_path / "new").exists()
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], ("logit-normal", 4096)),
        (["--loss", "vlb"], ("uniform", 0)),
        (["--loss", "l1"], ("logit-normal", 0)),
        (["--variance", "learned"], ("uniform", 4096)),
        (["--loss", "vlb", "--variance", "learned"], ("uniform", 0)),
        (["--device", "cuda"], ("uniform", 0)),
    ],
)
def test_what_depends_on_the_loss_follows_it(flags, expected):
    config, _ = train_eval.configure(flags if "--device" in flags else [*flags, "--device", "cpu"])
    assert (config.timestep_sampling, config.target_references) == expected


def test_comments_between_constants_are_no_headings_and_odd_kinds_are_refused(tmp_path):
    (tmp_path / "script.py").write_text(
        "# run\nepochs = 3  # passes\n# try 4 here\nmine = (1, 2)  # my own\n"
        "\n# other\nflag = False  # another\n# end of constants\n"
    )
    constants = configurator.read_constants(tmp_path / "script.py", {}, {})
    assert constants == {
        "epochs": ("run", 3, "passes"),
        "mine": ("run", (1, 2), "my own"),
        "flag": ("other", False, "another"),
    }
    parser = configurator.make_parser(constants, {})
    assert vars(parser.parse_args(["--mine", "3,4", "--no-flag"])) == {
        "mine": (3, 4),
        "flag": False,
    }
    for value in ([1], None, 1j, {}):
        with pytest.raises(
            ValueError, match="mine .*: expected a number, text, True, False or a tuple"
        ):
            check_kinds({"mine": value}, {})


def test_an_error_of_the_code_is_not_reported_as_one_of_the_user(tmp_path, monkeypatch):
    def fault(*args, **options):
        raise ValueError("ours")

    flags = [
        "--device",
        "cpu",
        "--dataset",
        "glyphs",
        "--save_dir",
        str(tmp_path),
        "--train_size",
        "20",
        "--test_size",
        "2",
        "--num_samples",
        "1",
        "--base_channels",
        "32",
        "--channel_mult",
        "1",
        "--patch_size",
        "4",
        "--attention_resolutions",
        "none",
    ]
    for module, name in (
        (train_eval, "train_step"),
        (train_eval, "draw_references"),
        (torch.optim, "AdamW"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            with pytest.raises(ValueError, match="^ours$"):
                train_eval.main(flags)


def test_a_saved_run_keeps_its_constants_and_takes_the_flags_that_are_free(capsys):
    config = argparse.Namespace(
        save_dir="x",
        resume=True,
        evaluate=False,
        device="cuda",
        bf16=True,
        use_compile=True,
        epochs=9,
        base_channels=64,
        dropout=0.2,
        dataset="mnist",
    )
    saved = dict(
        save_dir="old",
        dataset="mnist",
        device="cpu",
        bf16=False,
        use_compile=False,
        epochs=2,
        base_channels=32,
        dropout=0.1,
    )
    free = configurator.FREE_TO_RESUME
    mixed = configurator.adopt(config, {"epochs", "device"}, saved, free)
    assert vars(mixed) == dict(
        save_dir="x",
        resume=True,
        evaluate=False,
        device="cuda",
        bf16=True,
        use_compile=True,
        epochs=9,
        base_channels=32,
        dropout=0.1,
        dataset="mnist",
    )
    assert "base_channels 64, dropout 0.2" in capsys.readouterr().out
    config.dataset, saved["dataset"] = "auto", "glyphs"  # what auto found when the run began
    assert configurator.adopt(config, {"dataset"}, saved, free).dataset == "glyphs"
    assert "dataset" not in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="base_channels 64: the run in x has 32; leave the flag out"
    ):
        configurator.adopt(config, {"base_channels"}, saved, free)


@pytest.mark.parametrize("encoding", ["cp1251", "ascii", "latin-1", "utf-8", "cp437:strict"])
def test_no_console_is_too_small_for_our_words(encoding, tmp_path):
    """Help, an error with a strange name in it, and what a table prints."""
    code = (
        "import train_eval\nfrom support import console, machine, monitor\nmachine.prepare_process()\n"
        "print('\\u0424 é \\u221e')\nconsole.print_left_out(['\\udcff', '\\u4e2d'])\n"
        "print(monitor.table({'samples': 1, 'frechet': 1.0, 'digits': [1], 'digits_real': [1], 'classifier': ''},"
        " 1.0))\n"
        "train_eval.main(['--data_dir', '\\u4e2d\\u6587\\udcff', '--dataset', 'mnist', '--train_size', '0'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        env={"PYTHONIOENCODING": encoding, "PATH": ""},
    )
    assert (
        done.returncode == 2 and b"Traceback" not in done.stderr and b"train_size 0" in done.stderr
    ), done.stderr
    assert b"chet distance to the test set" in done.stdout
