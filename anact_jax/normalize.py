"""The normalized activation itself, and one step of it with its running statistics."""

import functools
import inspect
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from anact_jax.activations import Activation
from anact_jax.factors import Reference, Rule, check_options, normalization
from anact_jax.running import check_momentum, informative, update_stats
from anact_jax.scaled import always_the_same, scaled
from anact_jax.statistics import Stats, activation_stats, canonical_axes, wide_dtype
from anact_jax.tempering import check_nonlinearity


class Form(NamedTuple):
    """The options that decide what a normalized activation is, as keyword arguments of the Flax modules.

    >>> import anact_jax.linen
    >>> act = anact_jax.linen.NSwish(**PUBLISHED._asdict())
    >>> act.rule, act.center, act.reference
    ('mean', False, 'input')

    Attributes:
        rule: see `normalization`.
        center: see `normalization`.
        reference: see `normalization`.
        nonlinearity: normalize `tempered(f, nonlinearity)`; None leaves f as it is.
        feature_axes: see `activation_stats`.
        stop_gradient: see `anact`.
    """

    rule: Rule
    center: bool
    reference: Reference
    nonlinearity: float | None
    feature_axes: int | Sequence[int]
    stop_gradient: bool


PUBLISHED = Form("mean", False, "input", None, (), True)
"""The rule of arXiv 2208.13315, uncentered, one factor a layer: the defaults of the pure functions."""

DEFAULT = Form("mean", True, "unit", 0.1, -1, False)
"""The defaults of the Flax modules, chosen by measurement: docs/results.md, "The default"."""


