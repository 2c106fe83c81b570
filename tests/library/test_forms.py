"""The two forms: options checked when made, one way to say each, factor and shift as written."""

import dataclasses
import pickle

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import anact_jax.linen
import anact_jax.nnx
from anact_jax import ACTIVATIONS, MOMENTS, FactorAndShift, Published, Standardized, Stats, gaussian_stats
from anact_jax.forms import form_of

FORMS = [
    Standardized(),
    Standardized(std=1.3, center=False, tempering=0.1, axis=None, stop_gradient=True, epsilon=0.0),
    Published(),
    Published(center=True, learned=True),
]
LAYERS = [anact_jax.linen.NSwish, anact_jax.nnx.NSwish]
EVERY = gaussian_stats(jax.nn.softplus, mean=0.3, std=1.7)
forms = pytest.mark.parametrize("form", FORMS, ids=["default", "options", "published", "learned"])
layers = pytest.mark.parametrize("layer", LAYERS, ids=["linen", "nnx"])


@forms
def test_form_is_frozen_hashable_and_equal_by_value(form):
    same = type(form)(**dataclasses.asdict(form))
    assert {form: 1}[same] == 1
    assert pickle.loads(pickle.dumps(form)) == form
    assert len({*FORMS, same}) == len(FORMS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        form.epsilon = 1.0


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Standardized(std=0.0), ValueError, "std must be a positive number, such as 1 or 0.5, got 0.0"),
        (lambda: Standardized(std=float("inf")), ValueError, "std must be a positive number"),
        (lambda: Standardized(std=float("nan")), ValueError, "std must be a positive number"),
        (lambda: Standardized(axis=(0, 1)), TypeError, r"axis must be one integer, such as -1, or None .*\(0, 1\)"),
        (lambda: Standardized(axis=True), TypeError, "axis must be one integer"),
        (lambda: Standardized(axis=0.5), TypeError, "axis must be one integer"),
        (lambda: Standardized(tempering=0.0), ValueError, "tempering must be a positive number, or None"),
        (lambda: Standardized(tempering=float("nan")), ValueError, "tempering must be a positive number, or None"),
        (
            lambda: Standardized(epsilon=-1e-6),
            ValueError,
            "epsilon must be a number from 0 on, such as 1e-6, got -1e-06",
        ),
        (lambda: Published(epsilon=float("inf")), ValueError, "epsilon must be a number from 0 on"),
        (lambda: Published(std=1.0), TypeError, "std"),
        (lambda: Standardized(learned=True), TypeError, "learned"),
    ],
)
def test_bad_options_are_refused_when_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_words_name_the_two_forms():
    assert form_of("default") == form_of() == form_of(None) == Standardized()
    assert form_of("published") == Published()
    assert form_of(std=1.0, axis=1) == Standardized(std=1.0, axis=1)
    for form in FORMS:
        assert form_of(form) is form


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        ("defualt", ValueError, "unknown form 'defualt'; expected 'default', 'published', .*Did you mean 'default'"),
        ("mean+center", ValueError, r"unknown form 'mean\+center'"),
        (Standardized, TypeError, r"form must be Standardized\(...\), Published\(...\), 'default' or 'published', got"),
        ({"std": 1.0}, TypeError, "form must be Standardized"),
    ],
)
@layers
def test_unknown_forms_are_refused_when_made(layer, form, error, message):
    for make in (form_of, lambda form: layer(form=form)):
        with pytest.raises(error, match=message):
            make(form)


OPTIONS = {"std": 1.3, "center": False, "axis": None, "tempering": 0.1, "stop_gradient": True}


@layers
def test_layer_options_make_the_form(layer):
    assert layer().form == layer(form="default").form == Standardized()
    assert layer(**OPTIONS).form == Standardized(**OPTIONS)
    assert layer(form=Standardized(std=1.3), std=1.3).form == Standardized(std=1.3)
    assert layer(form="published").form == Published()


@pytest.mark.parametrize("name", OPTIONS)
@layers
def test_options_beside_another_form_are_refused(layer, name):
    for form in ("published", Published(center=True), Standardized(std=0.7)):
        with pytest.raises(ValueError, match=rf"{name}=.* beside form=.*give the options to the form"):
            layer(form=form, **{name: OPTIONS[name]})


