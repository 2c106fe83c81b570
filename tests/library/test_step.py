import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.test_util import check_grads

from anact_jax import (
    ACTIVATIONS,
    Published,
    Standardized,
    activation_stats,
    anact,
    gaussian_stats,
    initial_stats,
    normalize,
)

PRIOR = gaussian_stats(jax.nn.swish)
FORM = Published()
CENTERED = Published(center=True)
WHOLE = Standardized(axis=None)
CONSTANT = Standardized(axis=None, stop_gradient=True)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(seed=0, shape=(64, 8), mean=0.0, std=1.0):
    return mean + std * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_is_factor_times_shifted_activation(name):
    x, f = normal(), ACTIVATIONS[name]
    np.testing.assert_allclose(normalize(f, x, 1.7, 0.2), 1.7 * (f(x) - 0.2), rtol=1e-6, atol=1e-7)
    factor, shift = jnp.linspace(1.0, 2.0, 8), jnp.linspace(-1.0, 1.0, 8)
    expected = factor[None] * (f(x) - shift[None])
    np.testing.assert_allclose(normalize(f, x, factor, shift), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_has_the_dtype_of_the_input(dtype):
    chex.assert_type(normalize(jax.nn.swish, normal().astype(dtype), jnp.float32(1.5), 0.1), dtype)


def test_gradients_in_x_factor_and_shift():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(6))
        f = functools.partial(normalize, jnp.tanh)
        check_grads(lambda *a: f(*map(jnp.asarray, a)), (x, 1.3, 0.2), order=2, modes=("fwd", "rev"))


def full_size_residuals(f, x, capsys):
    """What JAX says it saves of x's size between the forward and the backward pass."""
    capsys.readouterr()
    print_saved_residuals(f, x)
    shape = f"[{','.join(map(str, x.shape))}]"
    return [line for line in capsys.readouterr().out.splitlines() if shape in line]


@pytest.mark.parametrize(
    "name", ["swish", "relu", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gelu", "mish"))]
)
@pytest.mark.parametrize(
    "form", [Standardized(), WHOLE, CONSTANT, CENTERED], ids=["default", "one a layer", "constants", "published"]
)
def test_nothing_full_size_is_saved_but_x(name, form, capsys):
    """Normalized activations saved an extra tensor elsewhere (inplace_abn#133)."""
    f, x = ACTIVATIONS[name], normal()
    running = initial_stats(f, form)

    def loss(x):
        y, _ = anact(f, x, running, form)
        return jnp.sum(y)

    saved = full_size_residuals(loss, x, capsys)
    assert saved, "x itself must be listed, or the accounting is not read rightly"
    assert all("from the argument x" in line for line in saved), saved
    # The accounting would show a full-size tensor: the same without rematerialization saves one.
    naive = full_size_residuals(lambda x: jnp.sum(jax.nn.swish(x) * jnp.std(x)), x, capsys)
    assert any("from the argument x" not in line for line in naive)


@pytest.mark.parametrize("use_running_average", [True, False])
@pytest.mark.parametrize("update", [True, False])
def test_using_and_updating_are_independent(use_running_average, update):
    """Using the running statistics was tied to updating them elsewhere (pytorch#66073)."""
    x = normal(mean=0.5, std=3.0)
    batch = activation_stats(jax.nn.swish, x)
    y, running = anact(jax.nn.swish, x, PRIOR, FORM, use_running_average=use_running_average, update=update)
    factor, shift = FORM.factor_and_shift(PRIOR if use_running_average else batch)
    np.testing.assert_allclose(y, factor * (jax.nn.swish(x) - shift), rtol=1e-5, atol=1e-6)
    assert float(running.count) == update
    np.testing.assert_allclose(running.var_in, (batch if update else PRIOR).var_in)


def test_mode_decides_the_update_by_default():
    x = normal()
    assert float(anact(jax.nn.swish, x, PRIOR, FORM)[1].count) == 1
    assert float(anact(jax.nn.swish, x, PRIOR, FORM, use_running_average=True)[1].count) == 0


@pytest.mark.parametrize("name", ["relu", "swish", "tanh", "softplus"])
def test_output_has_the_deviation_of_the_form(name):
    x, f, form = normal(shape=(4000, 8), std=2.0), ACTIVATIONS[name], Standardized(std=0.7)
    y, _ = anact(f, x, initial_stats(f, form), form)
    np.testing.assert_allclose(jnp.std(y, 0), 0.7, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(y, 0), 0, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "swish", "tanh", "softplus"])
def test_published_balances_the_gains(name):
    x, f = normal(shape=(4000, 8), std=2.0), ACTIVATIONS[name]
    y, _ = anact(f, x, gaussian_stats(f), CENTERED)
    forward, slope_sq = jnp.var(y) / jnp.var(x), activation_stats(f, x).slope_sq
    backward = slope_sq * jnp.var(y) / jnp.var(f(x))
    np.testing.assert_allclose((1 / forward + 1 / backward) / 2, 1, rtol=1e-4)


def test_identical_batches_inference_is_training():
    x, running = normal(mean=1.0), PRIOR
    for _ in range(20):
        trained, running = anact(jax.nn.swish, x, running, CENTERED, momentum=0.99)
        evaluated, same = anact(jax.nn.swish, x, running, CENTERED, use_running_average=True)
        chex.assert_trees_all_equal(same, running)
        np.testing.assert_allclose(trained, evaluated, rtol=1e-5, atol=1e-6)


