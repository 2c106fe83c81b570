import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.test_util import check_grads

from anact_jax import (
    ACTIVATIONS,
    PUBLISHED,
    REFERENCES,
    RULES,
    Stats,
    activation_stats,
    gains,
    gaussian_stats,
    normalization,
)

PLAIN = Published(epsilon=0.0)
ALL_OPTIONS = list(itertools.product(RULES, (False, True), REFERENCES))
NAMED = ["relu", "leaky_relu", "elu", "tanh", "sigmoid", "softplus", "swish", "gelu", "mish"]


def make_stats(*values):
    return Stats(*(jnp.asarray(value, jnp.float32) for value in values))


def gains_after(stats, form):
    factor, shift = form.factor_and_shift(stats)
    return [float(factor**2 * gain) for gain in gains(stats, shift=shift)]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("rule", "center", "reference"), ALL_OPTIONS)
def test_equals_float64_oracle(name, rule, center, reference):
    x = (0.4 + 1.7 * np.random.default_rng(3).standard_normal(5000)).astype(np.float32)
    expected = oracles.factor_and_shift(oracles.stats(name, x), rule, center, reference)
    stats = activation_stats(ACTIVATIONS[name], jnp.asarray(x))
    actual = normalization(stats, PLAIN.replace(rule=rule, center=center, reference=reference))
    # `exact` takes the root of a difference, which vanishes for ReLU-like activations.
    np.testing.assert_allclose(actual, expected, rtol=3e-5, atol=1e-3 if rule == "exact" else 1e-6)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("center", [False, True])
def test_rules_do_what_they_say_under_normal_input(name, center):
    stats = gaussian_stats(ACTIVATIONS[name])
    for_rule = {rule: gains_after(stats, PLAIN.replace(rule=rule, center=center)) for rule in RULES}
    assert for_rule["forward"][0] == pytest.approx(1, abs=1e-5)
    assert for_rule["backward"][1] == pytest.approx(1, abs=1e-5)
    assert np.prod(for_rule["geometric"]) == pytest.approx(1, abs=1e-5)
    assert np.mean(for_rule["harmonic"]) == pytest.approx(1, abs=1e-5)
    # `mean` averages the factors of the other two: 1 = 2 / (1/gain + 1/gain').
    assert np.mean(1 / np.array(for_rule["mean"])) == pytest.approx(1, abs=1e-5)
    assert for_rule["exact"] == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_unit_reference_gives_the_variance_of_standardized_input(rule):
    x = 7.0 * jax.random.normal(jax.random.key(0), (1000,))
    stats = activation_stats(jax.nn.relu, x)  # scales with its input, so gains do not depend on the level
    on_input = normalization(stats, PLAIN.replace(rule=rule))
    on_unit = normalization(stats, PLAIN.replace(rule=rule, reference="unit"))
    np.testing.assert_allclose(on_unit.factor, on_input.factor / jnp.std(x), rtol=1e-5)
    np.testing.assert_allclose(on_unit.shift, on_input.shift)


def test_relu_comes_out_as_he():
    factor, shift = normalization(gaussian_stats(jax.nn.relu), PLAIN.replace(rule="exact"))
    np.testing.assert_allclose((factor, shift), (np.sqrt(2), 0), atol=1e-3)


def test_exact_takes_the_mean_where_a_batch_breaks_the_inequality():
    stats = make_stats(10, 0, 1, 0.5, 2.0, 1.0)  # Var[f] = 2 > rho' Var[x] = 1
    factor, shift = normalization(stats, PLAIN.replace(rule="exact"))
    assert (float(factor), float(shift)) == (1.0, 0.5)


@pytest.mark.parametrize(("mean_out", "expected"), [(0.3, -0.1), (-0.3, 0.1), (0.0, -0.4)])
def test_exact_shifts_on_the_side_nearer_zero(mean_out, expected):
    stats = make_stats(10, 0, 1, mean_out, 0.84, 1.0)
    np.testing.assert_allclose(normalization(stats, PLAIN.replace(rule="exact")).shift, expected, rtol=1e-5)


EXTREMES = [0.0, 1e-45, 1e-30, 1.0, 1e30, 3e38]


