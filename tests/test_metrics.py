"""The measures of samples: closed forms, and what each of them must and must not notice."""

import numpy as np
import pytest
import torch
from conftest import DATA_DIR
from PIL import Image

import metrics
from dataprocess import load_data


def gaussian(n, mean, cov, seed=0):
    """n points whose mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(dim=0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return x @ torch.linalg.cholesky(cov).T + mean


def random_cov(dim, seed):
    a = torch.randn(dim, 2 * dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / dim


# Fréchet distance


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
    a, b = gaussian(50, torch.zeros(6).double(), cov_a), gaussian(60, torch.ones(6).double(), cov_b, seed=1)
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
    assert metrics.frechet_distance(torch.cat([x, dead], 1), torch.cat([y, dead], 1)) == pytest.approx(alive, rel=1e-6)


@pytest.mark.parametrize("n", [2, 8])
def test_too_few_images_for_a_covariance_are_refused(n):
    with pytest.raises(ValueError, match=rf"^{n} images.*at least 9$"):
        metrics.frechet_distance(torch.randn(n, 8), torch.randn(100, 8))
    assert metrics.frechet_distance(torch.randn(9, 8), torch.randn(100, 8)) > 0


# Precision and recall


def test_precision_and_recall_of_points_on_a_line():
    """Counted by hand, k = 1: radii are the distances to the nearest other point of the same set."""
    real = torch.tensor([[0.0], [1.0], [10.0], [12.0]])  # radii 1, 1, 2, 2: among them are [-1, 2] and [8, 14]
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
        (torch.cdist(samples, real) <= d).any(dim=1).double().mean().item(), abs=0.002)
    with pytest.raises(ValueError, match="^3 images: expected at least 4"):
        metrics.precision_recall(samples[:3], real)


# Nearest images


def test_nearest_finds_copies_and_measures_grey_levels():
    generator = torch.Generator().manual_seed(0)
    others = torch.randint(256, (700, 32, 32), generator=generator, dtype=torch.uint8)
    picked = torch.randint(700, (600,), generator=generator)
    distance, index = metrics.nearest(others[picked], others)
    assert torch.equal(index, picked) and torch.equal(distance, torch.zeros(600, dtype=torch.float64))
    brighter = others[picked].clamp(max=245) + 10
    distance, index = metrics.nearest(brighter[:, None].expand(-1, 3, -1, -1), others.clamp(max=245))
    assert torch.equal(index, picked) and torch.allclose(distance, torch.full((600,), 10.0).double(), atol=1e-3)


def test_nearest_counts_brightness_by_hand():
    images, others = (torch.tensor(levels, dtype=torch.uint8)[:, None, None].expand(-1, 32, 32)
                      for levels in ([10, 70, 130, 200], [0, 30, 90, 160, 255]))
    distance, index = metrics.nearest(images, others)
    assert index.tolist() == [0, 2, 3, 3]
    assert torch.allclose(distance, torch.tensor([10.0, 20, 30, 40]).double(), atol=1e-4)


# The classifier


@pytest.fixture(scope="module")
def mnist(data_flags):
    return load_data(data_flags[1], DATA_DIR, train_size=6000, test_size=1000, augment=False)


@pytest.fixture(scope="module")
def classifier(mnist):
    return metrics.train_classifier(mnist[0].images, mnist[0].labels, epochs=1)


def test_the_classifier_learns_to_read(classifier, mnist):
    """47 steps; the whole of the data and five epochs are for --evaluate, not for tests."""
    assert classifier.accuracy(mnist[1].images, mnist[1].labels) > 0.9
    assert not classifier.training


def test_a_seed_decides_the_classifier_to_the_bit_and_leaves_the_callers_randomness_alone(mnist):
    images, labels = mnist[0].images[:300], mnist[0].labels[:300]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = metrics.train_classifier(images, labels, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    b = metrics.train_classifier(images, labels, epochs=1)
    other = metrics.train_classifier(images, labels, epochs=1, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.head.weight, other.head.weight)


def test_the_classifier_is_kept_under_a_hash_of_its_data(mnist, tmp_path, monkeypatch):
    images, labels = mnist[0].images[:200], mnist[0].labels[:200]
    first = metrics.load_classifier(images, labels, tmp_path)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "train_classifier", None)  # a second training would fail
        again = metrics.load_classifier(images, labels, tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(first.state_dict().values(), again.state_dict().values()))
    assert not again.training
    metrics.load_classifier(images, 9 - labels, tmp_path)
    metrics.load_classifier(255 - images, labels, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    path.write_bytes(path.read_bytes()[:1000])  # a damaged one is made anew
    mended = metrics.load_classifier(images, labels, tmp_path)
    assert torch.equal(mended.head.weight, first.head.weight)


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
    assert (classifier.read(small.images)[1].argmax(1) == probabilities.argmax(1)).double().mean() > 0.9
    with pytest.raises(ValueError, match="float32.*expected uint8"):
        classifier.read(images.float())


# The measures together


def measured(classifier, mnist, samples, labels=None):
    return metrics.measure(classifier, samples, mnist[0].images, mnist[1].images, labels)[0]


@pytest.fixture(scope="module")
def real(classifier, mnist):
    """What 800 real digits measure that are in neither of the sets that they are compared with."""
    more = load_data(mnist[0].name, DATA_DIR, train_size=7000, augment=False)[0]
    samples, labels = more.images[6000:6800], more.labels[6000:6800]
    return samples, labels, measured(classifier, mnist, samples, labels)


def test_real_digits_measure_as_real(classifier, mnist, real):
    samples, _, report = real
    features, features_test = (classifier.read(images)[0] for images in (samples, mnist[1].images))
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


def test_mode_collapse_moves_recall_balance_and_distance_alone(classifier, mnist, real):
    samples, labels, before = real
    ones = samples[labels == 1].repeat(20, 1, 1)[:800]
    report = measured(classifier, mnist, ones)
    assert report["recall"] < 0.3 and max(report["digits"]) > 0.9
    assert report["frechet"] > 20 * before["frechet"]
    assert report["precision"] > 0.6 and report["confidence"] > before["confidence"] - 0.05


def test_noise_moves_precision_and_distance(classifier, mnist, real):
    samples, labels, before = real
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, samples.shape, generator=generator, dtype=torch.uint8)
    report = measured(classifier, mnist, noise, labels)
    assert report["frechet"] > 20 * before["frechet"] and report["precision"] < 0.1 and report["accuracy"] < 0.3
    assert report["nearest"] > 2 * before["nearest"] and report["copies"] == 0


def test_colour_is_noticed_where_the_grey_is_right(classifier, mnist, real):
    samples, _, before = real
    shift = torch.tensor([20, 0, -20])[None, :, None, None]
    coloured = (samples[:, None].clamp(20, 235) + shift).byte()
    assert measured(classifier, mnist, coloured)["colour"] == pytest.approx(20 * (2 / 3) ** 0.5, rel=1e-6)


def test_copies_of_training_images_move_what_tells_of_memory_and_nothing_else(classifier, mnist, real):
    _, _, before = real
    copies = mnist[0].images[1000:1800]
    report = measured(classifier, mnist, copies)
    assert report["copies"] == 1 and report["nearest"] == 0
    assert report["frechet"] < 2 * before["frechet"] and report["precision"] > before["precision"] - 0.05


def test_duplicates_move_recall(classifier, mnist, real):
    samples, _, before = real
    report = measured(classifier, mnist, samples[:80].repeat(10, 1, 1))
    assert report["recall"] < before["recall"] / 2
    assert report["copies"] < 0.05


def test_labels_swapped_move_accuracy_alone(classifier, mnist, real):
    samples, labels, before = real
    report = measured(classifier, mnist, samples, 9 - labels)
    assert report.pop("accuracy") < 0.1
    assert report == {name: value for name, value in before.items() if name != "accuracy"}


def test_the_pairs_are_the_samples_nearest_to_training_images_each_with_its_neighbour(classifier, mnist, real):
    samples = real[0].clone()
    samples[17] = mnist[0].images[3]
    _, pairs = metrics.measure(classifier, samples, mnist[0].images, mnist[1].images)
    assert pairs.shape == (20, 1, 32, 32) and pairs.dtype == torch.uint8
    assert torch.equal(pairs[0, 0], samples[17]) and torch.equal(pairs[1, 0], mnist[0].images[3])
    distances = (pairs[::2].double() - pairs[1::2].double()).square().mean(dim=(1, 2, 3)).sqrt()
    assert torch.equal(distances, distances.sort().values)


def test_the_short_measure_has_the_same_distance(classifier, mnist, real):
    short, pairs = metrics.measure(classifier, real[0], mnist[0].images, mnist[1].images, frechet_only=True)
    assert pairs is None and short == {name: real[2][name] for name in ("samples", "frechet", "frechet_real")}


def test_more_samples_than_real_images_are_refused(classifier, mnist):
    with pytest.raises(ValueError, match="1001 samples: expected at most 1000, the number of test images"):
        measured(classifier, mnist, mnist[0].images[:1001])


# Folders of PNGs


def test_a_folder_of_pngs_comes_back_as_it_was_written(tmp_path):
    images = torch.randint(256, (12, 3, 8, 10), dtype=torch.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:03}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert torch.equal(metrics.read_folder(tmp_path), images)
    Image.fromarray(images[0, 0].numpy()).save(tmp_path / "000.png")  # grey
    assert torch.equal(metrics.read_folder(tmp_path)[0], images[0, :1].expand(3, -1, -1))


def test_a_folder_that_cannot_be_measured_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="there is no PNG in it$"):
        metrics.read_folder(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder$"):
        metrics.read_folder(tmp_path / "missing")
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    Image.new("L", (28, 32)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png: 28x32 pixels; expected 32x32, as of a.png$"):
        metrics.read_folder(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="b.png: not a readable PNG"):
        metrics.read_folder(tmp_path)