def degenerate_batches(dtype):
    good = normal().astype(dtype)
    yield "zero", jnp.zeros_like(good)
    yield "constant", jnp.full_like(good, 3)
    yield "all negative", -5 - jnp.abs(good)
    yield "one element", good[:1, :1]
    yield "none", good[:0]
    yield "inf", good.at[3, 2].set(jnp.inf)
    yield "minus inf", good.at[3, 2].set(-jnp.inf)
    yield "nan", good.at[3, 2].set(jnp.nan)
    yield "offset", good + jnp.asarray(1e4, dtype)


FAST = [
    *((name, jnp.float32, WHOLE) for name in ("relu", "swish", "tanh", "gelu")),
    *[("swish", jnp.float32, CENTERED), ("relu", jnp.bfloat16, WHOLE), ("swish", jnp.float16, WHOLE)],
]
ALL = list(itertools.product(("relu", "swish", "tanh", "gelu"), DTYPES, (WHOLE, CONSTANT, CENTERED)))


@pytest.mark.filterwarnings("ignore:a batch of one value")
@pytest.mark.parametrize(
    ("name", "dtype", "form"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FAST)],
)
def test_degenerate_batches(name, dtype, form):
    """Degenerate batches gave NaN elsewhere (flax#1491, equinox#1010)."""
    f = ACTIVATIONS[name]
    good = normal(seed=1).astype(dtype)

    @jax.jit
    def step(x, running):
        def loss(x):
            y, new = anact(f, x, running, form)
            finite = jnp.isfinite(y)
            return jnp.sum(jnp.where(finite, y, 0), dtype=jnp.float32), (y, new)

        return jax.grad(loss, has_aux=True)(x)

    _, (_, running) = step(good, initial_stats(f, form))
    for case, x in degenerate_batches(dtype):
        gradient, (y, after) = step(x, running)
        finite_in = np.isfinite(np.asarray(x, np.float32))
        assert np.isfinite(np.asarray(y, np.float32)[finite_in]).all(), case
        assert np.isfinite(np.asarray(gradient, np.float32)[finite_in]).all(), case
        chex.assert_tree_all_finite(after)
        if case in ("zero", "constant", "one element", "none", "inf", "minus inf", "nan"):
            chex.assert_trees_all_equal(after, running)
    chex.assert_tree_all_finite(step(good, running)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bfloat16_factor_within_a_percent_of_float32(name):
    f, x = ACTIVATIONS[name], normal(shape=(512, 64))
    wide, narrow = (
        FORM.factor_and_shift(activation_stats(f, x.astype(dtype))) for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_allclose(narrow.factor, wide.factor, rtol=1e-2)


def test_masked_elements_are_normalized_only():
    x, mask = normal(shape=(6, 5, 4)), jnp.arange(5)[None, :, None] < 3
    y, running = anact(jax.nn.swish, x, PRIOR, FORM, mask=mask)
    valid, alone = anact(jax.nn.swish, x[:, :3], PRIOR, FORM)
    chex.assert_trees_all_close(running, alone, rtol=1e-6)
    np.testing.assert_allclose(y[:, :3], valid, rtol=1e-6)
    factor, _ = FORM.factor_and_shift(activation_stats(jax.nn.swish, x[:, :3]))
    np.testing.assert_allclose(y[:, 3:], factor * jax.nn.swish(x[:, 3:]), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_feature_equals_each_feature_alone(axis):
    x = normal(shape=(5, 6, 7), mean=0.3)
    form = Standardized(axis=axis)
    y, new = anact(jax.nn.swish, x, initial_stats(jax.nn.swish, form, (x.shape[axis],)), form)
    for position in range(x.shape[axis]):
        y_alone, new_alone = anact(jax.nn.swish, jnp.take(x, position, axis), PRIOR, WHOLE)
        np.testing.assert_allclose(jnp.take(y, position, axis), y_alone, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(jax.tree.map(lambda v, i=position: v[i], new), new_alone, rtol=1e-5, atol=1e-6)


def test_state_carries_no_gradient():
    def count_on_state(x):
        _, running = anact(jax.nn.swish, x, PRIOR, WHOLE)
        return running.mean_out + running.var_out

    chex.assert_trees_all_equal(jax.grad(count_on_state)(normal()), jnp.zeros((64, 8)))


def test_stop_gradient_holds_the_factor():
    x = normal()

    def loss(x, form):
        y, _ = anact(jax.nn.swish, x, PRIOR, form)
        return jnp.sum(y**3)

    def by_hand(x, form):
        stats = activation_stats(jax.nn.swish, jax.lax.stop_gradient(x) if form.stop_gradient else x)
        factor, shift = form.factor_and_shift(stats)
        return jnp.sum((factor * (jax.nn.swish(x) - shift)) ** 3)

    gradients = []
    for form in (FORM, WHOLE, CONSTANT):
        actual, expected = jax.grad(loss)(x, form), jax.grad(by_hand)(x, form)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
        gradients.append(actual)
    assert np.abs(gradients[1] - gradients[2]).max() > 0.1


def test_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"running has statistics of shape \(5,\), but its input has \(8,\) features"):
        anact(jax.nn.swish, normal(), initial_stats(jax.nn.swish, shape=(5,)))


def test_integers_are_refused():
    with pytest.raises(TypeError):
        normalize(jax.nn.relu, jnp.arange(3), 1.0)
