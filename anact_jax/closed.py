"""Normalization in closed form: from what is known of the input instead of a measurement, as behind BatchNorm."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anact_jax.activations import tempered
from anact_jax.elementwise import Activation, traced, value_and_slope, while_tracing, wide_dtype
from anact_jax.factors import Normalization, normalization
from anact_jax.form import PUBLISHED, Form
from anact_jax.gaussian import FINE, Rule, nodes_under_normal, panels, stats_under_normal
from anact_jax.kernels import scaling
from anact_jax.statistics import Stats, canonical_axes, other_axes

BEHIND_BATCH_NORM = PUBLISHED
"""The form of `BatchNormAct`."""

_SHORT = Rule((0.0,), 7.0, *panels(1, 32))
_GOOD = 1e-4  # relative error of a moment under which the short rule is taken
_SMALL = 1e-4  # deviation from which on the derivative of E[f'^2] fades, that rounding would drown
_MOST_KINKS = 8
_SPAN = 40.0  # kinks are looked for between - and + this


def closed_normalization(
    f: Activation,
    mean: Float[Array, "*channels"],
    std: Float[Array, "*channels"],
    form: Form | str,
    *,
    alpha: Float[Array, "*features"] | None = None,
) -> Normalization:
    """Factor and shift of `lambda * (f(x) - c)` for x that is normal with known mean and deviation in each channel.

    The moments of f are expectations under N(mean, std^2), by a quadrature of 32 nodes on either side of 0, or of each
    point where f' jumps; no data are read. lambda and c follow from them as in `normalization`, with f tempered as the
    form says. With `feature_axes=()` all channels share them: x is then a mixture of the channels with equal weights,
    whose variance is `mean(std^2) + var(mean)`, and likewise for f.

    Args:
        f: any elementwise JAX function.
        mean: mean of x in each channel.
        std: its standard deviation there, >= 0, in the same shape.
        form: a `Form` or its text. `"unit"` needs `feature_axes=()`: for each channel it would cancel `std`, and with
            it what BatchNorm's scale has learned.
        alpha: see `normalization`.

    Returns:
        `Normalization` of the channels' shape, or of shape () where they share it; differentiable in `mean`, `std` and
        what f closes over, unless the form has `stop_gradient`, and in `alpha`. It is finite, and continuous in both,
        where std is 0 and where f is constant on all of x.

    Raises:
        ValueError: the form is unknown, or asks for unit variance in each channel; or as `gaussian_stats` raises.
        TypeError: f(x) is not real floating point, or f has no forward-mode derivative.

    Examples:
        >>> gamma, beta = jnp.array([1.0, 0.5]), jnp.array([0.0, 1.0])
        >>> factor, shift = closed_normalization(jax.nn.relu, beta, gamma, "forward+center+feature")
        >>> [round(float(value), 3) for value in (*factor, *shift)]
        [1.713, 1.021, 0.399, 1.004]
    """
    form = Form.parse(form)
    check_closed(form)
    mean, std = jnp.broadcast_arrays(mean, std)
    if form.stop_gradient:  # early: nothing of the derivative is traced
        mean, std = jax.lax.stop_gradient((mean, std))
    stats = _stats(_rule_for(f), tempered(f, form.nonlinearity), mean, std)
    if not form.axes:
        stats = _pooled(stats)
    # Nothing is degenerate: epsilon tells what becomes of a variance of 0, continuously.
    least = jnp.finfo(stats.count.dtype).tiny
    floored = {name: jnp.maximum(getattr(stats, name), least) for name in ("var_in", "var_out", "slope_sq")}
    stats = stats._replace(**floored)
    if form.stop_gradient:  # in what f closes over, too
        stats = jax.lax.stop_gradient(stats)
    return normalization(stats, form, alpha=alpha)


def check_closed(form: Form) -> None:
    """Raises ValueError where a form cannot be had in closed form."""
    if form.reference == "unit" and form.axes:
        raise ValueError(
            f"form {form} gives each channel unit variance, which would cancel the scale that the normalization layer "
            "has learned; leave out unit, or pool the channels by feature_axes=()"
        )


def applied_behind(
    f: Activation,
    x: Float[Array, "*shape"],
    axis: int | Sequence[int],
    form: Form,
    found: Normalization,
) -> Float[Array, "*shape"]:
    """The normalized activation of what BatchNorm gave out, in its shape and dtype.

    Args:
        f: any elementwise JAX function.
        x: BatchNorm's output.
        axis: its feature axes.
        form: see `closed_normalization`.
        found: factor and shift.

    Raises:
        ValueError: the form has other feature axes than BatchNorm.
    """
    axes = canonical_axes(axis, x.ndim)
    if form.axes and canonical_axes(form.axes, x.ndim) != axes:
        raise ValueError(
            f"form {form} has feature_axes {form.axes}, behind a BatchNorm over axis {axis}; give the form the same, "
            "or () for one factor a layer"
        )
    reduced = other_axes(axes, x.ndim) if form.axes else tuple(range(x.ndim))
    wide = wide_dtype(x.dtype)
    factor, shift = (jnp.expand_dims(value.astype(wide), reduced) for value in found)
    g, constants = traced(tempered(f, form.nonlinearity), x)
    y: Array = jax.checkpoint(functools.partial(scaling(x, axes), g))(constants, x, factor, shift)
    return y.astype(x.dtype)


def behind_batch_norm(
    scale: Float[Array, "*channels"] | None,
    bias: Float[Array, "*channels"] | None,
    variance: Float[Array, "*channels"],
    epsilon: float,
) -> tuple[Float[Array, "*channels"], Float[Array, "*channels"]]:
    """Mean and deviation of what BatchNorm gives out, in the variance's dtype.

    Args:
        scale: its gamma; None for 1.
        bias: its beta; None for 0.
        variance: its running variance, which is a constant under differentiation.
        epsilon: its own, which is added to the variance.
    """
    variance = jax.lax.stop_gradient(variance)
    mean = jnp.zeros_like(variance) if bias is None else bias.astype(variance.dtype)
    std = jnp.sqrt(variance / (variance + epsilon))
    return mean, std if scale is None else std * jnp.abs(scale.astype(variance.dtype))


def _pooled(stats: Stats) -> Stats:
    """Of all channels together."""
    pooled = {name: jnp.mean(getattr(stats, name)) for name in ("count", "mean_in", "mean_out", "slope_sq")}
    for kind in ("in", "out"):
        mean, variance = getattr(stats, f"mean_{kind}"), getattr(stats, f"var_{kind}")
        pooled[f"var_{kind}"] = jnp.mean(variance) + jnp.var(mean)
    return Stats(**pooled)


def _stats(rule: Rule, f: Activation, mean: Array, std: Array) -> Stats:
    g, constants = traced(f, mean)
    if constants:  # it is differentiated in these too
        return stats_under_normal(f, mean, std, rule)
    return Stats(jnp.zeros_like(mean), mean, std**2, *_moments_of_f(rule, functools.partial(g, ()), mean, std))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _moments_of_f(rule: Rule, f: Activation, mean: Array, std: Array) -> tuple[Array, Array, Array]:
    """`mean_out`, `var_out` and `slope_sq` of x normal with this mean and deviation."""
    _, off, slope, expectations = _under_normal(rule, f, mean, std)
    return _from_sums(f(mean), *expectations(off, off**2, slope**2))


@_moments_of_f.defjvp
def _moments_of_f_jvp(
    rule: Rule, f: Activation, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    """By expectations over the same nodes: a program with autodiff of the quadrature takes twice as long to compile.

    Its derivative in the mean is `E[g'(x)]`, in the deviation `E[z g'(x)]`; of f'^2, since f' may jump, the density is
    differentiated instead.
    """
    mean, std = primals
    z, off, slope, expectations = _under_normal(rule, f, mean, std)
    off_mean, off_sq, slope_sq, in_mean, in_std, by_off, by_off_z, sq_in_mean, sq_in_std = expectations(
        *(off, off**2, slope**2, slope, slope * z, slope * off, slope * off * z),
        *(slope**2 * z, slope**2 * (z**2 - 1)),
    )

    def change(by_mean: Array, by_std: Array) -> Array:
        return by_mean * tangents[0] + by_std * tangents[1]

    of_var = change(by_off - off_mean * in_mean, by_off_z - off_mean * in_std)
    of_slope_sq = std / (std**2 + _SMALL**2) * change(sq_in_mean, sq_in_std)
    found = _from_sums(f(mean), off_mean, off_sq, slope_sq)
    return found, (change(in_mean, in_std), 2 * of_var, of_slope_sq)


def _from_sums(about: Array, off_mean: Array, off_sq: Array, slope_sq: Array) -> tuple[Array, Array, Array]:
    """`mean_out`, `var_out` and `slope_sq` from expectations of f(x) less `about`, of its square and of f'^2."""
    return about + off_mean, jnp.maximum(0, off_sq - off_mean**2), slope_sq


