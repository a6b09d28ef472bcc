"""explore.ipynb: it runs whole on what a run leaves, and its stored outputs are whole and fit to be read on the web."""

import base64
import contextlib
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient

import train_eval
from diffusion import DDPM

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "explore.ipynb"
SILENT = ("setup",)  # ids of code cells that print and draw nothing
TINY = (
    "--device cpu --no-bf16 --train_size 100 --test_size 80 --base_channels 32 --channel_mult 1 --num_res_blocks 1 "
    "--time_emb_dim 32 --patch_size 4 --attention_resolutions none --epochs 1 --preview_steps 2 --num_samples 10 "
    "--target_references 0"
).split()
KINDS = {
    "labels": ["--use_conditional_generation"],
    "clusters": "--no-use_conditional_generation --num_clusters 12".split(),
    "nothing": "--no-use_conditional_generation --num_clusters 0 --guidance_scale 1 --sample_steps 4".split(),
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """What all cells print, and fails if they print to stderr."""
    streams = [
        output
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream"
    ]
    assert {stream.name for stream in streams} <= {"stdout"}, streams
    return "".join(stream.text for stream in streams)


def faults(notebook, size):
    """What is wrong with the stored outputs of a notebook of `size` bytes, a list of lines."""
    found = [] if size <= 1.5e6 else [f"{size:,} bytes, expected at most 1.5 MB"]
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"executed in the order {counts}")
    for cell in cells:
        kinds = [output.output_type for output in cell.outputs]
        if bool(kinds) == (cell.id in SILENT):
            found.append(f"{cell.id}: outputs {kinds}")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"{cell.id}: {output}")
            if "data" in output and "image/png" not in output.data:
                found.append(f"{cell.id}: {list(output.data)} without a PNG, which web pages show")
            elif "data" in output and not base64.b64decode(output.data["image/png"]).startswith(
                b"\x89PNG"
            ):
                found.append(f"{cell.id}: a picture that is not a PNG")
    texts = [cell.source for cell in notebook.cells] + [
        text
        for cell in cells
        for output in cell.outputs
        for text in (output.get("text", ""), output.get("data", {}).get("text/plain", ""))
    ]
    found += [
        f"a path of a machine: {path}"
        for text in texts
        for path in re.findall(r"(?<![\w.:/~-])/\w[\w.-]*/|[A-Z]:\\", text)
    ]
    if (
        set(notebook.metadata) - {"kernelspec", "language_info"}
        or notebook.metadata.kernelspec.name != "python3"
    ):
        found.append(f"metadata {notebook.metadata}")
    return found


def figures(notebook):
    """The number of figures that the stored outputs hold."""
    return sum(
        output.output_type == "display_data"
        for cell in code_cells(notebook)
        for output in cell.outputs
    )


def run_here(notebook, folder, monkeypatch):
    """Execute the code cells in this process: what they print, and the number of figures that they show."""
    shown = []

    def show():
        plt.gcf().canvas.draw()
        shown.append(plt.close("all"))

    monkeypatch.chdir(folder)
    monkeypatch.setattr(plt, "show", show)
    scope, text = {}, io.StringIO()
    with (
        plt.rc_context(),
        torch.no_grad(),
        contextlib.redirect_stdout(text),
    ):  # the first cell turns gradients off
        for cell in code_cells(notebook):
            exec(compile(cell.source, cell.id, "exec"), scope)
    return text.getvalue(), len(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_the_notebook_runs_on_what_a_run_leaves(kind, tmp_path, data_flags, monkeypatch):
    save_dir = tmp_path / "checkpoints"
    assert train_eval.main([*TINY, *KINDS[kind], *data_flags, "--save_dir", str(save_dir)]) == 0
    if kind == "clusters":
        (save_dir / "last.pt").unlink()  # a folder with the model alone
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    expected = figures(notebook)
    if kind == "labels":
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
        ).execute()
        text, drawn = printed(notebook), figures(notebook)
    else:  # without a kernel, whose start takes longer than the cells
        text, drawn = run_here(notebook, tmp_path, monkeypatch)
    parameters = sum(
        parameter.numel()
        for parameter in DDPM.load(save_dir / "best_model.pt").network.parameters()
    )
    assert f"{parameters:,} parameters" in text
    missing = {"labels": 0, "clusters": 1, "nothing": 2}[kind]  # cells that say what they need
    assert text.count("This cell needs") == missing, text
    assert drawn == expected - missing


def test_the_stored_outputs_are_whole_and_fit_the_web():
    assert faults(nbformat.read(NOTEBOOK, as_version=4), NOTEBOOK.stat().st_size) == []


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda cells: cells[-1].outputs.clear(), "outputs []"),
        (
            lambda cells: cells[1].outputs.append(
                nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
            ),
            "'E'",
        ),
        (
            lambda cells: cells[1].outputs.append(
                nbformat.v4.new_output("stream", name="stderr", text="0%|")
            ),
            "stderr",
        ),
        (
            lambda cells: cells[1].outputs.append(
                nbformat.v4.new_output("stream", text="in /home/ann/data")
            ),
            "/home/",
        ),
        (lambda cells: cells[2].update(execution_count=9), "order"),
        (lambda cells: cells[2].outputs[0].data.pop("image/png"), "without a PNG"),
        (lambda cells: cells[2].outputs[0].data.update({"image/png": "A" * 1_500_000}), "bytes"),
    ],
)
def test_a_fault_of_the_stored_outputs_is_found(broken, message):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    broken(code_cells(notebook))
    found = faults(notebook, len(json.dumps(notebook)))
    assert any(message in line for line in found), found