@pytest.mark.parametrize(("rule", "center", "reference"), ALL_OPTIONS)
def test_finite_for_any_finite_stats(rule, center, reference):
    grid = np.array(list(itertools.product(EXTREMES, [-1e15, 0.0, 1.0, 1e15], EXTREMES, EXTREMES)), np.float32)
    var_in, mean_out, var_out, slope_sq = (jnp.asarray(column) for column in grid.T)
    stats = Stats(jnp.full_like(var_in, 9), mean_out, var_in, mean_out, var_out, slope_sq)
    chex.assert_tree_all_finite(normalization(stats, PLAIN.replace(rule=rule, center=center, reference=reference)))
    chex.assert_tree_all_finite(gains(stats))


@pytest.mark.parametrize("rule", RULES)
def test_a_gain_of_zero_leaves_the_other_to_decide(rule):
    dead = make_stats(9, -3, 1, 0, 0, 0)
    chex.assert_trees_all_equal(normalization(dead, PLAIN.replace(rule=rule)).factor, jnp.float32(1))
    flat = make_stats(9, 0, 1, 0, 0.25, 0)  # a step function: forward gain 1/4, backward gain 0
    np.testing.assert_allclose(normalization(flat, PLAIN.replace(rule=rule)).factor, 2.0)


@pytest.mark.parametrize("epsilon", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("rule", "center", "reference"), ALL_OPTIONS)
def test_gradients_against_finite_differences(rule, center, reference, epsilon):
    with jax.enable_x64(True):
        stats = [jnp.asarray(value) for value in (0.1, 1.3, 0.35, 0.4, 0.6)]
        form = Published(rule=rule, center=center, reference=reference, epsilon=epsilon)

        def f(*values):
            return tuple(normalization(Stats(jnp.ones(()), *map(jnp.asarray, values)), form))

        check_grads(f, stats, order=1, modes=("fwd", "rev"))


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_finite_at_degenerate_points(rule):
    form = PLAIN.replace(rule=rule, reference="unit")
    for values in [(9, 0, 0, 0, 0, 0), (9, 0, 1, 0, 0, 0), (9, 0, 1, 0, 1, 1), (9, 2, 0, 1, 0, 1)]:
        stats = make_stats(*values)
        for output in (0, 1):
            gradient = jax.grad(lambda s, i=output: form.factor_and_shift(s)[i])(stats)
            chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize(("rule", "center", "reference"), ALL_OPTIONS)
def test_epsilon_is_added_to_both_variances_and_the_slope(rule, center, reference):
    values = (0.1, 0.02, 0.35, 0.004, 0.06)
    form = Published(rule=rule, center=center, reference=reference, epsilon=0.01)
    factor, shift = normalization(make_stats(1, *values), form)
    mean_in, var_in, mean_out, var_out, slope_sq = values
    del mean_in
    shift_without = normalization(make_stats(1, *values), form.replace(epsilon=0.0)).shift
    np.testing.assert_allclose(shift, shift_without, rtol=1e-6)
    square = var_out + (mean_out - float(shift)) ** 2 + 0.01
    forward, backward = (var_in + 0.01) / square, 1 / (slope_sq + 0.01)
    squared = {
        "mean": (forward + backward) / 2,
        "forward": forward,
        "backward": backward,
        "geometric": np.sqrt(forward * backward),
        "harmonic": 2 / (1 / forward + 1 / backward),
        "exact": backward,
    }[rule]
    # Of input that a form does not measure, the variance counts as 1.
    of_input = var_in + 0.01 if "var_in" in form.moments else 1.0
    if "var_in" not in form.moments and rule == "forward":
        squared = 1 / square
    expected = np.sqrt(squared / (of_input if reference == "unit" else 1.0))
    np.testing.assert_allclose(factor, expected, rtol=1e-5)


def test_alpha_adds_a_bounded_correction_and_belongs_to_learned_forms():
    stats, learned = gaussian_stats(jax.nn.relu), Published(learned=True)
    plain, alpha = normalization(stats, Published()), jnp.float32(0.7)
    chex.assert_trees_all_equal(normalization(stats, learned), plain)
    factor, shift = normalization(stats, learned, alpha=alpha)
    np.testing.assert_allclose(factor, plain.factor + 0.3 * np.tanh(0.7), rtol=1e-6)
    chex.assert_trees_all_equal(shift, plain.shift)
    with pytest.raises(ValueError, match=r"alpha belongs to a learned form, and mean is none"):
        normalization(stats, PUBLISHED, alpha=alpha)
