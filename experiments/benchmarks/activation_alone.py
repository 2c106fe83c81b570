"""The activation alone, forward and backward, in each of its modes and beside what it could be replaced by."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from anact_jax.linen import NSwish
from experiments.benchmarks.measuring import BATCH_NORM, PLAIN
from experiments.networks.layers import Plain


class Normalized(nn.Module):
    """BatchNorm, then the plain activation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """swish(BatchNorm(x))."""
        return nn.swish(nn.BatchNorm(use_running_average=False, dtype=x.dtype)(x))


LAYERS: Mapping[str, nn.Module] = {
    PLAIN: Plain(jax.nn.swish),
    BATCH_NORM: Normalized(),
    "NSwish": NSwish(use_running_average=False),
    "NSwish, constants": NSwish(stop_gradient=True, use_running_average=False),
    "NSwish, published form": NSwish(form="published", use_running_average=False),
    "NSwish, inference": NSwish(use_running_average=True),
}

PASSES: Mapping[str, int] = {
    PLAIN: 5,
    BATCH_NORM: 8,
    "NSwish": 8,
    "NSwish, constants": 6,
    "NSwish, published form": 6,
    "NSwish, inference": 5,
}
"""Readings and writings of an array of x's size that each takes at least, forward and backward.

Forward, x is read and y written, after x was read for the statistics. Backward, x and the gradient are read and a
gradient is written, after both were read for the sums that differentiated statistics need.
"""


def compiled(layer: nn.Module, shape: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
    """The layer's forward and backward step, and arguments for it."""
    x, gradient = jax.random.normal(jax.random.key(0), (2, *shape), dtype)
    variables = layer.init(jax.random.key(1), x)
    arguments = (variables, x, gradient)
    return jax.jit(_step(layer)).lower(*arguments).compile(), arguments


def residual_bytes(layer: nn.Module, shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes that the forward pass keeps for the backward one, as differentiation leaves them to the compiler."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(1), x)

    def kept(variables: Any, x: Array) -> Any:
        return _forward(layer, variables, x)[1]

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(kept, variables, x)))


def _forward(layer: nn.Module, variables: Any, x: Array) -> tuple[Array, Callable[..., Any], Any]:
    state = {name: variables[name] for name in variables if name != "params"}

    def apply(params: Any, x: Array) -> tuple[Array, Any]:
        y, updates = layer.apply({"params": params} | state, x, mutable=["batch_stats"])
        return y, updates

    y, backward, updates = jax.vjp(apply, variables.get("params", {}), x, has_aux=True)
    return y, backward, updates


def _step(layer: nn.Module) -> Callable[..., Any]:
    def step(variables: Any, x: Array, gradient: Array) -> Any:
        y, backward, updates = _forward(layer, variables, x)
        return y, updates, backward(jnp.asarray(gradient, y.dtype))

    return step
