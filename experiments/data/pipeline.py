"""Batches through Grain: which examples, in which order, augmented and standardized.

An element of the Grain data set is a batch, made from its step alone: nothing depends on what was
read before, so that an iterator restored from its state goes on with the very next batch.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from experiments.data.examples import Arrays, Dataset


class Batch(NamedTuple):
    """What one step consumes; `valid` is False where an example only fills the batch up."""

    images: Float[np.ndarray, "batch height width channels"]
    labels: Int[np.ndarray, " batch"]
    valid: Bool[np.ndarray, " batch"]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes to training images.

    Attributes:
        pad: zeros are put around the image and a part of its own size is cut out anywhere: it shifts by
            up to `pad` pixels either way.
        flip: half of the images are mirrored.
        cutout: side of a square, anywhere, that is set to the mean (DeVries and Taylor, arXiv
            1708.04552); 0 for none. At the border a part of it falls outside.
    """

    pad: int = 0
    flip: bool = False
    cutout: int = 0


@dataclasses.dataclass(frozen=True)
class Shard:
    """One process of several; each takes its part of every batch."""

    index: int = 0
    count: int = 1

    def part(self, of_batch: Shaped[np.ndarray, "batch ..."]) -> Shaped[np.ndarray, "part ..."]:
        """This process's rows of an array with a row for every example of the whole batch."""
        return of_batch[self.index :: self.count]


_NO_CHANGE, _WHOLE = Augmentation(), Shard()
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # batches


def training_batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    epochs: int,
    augmentation: Augmentation = _NO_CHANGE,
    shard: Shard = _WHOLE,
    workers: int = 0,
    start: int = 0,
) -> Any:
    """Iterator over the full batches of all epochs.

    Its `get_state` and `set_state` let another process resume at the same batch.

    In an epoch every example comes at most once, in an order that depends on seed and epoch alone;
    the few left over where the batch size does not divide their number sit out. Several processes
    together see what one alone would.

    Args:
        dataset: its training examples are read.
        batch_size: over all processes.
        seed: of order and augmentation, at least 0.
        epochs: passes over the examples.
        augmentation: random changes to the images.
        shard: this process's part of every batch.
        workers: processes that decode, for data sets that are not in memory.
        start: batches to leave out, those that were consumed before; the ones that follow are the same as without.
    """
    draws = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])
    batches = grain.MapDataset.source(_TrainingRows(len(dataset.train), batch_size, seed, epochs)).random_map(
        _TrainingBatch(dataset, augmentation, shard), seed=draws
    )
    iterable = batches[start:].to_iter_dataset(_READ_AHEAD)
    if workers and not isinstance(dataset.train, Arrays):
        flags.FLAGS.mark_as_parsed()  # else Grain up to 0.2.18 fails once JAX is imported (grain#1355)
        iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(iterable)


def evaluation_batches(dataset: Dataset, batch_size: int, *, shard: Shard = _WHOLE) -> Iterator[Batch]:
    """Every test example once, in order; the last batch is filled up with copies marked as not valid."""
    rows = _EvaluationRows(len(dataset.test), batch_size)
    batches = grain.MapDataset.source(rows).map(_EvaluationBatch(dataset, shard))
    return iter(batches.to_iter_dataset(_READ_AHEAD))


def first_examples(dataset: Dataset, most: int) -> Batch:
    """The first test examples, at most this many, as one batch that nothing fills up.

    For what is measured over a whole batch, such as gains and variances: there each copy would count as an example.
    """
    return _EvaluationBatch(dataset, _WHOLE)(np.arange(min(most, len(dataset.test))))


