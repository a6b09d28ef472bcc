"""Saving and loading: whole files, the folder of a run and its lock, and what a resumed run needs."""

import errno
import math
import os
import pickle
import socket
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from support.machine import in_one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN_FILES = ("last.pt", "best_model.pt", "loss_curve.png", "samples", "evaluation*.json")  # what a new run moves aside


# Files


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values with `torch.save`: the old file stays, or the new one is whole.

    Raises:
        ValueError: a value that `load_checkpoint` would refuse; nothing is written.
        OSError: the file cannot be written, for example on a full disk.
    """
    path = os.fspath(path)
    _check_plain(state, "")
    partial = path + ".partial"
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except RuntimeError as error:  # torch's own for a write that failed
        raise OSError(f"{path}: cannot be written ({str(error).partition(chr(10))[0]})") from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _check_plain(value, name):
    """ValueError if a checkpoint holds something that cannot be loaded without running code."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"{name}: key")
            _check_plain(item, f"{name}.{key}" if name else f"{key}")
    elif type(value) in (list, tuple):
        for item in value:
            _check_plain(item, name)
    elif (type(value) not in (torch.Tensor, nn.Parameter, str, int, float, bool, type(None))
          or isinstance(value, torch.Tensor) and vars(value) or type(value) is int and value.bit_length() > 63):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(f"{name} {value!r} of type {kind}: expected tensors and plain Python values, since a "
                         "checkpoint holds no pickled objects")


def load_checkpoint(path, keys):
    """The dict at `path`, on the CPU. No code from the file is run.

    Raises:
        ValueError: the file is missing, cannot be read, is damaged, or is something else: one line for each cause.
    """
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error below says it in one line
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; train_eval.py writes one") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; expected a file, for example {Path(path, 'best_model.pt')}") from None
    except Exception as error:  # foreign files fail in too many ways to list
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch raises EINVAL for a file cut short
            raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
        if _is_whole_zip(path):
            reason = "not a readable checkpoint but another kind of file"
            if isinstance(error, pickle.UnpicklingError):
                reason = "holds Python objects, which could run code; expected tensors and plain values alone"
        elif start[:1] == b"\x80":  # the first byte of a pickle
            reason = "a pickle, which could run code; expected a checkpoint of train_eval.py or DDPM.save"
        elif start == b"PK":
            reason = "not a readable checkpoint: the file is damaged or cut short; another copy of it may be whole"
        else:
            reason = "not a readable checkpoint but another kind of file"
        raise ValueError(f"{path}: {reason} ({type(error).__name__})") from None
    if not isinstance(saved, dict) or not set(keys) <= set(saved):
        raise ValueError(f"{path}: a checkpoint of another kind; expected one with {', '.join(keys)}")
    return saved


def _is_whole_zip(path):
    """Whether a file is a zip archive, as `torch.save` writes it, without a damaged part."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged archives fail in many ways
        return False


def unused(path):
    """`path` if nothing is there, or else the first free one of NAME-2, NAME-3, ..."""
    path, number = Path(path), 1
    while (free := path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free


def write_text(path, text):
    """Write a text file, whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def make_folder(path):
    """Make a folder, with those above it, unless it is there. Returns its Path; ValueError if it cannot be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable", os.fspath(path))
    except OSError as error:
        raise ValueError(f"save_dir {os.fspath(path)!r}: {error.strerror or error}; expected a folder that can be "
                         "written") from None
    return Path(path)


# Networks


def unwrapped(network):
    """The module inside the wrappers of `torch.compile` and (Distributed)DataParallel."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(network, parallel) or "_orig_mod" in network._modules:
        network = network.module if isinstance(network, parallel) else network._modules["_orig_mod"]
    return network


def plain_state_dict(network):
    """The state dict of a network without the names that `torch.compile` inserts for compiled layers."""
    return {name.replace("_orig_mod.", ""): value for name, value in network.state_dict().items()}


