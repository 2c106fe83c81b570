"""`factor * (f(x) - shift)`, differentiated in the way that suits the machine."""

import functools
import math
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from anact_jax.activations import Activation
from anact_jax.statistics import wide_dtype
from anact_jax.tempering import Leaky


def scaled(f: Activation, x: Array, factor: Array, shift: Array) -> Array:
    """The same in x's dtype, evaluated in a wider one; factor and shift have x's number of axes."""
    return (_scaled if always_the_same(f) else _formula)(f, x, factor, shift)


def always_the_same(f: Activation) -> bool:
    """Whether f cannot depend on values that change: it is compiled by JAX, or a function without a closure."""
    if isinstance(f, Leaky):
        return isinstance(f.kappa, float) and always_the_same(f.f)
    if isinstance(f, jax.custom_jvp):
        return always_the_same(f.fun)
    return isinstance(f, jax.stages.Wrapped) or (isinstance(f, types.FunctionType) and f.__closure__ is None)


def _formula(f: Activation, x: Array, factor: Array, shift: Array) -> Array:
    wide = wide_dtype(x.dtype)
    y = f(x.astype(wide)).astype(wide)
    return (jnp.broadcast_to(factor, y.shape) * (y - jnp.broadcast_to(shift, y.shape))).astype(x.dtype)


_scaled = jax.custom_jvp(_formula, nondiff_argnums=(0,))


@functools.partial(_scaled.defjvp, symbolic_zeros=True)
def _scaled_jvp(f: Activation, primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    x, *values = primals
    dx, *dvalues = tangents
    if isinstance(dx, SymbolicZero):
        y, parts = _formula(f, x, *values), []
    else:
        y, along_x = jax.jvp(lambda x: _formula(f, x, *values), (x,), (dx,))
        parts = [along_x]
    if not all(isinstance(d, SymbolicZero) for d in dvalues):
        dvalues = [
            jnp.zeros_like(v) if isinstance(d, SymbolicZero) else d for v, d in zip(values, dvalues, strict=True)
        ]
        parts.append(_along_values(f, x, values, dvalues))
    return _computed_once(x, y), functools.reduce(jnp.add, parts)


def _computed_once(x: Array, y: Array) -> Array:
    """y, but XLA's CPU backend does not compute it again in each transpose that a convolution's gradient makes of it.

    That would take three times as long as to read y. It never repeats a division, so there is one, by a 1 that it
    cannot see.
    """
    once: Array = jax.lax.platform_dependent(
        x, y, cpu=lambda x, y: y / jnp.where(x == x, 1, 2).astype(y.dtype), default=lambda _, y: y
    )
    return once


def _along_values(f: Activation, x: Array, values: Sequence[Array], dvalues: Sequence[Array]) -> Array:
    """The derivative in factor and shift; its transpose are sums over x.

    XLA's CPU backend would write what these have in common with the gradient in x to memory, constants too, which
    takes five times as long as to compute it again: for that, x comes in another shape there, with axes merged.
    """

    def along(x: Array, *arrays: Array) -> Array:
        change: Array = jax.jvp(functools.partial(_formula, f, x), arrays[:2], arrays[2:])[1]
        return change

    def merged(x: Array, *arrays: Array) -> Array:
        own = (axis for axis in range(x.ndim) if any(array.shape[axis] != 1 for array in arrays))
        first_own = min(next(own, x.ndim), x.ndim - 1)
        flat = (a.reshape(math.prod(a.shape[:first_own]), *a.shape[first_own:]) for a in (x, *arrays))
        return along(*flat).reshape(x.shape)

    ways = {"cpu": jax.checkpoint(merged), "default": jax.checkpoint(along)}
    change: Array = jax.lax.platform_dependent(x, *values, *dvalues, **ways)
    return change
