"""The doors: what a person hands in is checked here, once. First the kinds, then the doors.

Values of tensors are checked on the CPU alone: on a GPU the program would wait for them.
"""

import math
import numbers
import os
import sys

import numpy as np
import torch
from torch import nn

from support.files import one_line, shown
from support.machine import why_no_card

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def refuse(name, value, expected):
    """Raise the ValueError."""
    raise ValueError(f"{name} {shown(value)}: expected {expected}")


def choice(name, value, choices):
    """One of the names that can be chosen."""
    if not isinstance(value, str) or value not in choices:
        refuse(name, value, " or ".join(map(repr, choices)))


def switch(name, value):
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        refuse(name, value, "True or False")


def whole(name, value, low=1, high=2**31 - 1, note=""):
    """A whole number from `low` to `high`; without one to what torch takes as a size."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        refuse(name, value, "a whole number")
    if not low <= value <= high:
        limits = f"at least {low}" if value < low and high >= 2**31 - 1 else f"from {low} to {high}"
        refuse(name, value, limits + note)


def number(name, value, low=-math.inf, high=math.inf, note=""):
    """A finite real number, of Python or numpy, from `low` to `high`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        refuse(name, value, "a number")
    size = abs(value if isinstance(value, numbers.Integral) else float(value))
    if not size <= sys.float_info.max or not low <= value <= high:
        limits = "a finite number" if low == -math.inf else f"at least {low} and finite"
        refuse(name, value, (f"from {low} to {high}" if high < math.inf else limits) + note)


def path(name, value):
    """What can name a file. (A number would be an open file, and reading it could wait.)"""
    if not isinstance(value, (str, os.PathLike)) or "\0" in str(value):
        refuse(name, value, "the path of a file or folder")


def device(value):
    """A device that can be used here, in float64, as the tables of a process are."""
    try:
        torch.zeros((), dtype=torch.float64, device=torch.device(value)).item()
    except Exception as error:  # each backend has its own
        why = why_no_card(value) or one_line(error)
        raise ValueError(
            f"device {shown(value)}: cannot be used here ({why}); try --device cpu"
        ) from None


def tensor(name, value, dtypes, shape, low=None, high=None):
    """A tensor of one of these types and of this shape, finite and within the limits.

    A letter in the shape allows any size.
    """
    fits = isinstance(value, torch.Tensor) and value.dtype in dtypes and value.ndim == len(shape)
    if not fits or any(not isinstance(a, str) and a != b for a, b in zip(shape, value.shape)):
        kinds = {FLOATS: "floating-point numbers", WHOLE: "whole numbers"}.get(dtypes)
        kinds = kinds or " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        sizes = ", ".join(map(str, shape)) + "," * (len(shape) == 1)
        refuse(name, value, f"a tensor of {kinds}, ({sizes})")
    if value.device.type == "cpu" and value.numel():
        least, most = (x.item() for x in torch.aminmax(value.detach()))  # NaN if one is
        found = f"{name} with values from {least} to {most}"
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(f"{found}: expected finite numbers")
        if low is not None and least < low or high is not None and most > high:
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{found}: expected {limits}")


def generator(seed, device):
    """A generator of this seed; a torch.Generator, and None for torch's own, stay as they are."""
    if isinstance(seed, torch.Generator) and seed.device.type != torch.device(device).type:
        raise ValueError(f"seed: a generator on {seed.device}; expected one on {device}")
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    whole("seed", seed, 0, 2**32 - 1)  # torch's generator on a CPU takes no more bits
    return torch.Generator(device).manual_seed(int(seed))


# Doors of DDPM. Labels come back as int64, (N,), on the device of the model.


def process(process, beta_schedules, predictions, variances, spacings):
    """The settings of a `GaussianProcess`."""
    names = ("beta_schedule", "prediction", "variance", "timestep_spacing")
    for name, known in zip(names, (beta_schedules, predictions, variances, spacings)):
        choice(name, getattr(process, name), known)
    switch("zero_terminal_snr", process.zero_terminal_snr)
    whole("num_timesteps", process.num_timesteps, 2 if process.zero_terminal_snr else 1)
    number("skip_std", process.skip_std, 0)
    if process.skip_std and process.prediction != "x0":
        refuse("skip_std", process.skip_std, f"0 with prediction {process.prediction!r}, not 'x0'")
    if process.zero_terminal_snr and process.prediction == "eps":
        refuse("prediction", "eps", "'v' or 'x0' with zero_terminal_snr: noise says nothing of x0")


