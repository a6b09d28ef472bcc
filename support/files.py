"""Whole files, since they get their names last; a run's folder and its lock; words for messages."""

import errno
import os
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN_FILES = "last*.pt", "best_model.pt", "loss_curve.png", "samples", "evaluation*.json"
PATIENCE = 5  # seconds in which a rename that is refused is tried again


@contextmanager
def whole_file(path, previous=None):
    """The name to write a file under: `path` is always the old file or the whole new one.

    At the end of the block the new file is flushed to the disk and gets its name; after an error it
    is removed. `previous` is a name under which the old file is kept.
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
    """Have the system write a file, or the names in a folder, to the disk, if it can be asked."""
    folder = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        refused = error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # some network drives
        if not folder and not refused:  # not every system can open a folder
            raise


def _keep(path, previous):
    """Give a file the name `previous`. It has both names until a new file takes the first."""
    spare = f"{os.fspath(previous)}.partial"
    try:
        with suppress(FileNotFoundError):
            os.remove(spare)  # of a save that was killed
        os.link(path, spare)
    except OSError:  # a file system without hard links: for a moment there is `previous` alone
        _rename(path, previous)
    else:
        _rename(spare, previous)
        with suppress(FileNotFoundError):  # after a kill both may be one file: nothing is renamed
            os.remove(spare)


def _rename(source, target):
    """`os.replace`, tried again for some seconds: a virus scanner may hold a new file."""
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
    """Make a folder, with those above it, unless it is there. Returns its Path.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable", os.fspath(path))
    except OSError as error:
        raise ValueError(
            f"save_dir {os.fspath(path)!r}: {error.strerror or error}; expected a folder that can "
            "be written"
        ) from None
    return Path(path)


# The folder of a run


class RunFolder:
    """The folder of a run, locked for this process until `close` or until the process ends.

    A new run moves what an earlier one left to a subfolder run_DATE. TensorBoard's logs stay.

    Raises:
        ValueError: the folder cannot be written, or another run uses it.
    """

    def __init__(self, save_dir, new):
        self.path, self.lock = Path(save_dir), None
        try:
            if new:
                make_folder(self.path)
            if self.path.is_dir():
                self._acquire()
                for partial in (*self.path.glob("*.partial"), *self.path.glob("samples/*.partial")):
                    if partial.is_file():  # of a run that was killed while it wrote
                        partial.unlink()
            if new:
                make_folder(self.path / "tensorboard_logs")  # what can fail, before the move
                self._move_earlier_run()
                (self.path / "samples").mkdir(exist_ok=True)
        except ValueError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ValueError(
                f"save_dir {str(save_dir)!r}: {error.strerror or error} ({error.filename}); "
                "expected a folder that can be written"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Release the lock."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def _acquire(self):
        """Lock the folder by its file .lock, which stays there and says who holds it."""
        file = open(self.path / ".lock", "a+", encoding="utf-8")
        if not _try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"save_dir {str(self.path)!r}: in use by {holder}; wait until that run ends, "
                "or name another --save_dir"
            )
        self.lock = file
        with suppress(OSError):  # of another person, who has done this
            os.chmod(file.name, 0o666)  # who may write the folder may use it
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        file.flush()

    def _move_earlier_run(self):
        """Move the files of an earlier run to a folder of their own."""
        earlier = [path for pattern in RUN_FILES for path in sorted(self.path.glob(pattern))]
        earlier = [path for path in earlier if path.name != "samples" or any(path.iterdir())]
        if earlier:
            newest = max(path.stat().st_mtime for path in earlier)
            name = time.strftime("run_%Y-%m-%d_%H-%M-%S", time.localtime(newest))
            aside = unused(self.path / name)
            aside.mkdir()
            for path in earlier:
                path.rename(aside / path.name)
            print(f"what an earlier run left in {self.path} is now in {aside}")


def _try_lock(file):
    """Lock an open file without waiting; False if another process holds it.

    The lock ends with the process, however that ends.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            file.seek(2**20)  # a byte beyond the text, so that others can read who holds it
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except BlockingIOError:
        return False
    except OSError:
        return fcntl is not None  # a file system without locks: go on; on Windows: held
    return True


# Words for messages


def shown(value):
    """A value for a message: its `repr` in one line and not too long."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return f"of {value.dtype} and shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def one_line(error):
    """The kind of an exception and the first line of its message."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {reason}"


def printable(value):
    """A path or another value as one line, with line breaks and bytes that are no text escaped."""
    return str(value) if str(value).isprintable() else repr(str(value))
