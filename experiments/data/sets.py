"""Data sets: what they are called, where they come from, and how they are read.

The digits and MNIST-1D need no files. MNIST and Fashion-MNIST are read from their original files. These and the others
are read as tensorflow-datasets keeps them, without TensorFlow, once `experiments/prepare_data.py` has prepared them.
`folder:PATH` is a folder of one's own images. What fits in memory is decoded once and kept as arrays; what is larger is
decoded as it is asked for.
"""

import dataclasses
import logging
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import experiments.folders  # noqa: F401 so that tensorflow-datasets reads folders of any name
from experiments.data.examples import (
    Arrays,
    DataError,
    Dataset,
    Examples,
    Stored,
    Subset,
    dataset_of,
    in_memory,
    spread,
)
from experiments.data.idx_files import NAMES, find_idx, read_idx
from experiments.data.image_folder import read_folder

MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images, training and test, up to which a data set is kept as arrays


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


FOLDER = "folder:"
"""Begins the name of a data set that is a folder of images; the folder's path follows."""


def check_dataset(name: str) -> None:
    """Raises ValueError unless this names a data set, which may be a folder."""
    if name not in DATASETS and not name.startswith(FOLDER):
        raise ValueError(f"unknown dataset {name!r}; expected one of {', '.join(DATASETS)}, {FOLDER}PATH")
    if name == FOLDER:
        raise ValueError(f"dataset {FOLDER} names no folder; expected {FOLDER}PATH")


def with_whole_path(name: str) -> str:
    """The same name, which from any folder means the same: the path of a folder is absolute and holds no `~`."""
    path = name.removeprefix(FOLDER)
    return FOLDER + os.path.abspath(os.path.expanduser(path)) if path and path != name else name  # noqa: PTH100, PTH111


def load(
    name: str,
    data_dir: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    *,
    image_size: int | None = None,
    batch_size: int = 1,
) -> Dataset:
    """The data set called `name`.

    MNIST and Fashion-MNIST, where tensorflow-datasets has not prepared them in `data_dir`, are read from their original
    files; examples and their order are the same.

    Args:
        name: one of `DATASETS`, or `folder:PATH`.
        data_dir: folder of data sets, by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        memory_limit: bytes of decoded images up to which they are kept in memory.
        image_size: height and width of the images of a folder, by default as `read_folder` has it.
        batch_size: the training images of a folder must be at least as many.

    Raises:
        DataError: it is not there, damaged, or the packages that read it are missing.
    """
    if name in WITHOUT_FILES:
        return WITHOUT_FILES[name]()
    if name.startswith(FOLDER):
        return read_folder(
            Path(name.removeprefix(FOLDER)), image_size=image_size, batch_size=batch_size, memory_limit=memory_limit
        )
    kind = _STORED[name]
    root = data_root(data_dir)
    if name in NAMES and not is_prepared(name, root):
        folder = find_idx(name, root)
        if folder is not None:
            parts = read_idx(name, folder)
            return dataset_of(*parts, classes=10, pad=kind.pad, flip=kind.flip, names=NAMES[name])
    return _load_prepared(name, kind, data_dir, memory_limit)


def data_root(data_dir: Path | None) -> Path:
    """The folder of data sets."""
    usual = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return data_dir or Path(usual).expanduser()


def is_prepared(name: str, root: Path) -> bool:
    """Whether the folder holds the data set as tensorflow-datasets describes one, which is not imported to find out."""
    return any((root / name).glob("*/dataset_info.json"))


def _load_prepared(name: str, kind: _Kind, data_dir: Path | None, memory_limit: int) -> Dataset:
    builder = make_builder(name, data_dir)
    if not builder.is_prepared():
        originals = f", nor are its original files in {data_root(data_dir)}" if name in NAMES else ""
        raise DataError(
            f"{name} is not prepared in {builder.data_path}{originals}; if it is elsewhere, --data-dir says where; "
            f"if not, first: {_prepare_command(name, data_dir)}"
        )
    try:
        train, test = (builder.as_data_source(split=split) for split in ("train", kind.test_split))
        shape, label = builder.info.features["image"].shape, builder.info.features["label"]
        classes = label.num_classes
        parts: list[Examples] = [Stored(train, shape, classes), Stored(test, shape, classes)]
        if (len(train) + len(test)) * math.prod(shape) <= memory_limit:
            parts = [in_memory(part) for part in parts]
        parts[1].fetch(spread(len(test)))  # so that a damaged file shows now, and not after an epoch of training
        return dataset_of(*parts, classes=classes, pad=kind.pad, flip=kind.flip, names=tuple(label.names))
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
        parts = [in_memory(part) for part in parts]
    others = {name: value for name, value in vars(dataset).items() if name not in ("train", "test", "mean", "std")}
    return dataset_of(*parts, **others)


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; 360 of them, the same ones always, are the test split."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1).astype(np.uint8)
    parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = parts
    train, test = Arrays(train_images, train_labels), Arrays(test_images, test_labels)
    return dataset_of(train, test, classes=10, pad=0, flip=False, largest=16)


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
    return dataset_of(*parts, classes=10, pad=0, flip=False)


WITHOUT_FILES: dict[str, Callable[[], Dataset]] = {"digits": _digits, "mnist1d": mnist1d}
"""Makers of the data sets that come with a package."""


def _damaged(name: str, folder: Any, data_dir: Path | None, error: Exception) -> str:
    return (
        f"{name} in {folder} cannot be read ({one_line(error)}); "
        f"remove that folder and prepare it again: {_prepare_command(name, data_dir)}"
    )


def _prepare_command(name: str, data_dir: Path | None) -> str:
    folder = "" if data_dir is None else f" --data-dir {data_dir}"
    return f"python experiments/prepare_data.py {name}{folder}"