def denoiser(ddpm, losses):
    """The settings of a `Denoiser`, and whether its network fits them."""
    whole("image_size", ddpm.image_size)
    choice("loss", ddpm.loss, losses)
    number("min_snr_gamma", ddpm.min_snr_gamma, 0)
    number("clean_weight", ddpm.clean_weight, 0)
    if ddpm.clean_weight and (ddpm.loss, ddpm.prediction, ddpm.min_snr_gamma) != ("mse", "x0", 0):
        refuse("clean_weight", ddpm.clean_weight, "0, or loss 'mse' of 'x0' without min_snr_gamma")
    number("label_dropout", ddpm.label_dropout, 0, 1)
    if ddpm.min_snr_gamma and (ddpm.loss != "mse" or ddpm.zero_terminal_snr):
        refuse("min_snr_gamma", ddpm.min_snr_gamma, "0, or loss 'mse' without zero_terminal_snr")
    if not isinstance(ddpm.network, nn.Module):
        refuse("network", ddpm.network, "a torch.nn.Module")
    config = getattr(ddpm.network, "config", None)
    sizes = dict(image_size=ddpm.image_size, channels=ddpm.channels, out_channels=ddpm.outputs)
    if isinstance(config, dict) and sizes.keys() <= config.keys():  # a UNet
        for name, value in sizes.items():
            found = config["channels"] if config[name] is None else config[name]
            if value != found:
                refuse(name, value, f"{found}, as in the network")
    known = [part for part in ddpm.network.modules() if getattr(part, "num_classes", None)]
    if ddpm.num_classes is not None:
        whole("num_classes", ddpm.num_classes, note=", or None")
    elif known and not hasattr(ddpm.network, "num_classes"):
        expected = f"the attribute num_classes of its {type(known[0]).__name__}, or None there"
        refuse("network", type(ddpm.network).__name__, expected)
    if ddpm.class_shares is not None:
        labels = len(ddpm.class_shares) if len(ddpm.class_shares) > 1 else 0
        if labels + sum(map(len, ddpm.class_shares)) != ddpm.num_classes:
            expected = f"a row of numbers for each label, as {ddpm.num_classes} classes have"
            refuse("class_shares", ddpm.class_shares, expected)
        if not 0 < ddpm.label_dropout < 1:
            expected = "between 0 and 1: a part of it learns to go without clusters"
            refuse("label_dropout", ddpm.label_dropout, expected)


def ddpm(ddpm, samplers):
    """The settings of a `DDPM` that a `Denoiser` has not."""
    choice("sampler", ddpm.sampler, samplers)
    whole("sample_steps", ddpm.sample_steps, 1, ddpm.num_timesteps, ", the number of timesteps")
    number("guidance_scale", ddpm.guidance_scale)
    if ddpm.num_classes is None and ddpm.guidance_scale != 1:
        refuse("guidance_scale", ddpm.guidance_scale, "1: the network is unconditional")


def images(ddpm, name, x, n="N"):
    """Images for a `DDPM`, which come back on its device in its precision."""
    tensor(name, x, FLOATS, (n, *ddpm.image_shape))
    return x.to(ddpm.device, ddpm.dtype)


def labels(ddpm, y, n, classes=False):
    """n labels, or one for all; None stays None. `classes` allows all that the network knows."""
    if y is None:
        return None
    if ddpm.num_classes is None:
        raise ValueError("y: this model is unconditional; it knows no labels")
    try:
        y = torch.as_tensor(y if isinstance(y, torch.Tensor) else np.array(y))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"y {shown(y)}: expected whole numbers") from None
    if y.ndim == 0 and y.dtype in WHOLE:
        # copied, since torch.compile makes a graph of its own for a label of stride 0
        y = y.expand(n).contiguous()
    tensor("y", y, WHOLE, (n,), 0, ddpm.num_classes if classes else ddpm.num_labels - 1)
    return y.to(ddpm.device, torch.int64)


def guidance(ddpm, scale, y="drawn"):
    """A guidance scale, beside labels or None."""
    number("guidance_scale", scale)
    if scale not in (0, 1) and (ddpm.num_classes is None or y is None):
        refuse("guidance_scale", scale, "0 or 1: guidance needs labels; give y")


def prediction(ddpm, xt, t, y, scale):
    """`DDPM.predict` -> xt, t, y."""
    xt = images(ddpm, "xt", xt)
    tensor("t", t, (torch.int64,), (len(xt),), 0, ddpm.num_timesteps - 1)
    y = labels(ddpm, y, len(xt), classes=True)
    guidance(ddpm, scale, y)
    return xt, t.to(ddpm.device), y


def sampling(given, samplers):
    """`DDPM.sample`, its arguments as a dict -> y, xT, generator."""
    ddpm, n, xT, last = given["self"], given["n"], given["xT"], given["self"].num_timesteps - 1
    whole("n", n, note=" image")
    start = last if given["start"] is None else given["start"]
    whole("start", start, 0, last, ", a timestep")
    if start != last and xT is None:
        raise ValueError(f"start {start} without xT: pure noise belongs to {last}; give xT")
    own = dict(sampler=ddpm.sampler, steps=1, eta=0, guidance_scale=0)
    how = {name: own[name] if given[name] is None else given[name] for name in own}
    choice("sampler", how["sampler"], samplers)
    whole("steps", how["steps"], 1, start + 1, ", the number of timesteps")
    number("eta", how["eta"], 0, 1, " (0 is DDIM, 1 is DDPM)")
    guidance(ddpm, how["guidance_scale"])
    sequence = given["return_sequence"]
    if not isinstance(sequence, (bool, str)) or sequence not in (False, True, "xt"):
        refuse("return_sequence", sequence, "False, True or 'xt'")
    xT = None if xT is None else images(ddpm, "xT", xT, n)
    return labels(ddpm, given["y"], n), xT, generator(given["seed"], ddpm.device)


