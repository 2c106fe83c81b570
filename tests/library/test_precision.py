"""Half precision, loss scaling, and double precision."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import anact_jax.nnx
from anact_jax import ACTIVATIONS, Published, Standardized, Stats, anact, initial_stats, tempered
from anact_jax.linen import ANAct, NSwish


class Net(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = NSwish(use_running_average=not train)(nn.Dense(16, dtype=self.dtype)(x))
        return nn.Dense(1, dtype=self.dtype)(x)


@pytest.mark.parametrize(
    "name",
    ["relu", "swish", *(pytest.param(n, marks=pytest.mark.slow) for n in ACTIVATIONS if n not in ("relu", "swish"))],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_measures_in_float32(name, dtype):
    f = ACTIVATIONS[name]
    x = 1.0 + 3.0 * jax.random.normal(jax.random.key(0), (256, 4))
    prior = initial_stats(f, shape=(4,))
    y, state = anact(f, x.astype(dtype), prior)
    expected, expected_state = anact(f, x, prior)
    assert y.dtype == dtype
    chex.assert_trees_all_equal_dtypes(state, expected_state)
    factor, expected_factor = (Standardized().factor_and_shift(s).factor for s in (state, expected_state))
    np.testing.assert_allclose(factor, expected_factor, rtol=0.01)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.05)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_training_keeps_dtypes(dtype):
    model, x = Net(dtype), jax.random.normal(jax.random.key(0), (32, 8))
    variables = model.init(jax.random.key(1), x, True)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(variables, x):
        def loss(params):
            y, updates = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.mean(y.astype(jnp.float32) ** 2), updates

        (value, updates), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return value, {"params": jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], gradient), **updates}

    chex.clear_trace_counter()
    losses, before = [], variables
    for _ in range(5):
        value, variables = step(variables, x)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    chex.assert_trees_all_equal_dtypes(before, variables)


@pytest.mark.parametrize("poison", ["gradient", "input"])
def test_loss_scaling_does_not_poison_the_state(poison):
    """A loss scale beyond float16, or an input that is not finite: that step is skipped, the next one is good."""
    model, x = Net(jnp.float16), jax.random.normal(jax.random.key(0), (32, 8))
    optimizer = optax.apply_if_finite(optax.sgd(0.05), max_consecutive_errors=5)
    variables = model.init(jax.random.key(1), x, True)
    params, stats = variables["params"], variables["batch_stats"]
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, stats, opt_state, x, scale):
        def loss(params):
            y, updates = model.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
            return (jnp.mean(y**2) * scale).astype(jnp.float32), updates["batch_stats"]

        gradient, stats = jax.grad(loss, has_aux=True)(params)
        unscaled = jax.tree.map(lambda g: g / scale.astype(g.dtype), gradient)
        updates, opt_state = optimizer.update(unscaled, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    good, huge = jnp.float16(8), jnp.float16(jnp.inf)
    bad = (100 * x, huge) if poison == "gradient" else (x.at[0, 0].set(jnp.nan), good)
    with jax.numpy_dtype_promotion("standard"):
        skipped, stats_, opt_state_ = step(params, stats, opt_state, *bad)
        assert int(opt_state_.total_notfinite) == 1
        chex.assert_trees_all_equal(skipped, params)
        chex.assert_tree_all_finite(stats_)
        if poison == "input":
            chex.assert_trees_all_equal(stats_, stats)
        after, stats_, opt_state_ = step(skipped, stats_, opt_state_, x, good)
    assert int(opt_state_.total_notfinite) == 1
    chex.assert_tree_all_finite((after, stats_))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize("kind", ["default", "published"])
def test_double_precision_is_double_throughout(kind):
    with jax.enable_x64(True):
        x = 1.0 + 3.0 * jax.random.normal(jax.random.key(0), (1000, 4), jnp.float64)
        forms = {"default": Standardized(tempering=0.1, epsilon=0.0), "published": Published(center=True, epsilon=0.0)}
        layer = NSwish(use_running_average=False, form=forms[kind])
        variables = layer.init(jax.random.key(1), x)
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        chex.assert_trees_all_equal_dtypes(updates["batch_stats"], variables["batch_stats"])
        state = Stats(**updates["batch_stats"])
        assert y.dtype == state.mean_out.dtype == jnp.float64
        sigmoid = 1 / (1 + np.exp(-np.asarray(x)))
        kappa = float(layer.activation(jnp.float64(1)) - jax.nn.swish(jnp.float64(1)))
        z = (sigmoid + kappa) * np.asarray(x)
        axis = 0 if kind == "default" else None
        np.testing.assert_allclose(state.var_out, z.var(axis), rtol=1e-12)
        slope = sigmoid * (1 + np.asarray(x) * (1 - sigmoid))
        balanced = np.sqrt((np.var(x) / z.var() + 1 / (slope**2).mean()) / 2)
        factor = 0.5 / z.std(0) if kind == "default" else balanced
        np.testing.assert_allclose(y, factor * (z - z.mean(axis)), rtol=1e-10, atol=1e-12)


def test_single_precision_input_stays_single_under_x64():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (64, 4), jnp.float32)
        layer = NSwish(use_running_average=False)
        variables = layer.init(jax.random.key(1), x)
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        assert y.dtype == jnp.float32
        chex.assert_trees_all_equal_dtypes(updates["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
def test_a_learned_form_trains_under_x64_in_both_apis(dtype):
    """With strict promotion, as all tests: alpha and the state are float32 or float64, whatever x is."""
    form = Published(learned=True)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (64, 4), dtype)
        layer = NSwish(use_running_average=False, form=form)
        variables = layer.init(jax.random.key(1), x)
        state = {"batch_stats": variables["batch_stats"]}

        def loss(params):
            y, updates = layer.apply({"params": params} | state, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updates)

        gradient, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
        assert y.dtype == dtype
        chex.assert_trees_all_equal_dtypes(gradient, variables["params"])
        chex.assert_trees_all_equal_dtypes(updates["batch_stats"], variables["batch_stats"])
        assert np.abs(gradient["alpha"]).min() > 0

        net = anact_jax.nnx.NSwish(4, form=form, use_running_average=False)
        of_nnx = nnx.grad(lambda net: jnp.sum(jnp.sin(net(x))))(net)
        np.testing.assert_array_equal(of_nnx["alpha"][...], gradient["alpha"])


@pytest.mark.parametrize(
    "name", [name if name in ("swish", "relu") else pytest.param(name, marks=pytest.mark.slow) for name in ACTIVATIONS]
)
@pytest.mark.usefixtures("standard_promotion")
def test_default_is_batchnorm_of_f(name):
    form = Standardized(std=1.0, tempering=0.1)
    f = tempered(ACTIVATIONS[name], form.tempering)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (64, 5), jnp.float64) * jnp.arange(1.0, 6.0)[None] + 0.3
        weights = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)

        def ours(x):
            return output(ANAct(ACTIVATIONS[name], form=form, use_running_average=False), x)

        def theirs(x):
            options = {"use_scale": False, "use_bias": False, "epsilon": 1e-6, "use_fast_variance": False}
            return output(nn.BatchNorm(use_running_average=False, **options), f(x))

        def output(layer, x):
            y, _ = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
            return jnp.sum(weights * jnp.sin(y)), y

        (gradient, y), (expected, expected_y) = (jax.grad(each, has_aux=True)(x) for each in (ours, theirs))
        np.testing.assert_allclose(y, expected_y, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)
