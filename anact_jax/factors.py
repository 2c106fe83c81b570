"""From moments to gains, and from gains to a factor and a shift. Equations as in docs/explanation/method.md."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anact_jax.form import DEFAULT, Form
from anact_jax.statistics import Stats


class Gains(NamedTuple):
    """Forward and backward gain of an activation: variance out over variance in; 1 keeps it.

    Attributes:
        forward: `rho = E[(f(x) - shift)^2] / Var[x]`, for signals.
        backward: `rho' = E[f'(x)^2]`, for gradients.
    """

    forward: Float[Array, "*features"]
    backward: Float[Array, "*features"]


class Normalization(NamedTuple):
    """The two numbers of a normalized activation, `factor * (f(x) - shift)`."""

    factor: Float[Array, "*features"]
    shift: Float[Array, "*features"]


def gains(stats: Stats, *, shift: Float[Array, "*features"] | float = 0.0) -> Gains:
    """Forward and backward gain of `f(x) - shift` (method.md, "Derivation").

    `forward = (Var[f] + (E[f] - shift)^2) / Var[x]` and `backward = E[f'^2]`. A factor lambda multiplies both by
    lambda^2.

    Args:
        stats: from `activation_stats`, `gaussian_stats` or `update_stats`, with all moments.
        shift: what is subtracted from f(x); a scalar or an array of the statistics' shape.

    Returns:
        `Gains` of the statistics' shape. Input without variance has nothing to keep: forward gain 1.

    Raises:
        ValueError: a moment is missing.

    Examples:
        >>> from anact_jax.gaussian import gaussian_stats
        >>> import jax
        >>> [round(float(gain), 4) for gain in gains(gaussian_stats(jax.nn.relu))]
        [0.5, 0.5]
    """
    var_in, mean_out, var_out, slope_sq = _moments(
        stats, ("var_in", "mean_out", "var_out", "slope_sq"), "gains take; measure them on a batch by activation_stats"
    )
    second_moment = var_out + (mean_out - shift) ** 2
    has_variance = var_in > 0
    ratio = second_moment / jnp.where(has_variance, var_in, 1)
    return Gains(jnp.where(has_variance, _bounded(ratio), 1), slope_sq)


def normalization(
    stats: Stats, form: Form | str = DEFAULT, *, alpha: Float[Array, "*features"] | None = None
) -> Normalization:
    """Factor lambda and shift c of the normalized activation `lambda * (f(x) - c)`.

    With c = E[f] if `form.center` else 0, epsilon = `form.epsilon`, and the gains at shift c

        rho = (E[(f - c)^2] + epsilon) / (Var[x] + epsilon),    rho' = E[f'^2] + epsilon:

    ============ ========================== =========================================
    form.rule    lambda^2                   keeps
    ============ ========================== =========================================
    `mean`       (1/rho + 1/rho') / 2       the published rule (arXiv 2208.13315)
    `forward`    1/rho                      signals
    `backward`   1/rho'                     gradients
    `geometric`  1/sqrt(rho rho')           the product of both gains
    `harmonic`   2/(rho + rho')             the mean of both gains
    `exact`      1/rho'                     both: c is chosen so that rho = rho'
    ============ ========================== =========================================

    With `form.reference="unit"` lambda^2 is divided by `Var[x] + epsilon`, which gives the output the variance that it
    would have for standardized input; `forward` then is `1 / (E[(f - c)^2] + epsilon)`, as in BatchNorm. In the end
    `form.level` multiplies lambda.

    `exact` takes `c = mu -+ sqrt(rho' Var[x] - Var[f])` with mu = E[f], on the side nearer 0, and so ignores `center`.
    For Gaussian input the root is real (Gaussian Poincare inequality); where a batch breaks it, c = mu. All rules but
    `mean` are this project's additions, `reference="unit"`, level and epsilon too.

    Args:
        stats: from `activation_stats`, `gaussian_stats` or `update_stats`, with at least `form.moments`.
        form: a `Form` or its text; see `Form.parse`.
        alpha: the parameter of a learned form, which adds `0.3 tanh(alpha)` to lambda; by default 0, where it starts.
            `form.level` multiplies the sum.

    Returns:
        `Normalization` of the statistics' shape, finite for finite statistics. No factor fixes a gain of 0: only the
        other gain is used, and with both 0 the factor is 1.

    Raises:
        ValueError: a moment that the form uses is missing, the form is unknown, or alpha is given for a form that has
            none.

    Examples:
        >>> from anact_jax.gaussian import gaussian_stats
        >>> import jax
        >>> factor, shift = normalization(gaussian_stats(jax.nn.relu), "published")  # He's gain, sqrt(2)
        >>> round(float(factor), 4), float(shift)
        (1.4142, 0.0)
    """
    form = Form.parse(form)
    if alpha is not None and not form.learned:
        raise ValueError(f"alpha belongs to a learned form, and {form} is none: form.replace(learned=True)")
    present = dict(zip(form.moments, _moments(stats, form.moments, f"form {form} uses"), strict=True))
    mu, var_out = present["mean_out"], present["var_out"]
    # What a form does not use takes no part in its lambda, or cancels: 1.
    var_in, slope_sq = (present.get(name, jnp.ones_like(mu)) for name in ("var_in", "slope_sq"))
    epsilon = {name: form.epsilon if name in present else 0.0 for name in ("var_in", "slope_sq")}

    if form.rule == "exact":
        target = slope_sq * var_in
        # Below 1e-6 of its terms the difference is rounding, whose root would be noise.
        root = _safe_sqrt(target - var_out, above=1e-6 * target)
        shift = jnp.where(mu < 0, mu + root, mu - root)
    else:
        shift = mu if form.center else jnp.zeros_like(mu)

    square, varies, sloped = var_out + (mu - shift) ** 2, var_in > 0, slope_sq > 0
    input_square = jnp.where(varies, var_in + epsilon["var_in"], 1)
    # 1 / rho and 1 / rho'
    forward = input_square * _inverse(jnp.where(square > 0, square + form.epsilon, 1))
    forward = jnp.where(varies, _bounded(forward), 1)
    backward = _inverse(jnp.where(sloped, slope_sq + epsilon["slope_sq"], 1))
    forward = jnp.where(square > 0, forward, backward)
    backward = jnp.where(sloped, backward, forward)
    match form.rule:
        case "mean":
            squared = forward / 2 + backward / 2
        case "forward":
            squared = forward
        case "backward" | "exact":
            squared = backward
        case "geometric":
            squared = jnp.sqrt(forward) * jnp.sqrt(backward)
        case "harmonic":
            squared = _inverse(_inverse(forward) / 2 + _inverse(backward) / 2)
    if form.reference == "unit":
        squared = _bounded(squared * _inverse(input_square))
    factor = jnp.sqrt(squared)
    if alpha is not None:
        factor = factor + correction(alpha.astype(factor.dtype))
    return Normalization(factor if form.level == 1 else form.level * factor, shift)


def correction(alpha: Float[Array, "*features"]) -> Float[Array, "*features"]:
    """What a learned form adds to the factor, `0.3 * tanh(alpha)`, as the public re-implementation of the paper does.

    Examples:
        >>> float(correction(jnp.float32(0.0)))
        0.0
    """
    return 0.3 * jnp.tanh(alpha)


@jax.custom_jvp
def _inverse(value: Array) -> Array:
    """1 / value. Its derivative takes no division of its own: XLA's CPU backend compiles a kernel for each."""
    return _bounded(1 / value)


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = _inverse(*primals)
    return inverse, -(inverse**2) * tangents[0]


def _bounded(value: Array) -> Array:
    return jnp.minimum(value, jnp.finfo(value.dtype).max)


def _moments(stats: Stats, names: tuple[str, ...], why: str) -> list[Array]:
    """These moments; ValueError where one is missing."""
    missing = [name for name in names if getattr(stats, name) is None]
    if missing:
        raise ValueError(f"the statistics have no {', '.join(missing)}, which {why}")
    return [getattr(stats, name) for name in names]


def _safe_sqrt(value: Array, above: Array) -> Array:
    """Square root of what exceeds `above`, else 0 with gradient 0."""
    positive = value > above
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, value, 1)), 0)
