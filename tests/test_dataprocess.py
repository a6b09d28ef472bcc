"""Data: batches, their order, augmentation, clusters; where files come from; folders of PNGs."""

import http.client
import io
import itertools
import os
import socket
import struct
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from tiny import refused, same, snapshot

from dataprocess import Images, augment, load_data
from support import datasets
from support.datasets import DATASETS, FILES, read_folder

TRAIN, TEST = 230, 40  # images in the small MNIST


def idx(array):
    """An array as the bytes of an IDX file."""
    array = np.asarray(array, np.uint8)
    return struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape) + array.tobytes()


def small_mnist(seed=0):
    """The four files of a small MNIST, {name: bytes}. Labels count from 0 to 9."""
    random, files = np.random.default_rng(seed), {}
    for images, labels, n in ((*FILES[:2], TRAIN), (*FILES[2:], TEST)):
        files |= {images: idx(random.integers(0, 256, (n, 28, 28))), labels: idx(np.arange(n) % 10)}
    return files


def write(data_dir, files, folder="MNIST"):
    raw = data_dir / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


def numbered(n=250, **settings):
    """Images of which every pixel of image i is i, and the label too."""
    number = torch.arange(n)
    images = number.byte()[:, None, None, None].expand(n, 1, 8, 8)
    return Images("mnist", images, number, **settings)


def test_values_are_those_of_the_first_images_of_the_file_from_minus_one_to_one(tmp_path):
    write(tmp_path, small_mnist())
    sizes = dict(image_size=28, channels=3, train_size=25, test_size=99)
    splits = load_data("mnist", tmp_path, augment=False, **sizes)
    for images, name, n in zip(splits, (FILES[0], FILES[2]), (25, TEST)):
        pixels = torch.tensor([*small_mnist()[name][16 : 16 + n * 784]]).view(n, 1, 28, 28)
        x0, y = images.batch(slice(None))
        assert same(x0, (pixels / 127.5 - 1).expand(n, 3, 28, 28))  # channels are equal
        assert (x0.min(), x0.max()) == (-1, 1) and same(y, torch.arange(n) % 10)
        assert (len(images), images.name, images.num_labels) == (n, "mnist", 10)
    small, _ = load_data("mnist", tmp_path, image_size=16, channels=1)
    assert small.batch(torch.tensor([3, 1]))[0].shape == (2, 1, 16, 16)


@pytest.mark.parametrize("n, few", [(10, range(0, 230, 23)), (0, []), (999, range(230))])
def test_a_split_is_a_few_evenly_spread_and_the_others_none_augmented(n, few):
    parts = numbered(230, augment=True, channels=1, seed=5).split(n)
    assert [part.labels.tolist() for part in parts] == [[*few], sorted({*range(230)} - {*few})]
    for part in parts:
        x0, y = part.batch(slice(None))
        assert same(x0[:, 0, 0, 0], y / 127.5 - 1) and (part.seed, x0.shape[1]) == (5, 1)


def test_every_image_comes_once_an_epoch_and_the_last_batch_may_be_smaller():
    batches = list(numbered().epoch(32, 0))
    assert [len(y) for _, y in batches] == [32] * 7 + [26]
    labels = torch.cat([y for _, y in batches]).tolist()
    assert sorted(labels) == list(range(250)) and labels != sorted(labels)
    assert all(same(x0[:, 0, 0, 0], y / 127.5 - 1) for x0, y in batches)


def test_seed_and_epoch_alone_decide_the_order_and_take_no_random_number():
    def order(seed, epoch, batch_size):
        return torch.cat([y for _, y in numbered(seed=seed).epoch(batch_size, epoch)])

    places = list(itertools.product((0, 1, 2, 2**32 - 1), range(4)))
    orders = torch.stack([order(*place, 32) for place in places])
    torch.rand(1)
    before = torch.get_rng_state()
    assert same(torch.stack([order(*place, 50) for place in places]), orders)
    assert same(torch.get_rng_state(), before) and len(orders.unique(dim=0)) == 16


@pytest.mark.parametrize("start", [0, 1, 7, 8])
def test_an_epoch_goes_on_where_a_run_stopped_and_the_next_begins_at_its_beginning(start):
    images = numbered(augment=True)
    whole, states = [], [torch.get_rng_state()]
    for batch in images.epochs(32, 3):
        whole.append(batch)
        states.append(torch.get_rng_state())
    second = [y for _, y in images.epoch(32, 1)]
    assert len(whole) == 24 and same([y for _, y in whole[8:16]], second)
    torch.set_rng_state(states[8 + start])
    assert same(list(images.epochs(32, 3, 1, start)), whole[8 + start :])


