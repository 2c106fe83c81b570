"""What the benchmarks share: timing side by side, and something to run on."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data import Dataset
from experiments.data.examples import Arrays

PLAIN, BATCH_NORM = "swish", "BatchNorm, swish"


class Spread(NamedTuple):
    """Quartiles of repeated measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Any) -> "Spread":
        """Their first quartile, median and third quartile."""
        return cls(*(float(value) for value in np.quantile(values, [0.25, 0.5, 0.75])))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def seconds(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each call takes until its arrays are there: all of them in turn, `repeats` times.

    Taken in turn, a disturbance of the machine falls on all. The first round is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, call in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in taken.items()}


def ratios(taken: Mapping[str, list[float]], base: str) -> dict[str, Spread]:
    """Of each to `base` in the same round."""
    return {name: Spread.of(np.divide(times, taken[base])) for name, times in taken.items()}


def random_images(shape: tuple[int, int, int], images: int, classes: int = 10) -> Dataset:
    """A data set of noise, in memory."""
    examples = Arrays(np.random.default_rng(0).integers(0, 256, (images, *shape), np.uint8), np.zeros(images, np.int32))
    return Dataset(examples, examples, classes, np.full(shape[-1], 128.0), np.full(shape[-1], 64.0), pad=4, flip=True)
