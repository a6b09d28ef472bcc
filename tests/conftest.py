"""What the tests share: the first digits of MNIST, the script's constants, the order of files."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
import struct

import pytest

import train_eval
from support import configurator
from support.datasets import FILES, read_dataset

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
LONGEST = "processes never_lose_a_run train_eval readme machine notebook metrics".split()


def pytest_collection_modifyitems(items):
    """The longest files first, so that none is left to one process at the end."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def configured(*flags, script=train_eval.__file__):
    """What the script makes of flags: a `configurator.Chosen`."""
    limits, flags = (train_eval.LEAST, train_eval.MOST), [*map(str, flags)]
    return configurator.configure(script, vars(train_eval), *limits, flags)


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory):
    """Flags for the first 600 and 300 images of MNIST; those of assets/ take seconds to load."""
    folder = tmp_path_factory.mktemp("data")
    (raw := folder / "MNIST" / "raw").mkdir(parents=True)
    for k, split in enumerate(read_dataset("mnist", folder)):
        for name, magic, x in zip(FILES[2 * k :], (2051, 2049), split):
            x = x[: 600 // (k + 1)].squeeze().byte().numpy()
            (raw / name).write_bytes(struct.pack(f">{1 + x.ndim}i", magic, *x.shape) + x.tobytes())
    return ["--data_dir", str(folder)]
