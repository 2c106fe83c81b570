"""The options in one object: checked, hashable, and as text."""

import dataclasses
import itertools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from anact_jax import (
    DEFAULT,
    MOMENTS,
    PUBLISHED,
    REFERENCES,
    RULES,
    Form,
    Normalization,
    Stats,
    gaussian_stats,
    normalization,
)

positive = st.floats(1e-9, 1e9)
axes = st.lists(st.integers(-4, 4), max_size=3, unique=True).map(tuple)
options = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(RULES),
        "center": st.booleans(),
        "reference": st.sampled_from(REFERENCES),
        "nonlinearity": st.none() | positive,
        "feature_axes": axes,
        "stop_gradient": st.booleans(),
        "learned": st.booleans(),
        "epsilon": st.just(0.0) | positive,
        "level": st.just(1.0) | positive,
    }
)


@given(options)
def test_text_says_all_options(options):
    form = Form(**options)
    assert Form.parse(str(form)) == form


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("mean", {}),
        ("exact+center", {"rule": "exact", "center": True}),
        ("forward+unit+diff", {"rule": "forward", "reference": "unit", "stop_gradient": False}),
        ("mean+feature+nu0.05", {"feature_axes": (-1,), "nonlinearity": 0.05}),
        ("mean+axes0,-1+learned", {"feature_axes": (0, -1), "learned": True}),
        ("geometric+eps1e-05", {"rule": "geometric", "epsilon": 1e-5}),
        ("mean+eps0.0+axes2", {"epsilon": 0.0, "feature_axes": (2,)}),
        ("forward+unit+level0.5", {"rule": "forward", "reference": "unit", "level": 0.5}),
    ],
)
def test_text_keeps_its_meaning_whatever_the_default(text, options):
    bare = Form("mean", False, "input", None, (), True, False, 1e-6, 1.0)
    assert Form.parse(text) == dataclasses.replace(bare, **options)


def test_names_are_input_only():
    assert Form.parse("published") is Published()
    assert Form.parse("default") is Standardized()
    assert (str(Published()), str(Standardized())) == ("mean", "forward+center+unit+diff+feature+level0.5")
    assert Form() == Standardized()


@pytest.mark.usefixtures("unchecked_types")
def test_is_frozen_hashable_and_equal_by_value():
    form = Standardized().replace(feature_axes=[np.int64(0), -1])
    assert form.feature_axes == (0, -1)
    assert {form: 1}[Form(feature_axes=(0, -1))] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        form.rule = "exact"
    assert Form(axis=-1) == Standardized()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "median"}, ValueError, "unknown rule 'median'; expected one of mean, forward"),
        ({"reference": "output"}, ValueError, "unknown reference 'output'; expected one of input, unit"),
        ({"nonlinearity": 0.0}, ValueError, "positive number, or None"),
        ({"nonlinearity": float("nan")}, ValueError, "positive number, or None"),
        ({"epsilon": -1e-6}, ValueError, "epsilon must be a number from 0 on, such as 1e-6, got -1e-06"),
        ({"epsilon": float("inf")}, ValueError, "epsilon must be a number"),
        ({"feature_axes": 0.5}, TypeError, r"must be an integer or integers, such as -1 or \(\), got 0.5"),
        ({"feature_axes": (1, 1)}, ValueError, r"\(1, 1\) name the same axis twice"),
        ({"level": 0.0}, ValueError, "level must be a positive number, such as 1 or 0.5, got 0.0"),
        ({"strength": 1}, TypeError, "strength"),
    ],
)
def test_bad_options_are_refused_when_made(options, error, message):
    with pytest.raises(error, match=message):
        Standardized(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown form ''; expected 'published', 'default', or a rule"),
        ("defualt", "Did you mean 'default'"),
        ("center", "unknown form 'center'"),
        ("mean+ceter", "unknown part 'ceter' of form 'mean.ceter'; expected one of center, unit, diff"),
        ("mean+nuhuge", "unknown part 'nuhuge'"),
        ("mean+nu-1", "nonlinearity must be a positive number"),
        ("mean+center+center", "sets center twice"),
        ("mean+feature+axes0", "sets feature_axes twice"),
        ("mean+axes1.5", "unknown part 'axes1.5'"),
    ],
)
def test_bad_text_is_refused_with_what_there_is(text, message):
    with pytest.raises(ValueError, match=message):
        Form.parse(text)


@pytest.mark.parametrize("text", ["published", "default", "default learned"])
def test_level_multiplies_the_factor_alone(text):
    name, *learned = text.split()
    form = Form.parse(name).replace(learned=bool(learned))
    alpha = jnp.float32(0.4) if learned else None
    stats = gaussian_stats(jax.nn.softplus, mean=0.3, std=1.7)
    factor, shift = normalization(stats, form.replace(level=1.0), alpha=alpha)
    half = normalization(stats, form.replace(level=0.5), alpha=alpha)
    chex.assert_trees_all_close(half, Normalization(0.5 * factor, shift), rtol=1e-6)


@pytest.mark.parametrize(("rule", "reference"), list(itertools.product(RULES, REFERENCES)))
def test_moments_are_those_that_normalization_uses(rule, reference):
    form = Form(rule, reference=reference)
    every = gaussian_stats(jax.nn.softplus, mean=0.3, std=1.7)
    some = Stats(every.count, **{name: getattr(every, name) for name in form.moments})
    expected = form.factor_and_shift(every)
    chex.assert_trees_all_equal(form.factor_and_shift(some), expected)
    for name in form.moments:
        # The variance is about the mean of x; the backward gain asks only whether f varies.
        if name != "mean_in" and (rule, name) != ("backward", "var_out"):
            moved = normalization(some._replace(**{name: 1.5 * getattr(some, name)}), form)
            assert any(np.any(a != b) for a, b in zip(moved, expected, strict=True)), name
        with pytest.raises(ValueError, match=rf"no {name}, which form {str(form).replace('+', '.')} uses"):
            normalization(some._replace(**{name: None}), form)
    assert set(form.moments) <= set(MOMENTS)
