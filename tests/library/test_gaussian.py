import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import ACTIVATIONS, activation_stats, gaussian_stats


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-2.0, 3.0)])
def test_equals_float64_oracle(name, mean, std):
    stats = gaussian_stats(ACTIVATIONS[name], mean, std)
    expected = helpers.gaussian_moments(name, mean, std)
    np.testing.assert_allclose((stats.mean_out, stats.var_out, stats.slope_sq), expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose((stats.mean_in, stats.var_in, stats.count), (mean, std**2, 0.0), rtol=1e-6)


def test_relu_has_its_known_moments():
    stats = gaussian_stats(jax.nn.relu)
    known = (1 / np.sqrt(2 * np.pi), 0.5 - 1 / (2 * np.pi), 0.5)
    np.testing.assert_allclose((stats.mean_out, stats.var_out, stats.slope_sq), known, rtol=1e-5)


def test_kink_away_from_zero():
    """Hard tanh jumps in slope at -1 and 1, where no panel is cut."""
    stats = gaussian_stats(lambda x: jnp.clip(x, -1.0, 1.0))
    np.testing.assert_allclose(stats.slope_sq, 0.6826895, atol=2e-3)
    np.testing.assert_allclose(stats.var_out, 0.5160586, atol=1e-3)


def test_many_inputs_at_once():
    mean, std = jnp.array([[0.0, 1.0]]), jnp.array([[1.0], [0.0], [2.0]])
    stats = gaussian_stats(jax.nn.gelu, mean, std)
    chex.assert_shape(list(stats), (3, 2))
    alone = gaussian_stats(jax.nn.gelu, 1.0, 2.0)
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[2, 1], stats), alone, rtol=1e-6)
    assert float(stats.var_in[1, 1]) == 0.0
    np.testing.assert_allclose(stats.var_out[1, 1], 0.0, atol=1e-12)
    np.testing.assert_allclose(stats.mean_out[1, 1], jax.nn.gelu(1.0), rtol=1e-5)


def test_works_while_tracing_and_agrees_with_sampling():
    traced = jax.jit(lambda m, s: gaussian_stats(jax.nn.swish, m, s))(0.3, 1.2)
    x = 0.3 + 1.2 * jax.random.normal(jax.random.key(0), (2**20,))
    chex.assert_trees_all_close(traced[1:], activation_stats(jax.nn.swish, x)[1:], rtol=1e-2)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gaussian_stats(jax.nn.relu, 0.0, -1.0), ValueError, "std must be >= 0, got -1.0"),
        (lambda: gaussian_stats(jax.nn.relu, float("nan")), ValueError, "mean must be finite"),
        (lambda: gaussian_stats(jnp.sum), ValueError, "elementwise"),
        (lambda: gaussian_stats(lambda x: x > 0), TypeError, "floating-point values"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
