"""MNIST, or a data set like it, as batches of images in [-1, 1].

A split is one uint8 tensor on the device. Batches are augmented and normalised there. If MNIST cannot be had, 'glyphs'
replaces it: digits drawn with the fonts of matplotlib.
"""

import http.client
import math
import os
import shutil
import socket
import struct
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support.checks import (
    check_choice,
    check_device,
    check_path,
    check_switch,
    check_tensor,
    check_whole,
    one_line,
    printable,
    shown,
)

DATASETS = ("auto", "mnist", "fashion_mnist", "kmnist", "glyphs")

# Names of classes in torchvision.datasets, and of the folders in `data_dir` where they keep their files.
TORCHVISION_NAMES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DOWNLOAD_TIMEOUT = 10  # seconds without a byte before a download is given up

GLYPHS_SIZES = (20_000, 2_000)  # train, test
# The fonts of matplotlib that have ten digits, without those that are slanted copies of others.
GLYPHS_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmss10",
    "cmtt10",
    "DejaVuSans-Oblique",
)


def load_data(
    dataset="auto",
    data_dir="data",
    *,
    image_size=32,
    channels=3,
    train_size=60_000,
    test_size=10_000,
    augment=True,
    seed=0,
    device="cpu",
):
    """Load a data set. Files that are missing are downloaded first.

    Args:
        dataset: one of `DATASETS`. 'auto' is MNIST, or 'glyphs' if MNIST is neither in `data_dir` nor can be
            downloaded. The attribute `warning` of both splits then says so; the caller should print it.
        data_dir: folder in which torchvision keeps its data; MNIST is in its subfolder MNIST/raw.
        image_size: height and width that the images are resized to, in pixels.
        channels: channels of a batch; all of them hold the same grey image.
        train_size, test_size: take the first so many images, or all if there are fewer.
        augment: whether training images are shifted, rotated and scaled a little, differently each time.
        seed: together with the number of the epoch it decides the order of the images.
        device: device of the images and batches.

    Returns:
        The training and the test `Images`. Test images are never augmented.

    Raises:
        ValueError: an unknown data set, a size below 1, a damaged file, a `data_dir` that a download cannot write to,
            or a data set, other than 'auto', that is neither found nor downloaded.
    """
    check_choice("dataset", dataset, DATASETS)
    check_path("data_dir", data_dir)
    check_switch("augment", augment)
    check_whole("seed", seed, 0, math.inf)
    sizes = dict(
        image_size=image_size, channels=channels, train_size=train_size, test_size=test_size
    )
    for name, value in sizes.items():
        check_whole(name, value, 1)
    check_device(device)

    name, warning = "mnist" if dataset == "auto" else dataset, None
    if name != "glyphs":
        raw = Path(data_dir).expanduser() / TORCHVISION_NAMES[name] / "raw"
        missing = _check_files(raw)
        failure = _download(name, raw, missing) if missing else None
        cure = f"put {', '.join(FILES)} into {printable(raw)}"
        if failure and dataset == name:
            raise ValueError(
                f"dataset {name}: neither found nor downloaded; {cure}, or go on without it: --dataset "
                f"glyphs. The download says: {failure}"
            )
        if failure:
            name = "glyphs"
            warning = _frame(
                "THIS IS NOT MNIST but 'glyphs', digits drawn from fonts. No number from this run can be "
                f"compared with one for MNIST. For MNIST {cure} and start again.",
                f"It was not found there, and the download says: {failure}",
            )

    def split(train, size):
        if name == "glyphs":
            images, labels = _draw_glyphs(
                min(size, GLYPHS_SIZES[0 if train else 1]), seed=0 if train else 1
            )
        else:
            images, labels = _read(raw, *(FILES[:2] if train else FILES[2:]))
        # Resized once, as uint8: a float copy of the whole set would take four times the memory.
        images = F.interpolate(
            images[:size, None], size=(image_size, image_size), mode="bilinear", antialias=True
        )
        return Images(
            name, images[:, 0], labels[:size], channels, augment and train, seed, device, warning
        )

    return split(True, train_size), split(False, test_size)


