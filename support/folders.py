"""A folder of one's own images to train on: what its subfolders say, and the pixels."""

import functools
import os
from itertools import groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support.console import print_left_out
from support.datasets import DATASETS, in_8_bits, walk
from support.files import printable
from support.machine import check_memory


@functools.cache
def has_labels(dataset):
    """Whether a data set has labels. A folder that is not here, where a model came from, may."""
    folder = os.path.expanduser(str(dataset))
    try:
        return dataset in DATASETS or not os.path.isdir(folder) or len(list_images(folder)[0]) > 1
    except ValueError:  # `load_data` says it, where the images are needed
        return True


def list_images(folder):
    """The images of a folder: files with the extension of a format that Pillow reads.

    Subfolders are labels, and what lies deeper belongs to them. `train` and `test`, or `val`, above
    them are the splits where both are there. Else the last tenth of each label, at least one image,
    is the test split. Names alone decide, and nothing hidden counts.

    Returns:
        Names of the labels, sorted, or [""] if fewer than two subfolders have training images; the
        training and the test split as pairs of a path, relative and in order, and the number of its
        label; and the paths of the other files.

    Raises:
        ValueError: no image, one without a label beside others with, a label without training.
    """
    from PIL import Image

    def refuse(problem):
        raise ValueError(f"dataset {os.fspath(folder)!r}: {problem}")

    def label(file):  # "": at the top
        return file.parts[split] if len(file.parts) > split + 1 else ""

    if not os.path.isdir(folder):
        refuse(f"expected {', '.join(DATASETS)} or a folder of images")
    formats, files = Image.registered_extensions(), []
    for here, _, names in walk(folder):
        files += [Path(os.path.relpath(here, folder), name) for name in names]
    files.sort(key=lambda file: file.parts)
    parts = [[file for file in files if formats.get(file.suffix.lower()) in Image.OPEN]]
    if not parts[0]:
        refuse("no image is in it; expected some, as .png or .jpg")
    tops = {file.parts[0] for file in parts[0] if len(file.parts) > 1}
    tests = [top for top in ("test", "val", "valid", "validation") if top in tops]
    split = "train" in tops and bool(tests)
    if split:
        tops = "train", tests[0]
        parts = [[file for file in parts[0] if file.parts[0] == top] for top in tops]
    names = sorted({*map(label, parts[0])} - {""})
    if len(names) < 2:
        names, label = [""], lambda file: ""
    number = {name: k for k, name in enumerate(names)}
    for file in sum(parts, []):
        if label(file) not in number:
            refuse(f"{printable(file)} is in no folder of a label; training has {', '.join(names)}")
    if not split:
        groups, parts = [[*group] for _, group in groupby(parts[0], label)], [[], []]
        for group in groups:
            if len(group) < 2:
                refuse(f"{printable(group[0])} is alone; expected two images or more of a label")
            last = max(1, len(group) // 10)
            parts[0] += group[:-last]
            parts[1] += group[-last:]
    splits = [[(file, number[label(file)]) for file in part] for part in parts]
    return names, *splits, sorted({*files} - {*sum(parts, [])})


def read_images(folder, size, channels, limits, device):
    """The images of a folder, see `list_images`, cropped to squares and resized to `size` pixels.

    At most `limits` of each split are read, shuffled, always in the same way, so that the first
    images have all labels. If `channels` are not 3, colours become grey.

    Returns:
        The training and the test split: images, uint8, (N, C, size, size), of which C is 3 if one
        of them has colours, else 1, and labels, int64, (N,). Then the number of labels, or 0.

    Raises:
        ValueError: see `list_images`; too large for the memory, a tenth broken, too few to test.
    """
    folder = os.path.expanduser(folder)
    names, *splits, others = list_images(folder)
    print_left_out([*map(Path.as_posix, others)], "they are no images to train or test")
    for k, (split, limit) in enumerate(zip(splits, limits)):
        order = np.random.default_rng(0).permutation(len(split))[:limit]
        splits[k] = [split[i] for i in order]
    files, labels = zip(*splits[0], *splits[1])
    shape = len(files), 3 if channels == 3 else 1, size, size
    check_memory(folder, shape, device)
    images, kept = torch.empty(shape, dtype=torch.uint8), torch.ones(len(files), dtype=torch.bool)
    read = functools.partial(_read_image, folder, size, "RGB" if channels == 3 else "L")
    with ThreadPool() as pool:  # Pillow lets other threads run
        found = tqdm(pool.imap(read, files), "images", len(files), disable=None, leave=False)
        for k, image in enumerate(found):
            kept[k] = image is not None
            images[k] = image if kept[k] else 0
    broken = [files[k].as_posix() for k in (~kept).nonzero()[:, 0]]
    print_left_out(broken, "they cannot be read")
    if 10 * len(broken) > len(files):
        raise ValueError(f"dataset {folder!r}: {len(broken):,} of {len(files):,} are broken images")
    images, labels = images[kept] if broken else images, torch.tensor(labels)[kept]
    if shape[1] == 3 and all((part == part[:, :1]).all() for part in images.split(4096)):
        images = images[:, :1].clone()
    first = int(kept[: len(splits[0])].sum())
    if first > len(images) - 2:
        raise ValueError(f"dataset {folder!r}: expected two images or more to test, of 20 or more")
    splits = [(images[part], labels[part]) for part in (slice(first), slice(first, None))]
    return splits, len(names) if len(names) > 1 else 0


def _read_image(folder, size, mode, file):
    """An image as a person sees it, on white, uint8, (C, size, size); None if it is broken."""
    from PIL import Image, ImageOps

    try:
        with Image.open(Path(folder, file)) as image:
            image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded coarsely, and fast
            image = in_8_bits(ImageOps.exif_transpose(image)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(ImageOps.fit(image.convert(mode), (size, size)))
    except Exception:  # Pillow raises many types for a damaged file
        return None
    return torch.from_numpy(pixels).view(size, size, -1).permute(2, 0, 1)
