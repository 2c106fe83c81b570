"""Models as strangers write them, seen into with no change; their gradients by plain autodiff beside it."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import anact_jax.linen
import anact_jax.nnx
from anact_jax import Form, Published, Standardized, activation_stats, anact, gains, initial_stats
from anact_jax.diagnostics import NORMALIZED, LayerVariances, gains_on_batch, pass_through, table, variances

X = 0.5 + jax.random.normal(jax.random.key(0), (4, 6, 6, 3))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, carry=None):
        return nn.relu(nn.Dense(5)(inputs=x)), carry


class Stranger(nn.Module):
    """Plain functions for activations, a convolution, a layer used twice, a nested one."""

    block: type = Block

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3), name="conv")(x)).mean((1, 2))
        twice = nn.Dense(5, name="twice")
        x = nn.swish(twice(jnp.tanh(twice(x))))
        x, _ = self.block()(x)
        return nn.DenseGeneral((2,), name="out")(x)


def loss_of(model):
    return lambda variables, x: jnp.sum(model.apply(variables, x) ** 2)


def stranger(**options):
    model = Stranger(**options)
    return model, jax.jit(model.init)(jax.random.key(1), X)


def test_unmodified_linen_model_equals_autodiff():
    model, variables = stranger()
    passed = jax.jit(pass_through(loss_of(model)))(variables, X)
    assert [layer.name for layer in passed] == ["conv", "twice", "twice", "Block_0/Dense_0", "out"]
    conv, first, second, dense, out = passed
    gradient = jax.jit(jax.grad(loss_of(model)))(variables, X)["params"]
    np.testing.assert_array_equal(conv.entering, X)
    np.testing.assert_allclose(out.signal, model.apply(variables, X), rtol=1e-5)
    np.testing.assert_allclose(out.gradient, 2 * out.signal, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(conv.gradient, (0, 1, 2)), gradient["conv"]["bias"], rtol=1e-4)
    for found, name in ((dense, "Block_0"), (out, "out")):
        of_kernel = found.entering.T @ found.gradient
        expected = gradient[name]["Dense_0"] if name == "Block_0" else gradient[name]
        np.testing.assert_allclose(of_kernel, expected["kernel"], rtol=1e-4, atol=1e-6)
    both = first.entering.T @ first.gradient + second.entering.T @ second.gradient
    np.testing.assert_allclose(both, gradient["twice"]["kernel"], rtol=1e-4, atol=1e-6)


def test_variances_are_mean_squares():
    model, variables = stranger()
    loss = loss_of(model)
    measure, passed = variances(loss), jax.jit(pass_through(loss))(variables, X)
    compiled = jax.jit(measure)(variables, X)
    for row, layer in zip(compiled, passed, strict=True):
        assert row.name == layer.name
        np.testing.assert_allclose(row[1:], (np.mean(layer.signal**2), np.mean(layer.gradient**2)), rtol=1e-5)
    several = jax.jit(jax.vmap(measure, (None, 0)))(variables, jnp.stack([X, 2 * X]))
    chex.assert_trees_all_close(jax.tree.map(lambda value: value[0], several), compiled, rtol=1e-5)
    assert several[0].signal[1] > 2 * several[0].signal[0]


@pytest.mark.parametrize("transform", [nn.remat, pytest.param(nn.jit, marks=pytest.mark.slow)])
def test_lifted_transforms_change_nothing(transform):
    model, variables = stranger()
    lifted, _ = stranger(block=lambda: transform(Block)(name="Block_0"))
    expected = jax.jit(variances(loss_of(model)))(variables, X)
    for _ in range(2):
        chex.assert_trees_all_close(jax.jit(variances(loss_of(lifted)))(variables, X), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "transform", [nn.scan, pytest.param(functools.partial(nn.vmap, in_axes=0, axis_size=4), marks=pytest.mark.slow)]
)
def test_layers_run_several_times_at_once_are_nan(transform):
    lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    more = {"length": 3} if transform is nn.scan else {}
    model, variables = stranger(block=lambda: transform(Block, **lift, **more)(name="stack"))
    rows = jax.jit(variances(loss_of(model)))(variables, X)
    inside = [np.isnan(row[1:]).all() for row in rows if row.name.startswith("stack")]
    outside = [np.isfinite(row[1:]).all() for row in rows if not row.name.startswith("stack")]
    assert inside
    assert all(inside)
    assert len(outside) == 4
    assert all(outside)


def test_layers_of_other_types_can_be_named():
    model, variables = stranger()
    (row,) = jax.jit(variances(loss_of(model), layers=(nn.Conv,)))(variables, X)
    assert row.name == "conv"


def test_half_precision_is_measured_in_float32():
    dense = nn.Dense(64, dtype=jnp.bfloat16)
    x = 300 * jax.random.normal(jax.random.key(0), (32, 16))
    params = dense.init(jax.random.key(1), x)
    (row,) = jax.jit(variances(lambda params, x: jnp.sum(dense.apply(params, x).astype(jnp.float32))))(params, x)
    assert (row.name, row.signal.dtype, float(row.gradient)) == ("Dense", jnp.float32, 1.0)
    np.testing.assert_allclose(row.signal, np.mean(np.square(dense.apply(params, x).astype(jnp.float32))), rtol=1e-3)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = self.drop(self.norm(jax.nn.relu(self.conv(x)))).mean((1, 2))
        for layer in (*self.hidden, self.hidden[0]):
            x = jnp.tanh(layer(inputs=x))
        return self.out(x)


def nnx_loss(model, x):
    return jnp.sum(model(x) ** 2)


def test_nnx_model_equals_autodiff_and_stays_as_it_is():
    model = NnxNet(nnx.Rngs(0))
    model.train()
    before = nnx.to_pure_dict(nnx.state(model))
    kinds = [type(module) for _, module in nnx.iter_graph(model)]
    passed = jax.jit(pass_through(nnx_loss))(model, X)
    assert [type(module) for _, module in nnx.iter_graph(model)] == kinds
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
    names = [layer.name for layer in passed]
    assert names == ["conv", *(f"hidden/{index}" for index in range(2)), "hidden/0", "out"]
    gradient = nnx.to_pure_dict(nnx.jit(nnx.grad(nnx_loss))(model, X))
    sums = [jnp.sum(layer.gradient, tuple(range(layer.gradient.ndim - 1))) for layer in passed]
    np.testing.assert_allclose(sums[0], gradient["conv"]["bias"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(sums[1] + sums[3], gradient["hidden"][0]["bias"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(sums[-1], gradient["out"]["bias"], rtol=1e-3)


def test_a_model_of_one_layer_runs_eagerly():
    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    (row,) = variances(lambda both, x: jnp.sum(both["model"](x)))({"model": linear}, X[0, 0])
    assert (row.name, float(row.gradient)) == ("Linear", 1.0)
    np.testing.assert_allclose(row.signal, np.mean(np.square(linear(X[0, 0]))), rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda model, x: model(x), TypeError, r"one real number, got .*shape=\(4, 6, 6, 2\).*loss\(\*args\)\[0\]"),
        (lambda model, x: (jnp.sum(model(x)), x), TypeError, r"one real number, got \("),
        (lambda model, x: jnp.sum(x), ValueError, "no layer ran that is one of Dense, DenseGeneral, Einsum, Conv"),
    ],
)
def test_losses_that_cannot_be_are_named(loss, error, message):
    with pytest.raises(error, match=message):
        variances(loss)(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), X)


class Three(nn.Module):
    """The last activation learns its correction."""

    @nn.compact
    def __call__(self, x, train):
        for index in range(3):
            form = Published(epsilon=0.0, learned=index == 2)
            x = nn.Dense(7)(x)
            x = anact_jax.linen.NGELU(form=form, use_running_average=not train, name=f"act_{index}")(x)
        return x


def test_published_gains_balance_on_the_batch():
    model, x = Three(), X.reshape(-1, 9)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), x)
    variables["params"]["act_2"]["alpha"] += 0.4
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"], capture_intermediates=True))
    _, updates = apply(variables, x)

    def loss(variables, x):
        return jnp.sum(model.apply(variables, x, train=True, mutable=["batch_stats"])[0])

    rows = jax.jit(gains_on_batch(loss))(variables, x)
    assert [row.name for row in rows] == ["act_0", "act_1", "act_2"]
    for index, row in enumerate(rows):
        z, y = (updates["intermediates"][f"{layer}_{index}"]["__call__"][0] for layer in ("Dense", "act"))
        np.testing.assert_allclose(row.forward, np.mean(y**2) / np.var(z), rtol=1e-4)
        np.testing.assert_allclose(
            (row.bare_forward, row.bare_backward), gains(activation_stats(jax.nn.gelu, z)), rtol=1e-4
        )
        balanced = jnp.sqrt((1 / row.bare_forward + 1 / row.bare_backward) / 2)
        np.testing.assert_allclose(row.factor, balanced + (0.3 * np.tanh(0.4) if index == 2 else 0), rtol=1e-4)


class TwoKinds(nn.Module):
    form: Form

    @nn.compact
    def __call__(self, x):
        act = anact_jax.linen.NSwish(form=self.form, use_running_average=False, name="act")
        return nn.remat(nn.Dense)(2)(act(nn.Dense(6)(x)))


@pytest.mark.parametrize(
    "form",
    [Standardized(), Standardized(std=1.0, tempering=0.1), Published()],
    ids=["default", "tempered", "published"],
)
def test_gains_on_a_batch_for_any_form(form):
    model, x = TwoKinds(form), X.reshape(-1, 9)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    (row,) = jax.jit(
        gains_on_batch(lambda variables, x: jnp.sum(model.apply(variables, x, mutable=["batch_stats"])[0]))
    )(variables, x)
    z = nn.Dense(6).apply({"params": variables["params"]["Dense_0"]}, x)
    _, running = anact(jax.nn.swish, z, initial_stats(jax.nn.swish, form), form)
    factor, shift = form.factor_and_shift(running)
    stats = activation_stats(form.activation(jax.nn.swish), z, axis=form.axis)
    after = gains(stats, shift=shift)
    expected = (factor**2 * after.forward, factor**2 * after.backward, factor, shift, *gains(stats))
    np.testing.assert_allclose(row[1:], [np.mean(value) for value in expected], rtol=1e-5)
    layer = anact_jax.nnx.NSwish(6, form=form)
    (of_nnx,) = jax.jit(gains_on_batch(lambda layer, z: jnp.sum(layer(z, use_running_average=False))))(layer, z)
    np.testing.assert_allclose(of_nnx[1:], row[1:], rtol=1e-5)


def test_table_aligns_numbers_under_their_names():
    assert table(
        [
            LayerVariances("Dense_9", jnp.array(10.0), jnp.array(1e-11)),
            LayerVariances("Dense_10", jnp.array(11.0), jnp.array(1e-10)),
        ]
    ).splitlines() == [
        "layer     signal  gradient",
        "Dense_9       10     1e-11",
        "Dense_10      11     1e-10",
    ]
    with pytest.raises(ValueError, match="at least one row"):
        table([])


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return anact_jax.linen.NSwish(use_running_average=True)(nn.Dense(5)(x))


class Compiled(nn.Module):
    """A compiled method."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return anact_jax.linen.NSwish(use_running_average=True)(nn.Dense(5)(x))


