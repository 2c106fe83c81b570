"""Batch statistics of an activation: the only place that talks across devices."""

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from anact_jax.activations import Activation
from anact_jax.sums import sums


class Stats(NamedTuple):
    """Population moments of an activation's input x and output f(x).

    Every field has the same shape: `()` for one layer, or that of the feature axes, such as
    `(C,)`. The dtype is float32, or float64 for float64 input.

    Attributes:
        count: elements behind the moments; in running statistics, batches taken in; 0 for the
            Gaussian reference of `gaussian_stats`, which rests on no data.
        mean_in: E[x].
        var_in: Var[x].
        mean_out: E[f(x)], the `mu` of docs/method.md.
        var_out: Var[f(x)].
        slope_sq: E[f'(x)^2], the backward gain `rho'`.
    """

    count: Float[Array, "*features"]  # type: ignore[assignment]  # hides tuple.count, which is not used
    mean_in: Float[Array, "*features"]
    var_in: Float[Array, "*features"]
    mean_out: Float[Array, "*features"]
    var_out: Float[Array, "*features"]
    slope_sq: Float[Array, "*features"]


# Sums of squares from here on count as non-finite, so that nothing below can overflow in float32.
_LARGEST = 1e30

FEW_SHARDS = 16  # up to which moments are gathered: a table of 16 rows costs less than a second collective


