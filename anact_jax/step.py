"""`anact`: one step of a normalized activation, for any f."""

import functools
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Shaped

from anact_jax.forms import Form, form_of
from anact_jax.gaussian import gaussian_stats
from anact_jax.kernels import scaling
from anact_jax.running import check_momentum, moved
from anact_jax.statistics import (
    MOMENTS,
    Shards,
    Stats,
    broadcast_mask,
    differentiable,
    feature_axes,
    judge,
    measure,
    other_axes,
    sharded_as,
    shards_of,
)
from anact_jax.tracing import Activation, Constants, check_floating, known, traced, while_tracing, wide_dtype

_LARGEST = 1e15  # from here on, elements count as not finite


def normalize(
    f: Activation,
    x: Float[Array, "*shape"],
    factor: Float[Array, "..."] | float,
    shift: Float[Array, "..."] | float = 0.0,
) -> Float[Array, "*shape"]:
    """The normalized activation `y = factor * (f(x) - shift)`.

    It is computed in float32 or wider, and returned in x's dtype. The backward pass stores only x, factor and shift,
    and computes f(x) and f'(x) again.

    Args:
        f: any elementwise JAX function.
        x: floating-point input of any shape.
        factor: broadcastable to x.
        shift: broadcastable to x.

    Returns:
        An array of x's shape and dtype, differentiable in x, factor, shift and what f closes over, forward and reverse.

    Raises:
        TypeError: x or f(x) is not floating point.
        ValueError: f changes the shape.

    Examples:
        >>> normalize(jax.nn.relu, jnp.array([-1.0, 2.0]), 2.0, 0.5)
        Array([-1.,  3.], dtype=float32)
    """
    x = jnp.asarray(x)
    g, constants = traced(f, x)

    def expanded(value: ArrayLike) -> Array:
        value = jnp.asarray(value, wide_dtype(x.dtype))
        return value.reshape((1,) * (x.ndim - value.ndim) + value.shape)

    def formula(constants: Constants, x: Array, factor: Array, shift: Array) -> Array:
        return factor * (g(constants, x) - shift)

    y: Array = jax.checkpoint(formula)(constants, x, expanded(factor), expanded(shift))
    return y.astype(x.dtype)


def initial_stats(f: Activation, form: Form | str = "default", shape: tuple[int, ...] = ()) -> Stats:
    """Running statistics before the first batch: those of the form's function under a standard normal input.

    Args:
        f: any elementwise JAX function.
        form: `Standardized(...)`, `Published(...)`, or a word, see `form_of`.
        shape: `()`, or `(channels,)` of a form with an axis.

    Returns:
        `Stats` of that shape with `form.moments` and count 0.

    Examples:
        >>> stats = initial_stats(jax.nn.relu)
        >>> [None if moment is None else round(float(moment), 3) for moment in stats]
        [0.0, None, None, 0.399, 0.341, None]
    """
    form = form_of(form)
    prior = while_tracing(_stats_of_form, f, form)
    fields = {name: jnp.broadcast_to(getattr(prior, name), shape) for name in ("count", *form.moments)}
    return Stats(**fields)


def _stats_of_form(f: Activation, form: Form) -> Stats:
    return gaussian_stats(form.activation(f))