def normalize(
    f: Activation,
    x: Float[Array, "*shape"],
    factor: Float[Array, "..."] | float,
    shift: Float[Array, "..."] | float = 0.0,
) -> Float[Array, "*shape"]:
    """The normalized activation `y = factor * (f(x) - shift)`.

    All of it runs in float32 or wider, whatever x's dtype. For the gradient only x, factor and shift
    are kept; f(x) and f'(x) are computed again.

    Args:
        f: any elementwise JAX function.
        x: floating-point input of any shape.
        factor: broadcastable to x.
        shift: broadcastable to x.

    Returns:
        An array of x's shape and dtype, differentiable in x, factor and shift, forward and reverse.

    Raises:
        TypeError: x is not floating point.

    >>> normalize(jax.nn.relu, jnp.array([-1.0, 2.0]), 2.0, 0.5)
    Array([-1.,  3.], dtype=float32)
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"normalize needs a floating-point x, got dtype {x.dtype}; cast it first")
    factor, shift = (jnp.asarray(value, wide_dtype(x.dtype)) for value in (factor, shift))
    factor, shift = (value.reshape((1,) * (x.ndim - value.ndim) + value.shape) for value in (factor, shift))
    y: Array = jax.checkpoint(functools.partial(scaled, f))(x, factor, shift)
    return y


def check_layer(fn: Activation, rule: str, reference: str, momentum: float, nonlinearity: float | None) -> None:
    """Raises TypeError unless fn can be called, ValueError at an option that cannot be: before any batch."""
    if not callable(fn):
        raise TypeError(f"fn must be an elementwise function such as jax.nn.swish, got {fn!r}")
    check_options(rule, reference)
    check_momentum(momentum)
    if nonlinearity is not None:
        check_nonlinearity(nonlinearity)


def anact(
    f: Activation,
    x: Float[Array, "*shape"],
    running: Stats,
    *,
    rule: Rule = "mean",
    center: bool = False,
    reference: Reference = "input",
    momentum: float = 0.9,
    feature_axes: int | Sequence[int] = (),
    use_running_average: bool = False,
    update: bool | None = None,
    mask: Shaped[Array, "..."] | None = None,
    axis_name: Hashable | Sequence[Hashable] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    stop_gradient: bool = True,
    correction: Float[Array, "*features"] | float = 0.0,
) -> tuple[Float[Array, "*shape"], Stats]:
    """One step of an adaptively normalized activation: input and state in, output and state out.

    `y = (lambda + correction) * (f(x) - c)` with lambda and c from `normalization`, of this batch's
    statistics or of the running ones. The Flax modules are shells around this function; with
    another framework, or none, call it yourself.

    Args:
        f: any elementwise JAX function.
        x: floating-point input of any shape.
        running: running statistics, at first those of `gaussian_stats(f)`.
        rule: see `normalization`.
        center: see `normalization`.
        reference: see `normalization`.
        momentum: see `update_stats`.
        feature_axes: see `activation_stats`.
        use_running_average: normalize with `running` (inference) or with this batch (training). A
            batch that tells nothing (see `informative`) is normalized with `running` as well.
        update: take this batch into the running statistics; by default where it is normalized with
            its own. The four combinations are all valid.
        mask: see `activation_stats`; it decides what is counted, while every element is normalized.
        axis_name: see `activation_stats`.
        axis_index_groups: see `activation_stats`.
        stop_gradient: treat factor and shift as constants under differentiation; False
            differentiates through the batch's statistics, as BatchNorm does.
        correction: added to the factor, such as the paper's `0.3 * tanh(alpha)`.

    Returns:
        y in x's shape and dtype, and the running statistics, which carry no gradient.

    Raises:
        TypeError: x or f(x) is not real floating point.
        ValueError: an option is unknown or out of range, the running statistics have another shape than
            x has features, or as `activation_stats` raises.

    >>> from anact_jax import gaussian_stats
    >>> x = jax.random.normal(jax.random.key(0), (1000, 8))
    >>> y, running = anact(jax.nn.relu, x, gaussian_stats(jax.nn.relu), rule="forward")
    >>> round(float(jnp.mean(y**2) / jnp.var(x)), 3), float(running.count)
    (1.0, 1.0)
    """
    update = not use_running_average if update is None else update
    step = _step_traced_once if isinstance(x, jax.core.Tracer) and always_the_same(f) else _step
    return step(
        f,
        x,
        running,
        mask,
        correction,
        rule=rule,
        center=center,
        reference=reference,
        momentum=momentum,
        feature_axes=feature_axes if isinstance(feature_axes, int) else tuple(feature_axes),
        use_running_average=use_running_average,
        update=update,
        axis_name=tuple(axis_name) if isinstance(axis_name, list) else axis_name,
        axis_index_groups=None if axis_index_groups is None else tuple(map(tuple, axis_index_groups)),
        stop_gradient=stop_gradient,
    )


def _step(
    f: Activation,
    x: Array,
    running: Stats,
    mask: Array | None,
    correction: Array | float,
    *,
    rule: Rule,
    center: bool,
    reference: Reference,
    momentum: float,
    feature_axes: int | tuple[int, ...],
    use_running_average: bool,
    update: bool,
    axis_name: Hashable | None,
    axis_index_groups: tuple[tuple[int, ...], ...] | None,
    stop_gradient: bool,
) -> tuple[Array, Stats]:
    axes = canonical_axes(feature_axes, x.ndim)
    features = tuple(x.shape[axis] for axis in axes)
    if running.count.shape != features:
        raise ValueError(
            f"running statistics of shape {running.count.shape} do not fit feature_axes {feature_axes} of x with shape "
            f"{x.shape}, which need {features}; set feature_axes as when they were made, or make them anew"
        )
    if update or not use_running_average:
        measured = jax.lax.stop_gradient(x) if stop_gradient else x
        batch = activation_stats(
            f, measured, feature_axes=axes, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups
        )
    if use_running_average:
        used = running
    else:
        told = informative(batch)
        used = Stats(*(jnp.where(told, new, old.astype(new.dtype)) for new, old in zip(batch, running, strict=True)))

    factor, shift = normalization(used, rule=rule, center=center, reference=reference)
    if stop_gradient:
        factor, shift = jax.lax.stop_gradient((factor, shift))
    unreduced = tuple(axis for axis in range(x.ndim) if axis not in axes)
    factor, shift = (jnp.expand_dims(value, unreduced) for value in (factor + correction, shift))
    y = normalize(f, x, factor, shift)
    return y, jax.lax.stop_gradient(update_stats(running, batch, momentum=momentum)) if update else running


# The layers of a network that agree in all but their arrays' values are traced once, not once each.
_step_traced_once = jax.jit(
    _step,
    static_argnames=["f", *(p.name for p in inspect.signature(_step).parameters.values() if p.kind == p.KEYWORD_ONLY)],
)
