"""Data sets: what they are called, where they come from, and how single examples are read.

All but the digits and MNIST-1D, which need no files, come from tensorflow-datasets and are read without TensorFlow,
once `experiments/prepare_data.py` has prepared them. Those that fit in memory are decoded once and kept
as arrays; larger ones are decoded as they are asked for.
"""

import dataclasses
import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import experiments.folders  # noqa: F401 so that tensorflow-datasets reads folders of any name

MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images, training and test, up to which a data set is kept as arrays
_DECODED_AT_ONCE = 1024
_SAMPLE = 10_000  # training images, evenly spaced, that give mean and deviation of the channels


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
    """

    train: Examples
    test: Examples
    classes: int
    mean: Float[np.ndarray, " channels"]
    std: Float[np.ndarray, " channels"]
    pad: int
    flip: bool
    largest: int = 255


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A data set of tensorflow-datasets: its test split and the usual augmentation."""

    test_split: str
    pad: int
    flip: bool


_STORED = {
    "mnist": _Kind("test", pad=2, flip=False),
    "fashion_mnist": _Kind("test", pad=2, flip=True),
    "cifar10": _Kind("test", pad=4, flip=True),
    "cifar100": _Kind("test", pad=4, flip=True),
    "tiny_imagenet": _Kind("validation", pad=4, flip=True),
}
DATASETS = {
    "digits": 10,
    "mnist1d": 10,
    "mnist": 10,
    "fashion_mnist": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny_imagenet": 200,
}
"""Names, and numbers of classes."""


def load(name: str, data_dir: Path | None = None, memory_limit: int = MEMORY_LIMIT) -> Dataset:
    """The data set called `name`, from tensorflow-datasets' folder `data_dir` unless it needs no files.

    Args:
        name: one of `DATASETS`.
        data_dir: by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        memory_limit: bytes of decoded images up to which they are kept in memory.

    Raises:
        DataError: it is not prepared, damaged, or the packages that read it are missing.
    """
    if name in WITHOUT_FILES:
        return WITHOUT_FILES[name]()
    kind = _STORED[name]
    builder = make_builder(name, data_dir)
    if not builder.is_prepared():
        raise DataError(
            f"{name} is not prepared in {builder.data_path}; if it is elsewhere, --data-dir says where; if not, first: "
            f"{_prepare_command(name, data_dir)}"
        )
    try:
        train, test = (builder.as_data_source(split=split) for split in ("train", kind.test_split))
        shape, classes = builder.info.features["image"].shape, builder.info.features["label"].num_classes
        parts: list[Examples] = [Stored(train, shape, classes), Stored(test, shape, classes)]
        if (len(train) + len(test)) * math.prod(shape) <= memory_limit:
            parts = [_in_memory(part) for part in parts]
        parts[1].fetch(_spread(len(test)))  # so that a damaged file shows now, and not after an epoch of training
        return _dataset(*parts, classes=classes, pad=kind.pad, flip=kind.flip)
    except DataError as error:
        raise DataError(f"{name} in {builder.data_path}: {error}") from error
    except Exception as error:  # whatever the readers of a damaged file raise
        raise DataError(_damaged(name, builder.data_path, data_dir, error)) from error


def make_builder(name: str, data_dir: Path | None) -> Any:
    """tensorflow-datasets' builder of a data set, whether it is prepared or not; needs no TensorFlow.

    Raises:
        DataError: tensorflow-datasets is not installed, or the data set is prepared but damaged.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"{name} needs {error.name}; install what reads it: pip install -e '.[experiments]'") from error
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of data sets not prepared and of OpenCV not installed
    try:
        if name == "tiny_imagenet":
            from experiments.data.tiny_imagenet import TinyImagenet

            return TinyImagenet(data_dir=data_dir, file_format="array_record")
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except Exception as error:  # it reads the description of what is prepared
        folder = Path(data_dir or tfds.core.constants.DATA_DIR) / name
        raise DataError(_damaged(name, folder, data_dir, error)) from error


def one_line(error: Exception) -> str:
    """Kind and first line of an error of somebody else's."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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


