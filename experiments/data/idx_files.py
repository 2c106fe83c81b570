"""MNIST and Fashion-MNIST from their original files, in the IDX format, packed by gzip or not."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Int

from experiments.data.examples import Arrays, DataError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CHECKSUMS = {  # sha256 of each file, unpacked: both data sets, and others, have files of these names
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
FOLDERS = {"mnist": ("mnist",), "fashion_mnist": ("fashion-mnist", "fashion_mnist")}
"""Names of folders, in the one for all data sets, in which the files are looked for first."""
SYSTEM_FOLDERS = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}
"""Where Debian's package `dataset-fashion-mnist` puts them."""
NAMES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip
"""Names of the classes, by label."""


def find_idx(name: str, root: Path) -> Path | None:
    """The first folder that holds any of the files: in `root` under a name of the data set's, `root`, the system's."""
    places = [*(root / folder for folder in FOLDERS[name]), root]
    if name in SYSTEM_FOLDERS:
        places.append(SYSTEM_FOLDERS[name])
    return next((place for place in places if any(idx_path(place, file) for file in FILES)), None)


def read_idx(name: str, folder: Path) -> tuple[Arrays, Arrays]:
    """Training and test examples, in the order in which tensorflow-datasets has them.

    Raises:
        DataError: files are missing, or one is not the data set's.
    """
    found = [idx_path(folder, file) for file in FILES]
    missing = [file for file, path in zip(FILES, found, strict=True) if path is None]
    if missing:
        raise DataError(f"missing in {folder}: {', '.join(missing)}, each as it is or with .gz")
    contents = [_read(path, checksum) for path, checksum in zip(found, CHECKSUMS[name], strict=True) if path]
    train_images, train_labels, test_images, test_labels = contents
    return _examples(train_images, train_labels, "train"), _examples(test_images, test_labels, "test")


def _examples(images: bytes, labels: bytes, split: str) -> Arrays:
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    order = prepared_order(len(pixels), split)
    return Arrays(pixels[order], np.frombuffer(labels, np.uint8, offset=8)[order].astype(np.int32))


def prepared_order(count: int, split: str) -> Int[np.ndarray, " count"]:
    """The rows of a split in the order of tensorflow-datasets, which sorts by the MD5 of the split's name and the row.

    Results on a part of the examples depend on their order.
    """
    keys = [hashlib.md5(f"{split}{row}".encode(), usedforsecurity=False).digest() for row in range(count)]
    return np.array(sorted(range(count), key=keys.__getitem__))


def idx_path(folder: Path, file: str) -> Path | None:
    """One of `FILES` in a folder, unpacked or packed; None where it is not there."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def _read(path: Path, checksum: str) -> bytes:
    try:
        packed = path.read_bytes()
        contents = gzip.decompress(packed) if path.suffix == ".gz" else packed
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); get that file again") from error
    found = hashlib.sha256(contents).hexdigest()
    if found != checksum:
        raise DataError(f"{path} is damaged or not the original: expected contents of sha256 {checksum}, got {found}")
    return contents
