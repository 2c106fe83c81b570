"""Whole training steps of networks that differ in their activation and normalization layers alone."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks.measuring import BATCH_NORM, PLAIN, random_images
from experiments.config import Recipe, changed
from experiments.data import Batch
from experiments.training.build import make_network
from experiments.training.steps import make_steps

SIDES: Mapping[str, dict[str, Any]] = {
    PLAIN: {"activation": "swish", "norm": "none"},
    "NSwish": {"activation": "nswish", "norm": "none"},
    "NSwish, constants": {"activation": "nswish", "norm": "none", "stop_gradient": True},
    BATCH_NORM: {"activation": "swish", "norm": "batch"},
    "BatchNorm, NSwish": {"activation": "nswish", "norm": "batch"},
}


class Network(NamedTuple):
    """What is trained.

    Attributes:
        recipe: with model and batch size.
        image: shape of an image.
        classes: number of classes.
    """

    recipe: Recipe
    image: tuple[int, int, int]
    classes: int

    def __str__(self) -> str:
        height, width, _ = self.image
        network, dtype = self.recipe.network, self.recipe.network.parts.dtype
        shown = "" if dtype == "float32" else f", {dtype}"
        return f"{network.model}, {self.recipe.training.batch_size} images of {height}x{width}{shown}"


NETWORKS: Mapping[str, Network] = {
    "mlp30": Network(changed(Recipe(), model="mlp30", batch_size=128), (28, 28, 1), 10),
    "resnet20": Network(changed(Recipe(), model="resnet20", batch_size=128), (32, 32, 3), 10),
    "resnet50": Network(changed(Recipe(), model="resnet50", batch_size=8, stem="imagenet"), (224, 224, 3), 1000),
    "mlp100": Network(changed(Recipe(), model="mlp100", batch_size=128), (28, 28, 1), 10),
    "resnet50_gpu": Network(
        changed(Recipe(), model="resnet50", batch_size=128, stem="imagenet", dtype="bfloat16"), (224, 224, 3), 1000
    ),
}


class Program(NamedTuple):
    """A compiled training step.

    Attributes:
        call: takes a step from where the last one ended.
        trace: seconds to trace and lower it.
        compile: seconds to compile it.
        temporary_bytes: memory that it needs beside its arguments and results.
        cost: the compiler's own count of `flops` and `bytes accessed`.
    """

    call: Callable[[], Any]
    trace: float
    compile: float
    temporary_bytes: int
    cost: dict[str, float]


def compiled(network: Network, side: str, batch_size: int | None = None) -> Program:
    """The training step of a network with the activation and the normalization layers of a side."""
    size = batch_size or network.recipe.training.batch_size
    recipe = changed(network.recipe, batch_size=size, **SIDES[side])
    dataset = random_images(network.image, size, network.classes)
    steps = make_steps(make_network(recipe.network, dataset), recipe.training, dataset)
    state = steps.create(0, 1e-3)
    images = np.random.default_rng(0).standard_normal((size, *network.image), np.float32)
    batch = jax.device_put(Batch(images, np.zeros(size, np.int32), np.ones(size, bool)))
    jax.clear_caches()
    start = time.perf_counter()
    lowered = steps.train.lower(state, batch)  # type: ignore[attr-defined]  # a jitted function
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    memory, cost = program.memory_analysis(), program.cost_analysis()

    def call() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    return Program(call, middle - start, end - middle, memory.temp_size_in_bytes, cost)


def traced(
    recipe: Recipe, image: tuple[int, int, int], classes: int, sharding: NamedSharding | None = None
) -> jax.stages.Traced:
    """The training step of a configuration, traced for arrays that are nowhere, with the batch sharded so."""
    size = recipe.training.batch_size
    dataset = random_images(image, size, classes)
    steps = make_steps(make_network(recipe.network, dataset), recipe.training, dataset)
    state = jax.eval_shape(steps.create, 0, recipe.learning_rate)
    kinds: Any = [((size, *image), np.float32), ((size,), np.int32), ((size,), bool)]
    batch = Batch(*(jax.ShapeDtypeStruct(*kind) for kind in kinds))  # type: ignore[arg-type]
    if sharding is not None:
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        state, batch = (
            jax.tree.map(lambda leaf, s=s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree)
            for tree, s in ((state, everywhere), (batch, sharding))
        )
    found: jax.stages.Traced = steps.train.trace(state, batch)  # type: ignore[attr-defined]  # a jitted function
    return found