def test_augmentation_shifts_a_pixel_turns_five_degrees_and_scales_five_percent_at_most():
    """In images whose light rises to the right, or downwards, each pixel tells where it is from."""
    rise, places = torch.arange(32.0).expand(400, 1, 32, 32), []
    for image in (rise, rise.transpose(2, 3)):
        torch.manual_seed(0)
        places.append(augment(image)[:, 0] - 15.5)
    place = torch.stack(places, dim=-1)  # x and y, in pixels from the middle
    shift = place[:, 15:17, 15:17].mean((1, 2))
    right = (place[:, 16, 22] - place[:, 16, 10]) / 12
    down = (place[:, 22, 16] - place[:, 10, 16]) / 12
    torch.testing.assert_close(down, torch.stack([-right[:, 1], right[:, 0]], 1))  # no flip
    turn, scale = torch.atan2(right[:, 1], right[:, 0]).rad2deg(), right.norm(dim=1) - 1
    found = torch.stack([*shift.T, turn / 5, scale / 0.05])
    assert (found.amax(1) > 0.97).all() and (found.amin(1) < -0.97).all()
    assert found.abs().max() < 1.001 and found.mean(1).abs().max() < 0.1
    assert (torch.corrcoef(found) - torch.eye(4)).abs().max() < 0.2


def test_augmentation_keeps_the_black_background():
    black = Images("mnist", torch.zeros(9, 1, 8, 8).byte(), torch.zeros(9).long(), augment=True)
    assert (black.batch(slice(None))[0] == -1).all()


def test_flips_mirror_about_half_of_the_training_images_and_colours_end_in_their_border():
    images = torch.randint(256, (200, 3, 8, 8), dtype=torch.uint8)
    mirrored, how = images.flip(3), dict(num_labels=0, flips=True)
    x0, _ = Images("own", images, torch.zeros(200).long(), **how).batch(torch.arange(200))
    flipped = (x0 == mirrored / 127.5 - 1).flatten(1).all(dim=1)
    assert same(x0[~flipped], images[~flipped] / 127.5 - 1) and 70 < flipped.sum() < 130
    white = torch.full((50, 3, 8, 8), 255, dtype=torch.uint8)
    grey = white[:, :1]
    for name, x, edge in (("own", white, 1), ("own", grey, 1), ("kmnist", grey, -1)):
        split = Images(name, x, torch.zeros(50).long(), channels=x.shape[1], augment=True)
        assert (split.batch(slice(None))[0].min() > 0.99) == (edge > 0)


def test_only_training_images_are_augmented_each_time_differently_by_torchs_generator(tmp_path):
    write(tmp_path, small_mnist())
    train, test = load_data("mnist", tmp_path, augment=True)
    plain, _ = load_data("mnist", tmp_path, augment=False)
    for images, augments in ((train, True), (test, False), (plain, False)):
        x0, _ = images.batch(slice(0, 20))
        assert same(x0[:, :1], images.images[:20] / 127.5 - 1) != augments
    index = torch.zeros(8, dtype=torch.int64)
    torch.manual_seed(1)
    first, second = train.batch(index)[0], train.batch(index)[0]
    torch.manual_seed(1)
    assert same(train.batch(index)[0], first) and not same(first, second)
    assert len(first.flatten(1).unique(dim=0)) == 8


def test_clusters_gather_what_is_alike_whatever_its_label():
    """Four kinds of pictures, of which one is rare."""
    torch.manual_seed(0)
    kinds = torch.tensor([0] * 100 + [1] * 60 + [2] * 30 + [3] * 10)[torch.randperm(200)]
    shapes = torch.zeros(4, 32, 32)
    shapes[0, :16], shapes[1, 16:], shapes[2, :, :16], shapes[3, :, 16:] = 200, 200, 200, 200
    images = (shapes[kinds] + 40 * torch.rand(200, 32, 32)).byte()[:, None]
    labels = torch.arange(200) % 10
    split, again, other = (Images("mnist", images, labels, seed=seed) for seed in (3, 3, 4))
    shares = split.use_clusters(4)
    assert same(split.labels, labels) and same(split.batch(torch.arange(7))[1], split.y[:7])
    assert all(len(split.y[kinds == kind].unique()) == 1 for kind in range(4))
    assert len(split.y.unique()) == 4 and sorted(shares[0]) == pytest.approx([0.05, 0.15, 0.3, 0.5])
    assert shares[0] == pytest.approx((split.y.bincount(minlength=4) / 200).tolist())
    assert again.use_clusters(4) == shares and same(again.y, split.y)
    assert other.use_clusters(4) and not same(other.y, split.y)


