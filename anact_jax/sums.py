"""Sums over a batch, in the way that suits the machine."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

_IN_CACHE = 2**17  # elements that a CPU takes at a time


def sums(
    terms: Callable[..., Sequence[Array]],
    x: Array,
    mask: Array | None,
    *about: Array,
    feature_axes: tuple[int, ...],
) -> Array:
    """The sum of each term over all axes but the feature axes, with the terms in front.

    Args:
        terms: takes x, mask and `about`, all broadcastable to each other, and gives arrays of x's shape. It may be
            called on parts of the batch, whose last axis is x's.
        x: the batch.
        mask: broadcastable to x; None for none.
        *about: arrays of x's shape at the feature axes.
        feature_axes: sorted and not negative.
    """
    reduced = tuple(axis for axis in range(x.ndim) if axis not in feature_axes)

    def at_once(x: Array, mask: Array | None, *about: Array) -> Array:
        found = terms(x, mask, *(jnp.expand_dims(value, reduced) for value in about))
        return jnp.stack([jnp.sum(term, axis=reduced) for term in found])

    def by_parts(x: Array, mask: Array | None, *about: Array) -> Array:
        first, last = x.shape[0] if x.ndim > 2 else 1, x.shape[-1]
        middle = x.size // (first * last)
        largest = min(middle, max(1, _IN_CACHE // (first * last)))
        width = next(size for size in range(largest, 0, -1) if middle % size == 0)
        shape = (first, middle // width, width, last)
        mask = None if mask is None else jnp.broadcast_to(mask, x.shape).reshape(shape)
        x, about = x.reshape(shape), tuple(value.reshape(1, 1, -1) for value in about)

        def part(index: Array | int) -> Sequence[Array]:
            def of(array: Array) -> Array:
                return jax.lax.dynamic_index_in_dim(array, index, axis=1, keepdims=False)  # type: ignore[no-any-return]

            return terms(of(x), None if mask is None else of(mask), *about)

        def add(index: Array, found: Sequence[Array]) -> Sequence[Array]:
            return [old + new for old, new in zip(found, part(index), strict=True)]

        found: Array = jnp.stack(jax.lax.fori_loop(1, shape[1], add, part(0)))
        return jnp.sum(found, axis=(1, 2) if feature_axes else (1, 2, 3))

    # XLA's CPU backend would write what the terms share to memory, and each sum read it back: in a large batch that
    # takes five times as long as adding them up part by part. Its other backends compute it again for each sum.
    if x.ndim < 2 or feature_axes not in ((), (x.ndim - 1,)) or x.size <= 4 * _IN_CACHE:
        return at_once(x, mask, *about)
    found: Array = jax.lax.platform_dependent(x, mask, *about, cpu=by_parts, default=at_once)
    return found
