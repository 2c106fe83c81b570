"""Each way of the kernels is the formula, and takes its derivative."""

import functools
import itertools

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anact_jax.kernels.cpu
from anact_jax import Stats, activation_stats, anact, initial_stats, normalize
from anact_jax.kernels import scaling
from anact_jax.tracing import traced

SHAPES = [(6, 5, 7, 4), pytest.param((6, 35, 4), marks=pytest.mark.slow), (210, 4)]


@pytest.fixture
def small_parts(monkeypatch):
    """As if the processor's cache held 16 elements, so that small batches are summed part by part."""
    monkeypatch.setattr(anact_jax.kernels.cpu, "_IN_CACHE", 16)
    jax.clear_caches()


def loops(*arguments, **options):
    """Whether the batch is summed in a loop."""
    program = jax.jit(lambda *a: activation_stats(jax.nn.swish, *a, **options)).lower(*arguments)
    return "while" in program.as_text()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("masked", [False, True])
def test_part_by_part_equals_the_oracle(shape, axis, masked, small_parts):
    rng = np.random.default_rng(0)
    x = rng.normal(1.5, 2.0, shape).astype(np.float32)
    mask = jnp.asarray(rng.random((shape[0], *(1,) * (len(shape) - 1))) < 0.6) if masked else None
    options = {"axis": axis, "mask": mask}
    assert loops(jnp.asarray(x), **options)
    stats = jax.jit(lambda x: activation_stats(jax.nn.swish, x, **options))(jnp.asarray(x))
    axes = tuple(range(len(shape) - 1)) if axis else None
    expected = Stats(*helpers.stats("swish", x, axes=axes, mask=mask))
    chex.assert_trees_all_close(stats, jax.tree.map(np.float32, expected), rtol=3e-5)


def test_other_axes_are_summed_at_once(small_parts):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5, 7, 4), np.float32))
    assert not loops(x, axis=1)
    stats = activation_stats(jax.nn.swish, x, axis=1)
    chex.assert_trees_all_close(stats, Stats(*helpers.stats("swish", x, axes=(0, 2, 3))), rtol=3e-5)


def test_small_batches_are_summed_at_once():
    assert not loops(jnp.ones((128, 512)))


