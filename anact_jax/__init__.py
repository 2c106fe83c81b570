"""Adaptive normalization for activation functions in JAX: the pure functions.

The Flax modules live in `anact_jax.linen` and `anact_jax.nnx`; importing this package does not import Flax.
"""

from anact_jax.activations import ACTIVATIONS, activation, nonlinearity, tempered
from anact_jax.elementwise import Activation
from anact_jax.factors import Gains, Normalization, gains, normalization
from anact_jax.form import DEFAULT, PUBLISHED, REFERENCES, RULES, Form
from anact_jax.gaussian import gaussian_stats
from anact_jax.running import restored, update_stats
from anact_jax.statistics import MOMENTS, Stats, activation_stats, informative
from anact_jax.step import anact, initial_stats, normalize

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "DEFAULT",
    "MOMENTS",
    "PUBLISHED",
    "REFERENCES",
    "RULES",
    "Activation",
    "Form",
    "Gains",
    "Normalization",
    "Stats",
    "activation",
    "activation_stats",
    "anact",
    "gains",
    "gaussian_stats",
    "informative",
    "initial_stats",
    "nonlinearity",
    "normalization",
    "normalize",
    "restored",
    "tempered",
    "update_stats",
]
