"""Where data comes from: the folder of the data, assets/, a download, PNGs to measure."""

import http.client
import io
import lzma
import math
import os
import socket
import struct
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch

from support.checks import path, refuse
from support.files import one_line, printable

# Names of classes in torchvision.datasets, and, but for CIFAR-10, of the folders of their files.
DATASETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
DATASETS |= {"cifar10": "CIFAR10"}
FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FILES += "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
CIFAR_FILES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta")
MNIST = Path(__file__).parent.parent / "assets" / "mnist.tar.xz"  # assets/README.md has its source
DOWNLOAD_TIMEOUT = 10  # seconds without a byte before a download is given up


def read_dataset(name, data_dir, channels=3):
    """Images, uint8, (N, C, H, W), and labels, int64, (N,), of the training and the test split.

    C is 1 for grey images, and 3 for colours, which become grey if `channels` are not 3.

    Raises:
        ValueError: a file is damaged, or the data set is neither found nor downloaded.
    """
    cifar = name == "cifar10"
    files = CIFAR_FILES if cifar else FILES
    folder = "cifar-10-batches-py" if cifar else os.path.join(DATASETS[name], "raw")
    raw = Path(os.path.expanduser(data_dir), folder)
    missing = [file for file in files if not os.path.exists(raw / file)]
    if missing and name == "mnist" and MNIST.exists():
        found = _read_archive(MNIST)
    else:
        if missing:
            _download(name, raw, folder, files, missing)
        if cifar:
            return [_read_cifar(raw.parent, train, channels) for train in (True, False)]
        found = {raw / file: (raw / file).read_bytes() for file in FILES}
    arrays = [(where, _parse(where, data)) for where, data in found.items()]
    splits = []
    for (_, images), (where, labels) in (arrays[:2], arrays[2:]):
        if len(images) != len(labels) or labels.max() > 9:
            raise ValueError(
                f"{printable(where)}: {len(labels)} labels from {labels.min()} to {labels.max()}; "
                f"expected one from 0 to 9 for each of {len(images)} images"
            )
        splits.append((torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
    return splits


def _read_archive(where):
    """The files of an archive in assets/ as {where they are: bytes}."""
    try:
        data = io.BytesIO(lzma.decompress(where.read_bytes()))
        with tarfile.open(fileobj=data) as archive:
            return {where / name: archive.extractfile(name).read() for name in FILES}
    except (OSError, EOFError, KeyError, lzma.LZMAError, tarfile.TarError) as error:
        raise ValueError(
            f"{where}: damaged ({one_line(error)}); bring it back with git, or delete it, and the "
            "next run downloads MNIST"
        ) from None


def _parse(where, data):
    """The bytes of an IDX file of images or labels as uint8, (N, 28, 28) or (N,)."""
    expected = (2051, 28, 28) if "images" in where.name else (2049,)  # magic number, size
    header = struct.Struct(f">{1 + len(expected)}i")
    magic, count, *size = header.unpack(data[: header.size].ljust(header.size, b"\0"))
    length = header.size + max(count, 1) * math.prod(size)
    if (magic, *size) != expected or len(data) != length:
        raise ValueError(
            f"{printable(where)}: {len(data)} bytes with the header {(magic, count, *size)}, which "
            f"is not a whole file of MNIST's kind; move it away, and the next run takes another"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=header.size).reshape(count, *size)


def _read_cifar(root, train, channels):
    """A split of CIFAR-10, of which torchvision opens no file whose checksum is wrong."""
    import torchvision
    from PIL import Image

    try:
        split = torchvision.datasets.CIFAR10(root, train)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"cifar10 in {printable(root)}: damaged ({one_line(error)}); move it away, and the "
            "next run takes another"
        ) from None
    images = split.data
    if channels != 3:
        images = np.stack([Image.fromarray(image).convert("L") for image in images])[..., None]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)


