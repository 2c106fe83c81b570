import gzip
import http.server
import importlib.util
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_archives
from helpers import ROOT
from tensorflow_datasets.core.download import downloader

from experiments import prepare_data
from experiments.data import DATASETS, DataError, idx_files, load, training_batches
from experiments.data.examples import Arrays, Stored
from experiments.data.idx_files import CHECKSUMS, FILES
from experiments.data.sets import WITHOUT_FILES, make_builder
from experiments.data.tiny_imagenet import TinyImagenet

STORED = [name for name in DATASETS if name not in WITHOUT_FILES]
ORIGINALS = list(CHECKSUMS)
TEST_SPLIT = dict.fromkeys(STORED, "test") | {"tiny_imagenet": "validation"}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = {"cifar100": 100, "tiny_imagenet": len(tiny_archives.WNIDS)}

needs_tensorflow = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow")


@pytest.fixture(autouse=True)
def no_system_folders(monkeypatch):
    """Whatever packages this machine has."""
    monkeypatch.setattr(idx_files, "SYSTEM_FOLDERS", {})


@pytest.fixture
def archives(tmp_path):
    return tmp_path / "archives"


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program in this process; returns its exit status, its output, and the last line of its errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
        status = prepare_data.main()
        captured = capsys.readouterr()
        return status, captured.out, last_line(captured.err)

    return run


def last_line(errors):
    """As it would be seen: progress bars return to the beginning of their line."""
    return errors.rstrip("\n").split("\n")[-1].split("\r")[-1]


def make_original(monkeypatch, name, archives):
    contents = tiny_archives.write(name, archives)
    tiny_archives.expect(monkeypatch, name, archives)
    return contents