def with_subset(
    dataset: Dataset, *, train: int | None = None, validation: int = 0, half: int | None = None, pool: int = 1
) -> Dataset:
    """The same data set, smaller, or with a validation split in the place of its test split.

    Which training images go where depends on the numbers alone. Mean and deviation are those of
    the images that remain for training.

    Args:
        dataset: the whole.
        train: number of training images to keep, by default all that are left.
        validation: number of training images to hold out; where it is not 0, they become `test`.
        half: 1 or 2, to take all of these from one half of the training images; they have none in common. With 1,
            which choices are made on, a sixth of the half takes the place of the test split, so that choices
            never see it.
        pool: width of the blocks of pixels that are averaged into one.

    Raises:
        ValueError: there are not that many images, the blocks do not divide them, or there is no such half.
    """
    order = np.random.default_rng(0).permutation(len(dataset.train))
    if half is not None:
        if half not in (1, 2):
            raise ValueError(f"half must be 1 or 2, got {half}")
        order = np.array_split(order, 2)[half - 1]
        if half == 1 and len(order) < 6:
            raise ValueError(
                f"half 1 keeps a sixth for tests and needs at least 11 training images, got {len(dataset.train)}"
            )
    order, stand_in = np.split(order, [-(len(order) // 6)]) if half == 1 else (order, None)
    total = len(order)
    kept = total - validation if train is None else train
    if kept < 1 or validation < 0 or kept + validation > total:
        raise ValueError(f"cannot take {kept} images for training and {validation} for validation out of {total}")
    if any(side % pool for side in dataset.train.shape[:2]):
        raise ValueError(f"pool must divide the size of the images, {dataset.train.shape[:2]}, got {pool}")
    test: Examples = Subset(dataset.test, np.arange(len(dataset.test)), pool)
    if stand_in is not None:
        test = Subset(dataset.train, stand_in, pool)
    if validation:
        test = Subset(dataset.train, order[:validation], pool)
    parts: list[Examples] = [Subset(dataset.train, order[validation : validation + kept], pool), test]
    if isinstance(dataset.train, Arrays):
        parts = [_in_memory(part) for part in parts]
    return _dataset(*parts, classes=dataset.classes, pad=dataset.pad, flip=dataset.flip, largest=dataset.largest)


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; 360 of them, the same ones always, are the test split."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1).astype(np.uint8)
    parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = parts
    train, test = Arrays(train_images, train_labels), Arrays(test_images, test_labels)
    return _dataset(train, test, classes=10, pad=0, flip=False, largest=16)


def mnist1d(seed: int | None = None) -> Dataset:
    """15,000 signals of MNIST-1D (Greydanus and Kobak, arXiv 2011.14439) as images of 1x40 pixels; 3,000 are for tests.

    As the authors' generator makes them from its own seed, or from another one, at 28 gray levels a standard deviation.
    The set that they published has 5,000.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise DataError(
            f"mnist1d needs {error.name}; install what makes it: pip install -e '.[experiments]'"
        ) from error
    settings = get_dataset_args()
    settings.num_samples = 15_000
    settings.seed = settings.seed if seed is None else seed
    before = np.random.get_state(), random.getstate()
    made = make_dataset(settings)
    np.random.set_state(before[0])  # the generator seeds what all share
    random.setstate(before[1])
    parts = []
    for split in ("", "_test"):
        pixels = np.clip(np.rint(128 + 28 * made[f"x{split}"]), 0, 255).astype(np.uint8)
        parts.append(Arrays(pixels.reshape(-1, 1, 40, 1), made[f"y{split}"]))
    return _dataset(*parts, classes=10, pad=0, flip=False)


WITHOUT_FILES: dict[str, Callable[[], Dataset]] = {"digits": _digits, "mnist1d": mnist1d}
"""Makers of the data sets that come with a package."""


def _dataset(train: Examples, test: Examples, *, classes: int, pad: int, flip: bool, largest: int = 255) -> Dataset:
    pixels = train.fetch(_spread(len(train)))[0].reshape(-1, train.shape[-1])
    mean, std = pixels.mean(0, dtype=np.float64), pixels.std(0, dtype=np.float64)
    return Dataset(train, test, classes, mean, std, pad, flip, largest)


def _spread(count: int) -> Int[np.ndarray, " sample"]:
    return np.unique(np.linspace(0, count - 1, _SAMPLE).astype(int))


def _in_memory(examples: Examples) -> Arrays:
    images = np.empty((len(examples), *examples.shape), np.uint8)
    labels = np.empty(len(examples), np.int32)
    rows = np.arange(len(examples))
    for start in range(0, len(examples), _DECODED_AT_ONCE):
        part = slice(start, start + _DECODED_AT_ONCE)
        images[part], labels[part] = examples.fetch(rows[part])
    return Arrays(images, labels)


def _damaged(name: str, folder: Any, data_dir: Path | None, error: Exception) -> str:
    return (
        f"{name} in {folder} cannot be read ({one_line(error)}); "
        f"remove that folder and prepare it again: {_prepare_command(name, data_dir)}"
    )


def _prepare_command(name: str, data_dir: Path | None) -> str:
    folder = "" if data_dir is None else f" --data-dir {data_dir}"
    return f"python experiments/prepare_data.py {name}{folder}"
