"""Many runs in one program: the one training loop of all studies."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.config import Recipe
from experiments.data import Batch, Dataset, training_batches
from experiments.networks import Layers
from experiments.training.steps import Metrics, Steps, TrainState


def for_ensemble(layers: Layers) -> Layers:
    """The same layers, whose convolutions stay fast where each of several networks has its own kernels."""
    return layers._replace(conv=functools.partial(layers.conv, conv_general_dilated=conv_by_matmul))


def training(
    steps: Steps,
    dataset: Dataset,
    recipe: Recipe,
    seeds: Sequence[int],
    rates: Sequence[float],
    *,
    orders: Sequence[int] | None = None,
) -> Iterator[tuple[TrainState, Metrics]]:
    """Trains several runs at once; after each step gives the state and the metrics, with a leading axis of runs.

    Each run has the numbers that it has alone, to rounding.

    Args:
        steps: from `make_steps`, `together`.
        dataset: what all runs are trained on.
        recipe: of all runs, but for seed and learning rate.
        seeds: of each run.
        rates: learning rate of each run.
        orders: seed of the order of examples of each run, by default its own.
    """
    orders = seeds if orders is None else orders
    state = steps.create(jnp.array(seeds), jnp.array(rates))
    augmentation = recipe.data.augmentation(dataset)
    batches = {
        order: training_batches(
            dataset,
            recipe.training.batch_size,
            seed=order,
            epochs=recipe.training.epochs,
            augmentation=augmentation,
        )
        for order in set(orders)
    }
    for drawn in zip(*batches.values(), strict=True):
        by_order = dict(zip(batches, drawn, strict=True))
        batch = Batch(*map(np.stack, zip(*(by_order[order] for order in orders), strict=True)))
        state, metrics = steps.train(state, batch)
        yield state, metrics


def conv_by_matmul(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels features"],
    strides: Sequence[int],
    padding: Any,
    **unused: Any,
) -> Float[Array, "batch height2 width2 features"]:
    """`jax.lax.conv_general_dilated` for `nn.Conv` with padding "SAME", as one matrix product of shifted images.

    On a CPU several times as fast where channels are few, and the only fast way where `vmap` gives each of
    several networks its own kernel, which XLA takes for a grouped convolution.
    """
    batch, *size, channels = x.shape
    *window, _, features = kernel.shape
    out = [-(-n // stride) for n, stride in zip(size, strides, strict=True)]
    missing = [max((m - 1) * s + w - n, 0) for m, s, w, n in zip(out, strides, window, size, strict=True)]
    x = jnp.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in missing), (0, 0)))
    shifted = [
        x[:, i : i + (out[0] - 1) * strides[0] + 1 : strides[0], j : j + (out[1] - 1) * strides[1] + 1 : strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, math.prod(window) * channels)
    return (patches @ kernel.reshape(-1, features)).reshape(batch, *out, features)