def in_any_order(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def assert_holds(dataset, contents, name):
    for examples, split in ((dataset.train, "train"), (dataset.test, TEST_SPLIT[name])):
        read = examples.fetch(np.arange(len(examples)))
        assert in_any_order(*read) == in_any_order(*contents[split])


def assert_nothing_is_left(name, data_dir):
    assert list(data_dir.iterdir()) == []
    with pytest.raises(DataError, match=f"{name} is not prepared"):
        load(name, data_dir)


# What is said before anything is made; none of this takes TensorFlow.


def test_unknown_name_and_digits(run):
    assert run("imagenet")[::2] == (2, f"prepare_data.py: name must be one of {', '.join(DATASETS)}, got imagenet")
    for name in WITHOUT_FILES:
        status, output, error = run(name)
        assert (status, error) == (0, "")
        assert "ready" in output


@pytest.mark.parametrize("name", STORED)
def test_unprepared_data_names_the_command(name, data_dir):
    with pytest.raises(DataError, match=f"is not prepared.*python experiments/prepare_data.py {name} --data-dir"):
        load(name, data_dir)


def test_all_missing_archives_are_named(run, monkeypatch, archives, data_dir):
    make_original(monkeypatch, "mnist", archives)
    for name in ("train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
        (archives / name).unlink()
    status, _, error = run("mnist", "--from", archives, "--data-dir", data_dir)
    assert status == 1
    missing = "train-labels-idx1-ubyte, t10k-images-idx3-ubyte"
    assert error == f"prepare_data.py: missing in {archives}: {missing}, each as it is or with .gz"
    assert not data_dir.exists()


def test_missing_archive_for_tensorflow_is_named(run, monkeypatch, archives, data_dir):
    archives.mkdir()
    status, _, error = run("cifar10", "--from", archives, "--data-dir", data_dir)
    assert (status, error) == (1, f"prepare_data.py: missing in {archives}: cifar-10-binary.tar.gz")
    assert not data_dir.exists()


def test_wrong_checksum_is_said(run, monkeypatch, archives, data_dir):
    make_original(monkeypatch, "cifar10", archives)
    archive = archives / "cifar-10-binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    status, _, error = run("cifar10", "--from", archives, "--data-dir", data_dir)
    assert status == 1
    assert error.startswith(f"prepare_data.py: {archive} is damaged or not the original: expected sha256 ")
    assert not data_dir.exists()


def test_missing_tensorflow_is_said_in_one_line(run, monkeypatch, archives, data_dir):
    make_original(monkeypatch, "cifar10", archives)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    status, _, error = run("cifar10", "--from", archives, "--data-dir", data_dir)
    assert (status, error) == (
        1,
        "prepare_data.py: preparing needs TensorFlow; install it: pip install -e '.[tfds]'",
    )
    assert not data_dir.exists()


def test_missing_tfds_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[experiments\]'"):
        load("cifar10")


# Archives in the original formats, through TensorFlow and back.


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.parametrize("name", STORED)
def test_what_was_put_in_is_read_back(run, monkeypatch, archives, data_dir, name):
    contents = make_original(monkeypatch, name, archives)
    status, output, error = run(name, "--from", archives, "--data-dir", data_dir)
    assert status == 0, error
    sizes = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in contents.items())
    assert output.startswith(f"{name} is prepared in ")
    assert output.endswith(f": {sizes}\n")
    assert [path.name for path in data_dir.iterdir()] == [name]

    dataset = load(name, data_dir)
    assert dataset.classes == CLASSES.get(name, 10)
    assert_holds(dataset, contents, name)
    pixels = contents["train"][0].reshape(-1, contents["train"][0].shape[-1])
    np.testing.assert_allclose(dataset.mean, pixels.mean(0))
    np.testing.assert_allclose(dataset.std, pixels.std(0))

    streamed = load(name, data_dir, memory_limit=0)
    assert isinstance(streamed.train, Arrays if name in ORIGINALS else Stored)
    assert_holds(streamed, contents, name)

    status, output, _ = run(name, "--data-dir", data_dir)
    assert status == 0
    if name in ORIGINALS:
        assert output == f"{name} needs no preparation, its files are in {data_dir / name}\n"
    else:
        assert output == f"{name} is already prepared in {data_dir / name}/{make_builder(name, data_dir).version}\n"


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.parametrize("folder", ["sizes=[64,64]", "a\\[b]*"])
def test_data_folders_of_any_name(run, monkeypatch, archives, tmp_path, folder):
    contents = make_original(monkeypatch, "cifar10", archives)
    status, _, error = run("cifar10", "--from", archives, "--data-dir", tmp_path / folder)
    assert status == 0, error
    assert_holds(load("cifar10", tmp_path / folder), contents, "cifar10")


@needs_tensorflow
def test_reading_takes_no_tensorflow(run, monkeypatch, archives, data_dir):
    make_original(monkeypatch, "tiny_imagenet", archives)
    assert run("tiny_imagenet", "--from", archives, "--data-dir", data_dir)[0] == 0
    code = f"""
import sys
from pathlib import Path
import numpy as np
from experiments.data import Augmentation, evaluation_batches, load, training_batches

def batches(workers, **options):
    dataset = load("tiny_imagenet", Path({str(data_dir)!r}), **options)
    augmentation = Augmentation(pad=4, flip=True, cutout=16)
    training = training_batches(dataset, 4, seed=0, epochs=2, augmentation=augmentation, workers=workers)
    return [*training, *evaluation_batches(dataset, 5)]

if __name__ == "__main__":
    whole, streamed = batches(0), batches(2, memory_limit=0)
    assert len(whole) == len(streamed) == 2 * 4 + 3
    for left, right in zip(whole, streamed):
        for a, b in zip(left, right):
            np.testing.assert_array_equal(a, b)
    print("tensorflow" in sys.modules)
"""
    script = data_dir / "read.py"  # in a file, which the workers import
    script.write_text(code)
    process = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "False\n"


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.parametrize("name", ["cifar100", "cifar10", "tiny_imagenet"])
def test_a_truncated_archive_leaves_nothing(run, monkeypatch, archives, data_dir, name):
    tiny_archives.write(name, archives)
    largest = max(archives.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    tiny_archives.expect(monkeypatch, name, archives)  # so that its checksum is right
    status, _, error = run(name, "--from", archives, "--data-dir", data_dir)
    assert status == 1
    assert error.startswith(f"prepare_data.py: {name} could not be prepared (")
    assert_nothing_is_left(name, data_dir)


def without(files, *paths):
    return {path: data for path, data in files.items() if path not in paths}


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda files: without(files, "wnids.txt"), "tiny-imagenet-200/wnids.txt"),
        (lambda files: without(files, "val/val_annotations.txt"), "tiny-imagenet-200/val/val_annotations.txt"),
        (
            lambda files: without(files, *(f"train/n02/images/n02_{number}.JPEG" for number in range(6))),
            "no training images of classes in wnids.txt: n02",
        ),
        (lambda files: files | {"wnids.txt": b"n03\nn02\n"}, "training images of classes not in wnids.txt: n01"),
        (
            lambda files: without(files, "val/images/val_7.JPEG", "val/images/val_9.JPEG"),
            "no validation images named in val_annotations.txt: val_7.JPEG, val_9.JPEG",
        ),
        (
            lambda files: files | {"val/images/val_99.JPEG": files["val/images/val_0.JPEG"]},
            "validation images not in val_annotations.txt: val_99.JPEG",
        ),
        (
            lambda files: (
                files | {"val/val_annotations.txt": files["val/val_annotations.txt"] + b"val_0.JPEG\tn77\t0\t0\t1\t1\n"}
            ),
            "classes in val_annotations.txt but not in wnids.txt: n77",
        ),
        (lambda files: files | {"train/n01/images/n01_0.JPEG": b"no image"}, "UnidentifiedImageError"),
    ],
)
def test_tiny_imagenet_with_parts_missing_is_refused(run, archives, data_dir, damage, problem):
    files, _ = tiny_archives.tiny_imagenet_files(np.random.default_rng(0))
    archives.mkdir()
    tiny_archives.zip_tiny_imagenet(archives, damage(files))
    status, _, error = run("tiny_imagenet", "--from", archives, "--data-dir", data_dir)
    assert status == 1
    assert problem in error
    assert_nothing_is_left("tiny_imagenet", data_dir)


