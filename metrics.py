"""How good are the samples: the numbers by which drawn digits are compared with real ones.

Features come from a small classifier of the same data, trained here: Inception knows little of digits. Fréchet
distance: arXiv 1706.08500. Precision and recall: 1904.06991. Images are uint8, (N, H, W) or (N, C, H, W), as a PNG
holds them, so that a model and a folder of PNGs are measured alike.
"""

import hashlib
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

SIZE = 32  # height and width of what the classifier sees, in pixels
NUM_CLASSES = 10
NUM_FEATURES = 64
NEIGHBOURS = 3  # k of precision and recall, as in 1904.06991
VERSION = 1  # of the classifier and its training: a change makes every cached one invalid


class Classifier(nn.Module):
    """A small convolutional network that reads digits: uint8 images -> logits, (N, 10).

    Colours are averaged and other sizes resized to 32x32.
    """

    def __init__(self):
        super().__init__()

        def layer(width_in, width_out, stride=1):
            return [nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width_out),
                    nn.ReLU()]

        self.body = nn.Sequential(
            *layer(1, 32, stride=2), *layer(32, 32), *layer(32, 64, stride=2), *layer(64, 64),
            *layer(64, 128, stride=2), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(128 * 16, NUM_FEATURES, bias=False), nn.BatchNorm1d(NUM_FEATURES), nn.ReLU())
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images):
        return self.head(self.body(_grey(images)))

    @torch.no_grad()
    def read(self, images, batch_size=500):
        """What it makes of images, in evaluation mode and on the CPU.

        Returns:
            Features before the last layer, float64, (N, 64), and probabilities of the classes, float64, (N, 10).
        """
        self.eval()
        device = self.head.weight.device
        features = torch.cat([self.body(_grey(batch.to(device))) for batch in images.split(batch_size)])
        return features.cpu().double(), self.head(features).cpu().double().softmax(dim=1)

    def accuracy(self, images, labels):
        """Share of the images, 0 to 1, that it reads as `labels`, int64, (N,)."""
        return (self.read(images)[1].argmax(dim=1) == labels.cpu()).double().mean().item()


