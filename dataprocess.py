"""MNIST, or images of one's own, as batches in [-1, 1].

A split is one uint8 tensor on the device. Batches are augmented and normalised there.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from support import checks
from support.datasets import DATASETS, read_dataset
from support.folders import read_images
from support.machine import check_memory


def load_data(
    dataset="mnist",
    data_dir="data",
    *,
    image_size=32,
    channels=3,
    train_size=60_000,
    test_size=10_000,
    augment=True,
    flips=False,
    seed=0,
    device="cpu",
):
    """Load a data set: from `data_dir`, else MNIST from assets/, else download it there.

    Args:
        dataset: 'mnist', 'fashion_mnist', 'kmnist', 'cifar10', or a folder of images, in which
            subfolders are labels (see `support.folders.list_images`).
        data_dir: folder in which torchvision keeps its data; MNIST is in its subfolder MNIST/raw.
        image_size: height and width that the images are resized to, in pixels.
        channels: channels of a batch. 3 keeps colours; else all hold the same grey image.
        train_size, test_size: take the first so many images, or all if there are fewer.
        augment: whether training images are shifted, rotated and scaled a little, differently each
            time.
        flips: whether training images are mirrored at random; wrong for digits.
        seed: together with the number of the epoch it decides the order of the images.
        device: device of the images and batches.

    Returns:
        The training and the test `Images`. Test images are never augmented.

    Raises:
        ValueError: an unknown data set, a size below 1, a damaged file, a `data_dir` that a
            download cannot write to, a data set that is neither found nor downloaded, a folder that
            cannot be used, or more images than the memory holds.
    """
    sizes = dict(
        image_size=image_size, channels=channels, train_size=train_size, test_size=test_size
    )
    switches = dict(augment=augment, flips=flips)
    checks.data(dataset, data_dir, sizes | switches, seed, device)
    limits, square = (train_size, test_size), (image_size, image_size)
    if dataset in DATASETS:
        parts = read_dataset(dataset, data_dir, channels)
        num_labels = int(parts[0][1].max()) + 1
    else:
        parts, num_labels = read_images(dataset, image_size, channels, limits, device)
    splits = []
    settings = dict(channels=channels, seed=seed, device=device, num_labels=num_labels)
    for part, size in zip(parts, limits):
        images, labels = (values[:size] for values in part)
        if dataset in DATASETS:
            check_memory(dataset, (*images.shape[:2], *square), device)
            # Resized once, as uint8: a float copy would take four times the memory.
            images = F.interpolate(images, size=square, mode="bilinear", antialias=True)
        splits.append(Images(dataset, images, labels, **settings, **switches))
        switches = {}  # for the training images, which come first
    return tuple(splits)


class Images:
    """One split of a data set, whole in the memory of the device.

    Attributes:
        name: name of the data set, or its folder.
        num_labels: labels are below this number; 0: there are none, and `labels` say nothing.
        images: uint8, (N, C, image_size, image_size); C is 1 for grey images, 3 for colours.
        labels: int64, (N,).
        y: what batches give as labels: `labels`, or clusters, see `use_clusters`.
    """

    def __init__(
        self,
        name,
        images,
        labels,
        channels=3,
        augment=False,
        seed=0,
        device="cpu",
        num_labels=0,
        flips=False,
    ):
        self.name = name
        self.channels = channels
        self.augment = augment
        self.seed = seed
        self.num_labels = num_labels
        self.flips = flips
        self.device = torch.device(device)
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.y = self.labels

    def __len__(self):
        return len(self.images)

    def batch(self, index):
        """Pick images, and augment them if this split does so.

        Args:
            index: a slice, or int64, (B,), on the device.

        Returns:
            x0: float32, (B, channels, image_size, image_size), in [-1, 1]; black is -1. The
                channels of grey images share their memory: copy it before you write into it.
            y: int64, (B,).
        """
        if isinstance(index, slice):
            x, y = self.images[index], self.y[index]
        else:  # copies whole rows: on a CPU it is 18 times as fast as brackets
            x, y = self.images.index_select(0, index), self.y.index_select(0, index)
        x = x.float()
        if self.flips:
            mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        if self.augment:
            on_black = self.name in DATASETS and x.shape[1] == 1
            x = augment(x, "zeros" if on_black else "border")
        x0 = x.div_(127.5).sub_(1)  # in place, to save memory
        return x0.expand(-1, self.channels, -1, -1), y

    def split(self, n):
        """At most n of the images, evenly spread, and the others: two `Images`, not augmented."""
        n = min(n, len(self))
        spread = torch.arange(n, device=self.device) * len(self) // n if n else slice(0, 0)
        picked = torch.zeros(len(self), dtype=torch.bool, device=self.device)
        picked[spread] = True
        how = self.channels, False, self.seed, self.device, self.num_labels
        return tuple(
            Images(self.name, self.images[part], self.labels[part], *how)
            for part in (picked, ~picked)
        )

    def use_clusters(self, number, within_labels=False):
        """Let batches tell clusters of similar images, by k-means on their pixels at 16x16.

        A network that is told them draws better, also where no human label goes into them (arXiv
        2212.00362). There is at most one for 24 images. `seed` decides them.

        Args:
            number: number of clusters; within labels each has `number // num_labels`, at least 1.
            within_labels: whether they lie within labels. `y` then counts labels first: cluster c
                is `num_labels + c`, and the labels themselves mean 'any cluster of it'.

        Returns:
            How often an image is in each cluster: a list of a row of numbers for each label, or of
            a single row.
        """
        checks.whole("num_clusters", number)
        groups = [torch.ones_like(self.labels, dtype=torch.bool)]
        if within_labels:
            groups = [self.labels == label for label in range(self.num_labels)]
        k = max(1, min(number // len(groups), len(self) // (24 * len(groups))))
        # finer pixels say hardly more; on the CPU, since sums on a GPU depend on their order
        parts = self.images.cpu().split(4096)
        x = torch.cat([F.adaptive_avg_pool2d(part.float(), 16).flatten(1) for part in parts])
        self.y, shares = torch.zeros_like(self.labels), torch.zeros(len(groups), k)
        for label, group in enumerate(groups):
            nearest = kmeans(x[group.cpu()], k, self.seed)
            shares[label] = nearest.bincount(minlength=k) / len(x)
            self.y[group] = nearest.to(self.device) + label * k
            if not len(nearest):  # so that something can be drawn
                shares[label, 0] = 1 / len(x)
        self.y += len(groups) if within_labels else 0
        return shares.tolist()

    def epochs(self, batch_size, number, first=0, start=0):
        """The batches of all epochs up to `number`, from batch `start` of epoch `first` on."""
        for epoch in range(first, number):
            yield from self.epoch(batch_size, epoch, start)
            start = 0

    def epoch(self, batch_size, epoch, start=0):
        """The batches of an epoch, (x0, y). `seed` and `epoch` alone decide their order.

        Every image comes once, and the last batch may be smaller. `start` skips so many batches.
        """
        # numpy mixes the two numbers well; torch's CPU generator takes one and keeps 32 bits of it.
        order = np.random.default_rng((epoch, self.seed)).permutation(len(self))
        # Moved once per epoch: if each step sent its own indices, it would wait for the device.
        order = torch.from_numpy(order).to(self.device)
        for index in order.split(batch_size)[start:]:
            yield self.batch(index)


def kmeans(x, k, seed, rounds=25):
    """The nearest of k centres, which are means of those nearest to them: (N, D) -> int64, (N,)."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    centres = x[order[:k]] if len(x) >= k else torch.zeros(k, x.shape[1])
    for _ in range(rounds):
        # |x - c|^2 without |x|^2, which is the same for all centres
        size = centres.square().sum(dim=1)
        nearest = [(size - 2 * part @ centres.T).argmin(dim=1) for part in x.split(4096)]
        nearest = torch.cat(nearest)
        count = nearest.bincount(minlength=k)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return nearest


def augment(x, padding="zeros"):
    """Shift by up to 1/32 of the image, rotate by up to 5 degrees, scale by up to 5 %.

    Images are (N, C, H, W), from 0 to 255. Around them lies black, 'zeros', as around digits, or
    their 'border' goes on. There are no flips, since the mirror image of a digit is not a digit.
    Random numbers come from torch's global state.
    """
    turn, scale, *shift = torch.rand(4, len(x), device=x.device) * 2 - 1
    turn, scale = turn * math.radians(5), 1 + 0.05 * scale
    cos, sin = scale * torch.cos(turn), scale * torch.sin(turn)
    shift_x, shift_y = (s * 2 / 32 for s in shift)  # the image is 2 wide
    theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode=padding, align_corners=False)
    return x.clamp(max=255)  # rounding may exceed white
