"""Tiny ImageNet as a data set of tensorflow-datasets, which does not have it."""

import io
import re
import zipfile
from collections.abc import Iterator, Set
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

_ROOT = "tiny-imagenet-200"  # folder in the archive


class TinyImagenet(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """Photographs of 64x64 pixels in 200 classes; made from the original archive, of which no checksum is published.

    A label is the position of its class in `wnids.txt`. Those of the validation images stand in
    `val_annotations.txt`; neither name nor order of the files tells them. The images for testing have
    no labels and are left out.
    """

    VERSION = tfds.core.Version("1.0.0")
    URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

    def _info(self) -> Any:
        features = {"image": tfds.features.Image(shape=(64, 64, 3)), "label": tfds.features.ClassLabel()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Photographs of 64x64 pixels in 200 classes of ImageNet.",
            features=tfds.features.FeaturesDict(features),
            homepage="http://cs231n.stanford.edu",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        path = dl_manager.download(self.URL)
        with zipfile.ZipFile(path) as archive:
            files = archive.namelist()
            classes = archive.read(f"{_ROOT}/wnids.txt").decode().split()
            annotations = archive.read(f"{_ROOT}/val/val_annotations.txt").decode().splitlines()
        class_of = dict(line.split("\t")[:2] for line in annotations)
        train = {match[0]: match[1] for match in _matches(rf"{_ROOT}/train/(\w+)/images/\w+\.JPEG", files)}
        validation = {match[1]: match[0] for match in _matches(rf"{_ROOT}/val/images/(\w+\.JPEG)", files)}
        _refuse("no training images of classes in wnids.txt", set(classes) - set(train.values()))
        _refuse("training images of classes not in wnids.txt", set(train.values()) - set(classes))
        _refuse("no validation images named in val_annotations.txt", class_of.keys() - validation.keys())
        _refuse("validation images not in val_annotations.txt", validation.keys() - class_of.keys())
        _refuse("classes in val_annotations.txt but not in wnids.txt", set(class_of.values()) - set(classes))
        self.info.features["label"].names = classes
        return {
            "train": self._generate_examples(path, train),
            "validation": self._generate_examples(path, {validation[name]: class_of[name] for name in validation}),
        }

    def _generate_examples(self, path: Any, class_of: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with zipfile.ZipFile(path) as archive:
            for name, wnid in class_of.items():
                yield name, {"image": _in_colour(archive.read(name)), "label": wnid}


def _matches(pattern: str, names: list[str]) -> Iterator[re.Match[str]]:
    return filter(None, (re.fullmatch(pattern, name) for name in names))


def _refuse(problem: str, names: Set[str]) -> None:
    if names:
        listed = sorted(names)
        raise ValueError(f"{problem}: {', '.join(listed[:5])}{', ...' if len(listed) > 5 else ''}")


def _in_colour(encoded: bytes) -> bytes:
    """The file as it is, or a PNG where it is not in red, green and blue: some are grey."""
    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode == "RGB":
            return encoded
        colour = io.BytesIO()
        image.convert("RGB").save(colour, "PNG")
    return colour.getvalue()
