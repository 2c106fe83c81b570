"""Classifies images with a trained network. See `python experiments/predict.py --help`."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from experiments.cli import (
    BAD_SETTINGS,
    FAILED,
    check_picture,
    fail,
    printable,
    run_program,
    say,
    settings_of,
    usual_picture,
)

# isort: split

import flax.linen as nn
import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from tyro.conf import Positional, arg

from experiments.data import DataError, Dataset
from experiments.data.kept import Absent
from experiments.data.pictures import read_picture
from experiments.data.pipeline import standardize
from experiments.networks import check_name
from experiments.training.checkpoints import CheckpointError, silence_orbax
from experiments.training.load_run import TrainedRun, load_run

SPLITS = ("train", "test")

Classify: TypeAlias = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Classifies image files, or a split of the data set, with the network of a run.

    For each file it prints the class, by its name where it has one, and its probability. Of a split it prints the
    accuracy, and draws how often examples of each class were taken for each other one.
    """

    workdir: Positional[Path]
    """folder of a run of train_resnet.py"""
    images: Positional[tuple[Path, ...]] = ()
    """image files; they are turned as their EXIF tag says, and scaled to the size of the training images"""
    invert: bool = False
    """swap light and dark in the image files: for dark digits on white paper, where the training images are light"""
    split: Annotated[str, arg(help="where no files are given, one of " + ", ".join(SPLITS))] = "test"
    batch_size: int = 256
    """images classified at once, which makes no difference but in rounding"""
    best: bool = False
    """take the checkpoint with the best test accuracy instead of the last"""
    data_dir: Path | None = None
    """folder of data sets, by default the one that the run was trained from"""
    output: Path | None = None
    """the picture of a split, by default confusion.png in the run's folder"""

    def check(self) -> None:
        """Raises ValueError, or OSError from `output`, in one line, at the first setting that cannot be."""
        check_name("split", self.split, SPLITS)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.invert and not self.images:
            raise ValueError("invert is for image files, and none are given")
        if self.output is not None:
            if self.images:
                raise ValueError("output is for the picture of a split; with image files leave it out")
            check_picture(self.output)


def main() -> int:
    """Runs the program and returns its exit status."""
    silence_orbax()
    config = settings_of(PredictConfig)
    try:
        config.check()
        run = load_run(config.workdir, data_dir=config.data_dir, best=config.best, examples=not config.images)
        files = [read_image(path, run.dataset, invert=config.invert) for path in config.images]
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    except CheckpointError as error:
        return fail(str(error), FAILED)
    classify = make_classifier(run.model, run.trained.evaluated, run.dataset, config.batch_size)
    return show_files(np.stack(files), classify, run, config) if files else show_split(classify, run, config)


def show_files(
    images: UInt8[np.ndarray, "n height width channels"], classify: Classify, run: TrainedRun, config: PredictConfig
) -> int:
    """Prints the class of each image file; returns the exit status."""
    names = []
    if not isinstance(run.dataset.train, Absent):
        names = [str(path) for path in itertools.compress(config.images, look_inverted(images, run.dataset))]
    if names:
        which = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
        remedy = "leave out --invert?" if config.invert else "--invert swaps them"
        say(f"beside the training images, light and dark look swapped in {which}; {remedy}")
    for path, row in zip(config.images, classify(images), strict=True):
        print(f"{printable(path)}: class {class_names(run.dataset)[row.argmax()]}, probability {row.max():.4f}")
    return 0


def show_split(classify: Classify, run: TrainedRun, config: PredictConfig) -> int:
    """Prints the accuracy on a split and draws the confusion matrix; returns the exit status."""
    picture = config.output or usual_picture(config.workdir / "confusion.png")
    counts = np.zeros((run.dataset.classes, run.dataset.classes), int)
    for images, labels in _batches(run.dataset, config):
        np.add.at(counts, (labels, classify(images).argmax(-1)), 1)
    print(f"accuracy={np.trace(counts) / counts.sum():.4f} examples={counts.sum()} split={config.split}")
    if picture is not None:
        try:
            draw_confusion(counts, class_names(run.dataset), picture)
        except OSError as error:
            return fail(f"no picture: {error}", FAILED)
        say(f"the picture is {picture}")
    return 0


