"""Measures of sample quality: they compare generated images with real ones.

The features come from a small classifier of the data's labels: Inception knows little of digits.
That of MNIST is kept in assets/, so that figures compare between machines. Fréchet distance: arXiv
1706.08500. Precision and recall: arXiv 1904.06991. Images are uint8, (N, H, W) or (N, C, H, W), as
in a PNG, so a model and a folder of PNGs are measured in the same way.
"""

import hashlib
import math
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support import checks
from support.checkpoint import load_checkpoint, save_checkpoint
from support.files import one_line

SIZE = 32  # height and width of the classifier's input, in pixels
NUM_FEATURES = 64  # width of the classifier's last hidden layer
DRAWS = 10  # sets of real images that stand beside the samples
NEIGHBOURS = 3  # k of precision and recall, as in 1904.06991
VERSION = 2  # of the classifier and its training; a new number makes every cached one invalid
MNIST_CLASSIFIER = Path(__file__).parent / "assets" / "classifier.pt"  # see assets/README.md


class Classifier(nn.Module):
    """A small convolutional network that recognises labels: uint8 images -> logits.

    With one channel it averages colours. It resizes images of other sizes to 32x32.

    Attributes:
        name: of a loaded one, its data set and a hash of its weights. Figures compare only for the
            same name.
    """

    name = "unnamed"

    def __init__(self, num_classes, channels=1):
        super().__init__()
        self.channels = channels

        def layer(width_in, width_out, size=3, stride=1):
            conv = nn.Conv2d(width_in, width_out, size, stride, padding=size // 2, bias=False)
            return [conv, nn.BatchNorm2d(width_out), nn.ReLU()]

        self.body = nn.Sequential(
            *layer(channels, 32, size=5, stride=2),
            *layer(32, 32),
            *layer(32, 64, stride=2),
            *layer(64, 64),
            *layer(64, 64),
            *layer(64, 128, stride=2),
            *layer(128, 128),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128 * 16, NUM_FEATURES, bias=False),
            nn.BatchNorm1d(NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)
        self.to(memory_format=torch.channels_last)  # a quarter faster on a CPU

    def forward(self, images):
        return self.head(self.body(_prepared(images, self.channels)))

    @torch.no_grad()
    def read(self, images, batch_size=500):
        """Run the classifier on images, in evaluation mode. The results are on the CPU.

        Returns:
            Features before the last layer, float64, (N, 64), and class probabilities, float64,
            (N, num_classes).
        """
        checks.pictures("images", images)
        self.eval()
        device = self.head.weight.device
        batches = (_prepared(part.to(device), self.channels) for part in images.split(batch_size))
        features = torch.cat([self.body(batch) for batch in batches])
        return features.cpu().double(), self.head(features).cpu().double().softmax(dim=1)

    def accuracy(self, images, labels):
        """Share of the images, 0 to 1, that the classifier recognises as `labels`, int64, (N,)."""
        checks.labelled(images, labels)
        return (self.read(images)[1].argmax(dim=1) == labels.cpu()).double().mean().item()


def train_classifier(images, labels, *, seed=0, device="cpu", epochs=5, progress=False):
    """Train a classifier on images and labels, int64, (N,), from 0.

    On a CPU, the seed fixes the result to the bit. Every eight images are rotated, shifted, scaled
    and sheared a little, by random amounts of their own.
    """
    from torchvision.transforms import InterpolationMode, v2

    checks.labelled(images, labels, seed, epochs, device_=device)
    distort = v2.RandomAffine(10, (0.08, 0.08), (0.9, 1.1), 5, InterpolationMode.BILINEAR, fill=-1)
    channels = _channels(images)
    images = _prepared(images, channels)
    batch_size, rate = 128, 5e-3
    steps = epochs * math.ceil(len(images) / batch_size)
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        classifier = Classifier(int(labels.max()) + 1, channels).to(device).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2))
        shuffles = (torch.randperm(len(images)).split(batch_size) for _ in range(epochs))
        batches = chain.from_iterable(shuffles)
        for index in tqdm(batches, "classifier", steps, leave=False, disable=not progress):
            if len(index) == 1:
                continue  # BatchNorm needs two images
            x = torch.cat([distort(part) for part in images[index].to(device).split(8)])
            logits = classifier.head(classifier.body(x))
            F.cross_entropy(logits, labels[index].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return classifier.eval()


def load_classifier(dataset, images, labels, folder, *, device="cpu", progress=False):
    """The classifier of a data set, with its `name`; 'mnist' has its own in assets/.

    For others it is loaded from `folder`, where a hash of images and labels names it, or trained
    and kept there.

    Raises:
        ValueError: the file in assets/ is missing or damaged.
    """
    checks.labelled(images, labels, folder=folder, device_=device)
    with torch.random.fork_rng([]):  # measuring takes no random numbers from training
        number = 10 if dataset == "mnist" else int(labels.max()) + 1
        classifier = Classifier(number, _channels(images))
    if dataset == "mnist":
        classifier.load_state_dict(load_checkpoint(MNIST_CLASSIFIER, ()))
    else:
        digest = _digest(f"{VERSION} {tuple(images.shape)}", images, labels)
        path = Path(folder).expanduser() / f"classifier-{digest[:16]}.pt"
        try:
            classifier.load_state_dict(load_checkpoint(path, ()))
        except Exception:  # the file is missing or damaged
            print(f"training the classifier of {dataset}, once: {path}", file=sys.stderr)
            classifier = train_classifier(images, labels, device=device, progress=progress)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_checkpoint(path, classifier.state_dict())
            except OSError as error:
                print(f"{one_line(error)}; the next run trains it again", file=sys.stderr)
    classifier.name = f"{dataset}-{_digest(*classifier.state_dict().values())[:8]}"
    return classifier.to(device).eval()


def _digest(*parts):
    """SHA-256 of tensors and texts, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.cpu().contiguous().numpy())
    return digest.hexdigest()


def frechet_distance(a, b):
    """Squared Fréchet (2-Wasserstein) distance between Gaussians fitted to two sets.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), in float64 on the CPU (1706.08500 eq. 6). The
    trace of the root is the sum of the square roots of the eigenvalues of C_a^1/2 C_b C_a^1/2.

    Args:
        a, b: features, (N, D) and (M, D), on any devices.

    Raises:
        ValueError: a set has at most D rows, because its covariance would be singular.
    """
    checks.features(None, a=a, b=b)
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    distance = means + cov_a.trace() + cov_b.trace() - 2 * overlap
    return distance.clamp(min=0).item()  # rounding can give a tiny negative number


def precision_recall(samples, real, k=NEIGHBOURS):
    """Precision and recall (1904.06991 eq. 1 and 2), each from 0 to 1.

    Precision is the share of the samples that lie among the real images. Recall is the share of the
    real images that lie among the samples. A point lies among a set if, for some point of the set,
    it is at least as near as that point's k-th neighbour in the set.

    Args:
        samples, real: features, (N, D) and (M, D), on any devices. Results compare only for equal N
            and equal M.

    Raises:
        ValueError: a set has fewer than k + 1 rows.
    """
    checks.whole("k", k)
    checks.features(k, samples=samples, real=real)
    samples = samples.to(real)

    def distances(a, b):  # in parts, to limit memory; without matrix products, because those round
        for part in a.split(1000):
            yield torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist")

    def among(points, members):
        near = [d.kthvalue(k + 1, dim=1).values for d in distances(members, members)]  # +1: itself
        radii = torch.cat(near)
        inside = torch.cat([(d <= radii).any(dim=1) for d in distances(points, members)])
        return inside.double().mean().item()

    return among(samples, real), among(real, samples)


def nearest(images, others):
    """Find the nearest of `others` to each image, pixel by pixel, on the device of `others`.

    Where the others have colours, these count.

    Returns:
        Root mean square difference to the nearest, in grey levels from 0 to 255, float64, (N,), and
        the index of the nearest, int64, (N,). Both are on the CPU.
    """
    checks.pictures("images", images)
    checks.pictures("others", others)
    channels = _channels(others)
    both = images.to(others.device), others
    images, others = (_prepared(x, channels).flatten(1) for x in both)
    squares = others.square().sum(dim=1)
    near = [(squares - 2 * part @ others.T).argmin(dim=1) for part in images.split(500)]
    index = torch.cat(near)
    # computed again, because the products above round
    difference = 127.5 * (images - others[index]).cpu().double()
    return difference.square().mean(dim=1).sqrt(), index.cpu()


def real_draws(images, labels, n, evenly, draws=8):
    """Sets of n of the images, one after the other; `evenly`: equally many of each label."""
    groups = [(labels == label).nonzero()[:, 0] for label in labels.unique()] if evenly else []
    groups, found = groups or [torch.arange(len(labels), device=labels.device)], []
    size = math.ceil(n / len(groups))
    for k in range(max(1, min(draws, min(map(len, groups)) // size))):
        parts = [group[k * size : (k + 1) * size] for group in groups]
        turn = torch.cat([torch.arange(len(part), device=labels.device) for part in parts])
        index = torch.cat(parts)[turn.argsort(stable=True)]  # the labels in turn, as samples are
        found.append(images[index[:n]])
    return found


def as_bytes(images):
    """Images in [-1, 1] as a PNG keeps them, uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


