"""The moments of a batch, over devices too: the only place with a collective."""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from anact_jax.elementwise import Activation, Constants, ExplicitActivation, traced, value_and_slope, wide_dtype
from anact_jax.kernels import at_hand, sums


class Stats(NamedTuple):
    """Population moments of an activation's input x and output f(x).

    Every field has the same shape: `()` for one layer, or that of the feature axes, such as `(C,)`. The dtype is
    float32, or float64 for float64 input. A moment that was not measured, since no form needs it, is None; the types do
    not say so, for those who measure all.

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

_FEW = 8

FEW_SHARDS = 16  # up to which moments are gathered: a table of 16 rows costs less than a second collective

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
    feature_axes: int | Sequence[int] = (),
    mask: Shaped[Array, "..."] | None = None,
    axis_name: Hashable | Sequence[Hashable] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    moments: Sequence[str] = MOMENTS,
) -> Stats:
    """Moments of x, f(x) and f'(x) over a batch, in float32 or wider.

    Two passes: the mean of x first, then sums about it and about f of it, so that an offset of 1e4 costs no accuracy.
    f' comes from forward-mode autodiff. For a gradient only x is kept: f(x) and f'(x) are computed again.

    Args:
        f: any elementwise JAX function; each output may depend on its own input only. It may close over arrays, such as
            a learned slope, and is differentiated in them too.
        x: input of any shape.
        feature_axes: axes that keep statistics of their own; `()` gives one set for the layer, `-1` one for each
            channel of channels-last input.
        mask: broadcastable to x; elements where it is zero or False are left out, whatever they hold.
        axis_name: mapped axis or axes (of `pmap`, `vmap` or `shard_map`) that share the batch. The result is then
            exact over all of them, each shard weighted by its count.
        axis_index_groups: indices along `axis_name` that share a batch, as in `jax.lax.psum`: each index in one group.
            Two groups of four devices: `[[0, 1, 2, 3], [4, 5, 6, 7]]`.
        moments: fields of `Stats` to compute, such as `form.moments`; the others are None.

    Returns:
        `Stats` of shape `()`, or of x's shape at `feature_axes`. No elements: all zeros. A standard deviation that is
        rounding, at most twice the machine epsilon of x's dtype times the mean's size, is 0. Where x, f(x) or f'(x)
        has an element that is NaN or infinite, or squares that sum to 1e30 (one element of 1e15): NaN for the moments
        of that feature, and no gradient through them. `update_stats` leaves such batches out.

    Raises:
        TypeError: x or f(x) is not real floating point, or f has no forward-mode derivative.
        ValueError: f changes the shape, an axis does not exist or comes twice, the mask does not broadcast, `axis_name`
            is not bound here, the groups do not hold each of its indices once, or a moment is unknown.

    Examples:
        >>> stats = activation_stats(jax.nn.relu, jnp.array([-1.0, 0.0, 1.0, 2.0]))
        >>> [round(float(value), 4) for value in stats]
        [4.0, 0.5, 1.25, 0.75, 0.6875, 0.5]
    """
    x = jnp.asarray(x)
    axes = canonical_axes(feature_axes, x.ndim)
    for name in moments:
        if name not in MOMENTS:
            raise ValueError(f"unknown moment {name!r}; expected some of {', '.join(MOMENTS)}")
    mask, shards = broadcast_mask(mask, x), shards_of(axis_name, axis_index_groups)
    g, constants = traced(f, x)
    raw = measure(g, constants, x, axes, mask, shards, tuple(moments))
    sound, varied = judge(raw, x.dtype)
    found = moments_of(raw)
    for kind, varies in varied.items():
        found[f"var_{kind}"] = jnp.where(varies, found[f"var_{kind}"], 0)
    measured = Stats(raw.count, **{name: jnp.where(sound, value, jnp.nan) for name, value in found.items()})
    # Without the checkpoint, f(x) and f'(x) would be kept for the gradient.
    stats: Stats = jax.checkpoint(partial(differentiable, g, axes, shards))(constants, x, mask, measured, sound)
    return stats


def canonical_axes(feature_axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Feature axes as sorted non-negative integers.

    Raises:
        ValueError: an axis does not exist in an array of `ndim` axes, or comes twice.

    Examples:
        >>> canonical_axes((-1, 0), 3)
        (0, 2)
    """
    given = tuple(feature_axes) if isinstance(feature_axes, Sequence) else (feature_axes,)
    if any(not -ndim <= axis < ndim for axis in given):
        raise ValueError(f"feature_axes {given} must lie between {-ndim} and {ndim - 1} for input with {ndim} axes")
    axes = tuple(sorted(int(axis) % ndim for axis in given))
    if len(set(axes)) != len(axes):
        raise ValueError(f"feature_axes {given} name the same axis twice in input with {ndim} axes")
    return axes


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


