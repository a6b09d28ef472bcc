"""What a person watches: commands that can be pasted, the table of measures, statistics of the steps."""

import shlex

import pytest

from support.monitor import shell_command, shown_at_both_ends, table, tensorboard_command


@pytest.mark.parametrize("save_dir", ["runs/my first run", "a'b", 'c"d', "$(rm x)", "a;b", "ünï", "-x", "tab\there"])
def test_printed_commands_can_be_pasted(save_dir):
    assert shlex.split(shell_command("--resume", save_dir=save_dir)) == [
        "python", "train_eval.py", "--resume", f"--save_dir={save_dir}"]
    words = shlex.split(tensorboard_command(save_dir))
    assert words == ["tensorboard", f"--logdir={save_dir}/tensorboard_logs", "--samples_per_plugin", "images=1000"]


def test_the_default_folder_is_left_out_of_a_command():
    assert shell_command("--resume", save_dir="checkpoints") == "python train_eval.py --resume"


def test_the_table_shows_what_was_measured_beside_real_images_and_names_what_was_not():
    result = {"samples": 1234, "precision": 0.5, "precision_real": 0.75, "confidence": 0.9, "digits": [0.25, 0.75],
              "digits_real": [0.5, 0.5], "copies": 0.125}
    text = table(result, "mnist", 0.9955)
    lines = {" ".join(line.split()[:-2]): line.split()[-2:] for line in text.splitlines()}
    assert lines["precision"] == ["0.5000", "0.7500"]
    assert lines["share of the rarest digit"] == ["0.2500", "0.5000"]
    assert "1,234 samples" in text and "99.55% test accuracy" in text and "0.1250" in text
    assert text.splitlines()[-1] == "left out, since there are too few images: Fréchet distance to the test set, recall"
    assert "left out" not in table(result | {"frechet": 1.0, "recall": 0.5}, "mnist", 1.0)


def test_a_warning_is_seen_before_and_after_even_if_the_run_fails(capsys):
    with pytest.raises(KeyboardInterrupt), shown_at_both_ends("NOT MNIST"):
        assert capsys.readouterr().err == "NOT MNIST\n"
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "NOT MNIST\n"
    with shown_at_both_ends(None):
        pass
    assert capsys.readouterr().err == ""