def test_clusters_tell_colours_of_one_brightness_and_need_no_multiple_of_the_labels():
    kinds, levels = torch.arange(96) % 2, torch.tensor([[200, 0, 0], [0, 200, 0]])
    images = levels[kinds].byte()[:, :, None, None].expand(-1, -1, 16, 16)
    split = Images("own", images, torch.arange(96) // 48, num_labels=2)
    assert torch.tensor(split.use_clusters(5, within_labels=True)).shape == (2, 2)  # not 5 in all
    assert len(split.y.unique()) == 4
    assert len(split.y[(split.labels == 0) & (kinds == 0)].unique()) == 1


def test_clusters_that_stay_empty_keep_their_centres():
    """If they became black, the darkest image would move there."""
    levels = torch.tensor([200] * 100 + [100, 20]).byte()[:, None, None, None].expand(-1, 1, 16, 16)
    split = Images("mnist", levels, torch.zeros(102).long())  # the seed picks three equal images
    assert sorted(split.use_clusters(3)[0]) == pytest.approx([0, 2 / 102, 100 / 102])
    assert split.y[100] == split.y[101]


def test_clusters_within_labels_are_numbered_after_them():
    kinds = torch.arange(480) % 2
    images = torch.zeros(480, 1, 16, 16, dtype=torch.uint8)
    images[kinds == 1, :, :8] = 200
    labels = torch.tensor([7, 3])[(torch.arange(480) % 8 < 2).long()]
    split = Images("mnist", images, labels, num_labels=10)
    shares = torch.tensor(split.use_clusters(250, within_labels=True))
    assert shares.shape == (10, 2)  # few images: two clusters a label
    for label, share in ((7, 0.75), (3, 0.25)):
        clusters = split.y[labels == label] - 10
        assert set(clusters.tolist()) == {2 * label, 2 * label + 1}
        assert len(split.y[(labels == label) & (kinds == 0)].unique()) == 1
        assert shares[label].tolist() == [share / 2] * 2
    assert (shares.sum(dim=1) > 0).all() and shares.sum() < 1.02  # a label without images too
    assert ((shares > 0).sum(dim=1) == torch.tensor([1, 1, 1, 2, 1, 1, 1, 2, 1, 1])).all()


def pack(files):
    """Put an archive of these files in the place of that in assets/. Returns its bytes."""
    with tarfile.open(datasets.MNIST, "w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return datasets.MNIST.read_bytes()


@pytest.fixture
def no_archive(tmp_path, monkeypatch):
    """There is none in assets/ but what a test puts there."""
    monkeypatch.setattr(datasets, "MNIST", tmp_path / "mnist.tar.xz")


def pretend_torchvision(monkeypatch, action):
    """Its data sets call `action(root, name)`."""
    theirs = SimpleNamespace()
    for name in DATASETS.values():
        setattr(theirs, name, lambda root, download, name=name: action(Path(root), name))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=theirs))


def test_torchvision_keeps_its_files_where_we_look():
    for name in [*DATASETS.values()][:3]:
        data_set = object.__new__(getattr(torchvision.datasets, name))
        data_set.root = "here"
        assert Path(data_set.raw_folder) == Path("here", name, "raw")
        assert {file for file, _ in data_set.resources} == {f"{file}.gz" for file in FILES}
    cifar = torchvision.datasets.CIFAR10
    found = [file for file, _ in cifar.train_list + cifar.test_list] + [cifar.meta["filename"]]
    assert (cifar.base_folder, tuple(found)) == ("cifar-10-batches-py", datasets.CIFAR_FILES)


