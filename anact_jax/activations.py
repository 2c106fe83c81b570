"""Elementwise activations by name; how far a function is from linear, and how to bring it nearer."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from anact_jax.gaussian import gaussian_stats, under_normal
from anact_jax.tracing import Activation, while_tracing

ACTIVATIONS: dict[str, Activation] = {
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.swish,
    "softplus": jax.nn.softplus,
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
}
"""Elementwise activations by name."""


def nonlinearity(f: Activation) -> Float[Array, ""]:
    """`nu = E[f'(x)^2] / Var[f(x)] - 1` for x ~ N(0, 1): 0 for a linear function; it grows with the curvature of f.

    With the Hermite coefficients c_k of f, `1 + nu = sum_k k c_k^2 / sum_k c_k^2` over k >= 1. It is also rho'/rho, the
    backward over the forward gain of the centered activation, and the slope at 1 of the map from the correlation of two
    inputs to that of their outputs: in a chain of L layers gradients grow by `(1 + nu)^L` where signals are kept, and
    near examples drift apart as fast.

    Args:
        f: any elementwise JAX function.

    Returns:
        A number >= 0; inf for a constant.

    Examples:
        >>> print(*(f"{nonlinearity(f):.3f}" for f in (jax.nn.relu, jax.nn.swish, jnp.tanh, jax.nn.sigmoid)))
        0.467 0.212 0.178 0.034
    """
    stats = gaussian_stats(f)
    return jnp.where(stats.var_out > 0, jnp.maximum(stats.slope_sq / stats.var_out - 1, 0), jnp.inf)


def tempered(f: Activation, limit: float | None) -> Activation:
    """`x -> f(x) + kappa x`, with kappa such that its `nonlinearity` is at most `limit`.

    With e = E[f'], rho = Var[f] and rho' = E[f'^2] for x ~ N(0, 1), by Stein's lemma (Cov[f(x), x] = e),

        kappa = -e + sqrt(e^2 + d),    d = rho' / limit - (1 + 1 / limit) rho

    and 0 where f is within the limit by itself, d <= 0. Where f falls, with `e < -sqrt(rho) / 2` (or `e < -sqrt(d)`,
    which comes first for limits above 0.6), the root is taken with the other sign, so that -f is tempered as f is. At
    that place alone kappa jumps; even functions, whose e is 0 but for rounding, lie far from it.

    To limit what a network of L layers does to near examples, whatever its depth, take `limit = zeta**(1 / L) - 1`;
    Deep Kernel Shaping (Martens et al., arXiv 2110.01765) reaches the same end, with zeta = 1.5, by shifting and
    scaling x and f.

    Args:
        f: any elementwise JAX function. kappa is a constant, computed while tracing; where f closes over traced values
            (a learned slope), it is part of the graph, and differentiated with them.
        limit: largest nonlinearity, > 0; None leaves f as it is.

    Returns:
        An elementwise function. A constant f stays as it is: no kappa would leave anything of it.

    Raises:
        ValueError: limit is not a positive number.

    Examples:
        >>> leaky = tempered(jax.nn.relu, 0.1)
        >>> print(f"{nonlinearity(leaky):.3f} {leaky(-1.0):.3f} {leaky(1.0):.3f}")
        0.100 -0.725 1.725
    """
    if limit is None:
        return f
    check_tempering(limit)
    kappa: Any = while_tracing(_leak, f, limit)
    return Leaky(f, float(kappa) if isinstance(kappa, np.ndarray) else kappa)


def check_tempering(limit: float) -> None:
    """Raises ValueError unless it is a positive number."""
    if not 0 < limit < math.inf:
        raise ValueError(f"tempering must be a positive number, or None to leave the activation as it is, got {limit}")


@dataclasses.dataclass(frozen=True, eq=False)
class Leaky:
    """`x -> f(x) + kappa x`."""

    f: Activation
    kappa: float | Float[Array, ""]

    def __call__(self, x: ArrayLike) -> Array:
        """The activation of x."""
        x = jnp.asarray(x)
        kappa = self.kappa if isinstance(self.kappa, float) else self.kappa.astype(x.dtype)
        return self.f(x) + kappa * x


def _leak(f: Activation, limit: float) -> Float[Array, ""]:
    z, y, slope, expectation = under_normal(f)
    off_mean = y - expectation(y)
    rho, slope_sq, mean_slope = expectation(off_mean**2), expectation(slope**2), expectation(off_mean * z)
    excess = slope_sq / limit - (1 + 1 / limit) * rho
    exceeds = (excess > 0) & (rho > 0)
    falls = (mean_slope < 0) & (mean_slope**2 > jnp.minimum(rho / 4, excess))
    root = jnp.sqrt(jnp.where(exceeds, mean_slope**2 + excess, 1))
    return jnp.where(exceeds, jnp.where(falls, -root, root) - mean_slope, 0)
