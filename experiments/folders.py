"""Folders of any name, as sweep tools make them: `widths=[64,64]`.

Importing this has Orbax and tensorflow-datasets find files there. Both search with etils, which takes brackets in the
name of the folder itself for a pattern.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from etils.epath.gpath import PosixGPath

_find = PosixGPath.glob


def _find_in(folder: PosixGPath, pattern: str) -> Iterator[PosixGPath]:
    found: Iterator[PosixGPath] = _find(type(folder)(glob.escape(os.fspath(folder))), pattern)
    return found


PosixGPath.glob = _find_in


def check_writable_name(folder: Path) -> None:
    """Raises ValueError where TensorStore, which writes the arrays of a checkpoint, would write to another folder."""
    name = str(folder.absolute())
    if any(letter == "\\" or "\ud800" <= letter <= "\udfff" for letter in name):
        raise ValueError(
            f"{name!a} cannot hold checkpoints: expected UTF-8 without backslashes; give another --workdir"
        )
