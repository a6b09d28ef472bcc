"""A folder of one's own images: labels, splits, pixels, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import refused, same

from dataprocess import load_data
from support import folders, machine
from support.folders import has_labels, list_images


def make(folder, *names):
    """Images of these names, of one colour each, of different sizes."""
    for k, name in enumerate(names):
        (path := folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + k % 3, 24), (k, k, 250 - k)).save(path)


def numbered(*patterns, n=12):
    return [pattern.format(k) for pattern in patterns for k in range(n)]


LAYOUTS = {  # files -> names of labels, test images, other files
    "labels": (
        numbered("b/{:02}.png", "A/deep/er/{:02}.jpg") + ["c/1.png", "c/2.PNG", ".x/1.png"],
        (["A", "b", "c"], ["A/deep/er/11.jpg", "b/11.png", "c/2.PNG"], []),
    ),
    "flat": (numbered("{:02}.webp", n=30), ([""], ["27.webp", "28.webp", "29.webp"], [])),
    "one folder": (
        numbered("b/{:02}.png", n=19) + ["a.png"],
        ([""], ["b/17.png", "b/18.png"], []),
    ),
    "train and test": (
        ["train/a/1.png", "train/b/x/1.png", "test/b/1.png", "val/a/1.png", "train/b/.2.png"],
        (["a", "b"], ["test/b/1.png"], ["val/a/1.png"]),
    ),
    "train and val": (
        ["train/a/1.png", "train/b/1.png", "val/b/1.png"],
        ("ab", ["val/b/1.png"], []),
    ),
    "train and test without labels": (
        ["train/1.png", "train/a/2.png", "test/c/1.png"],
        ([""], ["test/c/1.png"], []),
    ),
    "no test": (
        ["train/1.png", "train/2.png", "a/1.png", "a/2.png"],
        (["a", "train"], ["a/2.png", "train/2.png"], []),
    ),
}


@pytest.mark.parametrize("files, expected", LAYOUTS.values(), ids=LAYOUTS)
def test_names_alone_decide_labels_and_splits(tmp_path, files, expected):
    make(tmp_path, *files)
    (tmp_path / "notes.txt").write_text("no image")
    names, train, test, others = list_images(str(tmp_path))
    found = names, [file.as_posix() for file, _ in test], [file.as_posix() for file in others]
    assert found == ([*expected[0]], expected[1], ["notes.txt", *expected[2]])
    visible = {file for file in files if "/." not in f"/{file}"}
    assert {file.as_posix() for file, _ in train} == visible - {*found[1], *found[2]}
    for file, number in train + test:
        assert names == [""] or names[number] in file.parts
    assert has_labels(str(tmp_path)) == (len(names) > 1)


REFUSED = {
    "nothing": ([], "no image is in it"),
    "images beside labels": (["a/1.png", "a/2.png", "b/1.png", "b/2.png", "x.png"], "x.png is in"),
    "a label of the test alone": (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "test/c/1.p"),
    "a single image": (["a/1.png", "b/1.png", "b/2.png"], "a/1.png is alone"),
}


@pytest.mark.parametrize("files, words", REFUSED.values(), ids=REFUSED)
def test_a_folder_that_is_ambiguous_is_one_line(tmp_path, files, words):
    make(tmp_path, *files)
    refused(lambda: load_data(str(tmp_path)), tmp_path, words)
    refused(lambda: load_data(str(tmp_path / "missing")), "missing", "kmnist, cifar10 or a folder")


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, capsys, monkeypatch):
    make(tmp_path, *numbered("{:02}.png", n=19))
    refused(lambda: load_data(str(tmp_path), test_size=1), "two images or more to test")
    for k in range(2):
        (tmp_path / f"0{k}.png").write_bytes(b"\x89PNG")
    refused(lambda: load_data(str(tmp_path)), "2 of 19 are broken images")
    assert "2 left out, since they cannot be read: 0" in capsys.readouterr().out
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 240)
    refused(lambda: load_data(str(tmp_path)), tmp_path, "19 images take 0.0 GB, and this machine")
    refused(lambda: load_data("mnist", image_size=999), "dataset mnist: 60,000 images take 59.9 GB")


def test_pixels_are_as_a_person_sees_them(tmp_path):
    """Each of these is a picture of two halves, one orange, one blue or transparent."""
    image = Image.new("RGB", (64, 64), (200, 40, 10))
    image.paste((0, 0, 255), (32, 0, 64, 64))
    wide, alpha, exif = Image.new("RGB", (128, 64)), image.convert("RGBA"), Image.Exif()
    wide.paste(image, (32, 0))
    alpha.paste((0, 0, 255, 0), (32, 0, 64, 64))
    exif[0x0112] = 6  # turn it clockwise to see it
    fine = dict(quality=100, subsampling=0)
    pictures = {
        "plain.png": (image, {}),
        "cropped.bmp": (wide, {}),
        "palette.gif": (image, {}),
        "turned.jpg": (image.rotate(90), fine | {"exif": exif}),
        "large.jpg": (image.resize((512, 512), Image.NEAREST), fine),
        "cmyk.tif": (image.convert("CMYK"), {}),
        "transparent.png": (alpha, {}),
    }
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / name, **options)
        found = folders._read_image(tmp_path, 8, "RGB", name)
        right = [255] * 3 if "transparent" in name else [0, 0, 255]
        expected = torch.tensor([[200, 40, 10], right])[:, :, None].expand(-1, -1, 8)
        assert found.dtype == torch.uint8 and found.shape == (3, 8, 8)
        assert (found[:, :, [1, 6]].permute(2, 0, 1) - expected).abs().max() < 4, name
    Image.fromarray(np.full((9, 9), 128 * 257, np.uint16)).save(tmp_path / "16.png")
    assert (folders._read_image(tmp_path, 8, "RGB", "16.png") == 128).all()
    grey = folders._read_image(tmp_path, 8, "L", "plain.png")
    assert grey[0, 0, [1, 6]].tolist() == [image.convert("L").getpixel((x, 0)) for x in (1, 60)]


def test_colour_stays_colour_and_every_image_has_its_label(tmp_path, capsys):
    make(tmp_path, *numbered("a/{:02}.png", "b/{:02}.png", "c/{:02}.png", n=30))
    (tmp_path / "b" / "07.png").write_bytes(b"broken")
    train, test = load_data(str(tmp_path), image_size=8, augment=False)
    assert (len(train), len(test), train.num_labels, test.num_labels) == (80, 9, 3, 3)
    assert "1 left out, since they cannot be read: b/07.png\n" in capsys.readouterr().out
    for images in (train, test):
        x0, y = images.batch(slice(None))
        assert images.images.shape[1:] == (3, 8, 8) and same(x0, images.images / 127.5 - 1)
        number = images.images[:, 0, 0, 0]
        assert same(number // 30, y.byte()) and same(images.images[:, 2, 0, 0], 250 - number)
    assert sorted(test.images[:, 0, 0, 0].tolist()) == [
        *range(27, 30),
        *range(57, 60),
        *range(87, 90),
    ]
    few, _ = load_data(str(tmp_path), image_size=8, train_size=12)
    assert same(few.images, train.images[:12]) and len(few.labels.unique()) == few.num_labels == 3
    grey, _ = load_data(str(tmp_path), image_size=8, channels=1)
    assert grey.images.shape == (80, 1, 8, 8) and grey.batch(slice(5))[0].shape == (5, 1, 8, 8)
    for path in tmp_path.rglob("*.png"):
        if path.parent.name != "b":
            Image.open(path).convert("L").save(path)
        else:
            path.unlink()
    grey, _ = load_data(str(tmp_path), image_size=8)
    assert (grey.images.shape[1], grey.batch(slice(5))[0].shape[1], grey.num_labels) == (1, 3, 2)
