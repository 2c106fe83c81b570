"""Numbers in half precision are normalized as the same numbers in float64 are; rounding alone is not."""

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import ACTIVATIONS, Published, Standardized, anact, initial_stats
from anact_jax.linen import NSigmoid, NSwish

DEFAULT = Standardized()
HALF = [jnp.bfloat16, jnp.float16]
OFFSETS = {"swish": (0.0, -1.5, 300.0), "relu": (0.3, 300.0), "sigmoid": (0.0, 1.5), "tanh": (-1.0, 0.02)}


def name_of(dtype):
    return jnp.dtype(dtype).name


def unit(offset, dtype):
    """The last place of a dtype's numbers at an offset."""
    return float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(max(abs(offset), 2.0**-6)))


def batch(offsets, spreads, dtype):
    """A feature for each offset and spread."""
    offsets, spreads = np.broadcast_arrays(offsets, spreads)
    return jnp.asarray(offsets + spreads * np.random.default_rng(0).normal(size=(2048, *offsets.shape)), dtype)


def stepped(name, x, form=DEFAULT):
    f = ACTIVATIONS[name]
    running = initial_stats(f, form)
    return jax.jit(lambda x: anact(f, x, running, form))(x)


@pytest.mark.parametrize("dtype", [*HALF, jnp.float32], ids=name_of)
@pytest.mark.parametrize("name", OFFSETS)
def test_signal_above_rounding_is_normalized(name, dtype):
    grid = dtype if dtype in HALF else jnp.bfloat16  # float32 holds what bfloat16 rounds
    pairs = [(offset, units * unit(offset, grid)) for offset in OFFSETS[name] for units in (2, 8, 50)]
    x = batch(*np.array(pairs).T, dtype)
    y, new = stepped(name, x)
    f = helpers.VALUE_AND_SLOPE[name](np.asarray(x, np.float64))[0]
    expected = 0.5 * (f - f.mean(0)) / np.sqrt(f.var(0) + DEFAULT.epsilon)
    np.testing.assert_array_equal(new.count, 1)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=3 * float(jnp.finfo(dtype).eps) + 2e-3)


def neighbors(offset, dtype):
    lower = jnp.full((512, 1), offset if offset else 1.0, dtype)
    x = jnp.where(jnp.arange(512)[:, None] % 3 == 0, jnp.nextafter(lower, jnp.full_like(lower, jnp.inf)), lower)
    assert np.unique(np.asarray(x, np.float64)).size == 2
    return x


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("name", OFFSETS)
def test_neighboring_numbers_count_as_constant(name, dtype):
    x = jnp.concatenate([neighbors(offset, dtype) for offset in OFFSETS[name]], axis=1)
    y, new = stepped(name, x)
    np.testing.assert_array_equal(new.count, 0)
    assert np.isfinite(np.asarray(y, np.float64)).all()


def test_neighbors_are_constant_to_the_published_form():
    _, new = stepped("swish", neighbors(300.0, jnp.bfloat16), Published())
    assert new.count == 0


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_offset_is_normalized_as_batch_norm_does(dtype):
    offset, spread = {"bfloat16": (300, 4), "float16": (1013, 1.5)}[name_of(dtype)]
    x = batch([offset] * 3, spread, dtype)

    def applied(layer):
        y, updates = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
        return np.asarray(y, np.float64), updates

    y, updates = applied(NSwish(use_running_average=False))
    theirs, _ = applied(nn.BatchNorm(use_running_average=False, use_fast_variance=False))
    np.testing.assert_allclose(y, theirs / 2, atol=0.02)
    np.testing.assert_array_equal(updates["batch_stats"]["count"], 1)


def test_small_sigmoid_signals_pass_five_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(5):
                x = NSigmoid(use_running_average=False)(nn.Dense(16, dtype=x.dtype)(x))
            return x

    x = batch([0.0] * 8, 0.02, jnp.bfloat16)
    y, updates = Net().apply(Net().init(jax.random.key(0), x), x, mutable=["batch_stats"])
    for state in updates["batch_stats"].values():
        np.testing.assert_array_equal(state["count"], 1)
    np.testing.assert_allclose(np.std(np.asarray(y, np.float64), axis=0), 0.5, rtol=0.02)


@pytest.mark.parametrize("form", [DEFAULT, Published()], ids=["default", "published"])
@pytest.mark.parametrize("units", [0, 0.3, 4])
def test_shards_judge_as_one_batch_does(units, form):
    x = batch([300.0] * 3, units * unit(300.0, jnp.bfloat16), jnp.bfloat16)
    whole_y, whole = stepped("swish", x, form)
    parts = x.reshape(4, -1, 3)
    running = initial_stats(jax.nn.swish, form)
    y, new = jax.vmap(lambda x: anact(jax.nn.swish, x, running, form, axis_name="parts"), axis_name="parts")(parts)
    np.testing.assert_array_equal(new.count, np.broadcast_to(whole.count, new.count.shape))
    np.testing.assert_allclose(
        np.asarray(y.reshape(x.shape), np.float32), np.asarray(whole_y, np.float32), rtol=0.01, atol=0.01
    )
