"""The moments of a batch, over devices too: the only place with a collective."""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from anact_jax.kernels import at_hand, sums
from anact_jax.tracing import Activation, Constants, ExplicitActivation, traced, value_and_slope, wide_dtype


class Stats(NamedTuple):
    """Population moments of an activation's input x and output f(x).

    Every field has the same shape: `()` for one layer, or `(C,)` for C channels. The dtype is float32, or float64 for
    float64 input. A moment that was not measured is None, which the types leave out for those who measure all.

    Attributes:
        count: elements behind the moments; in running statistics, batches taken in; 0 for the Gaussian reference of
            `gaussian_stats`, which rests on no data.
        mean_in: E[x].
        var_in: Var[x].
        mean_out: E[f(x)], the `mu` of docs/explanation/method.md.
        var_out: Var[f(x)].
        slope_sq: E[f'(x)^2], the backward gain `rho'`.
    """

    count: Float[Array, "*features"]  # type: ignore[assignment]  # hides tuple.count, which is not used
    mean_in: Float[Array, "*features"] = None  # type: ignore[assignment]
    var_in: Float[Array, "*features"] = None  # type: ignore[assignment]
    mean_out: Float[Array, "*features"] = None  # type: ignore[assignment]
    var_out: Float[Array, "*features"] = None  # type: ignore[assignment]
    slope_sq: Float[Array, "*features"] = None  # type: ignore[assignment]


MOMENTS: tuple[str, ...] = Stats._fields[1:]


class FactorAndShift(NamedTuple):
    """The two numbers of a normalized activation, `factor * (f(x) - shift)`."""

    factor: Float[Array, "*features"]
    shift: Float[Array, "*features"]


def require(stats: Stats, names: Sequence[str]) -> list[Array]:
    """These moments.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in names if getattr(stats, name) is None]
    if missing:
        raise ValueError(f"the statistics have no {', '.join(missing)}; measure them on a batch, by activation_stats")
    return [getattr(stats, name) for name in names]


FEW_SHARDS = 16  # up to which moments are gathered: a table of 16 rows costs less than a second collective

_ROUNDINGS = 4  # machine epsilons by which f(x) may be off

_LARGEST = 1e30  # sums of squares from here on count as not finite, so that nothing below overflows in float32


class Shards(NamedTuple):
    """The devices that share a batch.

    Attributes:
        axis_name: the mapped axis or axes.
        groups: indices along them that share a batch; None for all.
    """

    axis_name: Hashable
    groups: tuple[tuple[int, ...], ...] | None

    def size(self) -> int:
        """Number of shards along the axis.

        Raises:
            ValueError: the axis is not bound, or the groups do not hold each index once.
        """
        name, groups = self.axis_name, self.groups
        try:
            size = jax.lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"axis_name={name!r} is not bound here; call this inside jax.pmap(..., axis_name={name!r}), jax.vmap "
                "or jax.shard_map over that axis, or leave axis_name out (under jit with sharded arrays the statistics "
                "are global already)"
            ) from error
        if groups is not None and sorted(itertools.chain(*groups)) != list(range(size)):
            raise ValueError(
                f"axis_index_groups must hold each index of axis {name!r}, 0 to {size - 1}, once, got {groups}"
            )
        return int(size)

    def largest_group(self) -> int:
        """Number of shards that share a batch, at most."""
        return max(map(len, self.groups)) if self.groups else self.size()

    def group_of(self) -> np.ndarray:
        """The number of the group that each shard belongs to."""
        group_of = np.zeros(self.size(), np.int32)
        for number, group in enumerate(self.groups or ()):
            group_of[list(group)] = number
        return group_of

    def table(self, rows: int, row: Array | int, values: Array) -> Array:
        """A table with the sum of all values that were given for each row; one collective."""
        every: Array = jax.lax.psum(jnp.zeros((rows, *values.shape), values.dtype).at[row].set(values), self.axis_name)
        return every

    def total(self, values: Array) -> Array:
        """The sum over the shards of our group; one collective."""
        if self.groups is None:
            whole: Array = jax.lax.psum(values, self.axis_name)
            return whole
        ours = jnp.asarray(self.group_of())[jax.lax.axis_index(self.axis_name)]
        return self.table(len(self.groups), ours, values)[ours]


def shards_of(
    axis_name: Hashable | Sequence[Hashable], axis_index_groups: Sequence[Sequence[int]] | None
) -> Shards | None:
    """What the two options of the public functions say, hashable; None without a mapped axis.

    Raises:
        ValueError: groups of no axis.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError("axis_index_groups divide the shards of a mapped axis; name it by axis_name")
        return None
    groups = None if axis_index_groups is None else tuple(tuple(map(int, group)) for group in axis_index_groups)
    name: Any = axis_name
    return Shards(tuple(name) if isinstance(name, list) else name, groups)