def meet_with(mishap, name, archives, data_dir):
    command = [
        sys.executable,
        str(ROOT / "tests" / "experiments" / "tiny_archives.py"),
        mishap,
        name,
        str(archives),
        str(data_dir),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.parametrize("name", ["cifar10", "tiny_imagenet"])
def test_a_full_disk_leaves_nothing(archives, data_dir, name):
    tiny_archives.write(name, archives)
    process = meet_with("full", name, archives, data_dir)
    assert process.returncode == 1, process.stderr
    error = last_line(process.stderr)
    assert error.startswith(f"prepare_data.py: {name} could not be prepared (")
    assert "File too large" in error
    assert_nothing_is_left(name, data_dir)


@pytest.mark.slow
@needs_tensorflow
def test_killed_preparation_leaves_nothing(run, monkeypatch, archives, data_dir):
    contents = make_original(monkeypatch, "tiny_imagenet", archives)
    process = meet_with("killed", "tiny_imagenet", archives, data_dir)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [path.name for path in data_dir.iterdir()] == ["tiny_imagenet.preparing"]
    with pytest.raises(DataError, match="tiny_imagenet is not prepared"):
        load("tiny_imagenet", data_dir)
    assert run("tiny_imagenet", "--from", archives, "--data-dir", data_dir)[0] == 0
    assert [path.name for path in data_dir.iterdir()] == ["tiny_imagenet"]
    assert [path.name for path in (data_dir / "tiny_imagenet").iterdir()] == ["1.0.0"]
    assert_holds(load("tiny_imagenet", data_dir), contents, "tiny_imagenet")


def test_one_process_prepares_a_data_set(tmp_path):
    folder = tmp_path / "work"
    with prepare_data._workspace(folder):
        with pytest.raises(DataError, match="another process"), prepare_data._workspace(folder):
            pass
        assert folder.exists()
    assert not folder.exists()


@pytest.mark.slow
@needs_tensorflow
def test_a_damaged_data_set_is_refused_with_what_to_do(run, monkeypatch, archives, data_dir):
    make_original(monkeypatch, "cifar10", archives)
    assert run("cifar10", "--from", archives, "--data-dir", data_dir)[0] == 0
    for split in ("train", "test"):
        (records,) = data_dir.glob(f"cifar10/*/cifar10-{split}*")
        whole = records.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:-1], whole[:9_000] + b"\0" * 100 + whole[9_100:]):
            records.write_bytes(damaged)
            for memory_limit in (2**30, 0):
                with pytest.raises(DataError, match=r"cannot be read .*; remove that folder and prepare it again: pyt"):
                    load("cifar10", data_dir, memory_limit)
        records.write_bytes(whole)
    (description,) = data_dir.glob("cifar10/*/dataset_info.json")
    text = description.read_text()
    description.write_text(text[:100])
    with pytest.raises(DataError, match="remove that folder"):
        load("cifar10", data_dir)
    description.unlink()
    with pytest.raises(DataError, match="cifar10 is not prepared"):
        load("cifar10", data_dir)
    status, _, error = run("cifar10", "--from", archives, "--data-dir", data_dir)
    assert (status, error) == (
        1,
        f"prepare_data.py: {description.parent} is there but holds no whole data set; remove it first",
    )
    description.write_text(text)
    load("cifar10", data_dir)
    records.unlink()
    with pytest.raises(DataError, match="remove that folder"):
        load("cifar10", data_dir)
    shutil.rmtree(data_dir / "cifar10")
    assert run("cifar10", "--from", archives, "--data-dir", data_dir)[0] == 0
    load("cifar10", data_dir)


