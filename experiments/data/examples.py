"""Examples, in memory or decoded when they are fetched, and the data set that they make."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

_DECODED_AT_ONCE = 1024
_SAMPLE = 10_000  # training images at most, evenly spaced, that give mean and deviation of the channels
_SAMPLED_PIXELS = _SAMPLE * 64 * 64  # their pixels at most: numbers of 8 bytes a channel are made of them


class DataError(Exception):
    """A data set cannot be read; the message says why and what to do."""


@runtime_checkable
class Examples(Protocol):
    """Examples in a fixed order, fetched by position, many at once."""

    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """How many there are."""
        ...

    def fetch(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[UInt8[np.ndarray, "batch height width channels"], Int[np.ndarray, " batch"]]:
        """Images and labels at these positions, in arrays that are free to be changed."""
        ...


class Arrays:
    """Examples in memory."""

    def __init__(self, images: UInt8[np.ndarray, "n height width channels"], labels: Int[np.ndarray, " n"]) -> None:
        self.images, self.labels = images, labels.astype(np.int32)
        self.shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[UInt8[np.ndarray, "batch height width channels"], Int[np.ndarray, " batch"]]:
        """Images and labels at these positions."""
        return self.images[rows], self.labels[rows]


class Stored:
    """Examples in the files of tensorflow-datasets, decoded when they are fetched."""

    def __init__(self, source: Sequence[dict[str, Any]], shape: tuple[int, int, int], classes: int) -> None:
        self._source, self.shape, self._classes = source, shape, classes

    def __len__(self) -> int:
        return len(self._source)

    def fetch(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[UInt8[np.ndarray, "batch height width channels"], Int[np.ndarray, " batch"]]:
        """Images and labels at these positions."""
        examples = self._source.__getitems__(rows.tolist())  # type: ignore[attr-defined]
        for row, example in zip(rows.tolist(), examples, strict=True):
            check_example(row, example["image"], example["label"], self.shape, self._classes)
        labels = np.array([example["label"] for example in examples], np.int32)
        return np.stack([example["image"] for example in examples]), labels


class Subset:
    """Some of the examples, their images reduced by averaging over blocks of `pool` x `pool` pixels."""

    def __init__(self, examples: Examples, rows: Int[np.ndarray, " n"], pool: int) -> None:
        height, width, channels = examples.shape
        self._examples, self._rows, self._pool = examples, rows, pool
        self.shape = (height // pool, width // pool, channels)

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[UInt8[np.ndarray, "batch height width channels"], Int[np.ndarray, " batch"]]:
        """Images and labels at these positions."""
        images, labels = self._examples.fetch(self._rows[rows])
        height, width, channels = self.shape
        blocks = images.reshape(len(rows), height, self._pool, width, self._pool, channels)
        return np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8), labels


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test examples, and what a program has to know about them.

    Attributes:
        train, test: examples with pixels from 0 to `largest`.
        classes: number of labels.
        mean, std: of each channel over the training images.
        pad: pixels by which training images may be shifted without leaving what is usual for this data set.
        flip: whether training images may be mirrored.
        largest: the value of a white pixel.
        names: of the classes, by label; empty where they have none.
        fingerprint: of the files, where they are a user's own and may change; else empty.
        description: one line for whoever trains on it; empty where there is nothing to say.
    """

    train: Examples
    test: Examples
    classes: int
    mean: Float[np.ndarray, " channels"]
    std: Float[np.ndarray, " channels"]
    pad: int
    flip: bool
    largest: int = 255
    names: tuple[str, ...] = ()
    fingerprint: str = ""
    description: str = ""


def dataset_of(train: Examples, test: Examples, **others: Any) -> Dataset:
    """The data set of these examples, with the mean and deviation of the training images; `others` as in `Dataset`."""
    height, width, _ = train.shape
    most = max(1, min(_SAMPLE, _SAMPLED_PIXELS // (height * width)))
    pixels = train.fetch(spread(len(train), most))[0].reshape(-1, train.shape[-1])
    mean, std = pixels.mean(0, dtype=np.float64), pixels.std(0, dtype=np.float64)
    return Dataset(train, test, mean=mean, std=std, **others)


def spread(count: int, most: int = _SAMPLE) -> Int[np.ndarray, " sample"]:
    """At most so many rows, evenly spaced over this many examples; all of them where they are few."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def in_memory(examples: Examples) -> Arrays:
    """The same examples, decoded."""
    images = np.empty((len(examples), *examples.shape), np.uint8)
    labels = np.empty(len(examples), np.int32)
    rows = np.arange(len(examples))
    for start in range(0, len(examples), _DECODED_AT_ONCE):
        part = slice(start, start + _DECODED_AT_ONCE)
        images[part], labels[part] = examples.fetch(rows[part])
    return Arrays(images, labels)


def check_example(row: int, image: Any, label: Any, shape: tuple[int, int, int], classes: int) -> None:
    """Raises DataError, naming the example's position, unless image and label are what they have to be."""
    image = np.asarray(image)
    problem = ""
    if image.dtype != np.uint8:
        finite = np.isfinite(image).all() if np.issubdtype(image.dtype, np.floating) else True
        problem = f"its pixels are {image.dtype}{'' if finite else ', some of them NaN or infinite'}; expected uint8"
    elif image.shape != shape:
        problem = f"its image has shape {image.shape}; expected {shape}"
    elif not np.issubdtype(np.asarray(label).dtype, np.integer) or not 0 <= label < classes:
        problem = f"its label is {label}; expected a whole number from 0 to {classes - 1}"
    if problem:
        raise DataError(f"example {row} cannot be used: {problem}")
