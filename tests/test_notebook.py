"""explore.ipynb runs whole on a saved model; its stored outputs are fit to be read on the web."""

import base64
import contextlib
import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tiny import FLAGS, tiny_ddpm, tiny_unet

import train_eval

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "explore.ipynb"
SILENT = "setup"  # id of the code cell that prints and draws nothing
KINDS = {  # flags, and the number of cells that say what they need
    "labels": ("--use_conditional_generation", 0),
    "clusters": ("--no-use_conditional_generation --num_clusters 12", 0),
    "nothing": ("--no-use_conditional_generation --num_clusters 0 --guidance_scale 1", 2),
}


def read():
    """The notebook, its code cells, and the number of figures in their outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return notebook, cells, figures(cells)


def figures(cells):
    return sum(x.output_type == "display_data" for cell in cells for x in cell.outputs)


def run_here(cells, monkeypatch):
    """Execute cells in this process: what they print, and the number of figures that they show."""
    shown, scope, text = [], {}, io.StringIO()
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().canvas.draw()) or plt.close())
    # the first cell turns gradients off
    with plt.rc_context(), torch.no_grad(), contextlib.redirect_stdout(text):
        for cell in cells:
            exec(compile(cell.source, cell.id, "exec"), scope)
    return text.getvalue(), len(shown)


@pytest.fixture
def folder(tmp_path, monkeypatch, data_flags):
    """The current folder, with the first digits of MNIST in data/, where the notebook looks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "data").symlink_to(data_flags[1])
    return tmp_path


def test_the_notebook_runs_on_a_model_alone(folder, monkeypatch):
    network = tiny_unet(num_classes=10, image_size=16, patch_size=8)
    ddpm = tiny_ddpm(network=network, image_size=16, num_timesteps=200, sample_steps=4)
    config = {"dataset": "mnist", "train_size": 100, "test_size": 80, "num_clusters": 0}
    config["use_conditional_generation"] = True
    ddpm.save("checkpoints/best_model.pt", config=config, step=7, test_loss=0.5)
    _, cells, expected = read()
    text, drawn = run_here(cells, monkeypatch)
    parameters = sum(p.numel() for p in ddpm.network.parameters())
    assert f"{parameters:,} parameters" in text and "step 7, loss of some test images 0.5" in text
    assert text.count("This cell needs last.pt") == text.count("This cell needs") == 1
    assert drawn == expected - 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_notebook_runs_on_what_a_run_leaves(kind, folder, data_flags, monkeypatch):
    (flags, missing), (notebook, cells, expected) = KINDS[kind], read()
    flags = [*FLAGS, *"--epochs 1 --num_timesteps 200 --sample_steps 4".split(), *flags.split()]
    assert train_eval.main([*flags, *data_flags]) == 0
    if kind == "labels":
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        here = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=here).execute()
        outputs = [x for cell in cells for x in cell.outputs if x.output_type == "stream"]
        assert {x.name for x in outputs} == {"stdout"}, outputs
        text, drawn = "".join(x.text for x in outputs), figures(cells)
    else:  # without a kernel, whose start takes longer than the cells
        text, drawn = run_here(cells, monkeypatch)
    assert text.count("This cell needs") == missing and drawn == expected - missing, text


def test_the_stored_outputs_are_whole_and_fit_the_web():
    notebook, cells, _ = read()
    assert NOTEBOOK.stat().st_size <= 1.5e6
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.id for cell in cells if not cell.outputs] == [SILENT]
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    texts = [cell.source for cell in notebook.cells]
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr", output
        texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
        if "data" in output:  # web pages show PNGs
            assert base64.b64decode(output.data["image/png"]).startswith(b"\x89PNG")
    paths = [re.findall(r"(?<![\w.:/~-])/\w[\w.-]*/|[A-Z]:\\", text) for text in texts]
    assert not any(paths), f"paths of a machine: {paths}"
