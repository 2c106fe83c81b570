"""Elementwise activations by name, as JAX defines them."""

from collections.abc import Callable
from typing import TypeAlias

import jax

Activation: TypeAlias = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "swish": jax.nn.swish,
    "tanh": jax.numpy.tanh,
}


def activation(name: str) -> Activation:
    """Looks up an elementwise activation in `ACTIVATIONS`.

    Raises:
        ValueError: no activation has this name; the message lists those that exist.

    >>> import jax.numpy as jnp
    >>> activation("relu")(jnp.array([-1.0, 2.0]))
    Array([0., 2.], dtype=float32)
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