def load_state_dict(network, weights, path):
    """Load weights into a network, wrapped or not; ValueError, naming the file, if they do not fit."""
    network = unwrapped(network)
    own_names = {name.replace("_orig_mod.", ""): name for name in network.state_dict()}
    try:
        network.load_state_dict({own_names.get(name, name): value for name, value in weights.items()})
    except RuntimeError:
        raise ValueError(f"{path}: its weights do not fit this network; give load() the one saved") from None


# The folder of a run


class RunFolder:
    """The folder of a run, locked for this process until `close` or until the process ends, however it ends.

    A new run moves what an earlier one left to a subfolder run_DATE. The classifier and TensorBoard's logs stay.

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
                for partial in self.path.glob("*.pt.partial"):  # of a run that was killed while it wrote
                    if partial.is_file():
                        partial.unlink()
                if new:
                    make_folder(self.path / "tensorboard_logs")  # whatever can fail, fails before the move
                if new or any(self.path.glob("run_*.moving")):
                    self._move_earlier_run()
            if new:
                (self.path / "samples").mkdir(exist_ok=True)
        except ValueError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ValueError(f"save_dir {str(save_dir)!r}: {error.strerror or error} ({error.filename}); expected a "
                             "folder that can be written") from None

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
                raise ValueError(f"save_dir {str(self.path)!r}: in use by {holder}; wait until that run ends, or name "
                                 "another --save_dir")
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
            aside = unused(self.path / time.strftime("run_%Y-%m-%d_%H-%M-%S", time.localtime(newest)))
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


def save_last(config, state, progress):
    """Write last.pt: everything that is needed to resume exactly.

    `state` maps names to parts with a `state_dict`: network (the weights in training), ema, optimizer, timesteps,
    warmup and scheduler. `progress` holds plain values: step, best_loss, the curves, the name of the log.
    """
    rng = {"cpu": torch.get_rng_state()}
    if torch.device(config.device).type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(config.device)
    save_checkpoint(Path(config.save_dir) / "last.pt", {
        "config": vars(config), **progress, "rng": rng, **{name: part.state_dict() for name, part in state.items()}})


def load_last(save_dir):
    """What `save_last` wrote; ValueError, in one line, if it cannot be loaded."""
    return load_checkpoint(Path(save_dir) / "last.pt", (
        "config", "step", "best_loss", "train_curve", "test_curve", "warning", "log", "rng", "network", "ema",
        "optimizer", "warmup"))


def restore(config, state, progress, saved, total_steps):
    """Put what `save_last` wrote back in place. Learning rate and length of the run come from `config`.

    Raises:
        ValueError: it is of another version of the code, or damaged.
    """
    try:
        _restore(config, state, progress, saved, total_steps)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{Path(config.save_dir) / 'last.pt'}: written by another version of this code "
                         f"({in_one_line(error)})") from None


def _restore(config, state, progress, saved, total_steps):
    for name, part in state.items():
        if name in saved:  # a last.pt of an older version lacks the state of uniform timesteps, which is empty
            part.load_state_dict(saved[name])
    match_layouts(state["optimizer"])
    progress.update({name: saved[name] for name in progress})
    torch.set_rng_state(saved["rng"]["cpu"])
    if "cuda" in saved["rng"] and torch.device(config.device).type == "cuda":
        torch.cuda.set_rng_state(saved["rng"]["cuda"], config.device)
    if any(saved["config"][name] != getattr(config, name) for name in ("epochs", "learning_rate")):
        cosine = (1 + math.cos(math.pi * min(progress["step"] / total_steps, 1))) / 2 if config.use_scheduler else 1
        warmup = state["warmup"]
        rise = warmup.start_factor + (1 - warmup.start_factor) * min(progress["step"] / warmup.total_iters, 1)
        for group in state["optimizer"].param_groups:
            group["initial_lr"], group["lr"] = config.learning_rate, config.learning_rate * cosine * rise
        if config.use_scheduler:
            state["scheduler"].T_max, state["scheduler"].base_lrs = total_steps, [config.learning_rate]


def match_layouts(optimizer):
    """Give every moment of an optimiser the memory layout of its parameter.

    The saved run may have had another layout (channels-last). Fused AdamW on a CPU does not look at strides: it would
    combine the wrong elements.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
