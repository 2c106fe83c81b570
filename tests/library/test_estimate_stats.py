"""Statistics estimated again, for weights that no batch was trained with."""

import copy

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import anact_jax.nnx
from anact_jax import Published, Standardized, activation_stats
from anact_jax.linen import NReLU, NSwish, estimate_stats

BATCHES = 3 + jax.random.normal(jax.random.key(0), (6, 16, 4)) * jnp.arange(1.0, 7.0)[:, None, None]
FORMS = [Standardized(), Published()]


def run_of(model):
    return lambda variables, x: model.apply(variables, x, mutable=["batch_stats"])[1]


def moments(state):
    return {name: np.asarray(state[name]) for name in ("mean_out", "var_out")}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_estimate_equals_one_large_batch(form):
    layer = NSwish(form=form, use_running_average=False)
    variables = layer.init(jax.random.key(1), BATCHES[0])
    _, variables = layer.apply(variables, 100 + BATCHES[0], mutable=["batch_stats"])  # to be forgotten
    found = estimate_stats(run_of(layer), variables, BATCHES)["batch_stats"]
    whole = activation_stats(jax.nn.swish, BATCHES.reshape(-1, 4), axis=form.axis)
    for name in form.moments:
        np.testing.assert_allclose(found[name], getattr(whole, name), rtol=1e-5)
    np.testing.assert_array_equal(found["count"], 6)


def test_estimate_keeps_what_no_batch_can_tell():
    """A dead channel keeps its statistics; a batch in which it is constant takes no part."""
    layer = NReLU(use_running_average=False)
    variables = layer.init(jax.random.key(1), BATCHES[0])
    dead = BATCHES.at[:, :, 0].set(-1.0).at[0, :, 1].set(2.0)
    found = estimate_stats(run_of(layer), variables, dead)["batch_stats"]
    np.testing.assert_array_equal(found["count"], [0, 5, 6, 6])
    np.testing.assert_array_equal(found["mean_out"][0], variables["batch_stats"]["mean_out"][0])
    whole = activation_stats(jax.nn.relu, dead[1:].reshape(-1, 4), axis=-1)
    np.testing.assert_allclose(found["var_out"][1], whole.var_out[1], rtol=1e-5)


def test_batch_norm_beside_goes_on():
    model = nn.Sequential([nn.BatchNorm(use_running_average=False), NSwish(use_running_average=False)])
    variables = model.init(jax.random.key(1), BATCHES[0])
    found = estimate_stats(run_of(model), variables, BATCHES)["batch_stats"]
    expected = variables
    for x in BATCHES:
        expected = {**expected, **run_of(model)(expected, x)}
    chex.assert_trees_all_close(found["layers_0"], expected["batch_stats"]["layers_0"], rtol=1e-5)
    np.testing.assert_array_equal(found["layers_1"]["count"], 6)


def test_nnx_estimates_as_linen_does():
    layer = NSwish(use_running_average=False)
    found = estimate_stats(run_of(layer), layer.init(jax.random.key(1), BATCHES[0]), BATCHES)["batch_stats"]
    model = anact_jax.nnx.NSwish(4, use_running_average=True)
    before = copy.deepcopy(model)
    anact_jax.nnx.estimate_stats(model, BATCHES)
    state = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    chex.assert_trees_all_close(state, dict(found), rtol=1e-6)
    assert model.use_running_average
    assert not before.count.any()


def test_estimate_without_batches_is_refused():
    layer = NSwish(use_running_average=False)
    variables = layer.init(jax.random.key(1), BATCHES[0])
    with pytest.raises(ValueError, match="at least one batch"):
        estimate_stats(run_of(layer), variables, [])
    with pytest.raises(ValueError, match="no collection 'batch_stats'"):
        estimate_stats(run_of(layer), {"params": {}}, BATCHES)
