"""Files that are whole: what is written gets its name when it is on the disk, not before."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 5  # seconds in which a rename that is refused is tried again


@contextmanager
def whole_file(path, previous=None):
    """The name to write a file under, so that `path` is at every moment the old file or the whole new one.

    At the end of the block the new file is flushed to the disk and gets its name; after an error it is removed.
    `previous` is a name under which the old file is kept.
    """
    partial = f"{os.fspath(path)}.partial"
    try:
        yield partial
        flush(partial)
        if previous is not None and os.path.exists(path):
            _keep(path, previous)
        _rename(partial, path)
        flush(os.path.dirname(partial) or ".")
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def flush(path):
    """Have the system write a file, or the names in a folder, to the disk. Not every system can open a folder."""
    folder = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not folder:
            raise


def _keep(path, previous):
    """Give a file the name `previous`. It has both names until a new file takes the first."""
    spare = f"{os.fspath(previous)}.partial"
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links: for a moment there is `previous` alone
        _rename(path, previous)
    else:
        _rename(spare, previous)


def _rename(source, target):
    """`os.replace`, tried again for some seconds: on Windows a virus scanner may hold a new file for a moment."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def unused(path):
    """`path` if nothing is there, or else the first free one of NAME-2, NAME-3, ..."""
    path, number = Path(path), 1
    while (
        free := path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
    ).exists():
        number += 1
    return free


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with whole_file(path) as partial:
        Path(partial).write_text(text, encoding="utf-8")


def make_folder(path):
    """Make a folder, with those above it, unless it is there. Returns its Path; ValueError if it cannot be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable", os.fspath(path))
    except OSError as error:
        raise ValueError(
            f"save_dir {os.fspath(path)!r}: {error.strerror or error}; expected a folder that can be "
            "written"
        ) from None
    return Path(path)