def activation_stats(
    f: Activation,
    x: Float[Array, "*shape"],
    *,
    feature_axes: int | Sequence[int] = (),
    mask: Shaped[Array, "..."] | None = None,
    axis_name: Hashable | Sequence[Hashable] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Stats:
    """Moments of x, f(x) and f'(x) over a batch, in float32 or wider.

    Two passes: means first, then variances about them, so that an offset of 1e4 costs no accuracy.
    f' comes from forward-mode autodiff.

    Args:
        f: any elementwise JAX function; each output may depend on its own input only.
        x: input of any shape.
        feature_axes: axes that keep statistics of their own; `()` gives one set for the layer,
            `-1` one for each channel of channels-last input.
        mask: broadcastable to x; elements where it is zero or False are left out.
        axis_name: mapped axis or axes (of `pmap`, `vmap` or `shard_map`) that share the batch. The
            result is then exact over all of them, each shard weighted by its count.
        axis_index_groups: indices along `axis_name` that share a batch, as in `jax.lax.psum`: each index in
            one group. Two groups of four devices: `[[0, 1, 2, 3], [4, 5, 6, 7]]`.

    Returns:
        `Stats` of shape `()`, or of x's shape at `feature_axes`. No elements: all zeros. Where x,
        f(x) or f'(x) has an element that is NaN or infinite, or squares that sum to 1e30 (one element of 1e15): NaN
        for the moments of that feature, and no gradient through them. `update_stats` leaves such batches out.

    Raises:
        TypeError: x or f(x) is not real floating point.
        ValueError: f changes the shape, an axis does not exist or comes twice, the mask does not
            broadcast, `axis_name` is not bound here, or the groups do not hold each of its indices once.

    >>> stats = activation_stats(jax.nn.relu, jnp.array([-1.0, 0.0, 1.0, 2.0]))
    >>> [round(float(value), 4) for value in stats]
    [4.0, 0.5, 1.25, 0.75, 0.6875, 0.5]
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"activation_stats needs a floating-point x, got dtype {x.dtype}; cast it first")
    axes = canonical_axes(feature_axes, x.ndim)
    check_elementwise(f, x)
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.ndim > x.ndim or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(
                f"mask of shape {mask.shape} does not broadcast to x of shape {x.shape}; "
                "give it one axis for each of x's, of size 1 where it is shared, as in mask[:, :, None]"
            )
        mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape).astype(bool)

    if axis_index_groups is not None and axis_name is None:
        raise ValueError("axis_index_groups divide the shards of a mapped axis; name it by axis_name")

    measured = _measured(f, axes, jax.lax.stop_gradient(x), mask)
    # Only x, the mask and what was measured are kept for a gradient: everything between is computed again there.
    local = jax.checkpoint(lambda x: _moments(f, axes, x, mask, measured))(x)
    return local if axis_name is None else _over_shards(local, axis_name, axis_index_groups)


def canonical_axes(feature_axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Feature axes as sorted non-negative integers.

    Raises:
        ValueError: an axis does not exist in an array of `ndim` axes, or comes twice.

    >>> canonical_axes((-1, 0), 3)
    (0, 2)
    """
    given = (feature_axes,) if isinstance(feature_axes, int) else tuple(feature_axes)
    if any(not -ndim <= axis < ndim for axis in given):
        raise ValueError(f"feature_axes {given} must lie between {-ndim} and {ndim - 1} for input with {ndim} axes")
    axes = tuple(sorted(axis % ndim for axis in given))
    if len(set(axes)) != len(axes):
        raise ValueError(f"feature_axes {given} name the same axis twice in input with {ndim} axes")
    return axes


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which input of `dtype` is measured and scaled: float64 for float64, else float32.

    >>> wide_dtype(jnp.bfloat16)
    dtype('float32')
    """
    wide: jnp.dtype = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    return wide


def _measured(f: Activation, axes: tuple[int, ...], x: Array, mask: Array | None) -> Stats:
    """The moments, for an x without gradient.

    A first pass takes m = E[x], a second all else: sums about m and f(m), which lie so near to the means that no
    accuracy is lost.
    """
    dtype, reduced = wide_dtype(x.dtype), tuple(axis for axis in range(x.ndim) if axis not in axes)
    features = tuple(x.shape[axis] for axis in axes)
    if mask is None:
        count = jnp.full(features, x.size // max(1, math.prod(features)), dtype)
    else:
        count = jnp.sum(jnp.broadcast_to(mask, x.shape), axis=reduced, dtype=jnp.int32).astype(dtype)

    def mean(total: Array) -> Array:
        return total / jnp.maximum(count, 1)

    m = mean(jnp.sum(x, axis=reduced, dtype=dtype, where=mask))
    shape = tuple(1 if axis in reduced[:1] else size for axis, size in enumerate(x.shape))
    at_m = jnp.mean(f(jnp.broadcast_to(jnp.expand_dims(m, reduced), shape)).astype(dtype), axis=reduced)
    at_m = jnp.where(jnp.isfinite(at_m), at_m, 0)

    def terms(x: Array, mask: Array | None, m: Array, at_m: Array) -> list[Array]:
        y, slope = value_and_slope(f, x.astype(dtype))
        about_m, about_at_m = x.astype(dtype) - m, y - at_m
        if mask is not None:
            about_m, about_at_m, slope = (jnp.where(mask, value, 0) for value in (about_m, about_at_m, slope))
        return [about_m, about_m**2, about_at_m, about_at_m**2, slope**2]

    found = sums(terms, x, mask, m, at_m, feature_axes=axes)
    about_m, about_m_sq, about_at_m, about_at_m_sq, slope_sq = map(mean, found)
    mean_in, mean_out = m + about_m, at_m + about_at_m
    var_in, var_out = about_m_sq - about_m**2, about_at_m_sq - about_at_m**2
    squares = var_in + mean_in**2, var_out + mean_out**2, slope_sq
    sound = jnp.all(jnp.stack([count * square < _LARGEST for square in squares]), axis=0)
    moments = mean_in, jnp.maximum(0, var_in), mean_out, jnp.maximum(0, var_out), slope_sq
    # NaN unless sound, by a division: XLA computes one once a feature, all else anew for each element that meets it.
    sound = sound.astype(dtype)
    return Stats(count, *(moment * sound / sound for moment in moments))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _moments(f: Activation, axes: tuple[int, ...], x: Array, mask: Array | None, measured: Stats) -> Stats:
    """What was measured, with its derivative in x."""
    del f, axes, x, mask
    return measured


@_moments.defjvp
def _moments_jvp(
    f: Activation, axes: tuple[int, ...], primals: tuple[Array, Array | None, Stats], tangents: tuple[Array, Any, Stats]
) -> tuple[Stats, Stats]:
    x, mask, measured = primals
    moments = _moments(f, axes, x, mask, measured)
    reduced = tuple(axis for axis in range(x.ndim) if axis not in axes)
    sound = jnp.isfinite(moments.mean_in)
    counted = jnp.expand_dims(sound, reduced)
    if mask is not None:
        x = jnp.where(mask, x, jnp.expand_dims(jnp.where(sound, moments.mean_in, 0), reduced).astype(x.dtype))
        counted = counted & mask

    def evaluated(x: Array) -> tuple[Array, Array, Array]:
        x = x.astype(wide_dtype(x.dtype))
        return x, *value_and_slope(f, x)

    (x, y, slope), (dx, dy, dslope) = jax.jvp(evaluated, (x,), (jnp.where(counted, tangents[0], 0),))

    def mean(values: Array) -> Array:
        return jnp.where(sound, jnp.sum(values, axis=reduced) / jnp.maximum(moments.count, 1), 0)

    return moments, Stats(
        jnp.zeros_like(moments.count),
        mean(dx),
        mean(2 * (x - jnp.expand_dims(moments.mean_in, reduced)) * dx),
        mean(dy),
        mean(2 * (y - jnp.expand_dims(moments.mean_out, reduced)) * dy),
        mean(2 * slope * dslope),
    )


def value_and_slope(f: Activation, x: Array) -> tuple[Array, Array]:
    """f(x) and f'(x), by forward-mode autodiff, in x's dtype."""
    y, slope = jax.jvp(f, (x,), (jnp.ones_like(x),))
    return y.astype(x.dtype), slope.astype(x.dtype)


def check_elementwise(f: Activation, x: Array) -> None:
    """Raises ValueError or TypeError where f does not map x in its wide dtype to real numbers of x's shape."""
    y = jax.eval_shape(f, jax.ShapeDtypeStruct(x.shape, wide_dtype(x.dtype)))
    if y.shape != x.shape:
        raise ValueError(f"f must be elementwise: it turned shape {x.shape} into {y.shape}")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"f must return floating-point values, got dtype {y.dtype}")


