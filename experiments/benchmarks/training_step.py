"""Whole training steps of networks that differ in their activation and normalization layers alone."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks.measuring import BATCH_NORM, PLAIN, random_images
from experiments.config import Experiment
from experiments.data import Batch
from experiments.networks.build import make_network
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
        config: with model and batch size.
        image: shape of an image.
        classes: number of classes.
    """

    config: Experiment
    image: tuple[int, int, int]
    classes: int

    def __str__(self) -> str:
        height, width, _ = self.image
        dtype = "" if self.config.dtype == "float32" else f", {self.config.dtype}"
        return f"{self.config.model}, {self.config.batch_size} images of {height}x{width}{dtype}"


NETWORKS: Mapping[str, Network] = {
    "mlp30": Network(Experiment(model="mlp30", batch_size=128), (28, 28, 1), 10),
    "resnet20": Network(Experiment(model="resnet20", batch_size=128), (32, 32, 3), 10),
    "resnet50": Network(Experiment(model="resnet50", batch_size=8, stem="imagenet"), (224, 224, 3), 1000),
    "mlp100": Network(Experiment(model="mlp100", batch_size=128), (28, 28, 1), 10),
    "resnet50_gpu": Network(
        Experiment(model="resnet50", batch_size=128, stem="imagenet", dtype="bfloat16"), (224, 224, 3), 1000
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
    size = batch_size or network.config.batch_size
    config = dataclasses.replace(network.config, batch_size=size, **SIDES[side])
    dataset = random_images(network.image, size, network.classes)
    steps = make_steps(make_network(config, dataset), config, dataset)
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
    config: Experiment, image: tuple[int, int, int], classes: int, sharding: NamedSharding | None = None
) -> jax.stages.Traced:
    """The training step of a configuration, traced for arrays that are nowhere, with the batch sharded so."""
    size = config.batch_size
    dataset = random_images(image, size, classes)
    steps = make_steps(make_network(config, dataset), config, dataset)
    state = jax.eval_shape(steps.create, 0, config.learning_rate)
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
