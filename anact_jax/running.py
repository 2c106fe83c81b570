"""Moments over time."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from anact_jax.statistics import MOMENTS, Stats, informative, moments_of, sharded_as


def update_stats(running: Stats, batch: Stats, *, momentum: ArrayLike = 0.9) -> Stats:
    """Updates running statistics with those of a batch.

    `new = momentum * running + (1 - momentum) * batch`, as in `flax.linen.BatchNorm`, once `1 / (1 - momentum)` batches
    were seen. Until then the plain average over the batches seen, so that the first batch replaces the prior and
    nothing has to be debiased.

    Args:
        running: running statistics; `count` is the number of batches taken in so far.
        batch: from `activation_stats`, of the same shape and with the same moments.
        momentum: weight of the past, in [0, 1]; 0 keeps the last batch only, 1 the average of all. It may be traced,
            and have a number for each feature.

    Returns:
        `Stats` in the dtypes of `running`; running statistics in half precision are widened before they are used. A
        degenerate batch (see `anact_jax.informative`) leaves `running` as it was, feature by feature.

    Raises:
        ValueError: momentum outside [0, 1] or of another shape, or batch and running statistics with different moments.

    Examples:
        >>> from anact_jax import activation_stats, gaussian_stats
        >>> prior = gaussian_stats(jax.nn.relu)
        >>> batch = activation_stats(jax.nn.relu, jnp.array([-1.0, 3.0]))
        >>> new = update_stats(prior, batch)
        >>> float(new.mean_in), float(new.count)
        (1.0, 1.0)
    """
    check_momentum(momentum)
    names = [", ".join(moments_of(stats)) or "none" for stats in (running, batch)]
    if names[0] != names[1]:
        raise ValueError(
            f"running statistics have the moments {names[0]}, and the batch has {names[1]}; measure those of "
            "the running ones: activation_stats(..., moments=form.moments)"
        )
    return moved(running, batch, informative(batch), momentum)


def moved(running: Stats, batch: Stats, taken_in: Bool[Array, "*features"], momentum: ArrayLike) -> Stats:
    """`update_stats`, of the features that are to be taken in."""
    if jnp.shape(momentum) not in ((), taken_in.shape):
        raise ValueError(
            f"momentum must be one number, or one for each feature, of shape {taken_in.shape}; got shape "
            f"{jnp.shape(momentum)}"
        )
    running = sharded_as(running, taken_in)
    seen = running.count.astype(batch.count.dtype) + 1
    weight = jnp.maximum(1 - jnp.asarray(momentum, seen.dtype), 1 / seen)

    def step(old: Array, new: Array) -> Array:
        wide = old.astype(new.dtype)
        # old + weight * (new - old) returns `old` exactly for a repeated batch.
        both = jnp.where(seen == 1, new, wide + weight * (new - wide))
        return jnp.where(taken_in, both.astype(old.dtype), old)

    count = jnp.where(taken_in, seen.astype(running.count.dtype), running.count)
    return Stats(count, **{name: step(old, getattr(batch, name)) for name, old in moments_of(running).items()})


def averaged(batches: Iterable[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Statistics of several batches together, each with the same weight.

    Means are averaged; a variance is the average within the batches and the variance between their means, as in one
    large batch. A batch that left a feature at a count of 0 takes no part in that feature.

    Args:
        batches: nested dictionaries, such as `variables["batch_stats"]`, each as one batch left it that began with
            counts of 0. What is no statistics of a normalized activation is taken from the last one.

    Raises:
        ValueError: there are none.

    Examples:
        >>> one = {"act": {"count": jnp.ones(()), "mean_out": jnp.array(1.0), "var_out": jnp.array(2.0)}}
        >>> two = {"act": {"count": jnp.ones(()), "mean_out": jnp.array(3.0), "var_out": jnp.array(4.0)}}
        >>> {name: float(value) for name, value in averaged([one, two])["act"].items()}
        {'count': 2.0, 'mean_out': 2.0, 'var_out': 4.0}
    """

    def visit(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> dict[Any, Any]:
        if not _holds_statistics(new):
            return {
                name: visit(old[name], value) if isinstance(value, Mapping) else value for name, value in new.items()
            }
        measured = (jnp.asarray(new["count"]) > 0).astype(jnp.result_type(old["count"]))
        count = old["count"] + measured
        weight = measured / jnp.maximum(count, 1)
        found = {name: old[name] + weight * (new[name] - old[name]) for name in new if name != "count"}
        for kind in ("in", "out"):
            if f"mean_{kind}" in new:
                between = new[f"mean_{kind}"] - old[f"mean_{kind}"]
                found[f"var_{kind}"] += weight * (1 - weight) * between**2
        return {"count": count, **found}

    total: dict[Any, Any] | None = None
    for batch in batches:
        total = dict(batch) if total is None else visit(total, batch)
    if total is None:
        raise ValueError("statistics are estimated from at least one batch, got none")
    return total


def without_batches(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same nested dictionaries with counts of 0, so that the next batch replaces all statistics."""

    def visit(state: Mapping[Any, Any]) -> dict[Any, Any]:
        found = {name: visit(value) if isinstance(value, Mapping) else value for name, value in state.items()}
        return found | {"count": jnp.zeros_like(state["count"])} if _holds_statistics(state) else found

    return visit(state)


def _holds_statistics(state: Mapping[Any, Any]) -> bool:
    return "count" in state and bool(set(MOMENTS) & set(state))


def restored(saved: Mapping[str, Any], fresh: Mapping[str, Any], *, start_anew: bool = False) -> dict[str, Any]:
    """The saved statistics of a model, for a model that was just made.

    Args:
        saved: nested dictionaries, such as `variables["batch_stats"]` of a Linen model or
            `nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))` of an NNX one, as they were saved.
        fresh: the same of a model that was just made, whose structure is returned.
        start_anew: take layers that were not saved, or were saved with another form, from `fresh`: they count their
            batches from 0, and their first batch replaces the statistics.

    Raises:
        ValueError: a layer is missing or has the moments of another form, and `start_anew` is not set.

    Examples:
        >>> fresh = {"act": {"count": 0.0, "mean_out": 0.2, "var_out": 0.4}}
        >>> restored({"act": {"count": 9.0, "mean_out": 0.3, "var_out": 0.5}}, fresh)
        {'act': {'count': 9.0, 'mean_out': 0.3, 'var_out': 0.5}}
        >>> restored({"act": {"count": 9.0, "mean_out": 0.3, "var_out": 0.5, "slope_sq": 0.6}}, fresh, start_anew=True)
        {'act': {'count': 0.0, 'mean_out': 0.2, 'var_out': 0.4}}
    """

    def visit(saved: Mapping[str, Any], fresh: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        missing = [name for name in fresh if name not in saved]
        surplus = [name for name in MOMENTS if name in saved and name not in fresh] if "count" in fresh else []
        if (missing or surplus) and not start_anew:
            names = ", ".join("/".join((*path, name)) for name in missing or surplus)
            raise ValueError(
                f"the saved statistics have {'no ' if missing else ''}{names}, which the model's form "
                f"{'uses' if missing else 'does not use'}; make the layer with the form it was saved with, or set "
                "start_anew=True, which starts its statistics anew"
            )
        if "count" in fresh and (missing or surplus):
            return dict(fresh)
        return {
            name: visit(saved.get(name, {}), value, (*path, str(name)))
            if isinstance(value, Mapping)
            else saved.get(name, value)
            for name, value in fresh.items()
        }

    return visit(saved, fresh, ())


def check_momentum(momentum: ArrayLike) -> None:
    """Raises ValueError unless momentum is a weight, or one for each feature, where it is known."""
    if not isinstance(momentum, jax.core.Tracer) and not np.all(
        (np.asarray(momentum) >= 0) & (np.asarray(momentum) <= 1)
    ):
        raise ValueError(f"momentum is the weight of the past and must lie in [0, 1], got {momentum}")
