"""How the cost grows: the compiler's own counts, and what devices exchange.

See `python experiments/benchmarks/scaling.py --help`.
"""

import dataclasses
import math
import sys
from typing import Any

from experiments.cli import table_head, table_row

# isort: split

import jax
import jax.numpy as jnp
import tyro

from anact_jax import DEFAULT
from anact_jax.statistics import FEW_SHARDS
from experiments.benchmarks import operation, training_step
from experiments.benchmarks.measuring import random_images
from experiments.networks.build import make_network

SHAPES = ((32, 256), (64, 256), (128, 256), (64, 512), (64, 1024))
DEPTHS = ("mlp5", "mlp10", "mlp30")
BATCHES = (8, 16, 32)
DEVICES = (1, 8, 256, 4096)


@dataclasses.dataclass(frozen=True)
class Config:
    """Counts operations and bytes in compiled programs, and messages between devices.

    Prints three tables in Markdown. Nothing is run but compilers, and what they compile is for this machine.
    """


def main() -> int:
    """Runs the program and returns its exit status."""
    tyro.cli(Config, description=Config.__doc__)
    cases = (operation.PLAIN, "NSwish", "NSwish, constants", "BatchNorm, swish")
    print(table_head("the activation, forward and backward; flops and bytes an element", *cases))
    for shape in SHAPES:
        counts = (operation.compiled(operation.LAYERS[case], shape, jnp.float32)[0].cost_analysis() for case in cases)
        print(
            table_row(
                f"{shape[0]} examples, {shape[1]} channels", *(_cost(count, math.prod(shape)) for count in counts)
            )
        )

    sides = tuple(training_step.SIDES)
    print("\n" + table_head("training step; flops and bytes, of plain", *sides))
    for model, size in (*((model, 128) for model in DEPTHS), *(("resnet20", size) for size in BATCHES)):
        network = training_step.NETWORKS["mlp30" if model in DEPTHS else model]
        network = network._replace(config=dataclasses.replace(network.config, model=model))
        costs = {side: training_step.compiled(network, side, size).cost for side in sides}
        plain = costs[training_step.PLAIN]
        relative = (
            ", ".join(f"{cost[key] / plain[key]:.2f}" for key in ("flops", "bytes accessed")) for cost in costs.values()
        )
        print(table_row(f"{model}, {size} examples", *relative), flush=True)

    channels, parameters = _resnet50()
    print(
        f"\nResNet-50: {len(channels)} activations of {sum(channels)} channels; gradient {parameters * 4e-6:.0f} MB\n"
    )
    exchanged = ("statistics by `axis_name`", "`pmean` of `batch_stats`", "synchronized BatchNorm instead")
    print(table_head("devices; messages a step and MB", *exchanged))
    for devices in DEVICES:
        print(table_row(str(devices), *(f"{many}, {4e-6 * size:.3g}" for many, size in _messages(channels, devices))))
    return 0


def _messages(channels: list[int], devices: int) -> list[tuple[int, int]]:
    """Collectives a step and numbers in them, forward; gradients of differentiated statistics send as many back."""
    moments, layers, total = len(DEFAULT.moments), len(channels), sum(channels)
    if devices == 1:
        return [(0, 0)] * 3
    few = devices <= FEW_SHARDS
    return [
        (
            layers if few else 2 * layers,
            (total * moments + layers) * devices if few else total * (moments + 2) + layers,
        ),
        (1, (moments + 1) * total),
        (layers, 2 * total),
    ]


def _resnet50() -> tuple[list[int], int]:
    """Channels of each activation, and the number of parameters."""
    network = training_step.NETWORKS["resnet50"]
    config = dataclasses.replace(network.config, activation="nswish", norm="none")
    model = make_network(config, random_images(network.image, 1, network.classes))
    images = jnp.zeros((1, *network.image))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    fields = jax.tree.leaves(variables["batch_stats"])  # of each layer its count and its moments
    channels = [field.size for field in fields[:: 1 + len(DEFAULT.moments)]]
    return channels, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def _cost(counted: Any, elements: int) -> str:
    return f"{counted['flops'] / elements:.1f}, {counted['bytes accessed'] / elements:.0f}"


if __name__ == "__main__":
    sys.exit(main())