class Images:
    """One split of a data set, whole in the memory of the device.

    Attributes:
        name: name of the data set: 'mnist', 'fashion_mnist', 'kmnist' or 'glyphs', never 'auto'.
        num_classes: labels are 0 to 9.
        images: grey, uint8, (N, image_size, image_size).
        labels: int64, (N,).
        y: what batches give as labels: `labels`, or clusters in their place, see `use_clusters`.
        warning: text to show the user if this is not the data set that was asked for, or None.
    """

    num_classes = 10

    def __init__(
        self, name, images, labels, channels=3, augment=False, seed=0, device="cpu", warning=None
    ):
        if not isinstance(name, str):
            raise ValueError(f"name {shown(name)}: expected text")
        check_whole("channels", channels, 1)
        check_switch("augment", augment)
        check_whole("seed", seed, 0, math.inf)
        check_device(device)
        check_tensor("images", images, (torch.uint8,), ("N", "H", "W"))
        check_tensor("labels", labels, (torch.int64,), (len(images),), 0)
        self.name = name
        self.channels = channels
        self.augment = augment
        self.seed = seed
        self.device = torch.device(device)
        self.warning = warning
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.y = self.labels

    def __len__(self):
        return len(self.images)

    def batch(self, index):
        """Pick images, and augment them if this split does so.

        Args:
            index: a slice, or a list or tensor of int64, (B,).

        Returns:
            x0: float32, (B, channels, image_size, image_size), in [-1, 1]; black is -1. All channels share their
                memory, so copy it before you write into it.
            y: int64, (B,).
        """
        if isinstance(index, slice):
            x, y = self.images[index], self.y[index]
        else:  # index_select copies whole rows: on a CPU it is 18 times as fast as brackets
            index = self._index(index)
            x, y = self.images.index_select(0, index), self.y.index_select(0, index)
        x = x.float()[:, None]
        if self.augment:
            x = _augment(x)
        x0 = x.div_(127.5).sub_(1)  # in place, to save memory
        return x0.expand(-1, self.channels, -1, -1), y

    def _index(self, index):
        """The numbers of images as a tensor on the device; ValueError if they are others than those of the images."""
        try:
            index = torch.as_tensor(index, device=self.images.device)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"index {shown(index)}: expected a slice or whole numbers") from None
        check_tensor("index", index, (torch.int64, torch.int32), ("B",), 0, len(self) - 1)
        return index

    def few(self, n):
        """At most n of the images, evenly spread, never augmented, with their labels: `Images` of the same kind."""
        check_whole("n", n, 1)
        n = min(n, len(self))
        index = torch.arange(n, device=self.device) * len(self) // n
        return Images(
            self.name,
            self.images[index],
            self.labels[index],
            self.channels,
            False,
            self.seed,
            self.device,
        )

    def use_clusters(self, k, rounds=25):
        """Give k clusters of similar images in place of labels: k-means on their pixels at 16x16.

        No human label goes into them, and yet a network that is told them draws better (arXiv 2212.00362). `seed`
        decides them. Returns the shares of the clusters, a list of k numbers.
        """
        check_whole("num_clusters", k, 1, len(self), ", the number of training images")
        x = F.adaptive_avg_pool2d(self.images.float()[:, None], 16).flatten(
            1
        )  # finer pixels say hardly more
        first = np.random.default_rng(self.seed).permutation(len(x))[:k]
        centres = x[torch.from_numpy(first).to(x.device)]
        for _ in range(rounds):
            # |x - c|^2 without |x|^2, which is the same for all centres.
            distances = (
                centres.square().sum(dim=1) - 2 * part @ centres.T for part in x.split(4096)
            )
            self.y = torch.cat([part.argmin(dim=1) for part in distances])
            count = self.y.bincount(minlength=k)
            sums = torch.zeros_like(centres).index_add_(0, self.y, x)
            centres = torch.where(count[:, None] > 0, sums / count[:, None].clamp(min=1), centres)
        return (count / len(x)).tolist()

    def epochs(self, batch_size, number, first=0, start=0):
        """The batches of all epochs up to `number`, from batch `start` of epoch `first` on."""
        for epoch in range(first, number):
            yield from self.epoch(batch_size, epoch, start)
            start = 0

    def epoch(self, batch_size, epoch, start=0):
        """Iterate over the batches of an epoch, (x0, y). `seed` and `epoch` alone decide their order.

        Every image comes once, and the last batch may be smaller. `start` skips so many batches.
        """
        check_whole("batch_size", batch_size, 1)
        check_whole("epoch", epoch, 0, math.inf)
        check_whole("start", start, 0)
        # numpy mixes the two numbers well; torch's CPU generator takes one number and keeps 32 bits of it.
        order = np.random.default_rng((epoch, self.seed)).permutation(len(self))
        # Moved once per epoch: if each step sent its own indices, it would wait for the device.
        order = torch.from_numpy(order).to(self.images.device)
        for index in order.split(int(batch_size))[start:]:
            yield self.batch(index)


