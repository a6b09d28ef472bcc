"""Saving and loading: checkpoints, the folder of a run and its lock, and what a resumed run needs."""

import math
import os
import pickle
import socket
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from support.checks import check_path
from support.files import flush, make_folder, unused, whole_file
from support.machine import barrier, in_one_line, on_main, world

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN_FILES = (
    "last.pt",
    "last.previous.pt",
    "best_model.pt",
    "loss_curve.png",
    "samples",
    "evaluation*.json",
)


# Files


def save_checkpoint(path, state, previous=None):
    """Write a dict of tensors and plain values with `torch.save`, as a `whole_file`.

    Raises:
        ValueError: a value that `load_checkpoint` would refuse; nothing is written.
        OSError: the file cannot be written, for example on a full disk; it says how many bytes are missing.
    """
    path = os.fspath(path)
    _check_plain(state, "")
    missing = ""
    try:
        with whole_file(path, previous) as partial:
            try:
                torch.save(state, partial)
                flush(partial)
            except (OSError, RuntimeError):
                if os.path.exists(partial):
                    size = _Size()
                    torch.save(state, size)
                    missing = f"; about {size.bytes - os.path.getsize(partial):,} of {size.bytes:,} bytes are missing"
                raise
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's own for a write that failed
        reason = (
            getattr(error, "strerror", None) or "the disk is full, or a quota is"
            if missing
            else error
        )
        raise OSError(
            f"{path}: cannot be written ({str(reason).partition(chr(10))[0]}{missing})"
        ) from error


class _Size:
    """A file that keeps nothing and counts the bytes."""

    bytes = 0

    def write(self, data):
        self.bytes += len(data)
        return len(data)

    def flush(self):
        pass


def _check_plain(value, name):
    """ValueError if a checkpoint holds something that cannot be loaded without running code."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"{name}: key")
            _check_plain(item, f"{name}.{key}" if name else f"{key}")
    elif type(value) in (list, tuple):
        for item in value:
            _check_plain(item, name)
    elif (
        type(value) not in (torch.Tensor, nn.Parameter, str, int, float, bool, type(None))
        or isinstance(value, torch.Tensor)
        and vars(value)
        or type(value) is int
        and value.bit_length() > 63
    ):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(
            f"{name} {value!r} of type {kind}: expected tensors and plain Python values, since a "
            "checkpoint holds no pickled objects"
        )


def load_checkpoint(path, keys):
    """The dict at `path`, on the CPU. No code from the file is run, and its checksums are compared.

    Raises:
        ValueError: the file is missing, cannot be read, is damaged, or is something else: one line for each cause.
    """
    check_path("path", path)
    start, whole, path = b"", False, Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        whole = _is_whole_zip(path)  # torch compares no checksums
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error below says it in one line
            saved = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; train_eval.py writes one") from None
    except IsADirectoryError:
        raise ValueError(
            f"{path}: a folder; expected a file, for example {Path(path, 'best_model.pt')}"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds Python objects, which could run code; expected tensors and plain values "
            "alone"
        ) from None
    except Exception as error:  # foreign archives fail in too many ways to list
        raise ValueError(
            f"{path}: not a readable checkpoint but another kind of file ({in_one_line(error)})"
        ) from None
    if not whole:
        raise ValueError(
            f"{path}: "
            + (
                "a pickle, which could run code; expected a checkpoint of train_eval.py or DDPM.save"
                if start[:1] == b"\x80"
                # the first byte of a pickle
                else "not a readable checkpoint: the file is damaged or cut short; another copy of it may be whole"
                if start == b"PK"
                else "not a readable checkpoint but another kind of file"
            )
        )
    if not isinstance(saved, dict) or not set(keys) <= set(saved):
        raise ValueError(
            f"{path}: a checkpoint of another kind; expected one with {', '.join(keys)}"
        )
    return saved


def _is_whole_zip(path):
    """Whether a file is a zip archive, as `torch.save` writes it, without a damaged part."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except OSError:
        raise
    except Exception:  # damaged archives fail in many ways
        return False


# The folder of a run