class FrechetMeter:
    """The Fréchet distance of samples to the same real images, again and again.

    Args:
        classifier: its features are compared.
        test: real images, uint8, that samples are compared with. They are read only once.
        draws: several sets of real images, uint8, each in place of samples, for comparison.

    Attributes:
        real: the mean distance of the `draws`.
    """

    def __init__(self, classifier, test, draws):
        self.classifier, self.features = classifier, classifier.read(test)[0]
        self.real = sum(map(self, draws)) / len(draws)

    def __call__(self, samples):
        """The distance of samples, uint8, (N, C, H, W); N must be above the 64 features."""
        return frechet_distance(self.classifier.read(samples)[0], self.features)


def measure(classifier, samples, train, test, labels=None):
    """Compare samples with real images.

    The Fréchet distance compares the samples with all of `test`. Precision and recall compare them
    with as many test images as there are samples. A figure that cannot be computed is left out of
    the result: `frechet` needs more samples than there are features (64), so also more test images;
    `precision` and `recall` need at least 4 samples.

    Most figures come a second time, as `NAME_real`, for real images in place of the samples: the
    mean of up to DRAWS sets of equally many images of `train`. The classifier has learned from
    these, so unseen images would measure slightly worse. `nearest_real` and `nearest_1st_real`
    alone are of test images.

    Args:
        classifier: its features are compared; without one, None, no figure needs features.
        samples: images, uint8. They may be on another device than the real images.
        train, test: real images, uint8, at least as many as samples.
        labels: those that were asked for, int64, (N,), or None.

    Returns:
        report: a dict of plain numbers, ready for JSON:
            `samples`, the number of samples; `frechet`; `precision`; `recall`;
            `frechet_real_std`, the standard deviation of `frechet_real` between the sets;
            `accuracy`, the share of the samples that are recognised as their label;
            `confidence`, the mean of the largest class probability;
            `digits`, the share of the samples that are recognised as each class;
            `colour`, the root mean square deviation from grey, in grey levels, if `train` is grey;
            `nearest`, `nearest_1st`, the median and first percentile of the distance to `train`, in
            grey levels;
            `copies`, the share of the samples that are nearer to `train` than 99 % of the test
            images are.
        pairs: uint8, (20, 1 or 3, 32, 32), the ten samples nearest to `train`, each followed by its
            nearest training image. There are fewer pairs if there are fewer samples.

    Raises:
        ValueError: there are no samples, or more than training or test images.
    """
    checks.measured(samples, train, test, labels)
    n, generator = len(samples), torch.Generator().manual_seed(0)
    order, order_test = (torch.randperm(len(x), generator=generator) for x in (train, test))
    real = [train[index] for index in order.split(n)[:DRAWS] if len(index) == n]
    unseen = test[order_test[:n]]
    report = {"samples": n}
    if classifier is not None:
        report |= _compare(classifier, samples, real, test, unseen)
    if labels is not None:
        report["accuracy"] = classifier.accuracy(samples, labels)
    if _channels(train) == 1:
        report["colour"] = _colour(samples)
    distances, index = nearest(samples, train)
    for suffix, found in (("", distances), ("_real", nearest(unseen, train)[0])):
        report["nearest" + suffix] = found.median().item()
        report["nearest_1st" + suffix] = found.quantile(0.01).item()
    report["copies"] = (distances < report["nearest_1st_real"]).double().mean().item()
    first = distances.argsort()[:10]
    copies = samples.cpu()[first], train.cpu()[index[first]]
    pairs = torch.stack([_prepared(x, _channels(train)) for x in copies], dim=1).flatten(0, 1)
    return report, as_bytes(pairs)


