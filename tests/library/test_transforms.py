"""Linen modules under lifted transforms, each called twice, against the same layers without."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import Standardized, anact, initial_stats
from anact_jax.linen import NSwish

X = 0.5 + 2.0 * jax.random.normal(jax.random.key(0), (16, 6))


class Block(nn.Module):
    """A layer as `nn.scan` wants it: carry in, carry and output out."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = NSwish(axis_name=self.axis_name)(nn.Dense(6)(x), use_running_average=not train)
        return x, None


class Chain(nn.Module):
    """Three blocks, one after the other, with no transform."""

    @nn.compact
    def __call__(self, x, train):
        for _ in range(3):
            x, _ = Block()(x, train)
        return x


def scanned(block=Block):
    """Three blocks in a loop: parameters and statistics of their own for each."""
    return nn.scan(
        block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=3,
    )()


def unstacked(variables):
    """A loop's variables as those of `Chain`."""
    return {
        collection: {f"Block_{i}": jax.tree.map(lambda v, i=i: v[i], tree) for i in range(3)}
        for collection, tree in variables.items()
    }


def outputs(apply, variables, x):
    """Two training steps of the statistics, then gradients in training and output in inference, all compiled."""

    @jax.jit
    def train(variables, x):
        y, updates = apply(variables, x, True, mutable=["batch_stats"])
        return y, {**variables, **updates}

    first, variables = train(variables, x)
    second, variables = train(variables, 2 * x)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(train(v, x)[0] ** 2)))(variables)["params"]
    inference = jax.jit(lambda variables, x: apply(variables, x, False))(variables, x)
    return (first, second, inference), gradient, variables


@pytest.mark.parametrize(
    "block",
    [
        Block,
        pytest.param(nn.remat(Block, static_argnums=2), marks=pytest.mark.slow),
        pytest.param(nn.jit(Block, static_argnums=2), marks=pytest.mark.slow),
    ],
)
def test_scan_over_layers_and_what_is_nested_in_it(block):
    loop = scanned(block)
    variables = loop.init(jax.random.key(1), X, True)
    assert variables["batch_stats"]["NSwish_0"]["count"].shape == (3, 6)

    def in_loop(*args, **options):
        result = loop.apply(*args, **options)
        return (result[0][0], result[1]) if "mutable" in options else result[0]

    ys, gradient, after = outputs(in_loop, variables, X)
    expected, expected_gradient, expected_after = outputs(Chain().apply, unstacked(variables), X)
    chex.assert_trees_all_close(ys, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(unstacked(after), expected_after, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(unstacked({"params": gradient})["params"], expected_gradient, rtol=1e-4, atol=1e-4)
    assert (after["batch_stats"]["NSwish_0"]["count"] == 2).all()


def test_scan_over_time_carries_one_state():
    """One layer at every step of a sequence: its statistics go from step to step, its parameters are shared."""
    loop = nn.scan(
        Block,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
        in_axes=nn.broadcast,
        length=3,
    )()
    variables = Block().init(jax.random.key(1), X, True)  # Flax wants what a loop carries to be there before
    _, updates = loop.apply(variables, X, True, mutable=["batch_stats"])
    by_hand, x = variables, X
    for _ in range(3):
        (x, _), new = Block().apply(by_hand, x, True, mutable=["batch_stats"])
        by_hand = {**by_hand, **new}
    chex.assert_trees_all_close(updates["batch_stats"], by_hand["batch_stats"], rtol=1e-5, atol=1e-6)
    assert (updates["batch_stats"]["NSwish_0"]["count"] == 3).all()


def test_broadcast_state_is_shared_in_inference():
    """In inference nothing is written, so that a loop's steps may all read one state."""
    variables = Block().init(jax.random.key(1), X, True)
    _, updates = Block().apply(variables, X, True, mutable=["batch_stats"])
    loop = nn.scan(
        Block,
        variable_broadcast=["params", "batch_stats"],
        split_rngs={"params": False},
        in_axes=nn.broadcast,
        length=2,
    )()
    y, _ = loop.apply({**variables, **updates}, X, False)
    expected, _ = Block().apply({**variables, **updates}, X, False)
    expected, _ = Block().apply({**variables, **updates}, expected, False)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis_name", [pytest.param(None, marks=pytest.mark.slow), "parts"])
def test_vmap_over_data_with_or_without_a_shared_batch(axis_name):
    """Parameters shared by two parts of a batch: statistics of their own for each part, or shared ones."""
    own = axis_name is None
    mapped = nn.vmap(
        Block,
        in_axes=(0, None),
        axis_name="parts",
        variable_axes={"params": None, "batch_stats": 0},
        split_rngs={"params": False},
    )(axis_name)
    halves = X.reshape(2, 8, 6)
    variables = mapped.init(jax.random.key(1), halves, True)
    plain = {**variables, "batch_stats": jax.tree.map(lambda value: value[0], variables["batch_stats"])}
    for _ in range(2):
        (y, _), updates = mapped.apply(variables, halves, True, mutable=["batch_stats"])
        variables = {**variables, **updates}
    for i in range(2):
        (expected, _), new = Block().apply(plain, halves[i] if own else X, True, mutable=["batch_stats"])
        np.testing.assert_allclose(y[i], expected if own else expected.reshape(2, 8, 6)[i], rtol=1e-4, atol=1e-5)
        moments = jax.tree.map(lambda value, i=i: value[i], updates["batch_stats"]["NSwish_0"])
        new = new["batch_stats"]["NSwish_0"]
        chex.assert_trees_all_close(moments, {**new, "count": new["count"] + 1}, rtol=1e-5, atol=1e-6)


def test_eval_shape_and_ahead_of_time_compilation():
    shapes = jax.eval_shape(lambda: Chain().init(jax.random.key(1), X, True))
    variables = Chain().init(jax.random.key(1), X, True)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, variables)

    def train(variables, x):
        return Chain().apply(variables, x, True, mutable=["batch_stats"])

    compiled = jax.jit(train).lower(shapes, jax.ShapeDtypeStruct(X.shape, X.dtype)).compile()
    for _ in range(2):
        y, updates = compiled(variables, X)
        expected, expected_updates = jax.jit(train)(variables, X)
        chex.assert_trees_all_equal((y, updates), (expected, expected_updates))
        variables = {**variables, **updates}


def test_input_derivatives_agree_for_constants():
    """Under `vmap` with a name, every mode gives the derivative of one point at the batch's statistics."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w, b, v = rng.normal(size=(3, 16))
        points = np.linspace(-1, 1, 32)
        form = Standardized(stop_gradient=True)
        running = initial_stats(jnp.tanh, form, (16,))

        def u(x):
            return jnp.sum(v * anact(jnp.tanh, x * w + b, running, form, axis_name="points")[0])

        modes = jax.hessian, lambda u: jax.jacfwd(jax.jacfwd(u)), lambda u: jax.jacrev(jax.jacrev(u))
        found = [jax.vmap(second(u), axis_name="points")(jnp.asarray(points)) for second in modes]
        y = np.tanh(points[:, None] * w + b)
        factor = form.std / np.sqrt(y.var(0) + form.epsilon)
        expected = (v * factor * w**2 * -2 * y * (1 - y**2)).sum(1)
        for each in found:
            np.testing.assert_allclose(each, expected, rtol=1e-9)
