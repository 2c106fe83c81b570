"""What the activations of a Linen network do to variance, layer by layer."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from anact_jax import Form, Normalization, activation_stats
from anact_jax.diagnostics import LayerGains, gains_of, linen_layers
from anact_jax.export import constants
from anact_jax.linen import ANAct
from experiments.models import Plain, on_each


def layer_gains(
    model: nn.Module,
    variables: PyTree[Array | np.ndarray],
    images: Float[np.ndarray, "n h w c"] | Float[Array, "n h w c"],
) -> list[LayerGains]:
    """Gains of every activation, plain ones too, on a batch, in the order in which they run, in inference mode."""

    def measure(variables: PyTree[Array | np.ndarray], images: Array) -> list[LayerGains]:
        measured = []

        def visit(module: ANAct | Plain, x: Array) -> None:
            numbers, fn = Normalization(jnp.ones(()), jnp.zeros(())), module.fn
            feature_axes: Sequence[int] = ()
            if isinstance(module, ANAct):
                numbers, fn, feature_axes = constants(module), module.activation, Form.parse(module.form).axes
            measured.append(
                gains_of("/".join(module.path), activation_stats(fn, x, feature_axes=feature_axes), numbers)
            )

        with on_each(ANAct | Plain, visit):
            model.apply(variables, images, train=False)
        return measured

    rows: list[LayerGains] = jax.device_get(jax.jit(measure)(variables, images))
    return rows


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
    layers = linen_layers(variables, form)
    if not layers:
        return None
    every = jnp.concatenate([numbers.factor.ravel() for _, numbers in layers.values()])
    return jnp.min(every), jnp.max(every)
