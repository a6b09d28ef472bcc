"""Where the tests find MNIST: the folder DDPM_DATA_DIR, or data/, as train_eval.py leaves it."""

import os

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # several processes share the cores, so each computes with one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings
from pathlib import Path

import pytest

import train_eval
from dataprocess import load_data
from support import configurator

LONGEST = ("train_eval", "processes", "never_lose_a_run", "metrics", "diffusion", "machine")
DATA_DIR = os.environ.get("DDPM_DATA_DIR") or str(Path(__file__).parent.parent / "data")


def pytest_collection_modifyitems(items):
    """The longest files first, so that none is left to one process at the end."""
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(
        key=lambda item: names.index(item.path.name) if item.path.name in names else len(names)
    )


def read_constants(flags):
    """The script's constants as {name: (group, value, comment)}, some of them replaced by flags."""
    return configurator.read_constants(train_eval.__file__, vars(train_eval), flags)


@pytest.fixture(scope="session")
def data_flags():
    """Flags that give the script real MNIST, downloaded if need be; the drawn glyphs where there is none to be had."""
    try:
        load_data("mnist", DATA_DIR, train_size=1, test_size=1)
        return ["--dataset", "mnist", "--data_dir", str(Path(DATA_DIR).resolve())]
    except ValueError as error:
        warnings.warn(f"the script is tested on glyphs instead of MNIST: {error}", stacklevel=1)
        return ["--dataset", "glyphs"]
