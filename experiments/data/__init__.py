"""Data sets by name, and the batches that they are fed in. One interface for all: see `sets` and `pipeline`."""

from experiments.data.examples import DataError, Dataset, Examples
from experiments.data.pipeline import Augmentation, Batch, Shard, evaluation_batches, first_examples, training_batches
from experiments.data.sets import DATASETS, check_dataset, load, with_subset, with_whole_path

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "DataError",
    "Dataset",
    "Examples",
    "Shard",
    "check_dataset",
    "evaluation_batches",
    "first_examples",
    "load",
    "training_batches",
    "with_subset",
    "with_whole_path",
]