def _under_normal(
    rule: Rule, f: Activation, mean: Array, std: Array
) -> tuple[Array, Array, Array, Callable[..., list[Array]]]:
    """z, f(x) - f(mean) and f'(x) for x = mean + std z at the nodes, on a last axis; expectations over it."""
    z, weight = nodes_under_normal(rule, mean, std)
    y, slope = value_and_slope(f, mean[..., None] + std[..., None] * z)

    def expectations(*values: Array) -> list[Array]:
        return [jnp.sum(value * weight, axis=-1) for value in values]

    return z, y - f(mean)[..., None], slope, expectations


def _rule_for(f: Activation) -> Rule:
    """The short rule if it is known to be good enough; else the fine one, as where f holds arrays, which may change."""
    return FINE if traced(f, np.zeros((), jnp.result_type(float)))[1] else _known_rule(f)


@functools.lru_cache(maxsize=64)
def _known_rule(f: Activation) -> Rule:
    """Cut at the kinks of f."""
    kinks = while_tracing(_kinks, f)
    if kinks.size > _MOST_KINKS:
        return FINE
    cuts = tuple(sorted({0.0, *map(float, kinks)}))
    return (_SHORT if while_tracing(_is_good, f, *cuts) else FINE)._replace(cuts=cuts)


def _kinks(f: Activation) -> np.ndarray:
    """Where f' jumps, but for 0: between neighbors on a grid, by bisection."""

    def slope(x: np.ndarray) -> np.ndarray:
        slopes: np.ndarray = np.asarray(value_and_slope(f, jnp.asarray(x))[1], np.float64)
        return slopes

    grid = np.linspace(-_SPAN, _SPAN, 8006)  # no round number is on it
    at = slope(grid)
    rise = np.abs(np.diff(at))
    left, right, rise = (values[rise > 1e-3] for values in (grid[:-1], grid[1:], rise))
    if left.size == 0:
        return left
    for _ in range(9):
        middle = (left + right) / 2
        low, mid, high = slope(left), slope(middle), slope(right)
        first = np.abs(mid - low) > np.abs(high - mid)
        left, right = np.where(first, left, middle), np.where(first, middle, right)
    jumps = np.abs(slope(right) - slope(left)) > rise / 2
    kinks = ((left + right) / 2)[jumps]
    away: np.ndarray = kinks[np.abs(kinks) > 1e-4]
    return away


def _is_good(f: Activation, *cuts: float) -> Array:
    """Whether the short rule is as good as the fine one, over means and deviations as BatchNorm learns them."""
    mean, std = (jnp.asarray(values.ravel()) for values in np.meshgrid(np.linspace(-4, 4, 9), [0.1, 0.5, 1, 2, 5]))
    short = _moments_of_f(_SHORT._replace(cuts=cuts), f, mean, std)
    fine = stats_under_normal(f, mean, std, FINE._replace(cuts=cuts))
    sizes = jnp.sqrt(fine.var_out), fine.var_out, fine.slope_sq
    pairs = zip(short, (fine.mean_out, fine.var_out, fine.slope_sq), sizes, strict=True)
    near = [jnp.all(jnp.abs(got - wanted) <= _GOOD * size + 1e-6) for got, wanted, size in pairs]
    return jnp.all(jnp.stack(near))
