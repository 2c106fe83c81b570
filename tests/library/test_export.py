"""A layer as a function, and training steps exported for other machines, compared with the layer itself."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import anact_jax.linen
import anact_jax.nnx
from anact_jax import Published, Standardized, gaussian_stats
from anact_jax.export import as_function

IMAGES = 0.5 + 2 * jax.random.normal(jax.random.key(0), (16, 8, 8, 3))


@pytest.mark.parametrize(
    "form",
    [Standardized(), Standardized(axis=1), Published(learned=True)],
    ids=["default", "another axis", "learned"],
)
def test_function_equals_linen_inference(form):
    layer = anact_jax.linen.NGELU(form=form, use_running_average=False)
    variables = layer.init(jax.random.key(0), IMAGES)
    _, updates = layer.apply(variables, IMAGES, mutable=["batch_stats"])
    variables = {**jax.tree.map(lambda alpha: alpha + 0.7, variables), **updates}
    function = as_function(layer.bind(variables))
    expected = layer.copy(use_running_average=True).apply(variables, IMAGES)
    np.testing.assert_allclose(function(IMAGES), expected, rtol=1e-5, atol=1e-6)
    assert function(IMAGES.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    factor, shift = layer.bind(variables).normalization()
    jaxpr = jax.make_jaxpr(function)(IMAGES)
    assert [np.squeeze(constant).shape for constant in jaxpr.consts] == [factor.shape, shift.shape]
    assert not {"sqrt", "rsqrt", "reduce_sum", "div"} & set(re.findall(r"= (\w+)", str(jaxpr)))


def test_nnx_function_is_a_snapshot():
    layer = anact_jax.nnx.NSwish()
    x = IMAGES[:, 0, 0]
    prior = as_function(layer)
    np.testing.assert_allclose(prior(x), layer(x, use_running_average=True), rtol=1e-5, atol=1e-6)
    layer(x, use_running_average=False)
    trained = as_function(layer)
    y = trained(x)
    np.testing.assert_allclose(y, layer(x, use_running_average=True), rtol=1e-5, atol=1e-6)
    layer(3 * x, use_running_average=False)
    np.testing.assert_array_equal(trained(x), y)
    assert np.abs(y - layer(x, use_running_average=True)).max() > 0.1


@pytest.mark.parametrize("form", [Standardized(), Published(learned=True)], ids=["default", "published"])
def test_untrained_normalization_is_gaussian(form):
    layer = anact_jax.linen.ANAct(jnp.tanh, form=form, use_running_average=True)
    expected = form.factor_and_shift(gaussian_stats(jnp.tanh))
    found = layer.bind(layer.init(jax.random.key(0), IMAGES)).normalization()
    shape = () if form.axis is None else (3,)
    chex.assert_trees_all_close(found, jax.tree.map(lambda value: jnp.full(shape, value), expected), rtol=1e-6)
    same = anact_jax.nnx.ANAct(jnp.tanh, 3, form=form)
    chex.assert_trees_all_equal(same.normalization(), found)


def test_unbound_layer_says_how_to_bind():
    layer = anact_jax.linen.NReLU(use_running_average=True, form=Published(learned=True))
    for wrong in (layer, layer.bind({}), layer.bind({"batch_stats": {"NReLU_0": {}}})):
        with pytest.raises(ValueError, match=r"layer.bind\({'batch_stats': ..., 'params': ...}\)"):
            wrong.normalization()
    with pytest.raises(ValueError, match=r"no batch_stats/count: .*layer.bind\({'batch_stats': ..., 'params'"):
        layer.running_stats()
    state = layer.init(jax.random.key(0), IMAGES)["batch_stats"]
    with pytest.raises(ValueError, match="no params/alpha"):
        layer.bind({"batch_stats": state}).normalization()


def test_stacked_state_is_refused():
    layer = anact_jax.linen.NReLU(use_running_average=True)
    state = layer.init(jax.random.key(0), IMAGES)["batch_stats"]
    stacked = jax.tree.map(lambda value: jnp.stack([value, value]), state)
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*take one's state first"):
        as_function(layer.bind({"batch_stats": stacked}))


@pytest.mark.parametrize("form", [Published(), Standardized(std=1.0, tempering=0.1)], ids=["published", "tempered"])
def test_layers_with_few_and_all_moments_are_exported(form):
    layer = anact_jax.linen.NSwish(form=form, use_running_average=False)
    variables = layer.init(jax.random.key(0), IMAGES)
    assert set(variables["batch_stats"]) == {"count", *form.moments}
    _, updates = layer.apply(variables, IMAGES, mutable=["batch_stats"])
    same = anact_jax.nnx.NSwish(3, form=form)
    same(IMAGES, use_running_average=False)
    expected = layer.copy(use_running_average=True).apply(updates, IMAGES)
    for exported in (as_function(layer.bind(updates)), as_function(same)):
        np.testing.assert_allclose(exported(IMAGES), expected, rtol=1e-5, atol=1e-6)


def training_step(api, form, features):
    """A step as a function of the layer's state, the input and a target; and the state at the start."""
    if api == "linen":
        layer = anact_jax.linen.NSwish(form=form, use_running_average=False)
        leaves, treedef = jax.tree.flatten(layer.init(jax.random.key(0), jnp.ones((2, features))))

        def output(state, x):
            return layer.apply(state, x, mutable=["batch_stats"])
    else:
        graph, state = nnx.split(anact_jax.nnx.NSwish(features, form=form, use_running_average=False))
        leaves, treedef = jax.tree.flatten(state)

        def output(state, x):
            layer = nnx.merge(graph, state)
            return layer(x), nnx.state(layer)

    def step(leaves, x, target):
        def loss(x):
            y, new = output(jax.tree.unflatten(treedef, leaves), x)
            return jnp.mean((y - target) ** 2), jax.tree.leaves(new)

        return jax.value_and_grad(loss, has_aux=True)(x)

    return step, leaves


