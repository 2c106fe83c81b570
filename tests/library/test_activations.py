import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import ACTIVATIONS, Standardized, activation_stats, gaussian_stats, nonlinearity, tempered
from anact_jax.linen import NSwish


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("limit", [pytest.param(0.01, marks=pytest.mark.slow), 0.1])
def test_tempered_is_within_the_limit(name, limit):
    f = ACTIVATIONS[name]
    np.testing.assert_allclose(nonlinearity(tempered(f, limit)), min(limit, nonlinearity(f)), rtol=1e-3, atol=2e-5)


def test_nonlinearity_is_measured_on_normal_numbers():
    f = tempered(jax.nn.relu, 0.1)
    quantiles = jax.scipy.stats.norm.ppf((jnp.arange(100_000, dtype=jnp.float32) + 0.5) / 100_000)
    stats = activation_stats(f, quantiles)
    np.testing.assert_allclose(stats.slope_sq / stats.var_out - 1, 0.1, atol=1e-3)


@pytest.mark.parametrize("name", ["relu", "swish", "tanh"])
def test_nonlinearity_is_slope_of_correlation_map(name):
    f, c = ACTIVATIONS[name], 0.999
    x, other = jax.random.normal(jax.random.key(0), (2, 1_000_000))
    both = np.asarray([f(x), f(c * x + jnp.sqrt(1 - c**2) * other)], np.float64)
    correlation = np.corrcoef(both)[0, 1]
    # ReLU's map has an infinite second derivative at 1, so that its slope is approached like a root.
    slope = (1 - correlation) / (1 - c)
    np.testing.assert_allclose(slope - 1, nonlinearity(f), atol=0.04 if name == "relu" else 0.01)


def test_linear_and_constant_stay_as_they_are():
    x = jnp.array([-1.0, 2.0])
    for f, expected in ((lambda x: 3 * x, 0.0), (jnp.ones_like, np.inf)):
        np.testing.assert_allclose(nonlinearity(f), expected, atol=1e-5)
        np.testing.assert_allclose(tempered(f, 0.1)(x), f(x))


def test_a_falling_activation_is_made_to_fall_more():
    x = jnp.array([-1.0, 2.0])
    np.testing.assert_allclose(tempered(lambda x: jax.nn.relu(-x), 0.1)(-x), tempered(jax.nn.relu, 0.1)(x), rtol=1e-5)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_limits_that_cannot_be_are_refused(limit):
    with pytest.raises(ValueError, match="positive number, or None"):
        tempered(jax.nn.relu, limit)
    with pytest.raises(ValueError, match="positive number, or None"):
        Standardized(tempering=limit)


def test_traced_parameters_of_f_are_fine():
    def output(beta):
        return tempered(lambda x: x * jax.nn.sigmoid(beta * x), 0.1)(jnp.float32(1.0))

    np.testing.assert_allclose(jax.jit(output)(1.0), tempered(jax.nn.swish, 0.1)(jnp.float32(1.0)), rtol=1e-6)
    assert jnp.isfinite(jax.jit(jax.grad(output))(1.0))


@pytest.mark.parametrize("f", [jax.nn.swish, lambda x: x * jnp.tanh(x)], ids=["named", "lambda"])
def test_kappa_is_a_constant_of_the_program(f):
    program = jax.make_jaxpr(lambda x: tempered(f, 0.1)(x))(jnp.ones(3))
    plain = jax.make_jaxpr(f)(jnp.ones(3))
    assert len(program.eqns) == len(plain.eqns) + 2  # kappa x, and the sum


def test_functions_that_cannot_be_hashed_are_fine():
    class Scaled(list):
        def __call__(self, x):
            return self[0] * jax.nn.relu(x)

    x = jnp.array([-1.0, 2.0])
    np.testing.assert_allclose(tempered(Scaled([3.0]), 0.1)(x), 3 * tempered(jax.nn.relu, 0.1)(x), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_module_normalizes_the_tempered_activation(dtype):
    x = jax.random.normal(jax.random.key(0), (256, 8), dtype)
    form = Standardized(std=1.0, axis=None, tempering=0.1, epsilon=0.0)
    act = NSwish(form=form, use_running_average=False)
    variables = act.init(jax.random.key(1), x)
    prior = gaussian_stats(tempered(jax.nn.swish, 0.1))
    np.testing.assert_allclose(variables["batch_stats"]["var_out"], prior.var_out, rtol=1e-6)
    y, _ = act.apply(variables, x, mutable=["batch_stats"])
    z = jax.nn.swish(x.astype(jnp.float32))
    kappa = tempered(jax.nn.swish, 0.1)(jnp.float32(1.0)) - jax.nn.swish(1.0)
    z = z + kappa * x.astype(jnp.float32)
    expected = (z - z.mean()) / z.std()
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.03 if dtype == jnp.bfloat16 else 1e-4)


def test_no_limit_leaves_the_function_alone():
    assert tempered(jax.nn.relu, None) is jax.nn.relu


def even(x):
    return x * jnp.tanh(x)


def kappa(f, limit=0.1):
    return float(tempered(f, limit).kappa)


def test_tempered_even_function_has_one_sign():
    in_float32 = kappa(even)
    with jax.enable_x64(True):
        np.testing.assert_allclose(in_float32, kappa(even), rtol=1e-5)
    assert in_float32 > 0

    def learned(slope):
        return tempered(lambda x: x * jnp.tanh(slope * x), 0.1).kappa

    slopes = jnp.array([1.0, 1.000001, 1.0001])
    for compute in (learned, jax.jit(learned)):
        np.testing.assert_allclose([compute(slope) for slope in slopes], in_float32, rtol=1e-3)


@pytest.mark.parametrize("limit", [0.1, 0.7, 1.5])
def test_tempered_is_continuous_near_even_functions(limit):
    found = [kappa(lambda x, tilt=tilt: even(x) + tilt * x, limit) for tilt in np.linspace(-0.05, 0.05, 21)]
    assert np.abs(np.diff(found)).max() < 0.02


@pytest.mark.parametrize("name", ["relu", "swish", "softplus", "tanh", "elu"])
@pytest.mark.parametrize("limit", [0.1, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (0.01, 0.7))])
def test_falling_functions_are_tempered_as_rising(name, limit):
    f = ACTIVATIONS[name]
    np.testing.assert_allclose(kappa(lambda x: -f(x), limit), -kappa(f, limit), rtol=1e-5)


def test_tempered_starts_at_zero_beyond_the_limit():
    """A falling function just beyond the limit is hardly changed."""
    nu = float(nonlinearity(jax.nn.swish))
    assert kappa(lambda x: -jax.nn.swish(x), 1.001 * nu) == 0
    assert -0.01 < kappa(lambda x: -jax.nn.swish(x), 0.999 * nu) < 0


def test_tempered_slope_of_a_constant_is_finite():
    gradient = jax.grad(lambda slope: tempered(lambda x: slope * x * jnp.tanh(x), 0.1)(1.0))(0.0)
    assert np.isfinite(gradient)