def test_under_transformations(small_parts):
    """vmap, gradients, and shard_map over eight devices, in a loop as at once."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4, 40, 4), np.float32))

    def total(x):
        return sum(jnp.sum(jnp.sin(moment)) for moment in activation_stats(jnp.tanh, x, axis=-1)[1:])

    def of_all(x):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharded = jax.sharding.PartitionSpec("data")
        local = jax.shard_map(
            lambda x: activation_stats(jnp.tanh, x, axis=-1, axis_name="data"),
            mesh=mesh,
            in_specs=sharded,
            out_specs=jax.sharding.PartitionSpec(),
        )
        return local(x)

    def results():
        return jax.jit(lambda x: (jax.vmap(jax.value_and_grad(total))(x), of_all(x)))(x)

    looping = results()
    anact_jax.kernels.cpu._IN_CACHE = 2**17
    jax.clear_caches()
    chex.assert_trees_all_close(looping, results(), rtol=1e-4, atol=1e-6)


BATCHES = [(), (4, 3), (2, 3, 4, 5), (0, 3)]
AXES = {"scalars": (), "one a channel": (-1,), "one an example": (0,), "one an element": tuple(range(4))}
CASES = [(shape, kind) for shape, kind in itertools.product(BATCHES, AXES) if shape or kind == "scalars"]


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


def test_learned_activation_is_differentiated():
    x, factor, shift = some(jax.random.key(0), (4, 3), (-1,))

    def loss(g, slope):
        return jnp.sum(g(lambda x: jnp.where(x > 0, x, slope * x), x, factor, shift) ** 2)

    ours, plain = (jax.grad(loss, argnums=1)(g, 0.1) for g in (normalize, formula))
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    assert plain != 0


def scaled(f, x, factor, shift):
    """What a step takes, which on a CPU is computed in a way of its own."""
    g, constants = traced(f, x)
    return scaling(x, (x.ndim - 1,))(g, constants, x, factor, shift)


@pytest.mark.parametrize("axes", [(-1,), ()])
@pytest.mark.parametrize("shape", [(6, 5, 7, 4), (35, 4)])
def test_scaling_for_a_cpu_equals_the_formula(shape, axes, small_parts):
    primals, tangents = (some(jax.random.key(seed), shape, axes) for seed in (0, 1))
    ours, plain = (functools.partial(g, jax.nn.swish) for g in (scaled, formula))
    derivatives = [jax.jit(functools.partial(jax.jvp, g)) for g in (ours, plain)]
    divisions = [jvp.lower(primals, tangents).as_text().count("divide") for jvp in derivatives]
    assert divisions[0] > divisions[1]  # by a hidden 1
    forward = [jvp(primals, tangents) for jvp in derivatives]
    chex.assert_trees_all_close(*forward, rtol=1e-5, atol=1e-6)

    def second(g):
        return jax.jit(
            jax.grad(lambda *p: jnp.sum(jnp.sin(jax.grad(lambda *p: jnp.sum(g(*p) ** 3), 0)(*p))), (0, 1, 2))
        )

    chex.assert_trees_all_close(second(ours)(*primals), second(plain)(*primals), rtol=1e-4, atol=1e-4)
    broken = [primals[0].at[0].set(jnp.nan), *primals[1:]]
    np.testing.assert_array_equal(jax.jit(ours)(*broken), jax.jit(plain)(*broken))


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="XLA wrote one such array before")
def test_factor_sums_share_no_array_with_x_gradient():
    x, factor, shift = some(jax.random.key(0), (8, 32, 32, 64), (-1,))

    def backward(*a):
        return jax.vjp(lambda *p: scaled(jax.nn.swish, *p), *a[:3])[1](a[3])

    memory = jax.jit(backward).lower(x, factor, shift, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < x.nbytes  # no array of x's size is written in between


@pytest.mark.parametrize("shape", [(211, 4), (3, 37, 4)])
def test_indivisible_batches_equal_the_oracle(shape, small_parts):
    x = jnp.asarray(np.random.default_rng(0).normal(1.5, 2.0, shape), jnp.float32)
    assert loops(x, axis=-1)
    found = jax.jit(functools.partial(activation_stats, jax.nn.swish, axis=-1))(x)
    expected = helpers.stats("swish", x, axes=tuple(range(x.ndim - 1)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, np.broadcast_to(theirs, ours.shape), rtol=1e-5)


def test_factor_gradient_of_a_prime_batch(small_parts):
    x = jax.random.normal(jax.random.key(0), (211, 4))

    def loss(factor, shift, scaled):
        g, constants = traced(jax.nn.swish, x)
        return jnp.sum(jnp.sin(scaled(g, constants, x, factor, shift)))

    numbers = jnp.linspace(0.5, 2.0, 4)[None], jnp.linspace(-1.0, 1.0, 4)[None]
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, scaled=way), argnums=(0, 1)))(*numbers)
        for way in (anact_jax.kernels.cpu.scaled, anact_jax.kernels.cpu.formula)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_inference_is_the_formula_alone():
    x = jnp.ones((64, 32, 32, 32))

    def inference(x):
        return anact(jnp.tanh, x, initial_stats(jnp.tanh, shape=(32,)), use_running_average=True)[0]

    def image_sized_divisions(f):
        text = jax.jit(f).lower(x).as_text()
        return sum("stablehlo.divide" in line and "64x32x32x32" in line for line in text.splitlines())

    assert image_sized_divisions(inference) == 0
    assert image_sized_divisions(jax.grad(lambda x: jnp.sum(inference(x) ** 2))) > 0