def make_classifier(model: nn.Module, variables: dict[str, Any], dataset: Dataset, batch_size: int) -> Classify:
    """Images with pixels as in the data set -> probabilities; any number of images, `batch_size` at once."""
    logits = jax.jit(lambda images: model.apply(variables, images, train=False))

    def classify(images: UInt8[np.ndarray, "n height width channels"]) -> Float[np.ndarray, "n classes"]:
        parts = []
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            # Always a batch of the same shape: one image gets the same numbers alone and among others.
            filled = np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), np.uint8)])
            parts.append(np.asarray(jax.nn.softmax(logits(standardize(filled, dataset))))[: len(part)])
        return np.concatenate(parts)

    return classify


def read_image(path: Path, dataset: Dataset, *, invert: bool = False) -> UInt8[np.ndarray, "height width channels"]:
    """An image file as `read_picture` reads it, in the shape and range of the data set's images.

    With `invert` light becomes dark, and dark light.
    """
    pixels = read_picture(path, dataset.train.shape)
    return np.rint((255 - pixels if invert else pixels) / 255 * dataset.largest).astype(np.uint8)


def look_inverted(images: UInt8[np.ndarray, "n height width channels"], dataset: Dataset) -> Bool[np.ndarray, " n"]:
    """Which images look like negatives of the data set's, whose pixels have the same range.

    Those whose border has a brightness that no training image's has, and comes nearer to them in the negative. Where
    training images have borders of any brightness, as photographs have, none does.
    """
    sample = np.linspace(0, len(dataset.train) - 1, 1000).astype(int)
    usual, found = _border(dataset.train.fetch(sample)[0]), _border(images)

    def distance(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        beyond: Float[np.ndarray, " n"] = np.abs(values - values.clip(usual.min(), usual.max()))
        return beyond

    inverted: Bool[np.ndarray, " n"] = distance(found) > distance(dataset.largest - found)
    return inverted


def _border(images: UInt8[np.ndarray, "n height width channels"]) -> Float[np.ndarray, " n"]:
    """The median of the pixels at each image's border."""
    at_border = np.ones(images.shape[1:3], bool)
    at_border[1:-1, 1:-1] = False
    medians: Float[np.ndarray, " n"] = np.median(images[:, at_border].reshape(len(images), -1), axis=1)
    return medians


def class_names(dataset: Dataset) -> list[str]:
    """Names of the classes that can be printed; their numbers where they have none."""
    return [printable(Path(name)) for name in dataset.names or map(str, range(dataset.classes))]


def draw_confusion(counts: Int[np.ndarray, "classes classes"], names: Sequence[str], path: Path) -> None:
    """Draws the number of examples of each class (rows) that were taken for each class (columns)."""
    figure, axes = plt.subplots(figsize=(6, 5.4), layout="constrained")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="taken for class", ylabel="class", title=f"accuracy {np.trace(counts) / counts.sum():.4f}")
    if len(counts) <= 20:
        plain = [name.replace("$", r"\$") for name in names]  # no formulas
        upright = max(map(len, plain)) > 2
        axes.set_xticks(range(len(counts)), plain, rotation=90 if upright else 0)
        axes.set_yticks(range(len(counts)), plain)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                shade = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=shade, fontsize=8)
    figure.colorbar(picture, label="share of the class")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _batches(
    dataset: Dataset, config: PredictConfig
) -> Iterator[tuple[UInt8[np.ndarray, "n height width channels"], Int[np.ndarray, " n"]]]:
    examples = dataset.train if config.split == "train" else dataset.test
    for start in range(0, len(examples), config.batch_size):
        yield examples.fetch(np.arange(start, min(start + config.batch_size, len(examples))))


if __name__ == "__main__":
    run_program(main)
