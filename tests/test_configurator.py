"""Constants of a script become checked flags; a saved run keeps its own, with what was changed."""

import re
from pathlib import Path

import pytest
from conftest import configured
from PIL import Image
from tiny import FLAGS, refused, snapshot

import train_eval
from support import configurator
from support.folders import has_labels

SCRIPT = Path(train_eval.__file__)
CONSTANTS = configured().read({})
SMALL = """import math  # what stands above the first group is no constant

# machine
device: str = "cpu"  # where

# recipe
# é above
size: NAMES = "large" if device == "gpu" else "small"
big: None = size == "large"
widths: tuple = (  # inside
    64 if big else 32,
    2,
)  # levels
text: str = "é # no comment"  # a "#" in it
share: float = 1 if big else 0.5  # twice
flag: bool = not big  # on
folder: bool | str = False  # on, or where
share *= 2
# end of constants
raise SystemExit
"""


def edited(folder, **values):
    """A copy of the script in which constants were edited by hand: {name: the new source text}."""
    source = SCRIPT.read_text("utf-8")
    for name, value in values.items():
        before, kind, line = re.split(rf"(?m)(^{name}: [^=]+ = )", source)
        source = before + kind + f"{value}  # edited" + line[line.index("\n") :]
    (folder / "train_eval.py").write_text(source, "utf-8")
    return str(folder / "train_eval.py")


