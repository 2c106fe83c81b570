"""What the activations of a Linen network do to variance, layer by layer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from anact_jax import Activation, Gains, Normalization, Stats, activation_stats, gains, normalization
from anact_jax.factors import correction
from anact_jax.linen import ANAct
from experiments.models import Plain


class LayerGains(NamedTuple):
    """One activation: its gains bare, its normalization (1 and 0 for a plain one), its gains normalized.

    Of an activation with statistics of their own for each channel, means over the channels. Bare is a
    tempered activation.
    """

    name: str
    bare: Gains
    normalization: Normalization
    normalized: Gains


def layer_gains(
    model: nn.Module, variables: PyTree[Array], images: Float[np.ndarray, "n h w c"] | Float[Array, "n h w c"]
) -> list[LayerGains]:
    """Gains of every activation on a batch, in the order in which they run, in inference mode."""
    names: list[str] = []

    def measure(variables: PyTree[Array], images: Array) -> list[tuple[Gains, Normalization, Gains]]:
        measured = []

        def on_call(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            if isinstance(module, ANAct | Plain) and context.method_name == "__call__":
                names.append("/".join(module.path))
                factor, shift = jnp.ones(()), jnp.zeros(())
                fn: Activation = module.fn
                feature_axes: int | Sequence[int] = ()
                if isinstance(module, ANAct):
                    fn, feature_axes = module.activation, module.feature_axes
                    running = Stats(*(module.get_variable(module.collection, field) for field in Stats._fields))
                    factor, shift = normalization(
                        running, rule=module.rule, center=module.center, reference=module.reference
                    )
                    if module.learnable:
                        factor += correction(module.get_variable("params", "alpha"))
                stats = activation_stats(fn, args[0], feature_axes=feature_axes)
                forward, backward = gains(stats, shift=shift)
                normalized = Gains(factor**2 * forward, factor**2 * backward)
                found = (gains(stats), Normalization(factor, shift), normalized)
                measured.append(jax.tree.map(jnp.mean, found))
            return call(*args, **kwargs)

        with nn.intercept_methods(on_call):
            model.apply(variables, images, train=False)
        return measured

    measured = jax.device_get(jax.jit(measure)(variables, images))
    return [LayerGains(name, *layer) for name, layer in zip(names, measured, strict=True)]


def worst_gains(layers: list[LayerGains]) -> str:
    """In words, the first activation whose gains are not finite, or else the one with a gain farthest from 1."""
    if not layers:
        return "no activation to measure"

    def distance(layer: LayerGains) -> float:
        values = np.array(layer.normalized, np.float64)
        return float(np.max(np.abs(np.log(values)))) if np.all(np.isfinite(values) & (values > 0)) else np.inf

    worst = max(layers, key=distance)  # the first of equals
    forward, backward = worst.normalized
    return f"{worst.name} has forward gain {forward:.3g} and backward gain {backward:.3g}"


def factor_range(variables: dict[str, Any], options: dict[str, Any]) -> tuple[Array, Array] | None:
    """Smallest and largest factor in inference, learned corrections included; None without normalized activations."""
    factors = []

    def visit(state: PyTree[Array], params: PyTree[Array]) -> None:
        if isinstance(state, dict) and set(state) == set(Stats._fields):
            factor = normalization(Stats(**state), **options).factor
            factors.append(factor + correction(params["alpha"]) if "alpha" in params else factor)
        elif isinstance(state, dict):
            for name, child in state.items():
                visit(child, params.get(name, {}))

    visit(variables["batch_stats"], variables["params"])
    if not factors:
        return None
    every = jnp.concatenate([factor.ravel() for factor in factors])
    return jnp.min(every), jnp.max(every)