def measure(
    g: ExplicitActivation,
    constants: Constants,
    x: Array,
    axes: tuple[int, ...],
    mask: Array | None,
    shards: Shards | None,
    moments: tuple[str, ...],
) -> Stats:
    """The moments of the batch as they were summed, without a gradient; `judge` tells what they are worth."""
    f, x = partial(g, jax.lax.stop_gradient(constants)), jax.lax.stop_gradient(x)
    local = _measured(f, x, axes, mask, moments)
    merged = local if shards is None else jax.tree.map(_placed_as, _over_shards(local, shards), local)
    whole = merged._replace(count=jnp.broadcast_to(merged.count, [x.shape[axis] for axis in axes]))
    return sharded_as(whole, getattr(whole, moments[0])) if moments else whole


def sharded_as(stats: Stats, like: Array) -> Stats:
    """The same statistics; on an Explicit mesh, with the features on the same devices as `like`.

    `jnp.where` takes arrays of one sharding only, while a sum takes that of the array which has one.
    """
    sharding = jax.typeof(like).sharding

    def placed(value: Array) -> Array:
        return value if jax.typeof(value).sharding == sharding else value + jnp.zeros_like(like, dtype=value.dtype)

    moved_over: Stats = jax.tree.map(placed, stats)
    return moved_over


def judge(stats: Stats, dtype: DTypeLike) -> tuple[Bool[Array, "*features"], dict[str, Bool[Array, "*features"]]]:
    """Where moments that were measured of input of a dtype are sound, and where x ("in") and f(x) ("out") vary.

    Sound are finite moments whose squares overflow nowhere below. What varies by no more than twice the machine epsilon
    of its mean is constant but for rounding.
    """
    rounding = 2 * float(jnp.finfo(dtype).eps)
    squares = [] if stats.slope_sq is None else [stats.slope_sq]
    varied = {}
    for kind, mean, variance in (("in", stats.mean_in, stats.var_in), ("out", stats.mean_out, stats.var_out)):
        if mean is not None and variance is not None:
            squares.append(variance + mean**2)
            varied[kind] = variance > (rounding * mean) ** 2
    sound = stats.count * sum(squares) < _LARGEST
    return sound, varied


def _measured(f: Activation, x: Array, axes: tuple[int, ...], mask: Array | None, moments: tuple[str, ...]) -> Stats:
    """The moments of this shard; its count has no axes unless the mask differs between features."""
    dtype, reduced = wide_dtype(x.dtype), other_axes(axes, x.ndim)
    count = _count(x, axes, mask).astype(dtype)

    def mean(total: Array) -> Array:
        return total / jnp.maximum(count, 1)

    few = _first_few(x, reduced) if mask is None else None
    if few is None:  # at the price of a pass over x; on a mesh, of a message too
        m = mean(jnp.sum(x, axis=reduced, dtype=dtype, where=mask))
        at_m = jnp.mean(f(jnp.expand_dims(m, reduced)).astype(dtype), axis=reduced)
    else:
        m, at_m = (jnp.mean(v.astype(dtype), axis=reduced) for v in (few, f(few.astype(dtype))))
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
    values: dict[str, Array] = {}
    for kind, about in (("in", m), ("out", at_m)):
        if f"var_{kind}" in moments:
            off, off_sq = next(found), next(found)
            values[f"mean_{kind}"], values[f"var_{kind}"] = about + off, jnp.maximum(0, off_sq - off**2)
    if "slope_sq" in moments:
        values["slope_sq"] = next(found)
    return Stats(count, **values)


def _first_few(x: Array, reduced: tuple[int, ...]) -> Array | None:
    """Elements of each feature, about whose mean the others are summed; None where they are not at hand.

    Sums lose digits only where these are many deviations away from the rest.
    """
    if not (reduced and at_hand(x) and x.size):
        return None
    first, *others = reduced
    few = jax.lax.slice_in_dim(x, 0, min(_FEW, x.shape[first]), axis=first)
    for axis in others:
        few = jax.lax.slice_in_dim(few, 0, 1, axis=axis)
    return few


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


def _over_shards(local: Stats, shards: Shards) -> Stats:
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
    ours: Stats = jax.tree.map(lambda value: value[0], merged)
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


def _merged(total: Callable[[list[Array]], list[Array]], shards: Stats) -> Stats:
    """The moments of all shards together, with `total` for summing over the shards."""
    count, moments = shards.count, moments_of(shards)
    kinds = [kind for kind in ("in", "out") if f"var_{kind}" in moments]
    elements, *sums_of = total([count, *(count * moments[f"mean_{kind}"] for kind in kinds)])
    share = count / jnp.maximum(elements, 1)
    means = {kind: value / jnp.maximum(elements, 1) for kind, value in zip(kinds, sums_of, strict=True)}
    terms = []
    for kind in kinds:
        off = moments[f"mean_{kind}"] - means[kind]
        terms += [share * off, share * (moments[f"var_{kind}"] + off**2)]  # the first: what rounding left in the mean
    if "slope_sq" in moments:
        terms.append(share * moments["slope_sq"])
    found = iter(total(terms))
    merged = {}
    for kind in kinds:
        off, off_sq = next(found), next(found)
        merged[f"mean_{kind}"], merged[f"var_{kind}"] = means[kind], jnp.maximum(0, off_sq - off**2)
    if "slope_sq" in moments:
        merged["slope_sq"] = next(found)
    return Stats(elements, **merged)
