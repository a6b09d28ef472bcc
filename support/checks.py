"""Checks of what a person gives: each is a ValueError of one line that says the name, the value and what was expected.

A check of a tensor's values is for the CPU alone: on a GPU the program would wait for it.
"""

import math
import numbers
import os

import numpy as np
import torch
from torch import nn

MOST = 2**31 - 1  # what torch takes as a size everywhere
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def shown(value):
    """A value for a message: its `repr` in one line and not too long."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return f"of {value.dtype} and shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def one_line(error):
    """The message of an exception, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(path):
    """A path for a message, with line breaks and bytes that are not text escaped."""
    return str(path) if str(path).isprintable() else repr(str(path))


def check_choice(name, value, choices):
    """ValueError if the value is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} {shown(value)}: expected {' or '.join(map(repr, choices))}")


def check_switch(name, value):
    """ValueError if the value is not True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} {shown(value)}: expected True or False")


def check_whole(name, value, low, high=MOST, note=""):
    """ValueError if the value is not a whole number from `low` to `high`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name} {shown(value)}: expected a whole number")
    if not low <= value <= high:
        limits = (
            f"at least {low}"
            if high in (MOST, math.inf) and value < low
            else f"from {low} to {high}"
        )
        raise ValueError(f"{name} {shown(value)}: expected {limits}{note}")


def is_number(value):
    """Whether a value is a real number, of Python or numpy. True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_number(name, value, low=-math.inf, high=math.inf, note=""):
    """ValueError if the value is not a finite number from `low` to `high`."""
    if not is_number(value):
        raise ValueError(f"{name} {shown(value)}: expected a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number that is too large for a float
        finite = False
    if not finite or not low <= value <= high:
        limits = (
            "a finite number"
            if low == -math.inf
            else (f"at least {low} and finite" if high == math.inf else f"from {low} to {high}")
        )
        raise ValueError(f"{name} {shown(value)}: expected {limits}{note}")


def check_path(name, value):
    """ValueError if the value cannot name a file. (A number would be an open file, and reading it could wait.)"""
    if not isinstance(value, (str, os.PathLike)) or "\0" in str(value):
        raise ValueError(f"{name} {shown(value)}: expected the path of a file or folder")


def check_device(device):
    """ValueError for a device that cannot be used here; it is given back."""
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each backend has its own
        raise ValueError(
            f"device {shown(device)}: cannot be used here ({str(error).partition(chr(10))[0]}); expected "
            "for example 'cpu' or 'cuda'"
        ) from None
    return device


def check_module(name, value):
    """ValueError if the value is not a torch module."""
    if not isinstance(value, nn.Module):
        raise ValueError(f"{name} {shown(value)}: expected a torch.nn.Module")


def check_tensor(name, value, dtypes, shape, low=None, high=None, finite=True):
    """ValueError if the value is not a tensor of one of these types and of this shape, with values in the limits.

    None or a letter in the shape allows any size, an empty one too.
    """
    if not (
        isinstance(value, torch.Tensor)
        and value.dtype in dtypes
        and value.ndim == len(shape)
        and all(
            size is None or isinstance(size, str) or size == found
            for size, found in zip(shape, value.shape)
        )
    ):
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        sizes = ", ".join("N" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} {shown(value)}: expected a tensor of {kinds}, ({sizes}{',' * (len(shape) == 1)})"
        )
    if finite:
        check_values(name, value, low, high)


def check_values(name, x, low=None, high=None):
    """ValueError if a tensor on the CPU has values out of these limits, or NaN. Its dtype and shape fit already."""
    if x.device.type == "cpu" and x.numel():
        least, most = (value.item() for value in torch.aminmax(x.detach()))  # NaN if one is
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(f"{name} with values from {least} to {most}: expected finite numbers")
        if low is not None and least < low or high is not None and most > high:
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} with values from {least} to {most}: expected {limits}")


def check_weights(weights):
    """The weights of `DDPM.interpolate` as a list; ValueError if they are not numbers from 0 to 1."""
    weights = weights.tolist() if hasattr(weights, "tolist") else weights  # a tensor or an array
    if not isinstance(weights, (list, tuple)) or not all(map(is_number, weights)):
        raise ValueError(f"weights {shown(weights)}: expected a list of numbers from 0 to 1")
    if not weights or not all(0 <= weight <= 1 for weight in weights):
        raise ValueError(f"weights {weights}: expected one or more, from 0 to 1")
    return weights


def check_shares(shares, num_classes):
    """The shares of the classes as a list; ValueError if they are not one number from 0 for each, or all are 0."""
    shares = shares.tolist() if hasattr(shares, "tolist") else shares
    if (
        num_classes is None
        or not isinstance(shares, (list, tuple))
        or len(shares) != num_classes
        or not all(is_number(share) and 0 <= share < math.inf for share in shares)
        or not sum(shares)
    ):
        raise ValueError(
            f"class_shares {shown(shares)}: expected a number from 0 for each of the network's "
            f"{num_classes or 0} classes, not all 0"
        )
    return [float(share) for share in shares]


def check_references(references, loss, y):
    """ValueError unless these are None, or images and their labels that this loss can use beside labels `y`."""
    if references is None:
        return
    if loss != "mse":
        raise ValueError(
            f"references with loss {loss!r}: expected 'mse', whose minimum is the mean"
        )
    if not isinstance(references, (tuple, list)) or len(references) != 2:
        raise ValueError(
            f"references {shown(references)}: expected two things, images and their labels or None"
        )
    images, labels = references
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        raise ValueError(f"references {shown(images)}: expected images, a tensor (M, C, H, W)")
    if y is not None and labels is None:
        raise ValueError("references without labels: expected theirs, since y is given")
    if y is not None:
        check_tensor("labels of references", labels, (torch.int64,), (len(images),))
