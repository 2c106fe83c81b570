"""Images a second through the input pipeline alone, all augmentation on.

See `python experiments/benchmarks/input_pipeline.py --help`.
"""

import dataclasses
import itertools
import statistics
import time
from pathlib import Path

from experiments.cli import FAILED, fail, run_program, settings_of, table_head, table_row

# isort: split


from experiments.benchmarks.measuring import random_images
from experiments.data import Augmentation, DataError, Dataset, load, training_batches


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures random images in memory, 28x28x1, 32x32x3 and 64x64x3, and on demand a prepared data set from its files.

    Prints a table in Markdown: the median over repeats, and the slowest and the fastest.
    """

    dataset: str | None = None
    """name of a prepared data set to be decoded while it is read"""
    data_dir: Path | None = None
    """folder of tensorflow-datasets, by default $TFDS_DATA_DIR or ~/tensorflow_datasets"""
    workers: tuple[int, ...] = (0, 1, 2)
    """numbers of processes that decode it"""
    batch_size: int = 128
    """images in a batch"""
    batches: int = 200
    """batches in a repeat"""
    repeats: int = 5
    """repeats, after one that is not counted"""


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    print(table_head("images", "processes", "images/s", "slowest-fastest"))
    for shape in ((28, 28, 1), (32, 32, 3), (64, 64, 3)):
        measure(f"random {shape}, in memory", random_images(shape, 10_000), config, workers=0)
    if config.dataset is not None:
        try:
            dataset = load(config.dataset, config.data_dir, memory_limit=0)
        except DataError as error:
            return fail(str(error), FAILED)
        for workers in config.workers:
            measure(f"{config.dataset} {dataset.train.shape}, from its files", dataset, config, workers)
    return 0


def measure(label: str, dataset: Dataset, config: Config, workers: int) -> None:
    """Prints a row of the table."""
    all_on = Augmentation(pad=4, flip=True, cutout=8)
    epochs = 1 + (config.repeats + 2) * config.batches * config.batch_size // len(dataset.train)
    batches = training_batches(dataset, config.batch_size, seed=0, epochs=epochs, augmentation=all_on, workers=workers)
    rates = []
    for _ in range(config.repeats + 1):
        start = time.perf_counter()
        images = sum(len(batch.labels) for batch in itertools.islice(batches, config.batches))
        rates.append(images / (time.perf_counter() - start))
    batches.close()
    del rates[0]
    print(table_row(label, str(workers), f"{statistics.median(rates):.0f}", f"{min(rates):.0f}-{max(rates):.0f}"))


if __name__ == "__main__":
    run_program(main)