class Blocks(nn.Module):
    """Blocks of one shape, which a compiler need trace only once."""

    block: type

    @nn.compact
    def __call__(self, x):
        for index in range(3):
            x = self.block(name=f"block_{index}")(x)
        return nn.Dense(2)(x)


@pytest.mark.parametrize(
    ("block", "around"),
    [
        pytest.param(nn.jit(Inner), jax.jit, id="class-jit"),
        pytest.param(Compiled, lambda measure: measure, id="method-eager"),
        pytest.param(Compiled, jax.jit, id="method-jit", marks=pytest.mark.slow),
        pytest.param(nn.jit(Inner), lambda measure: measure, id="class-eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_have_the_rows_of_plain_ones(block, around):
    x = X.reshape(-1, 9)[:, :5]
    plain, compiled = Blocks(Inner), Blocks(block)
    variables = jax.jit(plain.init)(jax.random.key(1), x)
    apply = jax.jit(compiled.apply)
    jax.block_until_ready((compiled.apply(variables, x), apply(variables, x)))  # they are traced, and kept
    for diagnose in (variances, gains_on_batch):
        expected = jax.jit(diagnose(loss_of(plain)))(variables, x)
        assert len(expected) == (4 if diagnose is variances else 3)
        for loss in (loss_of(compiled), lambda variables, x: jnp.sum(apply(variables, x) ** 2)):
            chex.assert_trees_all_close(around(diagnose(loss))(variables, x), expected, rtol=1e-4)


@nnx.jit
def run_compiled(block, x):
    return block(x)


class NnxBlocks(nnx.Module):
    def __init__(self):
        self.first, self.second = (nnx.Linear(5, 5, rngs=nnx.Rngs(seed)) for seed in range(2))

    def __call__(self, x):
        return run_compiled(self.first, run_compiled(self.second, run_compiled(self.first, x)))


def test_compiled_nnx_blocks_have_a_row_for_each_call():
    model, x = NnxBlocks(), X.reshape(-1, 9)[:, :5]
    model(x)
    rows = jax.jit(variances(lambda model, x: jnp.sum(model(x) ** 2)))(model, x)
    assert [row.name for row in rows] == ["first", "second", "first"]
    signals = [model.first(x), model.second(model.first(x)), model(x)]
    np.testing.assert_allclose([row.signal for row in rows], [np.mean(z**2) for z in signals], rtol=1e-4)


def test_changing_losses_are_named():
    dense, calls = nn.Dense(3), iter((1, 2))

    def loss(params, x):
        for _ in range(next(calls)):
            x = dense.apply(params, x)
        return jnp.sum(x)

    params = dense.init(jax.random.key(0), X[0, 0])
    with pytest.raises(ValueError, match="does not run the same layers each time it is traced: Dense was new"):
        variances(loss)(params, X[0, 0])


def test_gains_leave_out_what_the_mask_leaves_out():
    x = X.reshape(-1, 9)
    padded, mask = jnp.concatenate([x, jnp.full((len(x), 9), 100.0)]), jnp.arange(2 * len(x))[:, None] < len(x)
    layer = anact_jax.linen.NSwish(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    same = anact_jax.nnx.NSwish(9)

    def linen_loss(mask):
        return lambda x: jnp.sum(layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[0])

    (expected,) = jax.jit(gains_on_batch(linen_loss(None)))(x)
    (found,) = jax.jit(gains_on_batch(linen_loss(mask)))(padded)
    (of_nnx,) = jax.jit(gains_on_batch(lambda layer, x: jnp.sum(layer(x, mask=mask))))(same, padded)
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-4)
    np.testing.assert_allclose(of_nnx[1:], expected[1:], rtol=1e-4)


class Swish(nn.Module):
    """A plain activation as a module, with an option in the call."""

    @nn.compact
    def __call__(self, x, double):
        return (2.0 if double else 1.0) * jax.nn.swish(x)


class WithPlain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.PReLU(negative_slope_init=0.3)(nn.Dense(5)(x))
        x = anact_jax.linen.NSwish(use_running_average=True)(nn.Dense(5)(x))
        return Swish()(nn.Dense(5)(x), double=True)


def test_plain_modules_have_gains_of_the_batch():
    model, x = WithPlain(), X.reshape(-1, 9)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    loss, layers = loss_of(model), (*NORMALIZED, nn.PReLU, Swish)
    rows = jax.jit(gains_on_batch(loss, layers))(variables, x)
    assert [row.name for row in rows] == ["PReLU_0", "NSwish_0", "Swish_0"]
    entering = [passed.signal for passed in jax.jit(pass_through(loss))(variables, x)]
    functions = {0: lambda x: jnp.where(x > 0, x, 0.3 * x), 2: lambda x: 2.0 * jax.nn.swish(x)}
    for index, f in functions.items():
        expected = gains(activation_stats(f, entering[index]))
        np.testing.assert_allclose(rows[index][1:], (*expected, 1, 0, *expected), rtol=1e-4)

    model = nnx.Sequential(nnx.Linear(9, 5, rngs=nnx.Rngs(0)), nnx.PReLU(0.3))
    (row,) = jax.jit(gains_on_batch(lambda model, x: jnp.sum(model(x)), layers=(nnx.PReLU,)))(model, x)
    np.testing.assert_allclose(row[1:3], gains(activation_stats(functions[0], model.layers[0](x))), rtol=1e-4)
