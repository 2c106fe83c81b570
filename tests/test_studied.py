import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import ACTIVATIONS, DEFAULT, activation_stats, nonlinearity, normalization
from experiments.models.layers import activation_layer
from experiments.models.studied import SMALLEST_SCALE, InputScaled, gaussian_scale


def trained(layer, batches):
    """Variables and output of the last of some training batches."""
    variables = layer.init(jax.random.key(0), batches[0])
    step = jax.jit(lambda variables, x: layer.apply(variables, x, mutable=["batch_stats"]))
    for x in batches:
        y, variables = step(variables, x)
    return variables, y


def test_statistics_can_lag_or_stay_fixed():
    x = 3 + jax.random.normal(jax.random.key(0), (8, 16))

    def after_two_steps(tracking):
        layer = activation_layer("nrelu", tracking=tracking, form=DEFAULT.replace(feature_axes=()))(False)
        variables = layer.init(jax.random.key(1), x)
        outputs = []
        for _ in range(2):
            y, variables = layer.apply(variables, x, mutable=["batch_stats"])
            outputs.append(float(jnp.mean(y)))
        return outputs, float(variables["batch_stats"]["count"])

    batch, lag, fixed = map(after_two_steps, ("batch", "lag", "fixed"))
    np.testing.assert_allclose(batch[0], 0, atol=1e-5)
    assert lag[0][0] > 1
    np.testing.assert_allclose(lag[0][1], 0, atol=1e-5)
    assert fixed[0][0] == fixed[0][1] == lag[0][0]
    assert (batch[1], lag[1], fixed[1]) == (2, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swish", "tanh", "gelu"])
def test_the_gaussian_scale_brings_an_activation_to_the_limit(name):
    f = ACTIVATIONS[name]
    scale = gaussian_scale(f, 0.05)
    assert SMALLEST_SCALE < scale < 1
    np.testing.assert_allclose(nonlinearity(InputScaled(f, scale)), 0.05, rtol=5e-3)


def test_the_gaussian_scale_leaves_what_is_within_the_limit_and_cannot_mend_a_kink():
    assert gaussian_scale(ACTIVATIONS["elu"], 0.1) == 1
    assert gaussian_scale(ACTIVATIONS["relu"], 0.1) == SMALLEST_SCALE


@pytest.mark.slow
def test_a_scaled_input_normalizes_what_it_gives():
    x = jax.random.normal(jax.random.key(0), (512, 4))
    layer = activation_layer("ntanh", tempering="scale", form=DEFAULT.replace(rule="forward"))(False)
    _, y = trained(layer, [x])
    f = InputScaled(jnp.tanh, gaussian_scale(jnp.tanh, DEFAULT.nonlinearity))
    np.testing.assert_allclose(y, (f(x) - f(x).mean(0, keepdims=True)) / f(x).std(0, keepdims=True), atol=1e-4)


@pytest.mark.slow
def test_a_measured_scale_comes_to_the_limit_at_any_spread_of_the_input_and_stays_in_inference():
    def make(inference):
        return activation_layer("nswish", tempering="measured")(inference)

    batches = [3 * jax.random.normal(jax.random.key(seed), (2048, 4)) for seed in range(50)]
    variables, _ = trained(make(False), batches)
    scale = variables["batch_stats"]["scale"]
    np.testing.assert_allclose(scale, gaussian_scale(jax.nn.swish, DEFAULT.nonlinearity) / 3, rtol=0.1)
    stats = activation_stats(InputScaled(jax.nn.swish, scale), jnp.concatenate(batches))
    np.testing.assert_allclose(stats.var_in * stats.slope_sq / stats.var_out - 1, DEFAULT.nonlinearity, rtol=0.1)
    _, after = make(True).apply(variables, batches[0], mutable=["batch_stats"])
    assert after["batch_stats"]["scale"] == scale


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0.0, np.nan])
def test_a_measured_scale_stays_where_a_batch_tells_nothing(dead):
    layer = activation_layer("nswish", tempering="measured")(False)
    variables, _ = trained(layer, [jnp.full((8, 4), dead)])
    assert variables["batch_stats"]["scale"] == np.float32(gaussian_scale(jax.nn.swish, DEFAULT.nonlinearity))


@pytest.mark.slow
@pytest.mark.parametrize(("bounds", "least", "most"), [("step", 0.8, 1.2), ("range", 0.5, 2.0)])
def test_a_factor_stops_at_its_bounds(bounds, least, most):
    """At unit level it would follow the spread of the input; it was 1 for two batches."""
    form = DEFAULT.replace(feature_axes=(), nonlinearity=None, epsilon=0.0)
    layer = activation_layer("nswish", bounds=bounds, form=form)(False)
    x = jax.random.normal(jax.random.key(0), (4096,))
    variables, _ = trained(layer, [x, x])
    usual = normalization(activation_stats(jax.nn.swish, x), form).factor
    for spread, wanted in ((1.1, None), (0.01, most), (100.0, least)):
        y, _ = layer.apply(variables, spread * x, mutable=["batch_stats"])
        free = normalization(activation_stats(jax.nn.swish, spread * x), form).factor
        factor = jnp.std(y) / jnp.std(jax.nn.swish(spread * x))
        np.testing.assert_allclose(factor, free if wanted is None else wanted * usual, rtol=0.05)


@pytest.mark.slow
def test_bounds_end_the_gradient_of_the_factor():
    form = DEFAULT.replace(feature_axes=())
    x = 10 * jax.random.normal(jax.random.key(0), (64, 4))

    def gradient(bounds):
        layer = activation_layer("nswish", bounds=bounds, form=form)(False)
        variables = layer.init(jax.random.key(0), x)
        return jax.grad(lambda s: jnp.mean(layer.apply(variables, s * x, mutable=["batch_stats"])[0] ** 2))(1.0)

    assert abs(gradient("none")) < 0.1
    assert gradient("step") > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tracking": "leads"}, "unknown tracking 'leads'"),
        ({"tempering": "shift"}, "unknown tempering 'shift'"),
        ({"bounds": "both"}, "unknown bounds 'both'"),
        ({"tempering": "scale", "form": DEFAULT.replace(nonlinearity=None)}, "tempering 'scale' needs a limit"),
        (
            {"bounds": "step", "form": DEFAULT.replace(learned=True)},
            "bounds 'step' do not go with a learned correction",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        activation_layer("nswish", **options)