def mixture(ddpm, x0, other, weights, t, y, options):
    """`DDPM.interpolate` -> x0, other, weights, y, generator. `sample` checks the other options."""
    weights = weights.tolist() if hasattr(weights, "tolist") else weights  # a tensor or an array
    if not isinstance(weights, (list, tuple)) or not weights:
        refuse("weights", weights, "a list of numbers from 0 to 1")
    for weight in weights:
        number("weights", weight, 0, 1)
    whole("t", t, 0, ddpm.num_timesteps - 1, ", a timestep")
    x0, other = images(ddpm, "x0", x0), images(ddpm, "other", other, len(x0))
    for name in options.keys() & {"xT", "start"}:
        refuse(name, options[name], "nothing: the mixture starts at t")
    if options.get("guidance_scale") is not None:
        guidance(ddpm, options["guidance_scale"], y)
    draws = generator(options.get("seed"), ddpm.device)
    return x0, other, weights, labels(ddpm, y, len(x0)), draws


def bound(ddpm, x0, y, terms, seed):
    """`DDPM.bits_per_dim` -> x0 on the device of the model, in its precision; y, generator."""
    tensor("x0", x0, FLOATS, ("N", *ddpm.image_shape), -1, 1)
    if not len(x0):
        raise ValueError("x0 of 0 images: expected at least 1")
    if terms is not None:
        most = ddpm.num_timesteps
        whole("terms", terms, min(2, most), most, ", the number of timesteps")
    y, generator_ = labels(ddpm, y, len(x0)), generator(seed, ddpm.device)
    levels = (x0.double() + 1) * 127.5
    off = (levels - levels.round()).abs().max().item()
    if off > 255 * torch.finfo(x0.dtype).eps + 1e-3:
        raise ValueError(
            f"x0 up to {off:.2f} grey levels off the 256 of a PNG: a bound in bits needs these; "
            "load_data(augment=False) gives them"
        )
    return x0.to(ddpm.device, ddpm.dtype), y, generator_


def ema(averaged, decay, start, update_rate):
    """The settings of an `EMA`."""
    if not isinstance(averaged, nn.Module):
        refuse("module", averaged, "a torch.nn.Module")
    number("ema_decay", decay, 0, 1)
    whole("ema_start", start, 0, note=" steps")
    whole("ema_update_rate", update_rate, note=" step")


def timesteps(sampling, samplings, num_timesteps, std, device_):
    """The settings of a timestep sampler."""
    choice("timestep_sampling", sampling, samplings)
    whole("num_timesteps", num_timesteps)
    number("timestep_std", std, 0)
    device(device_)
    if sampling == "logit-normal" and not std:
        refuse("timestep_std", std, "above 0: one timestep alone would be trained")


def data(dataset, data_dir, settings, seed, device_):
    """`load_data`; `settings` are {name: pixels, number of images, or switch}."""
    path("dataset", dataset)
    path("data_dir", data_dir)
    whole("seed", seed, 0, 2**32 - 1)
    for name, value in settings.items():
        (switch if name in ("augment", "flips") else whole)(name, value)
    device(device_)


def pictures(name, images):
    """Images, uint8, (N, H, W) or (N, C, H, W), at least one."""
    if not isinstance(images, torch.Tensor) or images.ndim not in (3, 4):
        refuse(name, images, "a tensor of uint8, (N, H, W) or (N, C, H, W)")
    tensor(name, images, (torch.uint8,), "NCHW"[: images.ndim])
    if 0 in images.shape:
        refuse(name, images, "at least 1 image, of pixels")


def labelled(images, labels, seed=0, epochs=1, folder=".", device_="cpu"):
    """Images and a label, int64 from 0, for each; for a classifier also how it is trained."""
    pictures("images", images)
    tensor("labels", labels, (torch.int64,), (len(images),), 0)
    whole("seed", seed, 0, 2**32 - 1)
    whole("epochs", epochs)
    path("folder", folder)
    device(device_)


def features(extra, **sets):
    """Sets of features, (N, D), of one width D, each of more than `extra` rows, or None: than D."""
    width = "D"
    for name, x in sets.items():
        tensor(name, x, FLOATS, ("N", width))
        width = x.shape[1]
        least = 1 + (width if extra is None else extra)
        if len(x) < least or not width:
            refuse(name, x, f"at least {least} images, of at least one feature")


def measured(samples, train, test, labels):
    """`metrics.measure`."""
    for name, images in (("samples", samples), ("train", train), ("test", test)):
        pictures(name, images)
        if len(images) < len(samples):
            refuse("samples", samples, f"at most {len(images)}, as many as {name} images")
    if labels is not None:
        tensor("labels", labels, (torch.int64,), (len(samples),))