def anact(
    f: Activation,
    x: Float[Array, "*shape"],
    running: Stats,
    form: Form | str = "default",
    *,
    momentum: ArrayLike = 0.9,
    use_running_average: bool = False,
    update: bool | None = None,
    mask: Shaped[Array, "..."] | None = None,
    axis_name: Hashable | Sequence[Hashable] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    alpha: Float[Array, "*features"] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "*shape"], Stats]:
    """One step of an adaptively normalized activation: input and state in, output and state out.

    `y = factor * (f(x) - shift)` with f = `form.activation(f)`, and `form.factor_and_shift` of the statistics of this
    batch or of the running ones. The Flax modules are shells around this function; with another
    framework, or none, call it yourself. The backward pass stores only x: f(x) and f'(x) are computed again.

    Args:
        f: any elementwise JAX function. It may close over arrays, such as a learned slope; the gradient in them flows
            through the statistics as well.
        x: floating-point input of any shape.
        running: running statistics, at first `initial_stats(f, form)`. Statistics of shape () serve for every feature.
            Moments that the form does not use are left out of what is returned.
        form: `Standardized(...)`, `Published(...)`, or a word, see `form_of`.
        momentum: weight of the past, in [0, 1], a number or an array; see `update_stats`.
        use_running_average: normalize with `running` (inference) or with this batch (training). A degenerate batch (see
            `informative`) is normalized with `running` as well.
        update: take this batch into the running statistics; by default where it is normalized with its own. The four
            combinations are all valid.
        mask: see `activation_stats`; it decides what is counted, while every element is normalized. What masked
            elements hold changes nothing else; those that are not finite, or 1e15 and larger, are taken as 0.
        axis_name: see `activation_stats`.
        axis_index_groups: see `activation_stats`.
        alpha: the parameter of `Published(learned=True)`: `0.3 tanh(alpha)` is added to the factor.
        dtype: of y; by default x's.

    Returns:
        y in x's shape, and the running statistics in their dtypes, which carry no gradient.

    Raises:
        TypeError: x or f(x) is not real floating point, or f has no forward-mode derivative.
        ValueError: the form is unknown, the running statistics lack a moment that it uses or have another shape than x
            has features, momentum lies outside [0, 1], or as `activation_stats` raises.

    Warns:
        UserWarning: the running statistics are to be updated, and x has one value for each of them, over all shards.
            They never move then. Of images under `jax.vmap` without `axis_name` this cannot be seen: one image has many
            values a channel.

    Examples:
        >>> x = jax.random.normal(jax.random.key(0), (1000, 8))
        >>> y, running = anact(jax.nn.relu, x, initial_stats(jax.nn.relu, shape=(8,)))
        >>> round(float(jnp.std(y[:, 0])), 3), float(running.count[0])
        (0.5, 1.0)
    """
    form, x = form_of(form), jnp.asarray(x)
    check_floating(x)
    check_momentum(momentum)
    axes, shards = feature_axes(form.axis, x.ndim), shards_of(axis_name, axis_index_groups)
    update = not use_running_average if update is None else update
    if update:
        _warn_of_one_value(x.shape, axes, shards)
    same = known(f, x)
    step = _step if same is None else _compiled_step
    return step(
        f if same is None else same,
        form,
        axes,
        shards,
        use_running_average,
        update,
        jnp.dtype(x.dtype if dtype is None else dtype),
        x,
        _fitting(running, form, tuple(x.shape[axis] for axis in axes)),
        broadcast_mask(mask, x),
        momentum,
        alpha,
    )


def _warn_of_one_value(shape: tuple[Any, ...], axes: tuple[int, ...], shards: Shards | None) -> None:
    sizes = [shape[axis] for axis in other_axes(axes, len(shape))]
    # A size may be unknown until the program runs.
    if all(isinstance(size, int) and size == 1 for size in sizes) and (shards is None or shards.largest_group() == 1):
        warnings.warn(
            f"a batch of one value a feature cannot update statistics: x has shape {shape}, with features on axes "
            f"{axes}. If jax.vmap hides the batch, name its axis, as in jax.vmap(..., axis_name='batch') and "
            "axis_name='batch' here; otherwise train on larger batches, or use_running_average=True",
            stacklevel=3,
        )


def warn_of_sharing(layer: str) -> None:
    """Warns that a layer updates its statistics twice in one pass."""
    warnings.warn(
        f"{layer} is called at several places of one pass, which share its running statistics: in inference each place "
        "is normalized with a mixture of all. Make a layer for each place (where a model takes one as act=NSwish(), "
        "give it the class or a function that makes one); shared=True says that it is meant",
        stacklevel=3,
    )


def check_state(held: Mapping[str, Any], form: Form, layer: str, features: tuple[Any, ...] | None = None) -> None:
    """Raises ValueError unless a layer's state holds the moments of its form, in the shape of the features."""
    names = ("count", *form.moments)
    missing = [name for name in names if name not in held]
    surplus = [name for name in MOMENTS if name in held and name not in names]
    if missing or surplus:
        what = f"no {', '.join(missing)}, which" if missing else f"{', '.join(surplus)} too, which"
        raise ValueError(
            f"{layer} has {what} form {form} {'uses' if missing else 'does not use'}: its state is that of another "
            "form. Make the layer with the form it was trained with, as in form='published', or begin with new "
            "statistics, anact_jax.restored(saved, fresh, start_anew=True)"
        )
    shapes = {name: jnp.shape(held[name]) for name in names}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"{layer} has moments of several shapes, {shapes}: a part of them is the state of another form; "
            "anact_jax.restored(saved, fresh) says which"
        )
    if features is not None:
        check_width(shapes["count"], features, form, layer)