class RunFolder:
    """The folder of a run, locked for this process until `close` or until the process ends, however it ends.

    A new run moves what an earlier one left to a subfolder run_DATE. TensorBoard's logs stay.

    Raises:
        ValueError: the folder cannot be written, or another run uses it.
    """

    def __init__(self, save_dir, new):
        self.path, self.lock = Path(save_dir), None
        if world()[0] == 0:
            self._open(save_dir, new)
        barrier()

    def _open(self, save_dir, new):
        try:
            if new:
                make_folder(self.path)
            if self.path.is_dir():
                self._acquire()
                for partial in (*self.path.glob("*.partial"), *self.path.glob("samples/*.partial")):
                    if partial.is_file():  # of a run that was killed while it wrote
                        partial.unlink()
                if new:
                    make_folder(
                        self.path / "tensorboard_logs"
                    )  # whatever can fail, fails before the move
                if new or any(self.path.glob("run_*.moving")):
                    self._move_earlier_run()
                if new:
                    (self.path / "samples").mkdir(exist_ok=True)
        except ValueError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ValueError(
                f"save_dir {str(save_dir)!r}: {error.strerror or error} ({error.filename}); expected a "
                "folder that can be written"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Release the lock."""
        if self.lock is not None:
            try:
                os.remove(self.lock.name)
            except OSError:
                pass  # Windows removes no open file; what stays locks nothing
            self.lock.close()
            self.lock = None

    def _acquire(self):
        """Lock the folder by its file .lock, which says who holds it."""
        while self.lock is None:
            file = open(self.path / ".lock", "a+", encoding="utf-8")
            if not _try_lock(file):
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise ValueError(
                    f"save_dir {str(self.path)!r}: in use by {holder}; wait until that run ends, or name "
                    "another --save_dir"
                )
            try:
                removed = not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
            except FileNotFoundError:
                removed = True
            if removed:  # by a run that ended between our open and our lock
                file.close()
            else:
                self.lock = file
        self.lock.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        self.lock.flush()

    def _move_earlier_run(self):
        """Move the files of an earlier run aside. If this is killed, the next call finishes it."""
        earlier = [path for pattern in RUN_FILES for path in sorted(self.path.glob(pattern))]
        earlier = [path for path in earlier if path.name != "samples" or any(path.iterdir())]
        moving = next(self.path.glob("run_*.moving"), None)
        if moving is None:
            if not earlier:
                return
            newest = max(path.stat().st_mtime for path in earlier)
            aside = unused(
                self.path / time.strftime("run_%Y-%m-%d_%H-%M-%S", time.localtime(newest))
            )
            moving = aside.with_name(aside.name + ".moving")
            moving.mkdir()
        for path in earlier:
            path.rename(unused(moving / path.name))
        aside = unused(moving.with_suffix(""))
        moving.rename(aside)
        print(f"what an earlier run left in {self.path} is now in {aside}")


def _try_lock(file):
    """Lock an open file without waiting; False if another process holds it. The lock ends with the process."""
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


# Resuming


@on_main
def save_last(config, state, progress):
    """Write last.pt: everything that is needed to resume exactly.

    `state` maps names to parts with a `state_dict`: network (the weights in training), ema, optimizer, timesteps,
    warmup and scheduler. `progress` holds plain values: step, best_loss, the curves, the name of the log. The last.pt
    of before becomes last.previous.pt.
    """
    rng = {"cpu": torch.get_rng_state()}
    if torch.device(config.device).type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(config.device)
    save_checkpoint(
        Path(config.save_dir) / "last.pt",
        {
            "config": vars(config),
            **progress,
            "rng": rng,
            **{name: part.state_dict() for name, part in state.items()},
        },
        Path(config.save_dir) / "last.previous.pt",
    )


def load_last(save_dir):
    """What `save_last` wrote; if that is damaged, what it wrote before, and a line says so.

    Raises:
        ValueError: neither file can be loaded.
    """
    path, previous = Path(save_dir) / "last.pt", Path(save_dir) / "last.previous.pt"
    try:
        return _load_progress(path)
    except ValueError as error:
        if not previous.exists():
            raise
        print(error, file=sys.stderr)
        saved = _load_progress(previous)
        print(f"going on from {previous}, saved at step {saved['step']:,}", file=sys.stderr)
        return saved


def _load_progress(path):
    saved = load_checkpoint(
        path,
        (
            "config",
            "step",
            "best_loss",
            "train_curve",
            "test_curve",
            "warning",
            "log",
            "rng",
            "network",
            "ema",
            "optimizer",
            "warmup",
        ),
    )
    step = saved["step"]
    curves = [value for name, value in saved.items() if str(name).endswith("_curve")]
    points = [point for curve in curves for point in (curve if isinstance(curve, list) else [None])]
    if not (
        type(step) is int
        and step >= 0
        and type(saved["best_loss"]) is float
        and isinstance(saved["log"], str)
        and isinstance(saved["warning"], (str, type(None)))
        and all(type(point) is list and list(map(type, point)) == [int, float] for point in points)
    ):
        raise ValueError(
            f"{path}: its step, best_loss, curves, warning or log is not what a run writes"
        )
    return saved


def restore(config, state, progress, saved, total_steps):
    """Put what `save_last` wrote back in place. Learning rate and length of the run come from `config`.

    Raises:
        ValueError: it is of another version of the code, or damaged.
    """
    try:
        _restore(config, state, progress, saved, total_steps)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(config.save_dir) / 'last.pt'}: written by another version of this code "
            f"({in_one_line(error)})"
        ) from None


def _restore(config, state, progress, saved, total_steps):
    for name, part in state.items():
        if (
            name in saved
        ):  # a last.pt of an older version lacks the state of uniform timesteps, which is empty
            part.load_state_dict(saved[name])
    match_layouts(state["optimizer"])
    config.adam_beta2 = state["optimizer"].param_groups[0]["betas"][
        1
    ]  # an older run has no such constant
    progress.update({name: saved[name] for name in progress if name in saved})
    if "fixed_curve" not in saved:  # an older one, whose losses were of all test images
        progress["best_loss"] = math.inf
    torch.set_rng_state(saved["rng"]["cpu"])
    if "cuda" in saved["rng"] and torch.device(config.device).type == "cuda":
        torch.cuda.set_rng_state(saved["rng"]["cuda"], config.device)
    if any(saved["config"][name] != getattr(config, name) for name in ("epochs", "learning_rate")):
        cosine = (
            (1 + math.cos(math.pi * min(progress["step"] / total_steps, 1))) / 2
            if config.use_scheduler
            else 1
        )
        warmup = state["warmup"]
        rise = warmup.start_factor + (1 - warmup.start_factor) * min(
            progress["step"] / warmup.total_iters, 1
        )
        for group in state["optimizer"].param_groups:
            group["initial_lr"], group["lr"] = (
                config.learning_rate,
                config.learning_rate * cosine * rise,
            )
        if config.use_scheduler:
            state["scheduler"].T_max, state["scheduler"].base_lrs = (
                total_steps,
                [config.learning_rate],
            )


def match_layouts(optimizer):
    """Give every moment of an optimiser the memory layout of its parameter.

    The saved run may have had another layout (channels-last). Fused AdamW on a CPU does not look at strides: it would
    combine the wrong elements.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