def _over_shards(
    local: Stats, axis_name: Hashable | Sequence[Hashable], groups: Sequence[Sequence[int]] | None
) -> Stats:
    """Merges the moments of the shards, or of this shard's group, count-weighted and without E[x^2] - E[x]^2.

    Few shards sum a table that has a row of moments for each: a gather, in one collective, whose result every shard is
    known to share (which `shard_map` checks). Among many the table would be large, so they sum twice: to have the
    means, then about them.
    """
    name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    try:
        shards, index = jax.lax.axis_size(name), jax.lax.axis_index(name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here; call this inside "
            f"jax.pmap(..., axis_name={axis_name!r}), jax.vmap or jax.shard_map over that axis, or leave axis_name "
            "out (under jit with sharded arrays the statistics are global already)"
        ) from error
    groups = [range(shards)] if groups is None else groups
    if sorted(itertools.chain(*groups)) != list(range(shards)):
        raise ValueError(
            f"axis_index_groups must hold each index of axis {axis_name!r}, 0 to {shards - 1}, once, got {groups}"
        )
    group_of = np.zeros(shards, np.int32)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    ours = 0 if len(groups) == 1 else jnp.asarray(group_of)[index]

    def table(rows: int, row: Array | int, values: Sequence[Array]) -> Array:
        mine = jnp.stack(values)
        every: Array = jax.lax.psum(jnp.zeros((rows, *mine.shape), mine.dtype).at[row].set(mine), name)
        return every

    if shards > FEW_SHARDS:
        return _merged(lambda *values: table(len(groups), ours, values)[ours], local)
    moments = table(shards, index, local)
    in_our_group = jnp.expand_dims(group_of == ours, range(1, moments.ndim))
    moments = jnp.where(in_our_group, moments, 0)  # to us, the others' shards are empty
    merged = _merged(lambda *values: jnp.sum(jnp.stack(values), axis=1, keepdims=True), jnp.moveaxis(moments, 1, 0))
    return Stats(*(moment[0] for moment in merged))


def _merged(total: Callable[..., Array], shards: Iterable[Array]) -> Stats:
    """The moments of all shards together, with `total` for summing over the shards."""
    count, mean_in, var_in, mean_out, var_out, slope_sq = shards
    elements, in_, out = total(count, count * mean_in, count * mean_out)
    share, grand_in, grand_out = (value / jnp.maximum(elements, 1) for value in (count, in_, out))
    off_in, off_out = mean_in - grand_in, mean_out - grand_out
    # What the sums of `off` find is what rounding left in the means.
    in_, in_sq, out, out_sq, slope_sq = total(
        share * off_in,
        share * (var_in + off_in**2),
        share * off_out,
        share * (var_out + off_out**2),
        share * slope_sq,
    )
    var_in, var_out = (jnp.maximum(0, square - off**2) for square, off in ((in_sq, in_), (out_sq, out)))
    return Stats(elements, grand_in, var_in, grand_out, var_out, slope_sq)
