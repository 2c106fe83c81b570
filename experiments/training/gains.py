"""What the activations of a Linen network do to variance, layer by layer."""

from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, PyTree

from anact_jax import Form, Stats
from anact_jax.diagnostics import NORMALIZED, LayerGains, gains_on_batch
from experiments.networks import Plain

Gains: TypeAlias = Callable[[PyTree[Array | np.ndarray]], list[LayerGains]]


def gains_of(model: nn.Module, images: Float[np.ndarray, "n h w c"] | Float[Array, "n h w c"]) -> Gains:
    """The function from variables to the gains of every activation, plain ones too, on these images.

    In the order in which they run, in inference mode. It is compiled once.
    """

    def total(variables: PyTree[Array | np.ndarray], images: Array) -> Array:
        logits: Any = model.apply(variables, images, train=False)
        return jnp.sum(logits)

    measure = jax.jit(gains_on_batch(total, (*NORMALIZED, Plain)))
    return lambda variables: list(jax.device_get(measure(jax.device_get(variables), images)))


def worst_gains(layers: list[LayerGains]) -> str:
    """In words, the first activation whose gains are not finite, or else the one with a gain farthest from 1."""
    if not layers:
        return "no activation to measure"

    def distance(layer: LayerGains) -> float:
        values = np.array((layer.forward, layer.backward), np.float64)
        return float(np.max(np.abs(np.log(values)))) if np.all(np.isfinite(values) & (values > 0)) else np.inf

    worst = max(layers, key=distance)  # the first of equals
    return f"{worst.name} has forward gain {worst.forward:.3g} and backward gain {worst.backward:.3g}"


def factor_range(variables: dict[str, Any], form: Form) -> tuple[Array, Array] | None:
    """Smallest and largest factor in inference, learned corrections included; None without normalized activations."""
    state, params = (flatten_dict(variables.get(kind, {})) for kind in ("batch_stats", "params"))

    def factors(layer: tuple[str, ...]) -> Array:
        stats = Stats(**{name: state[*layer, name] for name in ("count", *form.moments)})
        return form.factor_and_shift(stats, params[*layer, "alpha"] if form.learned else None).factor.ravel()

    layers = [path[:-1] for path in state if path[-1] == "count"]  # normalization layers keep none
    if not layers:
        return None
    every = jnp.concatenate(list(map(factors, layers)))
    return jnp.min(every), jnp.max(every)
