"""Small archives in the original formats; each maker returns what is in them, by split: images and labels.

As a program, `python tests/experiments/tiny_archives.py MISHAP NAME FOLDER DATA_DIR` prepares the archives in a
folder, in a process that meets with a mishap: "killed" by SIGKILL after a few examples, or "full",
where files grow no larger than a small disk would let them.
"""

import gzip
import hashlib
import io
import os
import resource
import signal
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import mnist as mnist_module

from experiments import prepare_data
from experiments.data.idx_files import CHECKSUMS, FILES
from experiments.data.tiny_imagenet import TinyImagenet

WNIDS = ("n03", "n01", "n02")  # not in alphabetical order
MNIST_COUNTS = {"train": 40, "test": 16}


def write(name, folder):
    """Archives of the data set called `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"cifar10": _cifar10, "cifar100": _cifar100, "tiny_imagenet": _tiny_imagenet}
    return makers.get(name, _mnist)(folder, np.random.default_rng(0))


def expect(monkeypatch, name, folder):
    """Makes the archives in `folder` the original ones."""
    if name in CHECKSUMS:
        sums = (hashlib.sha256(gzip.decompress((folder / f"{file}.gz").read_bytes())).hexdigest() for file in FILES)
        monkeypatch.setitem(CHECKSUMS, name, tuple(sums))
    elif name != "tiny_imagenet":
        expect_with_tensorflow(monkeypatch, name, folder)


def expect_with_tensorflow(monkeypatch, name, folder):
    """The same where tensorflow-datasets is to take them."""
    builder = tfds.builder_cls(name)
    infos = {
        url: checksums.compute_url_info(path)
        for url in builder.url_infos
        if (path := folder / url.rsplit("/", 1)[1]).exists()
    }
    monkeypatch.setattr(builder, "url_infos", infos)
    monkeypatch.setattr(mnist_module, "_TRAIN_EXAMPLES", MNIST_COUNTS["train"])
    monkeypatch.setattr(mnist_module, "_TEST_EXAMPLES", MNIST_COUNTS["test"])


def _mnist(folder, rng):
    contents = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        count = MNIST_COUNTS[split]
        images, labels = _draw(rng, (count, 28, 28, 1), 10)
        headers = [np.array(header, ">i4").tobytes() for header in ((2051, count, 28, 28), (2049, count))]
        for kind, header, values in zip(("images-idx3", "labels-idx1"), headers, (images, labels), strict=True):
            packed = gzip.compress(header + values.tobytes())
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(packed)
        contents[split] = images, labels
    return contents


def _cifar10(folder, rng):
    parts = {f"data_batch_{number}.bin": _draw(rng, (8, 32, 32, 3), 10) for number in range(1, 6)}
    test = _draw(rng, (16, 32, 32, 3), 10)
    files = {name: _cifar_records(images, labels[:, None]) for name, (images, labels) in parts.items()}
    files |= {"test_batch.bin": _cifar_records(test[0], test[1][:, None]), "batches.meta.txt": _names(10)}
    _tar(folder / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files)
    return {"train": tuple(np.concatenate(column) for column in zip(*parts.values(), strict=True)), "test": test}


def _cifar100(folder, rng):
    contents = {"train": _draw(rng, (40, 32, 32, 3), 100), "test": _draw(rng, (16, 32, 32, 3), 100)}
    files = {"coarse_label_names.txt": _names(20), "fine_label_names.txt": _names(100)}
    for split, (images, labels) in contents.items():
        files[f"{split}.bin"] = _cifar_records(images, np.stack([labels // 5, labels], 1))  # coarse label, fine label
    _tar(folder / "cifar-100-binary.tar.gz", "cifar-100-binary", files)
    return contents


def tiny_imagenet_files(rng):
    """Contents of the archive by path, and what should be read from it."""
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "words.txt": b"n01\ta thing\n"}
    read = {"train": [], "validation": []}
    for wnid in sorted(WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b""
        for number in range(6):
            jpeg, pixels = _jpeg(rng, {3: "L", 4: "CMYK"}.get(number, "RGB"))
            files[f"train/{wnid}/images/{wnid}_{number}.JPEG"] = jpeg
            read["train"].append((pixels, WNIDS.index(wnid)))
    annotations = ""
    for number in range(12):
        jpeg, pixels = _jpeg(rng, "L" if number == 5 else "RGB")
        label = int(rng.integers(len(WNIDS)))
        files[f"val/images/val_{number}.JPEG"] = jpeg
        files[f"test/images/test_{number}.JPEG"] = jpeg
        annotations += f"val_{number}.JPEG\t{WNIDS[label]}\t0\t32\t44\t62\n"
        read["validation"].append((pixels, label))
    files["val/val_annotations.txt"] = annotations.encode()
    return files, {name: tuple(np.array(column) for column in zip(*rows, strict=True)) for name, rows in read.items()}


def zip_tiny_imagenet(folder, files):
    """The archive with these contents."""
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w") as archive:
        for path in ("train/", "val/images/", "test/images/"):
            archive.mkdir(f"tiny-imagenet-200/{path}")
        for path, data in files.items():
            archive.writestr(f"tiny-imagenet-200/{path}", data)


def _tiny_imagenet(folder, rng):
    files, contents = tiny_imagenet_files(rng)
    zip_tiny_imagenet(folder, files)
    return contents


def _draw(rng, shape, classes):
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, classes, shape[0], np.uint8)


def _jpeg(rng, mode):
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).convert(mode)
    encoded = io.BytesIO()
    coarse.save(encoded, "JPEG")
    return encoded.getvalue(), np.asarray(Image.open(encoded).convert("RGB"))


def _cifar_records(images, labels):
    return np.concatenate([labels, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], 1).tobytes()


def _names(count):
    return "".join(f"class {number}\n" for number in range(count)).encode() + b"\n"


def _tar(path, folder, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _main(mishap, name, folder, data_dir):
    import pytest
    import tensorflow  # noqa: F401

    expect(pytest.MonkeyPatch(), name, Path(folder))
    if mishap == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    else:
        builder = TinyImagenet if name == "tiny_imagenet" else tfds.builder_cls(name)
        whole = builder._generate_examples

        def part(*args, **kwargs):
            for position, example in enumerate(whole(*args, **kwargs)):
                if position == 10:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield example

        builder._generate_examples = part
    sys.argv = ["prepare_data.py", name, "--from", folder, "--data-dir", data_dir]
    return prepare_data.main()


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
