"""The paper's rule and the gains that it balances."""

import itertools

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from anact_jax import ACTIVATIONS, Published, Stats, activation_stats, gains, gaussian_stats

NAMED = ["relu", "leaky_relu", "elu", "tanh", "sigmoid", "softplus", "swish", "gelu", "mish"]
BOTH = pytest.mark.parametrize("center", [False, True])


def make_stats(*values):
    return Stats(*(jnp.asarray(value, jnp.float32) for value in values))


@pytest.mark.parametrize("name", ACTIVATIONS)
@BOTH
def test_equals_float64_oracle(name, center):
    x = (0.4 + 1.7 * np.random.default_rng(3).standard_normal(5000)).astype(np.float32)
    values, stats = helpers.stats(name, x), activation_stats(ACTIVATIONS[name], jnp.asarray(x))
    for epsilon in (0.0, 1e-2):
        expected = helpers.published(values, center, epsilon)
        actual = Published(center=center, epsilon=epsilon).factor_and_shift(stats)
        np.testing.assert_allclose(actual, expected, rtol=3e-5, atol=1e-6)
    with jax.enable_x64(True):
        actual = Published(center=center).factor_and_shift(Stats(*map(jnp.asarray, values)))
        np.testing.assert_allclose(actual, helpers.published(values, center), rtol=1e-12)


@pytest.mark.parametrize("name", NAMED)
@BOTH
def test_gains_equal_the_oracle(name, center):
    mean_out, var_out, slope_sq = helpers.gaussian_moments(name, 0.7, 1.5)
    stats = gaussian_stats(ACTIVATIONS[name], 0.7, 1.5)
    found = gains(stats, shift=stats.mean_out if center else 0.0)
    expected = ((var_out + (0 if center else mean_out**2)) / 1.5**2, slope_sq)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("name", NAMED)
@BOTH
def test_gains_after_it_balance_under_normal_input(name, center):
    """The squared factor is the mean of those that keep signals and gradients: 1 = (1/gain + 1/gain') / 2."""
    stats = gaussian_stats(ACTIVATIONS[name])
    factor, shift = Published(center=center, epsilon=0.0).factor_and_shift(stats)
    after = [float(factor**2 * gain) for gain in gains(stats, shift=shift)]
    assert np.mean(1 / np.array(after)) == pytest.approx(1, abs=1e-5)


def test_relu_comes_out_as_he():
    np.testing.assert_allclose(Published().factor_and_shift(gaussian_stats(jax.nn.relu)), (np.sqrt(2), 0), atol=1e-3)


EXTREMES = [0.0, 1e-45, 1e-30, 1.0, 1e30, 3e38]


@BOTH
def test_finite_for_any_finite_stats(center):
    grid = np.array(list(itertools.product(EXTREMES, [-1e15, 0.0, 1.0, 1e15], EXTREMES, EXTREMES)), np.float32)
    var_in, mean_out, var_out, slope_sq = (jnp.asarray(column) for column in grid.T)
    stats = Stats(jnp.full_like(var_in, 9), mean_out, var_in, mean_out, var_out, slope_sq)
    chex.assert_tree_all_finite(Published(center=center, epsilon=0.0).factor_and_shift(stats))
    chex.assert_tree_all_finite(gains(stats))


def test_a_gain_of_zero_leaves_the_other_to_decide():
    form = Published(epsilon=0.0)
    dead = make_stats(9, -3, 1, 0, 0, 0)
    chex.assert_trees_all_equal(form.factor_and_shift(dead).factor, jnp.float32(1))
    flat = make_stats(9, 0, 1, 0, 0.25, 0)  # a step function: forward gain 1/4, backward gain 0
    np.testing.assert_allclose(form.factor_and_shift(flat).factor, 2.0)


def test_input_without_variance_has_gain_one():
    assert gains(make_stats(9, 2, 0, 1, 0, 0.5)) == (1.0, 0.5)


@BOTH
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_gradients_against_finite_differences(center, epsilon):
    form = Published(center=center, epsilon=epsilon)
    with jax.enable_x64(True):
        stats = [jnp.asarray(value) for value in (0.1, 1.3, 0.35, 0.4, 0.6)]

        def f(*values):
            return tuple(form.factor_and_shift(Stats(jnp.ones(()), *map(jnp.asarray, values))))

        check_grads(f, stats, order=1, modes=("fwd", "rev"))


def test_gradients_are_finite_at_degenerate_points():
    form = Published(epsilon=0.0)
    for values in [(9, 0, 0, 0, 0, 0), (9, 0, 1, 0, 0, 0), (9, 0, 1, 0, 1, 1), (9, 2, 0, 1, 0, 1)]:
        stats = make_stats(*values)
        for output in (0, 1):
            gradient = jax.grad(lambda s, i=output: form.factor_and_shift(s)[i])(stats)
            chex.assert_tree_all_finite(gradient)


def test_gains_name_a_missing_moment():
    with pytest.raises(ValueError, match="the statistics have no var_in, slope_sq; measure them on a batch"):
        gains(Stats(jnp.ones(()), mean_out=jnp.ones(()), var_out=jnp.ones(())))


def test_alpha_adds_a_bounded_correction():
    stats, learned = gaussian_stats(jax.nn.relu), Published(learned=True)
    plain = Published().factor_and_shift(stats)
    chex.assert_trees_all_equal(learned.factor_and_shift(stats), plain)
    for alpha in (0.7, -100.0):
        factor, shift = learned.factor_and_shift(stats, jnp.float32(alpha))
        np.testing.assert_allclose(factor, plain.factor + 0.3 * np.tanh(alpha), rtol=1e-6)
        chex.assert_trees_all_equal(shift, plain.shift)
