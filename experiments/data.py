"""Data sets as arrays, and the batches they are fed in."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Split(NamedTuple):
    """Examples in a fixed order."""

    images: Float[np.ndarray, "n height width channels"]
    labels: Int[np.ndarray, " n"]


class Dataset(NamedTuple):
    """Training and test examples, standardized with the training images' mean and deviation."""

    train: Split
    test: Split
    classes: int


class Batch(NamedTuple):
    """What one step consumes; `valid` is False where an example only fills the batch up."""

    images: Float[np.ndarray, "batch height width channels"]
    labels: Int[np.ndarray, " batch"]
    valid: Bool[np.ndarray, " batch"]


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; 360 of them, the same ones always, are the test split."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1)
    parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = parts
    return _standardized(Split(train_images, train_labels), Split(test_images, test_labels), classes=10)


def _standardized(train: Split, test: Split, classes: int) -> Dataset:
    axes = (0, 1, 2)
    mean, std = train.images.mean(axes, dtype=np.float64), train.images.std(axes, dtype=np.float64)
    train, test = (
        Split(((split.images - mean) / std).astype(np.float32), split.labels.astype(np.int32))
        for split in (train, test)
    )
    return Dataset(train, test, classes)


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": _digits}


def training_batches(split: Split, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Full batches in an order that depends on seed and epoch alone; the few examples left over sit out."""
    order = np.random.default_rng((seed, epoch)).permutation(len(split.labels))
    valid = np.ones(batch_size, bool)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield Batch(split.images[chosen], split.labels[chosen], valid)


def evaluation_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Every example once, in order; the last batch is filled up with copies marked as not valid."""
    for start in range(0, len(split.labels), batch_size):
        positions = np.arange(start, start + batch_size)
        valid = positions < len(split.labels)
        chosen = np.where(valid, positions, 0)
        yield Batch(split.images[chosen], split.labels[chosen], valid)
