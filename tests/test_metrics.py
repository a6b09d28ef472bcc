"""The measures of samples: closed forms, and what each of them must and must not notice."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import same

import metrics
from dataprocess import load_data
from metrics import frechet_distance, load_classifier, measure, nearest, precision_recall


def gaussian(n, mean, cov, seed=0):
    """n points whose mean and covariance are exactly these."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(cov), generator=generator, dtype=torch.float64)
    x = x - x.mean(dim=0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return x @ torch.linalg.cholesky(cov).T + mean


def random_cov(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(dim, 2 * dim, generator=generator, dtype=torch.float64)
    return a @ a.T / dim


def test_frechet_distance_of_gaussians_in_general_is_symmetric():
    """tr (C_a C_b)^1/2 by the eigenvalues of the product itself, which is not symmetric."""
    cov_a, cov_b = random_cov(6, 0), random_cov(6, 1)
    a, b = gaussian(50, 0, cov_a), gaussian(60, 1, cov_b, seed=1)
    overlap = np.sqrt(np.linalg.eigvals((cov_a @ cov_b).numpy()).real).sum()
    expected = 6 + cov_a.trace().item() + cov_b.trace().item() - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_does_not_mind_rounding_or_features_that_never_move():
    torch.manual_seed(0)
    same_sets = [frechet_distance(x, x.flip(0)) for x in torch.randn(20, 100, 8)]
    assert 0 <= min(same_sets) and max(same_sets) < 1e-9
    x, y = torch.randn(2, 100, 8)
    dead = torch.zeros(100, 1)
    expected = pytest.approx(frechet_distance(x, y), rel=1e-6)
    assert frechet_distance(torch.cat([x, dead], 1), torch.cat([y, dead], 1)) == expected
    assert frechet_distance(x[:9], y) > 0  # the fewest that are taken


def test_precision_and_recall_of_points_on_a_line_are_those_counted_by_hand():
    """With k = 1, radii are the distances to the nearest other point of the same set."""
    real = torch.tensor([[0.0], [1.0], [10.0], [12.0]])  # among them: [-1, 2] and [8, 14]
    # Radii 3, 3, 7.5 and 21. Among them: [-4.5, 4.5], [1.5, 16.5] and [9, 51], so all of the real.
    samples = torch.tensor([[-1.5], [1.5], [9.0], [30.0]])
    assert precision_recall(samples, real, k=1) == (0.5, 1.0)
    assert precision_recall(real, samples, k=1) == (1.0, 0.5)
    at_the_radius = torch.tensor([[2.0], [14.0], [14.5], [-1.5]])
    assert precision_recall(at_the_radius, real, k=1)[0] == 0.5


def test_nearest_finds_copies_and_measures_grey_levels():
    generator = torch.Generator().manual_seed(0)
    others = torch.randint(246, (700, 32, 32), generator=generator, dtype=torch.uint8)
    picked = torch.randint(700, (600,), generator=generator)
    distance, index = nearest(others[picked], others)
    assert same(index, picked) and same(distance, torch.zeros(600).double())
    distance, index = nearest(others[picked, None].expand(-1, 3, -1, -1) + 10, others)
    assert same(index, picked) and torch.allclose(distance, torch.full((600,), 10.0).double())
    red, green = (colours(level, (9, 9, 9)) for level in ((90, 0, 0), (0, 90, 0)))
    assert nearest(red[:1], torch.cat([green, red]))[1] == 2 and nearest(red, red)[0].sum() == 0


def colours(*levels):
    """An image of one colour for each, (N, 3, 32, 32)."""
    return torch.tensor(levels).byte()[:, :, None, None].expand(-1, -1, 32, 32)


def test_colours_are_read_and_compared_as_such_and_need_no_labels():
    """A classifier tells colours that are equally bright."""
    levels, labels = [(90, 0, 0), (0, 90, 0)] * 10, torch.arange(20) % 2
    images = colours(*levels) + torch.randint(9, (20, 3, 32, 32)).byte()
    classifier = metrics.train_classifier(images, labels, epochs=30)
    assert classifier.accuracy(images, labels) == 1
    report, pairs = measure(None, images, images, images)
    assert pairs.shape == (20, 3, 32, 32) and same(pairs[0], pairs[1])
    assert report.keys() == {"samples", "copies"} | {
        f"nearest{a}{b}" for a in ("", "_1st") for b in ("", "_real")
    }


def test_as_bytes_rounds_to_the_nearest_level():
    images = torch.tensor([-1, -0.9999, 0.001, 1, 1.5, -3]), torch.arange(256).byte()
    assert metrics.as_bytes(images[0]).tolist() == [0, 0, 128, 255, 255, 0]
    assert same(metrics.as_bytes(images[1] / 127.5 - 1), images[1])


def boxes(n, seed=0):
    """Images of a bright box on noise, and in which of four places it is."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(100, (n, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 4
    for image, label in zip(images, labels):
        row, column = 4 + 14 * (label // 2), 4 + 14 * (label % 2)
        image[row : row + 10, column : column + 10] += 150
    return images, labels


def test_a_classifier_learns_to_read():
    classifier = metrics.train_classifier(*boxes(8), epochs=30)
    assert classifier.accuracy(*boxes(100, seed=1)) > 0.9 and not classifier.training


def test_a_seed_decides_the_classifier_to_the_bit_and_leaves_the_callers_randomness_alone():
    images, labels = boxes(129)  # the second batch would be of one image
    found = []
    for state, seed in ((5, 0), (6, 0), (5, 1)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        classifier = metrics.train_classifier(images, labels, epochs=1, seed=seed)
        assert same(torch.get_rng_state(), before)
        found.append(classifier.state_dict())
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_a_classifier_is_kept_under_a_hash_of_its_data(tmp_path, monkeypatch):
    images, labels = boxes(4)
    state = torch.get_rng_state()
    first = load_classifier("kmnist", images, labels, tmp_path)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "train_classifier", None)  # a second training would fail
        again = load_classifier("kmnist", images, labels, tmp_path)
    assert same(torch.get_rng_state(), state)
    assert same(first.state_dict(), again.state_dict()) and not again.training
    assert first.name == again.name and first.name.startswith("kmnist-")
    others = [load_classifier("kmnist", *x, tmp_path) for x in ((images, 3 - labels), boxes(4, 1))]
    assert len(list(tmp_path.iterdir())) == len({first.name, *(x.name for x in others)}) == 3
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :]
    for damaged in (whole[:1000], flipped):  # it is made anew
        path.write_bytes(damaged)
        again = load_classifier("kmnist", images, labels, tmp_path)
        assert same(first.state_dict(), again.state_dict()) and path.read_bytes() == whole


def test_a_classifier_that_cannot_be_saved_is_used_all_the_same(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    classifier = load_classifier("kmnist", *boxes(4), tmp_path / "file")
    assert classifier.read(boxes(4)[0])[1].shape == (4, 4)
    first, second = capsys.readouterr().err.splitlines()
    assert "training the classifier of kmnist" in first and "the next run trains it" in second


@pytest.fixture(scope="module")
def mnist():
    return load_data("mnist", augment=False)


@pytest.fixture(scope="module")
def classifier(mnist):
    """That of assets/. It reads the same images once, since all are measured with the same."""
    classifier = load_classifier("mnist", mnist[0].images[:5], mnist[0].labels[:5], "unused")
    read, found = classifier.read, {}

    def remember(images):
        key = images.shape, images.numpy().tobytes()
        if key not in found:
            found[key] = read(images)
        return found[key]

    classifier.read = remember
    return classifier


def test_the_classifier_in_assets_reads_mnist(mnist, classifier):
    """Every figure depends on its weights, so new ones make the figures of before worthless."""
    assert classifier.name == "mnist-dd150293" and not classifier.training
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    _, test = mnist
    assert classifier.accuracy(test.images[:2000], test.labels[:2000]) == 0.9945


@pytest.mark.slow
def test_real_digits_have_the_figures_of_the_readme_on_every_machine(mnist, classifier):
    train, test = mnist
    assert classifier.accuracy(test.images, test.labels) == pytest.approx(0.9967, abs=1e-4)
    generator = torch.Generator().manual_seed(0)  # as `measure` chooses them
    picked, unseen = (torch.randperm(len(x), generator=generator)[:2000] for x in mnist)
    real, features = classifier.read(train.images[picked])[0], classifier.read(test.images)[0]
    assert frechet_distance(real, features) == pytest.approx(0.1571, abs=2e-4)
    figures = precision_recall(real, features[unseen])
    assert figures == pytest.approx((0.881, 0.907), abs=1.1e-3)


def test_what_the_classifier_sees_does_not_depend_on_batches_colours_or_size(mnist, classifier):
    images = mnist[1].images[:50]
    fresh = load_classifier("mnist", *boxes(4), "unused").train()
    features, probabilities = fresh.read(images)  # without dropout all the same
    assert features.shape == (50, 64) and features.dtype == torch.float64
    grey = images // 3 * 3
    red = torch.cat([grey, grey * 0, grey * 0], dim=1)  # a third as bright
    for other, expected in ((images.expand(-1, 3, -1, -1), images), (red, images // 3)):
        for a, b in zip(fresh.read(other, batch_size=7), fresh.read(expected)):
            assert torch.allclose(a, b, atol=1e-4)
    small = F.interpolate(images, (28, 28), mode="bilinear", antialias=True)
    assert classifier.accuracy(small, probabilities.argmax(dim=1)) > 0.9


@pytest.fixture(scope="module")
def measured(mnist, classifier):
    """Measure samples, by default beside 3000 training and 1000 test images."""

    def report(samples, labels=None, trains=3000, tests=1000):
        train, test = mnist[0].images[:trains], mnist[1].images[:tests]
        return measure(classifier, samples, train, test, labels)[0]

    return report


@pytest.fixture(scope="module")
def real(mnist, measured):
    """Other real digits, their labels, and what is measured of them."""
    samples, labels = mnist[0].images[6000:6400], mnist[0].labels[6000:6400]
    return samples, labels, measured(samples, labels)


def test_real_digits_measure_as_real(mnist, classifier, real):
    samples, _, report = real
    features = [classifier.read(images)[0] for images in (samples, mnist[1].images[:1000])]
    assert report["frechet"] == frechet_distance(*features)
    assert report["frechet"] < 2 * report["frechet_real"]
    assert report["precision"] > 0.7 and report["recall"] > 0.7
    assert report["precision"] == pytest.approx(report["precision_real"], abs=0.1)
    assert report["confidence"] == pytest.approx(report["confidence_real"], abs=0.03)
    assert report["accuracy"] > 0.9 and report["colour"] == 0 and report["copies"] < 0.04
    assert sum(report["digits"]) == pytest.approx(1) and max(report["digits"]) < 0.15
    assert report["nearest"] == pytest.approx(report["nearest_real"], rel=0.1)


def test_one_digit_alone_moves_recall_balance_and_distance(measured, real):
    samples, labels, before = real
    report = measured(samples[labels == 1].repeat(20, 1, 1, 1)[:400])
    assert report["recall"] < 0.3 and max(report["digits"]) > 0.9
    assert report["frechet"] > 10 * before["frechet"]
    assert report["precision"] > 0.6 and report["confidence"] > before["confidence"] - 0.05


def test_noise_moves_precision_distance_accuracy_and_what_is_nearest(measured, real):
    samples, labels, before = real
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, samples.shape, generator=generator, dtype=torch.uint8)
    report = measured(samples // 2 + noise // 2, labels)
    assert report["frechet"] > 10 * before["frechet"] and report["precision"] < 0.2
    assert report["accuracy"] < 0.4 and report["copies"] == 0
    assert report["nearest"] > 1.5 * before["nearest"]


def test_colour_is_noticed_where_the_grey_is_right(measured, real):
    shift = torch.tensor([20, 0, -20])[None, :, None, None]
    coloured = (real[0][:10].clamp(20, 235) + shift).byte()
    assert measured(coloured)["colour"] == pytest.approx(20 * (2 / 3) ** 0.5, rel=1e-6)


def test_copies_of_training_images_move_what_tells_of_memory_alone(mnist, measured, real):
    report, before = measured(mnist[0].images[1000:1400]), real[2]
    assert report["copies"] == 1 and report["nearest"] == 0 and report["nearest_1st"] == 0
    assert report["frechet"] < 2 * before["frechet"]
    assert report["precision"] > before["precision"] - 0.1


def test_the_pairs_are_the_nearest_samples_each_with_its_neighbour(mnist, classifier, real):
    samples, train = real[0][:30].clone(), mnist[0].images[:3000]
    samples[17] = train[3]
    _, pairs = measure(classifier, samples, train, mnist[1].images[:1000])
    assert pairs.shape == (20, 1, 32, 32) and pairs.dtype == torch.uint8
    assert same(pairs[:2], train[[3, 3]])
    distances = (pairs[::2].double() - pairs[1::2].double()).square().mean(dim=(1, 2, 3))
    assert same(distances, distances.sort().values)


@pytest.mark.parametrize("n, tests, missing", [(3, 99, 3), (4, 4, 1), (64, 64, 1), (65, 65, 0)])
def test_what_few_images_cannot_tell_is_left_out(measured, real, n, tests, missing):
    report = measured(real[0][:n], real[1][:n], trains=300, tests=tests)
    left_out = ("frechet", "precision", "recall")[:missing]
    assert real[2].keys() - report.keys() == {
        f"{x}{y}" for x in left_out for y in ("", "_real", "_real_std") if f"{x}{y}" in real[2]
    }


def test_real_draws_are_of_the_labels_as_the_samples_are():
    labels = torch.tensor([0] * 30 + [1] * 70)
    draws = metrics.real_draws(torch.arange(100), labels, 20, evenly=True)
    assert [len(draw) for draw in draws] == [20] * 3 and len(torch.cat(draws).unique()) == 60
    assert all((labels[draw] == 0).sum() == 10 for draw in draws)
    draws = metrics.real_draws(torch.arange(100), labels, 30, evenly=False)
    assert torch.cat(draws).tolist() == [*range(90)]
    draws = metrics.real_draws(torch.arange(100), labels, 21, evenly=True)
    assert all((labels[draw] == 1).sum() == 10 for draw in draws)  # as 21 samples are
    (few,) = metrics.real_draws(torch.arange(100), labels, 90, evenly=True)
    assert len(few) == 75  # all that there are of the first label


def test_the_meter_reads_the_real_images_once(mnist, classifier, real, monkeypatch):
    train, test = (split.images[:1000] for split in mnist)
    meter = metrics.FrechetMeter(classifier, test, [train[:500], train[500:]])
    of_test, *draws = (classifier.read(images)[0] for images in (test, train[:500], train[500:]))
    assert meter.real == sum(frechet_distance(draw, of_test) for draw in draws) / 2
    read, once = [], classifier.read
    monkeypatch.setattr(classifier, "read", lambda x: read.append(len(x)) or once(x))
    assert meter(real[0]) == real[2]["frechet"] and read == [400]
