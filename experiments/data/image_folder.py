"""A folder of one's own images as a data set.

`PATH/train/CLASS/*` and `PATH/test/CLASS/*`. Where there is no `test`, the classes stand in `PATH/train` or in PATH,
and `HELD_OUT` of each class is held out for testing.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, UInt8

from experiments.data.examples import Arrays, DataError, Dataset, Examples, dataset_of, in_memory
from experiments.data.pictures import SUFFIXES, picture_size, read_picture

HELD_OUT = Fraction(1, 5)
LARGEST_SIDE = 224
"""Pixels to which the longer side is reduced where no size is given: photographs fill the memory of any machine."""
_SHIFT = Fraction(1, 8)  # of the shorter side, in augmentation
_NAMED = 10  # problems that a message names
Item = TypeVar("Item")
Value = TypeVar("Value")
_EXPECTED = "expected PATH/train/CLASS/* and PATH/test/CLASS/*, or PATH/CLASS/*"


class Pictures:
    """Examples in image files, decoded when they are fetched."""

    def __init__(self, files: list[Path], labels: Int[np.ndarray, " n"], shape: tuple[int, int, int]) -> None:
        self._files, self._labels, self.shape = files, labels.astype(np.int32), shape

    def __len__(self) -> int:
        return len(self._files)

    def fetch(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[UInt8[np.ndarray, "batch height width channels"], Int[np.ndarray, " batch"]]:
        """Images and labels at these positions."""
        try:
            images = [read_picture(self._files[row], self.shape) for row in rows.tolist()]
        except (ValueError, OSError) as error:
            raise DataError(str(error)) from error
        return np.stack(images), self._labels[rows]


class _Splits(NamedTuple):
    """Files to train and to test on, with their classes; `held_out` says that the folder has no files to test on."""

    train: list[tuple[Path, str]]
    test: list[tuple[Path, str]]
    held_out: bool


def read_folder(folder: Path, *, image_size: int | None, batch_size: int, memory_limit: int) -> Dataset:
    """The images of a folder, in color if any of them has color, else gray.

    Args:
        folder: see the module.
        image_size: height and width to which they are stretched; by default the medians of the training images' own,
            reduced together where one is larger than `LARGEST_SIDE`.
        batch_size: the training images must be at least as many.
        memory_limit: bytes of decoded images up to which they are kept in memory.

    Raises:
        DataError: the folder is no data set, or images are missing or damaged; all problems are named.
    """
    problems: list[str] = []
    try:
        train, test, held_out = _find_splits(folder, problems)
        if len(train) < batch_size:
            problems.append(f"{len(train)} training images do not fill a batch of {batch_size} (--batch-size)")
        files = [file for file, _ in (*train, *test)]
        size = (image_size, image_size) if image_size else _usual_size(files[: len(train)])
        fits = len(files) * math.prod(size) * 3 <= memory_limit
        images = np.empty((len(files), *size, 3), np.uint8) if fits else None
        has_color = _decode(files, size, images, problems)
        _refuse(folder, problems)
        fingerprint = _fingerprint(folder, files)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error})") from error
    names = sorted({name for _, name in train})
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of[name] for _, name in (*train, *test)], np.int32)
    shape = (*size, 3 if has_color else 1)
    parts: list[Examples] = []
    for part in (slice(None, len(train)), slice(len(train), None)):
        if images is not None:
            parts.append(Arrays(np.ascontiguousarray(images[part, ..., : shape[-1]]), labels[part]))
        else:
            parts.append(Pictures(files[part], labels[part], shape))
    if len(files) * math.prod(shape) <= memory_limit:
        parts = [part if isinstance(part, Arrays) else in_memory(part) for part in parts]
    tested = f"{len(test)} held out for testing" if held_out else f"{len(test)} for testing"
    return dataset_of(
        *parts,
        classes=len(names),
        pad=int(min(size) * _SHIFT),
        flip=False,
        names=tuple(names),
        fingerprint=fingerprint,
        description=(
            f"{len(train)} images for training and {tested}, {len(names)} classes, "
            f"{'color' if has_color else 'gray'}, scaled to {size[0]}x{size[1]} (--image-size)"
        ),
    )


def _find_splits(folder: Path, problems: list[str]) -> _Splits:
    """The files; what is wrong with their places and numbers is added to `problems`."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; {_EXPECTED}")
    # A folder called train that holds pictures, not folders, is a class: of vehicles, say.
    train, test = ({file.name: file for file in _folders_in(folder / name)} for name in ("train", "test"))
    if train:
        expected = ("train", "test") if test else ("train",)
        beside = [file.name for file in _folders_in(folder) if file.name not in expected]
        if beside:
            problems.append(f"{', '.join(beside)} beside train; expected test, with a folder for each class")
        problems += _lost_in(folder)
    else:
        test, train = {}, {file.name: file for file in _folders_in(folder)}
    if not train:
        raise DataError(f"{folder} holds no classes; {_EXPECTED}")
    if len(train) == 1:
        problems.append(f"there is one class, {', '.join(train)}; expected at least two")
    of_training = {name: _pictures_in(place, problems) for name, place in train.items()}
    of_testing = {name: _pictures_in(place, problems) for name, place in test.items()}
    for name, place in train.items():
        if len(of_training[name]) < 2:
            found = "a single picture" if of_training[name] else "no pictures"
            problems.append(f"{place} has {found}; expected at least two")
        if test and not of_testing.get(name):
            problems.append(f"{folder / 'test' / name} has no pictures")
    problems += [f"{place} is a class without training images" for name, place in test.items() if name not in train]
    for place in {file.parent for file in (*train.values(), *test.values())}:
        problems += _lost_in(place)
    held_out = not test
    if held_out:
        for name, files in of_training.items():
            count = max(1, round(len(files) * HELD_OUT))
            of_testing[name], of_training[name] = files[:count], files[count:]
    return _Splits(_mixed(of_training), _mixed(of_testing), held_out)


