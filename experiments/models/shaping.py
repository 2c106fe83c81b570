"""Deep Kernel Shaping (Martens et al., arXiv 2110.01765), a rival: activations shaped once, for a network's depth."""

import functools

import numpy as np
from dks.base.activation_transform import get_transformed_activations

from anact_jax import ACTIVATIONS, Activation

_SHAPEABLE = ("elu", "gelu", "relu", "selu", "sigmoid", "softplus", "swish", "tanh")


@functools.cache
def deep_kernel_shaped(name: str, depth: int) -> Activation:
    """The activation, shifted and scaled inside and out, for a chain of `depth` of them.

    By the authors' package `dks`, with its defaults (zeta = 1.5).

    Raises:
        ValueError: that package does not know the activation.
    """
    if name not in _SHAPEABLE:
        raise ValueError(f"Deep Kernel Shaping is to be had for {', '.join(_SHAPEABLE)}, not for {name!r}")
    with np.errstate(over="ignore"):  # its derivative of tanh far out, where it is 0
        shaped: Activation = get_transformed_activations(
            [name],
            max_slope_func=lambda slope: slope**depth,  # of a chain; no shortcuts
            activation_getter=lambda known: ACTIVATIONS[known],
        )[name]
    return shaped
