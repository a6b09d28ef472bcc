"""The measures of samples: closed forms, and what each of them must and must not notice."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA_DIR
from PIL import Image, PngImagePlugin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import metrics
from dataprocess import load_data
from support.png import read_folder


def gaussian(n, mean, cov, seed=0):
    """n points whose mean and covariance are exactly these."""
    x = torch.randn(
        n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x = x - x.mean(dim=0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return x @ torch.linalg.cholesky(cov).T + mean


def random_cov(dim, seed):
    a = torch.randn(
        dim, 2 * dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return a @ a.T / dim


def test_frechet_distance_of_gaussians_with_covariances_that_commute():
    """|m_a - m_b|^2 + sum over axes of the squared difference of standard deviations."""
    mean_a, mean_b = torch.tensor([0.0, 1, 2, 3]).double(), torch.tensor([1.0, 1, 0, 5]).double()
    std_a, std_b = torch.tensor([1.0, 2, 0.5, 3]).double(), torch.tensor([2.0, 1, 0.5, 4]).double()
    turn = torch.linalg.qr(random_cov(4, 0)).Q  # both in the same rotated axes
    a = gaussian(50, mean_a, turn @ torch.diag(std_a**2) @ turn.T)
    b = gaussian(70, mean_b, turn @ torch.diag(std_b**2) @ turn.T, seed=1)
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_gaussians_in_general():
    """tr (C_a C_b)^1/2 by the eigenvalues of the product itself, which is not symmetric."""
    cov_a, cov_b = random_cov(6, 0), random_cov(6, 1)
    a, b = (
        gaussian(50, torch.zeros(6).double(), cov_a),
        gaussian(60, torch.ones(6).double(), cov_b, seed=1),
    )
    overlap = np.sqrt(np.linalg.eigvals((cov_a @ cov_b).numpy()).real).sum()
    expected = 6 + cov_a.trace().item() + cov_b.trace().item() - 2 * overlap
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x = torch.randn(100, 8)
    assert metrics.frechet_distance(x, x.flip(0)) < 1e-9


def test_frechet_distance_of_features_that_never_move():
    """A dead feature makes a covariance singular, which does no harm."""
    x, y = torch.randn(100, 3).double(), torch.randn(100, 3).double()
    dead = torch.zeros(100, 1).double()
    alive = metrics.frechet_distance(x, y)
    assert metrics.frechet_distance(
        torch.cat([x, dead], 1), torch.cat([y, dead], 1)
    ) == pytest.approx(alive, rel=1e-6)


@pytest.mark.parametrize("n", [2, 8])
def test_too_few_images_for_a_covariance_are_refused(n):
    with pytest.raises(ValueError, match=rf"^{n} images.*at least 9$"):
        metrics.frechet_distance(torch.randn(n, 8), torch.randn(100, 8))
    assert metrics.frechet_distance(torch.randn(9, 8), torch.randn(100, 8)) > 0


def test_precision_and_recall_of_points_on_a_line():
    """Counted by hand, k = 1: radii are the distances to the nearest other point of the same set."""
    real = torch.tensor(
        [[0.0], [1.0], [10.0], [12.0]]
    )  # radii 1, 1, 2, 2: among them are [-1, 2] and [8, 14]
    samples = torch.tensor([[-1.5], [1.5], [9.0], [30.0]])  # radii 3, 3, 7.5, 21
    # Of the samples 1.5 and 9 lie among the real; [-4.5, 4.5], [1.5, 16.5] and [9, 51] hold all of the real.
    assert metrics.precision_recall(samples, real, k=1) == (0.5, 1.0)
    assert metrics.precision_recall(real, samples, k=1) == (1.0, 0.5)


def test_precision_and_recall_of_identical_sets_are_one():
    x = torch.randn(60, 5).double()
    assert metrics.precision_recall(x, x.flip(0)) == (1.0, 1.0)


def test_precision_notices_what_is_not_real_and_recall_what_is_missing():
    torch.manual_seed(0)
    left, right = torch.randn(2, 300, 4).double()
    real = torch.cat([left[:150], right[:150] + 100])
    collapsed = left[150:], torch.cat([left[150:], right[150:] + 100, torch.randn(300, 4) - 100])
    precision, recall = metrics.precision_recall(collapsed[0], real)
    assert precision > 0.8 and recall < 0.5
    precision, recall = metrics.precision_recall(collapsed[1], real)
    assert precision < 0.51 and recall > 0.8


def test_precision_and_recall_do_not_depend_on_the_parts_they_are_computed_in():
    torch.manual_seed(0)
    samples, real = torch.randn(1500, 3).double(), torch.randn(1500, 3).double() * 1.1
    d = torch.cdist(real, real).sort(dim=1).values[:, 3]
    assert metrics.precision_recall(samples, real)[0] == pytest.approx(
        (torch.cdist(samples, real) <= d).any(dim=1).double().mean().item(), abs=0.002
    )
    with pytest.raises(ValueError, match="^3 images: expected at least 4"):
        metrics.precision_recall(samples[:3], real)


def test_nearest_finds_copies_and_measures_grey_levels():
    generator = torch.Generator().manual_seed(0)
    others = torch.randint(256, (700, 32, 32), generator=generator, dtype=torch.uint8)
    picked = torch.randint(700, (600,), generator=generator)
    distance, index = metrics.nearest(others[picked], others)
    assert torch.equal(index, picked) and torch.equal(
        distance, torch.zeros(600, dtype=torch.float64)
    )
    brighter = others[picked].clamp(max=245) + 10
    distance, index = metrics.nearest(
        brighter[:, None].expand(-1, 3, -1, -1), others.clamp(max=245)
    )
    assert torch.equal(index, picked) and torch.allclose(
        distance, torch.full((600,), 10.0).double(), atol=1e-3
    )


def test_nearest_counts_brightness_by_hand():
    images, others = (
        torch.tensor(levels, dtype=torch.uint8)[:, None, None].expand(-1, 32, 32)
        for levels in ([10, 70, 130, 200], [0, 30, 90, 160, 255])
    )
    distance, index = metrics.nearest(images, others)
    assert index.tolist() == [0, 2, 3, 3]
    assert torch.allclose(distance, torch.tensor([10.0, 20, 30, 40]).double(), atol=1e-4)


# The classifier


@pytest.fixture(scope="module")
def mnist(data_flags):
    return load_data(data_flags[1], DATA_DIR, train_size=6000, test_size=1000, augment=False)


@pytest.fixture(scope="module")
def classifier(mnist):
    """The one in assets/, or for glyphs one that is trained for a few seconds."""
    if mnist[0].name == "glyphs":
        return metrics.train_classifier(mnist[0].images, mnist[0].labels, epochs=2)
    return metrics.load_classifier("mnist", mnist[0].images, mnist[0].labels, "unused")


class Remembering:
    """The classifier, which reads the same images once: most tests of `measure` have the same real ones."""

    def __init__(self, classifier):
        self.classifier, self.found = classifier, {}

    def read(self, images):
        key = images.dtype, images.shape, images.numpy().tobytes()
        if key not in self.found:
            self.found[key] = self.classifier.read(images)
        return [x.clone() for x in self.found[key]]


@pytest.fixture(scope="module")
def remembering(classifier):
    return Remembering(classifier)


def test_a_classifier_learns_to_read(mnist):
    """24 steps, after which the accuracy still rises fast: 16 give 0.62. More are for --evaluate, not for tests."""
    classifier = metrics.train_classifier(mnist[0].images[:3000], mnist[0].labels[:3000], epochs=1)
    assert classifier.accuracy(mnist[1].images, mnist[1].labels) > 0.8
    assert not classifier.training


def test_a_seed_decides_the_classifier_to_the_bit_and_leaves_the_callers_randomness_alone(mnist):
    images, labels = mnist[0].images[:130], mnist[0].labels[:130]  # two batches
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = metrics.train_classifier(images, labels, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    b = metrics.train_classifier(images, labels, epochs=1)
    other = metrics.train_classifier(images, labels, epochs=1, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.head.weight, other.head.weight)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_the_classifier_is_kept_under_a_hash_of_its_data(mnist, tmp_path, monkeypatch):
    images, labels = mnist[0].images[:40], mnist[0].labels[:40]
    first = metrics.load_classifier("glyphs", images, labels, tmp_path)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "train_classifier", None)  # a second training would fail
        again = metrics.load_classifier("glyphs", images, labels, tmp_path)
    assert same(first, again) and not again.training
    metrics.load_classifier("glyphs", images, 9 - labels, tmp_path)
    metrics.load_classifier("glyphs", 255 - images, labels, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 64  # torch loads this as other weights
    for damaged in (whole[:1000], flipped):  # it is made anew
        path.write_bytes(damaged)
        assert same(first, metrics.load_classifier("glyphs", images, labels, tmp_path))


def broken(*args):
    raise RuntimeError("unexpected pos\nframe #0")


def read_only(*args, **options):
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(
    "kind, patch, why",
    [
        ("broken", (torch, "save", broken), "unexpected pos"),
        ("no folder", (Path, "mkdir", read_only), "Read-only"),
        ("not replaced", (os, "replace", read_only), "Read-only"),
        ("a folder in its place", None, "irectory"),
    ],
)
def test_a_classifier_that_cannot_be_saved_is_used_all_the_same(
    kind, patch, why, mnist, tmp_path, monkeypatch, capsys
):
    images, labels = mnist[0].images[:20], mnist[0].labels[:20]
    first = metrics.load_classifier("glyphs", images, labels, tmp_path / "made" / "with its folder")
    (path,) = tmp_path.glob("made/*/*.pt")
    path.unlink()
    if kind == "a folder in its place":
        path.mkdir()
    if patch:
        monkeypatch.setattr(*patch)
    classifier = metrics.load_classifier("glyphs", images, labels, path.parent)
    monkeypatch.undo()
    assert same(classifier, first) and not classifier.training
    *training, line = capsys.readouterr().err.splitlines()
    assert len(training) == 2 and all(
        "training the classifier that measures glyphs" in text for text in training
    )
    assert "this run uses its classifier all the same" in line and why in line
    assert list(path.parent.iterdir()) == [path] * path.is_dir()


@pytest.fixture
def real_mnist(data_flags):
    if "glyphs" in data_flags:
        pytest.skip("the classifier in assets/ knows MNIST")
    return load_data("mnist", DATA_DIR, augment=False)


def test_the_classifier_of_mnist_reads_it_and_gives_real_digits_the_figures_of_every_machine(
    real_mnist, tmp_path
):
    """Its weights are in the repository, so the figures are those of the README: python train_eval.py --evaluate."""
    train, test = real_mnist
    classifier = metrics.load_classifier("mnist", train.images[:5], train.labels[:5], tmp_path)
    assert (
        not list(tmp_path.iterdir())
        and classifier.name == "mnist-dd150293"
        and not classifier.training
    )
    assert {value.dtype for value in classifier.state_dict().values()} == {
        torch.float32,
        torch.int64,
    }
    features, probabilities = classifier.read(test.images)
    assert (probabilities.argmax(dim=1) == test.labels).double().mean() == pytest.approx(
        0.9967, abs=1e-4
    )
    generator = torch.Generator().manual_seed(0)  # as metrics.measure picks them
    index, index_test = (
        torch.randperm(len(split), generator=generator)[:2000] for split in real_mnist
    )
    real, _ = classifier.read(train.images[index])
    assert metrics.frechet_distance(real, features) == pytest.approx(0.1571, abs=2e-4)
    assert metrics.precision_recall(real, features[index_test]) == pytest.approx(
        (0.881, 0.907), abs=1.1e-3
    )


def test_other_images_and_other_weights_have_other_names(mnist, tmp_path):
    images, labels = mnist[0].images[:20], mnist[0].labels[:20]
    names = {
        metrics.load_classifier(dataset, x, labels, tmp_path).name
        for dataset, x in (
            ("glyphs", images),
            ("kmnist", images),
            ("glyphs", 255 - images),
            ("mnist", images),
        )
    }
    assert len(names) == 4 and {name.partition("-")[0] for name in names} == {
        "glyphs",
        "kmnist",
        "mnist",
    }


def test_a_damaged_classifier_of_mnist_is_an_error_and_not_trained_anew(
    mnist, tmp_path, monkeypatch
):
    whole = metrics.MNIST_CLASSIFIER.read_bytes()
    for name, content in (
        ("missing", None),
        ("cut", whole[:9000]),
        ("flipped", whole[:9000] + b"!" + whole[9001:]),
    ):
        monkeypatch.setattr(metrics, "MNIST_CLASSIFIER", tmp_path / name)
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            metrics.load_classifier("mnist", mnist[0].images, mnist[0].labels, tmp_path)


def test_measuring_takes_no_random_numbers_from_training(mnist, tmp_path):
    images, labels = mnist[0].images[:20], mnist[0].labels[:20]
    before = torch.get_rng_state()
    for _ in range(2):  # trained, then loaded
        metrics.load_classifier("glyphs", images, labels, tmp_path)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_classes", [1, 4, 10, 26])
def test_the_labels_decide_the_number_of_classes(num_classes, mnist, tmp_path):
    images, labels = mnist[0].images[:70], torch.arange(70) % num_classes
    metrics.load_classifier("glyphs", images, labels, tmp_path)
    classifier = metrics.load_classifier("glyphs", images, labels, tmp_path)
    report, _ = metrics.measure(classifier, images, images, images)
    assert (
        len(report["digits"])
        == len(report["digits_real"])
        == num_classes
        == classifier.head.out_features
    )


def test_what_the_classifier_sees_does_not_depend_on_batches_colours_or_size(classifier, mnist):
    images = mnist[1].images[:50]
    features, probabilities = classifier.train().read(images)  # without dropout all the same
    assert features.shape == (50, 64) and features.dtype == torch.float64
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(50).double())
    for other, size in ((images, 7), (images[:, None].expand(-1, 3, -1, -1), 50)):
        other_features, other_probabilities = classifier.read(other, batch_size=size)
        assert torch.allclose(features, other_features, atol=1e-4)
        assert torch.allclose(probabilities, other_probabilities, atol=1e-5)
    red = torch.stack([images // 3 * 3, images * 0, images * 0], dim=1)  # a third as bright
    assert torch.allclose(classifier.read(red)[0], classifier.read(images // 3)[0], atol=1e-4)
    small = load_data(mnist[1].name, DATA_DIR, image_size=28, test_size=50)[1]
    assert (
        classifier.read(small.images)[1].argmax(1) == probabilities.argmax(1)
    ).double().mean() > 0.9
    with pytest.raises(ValueError, match="float32.*expected a tensor of uint8"):
        classifier.read(images.float())


# The measures together


def measured(classifier, mnist, samples, labels=None):
    return metrics.measure(classifier, samples, mnist[0].images, mnist[1].images, labels)[0]


@pytest.fixture(scope="module")
def real(remembering, mnist):
    """What 800 real digits measure that are in neither of the sets that they are compared with."""
    more = load_data(mnist[0].name, DATA_DIR, train_size=7000, augment=False)[0]
    samples, labels = more.images[6000:6800], more.labels[6000:6800]
    return samples, labels, measured(remembering, mnist, samples, labels)


def test_real_digits_measure_as_real(remembering, mnist, real):
    samples, _, report = real
    features, features_test = (remembering.read(images)[0] for images in (samples, mnist[1].images))
    assert report["frechet"] == metrics.frechet_distance(features, features_test)
    assert report["frechet"] < 2 * report["frechet_real"]
    assert report["precision"] > 0.7 and report["recall"] > 0.7
    assert report["precision"] == pytest.approx(report["precision_real"], abs=0.06)
    assert report["confidence"] == pytest.approx(report["confidence_real"], abs=0.03)
    assert report["accuracy"] > 0.9
    assert sum(report["digits"]) == pytest.approx(1) and max(report["digits"]) < 0.15
    assert report["colour"] == 0
    assert report["nearest"] == pytest.approx(report["nearest_real"], rel=0.1)
    assert report["copies"] < 0.04


def test_mode_collapse_moves_recall_balance_and_distance_alone(remembering, mnist, real):
    samples, labels, before = real
    ones = samples[labels == 1].repeat(20, 1, 1)[:800]
    report = measured(remembering, mnist, ones)
    assert report["recall"] < 0.3 and max(report["digits"]) > 0.9
    assert report["frechet"] > 20 * before["frechet"]
    assert report["precision"] > 0.6 and report["confidence"] > before["confidence"] - 0.05


def test_noise_moves_precision_and_distance(remembering, mnist, real):
    samples, labels, before = real
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, samples.shape, generator=generator, dtype=torch.uint8)
    report = measured(remembering, mnist, ((samples.float() + noise.float()) / 2).byte(), labels)
    assert (
        report["frechet"] > 20 * before["frechet"]
        and report["precision"] < 0.1
        and report["accuracy"] < 0.3
    )
    report = measured(
        remembering, mnist, noise, labels
    )  # alone it lies near an odd test digit: precision may be high
    assert (
        report["frechet"] > 20 * before["frechet"]
        and report["recall"] < 0.1
        and report["accuracy"] < 0.3
    )
    assert report["nearest"] > 2 * before["nearest"] and report["copies"] == 0


def test_colour_is_noticed_where_the_grey_is_right(remembering, mnist, real):
    samples, _, before = real
    shift = torch.tensor([20, 0, -20])[None, :, None, None]
    coloured = (samples[:, None].clamp(20, 235) + shift).byte()
    assert measured(remembering, mnist, coloured)["colour"] == pytest.approx(
        20 * (2 / 3) ** 0.5, rel=1e-6
    )


def test_copies_of_training_images_move_what_tells_of_memory_and_nothing_else(
    remembering, mnist, real
):
    _, _, before = real
    copies = mnist[0].images[1000:1800]
    report = measured(remembering, mnist, copies)
    assert report["copies"] == 1 and report["nearest"] == 0
    assert (
        report["frechet"] < 2 * before["frechet"]
        and report["precision"] > before["precision"] - 0.05
    )


def test_duplicates_move_recall(remembering, mnist, real):
    samples, _, before = real
    report = measured(remembering, mnist, samples[:80].repeat(10, 1, 1))
    assert report["recall"] < before["recall"] / 2
    assert report["copies"] < 0.05


def test_labels_swapped_move_accuracy_alone(remembering, mnist, real):
    samples, labels, before = real
    report = measured(remembering, mnist, samples, 9 - labels)
    assert report.pop("accuracy") < 0.1
    assert report == {name: value for name, value in before.items() if name != "accuracy"}


def test_the_pairs_are_the_samples_nearest_to_training_images_each_with_its_neighbour(
    remembering, mnist, real
):
    samples = real[0].clone()
    samples[17] = mnist[0].images[3]
    _, pairs = metrics.measure(remembering, samples, mnist[0].images, mnist[1].images)
    assert pairs.shape == (20, 1, 32, 32) and pairs.dtype == torch.uint8
    assert torch.equal(pairs[0, 0], samples[17]) and torch.equal(pairs[1, 0], mnist[0].images[3])
    distances = (pairs[::2].double() - pairs[1::2].double()).square().mean(dim=(1, 2, 3)).sqrt()
    assert torch.equal(distances, distances.sort().values)


def test_the_meter_reads_the_real_images_once_and_gives_the_same_distance(
    remembering, mnist, real, monkeypatch
):
    train, test = mnist
    meter = metrics.FrechetMeter(remembering, test, train.few(100))
    every, _ = train.batch(torch.arange(100) * len(train) // 100)
    assert meter.real == pytest.approx(
        metrics.frechet_distance(
            remembering.read(metrics.as_bytes(every[:, :1]))[0], remembering.read(test.images)[0]
        )
    )
    read = []
    monkeypatch.setattr(
        meter.classifier,
        "read",
        lambda x: (read.append(len(x)), Remembering.read(remembering, x))[1],
    )
    assert meter(real[0]) == pytest.approx(real[2]["frechet"]) and read == [len(real[0])]
    assert meter.count_read(real[0], real[1]) == round(real[2]["accuracy"] * len(real[0]))
    assert meter.count_read(real[0] / 127.5 - 1, (real[1] + 1) % 10) < meter.count_read(
        real[0], real[1]
    )


@pytest.mark.parametrize(
    "n, tests, missing",
    [
        (1, 1000, 3),
        (3, 1000, 3),
        (4, 1000, 1),
        (64, 1000, 1),
        (65, 1000, 0),
        (10, 10, 1),
        (64, 64, 1),
        (3, 64, 3),
        (65, 65, 0),
    ],
)
def test_what_few_images_cannot_tell_is_left_out(remembering, mnist, real, n, tests, missing):
    samples, test, images = real[0][:n], mnist[1].images[:tests], mnist[0].images[:300]
    report, pairs = metrics.measure(remembering, samples, images, test, real[1][:n])
    assert set(real[2]) - set(report) == {
        name + suffix
        for name in ("frechet", "precision", "recall")[:missing]
        for suffix in ("", "_real")
    }
    assert pairs.shape == (2 * min(n, 10), 1, 32, 32)


@pytest.mark.parametrize(
    "n, trains, tests, message",
    [
        (0, 99, 99, "^0 samples: expected at least 1$"),
        (0, 0, 0, "^0 samples"),
        (1, 0, 9, "at most 0.* training images"),
        (9, 99, 8, "9 samples: expected at most 8, the number of test"),
        (99, 98, 99, "at most 98.* training images"),
    ],
)
def test_more_samples_than_real_images_are_refused(classifier, mnist, n, trains, tests, message):
    images = mnist[0].images
    with pytest.raises(ValueError, match=message):
        metrics.measure(classifier, images[:n], images[:trains], images[:tests])


# Devices: a mode that plays a GPU, computes on the CPU, and refuses what a GPU refuses


class OnGpu(torch.Tensor):
    __torch_dispatch__ = None  # the mode does it

    def __new__(cls, data):
        self = cls._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), dtype=data.dtype, device="meta"
        )
        self.data_on_cpu = data
        return self


class Gpu(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        gpu = [
            isinstance(x, OnGpu)
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor) and x.ndim
        ]
        assert func is torch.ops.aten._to_copy.default or len({*gpu}) < 2, (
            f"{func}: tensors on two devices"
        )
        here = any(gpu)
        if kwargs.get("device"):
            here, kwargs["device"] = kwargs["device"].type == "meta", torch.device("cpu")
        args, kwargs = tree_map_only(OnGpu, lambda x: x.data_on_cpu, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, OnGpu, result) if here else result


def spread(where, sets):  # a bit for each set: whether it is on the GPU
    return [x.to("meta") if where >> i & 1 else x for i, x in enumerate(sets)]


@pytest.fixture(scope="module")
def on_one_device(classifier, mnist, real):
    """Some samples, training and test images and labels, and what they measure on the CPU."""
    sets = [
        real[0][:70, None].expand(-1, 3, -1, -1),
        mnist[0].images[:200],
        mnist[1].images[:100],
        real[1][:70],
    ]
    with Gpu():
        return sets, metrics.measure(classifier, *sets)


@pytest.mark.parametrize("where", range(1, 16))
def test_images_may_be_on_any_mixture_of_devices(classifier, on_one_device, where):
    sets, (expected, expected_pairs) = on_one_device
    with Gpu():
        report, pairs = metrics.measure(classifier, *spread(where, sets))
    assert report == expected and torch.equal(pairs, expected_pairs)


@pytest.mark.parametrize(
    "function", [metrics.frechet_distance, metrics.precision_recall, metrics.nearest]
)
@pytest.mark.parametrize("where", range(1, 4))
def test_each_measure_takes_any_mixture_of_devices(function, where):
    sets = [torch.rand(40, 5) for _ in "ab"]
    if function is metrics.nearest:
        sets = [(255 * x[:, None]).byte() for x in sets]
    with Gpu():
        with pytest.raises(AssertionError, match="two devices"):
            torch.add(*spread(1, sets))  # so the mode does refuse
        results = [function(*spread(i, sets)) for i in (0, where)]
    assert all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y))
        for x, y in zip(*[x if isinstance(x, tuple) else (x,) for x in results])
    )


# Folders of PNGs, written by hand so that every kind is among them


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(bits, colour, row, *extra, size=None):
    """A PNG of one row, given by its bytes; `extra` chunks come before the pixels."""
    size = size or (len(row) * 8 // (bits * (1, 0, 3, 1, 2, 0, 4)[colour]), 1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)),
        *extra,
        (b"IDAT", zlib.compress(b"\0" + bytes(row))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


def see(*values):
    return b"tRNS", words(*values)


COLOURS = [[1, 2, 3], [40, 50, 60], [70, 80, 90], [255, 0, 9]]
PALETTE = (b"PLTE", bytes(sum(COLOURS, [])))
SEEN = {
    "1": (png(1, 0, b"\xa5"), [255, 0, 255, 0, 0, 255, 0, 255]),
    "L": (png(8, 0, [0, 7, 255]), [0, 7, 255]),
    "L2": (png(2, 0, b"\x1b"), [0, 85, 170, 255]),
    "L4": (png(4, 0, b"\x0f\x3c"), [0, 255, 51, 204]),
    "L16": (png(16, 0, words(0, 128, 129, 257, 32896, 65535)), [0, 0, 1, 1, 128, 255]),
    "LA": (png(8, 4, [9, 255, 8, 255]), [9, 8]),
    "LA16": (png(16, 4, words(514, 65535)), [2]),
    "P1": (png(1, 3, b"\x70", PALETTE), [COLOURS[i] for i in (0, 1, 1, 1, 0, 0, 0, 0)]),
    "P2": (png(2, 3, b"\x1b", PALETTE), COLOURS),
    "P4": (png(4, 3, b"\x32", PALETTE), COLOURS[:1:-1]),
    "P": (png(8, 3, [3, 0], PALETTE), COLOURS[::-3]),
    "RGB": (png(8, 2, sum(COLOURS, [])), COLOURS),
    "RGB16": (png(16, 2, words(257, 514, 65535)), [[1, 2, 255]]),
    "RGBA": (png(8, 6, [1, 2, 3, 255]), COLOURS[:1]),
    "RGBA16": (png(16, 6, words(257, 514, 771, 65535)), COLOURS[:1]),
    # with a tRNS chunk that no pixel matches
    "1 key": (png(1, 0, b"\xff", see(0)), [255] * 8),
    "L2 key": (png(2, 0, b"\x05", see(3)), [0, 0, 85, 85]),
    "L4 key": (png(4, 0, b"\x1f", see(3)), [17, 255]),
    "L key": (png(8, 0, [3, 5], see(4)), [3, 5]),
    "L16 key": (png(16, 0, words(257, 514), see(256)), [1, 2]),
    "RGB key": (png(8, 2, sum(COLOURS, []), see(1, 0, 3)), COLOURS),
    "P index": (png(8, 3, [3, 0], PALETTE, (b"tRNS", b"\xff\0")), COLOURS[::-3]),
    "P indices": (png(8, 3, [3, 0], PALETTE, (b"tRNS", b"\xff\x80\1")), COLOURS[::-3]),
}
TRANSPARENT = {
    "1": png(1, 0, b"\xff", see(1)),
    "L2": png(2, 0, b"\x05", see(1)),
    "L4": png(4, 0, b"\x1e", see(14)),
    "L": png(8, 0, [3, 5], see(5)),
    "I": png(16, 0, words(257, 514), see(514)),
    "RGBA": png(8, 6, [1, 2, 3, 0]),
    "LA": png(8, 4, [9, 255, 8, 254]),
    "(LA|RGBA)16": png(16, 4, words(1, 65000)),
    "RGB": png(8, 2, sum(COLOURS, []), see(255, 0, 9)),
    "RGB16": png(16, 2, words(1, 300, 3), see(1, 300, 3)),
    "P": png(8, 3, [3, 0], PALETTE, (b"tRNS", b"\0")),
    "P2": png(8, 3, [3, 1], PALETTE, (b"tRNS", b"\xff\x80")),
}
GOOD = png(8, 0, [0, 7, 255])
DAMAGED = {
    "empty": b"",
    "text": b"no picture",
    "cut": GOOD[:-24],
    "header": GOOD[:20],
    "header CRC": GOOD[:30] + b"x" + GOOD[31:],
    "pixel CRC": GOOD[:-14] + b"xx" + GOOD[-12:],
    "pixels missing": png(8, 0, [1, 2], size=(3, 9)),
    "not zlib": GOOD[:41] + b"garbage" + GOOD[48:],
    "no size": png(8, 0, [1], size=(0, 0)),
    "bomb": png(8, 0, [1], size=(60000, 60000)),
    "7 bits": png(7, 0, bytes(7)),
    "text bomb": png(8, 0, [1], (b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20)))),
    "no palette": png(8, 3, [1, 2]),
    "bad text": png(8, 0, [1], (b"zTXt", b"a\0\7x")),
    "short tRNS": png(8, 2, [1, 2, 3], (b"tRNS", b"\0")),
    "short pHYs": png(8, 0, [1], (b"pHYs", b"\0")),
    "pipe": lambda path: os.mkfifo(path),
    "link": lambda path: path.symlink_to("missing"),
    "JPEG": lambda path: Image.new("L", (3, 1)).save(path, "JPEG"),
    "GIF": lambda path: Image.new("L", (3, 1)).save(path, "GIF"),
}


@pytest.mark.parametrize("kind", SEEN)
def test_a_png_is_read_as_a_person_sees_it(kind, tmp_path):
    data, pixels = SEEN[kind]
    (tmp_path / "a.png").write_bytes(data)
    (image,), left_out = read_folder(tmp_path)
    assert image.dtype == torch.uint8 and image.shape == (3, 1, len(pixels)) and left_out == []
    assert image[:, 0].T.tolist() == [p if isinstance(p, list) else [p] * 3 for p in pixels]


@pytest.mark.parametrize("kind", [*TRANSPARENT, "animated"])
def test_a_png_without_a_definite_picture_is_refused_in_one_line(kind, tmp_path):
    expected = rf"PNG of mode {kind.rstrip('12346')}\S*: some pixels are transparent.*; save it without transparency$"
    if kind == "animated":
        expected, frames = (
            "PNG of mode L: an animation of 2 frames",
            [Image.new("L", (3, 1), v) for v in (0, 9)],
        )
        frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    else:
        (tmp_path / "a.png").write_bytes(TRANSPARENT[kind])
    with pytest.raises(ValueError, match=rf"^/.*a\.png: {expected}"):
        read_folder(tmp_path)


def test_a_png_of_a_mode_that_pillow_may_learn_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(PngImagePlugin._MODES, (8, 6), ("CMYK", "CMYK"))
    (tmp_path / "a.png").write_bytes(SEEN["RGBA"][0])
    with pytest.raises(ValueError, match=r"^/.*a\.png: PNG of mode CMYK: this mode is unknown"):
        read_folder(tmp_path)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_png_is_refused_in_one_line(kind, tmp_path):
    (tmp_path / "a.png").write_bytes(GOOD)
    make = (
        DAMAGED[kind] if callable(DAMAGED[kind]) else lambda path: path.write_bytes(DAMAGED[kind])
    )
    make(tmp_path / "b.png")
    with pytest.raises(
        ValueError, match=r"^/[^\n]*b\.png: not a readable PNG \([^\n]+\); repair or move it$"
    ):
        read_folder(tmp_path)


def test_a_folder_of_pngs_comes_back_as_it_was_written(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "folder.png").mkdir()
    names = [
        ".hidden.png",
        "A.PNG",
        "a.Png",
        "b.png",
        "deep/er/z.png",
        "deep/y.png",
        "folder.png/x.png",
        "link.png",
    ]
    for i, name in enumerate(names[:-1]):
        (tmp_path / name).write_bytes(png(8, 0, [i]))
    (tmp_path / "link.png").symlink_to("b.png")
    others = [".hidden", "b.png.txt", "deep/notes.txt", "deep/png", "linked", "linked.png"]
    for name in others[:-2]:
        (tmp_path / name).write_text("not an image")
    for name in others[-2:]:
        (tmp_path / name).symlink_to("deep")  # a folder
    images, left_out = read_folder(str(tmp_path))
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 3] and left_out == others


def test_a_folder_that_cannot_be_measured_is_refused_in_one_line(tmp_path, monkeypatch):
    for folder, message in (
        (tmp_path, "there is no PNG in it$"),
        (tmp_path / "missing", "there is no such folder$"),
    ):
        with pytest.raises(ValueError, match=message):
            read_folder(folder)
    (tmp_path / "a.png").write_bytes(png(8, 0, bytes(32)))
    (tmp_path / "b\n.png").write_bytes(png(8, 0, bytes(28)))
    with pytest.raises(
        ValueError, match=r"^'/.*b\\n.png': 28x1 pixels; expected 32x1, the size of a.png$"
    ):
        read_folder(tmp_path)
    monkeypatch.setattr(os, "scandir", read_only)
    with pytest.raises(ValueError, match="^.*not a readable folder"):
        read_folder(tmp_path)
