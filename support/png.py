"""PNGs as the pictures that a person sees, or a refusal in one line."""

import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from support.checks import check_path, one_line, printable

ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
WHOLE = (
    (0, 0, 1, 1),
)  # the passes of an image: first column and row, distance of columns and of rows


def read_folder(folder):
    """Read all PNGs of a folder and its subfolders, sorted by path.

    Each PNG becomes the RGB picture that a person sees. 16 bits become 8: grey levels are rounded, v / 257, and for
    colours Pillow keeps the high byte. Symbolic links to folders are not followed.

    Returns:
        The images, uint8, (N, 3, H, W), and a sorted list of what was left out: the relative paths of files that are
        not PNGs and of links to folders.

    Raises:
        ValueError: if there is no folder or no PNG in it, or if a PNG is unreadable, has another size than the first
            one, has transparent pixels, or is animated.
    """

    check_path("evaluate", folder)

    def refuse(error):
        raise ValueError(f"{printable(error.filename)}: not a readable folder ({one_line(error)})")

    paths, left_out = [], []
    for here, folders, files in os.walk(folder, onerror=refuse) if os.path.isdir(folder) else ():
        pngs = [name for name in files if name.lower().endswith(".png")]
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        paths += [Path(here, name).relative_to(folder) for name in pngs]
        left_out += [
            Path(here, name).relative_to(folder).as_posix() for name in {*files, *links} - {*pngs}
        ]
    if not paths:
        raise ValueError(
            f"evaluate {str(folder)!r}: expected a folder of PNGs, one per image; "
            + ("there is no PNG in it" if os.path.isdir(folder) else "there is no such folder")
        )
    paths.sort(key=lambda path: path.parts)
    images = []
    for path in paths:
        images.append(read_png(Path(folder, path)))
        if images[-1].shape != images[0].shape:
            size, expected = (
                f"{image.shape[2]}x{image.shape[1]}" for image in (images[-1], images[0])
            )
            raise ValueError(
                f"{printable(Path(folder, path))}: {size} pixels; expected {expected}, the size of "
                f"{printable(paths[0])}"
            )
    return torch.stack(images), sorted(left_out)


def read_png(path):
    """One PNG as a person sees it: uint8, (3, H, W). `read_folder` lists what is refused."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    refusal = None
    try:
        if not path.is_file():  # opening a pipe would wait forever
            raise OSError("a broken link, or not a regular file")
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # the checksums, which reading pixels ignores
        with Image.open(path, formats=["PNG"]) as image:
            mode, frames, palette = image.mode, getattr(image, "n_frames", 1), image.palette
            image.load()
            _check_rows(path.read_bytes())
            if frames > 1:
                refusal = f"an animation of {frames} frames; save it as a single picture"
            elif mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
                refusal = "this mode is unknown; save it as 8-bit RGB"
            elif mode == "P" and palette is None:
                raise OSError("the palette is missing")
            elif _is_transparent(image, path):
                refusal = (
                    "some pixels are transparent, and what you see depends on the background; save it without "
                    "transparency"
                )
            elif mode in ("I", "I;16"):  # 16-bit grey; "I" in older Pillow
                grey = (np.asarray(image).astype(np.int64) + 128) // 257  # v / 257, rounded
                picture = torch.from_numpy(grey).byte().expand(3, -1, -1)
            else:
                image.info.pop("transparency", None)  # no pixel uses it
                picture = pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow raises many types for a damaged file
        raise ValueError(
            f"{printable(path)}: not a readable PNG ({one_line(error)}); repair or move it"
        ) from None
    if refusal:
        raise ValueError(f"{printable(path)}: PNG of mode {mode}: {refusal}")
    return picture


def _check_rows(data):
    """OSError if a PNG has fewer pixels than its header says: Pillow reads those that are missing as black."""
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]  # of a pixel
    expected = 0
    for left, top, across, down in ADAM7 if interlaced else WHOLE:
        columns, rows = (
            max(0, math.ceil((width - left) / across)),
            max(0, math.ceil((height - top) / down)),
        )
        expected += (
            rows * (1 + math.ceil(columns * bits / 8)) if columns else 0
        )  # each row begins with its filter
    pixels, at = b"", 8
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        pixels += data[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += length + 12
        if name == b"IEND":
            break
    found = len(zlib.decompressobj().decompress(pixels, expected))
    if found < expected:
        raise OSError(f"{found} bytes of pixels, expected {expected}")


def _is_transparent(image, path):
    """Whether any pixel of a PNG, opened by Pillow, is less than opaque."""
    if "A" in image.getbands():
        return image.getchannel("A").getextrema()[0] < 255
    if "transparency" not in image.info:
        return False
    if image.mode == "P":
        return image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    bits = path.read_bytes()[24]  # bit depth, from the header
    key = np.asarray(image.info["transparency"])  # the transparent grey level or colour
    levels = np.asarray(image).astype(np.int64) * (255 if image.mode == "1" else 1)
    if bits < 8:  # Pillow scales the pixels to 255, but not always the colour
        key = np.where(key < 2**bits, key * 255 // (2**bits - 1), key)
    elif bits == 16 and image.mode == "RGB":
        key = key >> 8  # as Pillow does with the pixels
    same = levels == key
    return bool((same.all(axis=-1) if image.mode == "RGB" else same).any())