def refused_by_the_script(capsys, *flags):
    """The one line with which the script refuses these flags; its exit status is 2."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(train_eval, "train", lambda *args: pytest.fail("it is not refused"))
        train_eval.main([*map(str, flags)])
    line = capsys.readouterr().err
    assert (exit_.value.code, line.count("\n"), line[:22]) == (2, 1, "train_eval.py: error: "), line
    return line


def test_constants_are_read_from_the_lines_of_a_script(tmp_path):
    def read(**flags):
        return configurator.read_constants(path, {"NAMES": names}, flags).values()

    path, names = tmp_path / "script.py", ("large", "small")
    path.write_text(SMALL, "utf-8")
    groups, kinds, values, comments = map(list, zip(*read()))
    assert groups == ["machine"] + ["recipe"] * 6
    assert kinds == [str, names, tuple, str, float, bool, bool | str]
    assert values == ["cpu", "small", (32, 2), "é # no comment", 1, True, False]
    assert comments == ["where", "é above", "levels", 'a "#" in it', "twice", "on", "on, or where"]
    # a flag replaces its line, and the lines below see it
    large = ["large", (64, 2), values[3], 2, False, False]
    assert [constant.value for constant in read(device="gpu")] == ["gpu", *large]
    found = [constant.value for constant in read(size="large", share=0.1, flag=True)]
    assert found == ["cpu", *large[:3], 0.1, True, False]
    path.write_text(SMALL.replace("text: str", "text"), "utf-8")
    refused(read, "text = 'é # no comment': expected its kind too, as in epochs: int = 2")


@pytest.mark.parametrize("recipe", ["quick", "reference"])
def test_help_shows_every_comment_and_value(capsys, monkeypatch, recipe):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as exit_:
        train_eval.main(["--recipe", recipe, "--help"])
    text = " ".join(capsys.readouterr().out.split()).partition("machine: ")[2]
    assert exit_.value.code == 0
    for name, (_, _, value, comment) in configured().read({"recipe": recipe}).items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        before, found, text = text.partition(f" {comment} (default: {shown})")
        assert found and f"--{name}" in before and len(before) < 120, name


REFERENCE = dict(channels=3, image_size=32, train_size=60_000, use_augmentation=True, batch_size=16)
REFERENCE |= dict(base_channels=128, channel_mult=(1, 2, 4, 8), num_res_blocks=2, dropout=0.1)
REFERENCE |= dict(attention_resolutions=(8, 16), time_emb_dim=512, patch_size=1, num_clusters=0)
REFERENCE |= dict(adaptive_norm=False, use_conditional_generation=False, num_timesteps=1000)
REFERENCE |= dict(beta_schedule="linear", prediction="eps", loss="mse", target_references=0)
REFERENCE |= dict(epochs=50, learning_rate=1e-4, weight_decay=1e-4, adam_beta2=0.999)
REFERENCE |= dict(use_scheduler=True, warmup_steps=0, timestep_sampling="uniform", ema_decay=0.999)
REFERENCE |= dict(ema_start=5000, ema_update_rate=1, sampler="ddpm", sample_steps=1000)
NO_LABELS = "quick --no-use_conditional_generation"
FOLLOWS = {  # flags: what follows from them on any device
    "reference": REFERENCE,
    "quick": dict(prediction="x0", target_references=4096, num_clusters=0, guidance_scale=1.2),
    "quick --loss l1": dict(target_references=0, timestep_sampling="logit-normal"),
    "quick --label_dropout 0": dict(guidance_scale=1, sample_steps=6),
    "quick --variance learned": dict(timestep_sampling="uniform", target_references=4096),
    "quick --loss clipped-vlb": dict(target_references=0, timestep_sampling="uniform"),
    NO_LABELS: dict(num_clusters=256, timestep_std=0.8, guidance_scale=1.1, sample_steps=6),
    "quick --dataset kmnist": dict(sample_steps=25, skip_std=0.1, clean_weight=0.0),
    f"{NO_LABELS} --num_clusters 0": dict(sample_steps=25, timestep_std=0.6, guidance_scale=1),
}


@pytest.mark.parametrize("flags, expected", FOLLOWS.items(), ids=FOLLOWS)
def test_the_recipe_and_other_lines_decide_those_below_them(flags, expected):
    for device in ("cpu", "cuda"):
        config = vars(configured("--device", device, "--recipe", *flags.split()).config)
        assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("recipe", ["quick", "reference"])
def test_only_what_belongs_to_the_machine_looks_at_the_device(recipe):
    flags = "--recipe", recipe, "--device"
    cpu, card = (vars(configured(*flags, device).config) for device in ("cpu", "cuda"))
    free = {"device", "bf16", "use_compile", "sample_every"}
    assert {name for name in cpu if cpu[name] != card[name]} - free == set()


# what does not fit: source texts by kind; values of flags
WRONG = {int: ['"3"', "2.5", "True", "None"], float: ['"1e-3"', "True", 'float("nan")', "1e999"]}
WRONG |= {bool: ["1", '"True"', "None"], str: ["None", '""', '"a\\0b"'], tuple: ["[8]", "(8.0,)"]}
WRONG |= {bool | str: ["3"], dict: ['"Quick"', "None", "3"]}
KINDS = {name: c.kind for name, c in CONSTANTS.items()}
KINDS = {name: dict if isinstance(kind, (dict, tuple)) else kind for name, kind in KINDS.items()}
OUT_OF_RANGE = """
    sample=-1 digits=12 seed=-1 train_size=0 test_size=1 image_size=0 channels=2 num_clusters=-1
    base_channels=50 channel_mult=0 num_res_blocks=0 dropout=1.5 attention_resolutions=7
    time_emb_dim=0 num_heads=0 patch_size=3 num_timesteps=0 skip_std=-1 clean_weight=-1
    target_references=-1 min_snr_gamma=-1 label_dropout=2 epochs=0 batch_size=0 learning_rate=-1
    warmup_steps=-1 ema_decay=1.1 grad_accumulation=0 timestep_std=-1 weight_decay=inf adam_beta2=1
    grad_clip=nan ema_start=-1 ema_update_rate=0 sample_steps=21 guidance_scale=nan num_samples=1001
    preview_steps=21 eval_samples=0 bound_images=1 bound_terms=1 log_every=100001 sample_every=0
    save_every=0
