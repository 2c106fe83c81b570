"""Adaptive normalization for activation functions in JAX: the pure functions.

The Flax modules live in `anact_jax.linen` and `anact_jax.nnx`; importing this package does not import Flax.
"""

from anact_jax.activations import ACTIVATIONS, nonlinearity, tempered
from anact_jax.forms import Form, Standardized
from anact_jax.gaussian import gaussian_stats
from anact_jax.published import Gains, Published, gains
from anact_jax.running import restored, update_stats
from anact_jax.statistics import MOMENTS, FactorAndShift, Stats, activation_stats, informative
from anact_jax.step import anact, initial_stats, normalize
from anact_jax.tracing import Activation

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "MOMENTS",
    "Activation",
    "FactorAndShift",
    "Form",
    "Gains",
    "Published",
    "Standardized",
    "Stats",
    "activation_stats",
    "anact",
    "gains",
    "gaussian_stats",
    "informative",
    "initial_stats",
    "nonlinearity",
    "normalize",
    "restored",
    "tempered",
    "update_stats",
]