@forms
def test_linen_copies_keep_the_form(form):
    layer = anact_jax.linen.NSwish(form=form)
    for copied in (layer.clone(), layer.copy(momentum=0.5), layer.clone(parent=None)):
        assert copied.form == form
    assert anact_jax.linen.NSwish(std=1.3, axis=None).clone().form == Standardized(std=1.3, axis=None)
    assert layer.clone() == layer


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("center", [True, False])
def test_standardized_equals_float64_oracle(name, center):
    with jax.enable_x64(True):
        x = 0.4 + 1.7 * np.random.default_rng(3).standard_normal((500, 3))
        values = helpers.stats(name, x, axes=0)
        for options in ({}, {"std": 1.3, "epsilon": 0.0}):
            expected = helpers.standardized(values, center=center, **options)
            actual = Standardized(center=center, **options).factor_and_shift(Stats(*map(jnp.asarray, values)))
            np.testing.assert_allclose(actual, expected, rtol=1e-12)


EXTREMES = [0.0, 1e-45, 1e-30, 1.0, 1e30, 3e38]


@pytest.mark.parametrize("center", [True, False])
def test_standardized_is_finite_for_finite_stats(center):
    mean, variance = map(jnp.asarray, np.meshgrid(np.float32([-1e15, 0.0, 1.0, 1e15]), np.float32(EXTREMES)))
    form, stats = Standardized(center=center, epsilon=0.0), Stats(jnp.ones_like(mean), mean_out=mean, var_out=variance)
    chex.assert_tree_all_finite(form.factor_and_shift(stats))
    for output in (0, 1):
        gradient = jax.grad(
            lambda mean, variance, output=output: jnp.sum(
                form.factor_and_shift(stats._replace(mean_out=mean, var_out=variance))[output]
            ),
            (0, 1),
        )(jnp.float32([0.0, 2.0]), jnp.float32([0.0, 0.0]))
        assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_constant_channel_has_the_factor_std():
    stats = Stats(jnp.float32(9), mean_out=jnp.float32(3.0), var_out=jnp.float32(0.0))
    assert Standardized(epsilon=0.0).factor_and_shift(stats) == (0.5, 3.0)
    dead = stats._replace(mean_out=jnp.float32(0.0))
    assert Standardized(center=False).factor_and_shift(dead) == (0.5, 0.0)


@pytest.mark.parametrize("center", [True, False])
def test_gradients_against_finite_differences(center):
    form = Standardized(center=center, epsilon=0.01)
    with jax.enable_x64(True):
        mean, variance = jnp.asarray(0.35), jnp.asarray(0.4)
        check_grads(
            lambda *values: tuple(form.factor_and_shift(Stats(jnp.ones(()), None, None, *map(jnp.asarray, values)))),
            (mean, variance),
            order=2,
            modes=("fwd", "rev"),
        )


@forms
def test_moments_are_those_the_form_uses(form):
    some = Stats(EVERY.count, **{name: getattr(EVERY, name) for name in form.moments})
    expected = form.factor_and_shift(EVERY)
    assert isinstance(expected, FactorAndShift)
    chex.assert_trees_all_equal(form.factor_and_shift(some), expected)
    for name in form.moments:
        if name != "mean_in":  # the variance is about it
            moved = form.factor_and_shift(some._replace(**{name: 1.5 * getattr(some, name)}))
            assert any(np.any(a != b) for a, b in zip(moved, expected, strict=True)), name
        with pytest.raises(ValueError, match=rf"the statistics have no {name}; measure them on a batch"):
            form.factor_and_shift(some._replace(**{name: None}))
    assert set(form.moments) <= set(MOMENTS)


@pytest.mark.parametrize("form", [Standardized(), Published()], ids=["default", "published"])
def test_alpha_of_another_form_is_refused(form):
    with pytest.raises(ValueError, match=r"alpha belongs to Published\(learned=True\), not to"):
        form.factor_and_shift(EVERY, jnp.float32(0.7))


def test_std_multiplies_the_factor_alone():
    factor, shift = Standardized(std=1.0).factor_and_shift(EVERY)
    half = Standardized(std=0.5).factor_and_shift(EVERY)
    chex.assert_trees_all_close(half, FactorAndShift(0.5 * factor, shift), rtol=1e-6)


def test_activation_is_what_the_form_normalizes():
    assert Published().activation(jax.nn.relu) is Standardized().activation(jax.nn.relu) is jax.nn.relu
    x = jnp.array([-1.0, 2.0])
    expected = anact_jax.tempered(jax.nn.relu, 0.1)(x)
    np.testing.assert_array_equal(Standardized(tempering=0.1).activation(jax.nn.relu)(x), expected)