def _augment(x):
    """Shift by up to 1/32 of the image, rotate by up to 5 degrees, scale by up to 5 %: (N, 1, H, W), black is 0.

    There are no flips, since the mirror image of a digit is not a digit. Random numbers come from torch's global state.
    """
    turn, scale, *shift = torch.rand(4, len(x), device=x.device) * 2 - 1
    turn, scale = turn * math.radians(5), 1 + 0.05 * scale
    cos, sin = scale * torch.cos(turn), scale * torch.sin(turn)
    shift_x, shift_y = (s * 2 / 32 for s in shift)  # the image is 2 wide
    theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    # Outside the image is black, 0. Rounding may exceed white, 255, a little.
    return F.grid_sample(x, grid, align_corners=False).clamp(max=255)


def _check_files(raw):
    """Check the files of a data set that are in the folder `raw`. Returns the names of the missing ones."""
    counts = {file: _check_file(raw / file) for file in FILES if os.path.exists(raw / file)}
    for images, labels in (FILES[:2], FILES[2:]):
        if images in counts and labels in counts and counts[images] != counts[labels]:
            raise ValueError(
                f"{printable(raw / labels)}: {counts[labels]} labels, expected {counts[images]}, one for "
                f"each image in {images}; move both away, and the next run downloads them"
            )
    return [file for file in FILES if file not in counts]


