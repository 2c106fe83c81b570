import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import anact_jax.sums
from anact_jax import Stats, activation_stats

SHAPES = [(6, 5, 7, 4), (6, 35, 4), (210, 4)]


@pytest.fixture
def small_parts(monkeypatch):
    """As if the processor's cache held 64 elements, so that small batches are summed part by part."""
    monkeypatch.setattr(anact_jax.sums, "_IN_CACHE", 64)
    jax.clear_caches()


def loops(*arguments, **options):
    """Whether the batch is summed in a loop."""
    program = jax.jit(lambda *a: activation_stats(jax.nn.swish, *a, **options)).lower(*arguments)
    return "while" in program.as_text()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feature_axes", [(), -1])
@pytest.mark.parametrize("masked", [False, True])
def test_part_by_part_equals_the_oracle(shape, feature_axes, masked, small_parts):
    rng = np.random.default_rng(0)
    x = rng.normal(1.5, 2.0, shape).astype(np.float32)
    mask = jnp.asarray(rng.random((shape[0], *(1,) * (len(shape) - 1))) < 0.6) if masked else None
    options = {"feature_axes": feature_axes, "mask": mask}
    assert loops(jnp.asarray(x), **options)
    stats = activation_stats(jax.nn.swish, jnp.asarray(x), **options)
    axes = tuple(range(len(shape) - 1)) if feature_axes else None
    expected = Stats(*oracles.stats("swish", x, axes=axes, mask=mask))
    chex.assert_trees_all_close(stats, jax.tree.map(np.float32, expected), rtol=3e-5)


def test_other_feature_axes_are_summed_at_once(small_parts):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5, 7, 4), np.float32))
    assert not loops(x, feature_axes=(0, -1))
    stats = activation_stats(jax.nn.swish, x, feature_axes=(0, -1))
    chex.assert_trees_all_close(stats, Stats(*oracles.stats("swish", x, axes=(1, 2))), rtol=3e-5)


def test_small_batches_are_summed_at_once():
    assert not loops(jnp.ones((128, 512)))


def test_under_transformations(small_parts):
    """vmap, gradients, and shard_map over eight devices, in a loop as at once."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4, 40, 4), np.float32))

    def total(x):
        return sum(jnp.sum(jnp.sin(moment)) for moment in activation_stats(jnp.tanh, x, feature_axes=-1)[1:])

    def of_all(x):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharded = jax.sharding.PartitionSpec("data")
        local = jax.shard_map(
            lambda x: activation_stats(jnp.tanh, x, feature_axes=-1, axis_name="data"),
            mesh=mesh,
            in_specs=sharded,
            out_specs=jax.sharding.PartitionSpec(),
        )
        return local(x)

    def results():
        return jax.jit(lambda x: (jax.vmap(jax.value_and_grad(total))(x), of_all(x)))(x)

    looping = results()
    anact_jax.sums._IN_CACHE = 2**17
    jax.clear_caches()
    chex.assert_trees_all_close(looping, results(), rtol=1e-4, atol=1e-6)
