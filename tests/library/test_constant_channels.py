"""Channels that hardly vary, and elements that are not finite: nothing is blown up, nothing spreads."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import anact_jax.nnx
from anact_jax import Published, Standardized, anact, initial_stats
from anact_jax.linen import NSwish

TEMPERED = Standardized(std=1.0, tempering=0.1)
FORMS = {
    "default": Standardized(),
    "tempered": TEMPERED,
    "uncentered": Standardized(center=False),
    "published": Published(),
    "published centered": Published(center=True),
}


def forms(*names):
    return pytest.mark.parametrize("form", [FORMS[name] for name in names], ids=names)


DEVIATIONS = jnp.array([10.0**-power for power in range(1, 9)])


def of_linen(form):
    layer = NSwish(form=form, use_running_average=False)
    variables = layer.init(jax.random.key(0), jnp.ones((2, len(DEVIATIONS))))
    return lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0]


def of_nnx(form):
    return lambda x: anact_jax.nnx.NSwish(len(DEVIATIONS), form=form)(x, use_running_average=False)


def batch_norm(x):
    layer = nn.BatchNorm(use_running_average=False, epsilon=1e-5)
    variables = layer.init(jax.random.key(0), x)
    return nn.swish(layer.apply(variables, x, mutable=["batch_stats"])[0])


def largest_gradients(layer, x):
    return jnp.max(jnp.abs(jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(3 * layer(x)))))(x)), axis=0)


@forms("default", "tempered")
@pytest.mark.parametrize("make", [of_linen, of_nnx])
def test_nearly_constant_channels_gradient(make, form):
    x = 1 + DEVIATIONS[None] * jax.random.normal(jax.random.key(0), (256, len(DEVIATIONS)))
    ours, theirs = largest_gradients(make(form), x), largest_gradients(batch_norm, x)
    assert np.isfinite(ours).all()
    assert ours.max() <= 10 * theirs.max()


@forms(*FORMS)
def test_epsilon_does_not_change_input_that_varies(form):
    x = jnp.sqrt(0.1) * jax.random.normal(jax.random.key(0), (4096, 4)) + jnp.array([[-1.0, 0.0, 1.0, 3.0]])
    x = x * jnp.sqrt(0.1 / jnp.var(x, 0, keepdims=True))
    with_it, without = (
        anact(jax.nn.softplus, x, initial_stats(jax.nn.softplus, each), each)[0]
        for each in (form, dataclasses.replace(form, epsilon=0.0))
    )
    assert np.abs(with_it - without).max() <= 1e-4 * np.abs(without).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@forms("default", "tempered", "uncentered")
def test_constant_but_for_rounding_is_constant(form, dtype):
    good = jax.random.normal(jax.random.key(0), (64, 2))
    ulp = float(jnp.finfo(dtype).eps)
    noise = jnp.sign(jax.random.normal(jax.random.key(1), (64, 1)))
    x = jnp.concatenate([good[:, :1], 1000.0 * (1 + 0.5 * ulp * noise), good[:, 1:]], axis=1).astype(dtype)
    assert np.ptp(np.asarray(x[:, 1], np.float32)) > 0
    running = initial_stats(jax.nn.swish, form, (3,))

    def loss(x):
        y, new = anact(jax.nn.swish, x, running, form)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, new)

    gradient, (y, new) = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
    assert np.isfinite(np.asarray(y, np.float32)).all()
    np.testing.assert_array_equal(new.count, [1, 0, 1])
    for name in form.moments:
        np.testing.assert_array_equal(getattr(new, name)[1], getattr(running, name)[1])


@forms("default", "published")
def test_nan_hunters_find_nothing_in_finite_input(form):
    x = jax.random.normal(jax.random.key(0), (32, 6))
    x = x.at[:, 2].set(-jnp.abs(x[:, 2])).at[:, 3].set(0.0)  # a dead ReLU, a constant
    running = initial_stats(jax.nn.relu, form)

    def loss(x):
        y, new = anact(jax.nn.relu, x, running, form)
        return jnp.sum(y**2), new

    for batch in (x, jnp.zeros_like(x)):
        for errors in (checkify.float_checks, checkify.div_checks):
            checkify.checkify(jax.grad(loss, has_aux=True), errors=errors)(batch)[0].throw()
        with jax.debug_nans(True), jax.disable_jit():
            jax.grad(loss, has_aux=True)(batch)


@pytest.mark.parametrize("filler", [jnp.nan, -jnp.inf, 1e30])
@forms("default", "tempered", "published")
def test_masked_elements_change_nothing(form, filler):
    x, mask = jax.random.normal(jax.random.key(0), (16, 5, 3)), jnp.arange(5)[None, :, None] < 3
    running = initial_stats(jax.nn.swish, form)

    @jax.jit
    def step(x):
        def loss(x):
            y, new = anact(jax.nn.swish, x, running, form, mask=mask)
            return jnp.sum(jnp.where(mask, jnp.sin(y), 0)), (y, new)

        return jax.grad(loss, has_aux=True)(x)

    plain, filled = step(jnp.where(mask, x, 0.0)), step(jnp.where(mask, x, filler))
    for found, expected in zip(*map(jax.tree.leaves, (filled[1][1], plain[1][1])), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.where(mask, filled[1][0], 0), np.where(mask, plain[1][0], 0))
    np.testing.assert_array_equal(filled[0], plain[0])
