"""Tests of the data: batches, order, augmentation, damaged files, downloads and glyphs.

No test needs MNIST or a network: small IDX files are written, and downloads come from this machine or fail.
"""

import gzip
import hashlib
import http.server
import os
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import dataprocess
from dataprocess import FILES, Images, load_data

TRAIN, TEST = 230, 40  # images in the small MNIST


def idx(array):
    """An array as the bytes of an IDX file."""
    return struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape) + array.tobytes()


def small_mnist(train=TRAIN, test=TEST):
    """The four files of a small MNIST: {name: bytes}. Images are noise with a black frame; labels count 0 to 9."""
    random = np.random.default_rng(0)
    files = {}
    for split, n in (("train", train), ("t10k", test)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 4:24, 4:24] = random.integers(0, 256, (n, 20, 20))
        files[f"{split}-images-idx3-ubyte"] = idx(images)
        files[f"{split}-labels-idx1-ubyte"] = idx((np.arange(n) % 10).astype(np.uint8))
    return files


def write(data_dir, files, folder="MNIST"):
    raw = data_dir / folder / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


@pytest.fixture
def mnist(tmp_path):
    """A data_dir that holds the small MNIST."""
    write(tmp_path, small_mnist())
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    """Downloads fail as they do without a network."""

    def fail(url, *args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", fail)


def numbered(n=250, **kwargs):
    """Images of which every pixel of image i is i, and the label too."""
    number = torch.arange(n)
    return Images("mnist", number.to(torch.uint8)[:, None, None].expand(n, 8, 8), number, **kwargs)


def order(images, *args):
    return torch.cat([y for _, y in images.epoch(*args)]).tolist()


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_few_images_are_evenly_spread_never_augmented_and_keep_their_labels(mnist):
    images, _ = load_data("mnist", mnist, channels=1, augment=True)
    few = images.few(10)
    assert torch.equal(few.images, images.images[:: TRAIN // 10]) and torch.equal(
        few.labels, images.labels[::23]
    )
    (x0, y), (again, _) = few.batch(slice(None)), few.batch(slice(None))
    assert torch.equal(x0, again) and x0.shape == (10, 1, 32, 32) and torch.equal(y, few.labels)
    assert images.augment and len(images.few(10**6)) == TRAIN
    with pytest.raises(ValueError, match="^n 0: expected"):
        images.few(0)


# Batches


def test_batch_shapes_and_types(mnist):
    train, test = load_data("mnist", mnist, augment=False)
    assert (len(train), len(test)) == (TRAIN, TEST)
    assert (train.name, train.num_classes, train.warning) == ("mnist", 10, None)
    assert train.images.shape == (TRAIN, 32, 32) and train.images.dtype == torch.uint8
    for index in (torch.tensor([3, 1, 2]), [3, 1, 2], slice(1, 4)):
        x0, y = train.batch(index)
        assert x0.shape == (3, 3, 32, 32) and x0.dtype == torch.float32
        assert y.shape == (3,) and y.dtype == torch.int64
    assert train.batch([3, 1, 2])[1].tolist() == [3, 1, 2]
    assert torch.equal(x0[:, 0], x0[:, 1]) and torch.equal(x0[:, 0], x0[:, 2])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [16, 28, 32])
def test_sizes(mnist, channels, image_size):
    for images in load_data("mnist", mnist, image_size=image_size, channels=channels):
        assert images.batch([0, 1])[0].shape == (2, channels, image_size, image_size)


def test_values_are_those_of_the_file(mnist):
    train, _ = load_data("mnist", mnist, image_size=28, channels=1, augment=False)
    content = small_mnist()["train-images-idx3-ubyte"][16:]
    pixels = torch.tensor(list(content[: 784 * 5])).view(5, 1, 28, 28)
    assert torch.equal(train.batch(slice(0, 5))[0], pixels / 127.5 - 1)


def test_range_has_exact_ends():
    x0, _ = numbered(256).batch([0, 255, 51, 204])
    assert x0[:, 0, 0, 0].tolist()[:2] == [-1, 1]
    assert torch.allclose(x0[2:, 0, 0, 0], torch.tensor([-0.6, 0.6]))


def test_first_images_are_taken(mnist):
    train, test = load_data("mnist", mnist, train_size=25, test_size=7)
    everything, _ = load_data("mnist", mnist)
    assert (len(train), len(test)) == (25, 7)
    assert torch.equal(train.images, everything.images[:25]) and torch.equal(
        train.labels, everything.labels[:25]
    )


def test_everything_happens_on_the_device():
    split = numbered(augment=True, device="meta")
    x0, y = next(split.epoch(32, 0))
    assert {tensor.device.type for tensor in (split.images, split.labels, x0, y)} == {"meta"}


# Order


def test_every_image_once_an_epoch():
    batches = list(numbered().epoch(32, 0))
    assert [len(y) for _, y in batches] == [32] * 7 + [26]
    labels = torch.cat([y for _, y in batches])
    assert sorted(labels.tolist()) == list(range(250)) and labels.tolist() != list(range(250))
    for x0, y in batches:
        assert torch.equal(x0[:, 0, 0, 0], y / 127.5 - 1)


def test_order_depends_on_seed_and_epoch_alone():
    orders = set()
    for seed in (0, 1, 2, 2**32, 2**32 + 1):
        for epoch in range(4):
            torch.manual_seed(epoch)
            expected = order(numbered(seed=seed), 32, epoch)
            torch.manual_seed(99)
            np.random.seed(99)
            assert order(numbered(seed=seed), 50, epoch) == expected
            orders.add(tuple(expected))
    assert len(orders) == 20


def test_order_leaves_the_global_state_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    order(numbered(), 32, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("start", [0, 1, 5, 7, 8])
def test_start_goes_on_where_a_run_stopped(start):
    images = numbered(augment=True)
    whole, states = [], [torch.get_rng_state()]
    for batch in images.epoch(32, 3):
        whole.append(batch)
        states.append(torch.get_rng_state())
    torch.set_rng_state(states[start])
    rest = list(images.epoch(32, 3, start))
    for (x0, y), (x0_whole, y_whole) in zip(rest, whole[start:], strict=True):
        assert torch.equal(x0, x0_whole) and torch.equal(y, y_whole)


# Augmentation


def augmented(picture, n=400):
    """`n` augmented copies of a picture, float, 0 to 1: (n, 32, 32)."""
    torch.manual_seed(0)
    images = Images(
        "mnist", picture.expand(n, 32, 32), torch.zeros(n, dtype=torch.int64), 1, augment=True
    )
    return (images.batch(slice(None))[0][:, 0] + 1) / 2


def picture(*boxes):
    """White boxes (top, bottom, left, right) on black: uint8 (32, 32)."""
    image = torch.zeros(32, 32, dtype=torch.uint8)
    for top, bottom, left, right in boxes:
        image[top:bottom, left:right] = 255
    return image


def moments(x):
    """Centre (N, 2), as x and y in pixels from the middle, and covariance (N, 2, 2) of the light."""
    place = torch.stack(
        torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="xy"), dim=-1
    )
    weight = x / x.sum((1, 2), keepdim=True)
    centre = torch.einsum("nij,ijk->nk", weight, place)
    offset = place - centre[:, None, None]
    return centre, torch.einsum("nij,nijk,nijl->nkl", weight, offset, offset)


def test_augmentation_shifts_by_up_to_a_pixel():
    centre, _ = moments(augmented(picture((14, 18, 14, 18))))
    assert centre.abs().max() < 1.1
    assert (centre.min(0).values < -0.8).all() and (centre.max(0).values > 0.8).all()
    assert centre.mean(0).abs().max() < 0.15
    assert abs(torch.corrcoef(centre.T)[0, 1]) < 0.2


def test_augmentation_turns_by_up_to_five_degrees():
    _, covariance = moments(augmented(picture((4, 28, 14, 18))))
    angle = torch.rad2deg(
        0.5 * torch.atan2(2 * covariance[:, 0, 1], covariance[:, 1, 1] - covariance[:, 0, 0])
    )
    assert 4.5 < angle.max() < 5.3 and -5.3 < angle.min() < -4.5


def test_augmentation_scales_by_up_to_five_percent():
    side = augmented(picture((8, 24, 8, 24))).sum((1, 2)).sqrt() / 16
    assert 1.04 < side.max() < 1.06 and 0.94 < side.min() < 0.96


def test_augmentation_never_flips():
    original = picture((6, 26, 8, 12), (22, 26, 8, 22))  # an L
    x = augmented(original)
    for axes in ([0], [1], [0, 1]):
        mirrored = original.flip(axes) / 255
        assert (
            (x - original / 255).square().sum((1, 2)) < 0.8 * (x - mirrored).square().sum((1, 2))
        ).all()


def test_augmentation_keeps_the_range_and_the_background(mnist):
    train, _ = load_data("mnist", mnist)
    x0, _ = train.batch(slice(None))
    assert x0.min() == -1 and x0.max() <= 1
    assert (x0[..., [0, -1], :] == -1).all() and (x0[..., [0, -1]] == -1).all()
    white = augmented(torch.full((32, 32), 255, dtype=torch.uint8))
    assert white.max() == 1 and white.min() >= 0
    assert (white[:, 4:-4, 4:-4] > 0.9999).all()


def test_augmentation_differs_and_is_reproducible(mnist):
    train, _ = load_data("mnist", mnist)
    index = torch.zeros(8, dtype=torch.int64)
    torch.manual_seed(1)
    x0, _ = train.batch(index)
    again, _ = train.batch(index)
    torch.manual_seed(1)
    repeated, _ = train.batch(index)
    assert len(x0.flatten(1).unique(dim=0)) == 8
    assert not torch.equal(x0, again) and torch.equal(x0, repeated)


def test_augmentation_is_for_training_and_can_be_off(mnist):
    train, test = load_data("mnist", mnist, augment=True)
    plain, _ = load_data("mnist", mnist, augment=False)
    for images, augments in ((train, True), (test, False), (plain, False)):
        x0, _ = images.batch(slice(0, 20))
        assert torch.equal(x0[:, 0], images.images[:20] / 127.5 - 1) != augments


# Files


def with_header(content, *numbers):
    """An IDX file with the numbers at its start replaced."""
    header = struct.pack(f">{len(numbers)}i", *numbers)
    return header + content[len(header) :]


DAMAGES = {
    "truncated": ("train-images-idx3-ubyte", lambda content: content[:-1], "180335 bytes"),
    "longer": ("t10k-images-idx3-ubyte", lambda content: content + b"x", "31377 bytes"),
    "empty": ("t10k-labels-idx1-ubyte", lambda content: b"", "0 bytes"),
    "header cut short": ("t10k-images-idx3-ubyte", lambda content: content[:10], "10 bytes"),
    "wrong magic": ("train-images-idx3-ubyte", lambda content: with_header(content, 2052), "2052"),
    "labels as images": (
        "t10k-images-idx3-ubyte",
        lambda content: idx(np.zeros(40, np.uint8)),
        "expected (2051",
    ),
    "images as labels": (
        "t10k-labels-idx1-ubyte",
        lambda content: with_header(content, 2051),
        "expected (2049",
    ),
    "a web page": (
        "train-labels-idx1-ubyte",
        lambda content: b"<!DOCTYPE html><html>Sign in</html>",
        "expected (2049",
    ),
    "wrong count of images": (
        "train-images-idx3-ubyte",
        lambda content: with_header(content, 2051, 60_000),
        "60000",
    ),
    "wrong count of labels": (
        "train-labels-idx1-ubyte",
        lambda content: with_header(content, 2049, 229),
        "229",
    ),
    "negative count": (
        "train-labels-idx1-ubyte",
        lambda content: with_header(content, 2049, -1),
        "-1 labels",
    ),
    "no images": (
        "t10k-images-idx3-ubyte",
        lambda content: idx(np.zeros((0, 28, 28), np.uint8)),
        "0 images",
    ),
    "wrong size": (
        "train-images-idx3-ubyte",
        lambda content: with_header(content, 2051, 230, 14, 56),
        "14, 56",
    ),
    "fewer labels": (
        "train-labels-idx1-ubyte",
        lambda content: idx(np.zeros(229, np.uint8)),
        "229 labels",
    ),
    "unknown label": ("t10k-labels-idx1-ubyte", lambda content: content[:-1] + b"\x0a", "label 10"),
}


@pytest.mark.parametrize("dataset", ["mnist", "auto"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(tmp_path, no_network, dataset, damage):
    name, edit, found = DAMAGES[damage]
    files = small_mnist()
    files[name] = edit(files[name])
    raw = write(tmp_path, files)
    with pytest.raises(ValueError) as error:
        load_data(dataset, tmp_path)
    text = one_line(error)
    assert str(raw / name) in text and found in text and "expected" in text


def test_damaged_file_beside_a_missing_one_is_an_error(tmp_path, no_network):
    files = small_mnist()
    del files["t10k-labels-idx1-ubyte"]
    files["train-images-idx3-ubyte"] = b""
    write(tmp_path, files)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: 0 bytes"):
        load_data("auto", tmp_path)


def test_folder_in_place_of_a_file(mnist):
    path = mnist / "MNIST/raw/train-images-idx3-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError) as error:
        load_data("mnist", mnist)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    "dataset, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
@pytest.mark.parametrize("missing", [FILES, FILES[1:2]])
def test_data_set_that_cannot_be_had(tmp_path, no_network, dataset, folder, missing):
    raw = write(
        tmp_path,
        {name: content for name, content in small_mnist().items() if name not in missing},
        folder,
    )
    with pytest.raises(ValueError) as error:
        load_data(dataset, tmp_path)
    text = one_line(error)
    assert all(name in text for name in FILES) and str(raw) in text
    assert "--dataset glyphs" in text and "no route to host" in text


@pytest.mark.parametrize("dataset", ["mnist", "auto"])
@pytest.mark.parametrize("data_dir", ["file", "file/data"])
def test_data_dir_that_cannot_be_made(tmp_path, dataset, data_dir):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError) as error:
        load_data(dataset, tmp_path / data_dir)
    assert str(tmp_path / data_dir) in one_line(error)


def test_data_dir_that_cannot_be_written(tmp_path, monkeypatch):
    def fail(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", fail)  # for root every folder can be written
    with pytest.raises(ValueError) as error:
        load_data("auto", tmp_path)
    assert str(tmp_path) in one_line(error) and "Permission denied" in one_line(error)


def test_complete_folder_is_only_read(mnist, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "MNIST", None)
    folders = [folder for folder, _, _ in os.walk(mnist)]
    before = snapshot(mnist)
    for folder in folders:
        os.chmod(folder, 0o555)
    try:
        train, _ = load_data("auto", str(mnist))
    finally:
        for folder in folders:
            os.chmod(folder, 0o755)
    assert train.name == "mnist" and train.warning is None and snapshot(mnist) == before


@pytest.mark.parametrize(
    "dataset, folder", [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_other_data_sets(tmp_path, dataset, folder):
    write(tmp_path, small_mnist(), folder)
    train, test = load_data(dataset, tmp_path)
    assert (train.name, len(train), len(test)) == (dataset, TRAIN, TEST)


def test_home_folder(mnist, monkeypatch):
    monkeypatch.setenv("HOME", str(mnist.parent))
    assert load_data("mnist", f"~/{mnist.name}")[0].name == "mnist"


@pytest.mark.parametrize(
    "settings",
    [
        dict(dataset="cifar"),
        dict(train_size=0),
        dict(test_size=-1),
        dict(image_size=0),
        dict(channels=0),
    ],
)
def test_impossible_settings(tmp_path, settings):
    with pytest.raises(ValueError) as error:
        load_data(**{"dataset": "glyphs", "data_dir": tmp_path, **settings})
    ((name, value),) = settings.items()
    assert (
        name in one_line(error) and str(value) in one_line(error) and "expected" in one_line(error)
    )


# Downloads


@pytest.fixture
def mirror(monkeypatch):
    """A server on this machine which has, as torchvision will believe, MNIST: {file name: bytes to be sent}."""
    served = {f"{name}.gz": gzip.compress(content) for name, content in small_mnist().items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = served[self.path.strip("/")]
            if content is None:
                self.server.silent.wait()  # a server that hangs
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.silent = threading.Event()
    threading.Thread(
        target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True
    ).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(
        torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"]
    )
    monkeypatch.setattr(
        torchvision.datasets.MNIST,
        "resources",
        [(name, hashlib.md5(content).hexdigest()) for name, content in served.items()],
    )
    yield served
    server.silent.set()
    server.shutdown()
    server.server_close()


def test_download(tmp_path, mirror):
    data_dir = tmp_path / "new" / "data"
    train, test = load_data("auto", data_dir)
    assert (train.name, len(train), len(test)) == ("mnist", TRAIN, TEST)
    assert {
        path.name: path.read_bytes() for path in (data_dir / "MNIST" / "raw").iterdir()
    } == small_mnist()


def test_download_of_the_missing_file_alone(mnist, mirror):
    raw = mnist / "MNIST" / "raw"
    before = snapshot(raw)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    load_data("mnist", mnist)
    after = snapshot(raw)
    assert after.keys() == before.keys()
    assert {path.name for path in before if after[path] != before[path]} == {
        "raw",
        "t10k-labels-idx1-ubyte",
    }


def test_archives_brought_by_hand(tmp_path, mirror, no_network):
    write(tmp_path, mirror)
    assert load_data("auto", tmp_path)[0].name == "mnist"


@pytest.mark.parametrize("failure", ["cut short", "another file", "hangs"])
def test_failed_download_leaves_nothing(tmp_path, mirror, monkeypatch, failure):
    monkeypatch.setattr(dataprocess, "DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr("socket.getdefaulttimeout", lambda: 123)
    set_to = []
    monkeypatch.setattr(
        "socket.setdefaulttimeout",
        lambda seconds, original=socket.setdefaulttimeout: (
            set_to.append(seconds),
            original(seconds),
        ),
    )
    name = "t10k-labels-idx1-ubyte.gz"  # the last: three have arrived when it fails
    mirror[name] = {
        "cut short": mirror[name][:-5],
        "another file": gzip.compress(b"html"),
        "hangs": None,
    }[failure]
    try:
        train, _ = load_data("auto", tmp_path, train_size=10, test_size=10)
    finally:
        socket.setdefaulttimeout(None)
    assert train.name == "glyphs" and train.warning
    assert set_to[:2] == [0.3, 123]
    assert [
        path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith("download")
    ] == []


def test_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(root, download):
        (Path(root) / "MNIST" / "raw" / FILES[0]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets, "MNIST", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_data("auto", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert socket.getdefaulttimeout() is None


def test_auto_goes_on_with_glyphs_and_says_so(tmp_path, no_network, capfd):
    train, test = load_data("auto", tmp_path / "data", train_size=20, test_size=20)
    assert (train.name, test.name) == ("glyphs", "glyphs")
    lines = train.warning.splitlines()
    assert len(lines) > 4 and set(lines[0]) == set(lines[-1]) == {"*"}
    text = " ".join(line.strip("* ") for line in lines)
    assert (
        "NOT MNIST" in text
        and "no route to host" in text
        and str(tmp_path / "data" / "MNIST" / "raw") in text
    )
    assert all(name in text for name in FILES)
    assert capfd.readouterr() == ("", "")  # to print it is for the caller


# Glyphs


@pytest.fixture(scope="module")
def glyphs():
    return load_data("glyphs", "/nowhere", image_size=28, channels=1, augment=False)


def test_glyphs_are_like_mnist(glyphs):
    for images, n in zip(glyphs, (20_000, 2_000), strict=True):
        assert (images.name, images.num_classes, images.warning) == ("glyphs", 10, None)
        assert images.images.shape == (n, 28, 28) and images.images.dtype == torch.uint8
        assert images.labels.shape == (n,) and images.labels.dtype == torch.int64
        assert images.labels.bincount().tolist() == [n // 10] * 10
        assert sorted(images.labels[:10].tolist()) == list(range(10))
        assert images.labels[:10].tolist() != images.labels[10:20].tolist()
        x = images.images.float() / 255
        assert 0.08 < x.mean() < 0.25  # of MNIST: 0.13
        assert (x.amax((1, 2)) > 0.4).all()
        assert (x[:, [0, -1]] == 0).float().mean() > 0.99  # nothing is cut off at the edges
        assert x[:, 4:24, 4:24].sum() > 0.95 * x.sum()


def test_glyphs_are_deterministic_and_leave_the_global_state_alone(glyphs):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fewer = load_data("glyphs", image_size=28, train_size=1234, test_size=5, seed=7)
    assert [len(images) for images in fewer] == [1234, 5]
    for again, images in zip(fewer, glyphs, strict=True):
        assert torch.equal(again.images, images.images[: len(again)])
        assert torch.equal(again.labels, images.labels[: len(again)])
    assert torch.equal(torch.get_rng_state(), before)


def test_glyphs_of_training_and_test_differ(glyphs):
    train, test = ({image.tobytes() for image in images.images.numpy()} for images in glyphs)
    assert len(train) > 19_990 and not train & test


def test_glyphs_are_legible(glyphs):
    (x, y), (x_test, y_test) = (images.batch(slice(0, 6000)) for images in glyphs)
    nearest = torch.cdist(x_test.flatten(1), x.flatten(1)).argmin(1)
    accuracy = (y[nearest] == y_test).float().mean()
    assert accuracy > 0.95, accuracy  # MNIST gives its nearest neighbours 0.91


def test_each_font_draws_ten_digits():
    bank = dataprocess._glyph_bank().flatten(2)  # (fonts * strokes, 10, pixels)
    assert (bank.amax(2) > 0.5).all()
    assert (torch.cdist(bank, bank) + 99 * torch.eye(10)).min() > 3
    # The same digit of two fonts is more alike than two digits are: no font draws symbols, or boxes, in their place.
    mean = bank.mean(0)
    assert (
        torch.cdist(bank.flatten(0, 1), mean).argmin(1).view(-1, 10) == torch.arange(10)
    ).double().mean() > 0.9


def test_glyphs_are_resized():
    train, test = load_data("glyphs", train_size=30, test_size=10)
    assert train.images.shape == (30, 32, 32) and test.images.shape == (10, 32, 32)
    assert train.batch([0])[0].shape == (1, 3, 32, 32)


def test_clusters_gather_what_is_alike_whatever_its_label():
    """Four kinds of pictures, of which one is rare."""
    torch.manual_seed(0)
    kinds = torch.tensor([0] * 100 + [1] * 60 + [2] * 30 + [3] * 10)[torch.randperm(200)]
    shapes = torch.zeros(4, 32, 32)
    shapes[0, :16], shapes[1, 16:], shapes[2, :, :16], shapes[3, :, 16:] = 200, 200, 200, 200
    images = (shapes[kinds] + 40 * torch.rand(200, 32, 32)).byte()
    split = Images("glyphs", images, torch.arange(200) % 10, seed=3)
    shares = split.use_clusters(4)
    x0, y = split.batch(slice(None))
    assert torch.equal(y, split.y) and torch.equal(split.labels, torch.arange(200) % 10)
    assert torch.equal(split.batch([5, 7])[1], y[[5, 7]])
    for kind in range(4):
        assert len(y[kinds == kind].unique()) == 1, "one kind, one cluster"
    assert len(y.unique()) == 4 and sorted(shares) == pytest.approx([0.05, 0.15, 0.3, 0.5])
    assert shares == pytest.approx((y.bincount(minlength=4) / 200).tolist())
    again, other = (Images("glyphs", images, torch.zeros(200).long(), seed=seed) for seed in (3, 4))
    assert again.use_clusters(4) == shares and torch.equal(again.y, y)
    other.use_clusters(4)
    assert not torch.equal(other.y, y)


def test_no_cluster_more_than_images_and_none_of_no_number():
    split = Images("glyphs", torch.zeros(5, 32, 32, dtype=torch.uint8), torch.arange(5))
    assert sum(split.use_clusters(5)) == pytest.approx(1)  # equal images: four clusters stay empty
    for k in (0, 6, 2.5, True, None):
        with pytest.raises(ValueError, match="num_clusters .*expected"):
            split.use_clusters(k)