def train_classifier(images, labels, *, seed=0, device="cpu", epochs=5, progress=False):
    """A classifier trained on images and labels, int64, (N,); `seed` decides it, on a CPU to the bit.

    Images are turned, shifted, scaled and slanted a little on the way in, each quarter of a batch in its own way.
    """
    from torchvision.transforms import InterpolationMode, v2

    distort = v2.RandomAffine(10, (0.08, 0.08), (0.9, 1.1), 5, InterpolationMode.BILINEAR)
    images = _grey(images)
    batch_size, rate = 128, 5e-3
    steps = epochs * math.ceil(len(images) / batch_size)
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        classifier = Classifier().to(device).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2))
        with tqdm(total=epochs * len(images), unit="img", desc="classifier", disable=not progress, leave=False) as bar:
            for _ in range(epochs):
                for index in torch.randperm(len(images)).split(batch_size):
                    if len(index) == 1:
                        continue  # BatchNorm needs two
                    x = torch.cat([distort(part) for part in images[index].to(device).split(batch_size // 4)])
                    loss = F.cross_entropy(classifier.head(classifier.body(x)), labels[index].to(device))
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                    bar.update(len(index))
    return classifier.eval()


def load_classifier(images, labels, folder, *, device="cpu", progress=False):
    """The classifier of these training images, from `folder`, where it is kept under a hash of them, or trained now.

    It is the same for every run on the same data, so that runs compare.
    """
    digest = hashlib.sha256(f"{VERSION} {tuple(images.shape)}".encode())
    for part in (images, labels):
        digest.update(part.cpu().contiguous().numpy())
    path = Path(folder) / f"classifier-{digest.hexdigest()[:16]}.pt"
    classifier = Classifier()
    try:
        classifier.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # missing or damaged, in whatever way: it is made in a minute or two
        classifier = train_classifier(images, labels, device=device, progress=progress)
        partial = path.with_suffix(".partial")
        torch.save(classifier.state_dict(), partial)
        os.replace(partial, path)
    return classifier.to(device).eval()


def read_folder(folder):
    """All PNGs of a folder, in the order of their names: uint8, (N, 3, H, W).

    Raises:
        ValueError: where there is no folder, no PNG in it, one that cannot be read, or one of another size.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    paths = sorted(Path(folder).glob("*.png"))
    if not paths:
        raise ValueError(f"evaluate {str(folder)!r}: expected a folder of PNGs, one an image; "
                         + ("there is no PNG in it" if Path(folder).is_dir() else "there is no such folder"))
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(pil_to_tensor(image.convert("RGB")))
        except OSError as error:
            raise ValueError(f"{path}: not a readable PNG ({error}); mend or delete it") from None
        if images[-1].shape != images[0].shape:
            sizes = [f"{image.shape[2]}x{image.shape[1]}" for image in (images[-1], images[0])]
            raise ValueError(f"{path}: {sizes[0]} pixels; expected {sizes[1]}, as of {paths[0].name}")
    return torch.stack(images)


def frechet_distance(a, b):
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with the moments of two sets (1706.08500 eq. 6).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), in float64, where the last trace is the sum of the square roots of
    the eigenvalues of C_a^1/2 C_b C_a^1/2.

    Args:
        a, b: features, (N, D) and (M, D).

    Raises:
        ValueError: for so few rows, at most D, that a covariance would be singular.
    """
    a, b = a.double(), b.double()
    for features in (a, b):
        n, dim = features.shape
        if n <= dim:
            raise ValueError(f"{n} images: their covariance of {dim} features is singular; expected at least {dim + 1}")
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return distance.clamp(min=0).item()  # rounding may pass 0 by a hair


def precision_recall(samples, real, k=NEIGHBOURS):
    """Share of the samples among the real images, and of the real images among the samples (1904.06991 eq. 1 and 2).

    A point lies among a set if it is as near to one of its points as that point's k-th neighbour in the set.

    Args:
        samples, real: features, (N, D) and (M, D); the same number of both, for figures that compare.

    Returns:
        precision and recall, 0 to 1.

    Raises:
        ValueError: for sets of fewer than k + 1.
    """
    for features in (samples, real):
        if len(features) <= k:
            raise ValueError(f"{len(features)} images: expected at least {k + 1}, for the neighbours of precision and "
                             "recall")

    def distances(a, b):  # by parts, to bound the memory; not by products, which round
        for part in a.split(1000):
            yield torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist")

    def among(points, members):
        radii = torch.cat([d.kthvalue(k + 1, dim=1).values for d in distances(members, members)])  # the first is itself
        return torch.cat([(d <= radii).any(dim=1) for d in distances(points, members)]).double().mean().item()

    return among(samples, real), among(real, samples)


def nearest(images, others):
    """The nearest of the `others` to each image, by pixels.

    Returns:
        Root mean square difference to it, in grey levels from 0 to 255, float64, (N,), and its index, int64, (N,).
    """
    images, others = (_grey(x).flatten(1) for x in (images, others))
    squares = others.square().sum(dim=1)
    index = torch.cat([(squares - 2 * part @ others.T).argmin(dim=1) for part in images.split(500)])
    difference = 127.5 * (images - others[index]).double()  # anew, since the products above round
    return difference.square().mean(dim=1).sqrt().cpu(), index.cpu()


def measure(classifier, samples, train, test, labels=None, seed=0, frechet_only=False):
    """Compare samples with real images.

    The Fréchet distance is to all of `test`; precision and recall are for as many of it as there are samples. Each
    figure comes with that of real images under the same name and `_real`: as many of `train`, drawn by `seed`, take
    the place of the samples, and for `nearest` as many of `test`.

    Args:
        classifier: whose features are compared.
        samples: images, uint8.
        train, test: real images, uint8.
        labels: the digits that were asked for, int64, (N,), or None.
        seed: decides which real images are taken.
        frechet_only: leave the other figures out.

    Returns:
        A dict of plain numbers, for JSON: `samples`, their number; `frechet`; `precision`; `recall`; `accuracy`, the
        share that is read as its label, where there are labels; `confidence`, the mean of the largest probability;
        `digits`, the share read as each digit; `colour`, root mean square deviation from grey, in grey levels;
        `nearest` and `nearest_1st`, median and first percentile of the distance to the nearest of `train`, in grey
        levels; `copies`, the share of samples nearer than 99 % of the test images are. Further, uint8,
        (20, 1, 32, 32), the ten samples nearest to `train`, each followed by its neighbour; None if left out.

    Raises:
        ValueError: for fewer samples than the figures need, or fewer real images than samples.
    """
    n = len(samples)
    for name, real in (("training", train), ("test", test)):
        if n > len(real):
            raise ValueError(f"{n} samples: expected at most {len(real)}, the number of {name} images to compare with")
    generator = torch.Generator().manual_seed(seed)
    train_index, test_index = (torch.randperm(len(x), generator=generator)[:n].to(x.device) for x in (train, test))
    real = train[train_index]
    features, probabilities = classifier.read(samples)
    features_real, probabilities_real = classifier.read(real)
    features_test, _ = classifier.read(test)
    report = {"samples": n, "frechet": frechet_distance(features, features_test),
              "frechet_real": frechet_distance(features_real, features_test)}
    if frechet_only:
        return report, None
    features_test = features_test[test_index.cpu()]
    for suffix, x, p in (("", features, probabilities), ("_real", features_real, probabilities_real)):
        report["precision" + suffix], report["recall" + suffix] = precision_recall(x, features_test)
        report["confidence" + suffix] = p.max(dim=1).values.mean().item()
        report["digits" + suffix] = (p.argmax(dim=1).bincount(minlength=NUM_CLASSES).double() / n).tolist()
    if labels is not None:
        report["accuracy"] = (probabilities.argmax(dim=1) == labels.cpu()).double().mean().item()
    report["colour"] = _colour(samples)
    distances, index = nearest(samples, train)
    distances_test, _ = nearest(test[test_index], train)
    for suffix, d in (("", distances), ("_real", distances_test)):
        report["nearest" + suffix] = d.median().item()
        report["nearest_1st" + suffix] = d.quantile(0.01).item()
    report["copies"] = (distances < report["nearest_1st_real"]).double().mean().item()
    first = distances.argsort()[:10]
    pairs = torch.stack([_grey(samples[first.to(samples.device)]).cpu(),
                         _grey(train[index[first].to(train.device)]).cpu()], dim=1).flatten(0, 1)
    return report, ((pairs + 1) * 127.5).round().byte()


def _grey(images):
    """uint8 (N, H, W) or (N, C, H, W) -> float32 (N, 1, 32, 32) in [-1, 1].

    Raises:
        ValueError: for what is not such images.
    """
    if images.dtype != torch.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"images of {images.dtype} and shape {tuple(images.shape)}: expected uint8, (N, H, W) or "
                         "(N, C, H, W)")
    x = images.float()
    x = x[:, None] if x.ndim == 3 else x.mean(dim=1, keepdim=True)
    if x.shape[2:] != (SIZE, SIZE):
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return x / 127.5 - 1


def _colour(images):
    """Root mean square deviation of the channels from their mean, in grey levels."""
    if images.ndim == 3:
        return 0.0
    x = images.float()
    return (x - x.mean(dim=1, keepdim=True)).square().mean().sqrt().item()