def _folders_in(folder: Path) -> list[Path]:
    return [file for file in _visible_in(folder) if file.is_dir()] if folder.is_dir() else []


def _visible_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def _is_picture(file: Path) -> bool:
    """By its name; readme.txt and Thumbs.db are none."""
    return file.suffix.lower() in SUFFIXES


def _lost_in(folder: Path) -> list[str]:
    return [f"{file} lies in no class's folder" for file in _visible_in(folder) if _is_picture(file) and file.is_file()]


def _pictures_in(folder: Path, problems: list[str]) -> list[Path]:
    """The pictures of a class, in the order of `_key`."""
    files = _visible_in(folder)
    problems += [f"{file} is a folder; expected pictures" for file in files if file.is_dir()]
    return sorted((file for file in files if _is_picture(file) and not file.is_dir()), key=_key)


def _mixed(by_class: dict[str, list[Path]]) -> list[tuple[Path, str]]:
    """All files with their classes, the classes mixed: what is measured on the first test images is of all of them."""
    return sorted(((file, name) for name, files in by_class.items() for file in files), key=lambda row: _key(row[0]))


def _key(file: Path) -> bytes:
    """A number that looks random and depends on class and name alone: a new file moves few others to another split."""
    return hashlib.sha256(os.fsencode(f"{file.parent.name}/{file.name}")).digest()


def _usual_size(files: list[Path]) -> tuple[int, int]:
    """The medians of height and width, in whole pixels; files that cannot be read are left to `_decode` to name."""

    def size(file: Path) -> tuple[int, int] | None:
        try:
            return picture_size(file)
        except (ValueError, OSError):
            return None

    sizes = [found for found in _in_threads(size, files) if found is not None]
    if not sizes:
        return 1, 1
    height, width = np.median(sizes, axis=0).tolist()
    scale = min(1.0, LARGEST_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _decode(
    files: list[Path],
    size: tuple[int, int],
    images: UInt8[np.ndarray, "n height width 3"] | None,
    problems: list[str],
) -> bool:
    """Decodes all files, into `images` if given; returns whether any has color.

    What is damaged is added to `problems`.
    """

    def decode(row: int) -> bool | str:
        try:
            pixels = read_picture(files[row], (*size, 3))
        except (ValueError, OSError) as error:
            return str(error)
        if images is not None:
            images[row] = pixels
        return bool((pixels != pixels[..., :1]).any())

    found = list(_in_threads(decode, range(len(files))))
    problems += [problem for problem in found if isinstance(problem, str)]
    return True in found


def _in_threads(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """The function's values in the order of the items; when interrupted it waits for those at work only."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        text = f"{folder} cannot be trained on: {'; '.join(problems[:_NAMED])}{more}"
        raise DataError("\\n".join(text.splitlines()))  # a name may hold more than one


def _fingerprint(folder: Path, files: list[Path]) -> str:
    """Of the list of files, by their paths in the folder, and their sizes."""
    lines = sorted(os.fsencode(f"{file.relative_to(folder)}\0{file.stat().st_size}\n") for file in files)
    return hashlib.sha256(b"".join(lines)).hexdigest()
