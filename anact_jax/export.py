"""A trained layer as a plain function with its constants."""

from collections.abc import Callable
from typing import TypeAlias

import flax.nnx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anact_jax import linen, nnx
from anact_jax.forms import form_of
from anact_jax.statistics import feature_axes, other_axes
from anact_jax.step import normalize

Trained: TypeAlias = linen.ANAct | nnx.ANAct


def as_function(layer: Trained) -> Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]:
    """The layer in inference as a function of x alone, `factor * (f(x) - shift)`, with its numbers in it.

    What it returns holds no statistics, equals the layer to rounding, and stays as it is when the layer trains on, an
    activation with parameters included. A function that reads variables goes on reading them.

    Args:
        layer: an NNX `ANAct`, or a Linen one bound to its variables, with concrete values: not under `jit`.

    Returns:
        A function of any array that the layer takes, with output of the input's shape and dtype.

    Raises:
        ValueError: a Linen layer without its variables, or state of several layers, as under `scan` or `vmap`.

    Examples:
        >>> import jax
        >>> layer = linen.NReLU(std=1.0, use_running_average=True)
        >>> f = as_function(layer.bind(layer.init(jax.random.key(0), jnp.ones((2, 1)))))
        >>> [round(float(value), 3) for value in f(jnp.array([[-1.0], [1.0]])).ravel()]
        [-0.683, 1.03]
    """
    factor, shift = (np.asarray(value) for value in layer.normalization())
    # An NNX layer that saw no batch has the same numbers for every feature.
    axis = form_of(layer.form).axis if factor.ndim else None
    if factor.ndim != (axis is not None):
        raise ValueError(
            f"the state of shape {factor.shape} does not fit axis {axis} of one layer; where a transform "
            "stacked several, take one's state first: jax.tree.map(lambda value: value[index], state)"
        )
    if isinstance(layer, nnx.ANAct) and isinstance(layer.fn, flax.nnx.Module):
        layer = flax.nnx.clone(layer)  # its parameters would go on learning
    f = layer.activation

    def function(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        others = other_axes(feature_axes(axis, x.ndim), x.ndim)
        return normalize(f, x, jnp.asarray(np.expand_dims(factor, others)), jnp.asarray(np.expand_dims(shift, others)))

    return function
