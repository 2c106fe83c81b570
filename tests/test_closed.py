import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import anact_jax.nnx
from anact_jax import ACTIVATIONS, Form, activation_stats, closed_normalization, gaussian_stats, normalization
from anact_jax.linen import BatchNormAct

PER_CHANNEL = "forward+center+diff+feature"
BY_ALL_MOMENTS = "mean+center+diff+feature"
KINKED = {"hard_tanh": jax.nn.hard_tanh, "relu6": jax.nn.relu6, "hard_swish": jax.nn.hard_swish}


def grid():
    """Means and deviations, as BatchNorm learns them."""
    means, deviations = (-3.0, -1.0, -0.2, 0.0, 0.5, 2.0), (0.1, 0.4, 1.0, 2.0, 5.0)
    return (jnp.array(values) for values in zip(*itertools.product(means, deviations), strict=True))


def expected_factor(mean, std, moments, form):
    stats = (0, mean, std**2, *moments)
    return oracles.factor_and_shift(stats, form.rule, form.center, form.reference)


@pytest.mark.parametrize("form", [PER_CHANNEL, BY_ALL_MOMENTS])
@pytest.mark.parametrize("name", ["swish", "relu", pytest.param("tanh", marks=pytest.mark.slow)])
def test_factor_and_shift_are_those_of_the_float64_quadrature(name, form):
    form = Form.parse(form).replace(epsilon=0.0)
    mean, std = (values[::3] for values in grid())
    found = closed_normalization(ACTIVATIONS[name], mean, std, form)
    for channel, known in enumerate(zip(map(float, mean), map(float, std), strict=True)):
        moments = oracles.gaussian_moments(name, *known)
        if moments[1] > 1e-6:  # not ReLU at 30 deviations below 0, which is 0 in float32
            expected = expected_factor(*known, moments, form)
            np.testing.assert_allclose((found.factor[channel], found.shift[channel]), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["hard_tanh", *(pytest.param(n, marks=pytest.mark.slow) for n in KINKED if n != "hard_tanh")]
)
def test_kinks_away_from_zero_get_nodes_of_their_own(name):
    mean, std = grid()
    close = closed_normalization(KINKED[name], mean, std, BY_ALL_MOMENTS)
    with jax.enable_x64(True):
        x = np.linspace(-8, 8, 200_001)
        weight = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum()

        def moments(mean, std):
            y, slope = jax.jvp(KINKED[name], (jnp.asarray(mean + std * x),), (jnp.ones_like(x),))
            mean_out = weight @ y
            return mean_out, weight @ (y - mean_out) ** 2, weight @ slope**2

        of_f = np.array([moments(float(m), float(s)) for m, s in zip(mean, std, strict=True)]).T
    square, slope_sq = of_f[1] + 1e-6, of_f[2] + 1e-6
    factor = np.sqrt((np.asarray(std, np.float64) ** 2 + 1e-6) / square / 2 + 1 / slope_sq / 2)
    alive = of_f[1] > 1e-4
    np.testing.assert_allclose(close.factor[alive], factor[alive], rtol=1e-3)
    np.testing.assert_allclose(close.shift, of_f[0], atol=1e-4)