@dataclasses.dataclass(frozen=True)
class _TrainingRows:
    """The rows of each batch: a new permutation in each epoch."""

    examples: int
    batch_size: int
    seed: int
    epochs: int

    def __len__(self) -> int:
        return self.epochs * (self.examples // self.batch_size)

    def __getitem__(self, step: SupportsIndex) -> Int[np.ndarray, " batch"]:
        epoch, position = divmod(int(step), self.examples // self.batch_size)
        return _permutation(self.examples, self.seed, epoch)[position * self.batch_size :][: self.batch_size]


@functools.lru_cache(maxsize=4)
def _permutation(examples: int, seed: int, epoch: int) -> Int[np.ndarray, " examples"]:
    return np.random.default_rng((seed, epoch)).permutation(examples)


@dataclasses.dataclass(frozen=True)
class _EvaluationRows:
    """The rows of each batch in order; past the last example they go on."""

    examples: int
    batch_size: int

    def __len__(self) -> int:
        return -(-self.examples // self.batch_size)

    def __getitem__(self, step: SupportsIndex) -> Int[np.ndarray, " batch"]:
        return np.arange(self.batch_size) + int(step) * self.batch_size


@dataclasses.dataclass(frozen=True)
class _TrainingBatch:
    """Rows of a whole batch -> this process's part of it, augmented and standardized."""

    dataset: Dataset
    augmentation: Augmentation
    shard: Shard

    def __call__(self, rows: Int[np.ndarray, " batch"], rng: np.random.Generator) -> Batch:
        images, labels = self.dataset.train.fetch(self.shard.part(rows))
        size, (height, width) = len(rows), images.shape[1:3]
        # Drawn for the whole batch, so that what an image goes through does not depend on the number of processes.
        shift = self.shard.part(rng.integers(0, 2 * self.augmentation.pad + 1, (size, 2)))
        mirror = self.shard.part(rng.random(size) < 0.5)
        centre = self.shard.part(rng.integers(0, (height, width), (size, 2)))
        if self.augmentation.pad:
            images = shifted(images, shift, self.augmentation.pad)
        if self.augmentation.flip:
            images[mirror] = images[mirror, :, ::-1]  # these are copies that `fetch` made
        standardized = standardize(images, self.dataset)
        if self.augmentation.cutout:
            standardized = cut_out(standardized, centre, self.augmentation.cutout)
        return Batch(standardized, labels, np.ones(len(labels), bool))


@dataclasses.dataclass(frozen=True)
class _EvaluationBatch:
    """Rows of a whole batch -> this process's part of it, standardized."""

    dataset: Dataset
    shard: Shard

    def __call__(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        rows = self.shard.part(rows)
        valid = rows < len(self.dataset.test)
        images, labels = self.dataset.test.fetch(np.where(valid, rows, 0))
        return Batch(standardize(images, self.dataset), labels, valid)


def standardize(
    images: UInt8[np.ndarray, "batch height width channels"], dataset: Dataset
) -> Float[np.ndarray, "batch height width channels"]:
    """Images with mean 0 and deviation 1 in each channel over the training data."""
    width = images.shape[2]
    mean = np.tile(dataset.mean.astype(np.float32), width)
    scale = np.tile((1 / np.maximum(dataset.std, 1e-6)).astype(np.float32), width)
    standardized = images.astype(np.float32)
    rows = standardized.reshape(*images.shape[:2], -1)  # a view; by rows it is ten times as fast as by pixels
    rows -= mean
    rows *= scale
    return standardized


def shifted(
    images: UInt8[np.ndarray, "batch height width channels"], shift: Int[np.ndarray, "batch 2"], pad: int
) -> UInt8[np.ndarray, "batch height width channels"]:
    """Images cut at `shift`, from 0 to `2 * pad`, out of ones with `pad` zeros on each side."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    return np.moveaxis(windows[np.arange(len(images)), shift[:, 0], shift[:, 1]], 1, -1)


def cut_out(
    images: Float[np.ndarray, "batch height width channels"], centre: Int[np.ndarray, "batch 2"], side: int
) -> Float[np.ndarray, "batch height width channels"]:
    """Images with zeros in a square of width `side` around `centre`."""
    inside = [
        np.abs(2 * (np.arange(length) - centre[:, axis, None]) + (side + 1) % 2) < side
        for axis, length in enumerate(images.shape[1:3])
    ]
    square = inside[0][:, :, None] & inside[1][:, None, :]
    with_hole = images.copy()
    with_hole[square] = 0
    return with_hole
