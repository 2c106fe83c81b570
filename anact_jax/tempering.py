"""How far an activation is from linear, and how to bring it nearer."""

import dataclasses
import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from anact_jax.activations import Activation
from anact_jax.gaussian import gaussian_stats


def nonlinearity(f: Activation) -> Float[Array, ""]:
    """`nu = E[f'(x)^2] / Var[f(x)] - 1` for x ~ N(0, 1): 0 for a linear function, more the more f bends.

    With the Hermite coefficients c_k of f, `1 + nu = sum_k k c_k^2 / sum_k c_k^2` over k >= 1. It is
    also rho'/rho, the backward over the forward gain of the centered activation, and the slope at 1
    of the map from the correlation of two inputs to that of their outputs: in a chain of L
    layers gradients grow by `(1 + nu)^L` where signals are kept, and near examples drift apart as fast.

    Args:
        f: any elementwise JAX function.

    Returns:
        A number >= 0; inf for a constant.

    >>> print(*(f"{nonlinearity(f):.3f}" for f in (jax.nn.relu, jax.nn.swish, jnp.tanh, jax.nn.sigmoid)))
    0.467 0.212 0.178 0.034
    """
    stats = gaussian_stats(f)
    return jnp.where(stats.var_out > 0, jnp.maximum(stats.slope_sq / stats.var_out - 1, 0), jnp.inf)


def tempered(f: Activation, limit: float | None) -> Activation:
    """`x -> f(x) + kappa x`, with kappa such that its `nonlinearity` is at most `limit`.

    With e = E[f'], rho = Var[f] and rho' = E[f'^2] for x ~ N(0, 1), by Stein's lemma (Cov[f(x), x] = e),

        kappa = sign(e) (sqrt(e^2 + (rho' / limit - (1 + 1 / limit) rho)) - |e|)

    and 0 where f is within the limit by itself. To limit what a network of L layers does to
    near examples, whatever its depth, take `limit = zeta**(1 / L) - 1`; Deep Kernel Shaping (Martens et
    al., arXiv 2110.01765) reaches the same end, with zeta = 1.5, by shifting and scaling x and f.

    Args:
        f: any elementwise JAX function. kappa is computed once for each f, even under `jit`; if f closes over
            traced values (a learned slope), it is traced with them.
        limit: largest nonlinearity, > 0; None leaves f as it is.

    Returns:
        An elementwise function. A constant f stays as it is: no kappa would leave anything of it.

    Raises:
        ValueError: limit is not a positive number.

    >>> leaky = tempered(jax.nn.relu, 0.1)
    >>> print(f"{nonlinearity(leaky):.3f} {leaky(-1.0):.3f} {leaky(1.0):.3f}")
    0.100 -0.725 1.725
    """
    if limit is None:
        return f
    check_nonlinearity(limit)
    constant = _constant_leak(f, limit, jnp.result_type(float)) if isinstance(f, Hashable) else None
    return Leaky(f, _leak(f, limit) if constant is None else constant)


@dataclasses.dataclass(frozen=True)
class Leaky:
    """`x -> f(x) + kappa x`; equal where f and kappa are, so that it compiles once."""

    f: Activation
    kappa: float | Float[Array, ""]

    def __call__(self, x: ArrayLike) -> Array:
        """The activation of x."""
        x = jnp.asarray(x)
        return self.f(x) + jnp.asarray(self.kappa, x.dtype) * x


def check_nonlinearity(limit: float) -> None:
    """Raises ValueError unless it is a positive number."""
    if not 0 < limit < float("inf"):
        raise ValueError(
            f"nonlinearity must be a positive number, or None to leave the activation as it is, got {limit}"
        )


@functools.lru_cache(maxsize=256)
def _constant_leak(f: Activation, limit: float, dtype: jnp.dtype) -> float | None:
    """The number kappa, computed now even while f is traced under `jit`; None where f depends on traced values."""
    del dtype  # belongs to the key: under x64 kappa has more digits
    with jax.ensure_compile_time_eval():
        kappa = _leak(f, limit)
    return None if isinstance(kappa, jax.core.Tracer) else float(kappa)


def _leak(f: Activation, limit: float) -> Float[Array, ""]:
    rho, slope_sq = gaussian_stats(f)[-2:]
    mean_slope = (gaussian_stats(lambda x: f(x) + x).var_out - rho - 1) / 2  # Var[f + x] = Var[f] + 2 Cov[f, x] + 1
    excess = slope_sq / limit - (1 + 1 / limit) * rho
    kappa = jnp.sqrt(mean_slope**2 + jnp.maximum(excess, 0)) - jnp.abs(mean_slope)
    return jnp.where((excess > 0) & (rho > 0), jnp.where(mean_slope < 0, -kappa, kappa), 0)
