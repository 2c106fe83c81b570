"""Recipes on the machines that they are for: their steps lower for a GPU and compile for a TPU, without having one."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.data import Batch, Dataset
from experiments.data.sets import Arrays
from experiments.networks.build import make_network
from experiments.recipes import RECIPES
from experiments.training.steps import make_steps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

SHAPES = {"digits": (8, 8, 1), "fashion_mnist": (14, 14, 1), "cifar100": (32, 32, 3), "tiny_imagenet": (64, 64, 3)}


def traced_step(name, sharding=None):
    """The training step of a recipe in bfloat16, at its full shapes, traced for arrays that are nowhere."""
    config = dataclasses.replace(RECIPES[name].config, dtype="bfloat16")
    shape, classes = SHAPES[config.dataset], {"cifar100": 100, "tiny_imagenet": 200}.get(config.dataset, 10)
    examples = Arrays(np.zeros((config.batch_size, *shape), np.uint8), np.zeros(config.batch_size, np.int32))
    channels = np.full(shape[-1], 128.0)
    dataset = Dataset(examples, examples, classes, channels, channels / 2, pad=4, flip=True)
    steps = make_steps(make_network(config, dataset), config, dataset)
    state = jax.eval_shape(steps.create, 0, config.learning_rate)
    size = config.batch_size
    batch = Batch(
        jax.ShapeDtypeStruct((size, *shape), np.float32),
        jax.ShapeDtypeStruct((size,), np.int32),
        jax.ShapeDtypeStruct((size,), bool),
    )
    if sharding is not None:
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        state, batch = (
            jax.tree.map(lambda leaf, s=s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree)
            for tree, s in ((state, everywhere), (batch, sharding))
        )
    return steps.train.trace(state, batch)


@pytest.mark.parametrize("name", RECIPES)
def test_step_lowers_for_a_gpu(name):
    text = traced_step(name).lower(lowering_platforms=("cuda",)).as_text()
    assert "bf16" in text


@pytest.mark.parametrize("name", RECIPES)
def test_step_compiles_for_eight_tpus(name):
    pytest.importorskip("libtpu", reason="pip install libtpu: it compiles for a TPU without having one")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices), ("data",))
    program = traced_step(name, NamedSharding(mesh, PartitionSpec("data"))).lower().compile()
    assert program.cost_analysis()["flops"] > 0
    assert program.memory_analysis().temp_size_in_bytes < 16 * 2**30  # a v5e's memory