@pytest.mark.slow
@needs_tensorflow
def test_without_a_folder_the_archive_is_downloaded(run, monkeypatch, archives, data_dir):
    contents = tiny_archives.write("tiny_imagenet", archives)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=archives)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setattr(downloader, "MAX_RETRIES", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(TinyImagenet, "URL", f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert run("tiny_imagenet", "--data-dir", data_dir / "there")[0] == 0
        (archives / "tiny-imagenet-200.zip").unlink()
        status, _, error = run("tiny_imagenet", "--data-dir", data_dir / "absent")
        server.shutdown()
    assert_holds(load("tiny_imagenet", data_dir / "there"), contents, "tiny_imagenet")
    assert status == 1
    assert "could not be prepared (" in error
    assert "404" in error
    assert_nothing_is_left("tiny_imagenet", data_dir / "absent")


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="reads the files of Debian's package")
def test_fashion_mnist_is_the_published_one():
    """In sizes, classes and moments."""
    dataset = load("fashion_mnist", DEBIAN)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (60_000, 10_000, 10)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), 6_000)
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), 1_000)
    pixels = dataset.train.images / 255
    np.testing.assert_allclose((pixels.mean(), pixels.std()), (0.2860, 0.3530), atol=1e-4)
    np.testing.assert_allclose((dataset.mean[0] / 255, dataset.std[0] / 255), (0.2860, 0.3530), atol=0.002)
    batch = next(training_batches(dataset, 512, seed=0, epochs=1))
    np.testing.assert_allclose((batch.images.mean(), batch.images.std()), (0, 1), atol=0.05)


# MNIST and Fashion-MNIST from their original files: neither TensorFlow nor tensorflow-datasets.


@pytest.fixture
def without_tensorflow(monkeypatch):
    for package in ("tensorflow", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, package, None)


def unpack(archives, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        (folder / file).write_bytes(gzip.decompress((archives / f"{file}.gz").read_bytes()))


@pytest.mark.usefixtures("without_tensorflow")
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "."), ("mnist", "mnist"), *(("fashion_mnist", f) for f in (".", "fashion-mnist", "fashion_mnist"))],
)
@pytest.mark.parametrize("packed", [True, False])
def test_original_files_are_read_where_they_are(monkeypatch, archives, data_dir, name, folder, packed):
    contents = make_original(monkeypatch, name, archives)
    shutil.copytree(archives, data_dir / folder) if packed else unpack(archives, data_dir / folder)
    dataset = load(name, data_dir)
    assert_holds(dataset, contents, name)
    assert len(dataset.names) == dataset.classes == 10
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert_holds(load(name), contents, name)


