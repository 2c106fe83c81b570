"""Prepares a data set, out of downloads or of archives that are already there.

MNIST and Fashion-MNIST are kept as their original files; the others are made by tensorflow-datasets with TensorFlow.

See `python experiments/prepare_data.py --help`.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import io
import os
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from experiments.cli import BAD_SETTINGS, FAILED, INTERRUPTED, fail, run_program, settings_of

# isort: split

from tyro.conf import Positional, arg

from experiments.data import DATASETS, DataError
from experiments.data.idx_files import FILES, find_idx, idx_path, read_idx
from experiments.data.sets import WITHOUT_FILES, data_root, is_prepared, make_builder, one_line

_ADDRESSES = {  # of the folders that hold the original files
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Prepares a data set, once, for reading without TensorFlow.

    Either the whole data set is there in the end or nothing is.
    """

    name: Annotated[Positional[str], arg(help=f"one of {', '.join(DATASETS)}")]
    source: Annotated[Path | None, arg(name="from")] = None
    """folder that holds the original archives; by default they are downloaded"""
    data_dir: Path | None = None
    """folder of data sets, by default $TFDS_DATA_DIR or ~/tensorflow_datasets"""


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    if config.name not in DATASETS:
        return fail(f"name must be one of {', '.join(DATASETS)}, got {config.name}", BAD_SETTINGS)
    if config.name in WITHOUT_FILES:
        print(f"{config.name} needs no files: ready to be read")
        return 0
    try:
        prepare(config.name, config.source, config.data_dir)
        return 0
    except DataError as error:
        problem, status = str(error), FAILED
    except KeyboardInterrupt:
        problem, status = "interrupted", INTERRUPTED
    # Here the exception is gone and with it the progress bars that it kept, but the cursor is where they left it.
    print(end="\r", file=sys.stderr)
    return fail(problem, status)


def prepare(name: str, source: Path | None, data_dir: Path | None) -> None:
    """Makes the data set called `name` in `data_dir`, unless it is there; from the archives in `source`, if given.

    Raises:
        DataError: an archive is missing or is not the original, a package is missing, or something failed.
    """
    if name in _ADDRESSES and not is_prepared(name, data_root(data_dir)):
        keep_originals(name, source, data_root(data_dir))
    else:
        make_with_tensorflow(name, source, data_dir)


def keep_originals(name: str, source: Path | None, root: Path) -> None:
    """Copies or downloads the original files to where they are read, unless they are in such a place.

    Raises:
        DataError: a file is missing or is not the original, or something failed.
    """
    found, folder = find_idx(name, root), root / name
    if found is not None:
        read_idx(name, found)
        print(f"{name} needs no preparation, its files are in {found}")
        return
    if folder.exists():
        raise DataError(f"{folder} is there but holds no whole data set; remove it first")
    if source is not None:
        read_idx(name, source)
    try:
        with _workspace(root / f"{name}.preparing") as work:
            work.mkdir()
            if source is not None:
                for path in filter(None, (idx_path(source, file) for file in FILES)):
                    shutil.copy(path, work)
            else:
                for file in FILES:
                    _download(f"{_ADDRESSES[name]}/{file}.gz", work / f"{file}.gz")
            train, test = read_idx(name, work)
            work.rename(folder)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{name} could not be prepared ({one_line(error)})") from error
    print(f"{name} is prepared in {folder}: {len(train)} train, {len(test)} test")


def _download(address: str, path: Path) -> None:
    with urllib.request.urlopen(address, timeout=60) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file)


def make_with_tensorflow(name: str, source: Path | None, data_dir: Path | None) -> None:
    """Makes the data set through tensorflow-datasets, unless it is there; arguments and errors as for `prepare`."""
    builder = make_builder(name, data_dir)
    if builder.is_prepared():
        print(f"{name} is already prepared in {builder.data_path}")
        return
    if builder.data_path.exists():
        raise DataError(f"{builder.data_path} is there but holds no whole data set; remove it first")
    try:
        archives = {} if source is None else _find_archives(builder, source)
        _import_tensorflow()
        with _workspace(Path(builder.data_dir_root) / f"{name}.preparing") as folder:
            _put_in_place(builder, archives, folder / "downloads")
            staged = make_builder(name, folder)
            with contextlib.redirect_stdout(io.StringIO()):  # it would tell that the result is in this folder
                staged.download_and_prepare(download_dir=folder / "downloads")
            builder.data_path.parent.mkdir(parents=True, exist_ok=True)
            staged.data_path.rename(builder.data_path)
    except DataError:
        raise
    except Exception as error:  # tensorflow-datasets lets everything through: of the network, the disk, the archives
        raise DataError(f"{name} could not be prepared ({one_line(error)})") from error
    splits = ", ".join(f"{split.num_examples} {key}" for key, split in staged.info.splits.items())
    print(f"{name} is prepared in {builder.data_path}: {splits}")


def _find_archives(builder: Any, source: Path) -> dict[str, Path]:
    """The data set's archives in `source` by their addresses, all of them there and unchanged.

    Raises:
        DataError: some are missing, or one is not the original.
    """
    registered = builder.url_infos or {builder.URL: None}  # of Tiny ImageNet no checksum is known
    archives = {url: source / url.rsplit("/", 1)[1] for url in registered}
    missing = [path.name for path in archives.values() if not path.is_file()]
    if missing:
        raise DataError(f"missing in {source}: {', '.join(missing)}")
    for url, info in registered.items():
        if info is None:
            continue
        with archives[url].open("rb") as archive:
            checksum = hashlib.file_digest(archive, "sha256").hexdigest()
        if checksum != info.checksum:
            raise DataError(
                f"{archives[url]} is damaged or not the original: expected sha256 {info.checksum}, got {checksum}"
            )
    return archives


def _put_in_place(builder: Any, archives: dict[str, Path], downloads: Path) -> None:
    """Links the archives as if tensorflow-datasets had downloaded them."""
    from etils import epath
    from tensorflow_datasets.core.download import checksums, resource

    folder = downloads / builder.name
    folder.mkdir(parents=True)
    for url, archive in archives.items():
        registered = (builder.url_infos or {}).get(url)
        link = folder / resource.get_dl_fname(url, registered and registered.checksum)
        link.symlink_to(archive.resolve())
        info = registered or checksums.compute_url_info(archive)
        resource.write_info_file(url, epath.Path(link), builder.name, archive.name, info)


def _import_tensorflow() -> None:
    """Imports TensorFlow, which generates the files, so that it takes no GPU from others.

    Raises:
        DataError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it greets at length
    try:
        import tensorflow
    except ImportError as error:
        raise DataError("preparing needs TensorFlow; install it: pip install -e '.[tfds]'") from error
    tensorflow.config.set_visible_devices([], "GPU")


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A new folder for what is half made, removed in the end; so is what a killed run left there.

    Raises:
        DataError: another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError as error:
            raise DataError(f"another process is at work in {folder}") from error
        try:
            shutil.rmtree(folder / "work", ignore_errors=True)
            yield folder / "work"
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # threads of a failed extraction may still be writing


if __name__ == "__main__":
    run_program(main)