def activation_stats(
    f: Activation,
    x: Float[Array, "*shape"],
    *,
    axis: int | None = None,
    mask: Shaped[Array, "..."] | None = None,
    axis_name: Hashable | Sequence[Hashable] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    moments: Sequence[str] = MOMENTS,
) -> Stats:
    """Moments of x, f(x) and f'(x) over a batch, in float32 or wider.

    One pass: sums about an element m of each feature and about f(m), so that an offset of 1e4 costs no accuracy. m is
    the median of three elements from different parts of the batch. With a mask, or on a mesh of several devices under
    `jit`, m is the mean of x, which takes a pass of its own. f' comes from forward-mode autodiff. For a gradient only x
    is kept: f(x) and f'(x) are computed again.

    Args:
        f: any elementwise JAX function; each output may depend on its own input only. It may close over arrays, such as
            a learned slope, and is differentiated in them too.
        x: input of any shape.
        axis: the feature axis, whose channels have statistics of their own, such as -1 for channels-last input; None
            for one set a layer.
        mask: broadcastable to x; elements where it is zero or False are left out, whatever they hold.
        axis_name: mapped axis or axes (of `pmap`, `vmap` or `shard_map`) that share the batch. The result is then
            exact over all of them, each shard weighted by its count.
        axis_index_groups: indices along `axis_name` that share a batch, as in `jax.lax.psum`: each index in one group.
            Two groups of four devices: `[[0, 1, 2, 3], [4, 5, 6, 7]]`.
        moments: fields of `Stats` to compute, such as `form.moments`; the others are None.

    Returns:
        `Stats` of shape `()`, or of x's size along `axis`. No elements: all zeros. A variance that rounding alone
        could make is 0: that of x up to the square of one unit in the last place of x's dtype, that of f(x) up to the
        square of what one such unit changes, and either up to the square of four machine epsilons of float32 (float64
        for float64 input) times its size. A feature that varies in a few rows among many thousands alone can fall
        below that. Where x, f(x) or f'(x) has an element that is NaN or infinite, or squares that sum to 1e30 (one
        element of 1e15): NaN for the moments of that feature, and no gradient through them. `update_stats` leaves such
        batches out.

    Raises:
        TypeError: x or f(x) is not real floating point, or f has no forward-mode derivative.
        ValueError: f changes the shape, the axis does not exist, the mask does not broadcast, `axis_name`
            is not bound here, the groups do not hold each of its indices once, or a moment is unknown.

    Examples:
        >>> stats = activation_stats(jax.nn.relu, jnp.array([-1.0, 0.0, 1.0, 2.0]))
        >>> [round(float(value), 4) for value in stats]
        [4.0, 0.5, 1.25, 0.75, 0.6875, 0.5]
    """
    x = jnp.asarray(x)
    axes = feature_axes(axis, x.ndim)
    for name in moments:
        if name not in MOMENTS:
            raise ValueError(f"unknown moment {name!r}; expected some of {', '.join(MOMENTS)}")
    mask, shards = broadcast_mask(mask, x), shards_of(axis_name, axis_index_groups)
    g, constants = traced(f, x)
    raw, rounding = measure(g, constants, x, axes, mask, shards, tuple(moments))
    sound, varied = judge(raw, rounding)
    found = moments_of(raw)
    for kind, varies in varied.items():
        found[f"var_{kind}"] = jnp.where(varies, found[f"var_{kind}"], 0)
    measured = Stats(raw.count, **{name: jnp.where(sound, value, jnp.nan) for name, value in found.items()})
    # Without the checkpoint, f(x) and f'(x) would be kept for the gradient.
    stats: Stats = jax.checkpoint(partial(differentiable, g, axes, shards))(constants, x, mask, measured, sound)
    return stats


def feature_axes(axis: int | None, ndim: int) -> tuple[int, ...]:
    """The feature axis of an array of `ndim` axes, counted from the front; none for None.

    Raises:
        ValueError: there is no such axis.

    Examples:
        >>> feature_axes(-1, 3), feature_axes(None, 3)
        ((2,), ())
    """
    if axis is None:
        return ()
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} must lie between {-ndim} and {ndim - 1} for input with {ndim} axes")
    return (axis % ndim,)


def other_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """The axes of an array that are none of these."""
    return tuple(axis for axis in range(ndim) if axis not in axes)