@pytest.mark.usefixtures("without_tensorflow")
def test_system_folder_is_tried_last(monkeypatch, archives, data_dir):
    contents = make_original(monkeypatch, "fashion_mnist", archives)
    monkeypatch.setattr(idx_files, "SYSTEM_FOLDERS", {"fashion_mnist": archives})
    assert_holds(load("fashion_mnist", data_dir), contents, "fashion_mnist")
    shutil.copytree(archives, data_dir)
    (data_dir / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=f"missing in {data_dir}: train-images-idx3-ubyte, each as it is or with .gz"):
        load("fashion_mnist", data_dir)


@pytest.mark.usefixtures("without_tensorflow")
@pytest.mark.parametrize("change", ["compressed anew", "other contents", "truncated", "not packed"])
def test_original_files_count_by_their_contents(monkeypatch, archives, change):
    make_original(monkeypatch, "fashion_mnist", archives)
    archive = archives / "train-labels-idx1-ubyte.gz"
    contents = gzip.decompress(archive.read_bytes())
    anew = gzip.compress(contents[:-1] if change == "other contents" else contents, compresslevel=1, mtime=1)
    archive.write_bytes({"truncated": anew[:-10], "not packed": contents}.get(change, anew))
    if change == "compressed anew":
        load("fashion_mnist", archives)
    else:
        with pytest.raises(DataError, match=f"{archive} (is damaged or not the original|cannot be read)"):
            load("fashion_mnist", archives)


def test_mnist_is_not_taken_for_fashion_mnist(monkeypatch, archives):
    make_original(monkeypatch, "mnist", archives)
    load("mnist", archives)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is damaged or not the original"):
        load("fashion_mnist", archives)


@pytest.mark.usefixtures("without_tensorflow")
@pytest.mark.parametrize("name", ORIGINALS)
def test_original_files_are_kept_without_tensorflow(run, monkeypatch, archives, data_dir, name):
    contents = make_original(monkeypatch, name, archives)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=archives)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setitem(prepare_data._ADDRESSES, name, f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        downloaded = run(name, "--data-dir", data_dir / "downloaded")
        copied = run(name, "--from", archives, "--data-dir", data_dir / "copied")
        (archives / f"{FILES[-1]}.gz").unlink()
        status, _, error = run(name, "--data-dir", data_dir / "absent")
        server.shutdown()
    for outcome, folder in ((downloaded, data_dir / "downloaded"), (copied, data_dir / "copied")):
        assert outcome == (0, f"{name} is prepared in {folder / name}: 40 train, 16 test\n", "")
        assert [path.name for path in folder.iterdir()] == [name]
        assert_holds(load(name, folder), contents, name)
    assert status == 1
    assert error == f"prepare_data.py: {name} could not be prepared (HTTPError: HTTP Error 404: File not found)"
    assert list((data_dir / "absent").iterdir()) == []


@needs_tensorflow
def test_original_files_have_the_prepared_order(run, monkeypatch, archives, data_dir):
    contents = make_original(monkeypatch, "mnist", archives)
    tiny_archives.expect_with_tensorflow(monkeypatch, "mnist", archives)
    prepare_data.make_with_tensorflow("mnist", archives, data_dir)
    assert "mnist is already prepared in " in run("mnist", "--data-dir", data_dir)[1]
    prepared, original = load("mnist", data_dir), load("mnist", archives)
    assert_holds(prepared, contents, "mnist")
    assert not np.array_equal(original.train.images, contents["train"][0])
    for one, other in ((prepared.train, original.train), (prepared.test, original.test)):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert prepared.names == original.names
    (data_dir / FILES[0]).write_bytes(b"not to be read: prepared data come first")
    load("mnist", data_dir)
