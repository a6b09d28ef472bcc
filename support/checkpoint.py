"""Saving and loading: checkpoints, the stored model, what a resumed run needs."""

import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from support import checks
from support.files import one_line, shown, whole_file
from support.machine import unwrapped

STORED = Path(__file__).parent.parent / "assets" / "quick.pt"  # a run of the quick recipe
LAST = ("config", "script", "step", "rng", "network", "ema", "optimizer", "timesteps", "stats")
PLAIN = (torch.Tensor, nn.Parameter, str, int, float, bool, type(None))  # what a checkpoint holds


# Files


def save_checkpoint(path, state, previous=None):
    """Write a dict of tensors and plain values with `torch.save`, as a `whole_file`.

    Raises:
        ValueError: a value that `load_checkpoint` would refuse; nothing is written.
        OSError: the file cannot be written, for example on a full disk.
    """
    checks.path("path", path)
    _check_plain(state, "")
    try:
        with whole_file(path, previous) as partial, open(partial, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's own has the system's behind it
        found = (error, error.__context__)
        reason = next((e.strerror for e in found if isinstance(e, OSError)), one_line(error))
        raise OSError(f"{path}: cannot be written ({reason})") from error


def plain(value):
    """A number of numpy as one of Python; other values as they are."""
    return value.item() if isinstance(value, np.generic) else value


def _check_plain(value, name):
    """ValueError if a checkpoint holds something that cannot be loaded without running code."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"{name}: key")
            _check_plain(item, f"{name}.{key}" if name else f"{key}")
    elif type(value) in (list, tuple):
        for item in value:
            _check_plain(item, name)
    elif type(value) not in PLAIN or type(value) is int and value.bit_length() > 63:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(
            f"{name} {shown(value)} of type {kind}: expected tensors and plain Python values, "
            "since a checkpoint holds no pickled objects"
        )


def load_checkpoint(path, keys):
    """The dict at `path`, on the CPU. No code from the file is run; its checksums are compared.

    Raises:
        ValueError: the file is missing, cannot be read, is damaged, or is something else: one line
            for each cause.
    """
    checks.path("path", path)
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80":  # the first byte of a pickle
            raise pickle.UnpicklingError
        if start != b"PK":
            raise TypeError("no zip file")
        if not _is_whole_zip(path):  # torch compares no checksums
            raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error below says it in one line
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; train_eval.py writes one") from None
    except IsADirectoryError:
        example = Path(path, "best_model.pt")
        raise ValueError(f"{path}: a folder; expected a file, for example {example}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds Python objects, which could run code; expected tensors and plain "
            "values alone"
        ) from None
    except zipfile.BadZipFile:
        raise ValueError(
            f"{path}: not a readable checkpoint: the file is damaged or cut short; another copy of "
            "it may be whole"
        ) from None
    except Exception as error:  # foreign archives fail in too many ways to list
        raise ValueError(
            f"{path}: not a readable checkpoint but another kind of file ({one_line(error)})"
        ) from None
    if not isinstance(saved, dict) or not set(keys) <= set(saved):
        raise ValueError(f"{path}: a checkpoint of another kind; expected {', '.join(keys)} in it")
    return saved


def best_model(save_dir="checkpoints"):
    """The path of best_model.pt of a run; where no run was named and none is, that in assets/."""
    path = Path(save_dir, "best_model.pt")
    run = path.exists() or any(path.parent.glob("last*.pt"))
    if save_dir == "checkpoints" and not run and STORED.exists():
        print(f"no run in {save_dir}: this is assets/{STORED.name}, a run of the quick recipe")
        return STORED
    return path


def _is_whole_zip(path):
    """Whether a file is a zip archive, as `torch.save` writes it, without a damaged part."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except OSError:
        raise
    except Exception:  # damaged archives fail in many ways
        return False


def plain_state_dict(network):
    """The state dict of a network without the names that `torch.compile` inserts for layers."""
    return {name.replace("_orig_mod.", ""): value for name, value in network.state_dict().items()}


def load_weights(network, weights):
    """Load a `plain_state_dict` into a network, wrapped or not; RuntimeError if it does not fit."""
    network = unwrapped(network)
    own_names = {name.replace("_orig_mod.", ""): name for name in network.state_dict()}
    network.load_state_dict({own_names.get(name, name): value for name, value in weights.items()})


# Resuming


def save_last(config, parts, values):
    """Write last.pt: everything that is needed to resume exactly.

    `parts` maps names to what has a `state_dict`: network (the weights in training), ema,
    optimizer, timesteps, stats. `values` holds plain values: step, best_loss, the curves. The
    last.pt of before becomes last.previous.pt.
    """
    rng = {"cpu": torch.get_rng_state()}
    if torch.device(config.device).type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(config.device)
    state = {name: part.state_dict() for name, part in parts.items()}
    path = Path(config.save_dir, "last.pt")
    save_checkpoint(path, {**values, "rng": rng, **state}, path.with_name("last.previous.pt"))


def load_last(save_dir):
    """What `save_last` wrote; if that is damaged, what it wrote before, and a line says so.

    Raises:
        ValueError: neither file can be loaded.
    """
    path, previous = Path(save_dir, "last.pt"), Path(save_dir, "last.previous.pt")
    try:
        return load_checkpoint(path, LAST)
    except ValueError as error:
        if not previous.exists():
            raise
        print(error, file=sys.stderr)
        saved = load_checkpoint(previous, LAST)
        print(f"going on from {previous}, saved at step {saved['step']:,}", file=sys.stderr)
        return saved


def restore(config, parts, progress, saved):
    """Put the states of the parts, the progress and the random numbers back in place.

    Raises:
        ValueError: they are those of another version of the code.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        match_layouts(parts["optimizer"])
        progress.update({name: saved[name] for name in progress})
        torch.set_rng_state(saved["rng"]["cpu"])
        if "cuda" in saved["rng"] and torch.device(config.device).type == "cuda":
            torch.cuda.set_rng_state(saved["rng"]["cuda"], config.device)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(config.save_dir, 'last.pt')}: written by another version of this code "
            f"({one_line(error)})"
        ) from None


def match_layouts(optimizer):
    """Give every moment of an optimiser the memory layout of its parameter, and its own memory.

    The saved run may have had another layout (channels-last). Fused AdamW on a CPU does not look at
    strides: it would combine the wrong elements.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor):  # else the file stays open
                like = parameter if value.shape == parameter.shape else value
                moments[name] = torch.empty_like(like, dtype=value.dtype).copy_(value)
