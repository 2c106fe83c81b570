"""Statistics over time."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from anact_jax.statistics import Stats


def update_stats(running: Stats, batch: Stats, *, momentum: float = 0.9) -> Stats:
    """Takes a batch's statistics into the running ones.

    `new = momentum * running + (1 - momentum) * batch`, as in `flax.linen.BatchNorm`, once
    `1 / (1 - momentum)` batches were seen. Until then the plain average over the batches seen, so
    that the first batch replaces the prior and nothing has to be debiased.

    Args:
        running: running statistics; `count` is the number of batches taken in so far.
        batch: from `activation_stats`, of the same shape.
        momentum: weight of the past, in [0, 1]; 0 keeps the last batch only, 1 the average of all.

    Returns:
        `Stats` in the dtypes of `running`. A batch that tells nothing (see `informative`) leaves
        `running` as it was, feature by feature.

    Raises:
        ValueError: momentum outside [0, 1].

    >>> from anact_jax import activation_stats, gaussian_stats
    >>> import jax
    >>> prior = gaussian_stats(jax.nn.relu)
    >>> batch = activation_stats(jax.nn.relu, jnp.array([-1.0, 3.0]))
    >>> new = update_stats(prior, batch)
    >>> float(new.mean_in), float(new.count)
    (1.0, 1.0)
    """
    check_momentum(momentum)
    seen = running.count + 1
    weight = jnp.maximum(1 - momentum, 1 / seen)
    taken_in = informative(batch)

    def step(old: Array, new: Array) -> Array:
        # old + weight * (new - old) returns `old` exactly for a repeated batch.
        new = new.astype(old.dtype)
        moved = jnp.where(running.count == 0, new, old + weight * (new - old))
        return jnp.where(taken_in, moved, old)

    moments = (step(old, new) for old, new in zip(running[1:], batch[1:], strict=True))
    return Stats(jnp.where(taken_in, seen, running.count), *moments)


def informative(batch: Stats) -> Bool[Array, "*features"]:
    """Where a batch tells something about gains.

    False where it is empty, not finite, or without variance in x or f(x) (constant input, a dead ReLU).
    """
    finite = jnp.all(jnp.isfinite(jnp.stack(batch)), axis=0)
    return finite & (batch.count > 0) & (batch.var_in > 0) & (batch.var_out > 0)


def check_momentum(momentum: float) -> None:
    """Raises ValueError unless momentum is a weight."""
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is the weight of the past and must lie in [0, 1], got {momentum}")
