"""Classifies images with a trained network. See `python experiments/predict.py --help`."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from experiments.cli import BAD_SETTINGS, FAILED, fail, run_program, settings_of

# isort: split

import flax.linen as nn
import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, UnidentifiedImageError
from tyro.conf import Positional, arg

from experiments.data import DataError, Dataset
from experiments.data.pipeline import standardize
from experiments.networks import check_name
from experiments.training.checkpoints import CheckpointError, silence_orbax
from experiments.training.runs import load_run

SPLITS = ("train", "test")

Classify: TypeAlias = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Classifies image files, or a split of the data set, with the network of a run.

    For each file it prints the class and its probability. Of a split it prints the accuracy, and draws how often
    examples of each class were taken for each other one into confusion.png in the run's folder.
    """

    workdir: Positional[Path]
    """folder of a run of train_resnet.py"""
    images: Positional[tuple[Path, ...]] = ()
    """image files; they are scaled to the size of the training images"""
    split: Annotated[str, arg(help="where no files are given, one of " + ", ".join(SPLITS))] = "test"
    batch_size: int = 256
    """images classified at once, which makes no difference but in rounding"""
    best: bool = False
    """take the checkpoint with the best test accuracy instead of the last"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        check_name("split", self.split, SPLITS)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


def main() -> int:
    """Runs the program and returns its exit status."""
    silence_orbax()
    config = settings_of(PredictConfig)
    try:
        config.check()
        run = load_run(config.workdir, best=config.best)
        files = [read_image(path, run.dataset) for path in config.images]
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    except CheckpointError as error:
        return fail(str(error), FAILED)
    dataset = run.dataset
    classify = make_classifier(run.model, run.trained.evaluated, dataset, config.batch_size)
    if files:
        for path, row in zip(config.images, classify(np.stack(files)), strict=True):
            print(f"{path}: class {row.argmax()}, probability {row.max():.4f}")
        return 0
    counts = np.zeros((dataset.classes, dataset.classes), int)
    for images, labels in _batches(dataset, config):
        np.add.at(counts, (labels, classify(images).argmax(-1)), 1)
    draw_confusion(counts, config.workdir / "confusion.png")
    print(f"accuracy={np.trace(counts) / counts.sum():.4f} examples={counts.sum()} split={config.split}")
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


def read_image(path: Path, dataset: Dataset) -> UInt8[np.ndarray, "height width channels"]:
    """An image file in the shape and range of the data set's images.

    What is transparent is taken as white.

    Raises:
        ValueError: it is not an image, damaged, or too large to be one.
        OSError: there is no such file.
    """
    height, width, channels = dataset.train.shape
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
            elif image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L").resize((width, height)))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image file; expected PNG, JPEG or the like") from error
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); expected PNG, JPEG or the like") from error
    return np.rint(pixels.reshape(height, width, channels) / 255 * dataset.largest).astype(np.uint8)


def draw_confusion(counts: Int[np.ndarray, "classes classes"], path: Path) -> None:
    """Draws the number of examples of each class (rows) that were taken for each class (columns)."""
    figure, axes = plt.subplots(figsize=(6, 5.4), layout="constrained")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="taken for class", ylabel="class", title=f"accuracy {np.trace(counts) / counts.sum():.4f}")
    if len(counts) <= 20:
        axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
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
