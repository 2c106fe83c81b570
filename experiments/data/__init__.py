"""Data sets by name, and the batches that they are fed in. One interface for all: see `sets` and `pipeline`."""

from experiments.data.pipeline import Augmentation, Batch, Shard, evaluation_batches, first_examples, training_batches
from experiments.data.sets import DATASETS, DataError, Dataset, Examples, load, with_subset

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "DataError",
    "Dataset",
    "Examples",
    "Shard",
    "evaluation_batches",
    "first_examples",
    "load",
    "training_batches",
    "with_subset",
]