@pytest.mark.parametrize("form", [PER_CHANNEL, BY_ALL_MOMENTS, "harmonic+unit+diff"])
@pytest.mark.parametrize(
    "f",
    [jax.nn.hard_tanh, *(pytest.param(f, marks=pytest.mark.slow) for f in (jax.nn.swish, jax.nn.relu, jnp.tanh))],
    ids=lambda f: f.__name__,
)
def test_gradients_are_those_of_differences(f, form):
    with jax.enable_x64(True):
        mean, std = (jnp.asarray(values, jnp.float64) for values in grid())
        keep = std >= 0.4
        mean, std = jnp.maximum(mean[keep], -1.0) + 0.05, std[keep]
        weights = jnp.cos(jnp.arange(2.0 * mean.size)).reshape(2, -1)

        def loss(mean, std):
            return jnp.sum(
                weights * jnp.stack(jnp.broadcast_arrays(*closed_normalization(f, mean, std, form), mean)[:2])
            )

        found = jax.grad(loss, (0, 1))(mean, std)
        step = 1e-5
        for index, gradient in enumerate(found):
            for channel in (0, 5, 11, mean.size - 1):
                off = step * jnp.eye(mean.size)[channel]
                high, low = ([mean, std] for _ in range(2))
                high[index], low[index] = high[index] + off, low[index] - off
                difference = (loss(*high) - loss(*low)) / (2 * step)
                np.testing.assert_allclose(gradient[channel], difference, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("f", [jax.nn.relu, jax.nn.swish, jnp.tanh], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", [PER_CHANNEL, BY_ALL_MOMENTS, "mean+diff+feature", "geometric+center+diff+feature"])
def test_continuous_where_a_channel_has_no_deviation_or_is_dead(f, form):
    def factor(mean, std):
        return closed_normalization(f, mean, std, form)

    mean = jnp.array([0.5, -0.5, 0.5, -30.0])
    at, near = (factor(mean, jnp.array([std, std, std, 1.0])) for std in (0.0, 1e-6))
    chex.assert_tree_all_finite((at, near))
    chex.assert_trees_all_close(at, near, rtol=1e-3, atol=1e-6)
    gradient = jax.grad(lambda *known: sum(map(jnp.sum, factor(*known))), (0, 1))(
        mean, jnp.array([0.0, 0.1, 1e-6, 1.0])
    )
    chex.assert_tree_all_finite(gradient)


def test_one_factor_a_layer_is_that_of_the_mixture():
    gamma, beta = jnp.array([0.3, 1.0, 2.0]), jnp.array([-1.0, 0.0, 0.7])
    x = beta[None] + gamma[None] * jax.random.normal(jax.random.key(0), (200_000, 3))
    for form in ("mean", "forward+center+unit+diff", "exact"):
        measured = normalization(activation_stats(jax.nn.swish, x), form)
        chex.assert_trees_all_close(closed_normalization(jax.nn.swish, beta, gamma, form), measured, rtol=1e-2)


@pytest.mark.parametrize("form", ["mean+center+learned", "mean+center+diff+learned"])
def test_the_learned_correction_is_differentiated_in_any_form(form):
    def factor(alpha, std):
        return closed_normalization(jax.nn.swish, jnp.zeros(3), std, form, alpha=alpha).factor

    in_alpha, in_std = jax.grad(factor, (0, 1))(jnp.zeros(()), jnp.ones(3))
    np.testing.assert_allclose(in_alpha, 0.3, rtol=1e-6)  # of 0.3 tanh(alpha)
    assert bool(jnp.any(in_std != 0)) == ("diff" in form)


def test_a_learned_function_is_differentiated_and_measured_finely():
    def factor(slope):
        return closed_normalization(lambda x: jnp.where(x > 0, x, slope * x), jnp.zeros(2), jnp.ones(2), PER_CHANNEL)[0]

    np.testing.assert_allclose(
        factor(0.01), normalization(gaussian_stats(jax.nn.leaky_relu), PER_CHANNEL)[0], rtol=1e-5
    )
    by_hand = (factor(0.26) - factor(0.24)) / 0.02
    np.testing.assert_allclose(jax.jacobian(factor)(0.25), by_hand, rtol=1e-2)


def test_constants_carry_no_gradient():
    gradient = jax.grad(lambda b: jnp.sum(closed_normalization(jax.nn.relu, b, jnp.ones(3), "forward+feature")[0]))
    chex.assert_trees_all_equal(gradient(jnp.zeros(3)), jnp.zeros(3))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: closed_normalization(jax.nn.relu, jnp.zeros(3), jnp.ones(3), "forward+unit+feature"),
            "leave out unit",
        ),
        (lambda: BatchNormAct(form="default"), "leave out unit"),
        (lambda: anact_jax.nnx.BatchNormAct(3, form="default", rngs=nnx.Rngs(0)), "leave out unit"),
        (lambda: BatchNormAct(fn="relu"), "elementwise function"),
        (lambda: behind(form="forward+axes0,-1")[0], "behind a BatchNorm over axis -1"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def behind(x=None, **options):
    """A layer with scales and biases as training leaves them, its output in training, and its state after that."""
    x = batch() if x is None else x
    layer = BatchNormAct(use_running_average=False, **options)
    variables = layer.init(jax.random.key(1), x)
    channels = variables["batch_stats"]["var"].size
    scales = {"scale": jnp.linspace(-2, 2, channels), "bias": jnp.linspace(1, -1, channels)}
    params = {name: scales.get(name, value) for name, value in variables.get("params", {}).items()}
    variables = {**variables, "params": params}
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    return y, {**variables, **updates}


def batch(shape=(64, 5, 5, 8)):
    return 1 + 3 * jax.random.normal(jax.random.key(0), shape)


def test_a_checkpoint_of_batch_norm_loads():
    class Net(nn.Module):
        norm: type

        @nn.compact
        def __call__(self, x):
            return self.norm(use_running_average=False, name="norm")(x)

    saved, fresh = (Net(norm).init(jax.random.key(0), batch()) for norm in (nn.BatchNorm, BatchNormAct))
    chex.assert_trees_all_equal(saved, fresh)


def test_keeps_the_variance_of_what_comes_in():
    y, variables = behind(fn=jax.nn.relu, form=PER_CHANNEL)
    scale = jnp.abs(variables["params"]["scale"])
    np.testing.assert_allclose(jnp.std(y, (0, 1, 2)), scale, rtol=0.1)
    np.testing.assert_allclose(jnp.mean(y, (0, 1, 2)), 0, atol=0.06)


def test_training_and_inference_normalize_alike():
    x = batch()
    y, variables = behind(x, momentum=0.0)
    inferred = BatchNormAct(use_running_average=True).apply(variables, x)
    chex.assert_trees_all_close(inferred, y, atol=1e-5)


def test_a_channel_that_hardly_varies_is_known_to():
    """epsilon takes half of its deviation, which no parameter tells, but the running variance does."""
    layer, x = BatchNormAct(fn=jnp.tanh, form=PER_CHANNEL, use_running_average=True, use_scale=False), batch()
    variables = layer.init(jax.random.key(0), x)
    state = {"mean": jnp.zeros(8), "var": jnp.full(8, 1e-5)}
    y = layer.apply({**variables, "batch_stats": state}, 1e-5**0.5 * (x - 1) / 3)
    np.testing.assert_allclose(jnp.std(y, (0, 1, 2)), 0.5**0.5, rtol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "mean+diff"},
        {"form": "forward+center+feature", "fn": jax.nn.relu, "use_bias": False},
        {"fn": jnp.tanh, "use_scale": False, "momentum": 0.9, "epsilon": 1e-3},
        {"form": "mean+center+diff+feature+nu0.1+learned"},
    ],
    ids=["default", "one_a_layer", "constants_without_bias", "without_scale", "learned_and_tempered"],
)
def test_nnx_equals_linen_to_the_bit(options):
    x = batch()
    y, variables = behind(x, **options)
    layer = anact_jax.nnx.BatchNormAct(8, rngs=nnx.Rngs(0), **({"momentum": 0.99} | options))
    layer.train()
    for name, value in variables.get("params", {}).items():
        getattr(layer, name).set_value(value)
    chex.assert_trees_all_equal(layer(x), y)
    chex.assert_trees_all_equal({n: getattr(layer, n)[...] for n in ("mean", "var")}, variables["batch_stats"])
    layer.eval()
    inference = BatchNormAct(**options).apply(variables, x, use_running_average=True)
    chex.assert_trees_all_equal(layer(x), inference)


