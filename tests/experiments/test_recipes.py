"""Recipes: what they say, and that their steps run here, lower for a GPU and compile for a TPU without having one."""

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import training_step
from experiments.benchmarks.measuring import random_images
from experiments.config import changed
from experiments.data import DATASETS, training_batches
from experiments.recipes import RECIPES
from experiments.training.build import make_network
from experiments.training.steps import make_steps

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPES = {"digits": (8, 8, 1), "fashion_mnist": (14, 14, 1), "cifar100": (32, 32, 3), "tiny_imagenet": (64, 64, 3)}


def noise_for(config, images):
    """As many images of noise in the shape and with the classes of the recipe's data set."""
    return random_images(SHAPES[config.recipe.data.dataset], images, DATASETS[config.recipe.data.dataset])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_to_expect(name):
    recipe = RECIPES[name]
    recipe.config.check()
    assert recipe.score.startswith(("measured: ", "published: "))
    assert ("not measured here" in recipe.time) == recipe.score.startswith("published")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "resnet18_cifar100"])  # all are compiled below
def test_a_recipe_takes_two_steps_at_full_shape(name):
    # A batch of 128 images of 32x32 pixels takes 20 GB in ResNet-50.
    config = changed(RECIPES[name].config, batch_size=16)
    dataset = noise_for(config, 2 * config.recipe.training.batch_size)
    steps = make_steps(make_network(config.recipe.network, dataset), config.recipe.training, dataset)
    state = steps.create(0, config.recipe.learning_rate)
    before = jax.device_get(state.params)
    for batch in training_batches(
        dataset,
        config.recipe.training.batch_size,
        seed=0,
        epochs=1,
        augmentation=config.recipe.data.augmentation(dataset),
    ):
        state, metrics = steps.train(state, batch)
        assert 0 < float(metrics["loss"]) < 100
    assert int(state.step) == 2
    after = jax.device_get(state.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def traced_step(name, sharding=None):
    """The training step of a recipe in bfloat16, at its full shapes."""
    recipe = changed(RECIPES[name].config.recipe, dtype="bfloat16")
    return training_step.traced(recipe, SHAPES[recipe.data.dataset], DATASETS[recipe.data.dataset], sharding)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_step_lowers_for_a_gpu(name):
    text = traced_step(name).lower(lowering_platforms=("cuda",)).as_text()
    assert "bf16" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_step_compiles_for_eight_tpus(name):
    pytest.importorskip("libtpu", reason="pip install libtpu: it compiles for a TPU without having one")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices), ("data",))
    program = traced_step(name, NamedSharding(mesh, PartitionSpec("data"))).lower().compile()
    assert program.cost_analysis()["flops"] > 0
    assert program.memory_analysis().temp_size_in_bytes < 16 * 2**30  # a v5e's memory