@pytest.mark.parametrize(
    ("api", "form"),
    [
        ("linen", "published"),
        ("nnx", "default"),
        pytest.param("linen", "default", marks=pytest.mark.slow),
    ],
)
def test_export_with_a_batch_of_any_size(api, form):
    step, state = training_step(api, form, 6)
    symbols = jax.export.symbolic_shape("b, 5, 5, 6")
    x = jax.ShapeDtypeStruct(symbols, jnp.float32)
    exported = jax.export.export(jax.jit(step))(state, x, x)
    for size in (3, 8):
        x, target = jax.random.normal(jax.random.key(size), (2, size, 5, 5, 6))
        chex.assert_trees_all_close(
            exported.call(state, x, target), jax.jit(step)(state, x, target), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("shape", [(4, 5, 5, 6), (64, 32, 32, 16)])
def test_export_for_cpu_gpu_and_tpu_in_one(shape):
    step, state = training_step("linen", "default", shape[-1])
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(state, x, x)
    x, target = jax.random.normal(jax.random.key(0), (2, *shape))
    expected = jax.jit(step)(state, x, target)
    chex.assert_trees_all_close(exported.call(state, x, target), expected, rtol=1e-4, atol=1e-6)


def test_learned_function_is_a_snapshot():
    x = IMAGES[:, 0, 0]
    layer = anact_jax.nnx.ANAct(nnx.PReLU(), 3, tempering=0.1)
    layer(x)
    function, expected = as_function(layer), layer(x, use_running_average=True)
    layer.fn.negative_slope[...] = 0.7
    np.testing.assert_allclose(function(x), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(layer(x, use_running_average=True) - expected).max() > 0.1

    of_linen = anact_jax.linen.ANAct(nn.Sequential([nn.PReLU(), jnp.tanh]), use_running_average=True)
    variables = of_linen.init(jax.random.key(0), x)
    function = as_function(of_linen.bind(variables))
    np.testing.assert_allclose(function(x), of_linen.apply(variables, x), rtol=1e-5, atol=1e-6)