def check_width(shape: tuple[Any, ...], features: tuple[Any, ...], form: Form, layer: str) -> None:
    """Raises ValueError unless statistics of this shape serve for these features."""
    if shape in ((), features):
        return
    remedy = (
        "with axis=None there is one set a layer: they were kept with an axis"
        if form.axis is None
        else "a layer serves one width: give each place a layer of its own, or share one with axis=None"
    )
    raise ValueError(f"{layer} has statistics of shape {shape}, but its input has {features} features; {remedy}")


def _fitting(running: Stats, form: Form, features: tuple[Any, ...]) -> Stats:
    """Running statistics with the moments of the form alone, one for each feature."""
    missing = [name for name in form.moments if getattr(running, name) is None]
    if missing:
        raise ValueError(
            f"the running statistics have no {', '.join(missing)}, which form {form} uses; begin with "
            "anact_jax.initial_stats(f, form), or keep to the form that they were made for"
        )
    check_width(running.count.shape, features, form, "running")
    kept = {name: jnp.asarray(getattr(running, name)) for name in ("count", *form.moments)}
    return Stats(**{name: jnp.broadcast_to(value, features) for name, value in kept.items()})


def _step(
    f: Activation,
    form: Form,
    axes: tuple[int, ...],
    shards: Shards | None,
    use_running_average: bool,
    update: bool,
    dtype: jnp.dtype,
    x: Array,
    running: Stats,
    mask: Array | None,
    momentum: ArrayLike,
    alpha: Array | None,
) -> tuple[Array, Stats]:
    wide, reduced, scaled = wide_dtype(x.dtype), other_axes(axes, x.ndim), scaling(x, axes)
    if mask is not None:  # 0 times infinity, in a gradient, is not 0
        x = jnp.where(mask | (jnp.abs(x).astype(wide) < _LARGEST), x, 0)
    f = form.activation(f)
    g, constants = traced(f, x)
    used: Stats = jax.tree.map(lambda moment: jax.lax.stop_gradient(moment).astype(wide), running)
    told, after = jnp.zeros(running.count.shape, bool), running
    if update or not use_running_average:
        batch, rounding = measure(g, constants, x, axes, mask, shards, form.moments)
        sound, varied = judge(batch, rounding)
        told = functools.reduce(jnp.logical_and, varied.values(), sound & (batch.count > 0))
        # XLA computes a division once, and all else anew in each of the many kernels that take a moment.
        one = jnp.where(told, 1, 2).astype(wide)
        batch = batch._replace(**{name: getattr(batch, name) / one for name in form.moments})
        if update:
            after = moved(running, batch, told, momentum)
        if not use_running_average:
            used = jax.tree.map(lambda new, old: jnp.where(told, new, old), batch, sharded_as(used, told))

    def formula(constants: Constants, x: Array, used: Stats, alpha: Array | None) -> Array:
        if not (form.stop_gradient or use_running_average):
            used = differentiable(g, axes, shards, constants, x, mask, used, told)
        factor, shift = (jnp.expand_dims(value, reduced) for value in form.factor_and_shift(used, alpha))
        return scaled(g, constants, x, factor, shift).astype(dtype)

    y: Array = jax.checkpoint(formula)(constants, x, used, alpha)
    return y, after


# The layers of a network that differ only in the values of their arrays are traced once, not once each.
_compiled_step = jax.jit(_step, static_argnums=range(7))


def check_activation(fn: object, layer: str) -> None:
    """Raises TypeError unless fn can be called: before any batch, in a layer's constructor."""
    if isinstance(fn, jax.Array | np.ndarray) and fn.ndim:
        raise TypeError(
            f"{layer} is a layer: {layer}(...)(x); its first argument is an activation, got an array of shape "
            f"{fn.shape} and dtype {fn.dtype}"
        )
    if not callable(fn):
        raise TypeError(f"fn must be an elementwise function such as jax.nn.swish, got {fn!r}")