def _download(name, raw, folder, files, missing):
    """Let torchvision download the `missing` of the files that a data set has in a folder."""
    import torchvision

    cure = f"put {', '.join(files)} into {printable(raw)}, or name another --data_dir"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        # Files leave this folder when they are whole: an interrupted download leaves no half file.
        with tempfile.TemporaryDirectory(dir=raw, prefix="download-") as staging:
            getattr(torchvision.datasets, DATASETS[name])(staging, download=True)
            for file in missing:
                os.replace(Path(staging, folder, file), raw / file)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ValueError(
            f"dataset {name}: neither found in {printable(raw)} nor downloaded "
            f"({one_line(error)}); {cure}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def read_folder(folder, size=math.inf):
    """Read all PNGs of a folder and its subfolders, sorted by path; hidden ones are left out.

    Each PNG becomes the RGB picture that a person sees. 16 bits become 8: grey levels are rounded,
    v / 257, and for colours Pillow keeps the high byte. Larger pictures are resized to `size`
    pixels of height and width, so that many fit the memory.

    Returns:
        The images, uint8, (N, 3, H, W), and a sorted list of the relative paths of other files.

    Raises:
        ValueError: there is no folder or no PNG in it, it holds the grids of a run, or a PNG is
            unreadable, has another size than the first one, or has transparent pixels.
    """
    path("evaluate", folder)
    pngs, left_out = [], []
    for here, _, files in walk(folder) if os.path.isdir(folder) else ():
        for name in files:
            kept = pngs if name.lower().endswith(".png") else left_out
            kept.append(Path(here, name).relative_to(folder))
    grids = any(png.name in ("real.png", "final.png") for png in pngs)
    if not pngs or grids:
        found = (
            "it holds the grids of a run" if grids else "there is no such folder, or no PNG in it"
        )
        refuse("evaluate", str(folder), f"a folder of PNGs, one for each image; {found}")
    pngs.sort(key=lambda png: png.parts)
    images, shape = [], None
    for png in pngs:
        image = read_png(Path(folder, png))
        shape = shape or image.shape
        if image.shape != shape:
            found, expected = (f"{width}x{height}" for _, height, width in (image.shape, shape))
            raise ValueError(
                f"{printable(Path(folder, png))}: {found} pixels; expected {expected}, the size of "
                f"{printable(pngs[0])}"
            )
        if max(shape) > size:
            image = torch.nn.functional.interpolate(
                image[None], size=(size, size), mode="bilinear", antialias=True
            )[0]
        images.append(image)
    return torch.stack(images), sorted(map(Path.as_posix, left_out))


def walk(folder):
    """`os.walk` without what is hidden, and a ValueError for what cannot be read."""

    def unreadable(error):
        raise ValueError(f"{printable(error.filename)}: not a readable folder ({one_line(error)})")

    for here, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield here, folders, [name for name in files if not name.startswith(".")]


def in_8_bits(image):
    """A picture of Pillow's: 16-bit grey levels are rounded to 8 bits, others stay as they are."""
    from PIL import Image

    if not image.mode.startswith("I"):  # I;16 or the like; "I" in older Pillow
        return image
    grey = (np.asarray(image).astype(np.int64) + 128) // 257  # v / 257, rounded
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def read_png(file):
    """One PNG as a person sees it: uint8, (3, H, W). `read_folder` lists what is refused."""
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.verify()  # the checksums, which reading pixels ignores
        with Image.open(file, formats=["PNG"]) as image:
            pixels = np.array(in_8_bits(image).convert("RGBA"))
            pixels = torch.from_numpy(pixels).permute(2, 0, 1)
            if pixels[3].min() < 255:
                raise OSError("some pixels are transparent; save it without transparency")
            return pixels[:3]
    except Exception as error:  # Pillow raises many types for a damaged file
        raise ValueError(
            f"{printable(file)}: not a readable PNG ({one_line(error)}); repair or move it"
        ) from None
