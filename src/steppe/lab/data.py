"""The laboratory's data sets, digits or Parquet files, with subsets, label noise and validation splits."""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from steppe.lab import parquet


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8 and labels (N,) int64; splits share their tensors, so never write to them."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Split":
        """The rows named by an int64 index (M,), copied."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, with the training images' statistics.

    `mean` and `std` are per channel, of the training images' pixels scaled to [0, 1]; a channel that is
    constant over the training images has `std` 1, so that dividing by it is harmless.
    """

    name: str
    classes: int
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """1 for grayscale, 3 for colour."""
        return self.train.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width = self.train.images.shape[2:]
        return height, width


def load(
    source: str,
    *,
    seed: int = 0,
    train_size: int | None = None,
    label_noise: float = 0.0,
    validation: float = 0.0,
) -> Dataset:
    """Loads a data set and prepares its training split: subset, then label noise, then validation split.

    Every draw is a function of `seed` and its purpose alone; the global generator is neither read nor
    changed. Which images are training and which test images does not depend on `seed`. Decoded images are
    kept for the life of the process: further seeds do not decode again, later changes on disk are not seen.

    Args:
        source: `"digits"` (scikit-learn's 8x8 digits, 1 000 training and 797 test images), or the path of a
            folder or file of Parquet, see `steppe.lab.parquet`.
        seed: of the subset, the noise and the validation split.
        train_size: number of training images to keep, all by default; a random subset with equally many of
            each class, give or take one, as far as a class has them. With one seed, smaller subsets lie
            within larger ones.
        label_noise: share of the training labels, in [0, 1), replaced by a uniformly random *different* class
            (symmetric noise); exactly `round(label_noise * N)` of them.
        validation: share of the training images, in [0, 1), held out as `.test`: `round(validation * N)` of
            them, with their noisy labels, all that anyone without clean ones has. The real test images are
            then in neither split.

    Raises:
        FileNotFoundError: nothing at the path, or no Parquet there.
        ValueError: a setting out of its range, or a fault in the files, named with its place.
    """
    for setting, share in (("label_noise", label_noise), ("validation", validation)):
        if not 0 <= share < 1:
            raise ValueError(f"{setting}={share} is not in [0, 1): give a share of the training images")
    dataset = _digits() if source == "digits" else _parquet(os.path.abspath(os.path.expanduser(source)))
    train, test, classes = dataset.train, dataset.test, dataset.classes
    if train_size is not None:
        if not classes <= train_size <= len(train):
            raise ValueError(
                f"train_size={train_size} must lie between {classes}, the number of classes, "
                f"and {len(train)}, the number of training images of {dataset.name}"
            )
        train = train[_balanced_subset(train.labels, classes, train_size, _generator(seed, "subset"))]
    if label_noise:
        labels = _symmetric_noise(train.labels, classes, label_noise, _generator(seed, "label noise"))
        train = Split(train.images, labels)
    if validation:
        train, test = _hold_out(train, validation, _generator(seed, "validation"))
    changed = train.images is not dataset.train.images
    mean, std = _statistics(train.images) if changed else (dataset.mean, dataset.std)
    return replace(dataset, train=train, test=test, mean=mean, std=std)


@lru_cache(maxsize=1)
def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # slow to import, and nothing else needs it

    raw = load_digits()
    pixels = torch.from_numpy(raw.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    everything = Split(pixels, torch.from_numpy(raw.target).long())
    order = torch.randperm(len(everything), generator=_generator(0, "digits"))
    train, test = everything[order[:1000]], everything[order[1000:]]
    return Dataset("digits", 10, train, test, *_statistics(train.images))


@lru_cache(maxsize=2)
def _parquet(path: str) -> Dataset:
    source = Path(path)
    train, test, classes = parquet.read(source)
    name = source.parent.name if source.is_file() else source.name
    return Dataset(name, classes, Split(*train), Split(*test), *_statistics(train[0]))


def _generator(seed: int, purpose: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _balanced_subset(labels: Tensor, classes: int, size: int, generator: torch.Generator) -> Tensor:
    """Sorted indices of a random subset, dealt in rounds of one image from each class with any left."""
    order = torch.randperm(len(labels), generator=generator)
    first = torch.randperm(classes, generator=generator)  # who is served first when the last round is not full
    by_class = order[labels[order].argsort(stable=True)]
    count = labels.bincount(minlength=classes)
    start = count.cumsum(0) - count
    turn = torch.arange(len(labels)) - start[labels[by_class]]
    dealt = (turn * classes + first[labels[by_class]]).argsort()
    return by_class[dealt[:size]].sort().values


def _symmetric_noise(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    if classes < 2:
        raise ValueError(f"label_noise={share} needs a second class to draw from: the data set has {classes}")
    changed = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, classes, changed.shape, generator=generator)
    noisy = labels.clone()
    noisy[changed] = (labels[changed] + shift) % classes
    return noisy


def _hold_out(train: Split, share: float, generator: torch.Generator) -> tuple[Split, Split]:
    held = round(share * len(train))
    if not 0 < held < len(train):
        raise ValueError(f"validation={share} of {len(train)} training images leaves one of the two splits empty")
    order = torch.randperm(len(train), generator=generator)
    return train[order[held:].sort().values], train[order[:held].sort().values]


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) deviation per channel, exact, from histograms instead of a float copy."""
    channels = images.unbind(1)
    share = torch.stack([channel.flatten().bincount(minlength=256) for channel in channels]).double()
    share /= share.sum(1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share * (value - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(s or 1.0 for s in std.tolist())