"""
OUT_OF_RANGE = dict(flag.split("=") for flag in OUT_OF_RANGE.split())


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_edited_to_another_kind_is_one_line(name, capsys, monkeypatch, tmp_path):
    wrong = WRONG[KINDS[name]]
    place = [other for other in KINDS if KINDS[other] == KINDS[name]].index(name)
    value = wrong[place % len(wrong)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_eval, "__file__", edited(tmp_path, **{name: value}))
    assert f"error: {name} {eval(value)!r}: expected " in refused_by_the_script(capsys)


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_range_is_one_line_and_the_folder_stays(name, capsys, tmp_path, data_flags):
    (tmp_path / "best_model.pt").write_bytes(b"of an earlier run")
    flag = f"--{name}={OUT_OF_RANGE[name]}"
    line = refused_by_the_script(capsys, *FLAGS, *data_flags, "--save_dir", tmp_path, flag)
    assert f"{name} " in line and OUT_OF_RANGE[name] in line and "expected" in line
    assert snapshot(tmp_path) == {"best_model.pt": b"of an earlier run"}
    assert OUT_OF_RANGE.keys() == {name for name in KINDS if KINDS[name] in (int, float, tuple)}


BAD_FLAGS = {
    "--epoch 3": "--epoch: unknown; did you mean --epochs?",
    "--no_use_scheduler": "did you mean --no-use_scheduler?",
    "--zz\nzz": r"--zz\nzz: unknown; --help lists the flags",
    "--channel_mult 1,x": "argument --channel_mult: invalid integers value: '1,x'",
    "--recipe fast": "argument --recipe: invalid choice: 'fast'",
    "--device abacus": "device 'abacus'",
    "--resume --evaluate": "resume and evaluate: expected one of them",
    "--evaluate --digits 3": "digits (3,): expected --sample beside them",
    "--evaluate x --weight_decay 0": ", weight_decay: not used with --evaluate FOLDER",
    "--preview_steps 21": "preview_steps 21: expected at most num_timesteps 20",
    "--use_compile --compile_mode reduce-overhead --grad_accumulation 2": "expected 1 with comp",
    "--loss l1": "target_references 32: expected 0, or loss 'mse'",
    "--loss clipped-vlb --target_references 0 --timestep_sampling logit-normal": "'clipped-vlb'",
}


@pytest.mark.parametrize("flags, words", BAD_FLAGS.items())
def test_flags_that_do_not_fit_are_one_line(flags, words, capsys, tmp_path, data_flags):
    flags = [*data_flags, "--save_dir", tmp_path, *flags.split(" ")]
    assert words in refused_by_the_script(capsys, *FLAGS, *flags)


def test_flags_are_of_every_kind():
    flags = "--epochs 3 --learning_rate 3e-4 --channel_mult 1,2,4 --attention_resolutions none "
    flags += "--no-use_scheduler --use_augmentation --loss l1 --evaluate"
    chosen = configured(*flags.split())
    values = dict(epochs=3, learning_rate=3e-4, channel_mult=(1, 2, 4), loss="l1", evaluate=True)
    values |= dict(attention_resolutions=(), use_scheduler=False, use_augmentation=True)
    assert {name: vars(chosen.config)[name] for name in values} == values
    assert chosen.given == values.keys() and chosen.script["loss"] == "mse"
    config = configured("--evaluate", "a folder", "--save_dir", "~/x").config
    assert (config.evaluate, config.save_dir) == ("a folder", str(Path("~/x").expanduser()))


def saved(*flags, script=str(SCRIPT)):
    """A run that began with these flags, on a machine with the device that they name."""
    chosen = configured(*flags, script=script)
    script = chosen.read({"device": chosen.config.device})
    return {"config": dict(vars(chosen.config)), "script": configurator.values_of(script)}


def adopted(run, *flags, free=train_eval.FREE_TO_RESUME, script=str(SCRIPT)):
    """The config with which it goes on, on a CPU."""
    chosen = configured("--device", "cpu", "--save_dir", "here", *flags, script=script)
    return configurator.adopt(chosen, run, "here", free, train_eval.OF_THE_MACHINE)


def test_a_folder_of_images_that_is_gone_is_no_edit(tmp_path):
    (own := tmp_path / "own").mkdir()
    script = edited(tmp_path, dataset=repr(str(own)))
    saved("--sample", 1, script=script)  # an empty one is refused where its images are needed
    for k in range(2):
        Image.new("L", (9, 9)).save(own / f"{k}.png")
    has_labels.cache_clear()
    run = saved(script=script)
    assert run["config"]["use_conditional_generation"] is False
    own.rename(tmp_path / "gone")
    has_labels.cache_clear()
    assert adopted(run, script=script).use_conditional_generation is False


BEGAN = ("--device", "cpu", "--epochs", "7", "--base_channels", "64", "--dropout", "0.2")


def test_a_saved_run_keeps_its_constants_but_those_of_machine_and_command(capsys):
    own = ["--data_dir", "there", "--save_dir", "elsewhere", "--bf16", "--use_compile"]
    config = adopted(saved(*BEGAN, *own), "--resume", "--no-bf16", "--dropout", "0.2")
    assert (config.epochs, config.base_channels, config.dropout) == (7, 64, 0.2)
    assert (config.data_dir, config.save_dir, config.resume) == ("data", "here", True)
    assert (config.device, config.bf16, config.use_compile) == ("cpu", False, False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flags, edit", [("--epochs 9", "2"), ("", "9"), ("--epochs 9", "8")])
def test_what_is_free_changes_by_a_flag_or_an_edit(flags, edit, capsys, tmp_path):
    config = adopted(saved(*BEGAN), *flags.split(), script=edited(tmp_path, epochs=edit))
    assert capsys.readouterr().out == "changed since this run began: epochs 7 -> 9\n"
    assert config.epochs == 9


@pytest.mark.parametrize("flags, edits", [("--dropout 0.5", {}), ("", {"dropout": "0.5"})])
def test_what_is_not_free_is_refused_whether_flag_or_edit(flags, edits, tmp_path):
    words = "dropout 0.5: the run in here has 0.2; take the flag or the edit back"
    run, free = saved(*BEGAN), train_eval.FREE_TO_EVALUATE
    refused(lambda: adopted(run, *flags.split(), script=edited(tmp_path, **edits)), words)
    refused(lambda: adopted(run, "--epochs", "9", free=free), "epochs 9", "has 7")


def test_a_run_of_another_machine_keeps_what_its_device_brought(tmp_path, capsys):
    """The lines of the script have other values here, which no one has edited."""
    run = saved("--device", "cuda")
    for constants in run.values():
        del constants["adaptive_norm"], constants["ema_start"]  # they are newer than the run
    config = adopted(run)
    assert {name: vars(config)[name] for name in REFERENCE} == REFERENCE
    assert (config.device, config.use_compile, config.recipe) == ("cpu", False, "reference")
    assert capsys.readouterr().out == ""
    for epochs, said in (("3 if quick else 50", ""), ("2 if quick else 60", "epochs 50 -> 60")):
        config = adopted(run, script=edited(tmp_path, epochs=epochs))
        assert said in capsys.readouterr().out and config.epochs == (60 if said else 50)
    script = edited(tmp_path, dropout="0.0 if quick else 0.2")
    refused(lambda: adopted(run, script=script), "dropout 0.2: the run in here has 0.1")
    run = saved("--device", "cpu", "--recipe", "reference")  # an edit is read as the run is
    assert adopted(run, script=edited(tmp_path, epochs="5 if quick else 60")).epochs == 60


def test_a_damaged_run_is_one_line():
    run = saved(*BEGAN)
    run["config"]["epochs"] = "7"
    refused(lambda: adopted(run), "the run in here: epochs '7': expected a whole number")
    refused(lambda: adopted({"config": [], "script": {}}), "its constants are no dictionaries")
