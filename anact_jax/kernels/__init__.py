"""Where the work on whole batches is done: XLA's way, and ways for one kind of machine that were measured to be faster.

Each function says what it computes; which way is taken stands here, in `_for_cpu`, and nowhere else.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from anact_jax.kernels import cpu


def sums(
    terms: Callable[..., Sequence[Array]],
    x: Array,
    mask: Array | None,
    *about: Array,
    feature_axes: tuple[int, ...],
) -> Sequence[Array]:
    """The sum of each term over all axes but the feature axes.

    Args:
        terms: takes x, mask and `about`, all broadcastable to each other, and gives arrays of x's shape. It may be
            called on parts of the batch, whose last axis is x's.
        x: the batch.
        mask: broadcastable to x; None for none.
        *about: arrays of x's shape at the feature axes.
        feature_axes: sorted and not negative.
    """

    def at_once(x: Array, mask: Array | None, *about: Array) -> Sequence[Array]:
        reduced = tuple(axis for axis in range(x.ndim) if axis not in feature_axes)
        found = terms(x, mask, *(jnp.expand_dims(value, reduced) for value in about))
        return [jnp.sum(term, axis=reduced) for term in found]

    if not _for_cpu(x, feature_axes):
        return at_once(x, mask, *about)
    by_parts = partial(cpu.sums, terms, feature_axes=feature_axes)
    found: Sequence[Array] = jax.lax.platform_dependent(x, mask, *about, cpu=by_parts, default=at_once)
    return found


def scaling(x: Array, feature_axes: tuple[int, ...]) -> Callable[..., Array]:
    """The function `(g, constants, x, factor, shift) -> factor * (g(constants, x) - shift)` for such an x.

    It takes factor and shift with x's number of axes.
    """
    return cpu.scaled if _for_cpu(x, feature_axes) else cpu.formula


def at_hand(x: Array) -> bool:
    """Whether all of x that this computation sees is on one device, as far as its type says, with known sizes."""
    mesh = jax.typeof(x).sharding.mesh
    local = mesh.empty or mesh.size == 1 or all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)
    return local and all(isinstance(size, int) for size in x.shape)


def _for_cpu(x: Array, feature_axes: tuple[int, ...]) -> bool:
    """Whether the ways for a CPU may be taken, where the program runs on one.

    They reshape, so that x must be at hand; and they loop, which is compiled anew at each call unless the whole
    computation is compiled.
    """
    compiled = isinstance(jax.lax.full((), 0.0), jax.core.Tracer)
    return at_hand(x) and compiled and cpu.worthwhile(x, feature_axes)
