"""Ways that suit XLA's CPU backend, which writes to memory what several results share, and reads it back for each."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anact_jax.tracing import Constants, ExplicitActivation

_IN_CACHE = 2**17  # elements that a CPU takes at a time


def worthwhile(x: Array, feature_axes: tuple[int, ...]) -> bool:
    """Whether the functions here serve such a batch, and are faster than XLA's way: it is larger than the cache."""
    return x.ndim >= 2 and feature_axes in ((), (x.ndim - 1,)) and x.size >= 4 * _IN_CACHE


def sums(
    terms: Callable[..., Sequence[Array]],
    x: Array,
    mask: Array | None,
    *about: Array,
    feature_axes: tuple[int, ...],
) -> Sequence[Array]:
    """`anact_jax.kernels.sums`, part by part of the batch: each part is read once."""
    first, last = x.shape[0] if x.ndim > 2 else 1, x.shape[-1]
    middle = x.size // (first * last)
    width = _width(middle, max(1, _IN_CACHE // (first * last)))
    parts, rest = divmod(middle, width)
    shape = (first, middle, last)
    mask = None if mask is None else jnp.broadcast_to(mask, x.shape).reshape(shape)
    x, about = x.reshape(shape), tuple(value.reshape(1, 1, -1) for value in about)

    def part(start: Array | int, width: int) -> Sequence[Array]:
        def of(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, width, axis=1)  # type: ignore[no-any-return,unused-ignore]

        return terms(of(x), None if mask is None else of(mask), *about)

    def add(index: Array, found: Sequence[Array]) -> Sequence[Array]:
        return [old + new for old, new in zip(found, part(index * width, width), strict=True)]

    def total(term: Array) -> Array:
        return jnp.sum(term, axis=(0, 1) if feature_axes else None)

    like = jax.eval_shape(lambda: part(0, width))
    # Zeros that differ between devices as x does, as far as `shard_map` can tell.
    none = jnp.where(x[0, 0, 0] == 0, 0, 0)
    start = [jnp.broadcast_to(none.astype(term.dtype), term.shape) for term in like]
    found = [total(term) for term in jax.lax.fori_loop(0, parts, add, start)]
    if rest:
        found = [whole + total(term) for whole, term in zip(found, part(parts * width, rest), strict=True)]
    return found


def formula(g: ExplicitActivation, constants: Constants, x: Array, factor: Array, shift: Array) -> Array:
    """What `anact_jax.kernels.scaling` promises, as it is written."""
    return factor * (g(constants, x) - shift)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def scaled(g: ExplicitActivation, constants: Constants, x: Array, factor: Array, shift: Array) -> Array:
    """`formula`, whose derivatives suit a CPU."""
    return formula(g, constants, x, factor, shift)


@scaled.defjvp
def _scaled_jvp(g: ExplicitActivation, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    """The derivative in factor and shift, whose transpose are sums over x, is taken of x in another shape.

    It then shares nothing of x's size with the derivative in x.
    """
    constants, x, *numbers = primals
    along_x = jax.jvp(lambda *free: formula(g, *free, *numbers), (constants, x), tangents[:2])[1]

    def along_numbers(x: Array, *arrays: Array) -> Array:
        own = (axis for axis in range(x.ndim) if any(array.shape[axis] != 1 for array in arrays))
        first_own = min(next(own, x.ndim), x.ndim - 1)
        if first_own == 1 and x.shape[0] > 2 and _divisor(x.shape[0], 64) == 1:  # one row less is an even number
            return jnp.concatenate([along_numbers(part, *arrays) for part in (x[:-1], x[-1:])])
        merged, *flat = (a.reshape(_other_shape(a.shape, first_own, x.shape)) for a in (x, *arrays))
        change: Array = jax.jvp(functools.partial(formula, g, constants, merged), tuple(flat[:2]), tuple(flat[2:]))[1]
        return change.reshape(x.shape)

    def at_once(x: Array, *arrays: Array) -> Array:
        change: Array = jax.jvp(functools.partial(formula, g, constants, x), arrays[:2], arrays[2:])[1]
        return change

    ways = {"cpu": along_numbers, "default": at_once}
    return _computed_once(scaled(g, *primals)), along_x + jax.lax.platform_dependent(x, *numbers, *tangents[2:], **ways)


def _other_shape(shape: tuple[int, ...], shared: int, batch: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, for an array that goes with a batch, with its `shared` first axes as one, or one axis as two."""
    if shared > 1:
        return (math.prod(shape[:shared]), *shape[shared:])
    parts = _divisor(batch[0], 64)
    return (parts, shape[0] // parts, *shape[1:]) if shape[0] == batch[0] else (1, *shape)


def _divisor(size: int, at_most: int) -> int:
    """The largest divisor of a size up to a limit."""
    return next(part for part in range(min(size, at_most), 0, -1) if size % part == 0)


def _width(size: int, at_most: int) -> int:
    """Of equal parts of a size, if they are not much smaller than the limit; else the limit, which leaves a rest."""
    equal = _divisor(size, at_most)
    return equal if 2 * equal > at_most or equal == size else at_most


def _computed_once(y: Array) -> Array:
    """y, which the gradient of a convolution behind it would compute anew for each transpose that it takes of y.

    XLA never computes a division by an array twice, so there is one, by a 1 that it cannot see.
    """
    ways = {"cpu": lambda y: y / jnp.where(y == y, 1, 2).astype(y.dtype), "default": lambda y: y}
    once: Array = jax.lax.platform_dependent(y, **ways)
    return once
