"""From statistics to gains, and from gains to a factor and a shift. Equations as in docs/method.md."""

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from anact_jax.statistics import Stats

Rule: TypeAlias = Literal["mean", "forward", "backward", "geometric", "harmonic", "exact"]
Reference: TypeAlias = Literal["input", "unit"]
RULES: tuple[Rule, ...] = get_args(Rule)
REFERENCES: tuple[Reference, ...] = get_args(Reference)


class Gains(NamedTuple):
    """What an activation does to the variance that passes through it; 1 keeps it.

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

    `forward = (Var[f] + (E[f] - shift)^2) / Var[x]` and `backward = E[f'^2]`. A factor lambda
    multiplies both by lambda^2.

    Args:
        stats: from `activation_stats`, `gaussian_stats` or `update_stats`.
        shift: what is subtracted from f(x); a scalar or an array of the statistics' shape.

    Returns:
        `Gains` of the statistics' shape. Input without variance has nothing to keep: forward gain 1.

    >>> from anact_jax.gaussian import gaussian_stats
    >>> import jax
    >>> [round(float(gain), 4) for gain in gains(gaussian_stats(jax.nn.relu))]
    [0.5, 0.5]
    """
    second_moment = stats.var_out + (stats.mean_out - shift) ** 2
    has_variance = stats.var_in > 0
    ratio = second_moment / jnp.where(has_variance, stats.var_in, 1)
    largest = jnp.finfo(ratio.dtype).max
    return Gains(jnp.where(has_variance, jnp.minimum(ratio, largest), 1), stats.slope_sq)


def normalization(
    stats: Stats, *, rule: Rule = "mean", center: bool = False, reference: Reference = "input"
) -> Normalization:
    """Factor lambda and shift c of the normalized activation `lambda * (f(x) - c)`.

    With rho, rho' the `gains` at shift c, and c = E[f] if `center` else 0:

    ============ ========================== =========================================
    rule         lambda^2                   keeps
    ============ ========================== =========================================
    `mean`       (1/rho + 1/rho') / 2       the published rule (arXiv 2208.13315)
    `forward`    1/rho                      signals
    `backward`   1/rho'                     gradients
    `geometric`  1/sqrt(rho rho')           the product of both gains
    `harmonic`   2/(rho + rho')             the mean of both gains
    `exact`      1/rho'                     both: c is chosen so that rho = rho'
    ============ ========================== =========================================

    `exact` takes `c = mu -+ sqrt(rho' Var[x] - Var[f])` with mu = E[f], on the side nearer 0, and so
    ignores `center`. For Gaussian input the root is real (Gaussian Poincare inequality); where a
    batch breaks it, c = mu. All rules but `mean` are this project's additions, `reference="unit"` too.

    Args:
        stats: from `activation_stats`, `gaussian_stats` or `update_stats`.
        rule: one of `RULES`.
        center: subtract E[f].
        reference: `"input"` keeps the input's variance, whatever it is; `"unit"` also divides the
            factor by sqrt(Var[x]), which gives the output the variance that it would have for
            standardized input.

    Returns:
        `Normalization` of the statistics' shape, finite for finite statistics. A gain of 0 cannot
        be mended by a factor, so the other one decides alone; with both 0 the factor is 1.

    Raises:
        ValueError: unknown `rule` or `reference`.

    >>> from anact_jax.gaussian import gaussian_stats
    >>> import jax
    >>> factor, shift = normalization(gaussian_stats(jax.nn.relu))  # He's gain, sqrt(2)
    >>> round(float(factor), 4), float(shift)
    (1.4142, 0.0)
    """
    check_options(rule, reference)
    mu, zero = stats.mean_out, jnp.zeros_like(stats.mean_out)
    if rule == "exact":
        target = stats.slope_sq * stats.var_in
        # Below 1e-6 of its terms the difference is rounding, whose root would be noise.
        root = _safe_sqrt(target - stats.var_out, above=1e-6 * target)
        shift = jnp.where(mu < 0, mu + root, mu - root)
    else:
        shift = mu if center else zero
    rho, slope = gains(stats, shift=shift)

    forward = jnp.where(rho > 0, rho, jnp.where(slope > 0, slope, 1))
    backward = jnp.where(slope > 0, slope, forward)
    match rule:
        case "mean":
            squared = (1 / forward + 1 / backward) / 2
        case "forward":
            squared = 1 / forward
        case "backward" | "exact":
            squared = 1 / backward
        case "geometric":
            squared = 1 / (jnp.sqrt(forward) * jnp.sqrt(backward))
        case "harmonic":
            squared = 2 / (forward + backward)
    factor = _safe_sqrt(squared)
    if reference == "unit":
        factor = factor / jnp.where(stats.var_in > 0, _safe_sqrt(stats.var_in), 1)
    return Normalization(factor, shift)


def correction(alpha: Float[Array, "*features"]) -> Float[Array, "*features"]:
    """The published learned correction of the factor, `0.3 * tanh(alpha)`, for `learnable=True`.

    >>> float(correction(jnp.float32(0.0)))
    0.0
    """
    return 0.3 * jnp.tanh(alpha)


def check_options(rule: str, reference: str) -> None:
    """Raises ValueError unless both are known names."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(RULES)}")
    if reference not in REFERENCES:
        raise ValueError(f"unknown reference {reference!r}; expected one of {', '.join(REFERENCES)}")


def _safe_sqrt(value: Array, above: Array | float = 0.0) -> Array:
    """Square root of what exceeds `above`, else 0 with gradient 0."""
    positive = value > above
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, value, 1)), 0)
