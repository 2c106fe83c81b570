"""The derivative of `normalize` is the one that JAX takes of the formula, whichever way it is computed."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import normalize

SHAPES = [(), (5,), (4, 3), (3, 2, 2), (2, 3, 4, 5), (0, 3), (4, 0)]
AXES = {"scalars": (), "one a channel": (-1,), "one an example": (0,), "one an element": tuple(range(4))}
CASES = [(shape, kind) for shape, kind in itertools.product(SHAPES, AXES) if shape or kind == "scalars"]


def formula(f, x, factor, shift):
    return factor * (f(x) - shift)


def some(key, shape, axes):
    axes = {axis % len(shape) for axis in axes if -len(shape) <= axis < len(shape)}
    values = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
    return [jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 3), (shape, values, values), strict=True)]


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_both_modes_equal_the_formulas(shape, kind):
    primals, tangents = (some(jax.random.key(seed), shape, AXES[kind]) for seed in (0, 1))
    ours, plain = (functools.partial(g, jax.nn.swish) for g in (normalize, formula))
    forward = [jax.jit(functools.partial(jax.jvp, g))(primals, tangents) for g in (ours, plain)]
    chex.assert_trees_all_close(*forward, rtol=1e-5)
    backward = [jax.jit(lambda x, t, g=g: jax.vjp(g, *x)[1](t))(primals, tangents[0]) for g in (ours, plain)]
    chex.assert_trees_all_close(*backward, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_one_argument_alone_and_second_order(argument):
    arguments = some(jax.random.key(0), (3, 2, 4), (-1,))

    def loss(g):
        return lambda *a: jnp.sum(jnp.sin(g(jnp.tanh, *a)))

    for derivative in (jax.grad, jax.hessian):
        chex.assert_trees_all_close(
            *(derivative(loss(g), argnums=argument)(*arguments) for g in (normalize, formula)), rtol=1e-4, atol=1e-5
        )


def test_under_vmap():
    primals, tangents = (
        [
            jnp.stack(values)
            for values in zip(*(some(jax.random.key(seed), (3, 4), (-1,)) for seed in seeds), strict=True)
        ]
        for seeds in ((0, 1), (2, 3))
    )

    def gradient(g):
        return jax.vmap(lambda *a: jax.vjp(lambda *p: g(jax.nn.gelu, *p), *a[:3])[1](a[3]))(*primals, tangents[0])

    chex.assert_trees_all_close(gradient(normalize), gradient(formula), rtol=1e-5, atol=1e-6)


def test_an_activation_that_learns_is_differentiated_too():
    x, factor, shift = some(jax.random.key(0), (4, 3), (-1,))

    def loss(g, slope):
        return jnp.sum(g(lambda x: jnp.where(x > 0, x, slope * x), x, factor, shift) ** 2)

    ours, plain = (jax.grad(loss, argnums=1)(g, 0.1) for g in (normalize, formula))
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    assert plain != 0


def test_sums_for_the_factor_share_nothing_of_the_inputs_size_with_the_gradient_in_x():
    x, factor, shift = some(jax.random.key(0), (8, 16, 16, 64), (-1,))

    def backward(*a):
        return jax.vjp(lambda *p: normalize(jax.nn.swish, *p), *a[:3])[1](a[3])

    memory = jax.jit(backward).lower(x, factor, shift, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < x.nbytes  # no array of x's size is written in between