def broadcast_mask(mask: Shaped[Array, "..."] | None, x: Array) -> Bool[Array, "..."] | None:
    """The mask as booleans, with x's number of axes.

    Raises:
        ValueError: it does not broadcast to x.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.ndim > x.ndim or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(
            f"mask of shape {mask.shape} does not broadcast to x of shape {x.shape}; "
            "give it one axis for each of x's, of size 1 where it is shared, as in mask[:, :, None]"
        )
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape).astype(bool)


def informative(batch: Stats) -> Bool[Array, "*features"]:
    """Where the statistics of a batch can be used.

    False where it is degenerate: empty, not finite, or without variance in x or f(x) (constant input, a dead ReLU).
    """
    moments = [moment for moment in batch if moment is not None]
    sound = (batch.count > 0) & jnp.all(jnp.isfinite(jnp.stack(moments)), axis=0)
    for variance in (batch.var_in, batch.var_out):
        if variance is not None:
            sound &= variance > 0
    return sound


class Measured(NamedTuple):
    """Moments as they were summed; `judge` says which of them can be used.

    Attributes:
        stats: the moments.
        rounding: for "in" (x) and "out" (f(x)), the variance that rounding alone could make.
    """

    stats: Stats
    rounding: dict[str, Array]


def measure(
    g: ExplicitActivation,
    constants: Constants,
    x: Array,
    axes: tuple[int, ...],
    mask: Array | None,
    shards: Shards | None,
    moments: tuple[str, ...],
) -> Measured:
    """The moments of the batch as they were summed, without a gradient."""
    f, x = partial(g, jax.lax.stop_gradient(constants)), jax.lax.stop_gradient(x)
    found = _measured(f, x, axes, mask, moments)
    if shards is not None:
        found = jax.tree.map(_placed_as, _over_shards(found, shards), found)
    stats, rounding = found
    stats = stats._replace(count=jnp.broadcast_to(stats.count, [x.shape[axis] for axis in axes]))
    if moments:
        stats = sharded_as(stats, getattr(stats, moments[0]))
    return Measured(stats, rounding)


def sharded_as(stats: Stats, like: Array) -> Stats:
    """The same statistics; on an Explicit mesh, with the features on the same devices as `like`.

    `jnp.where` takes arrays of one sharding only, while a sum takes that of the array which has one.
    """
    sharding = jax.typeof(like).sharding

    def placed(value: Array) -> Array:
        return value if jax.typeof(value).sharding == sharding else value + jnp.zeros_like(like, dtype=value.dtype)

    moved_over: Stats = jax.tree.map(placed, stats)
    return moved_over


def judge(
    stats: Stats, rounding: dict[str, Array]
) -> tuple[Bool[Array, "*features"], dict[str, Bool[Array, "*features"]]]:
    """Where measured moments are sound, and where x ("in") and f(x) ("out") vary by more than rounding.

    Sound are finite moments whose squares overflow nowhere below.
    """
    squares = [] if stats.slope_sq is None else [stats.slope_sq]
    varied = {}
    for kind, mean, variance in (("in", stats.mean_in, stats.var_in), ("out", stats.mean_out, stats.var_out)):
        if mean is not None and variance is not None:
            squares.append(variance + mean**2)
            varied[kind] = variance > rounding[kind]
    sound = stats.count * sum(squares) < _LARGEST
    return sound, varied


def _measured(f: Activation, x: Array, axes: tuple[int, ...], mask: Array | None, moments: tuple[str, ...]) -> Measured:
    """The moments of this shard; its count has no axes unless the mask differs between features."""
    dtype, reduced = wide_dtype(x.dtype), other_axes(axes, x.ndim)
    count = _count(x, axes, mask).astype(dtype)

    def mean(total: Array) -> Array:
        return total / jnp.maximum(count, 1)

    pivot = _median_of_three(x, reduced) if mask is None else None
    if pivot is None:  # at the price of a pass over x; on a mesh, of a message too
        pivot = mean(jnp.sum(x, axis=reduced, dtype=dtype, where=mask)).astype(x.dtype)
    # The neighbor nearer 0 lies where f has a value: sqrt, log and arctanh end on the other side.
    about = jnp.stack([pivot, jax.lax.nextafter(pivot, jnp.zeros_like(pivot))]).astype(dtype)
    m, m_step = about[0], about[0] - about[1]
    at = jnp.squeeze(f(jnp.expand_dims(about, [axis + 1 for axis in reduced])), [axis + 1 for axis in reduced])
    at_m, at_step = at[0].astype(dtype), (at[0] - at[1]).astype(dtype)
    # 0 where f has no value there; NaN, which all sums then have, where x is not finite.
    at_m = jnp.where(jnp.isfinite(m) & jnp.isfinite(at_m), at_m, 0 * m)

    def terms(x: Array, mask: Array | None, m: Array, at_m: Array) -> list[Array]:
        x = x.astype(dtype)
        y, slope = value_and_slope(f, x) if "slope_sq" in moments else (f(x), None)
        found = [x - m, (x - m) ** 2] if "var_in" in moments else []
        if "var_out" in moments:
            off = y.astype(dtype) - at_m + 0 * x  # NaN where x is infinite and f(x) is not
            found += [off, off**2]
        found += [] if slope is None else [slope**2]
        return found if mask is None else [jnp.where(mask, value, 0) for value in found]

    found = iter(map(mean, sums(terms, x, mask, m, at_m, feature_axes=axes)))
    values, rounding = {}, {}
    for kind, pivoted, step in (("in", m, m_step), ("out", at_m, at_step)):
        if f"var_{kind}" in moments:
            off, off_sq = next(found), next(found)
            values[f"mean_{kind}"], values[f"var_{kind}"] = pivoted + off, jnp.maximum(0, off_sq - off**2)
            # 1.01: f is not quite a line between neighbors.
            step = jnp.where(jnp.isfinite(step), step, 0)
            rounding[kind] = 1.01 * step**2 + (_ROUNDINGS * jnp.finfo(dtype).eps * pivoted) ** 2
    if "slope_sq" in moments:
        values["slope_sq"] = next(found)
    return Measured(Stats(count, **values), rounding)


def _median_of_three(x: Array, reduced: tuple[int, ...]) -> Array | None:
    """An element of each feature, near which most others are; None where the batch is not at hand.

    Sums about it lose digits only where it lies many deviations away from nearly all others.
    """
    if not (reduced and at_hand(x) and x.size):
        return None

    def element(sixths: int) -> Array:
        start = [sixths * size // 6 if axis in reduced else 0 for axis, size in enumerate(x.shape)]
        end = [first + 1 if axis in reduced else x.shape[axis] for axis, first in enumerate(start)]
        return jnp.squeeze(jax.lax.slice(x, start, end), reduced)

    a, b, c = map(element, (1, 3, 5))
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def moments_of(stats: Stats) -> dict[str, Array]:
    """The moments that were measured, by name."""
    return {name: value for name, value in zip(MOMENTS, stats[1:], strict=True) if value is not None}


def _count(x: Array, axes: tuple[int, ...], mask: Array | None) -> Array:
    """Elements behind the moments of each feature, or of all features alike."""
    if mask is None:
        size = math.prod(size for axis, size in enumerate(x.shape) if axis not in axes)
        return jnp.asarray(float(size) if isinstance(size, int) else size)  # a size may be unknown until it runs
    shared = all(mask.shape[axis] == 1 for axis in axes)
    shape = [1 if shared and axis in axes else size for axis, size in enumerate(x.shape)]
    count = jnp.sum(jnp.broadcast_to(mask, shape), axis=other_axes(axes, x.ndim), dtype=jnp.int32)
    return count.reshape(()) if shared else count


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def differentiable(
    g: ExplicitActivation,
    axes: tuple[int, ...],
    shards: Shards | None,
    constants: Constants,
    x: Array,
    mask: Array | None,
    stats: Stats,
    measured: Bool[Array, "*features"],
) -> Stats:
    """The statistics as they are, with their derivative in x and in the constants of f where they were measured.

    With N elements in all shards, `dE[v] = sum dv / N` and `dVar[v] = sum 2 (v - E[v]) dv / N`.
    """
    del g, axes, shards, constants, x, mask, measured
    return stats


@differentiable.defjvp
def _differentiable_jvp(
    g: ExplicitActivation,
    axes: tuple[int, ...],
    shards: Shards | None,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Stats, Stats]:
    constants, x, mask, _, measured = primals
    stats = differentiable(g, axes, shards, *primals)
    dtype, reduced, moments = wide_dtype(x.dtype), other_axes(axes, x.ndim), moments_of(stats)
    counted = jnp.expand_dims(measured, reduced)  # without a gradient, elsewhere
    if mask is not None:
        counted = counted & mask

    def evaluated(constants: Constants, x: Array) -> tuple[Array, Array, Array | None]:
        x = jnp.where(counted, x, 0)
        y, slope = value_and_slope(partial(g, constants), x) if "slope_sq" in moments else (g(constants, x), None)
        return x.astype(dtype), y, slope

    (x, y, slope), (dx, dy, dslope) = jax.jvp(evaluated, (constants, x), tangents[:2])

    def total(change: Array) -> Array:
        return jnp.sum(jnp.where(counted, change, 0), axis=reduced)

    def about(value: Array, mean: Array) -> Array:
        return value - jnp.expand_dims(mean, reduced)

    found: dict[str, Array] = {}
    if "var_in" in moments:
        found |= {"mean_in": total(dx), "var_in": total(2 * about(x, stats.mean_in) * dx)}
    if "var_out" in moments:
        found |= {"mean_out": total(dy), "var_out": total(2 * about(y, stats.mean_out) * dy)}
    if "slope_sq" in moments:
        found["slope_sq"] = total(2 * slope * dslope)
    if shards is not None:
        found = dict(zip(found, shards.total(jnp.stack(list(found.values()))), strict=True))
    count = jnp.maximum(stats.count, 1)
    return stats, Stats(jnp.zeros_like(count), **{name: change / count for name, change in found.items()})


def _over_shards(local: Measured, shards: Shards) -> Measured:
    """The moments of all shards of our group, count-weighted and without E[x^2] - E[x]^2.

    Few shards sum a table that has a row of moments for each: a gather, in one collective, whose result every shard is
    known to share (which `shard_map` checks). Among many the table would be large, so they sum twice: to have the
    means, then about them.
    """
    size = shards.size()
    if size > FEW_SHARDS:

        def total(values: list[Array]) -> list[Array]:
            return _split(shards.total(_joined(values)), values)

        return _merged(total, local)
    group_of, index = shards.group_of(), jax.lax.axis_index(shards.axis_name)
    values = jax.tree.leaves(local)
    table = shards.table(size, index, _joined(values))
    if shards.groups is not None:  # to us, the others' shards are empty
        table = jnp.where(jnp.expand_dims(jnp.asarray(group_of) == jnp.asarray(group_of)[index], 1), table, 0)
    features = max(value.ndim for value in values)
    rows = [row.reshape(size, *(1,) * (features - row.ndim + 1), *row.shape[1:]) for row in _split(table, values)]
    merged = _merged(
        lambda values: [jnp.sum(v, axis=0, keepdims=True) for v in values],
        jax.tree.unflatten(jax.tree.structure(local), rows),
    )
    ours: Measured = jax.tree.map(lambda value: value[0], merged)
    return ours


def _joined(values: Sequence[Array]) -> Array:
    return jnp.concatenate([_placed(value, (None,) * value.ndim).ravel() for value in values])


def _placed(value: Array, spec: tuple[Any, ...]) -> Array:
    """The same value, sharded so: features may be, under a partly manual `shard_map` on an Explicit mesh."""
    sharding = jax.typeof(value).sharding
    if sharding.mesh.empty or tuple(sharding.spec) == spec:
        return value
    placed: Array = jax.sharding.reshard(value, sharding.update(spec=spec))
    return placed


def _placed_as(value: Array, like: Array) -> Array:
    return _placed(value, tuple(jax.typeof(like).sharding.spec))


def _split(joined: Array, like: Sequence[Array]) -> list[Array]:
    """What `_joined` put together, along the last axis; axes before it stay."""
    ends = np.cumsum([value.size for value in like])[:-1]
    parts = jnp.split(joined, ends, axis=-1)
    return [part.reshape(*part.shape[:-1], *value.shape) for part, value in zip(parts, like, strict=True)]


def _merged(total: Callable[[list[Array]], list[Array]], shards: Measured) -> Measured:
    """The moments of all shards together, with `total` for summing over the shards."""
    count, moments = shards.stats.count, moments_of(shards.stats)
    kinds = [kind for kind in ("in", "out") if f"var_{kind}" in moments]
    elements, *sums_of = total([count, *(count * moments[f"mean_{kind}"] for kind in kinds)])
    share = count / jnp.maximum(elements, 1)
    means = {kind: value / jnp.maximum(elements, 1) for kind, value in zip(kinds, sums_of, strict=True)}
    terms = []
    for kind in kinds:
        off = moments[f"mean_{kind}"] - means[kind]
        terms += [share * off, share * (moments[f"var_{kind}"] + off**2)]  # the first: what rounding left in the mean
        terms.append(share * shards.rounding[kind])
    if "slope_sq" in moments:
        terms.append(share * moments["slope_sq"])
    found = iter(total(terms))
    merged, rounding = {}, {}
    for kind in kinds:
        off, off_sq, rounding[kind] = next(found), next(found), next(found)
        merged[f"mean_{kind}"], merged[f"var_{kind}"] = means[kind], jnp.maximum(0, off_sq - off**2)
    if "slope_sq" in moments:
        merged["slope_sq"] = next(found)
    return Measured(Stats(elements, **merged), rounding)
