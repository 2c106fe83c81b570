"""Ways to normalize an activation that were studied beside the library's own: see docs/results.md for what they do."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anact_jax import DEFAULT, Activation, Form, Stats, activation_stats, gaussian_stats, informative, normalization
from anact_jax.export import running_stats
from anact_jax.linen import ANAct
from experiments.models.names import check_name

TRACKINGS = ("batch", "lag", "fixed")
TEMPERINGS = ("leak", "scale", "measured")
BOUNDS = ("none", "step", "range")

STEP = 0.8, 1.2  # times the factor of the running statistics: the published window
RANGE = 0.5, 2.0  # times the factor of a standard normal input
SMALLEST_SCALE = 1 / 64


def normalized(
    fn: Activation,
    *,
    tracking: str = "batch",
    tempering: str = "leak",
    bounds: str = "none",
    form: Form = DEFAULT,
    **options: Any,
) -> Callable[[bool], nn.Module]:
    """Maker of an activation for training or inference, as the library normalizes it or in a way studied beside that.

    Args:
        fn: the activation.
        tracking: the statistics that it is normalized with in training: those of the `"batch"`; with `"lag"` the
            running ones of the steps before; with `"fixed"` those of a standard normal input for ever.
        tempering: what brings fn within `nonlinearity`: a `"leak"`, as `anact_jax.tempered` has it; the `"scale"` of
            its input, by what a standard normal one would need; or that scale `"measured"` as training goes on.
        bounds: of the factor: `"none"`; a `"step"` away from that of the running statistics, within `STEP`; the
            `"range"` around that of a standard normal input, within `RANGE`.
        form: of the normalized activation.
        **options: of `ANAct`.

    Raises:
        ValueError: no such way; a scale without a limit; bounds of a factor that is learned.
    """
    check_name("tracking", tracking, TRACKINGS)
    check_name("tempering", tempering, TEMPERINGS)
    check_name("bounds", bounds, BOUNDS)
    if tempering != "leak" and form.nonlinearity is None:
        raise ValueError(
            f"tempering {tempering!r} needs a limit; give a nonlinearity, such as 0.1, or leave it at 'leak'"
        )
    if bounds != "none" and form.learned:
        raise ValueError(f"bounds {bounds!r} do not go with a learned correction; leave one of them out")

    def act(f: Activation, inference: bool, limit: float | None = None) -> nn.Module:
        layer = ANAct(
            f,
            form=form.replace(nonlinearity=limit),
            use_running_average=inference or tracking != "batch",
            update=not inference and tracking != "fixed",
            **options,
        )
        return layer if bounds == "none" else Bounded(layer, bounds)

    limit = form.nonlinearity
    if limit is None or tempering == "leak":
        return lambda inference: act(fn, inference, limit)
    if tempering == "scale":
        scaled = InputScaled(fn, gaussian_scale(fn, limit))
        return lambda inference: act(scaled, inference)
    return lambda inference: MeasuredScale(functools.partial(act, inference=inference), fn, limit, adapts=not inference)


@dataclasses.dataclass(frozen=True)
class InputScaled:
    """`x -> f(scale x)`; equal where f and the scale are."""

    f: Activation
    scale: float | Float[Array, ""]

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The activation of x."""
        return self.f(jnp.asarray(self.scale, x.dtype) * x)


@functools.cache
def gaussian_scale(f: Activation, limit: float) -> float:
    """The largest scale up to 1 with which `InputScaled(f, scale)` has a nonlinearity of at most `limit`.

    `SMALLEST_SCALE` where none does, as with ReLU, which bends as much at any scale.
    """
    scales = np.geomspace(SMALLEST_SCALE, 1, 4096)
    with jax.ensure_compile_time_eval():
        stats = gaussian_stats(f, std=jnp.asarray(scales))
        within = np.asarray(stats.var_in * stats.slope_sq / stats.var_out <= 1 + limit)
    return float(scales[within].max(initial=SMALLEST_SCALE))


class MeasuredScale(nn.Module):
    """An activation whose input is scaled so that its nonlinearity, measured from the batches, comes to a limit.

    The scale a, one for the layer, starts at `gaussian_scale`. A training batch is normalized with the a of the
    batches before, and moves it to `a (limit / nu)^(1/20)`, within `SMALLEST_SCALE` and 1: for smooth f, nu grows as
    a^2, so that this is a tenth of the way to the scale that the batch asks for. `1 + nu` is `Var[x] E[f'^2]`, summed
    over channels, over the sum of `Var[f]`; nu counts as no less than a quarter of the limit and no more than four
    times that, so that single batches move the scale by 7% at most, up as easily as down.

    Attributes:
        layer: makes the normalized activation of a function.
        fn: the activation.
        limit: of the nonlinearity.
        adapts: whether to learn from this batch.
    """

    layer: Callable[[Activation], nn.Module]
    fn: Activation
    limit: float
    adapts: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """The normalized activation of x."""
        scale = self.variable("batch_stats", "scale", lambda: jnp.asarray(gaussian_scale(self.fn, self.limit)))
        f = InputScaled(self.fn, scale.value)
        y: Array = self.layer(f)(x)
        if self.adapts and not self.is_initializing():
            batch = activation_stats(f, jax.lax.stop_gradient(x), feature_axes=-1)
            bends = jnp.sum(batch.var_in * batch.slope_sq) / jnp.sum(batch.var_out) - 1
            moved = scale.value * (self.limit / jnp.clip(bends, self.limit / 4, 4 * self.limit)) ** 0.05
            scale.value = jnp.where(jnp.isfinite(moved), jnp.clip(moved, SMALLEST_SCALE, 1), scale.value)
        return y


class Bounded(nn.Module):
    """A normalized activation whose factor is held within bounds; what comes to a bound has no gradient.

    Tools that look into `layer` see its factor as it would be without.

    Attributes:
        layer: what to bound, with one factor or one a channel, without a learned correction.
        bounds: `"step"` or `"range"`; see `normalized`.
    """

    layer: ANAct
    bounds: str

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """The layer's output, times the factor as it may be over the factor as it is."""
        layer = self.layer
        if self.is_initializing():
            return layer(x)
        form, before = Form.parse(layer.form), running_stats(layer)
        y: Array = layer(x)
        used = before
        if not layer.use_running_average:
            measured = jax.lax.stop_gradient(x) if form.stop_gradient else x
            batch = activation_stats(layer.activation, measured, feature_axes=form.axes, moments=form.moments)
            used = jax.tree.map(functools.partial(jnp.where, informative(batch)), batch, before)

        def factor(stats: Stats) -> Array:
            return normalization(stats, form).factor

        (least, most), around = (STEP, before) if self.bounds == "step" else (RANGE, gaussian_stats(layer.activation))
        found, middle = factor(used), factor(around)
        return y * (jnp.clip(found, least * middle, most * middle) / found).astype(y.dtype)