def _compare(classifier, samples, real, test, unseen):
    """The figures of `measure` that need features: of samples, and of real images beside them."""
    features_test, features_unseen = (classifier.read(images)[0] for images in (test, unseen))

    def figures(images):
        features, probabilities = classifier.read(images)
        found = {}
        if len(images) > features.shape[1]:
            found["frechet"] = frechet_distance(features, features_test)
        if len(images) > NEIGHBOURS:
            found["precision"], found["recall"] = precision_recall(features, features_unseen)
        found["confidence"] = probabilities.max(dim=1).values.mean().item()
        counts = probabilities.argmax(dim=1).bincount(minlength=probabilities.shape[1])
        found["digits"] = (counts.double() / len(images)).tolist()
        return found

    report, draws = figures(samples), [figures(images) for images in real]
    for name in list(report):
        report[f"{name}_real"] = np.mean([draw[name] for draw in draws], axis=0).tolist()
    if "frechet" in report and len(draws) > 1:
        distances = [draw["frechet"] for draw in draws]
        report["frechet_real_std"] = float(np.std(distances, ddof=1))
    return report


def _channels(images):
    """3 for images with colours, (N, 3, H, W), else 1."""
    return 3 if images.ndim == 4 and images.shape[1] == 3 else 1


def _prepared(images, channels):
    """uint8 (N, H, W) or (N, C, H, W) -> float32 (N, channels, 32, 32) in [-1, 1]."""
    x = (images[:, None] if images.ndim == 3 else images).float()
    x = x.mean(dim=1, keepdim=True) if channels == 1 else x.expand(-1, channels, -1, -1)
    if x.shape[2:] != (SIZE, SIZE):
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return x / 127.5 - 1


def _colour(images):
    """Root mean square deviation of the colour channels from their mean, in grey levels."""
    if images.ndim == 3:
        return 0.0
    x = images.float()
    return (x - x.mean(dim=1, keepdim=True)).square().mean().sqrt().item()
