"""Adaptive normalization for activation functions in JAX: the pure functions.

The Flax modules live in `anact_jax.linen`; importing this package does not import Flax.
"""

from anact_jax.activations import ACTIVATIONS, Activation, activation
from anact_jax.factors import REFERENCES, RULES, Gains, Normalization, gains, normalization
from anact_jax.gaussian import gaussian_stats
from anact_jax.normalize import DEFAULT, PUBLISHED, Form, anact, normalize
from anact_jax.running import informative, update_stats
from anact_jax.statistics import Stats, activation_stats
from anact_jax.tempering import nonlinearity, tempered

__all__ = [
    "ACTIVATIONS",
    "DEFAULT",
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
    "nonlinearity",
    "normalization",
    "normalize",
    "tempered",
    "update_stats",
]