@pytest.mark.usefixtures("standard_promotion")  # Flax's BatchNorm mixes bfloat16 and float32
def test_half_precision_takes_factors_of_float32():
    y, _ = behind(dtype=jnp.bfloat16, form=BY_ALL_MOMENTS)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_close(y.astype(jnp.float32), behind(form=BY_ALL_MOMENTS)[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("axis", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_channels_may_stand_on_any_axis(axis):
    x = batch((32, 6, 6, 6))
    y, _ = behind(jnp.moveaxis(x, -1, axis), axis=axis, form="forward+center+diff+axes1" if axis == 1 else PER_CHANNEL)
    chex.assert_trees_all_close(jnp.moveaxis(y, axis, -1), behind(x, form=PER_CHANNEL)[0], rtol=1e-4, atol=1e-5)


def test_a_module_with_parameters_may_be_what_is_normalized():
    y, variables = behind(fn=nn.PReLU(), form=BY_ALL_MOMENTS)
    assert sorted(variables["params"]) == ["bias", "fn", "scale"]
    chex.assert_trees_all_close(y, behind(fn=jax.nn.leaky_relu, form=BY_ALL_MOMENTS)[0], rtol=2e-3, atol=2e-3)
    layer = anact_jax.nnx.BatchNormAct(8, fn=nnx.PReLU(), form=BY_ALL_MOMENTS, momentum=0.99, rngs=nnx.Rngs(0))
    layer.train()
    for name in ("scale", "bias"):
        getattr(layer, name).set_value(variables["params"][name])
    chex.assert_trees_all_equal(layer(batch()), y)


def test_padding_is_left_out_by_batch_norm():
    x = batch((16, 4, 8))
    mask = (jnp.arange(4) < 3)[None, :, None]
    layer = BatchNormAct(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    outputs = [
        layer.apply(variables, jnp.where(mask, x, filler), mask=mask, mutable=["batch_stats"]) for filler in (0.0, 99.0)
    ]
    chex.assert_trees_all_close(outputs[0][0][:, :3], outputs[1][0][:, :3], rtol=1e-5)
    chex.assert_trees_all_close(outputs[0][1], outputs[1][1], rtol=1e-5)


def test_shards_of_a_batch_are_one_batch():
    x = batch((16, 8))
    layer = BatchNormAct(use_running_average=False, axis_name="batch")
    variables = BatchNormAct(use_running_average=False).init(jax.random.key(0), x)
    apply = functools.partial(layer.apply, variables, mutable=["batch_stats"])
    y, state = jax.vmap(apply, axis_name="batch")(x.reshape(4, 4, 8))
    whole, after = BatchNormAct(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_close(y.reshape(16, 8), whole, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda value: value[0], state), after, rtol=1e-5)