def _check_file(path):
    """Check header and length of an IDX file. Returns its number of images or labels."""
    kind = "images" if "images" in path.name else "labels"
    fixed = (2051, 28, 28) if kind == "images" else (2049,)  # magic number, height, width
    header = struct.Struct(f">{1 + len(fixed)}i")  # the count stands second
    advice = "move it away, and the next run downloads it"
    try:
        with open(path, "rb") as file:
            start, length = file.read(header.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(
            f"{printable(path)}: {error.strerror}; expected a file that can be read"
        ) from error
    if len(start) < header.size:
        raise ValueError(
            f"{printable(path)}: {length} bytes, expected a header of {header.size} and data; {advice}"
        )
    magic, count, *size = header.unpack(start)
    if (magic, *size) != fixed:
        raise ValueError(
            f"{printable(path)}: header has {magic, *size}, expected {fixed} for {kind}; {advice}"
        )
    expected = header.size + max(count, 1) * math.prod(size)
    if length != expected:
        raise ValueError(
            f"{printable(path)}: {length} bytes for {count} {kind} by its header, expected {expected}; "
            f"{advice}"
        )
    return count


def _download(name, raw, missing):
    """Let torchvision download the `missing` files of a data set. Returns None, or in one line why it failed."""
    import torchvision

    try:
        raw.mkdir(parents=True, exist_ok=True)
        # Files leave this folder when they are whole, so an interrupted download leaves no half of a file.
        staging = tempfile.TemporaryDirectory(dir=raw, prefix="download-")
    except OSError as error:
        raise ValueError(
            f"data_dir: {printable(raw)} cannot be written ({error.strerror}), and {name} is to be "
            "downloaded there; name another, or go on without it: --dataset glyphs"
        ) from error
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with staging:
            staged = Path(staging.name, *raw.parts[-2:])
            staged.mkdir(parents=True)
            for archive in raw.glob(
                "*.gz"
            ):  # put there by hand: torchvision uses those that are whole
                shutil.copy(archive, staged)
            getattr(torchvision.datasets, TORCHVISION_NAMES[name])(staging.name, download=True)
            for file in missing:
                os.replace(staged / file, raw / file)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        return one_line(error)
    finally:
        socket.setdefaulttimeout(timeout)
    _check_files(raw)
    return None


def _read(raw, images, labels):
    """Two checked files -> uint8 (N, 28, 28), int64 (N,)."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    y = read_label_file(raw / labels)
    if y.max() >= Images.num_classes:
        raise ValueError(
            f"{printable(raw / labels)}: has the label {y.max()}, expected 0 to {Images.num_classes - 1}"
        )
    return read_image_file(raw / images), y


def _draw_glyphs(n, seed):
    """Draw `n` digits that look like MNIST's: -> uint8 (n, 28, 28), int64 (n,).

    Fonts give the shapes; size, position, slant and stroke are random. Every ten images contain each digit once.
    """
    bank = _glyph_bank()
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(len(y), generator=generator)

    images, labels = [], []
    for _ in range(math.ceil(n / 1000)):
        y = torch.rand(100, 10, generator=generator).argsort(dim=1).flatten()
        x = bank[torch.randint(len(bank), y.shape, generator=generator), y][
            :, None
        ]  # (1000, 1, 56, 56)
        size, narrow, slant, turn = (
            uniform(0.8, 1.0),
            uniform(0.8, 1.1),
            uniform(-0.1, 0.4),
            uniform(-0.1, 0.1),
        )
        shift_x, shift_y = uniform(-0.1, 0.1), uniform(-0.1, 0.1)
        theta = torch.stack(
            [1 / (size * narrow), slant, shift_x, turn, 1 / size, shift_y], dim=1
        ).view(-1, 2, 3)
        grid = F.affine_grid(theta, (len(y), 1, 28, 28), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)  # (1000, 1, 28, 28)
        blur, gain = uniform(0, 1).view(-1, 1, 1, 1), uniform(1, 1.5).view(-1, 1, 1, 1)
        x = gain * torch.lerp(x, F.avg_pool2d(x, 3, stride=1, padding=1), blur)
        images.append((255 * x.clamp(max=1)).round().byte()[:, 0])
        labels.append(y)
    return torch.cat(images)[:n], torch.cat(labels)[:n]


def _glyph_bank():
    """Each digit in each font and stroke, at twice MNIST's size: float, (fonts * strokes, 10, 56, 56), 0 to 1."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    bank = []
    for font in GLYPHS_FONTS:
        font = ImageFont.truetype(
            str(folder / f"{font}.ttf"), 120, layout_engine=ImageFont.Layout.BASIC
        )
        for stroke in (0, 2, 4):
            for digit in "0123456789":
                drawn = Image.new("L", (200, 200))
                ImageDraw.Draw(drawn).text((40, 20), digit, 255, font, stroke_width=stroke)
                drawn = drawn.crop(drawn.getbbox())
                scale = 40 / max(drawn.size)
                drawn = drawn.resize(
                    [max(1, round(side * scale)) for side in drawn.size], Image.Resampling.BOX
                )
                glyph = Image.new("L", (56, 56))
                glyph.paste(drawn, ((56 - drawn.width) // 2, (56 - drawn.height) // 2))
                bank.append(np.asarray(glyph))
    bank = torch.from_numpy(np.stack(bank)).view(-1, 10, 56, 56).float() / 255
    return F.avg_pool2d(
        bank, 3, stride=1, padding=1
    )  # blurred, since later only a quarter of the pixels is sampled


def _frame(*paragraphs):
    """Text in a frame of stars."""
    lines = [
        line
        for text in paragraphs
        for line in textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False)
    ]
    return "\n".join(["*" * 100, *(f"* {line}" for line in lines), "*" * 100])
