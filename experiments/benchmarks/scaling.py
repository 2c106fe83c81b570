"""What ResNet-50's training step costs on many TPU cores: the compiler's own counts, and what the cores exchange.

See `python experiments/benchmarks/scaling.py --help`.
"""

import dataclasses

from experiments.cli import BAD_SETTINGS, fail, run_program, settings_of, table_head, table_row

# isort: split

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anact_jax import Standardized
from anact_jax.statistics import FEW_SHARDS
from experiments.benchmarks import training_step
from experiments.benchmarks.measuring import random_images
from experiments.config import changed
from experiments.training.build import make_network

DEVICES = (1, 8, 256, 4096)
TOPOLOGY, CORES, EACH = "v5e:2x4", 8, 128  # what is compiled for, and images for each core
PEAK_FLOPS, PEAK_BYTES = 197e12, 819e9  # of a v5e core a second, in bfloat16: cloud.google.com/tpu/docs/v5e


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles ResNet-50's training step for eight TPU v5e, without having one, and counts what is sent between cores.

    In bfloat16, 128 images of 224x224 a core. *At least*: the time that flops and bytes take at the chip's peaks, the
    larger of the two. Prints tables in Markdown. Needs libtpu: pip install libtpu
    """

    sides: tuple[str, ...] = tuple(training_step.SIDES)
    """what is compiled, a minute or two each; none skips it"""


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    unknown = [side for side in config.sides if side not in training_step.SIDES]
    if unknown:
        return fail(f"unknown side {unknown[0]!r}; expected {', '.join(training_step.SIDES)}", BAD_SETTINGS)
    if config.sides:
        try:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
        except (RuntimeError, ImportError) as error:
            reason = str(error).splitlines()[0]
            return fail(f"cannot compile for a TPU ({reason}); pip install libtpu", BAD_SETTINGS)
        over_cores = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
        print(table_head("step on each core", "TFLOP", "GB read and written", "GiB of memory", "at least, ms"))
        for side in config.sides:
            print(table_row(side, *_counted(side, over_cores)), flush=True)
        print()

    channels, parameters = _resnet50()
    print(f"ResNet-50: {len(channels)} activations of {sum(channels)} channels; gradient {parameters * 4e-6:.0f} MB\n")
    exchanged = ("statistics by `axis_name`", "`pmean` of `batch_stats`", "synchronized BatchNorm instead")
    print(table_head("devices; messages a step and MB", *exchanged))
    for count in DEVICES:
        print(table_row(str(count), *(f"{many}, {4e-6 * size:.3g}" for many, size in _messages(channels, count))))
    return 0


def _counted(side: str, sharding: NamedSharding) -> list[str]:
    network = training_step.NETWORKS["resnet50_gpu"]
    recipe = changed(network.recipe, batch_size=CORES * EACH, **training_step.SIDES[side])
    program = training_step.traced(recipe, network.image, network.classes, sharding).lower().compile()
    flops, moved = (program.cost_analysis()[name] for name in ("flops", "bytes accessed"))
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    least = max(flops / PEAK_FLOPS, moved / PEAK_BYTES)
    return [f"{flops / 1e12:.2f}", f"{moved / 1e9:.1f}", f"{needed / 2**30:.2f}", f"{1e3 * least:.1f}"]


def _messages(channels: list[int], devices: int) -> list[tuple[int, int]]:
    """Collectives a step and numbers in them, forward; gradients of differentiated statistics send as many back."""
    moments, layers, total = len(Standardized.moments), len(channels), sum(channels)
    if devices == 1:
        return [(0, 0)] * 3
    few = devices <= FEW_SHARDS
    means = sum(name.startswith("mean") for name in Standardized.moments)
    return [
        (
            layers if few else 2 * layers,
            (total * moments + layers) * devices if few else total * (moments + means) + layers,
        ),
        (1, (moments + 1) * total),
        (layers, 2 * total),
    ]


def _resnet50() -> tuple[list[int], int]:
    """Channels of each activation, and the number of parameters."""
    network = training_step.NETWORKS["resnet50"]
    recipe = changed(network.recipe, activation="nswish", norm="none")
    model = make_network(recipe.network, random_images(network.image, 1, network.classes))
    images = jnp.zeros((1, *network.image))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    fields = jax.tree.leaves(variables["batch_stats"])  # of each layer its count and its moments
    channels = [field.size for field in fields[:: 1 + len(Standardized.moments)]]
    return channels, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


if __name__ == "__main__":
    run_program(main)
