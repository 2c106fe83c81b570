"""What a run keeps of a folder of images: its classes, and all that it takes to use the network without the folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from experiments.data.examples import DataError, Dataset

FILE = "data.json"


class Absent:
    """Examples of which the number and the shape are known alone."""

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        self._count, self.shape = count, shape

    def __len__(self) -> int:
        return self._count

    def fetch(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[UInt8[np.ndarray, "batch height width channels"], Int[np.ndarray, " batch"]]:
        """Raises DataError: there are none."""
        raise DataError("the images of this data set were not read")


def keep(workdir: Path, name: str, dataset: Dataset) -> None:
    """Writes to the folder of results what `read_kept` reads; only for data sets that are a user's own.

    Raises:
        ValueError: the folder holds results on other images, or what is there is damaged.
        OSError: it cannot be written.
    """
    if not dataset.fingerprint:
        return
    path = workdir / FILE
    known = _read(path) if path.exists() else {}
    if name in known:
        check_kept(workdir, name, dataset)
        return
    kept = {
        "fingerprint": dataset.fingerprint,
        "names": dataset.names,
        "shape": dataset.train.shape,
        "counts": (len(dataset.train), len(dataset.test)),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
    }
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(known | {name: kept}, indent=2) + "\n")
    unfinished.rename(path)


def check_kept(workdir: Path, name: str, dataset: Dataset) -> None:
    """Raises ValueError unless the images are those that the results in this folder are of; OSError as `read_kept`."""
    if dataset.fingerprint and _entry(workdir, name)["fingerprint"] != dataset.fingerprint:
        raise ValueError(
            f"{workdir} holds results on other images: files in {name} were added, removed or changed since; "
            "bring them back, or train anew with another --workdir"
        )


def read_kept(workdir: Path, name: str) -> Dataset:
    """The data set that the results are of, without its examples.

    Raises:
        OSError: nothing was kept.
        ValueError: what was kept is damaged.
    """
    kept = _entry(workdir, name)
    try:
        train, test = (Absent(count, tuple(kept["shape"])) for count in kept["counts"])
        mean, std = (np.array(kept[key], np.float64) for key in ("mean", "std"))
        names = tuple(kept["names"])
        return Dataset(train, test, len(names), mean, std, pad=0, flip=False, names=names)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(workdir / FILE) from error


def _entry(workdir: Path, name: str) -> dict[str, Any]:
    known = _read(workdir / FILE)
    if not isinstance(known.get(name), dict):
        raise _damaged(workdir / FILE)
    return dict(known[name])


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path) from error
    if not isinstance(known, dict):
        raise _damaged(path)
    return known


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} does not hold what a run keeps of its images; remove it and train anew")
