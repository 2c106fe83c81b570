"""Means with intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float


class Interval(NamedTuple):
    """A mean and the half width of its 95% interval by Student's t; NaN for a single value."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float] | Float[np.ndarray, " n"]) -> "Interval":
        """Of independent values."""
        n = len(values)
        if n < 2:
            return cls(float(np.mean(values)), float("nan"))
        return cls(float(np.mean(values)), float(scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values)))

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of 0."""
        return abs(self.mean) > self.half_width

    @property
    def signed(self) -> str:
        """In percent, as a difference: with its sign."""
        return f"{'+' if self.mean > 0 else ''}{self}"

    def __str__(self) -> str:
        width = "" if np.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{width}"
