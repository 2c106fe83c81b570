"""One call that says whether the normalized activations of a model are used as they are meant."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anact_jax.diagnostics import NORMALIZED, Name, measured_at, table
from anact_jax.forms import Standardized
from anact_jax.statistics import activation_stats
from anact_jax.tracing import widened

_FACTOR = 2.0  # between deviations that should be equal
_SHARE = 0.5  # of channels


class LayerHealth(NamedTuple):
    """A normalized activation on a batch.

    Attributes:
        name: where it stands in the model.
        batches: taken into its running statistics; the least of all channels.
        unmeasured: share of channels that no batch was taken in for.
        constant: share of channels whose f(x) does not vary in this batch, such as those of a dead ReLU.
        running: deviation of f(x) by the running statistics over that in this batch; the median of the channels.
        output: deviation of the output in inference over the form's `std`; the median of the channels. NaN for a form
            that has none.
        nu: curvature of f on this batch, `E[f'^2] Var[x] / Var[f] - 1`, the mean of the channels that vary. The product
            of `1 + nu` over a chain of layers is the growth of its gradients.
    """

    name: str
    batches: Float[Array, ""]
    unmeasured: Float[Array, ""]
    constant: Float[Array, ""]
    running: Float[Array, ""]
    output: Float[Array, ""]
    nu: Float[Array, ""]


class Health(NamedTuple):
    """What `health` found; printed, a table and the findings.

    Attributes:
        rows: one for each call of a layer, in the order of execution.
        findings: what is wrong, with its remedy; empty for a sound network.
    """

    rows: tuple[LayerHealth, ...]
    findings: tuple[str, ...]

    def __str__(self) -> str:
        curvature = sum(float(row.nu) for row in self.rows)
        lines = [table(self.rows), f"sum of nu: {curvature:.2g}", *self.findings]
        return "\n".join(lines if self.findings else [*lines, "nothing found"])


def health(loss: Callable[..., Any], *args: Any) -> Health:
    """Checks every normalized activation of a model on a batch.

    Found are layers or channels that were never measured, places that share one state, channels that are dead or
    constant, running statistics of other data than the batch, and outputs far from the form's deviation.

    Args:
        loss: a function that runs a model, Linen or NNX, in inference on a batch, and returns a number.
        *args: its arguments; an NNX model must be among them.

    Raises:
        TypeError, ValueError: see `anact_jax.diagnostics.pass_through`.

    Examples:
        >>> import flax.linen as nn
        >>> from anact_jax.linen import NReLU
        >>> model = nn.Sequential([nn.Dense(8), NReLU(use_running_average=True)])
        >>> x = jax.random.normal(jax.random.key(0), (64, 4))
        >>> variables = model.init(jax.random.key(1), x)
        >>> found = health(lambda variables, x: jnp.sum(model.apply(variables, x)), variables, x)
        >>> print(found.findings[0])
        layers_1: no batch was taken into its statistics. Train it with the batch's statistics kept \
(mutable=["batch_stats"], or nnx.BatchStat updated); under jax.vmap name the axis by axis_name
    """
    shared: list[bool] = []

    def row(call: Any) -> LayerHealth:
        layer, x = call.module, call.entering
        shared.append(layer.shared)
        return _row(call.name, layer, x, call.kwargs.get("mask"))

    # Not as arguments of `jax.jit`, which would make two of a module that stands at two places.
    rows = tuple(jax.device_get(jax.jit(lambda: measured_at(loss, NORMALIZED, row)(*args))()))
    # Both of its traces visit the layers in the same order.
    meant = {row.name for row, is_shared in zip(rows, shared, strict=False) if is_shared}
    return Health(rows, _findings(rows, meant))


def _row(name: str, layer: Any, x: Array, mask: Array | None) -> LayerHealth:
    form, running = layer.form, layer.running_stats()
    batch = activation_stats(layer.activation, x, axis=form.axis, mask=mask)
    varies = batch.var_out > 0
    ratio = jnp.sqrt(running.var_out / jnp.where(varies, batch.var_out, 1))
    factor, _ = layer.normalization()
    wanted = form.std if isinstance(form, Standardized) else jnp.nan
    output = jnp.abs(factor) * jnp.sqrt(batch.var_out) / wanted
    nu = batch.slope_sq * batch.var_in / jnp.where(varies, batch.var_out, 1) - 1

    def median(values: Array) -> Array:
        return jnp.nanmedian(jnp.where(varies, values, jnp.nan))

    return LayerHealth(
        Name(name),
        jnp.min(running.count),
        jnp.mean(widened(running.count == 0)),
        jnp.mean(widened(~varies)),
        median(jnp.broadcast_to(ratio, varies.shape)),
        median(jnp.broadcast_to(output, varies.shape)),
        jnp.nanmean(jnp.where(varies, nu, jnp.nan)),
    )


def _findings(rows: tuple[LayerHealth, ...], meant: set[str]) -> tuple[str, ...]:
    found = []
    for name, calls in Counter(row.name for row in rows).items():
        if calls > 1 and name not in meant:
            found.append(
                f"{name}: called at {calls} places, which share its running statistics. Make a layer for each place; "
                "shared=True says that it is meant"
            )
    for row in {row.name: row for row in rows}.values():
        name = row.name
        if row.unmeasured == 1:
            found.append(
                f"{name}: no batch was taken into its statistics. Train it with the batch's statistics kept "
                '(mutable=["batch_stats"], or nnx.BatchStat updated); under jax.vmap name the axis by axis_name'
            )
            continue
        if row.unmeasured > 0:
            found.append(
                f"{name}: {row.unmeasured:.0%} of its channels were never measured, since they are constant or not "
                "finite in every batch. Look at the layer before it"
            )
        if row.constant > _SHARE:
            found.append(
                f"{name}: {row.constant:.0%} of its channels are constant on this batch, as dead units are. Take a "
                "smaller learning rate, or a function with a slope everywhere (tempering=0.1)"
            )
        if not 1 / _FACTOR <= row.running <= _FACTOR:
            found.append(
                f"{name}: its running deviation is {row.running:.2g} times that of this batch. Is this other data than "
                "it was trained on, or prepared in another way? Otherwise estimate the statistics again"
            )
        elif not (jnp.isnan(row.output) or 1 / _FACTOR <= row.output <= _FACTOR):
            found.append(f"{name}: its output has {row.output:.2g} times the deviation of its form. Is it trained?")
    return tuple(found)
