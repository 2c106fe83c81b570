"""The paper's rule (ANAct, arXiv 2208.13315): gains of an activation, and the factor that brings both near 1.

Equations as in docs/explanation/method.md, "Derivation". The full text of the paper is not at hand; the learned
correction follows its one public re-implementation (docs/explanation/fidelity.md).
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from anact_jax.statistics import MOMENTS, FactorAndShift, Stats, require
from anact_jax.tracing import Activation


class Gains(NamedTuple):
    """Forward and backward gain of an activation: variance out over variance in; 1 keeps it.

    Attributes:
        forward: `rho = E[(f(x) - shift)^2] / Var[x]`, for signals.
        backward: `rho' = E[f'(x)^2]`, for gradients.
    """

    forward: Float[Array, "*features"]
    backward: Float[Array, "*features"]


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
        >>> import jax
        >>> from anact_jax.gaussian import gaussian_stats
        >>> [round(float(gain), 4) for gain in gains(gaussian_stats(jax.nn.relu))]
        [0.5, 0.5]
    """
    var_in, mean_out, var_out, slope_sq = require(stats, ("var_in", "mean_out", "var_out", "slope_sq"))
    second_moment = var_out + (mean_out - shift) ** 2
    has_variance = var_in > 0
    ratio = second_moment / jnp.where(has_variance, var_in, 1)
    return Gains(jnp.where(has_variance, _bounded(ratio), 1), slope_sq)


@dataclasses.dataclass(frozen=True)
class Published:
    """The paper's rule, one factor a layer, constant under differentiation.

    With c = E[f] if `center` else 0, and the gains at shift c

        rho = (E[(f - c)^2] + epsilon) / (Var[x] + epsilon),    rho' = E[f'^2] + epsilon,
        factor = sqrt((1/rho + 1/rho') / 2) + (0.3 tanh(alpha) if learned),    shift = c

    The rule is the paper's, the correction that of its re-implementation, epsilon this project's.

    Attributes:
        center: subtract the mean of f(x).
        learned: add `0.3 tanh(alpha)` to the factor, with alpha a parameter that starts at 0.
        epsilon: bounds the factor of nearly constant input. At least 0.

    Raises:
        ValueError: epsilon is out of range.

    Examples:
        >>> import jax
        >>> from anact_jax.gaussian import gaussian_stats
        >>> factor, shift = Published().factor_and_shift(gaussian_stats(jax.nn.relu))  # He's gain, sqrt(2)
        >>> round(float(factor), 4), float(shift)
        (1.4142, 0.0)
    """

    center: bool = False
    learned: bool = False
    epsilon: float = 1e-6

    moments: ClassVar[tuple[str, ...]] = MOMENTS
    axis: ClassVar[int | None] = None
    stop_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)

    def activation(self, f: Activation) -> Activation:
        """The function that is normalized: f itself."""
        return f

    def factor_and_shift(self, stats: Stats, alpha: Float[Array, ""] | None = None) -> FactorAndShift:
        """Factor and shift for these statistics, finite for finite ones, in their shape.

        No factor fixes a gain of 0: only the other gain is used, and with both 0 the factor is 1.

        Args:
            stats: with all moments.
            alpha: the parameter of the learned correction; by default 0, where it starts.

        Raises:
            ValueError: a moment is missing, or alpha is given to a form that is not learned.
        """
        if alpha is not None and not self.learned:
            raise ValueError(f"alpha belongs to Published(learned=True), not to {self}")
        _, var_in, mean, var_out, slope_sq = require(stats, self.moments)
        shift = mean if self.center else jnp.zeros_like(mean)
        square, varies, sloped = var_out + (mean - shift) ** 2, var_in > 0, slope_sq > 0
        # 1 / rho and 1 / rho'
        forward = (var_in + self.epsilon) / jnp.where(square > 0, square + self.epsilon, 1)
        forward = jnp.where(varies, _bounded(forward), 1)
        backward = _bounded(1 / jnp.where(sloped, slope_sq + self.epsilon, 1))
        forward = jnp.where(square > 0, forward, backward)
        backward = jnp.where(sloped, backward, forward)
        factor = jnp.sqrt(forward / 2 + backward / 2)
        return FactorAndShift(factor if alpha is None else factor + 0.3 * jnp.tanh(alpha.astype(factor.dtype)), shift)


def check_epsilon(epsilon: float) -> None:
    """Raises ValueError unless it is a number from 0 on."""
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be a number from 0 on, such as 1e-6, got {epsilon}")


def _bounded(value: Array) -> Array:
    return jnp.minimum(value, jnp.finfo(value.dtype).max)