def test_cifar10_is_downloaded_once_and_read_by_torchvision(tmp_path, monkeypatch):
    pixels, calls = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8), []

    def cifar(root, train=True, download=False):
        calls.append(download)
        (folder := Path(root, "cifar-10-batches-py")).mkdir(exist_ok=True)
        for name in datasets.CIFAR_FILES if download else ():
            (folder / name).write_text("")
        if (folder / "test_batch").read_text():
            raise RuntimeError("corrupted")
        return SimpleNamespace(data=pixels if train else pixels[::-1].copy(), targets=[3, 9, 0, 3])

    theirs = SimpleNamespace(datasets=SimpleNamespace(CIFAR10=cifar))
    monkeypatch.setitem(sys.modules, "torchvision", theirs)
    train, test = load_data("cifar10", tmp_path, augment=False)
    assert calls == [True, False, False] and (train.name, train.num_labels) == ("cifar10", 10)
    assert same(train.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert same(test.images, train.images.flip(0)) and train.labels.tolist() == [3, 9, 0, 3]
    grey, _ = load_data("cifar10", tmp_path, channels=1)
    assert grey.images[0, 0, 3, 5] == Image.fromarray(pixels[0]).convert("L").getpixel((5, 3))
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_text("x")
    refused(lambda: load_data("cifar10", tmp_path), tmp_path, "damaged", "corrupted")
    assert calls.count(True) == 1


def test_files_come_from_data_dir_or_archive_or_download(tmp_path, monkeypatch, no_archive):
    def first():
        return bytes(load_data("mnist", tmp_path, image_size=28)[0].images[0].flatten().tolist())

    here, packed, online = (small_mnist(seed) for seed in range(3))
    pixels = [files[FILES[0]][16:800] for files in (here, packed, online)]
    pretend_torchvision(monkeypatch, lambda root, name: write(root, online, name))
    pack(packed)
    raw = write(tmp_path, here)
    assert first() == pixels[0]
    (raw / FILES[0]).unlink()
    before = snapshot(tmp_path)
    assert first() == pixels[1] and snapshot(tmp_path) == before
    datasets.MNIST.unlink()
    assert first() == pixels[2]
    assert snapshot(raw) == here | {FILES[0]: online[FILES[0]]}  # the missing file alone


@pytest.mark.parametrize("dataset, name", [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_other_data_sets_have_their_own_folders(tmp_path, monkeypatch, dataset, name):
    pretend_torchvision(monkeypatch, lambda root, name: write(root, small_mnist(), name))
    monkeypatch.setenv("HOME", str(tmp_path))
    train, test = load_data(dataset, "~/data")
    assert (train.name, len(train), len(test)) == (dataset, TRAIN, TEST)
    assert snapshot(tmp_path / "data" / name / "raw") == small_mnist()


@pytest.mark.parametrize("damage", ["cut", "flipped", "another file", "a file missing"])
def test_a_damaged_archive_is_one_line(tmp_path, no_archive, damage):
    whole, part = pack(small_mnist()), pack({name: b"" for name in FILES[:3]})
    flipped = whole[:9999] + bytes([whole[9999] ^ 64]) + whole[10_000:]
    bad = {"cut": whole[:-99], "flipped": flipped, "another file": b"text", "a file missing": part}
    datasets.MNIST.write_bytes(bad[damage])
    refused(lambda: load_data("mnist", tmp_path), datasets.MNIST, "damaged", "or delete it")


DAMAGES = {
    "truncated": (0, lambda content: content[:-1], "180335 bytes"),
    "longer than its header says": (2, lambda content: content + b"x", "31377 bytes"),
    "empty": (3, lambda content: b"", "0 bytes"),
    "no images": (2, lambda content: idx(np.zeros((0, 28, 28))), "(2051, 0"),
    "of another size": (0, lambda content: idx(np.zeros((230, 14, 56))), "14, 56"),
    "fewer labels than images": (1, lambda content: idx(np.zeros(229)), "229 labels"),
    "a label 10": (3, lambda content: content[:-1] + b"\x0a", "labels from 0 to 10"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line(tmp_path, damage):
    number, edit, found = DAMAGES[damage]
    path = write(tmp_path, small_mnist()) / FILES[number]
    path.write_bytes(edit(path.read_bytes()))
    refused(lambda: load_data("mnist", tmp_path), path, found)


@pytest.mark.parametrize(
    "error", [OSError("no"), RuntimeError("no\nroute"), http.client.IncompleteRead(b"n"), None]
)
def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch, no_archive, error):
    def stop(root, name):
        write(root, {FILES[0]: b"half"}, name)
        assert socket.getdefaulttimeout() == datasets.DOWNLOAD_TIMEOUT
        raise error or KeyboardInterrupt

    pretend_torchvision(monkeypatch, stop)
    raw = tmp_path / "MNIST" / "raw"
    if error:
        refused(lambda: load_data("mnist", tmp_path), raw, type(error).__name__, *FILES)
    else:
        with pytest.raises(KeyboardInterrupt):
            load_data("mnist", tmp_path)
    assert [*raw.iterdir()] == [] and socket.getdefaulttimeout() is None
    (tmp_path / "file").write_text("not a folder")
    refused(lambda: load_data("mnist", tmp_path / "file"), tmp_path / "file", "--data_dir")


def png(mode, *pixels, **options):
    """The bytes of a PNG of one row; `options` are Pillow's."""
    image, file = Image.new(mode, (len(pixels), 1)), io.BytesIO()
    if mode == "P":
        image.putpalette(sum(RGB, ()))
    for i, pixel in enumerate(pixels):
        image.putpixel((i, 0), pixel)
    image.save(file, "PNG", **options)
    return file.getvalue()


RGB = (1, 2, 3), (40, 50, 60), (70, 80, 90), (255, 0, 9)
GOOD = png("L", 0, 7, 255)
SEEN = {
    "1": (png("1", 1, 0), [255, 0]),
    "L": (GOOD, [0, 7, 255]),
    "16 bits": (png("I;16", 0, 128, 129, 257, 32896, 65535), [0, 0, 1, 1, 128, 255]),
    "P": (png("P", 3, 0, bits=2), RGB[::-3]),
    "RGB": (png("RGB", *RGB), RGB),
    "RGBA": (png("RGBA", (1, 2, 3, 255)), RGB[:1]),
    "L, another level transparent": (png("L", 3, 5, transparency=4), [3, 5]),
    "P, another index transparent": (png("P", 3, 0, transparency=1), RGB[::-3]),
}
REFUSED = {
    "transparent L": (png("L", 3, 5, transparency=5), "transparent"),
    "transparent P": (png("P", 3, 1, transparency=b"\xff\x80"), "transparent"),
    "transparent RGBA": (png("RGBA", (1, 2, 3, 0)), "transparent"),
    "cut": (GOOD[:-24], "Truncated"),
    "a wrong checksum": (GOOD[:-14] + b"xx" + GOOD[-12:], "bad header checksum"),
    "a link": (lambda path: path.symlink_to("missing"), "FileNotFoundError"),
    "JPEG": (lambda path: Image.new("L", (3, 1)).save(path, "JPEG"), "Unidentified"),
}


@pytest.mark.parametrize("kind", SEEN)
def test_a_png_is_read_as_a_person_sees_it(kind, tmp_path):
    data, pixels = SEEN[kind]
    (tmp_path / "a.png").write_bytes(data)
    (image,), left_out = read_folder(tmp_path)
    assert image.dtype == torch.uint8 and image.shape == (3, 1, len(pixels)) and left_out == []
    assert image[:, 0].T.tolist() == [[*p] if isinstance(p, tuple) else [p] * 3 for p in pixels]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_png_without_a_definite_picture_is_refused(kind, tmp_path):
    (content, reason), path = REFUSED[kind], tmp_path / "b.png"
    (tmp_path / "a.png").write_bytes(GOOD)
    content(path) if callable(content) else path.write_bytes(content)
    refused(lambda: read_folder(tmp_path), f"{path}: not a readable PNG", reason)


def test_a_folder_and_its_subfolders_are_read_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "folder.png").mkdir()
    names = [".hidden.png", "A.PNG", "b.png", "deep/er/z.png", "deep/y.png", "folder.png/x.png"]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(png("L", i))
    (tmp_path / "link.png").symlink_to("b.png")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in (".hidden", ".ipynb_checkpoints/c.png", "b.png.txt", "deep/png"):
        (tmp_path / name).write_text("not an image")
    images, left_out = read_folder(str(tmp_path))
    assert images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 2]
    assert left_out == ["b.png.txt", "deep/png"]


def test_large_pictures_are_resized_when_they_are_read(tmp_path):
    for name in "ab":
        Image.new("RGB", (64, 96), (9, 99, 199)).save(tmp_path / f"{name}.png")
    images, _ = read_folder(tmp_path, 32)
    assert images.shape == (2, 3, 32, 32) and images[0, :, 5, 5].tolist() == [9, 99, 199]


def test_a_folder_that_cannot_be_measured_is_refused(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "missing", __file__):
        refused(lambda folder=folder: read_folder(folder), folder, "no such folder, or no PNG in")
    (tmp_path / "real.png").write_bytes(GOOD)
    refused(lambda: read_folder(tmp_path), "holds the grids of a run")
    (tmp_path / "real.png").unlink()
    (tmp_path / "a.png").write_bytes(png("L", *range(32)))
    (tmp_path / "b\n.png").write_bytes(png("L", *range(28)))
    refused(lambda: read_folder(tmp_path), "b\\n.png", "28x1 pixels; expected 32x1", "of a.png")

    def unreadable(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", unreadable)
    refused(lambda: read_folder(tmp_path), tmp_path, "not a readable folder")
