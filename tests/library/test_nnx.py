import copy
import dataclasses
import functools
import inspect
import pickle

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

import anact_jax.linen
import anact_jax.nnx
from anact_jax import Published, Standardized, Stats, restored
from anact_jax.nnx import ANAct, NSwish

NAMES = ["NReLU", "NLeakyReLU", "NELU", "NSELU", "NTanh", "NSigmoid", "NSoftplus", "NSwish", "NGELU", "NMish"]
OPTIONS = {
    "default": {},
    "published": {"form": Published()},
    "learned": pytest.param({"form": Published(center=True, learned=True)}, marks=pytest.mark.slow),
    "options": pytest.param(
        {"std": 1.0, "axis": None, "tempering": 0.1, "stop_gradient": True, "center": False}, marks=pytest.mark.slow
    ),
}


def batches(count, seed=0, shape=(16, 6)):
    return 0.3 + 2 * jax.random.normal(jax.random.key(seed), (count, *shape))


def state_of(layer):
    return Stats(**{name: getattr(layer, name)[...] for name in ("count", *layer.form.moments)})


def shaped_swish():
    return NSwish(12)


class Net(nnx.Module):
    def __init__(self, rngs, act=shaped_swish):
        self.hidden, self.act, self.out = nnx.Linear(6, 12, rngs=rngs), act(), nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.act(self.hidden(x)))


def trained(steps, **options):
    """A Linen and an NNX network from the same weights after the same training steps."""

    class LinenNet(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(12)(x)
            x = anact_jax.linen.ANAct(**options)(x, use_running_average=not train)
            return nn.Dense(3)(x)

    xs, labels, optimizer = batches(steps), jnp.arange(16) % 3, optax.sgd(0.1, momentum=0.9)
    net = Net(nnx.Rngs(0), lambda: ANAct(**options))
    net.train()
    state = nnx.Optimizer(net, optimizer, wrt=nnx.Param)
    linen = LinenNet()
    variables = linen.init(jax.random.key(0), xs[0], train=True)
    params, stats = variables["params"], variables["batch_stats"]
    params["Dense_0"], params["Dense_1"] = (
        {name: layer_value[...] for name, layer_value in (("kernel", layer.kernel), ("bias", layer.bias))}
        for layer in (net.hidden, net.out)
    )
    moments = optimizer.init(params)

    @nnx.jit
    def nnx_step(net, state, x):
        def loss(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

        value, gradient = nnx.value_and_grad(loss)(net)
        state.update(net, gradient)
        return value

    @jax.jit
    def linen_step(params, stats, moments, x):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = linen.apply(variables, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

        (value, stats_), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), stats_, moments, value

    losses = []
    for x in xs:
        value = nnx_step(net, state, x)
        params, stats, moments, other = linen_step(params, stats, moments, x)
        losses.append((float(value), float(other)))
    net.eval()
    outputs = nnx.jit(lambda net, x: net(x))(net, xs[0])
    expected = jax.jit(functools.partial(linen.apply, train=False))({"params": params, "batch_stats": stats}, xs[0])
    return losses, (state_of(net.act), Stats(**stats["ANAct_0"])), (outputs, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_equals_linen_to_the_bit(options):
    losses, (state, expected_state), (outputs, expected) = trained(10, **options)
    assert all(ours == linen for ours, linen in losses)
    assert losses[0] != losses[-1]
    chex.assert_trees_all_equal(state, expected_state)
    np.testing.assert_array_equal(outputs, expected)


@pytest.mark.parametrize("name", NAMES)
def test_named_ones_are_linen_s(name):
    x = batches(1)[0]
    layer, linen = getattr(anact_jax.nnx, name)(), getattr(anact_jax.linen, name)()
    y, _ = linen.init_with_output(jax.random.key(0), x, use_running_average=True)
    np.testing.assert_array_equal(layer(x, use_running_average=True), y)
    assert "ANAct" in layer.__doc__


def test_state_is_a_batch_stat():
    net = Net(nnx.Rngs(0))
    _, params, stats, rest = nnx.split(net, nnx.Param, nnx.BatchStat, ...)
    assert set(nnx.to_pure_dict(stats)["act"]) == {"count", "mean_out", "var_out"}
    assert not jax.tree.leaves(rest)
    assert jax.tree.leaves(params)
    assert type(net.act.count) is nnx.BatchStat


def test_mode_comes_from_call_then_module():
    x, layer = batches(1)[0], NSwish()
    layer.eval()
    layer(x)
    assert layer.count[...].max() == 0
    layer(x, use_running_average=False)
    assert layer.count[...].max() == 1
    layer.train()
    layer(x)
    assert layer.count[...].max() == 2
    layer(x, use_running_average=True)
    assert layer.count[...].max() == 2


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="Flax 0.12.2 has no views")
def test_a_view_has_a_mode_of_its_own():
    x, layer = batches(1)[0], NSwish(use_running_average=False)
    inference = nnx.view(layer, use_running_average=True)
    inference(x)
    assert layer.count[...].max() == 0
    assert not layer.use_running_average


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("use_running_average", [True, False])
def test_using_and_updating_are_independent(use_running_average, update):
    x = batches(1)[0]
    layer = NSwish(use_running_average=use_running_average, update=update)
    y = layer(x)
    assert bool(jnp.all(y == NSwish(use_running_average=True)(x))) == use_running_average
    assert float(layer.count[...].max()) == float(update)


def test_frozen_withstands_train_of_its_parent():
    x, net = batches(1)[0], Net(nnx.Rngs(0), lambda: NSwish(frozen=True))
    net.eval()
    expected = net(x)
    net.train()
    np.testing.assert_array_equal(net(x), expected)
    assert net.act.count[...].max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 2.0}, "momentum is the weight of the past"),
        ({"tempering": 0.0}, "tempering must be a positive number"),
        ({"form": "median"}, "unknown form 'median'; expected 'default', 'published'"),
        ({"form": "published", "std": 1.0}, "std=1.0 beside form=Published"),
    ],
)
def test_bad_options_are_refused_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        ANAct(**options)


def test_features_have_statistics_of_their_own():
    x = batches(1)[0] * jnp.arange(1.0, 7)[None]
    layer, unshaped = (ANAct(features=features, tempering=0.1) for features in (6, None))
    chex.assert_shape([layer.count[...], unshaped.count[...]], [(6,), ()])
    np.testing.assert_array_equal(unshaped(x, use_running_average=True), layer(x, use_running_average=True))
    np.testing.assert_array_equal(unshaped(x), layer(x))
    np.testing.assert_allclose(layer.var_out[...], layer.activation(x).var(0), rtol=1e-4)
    chex.assert_trees_all_equal(state_of(unshaped), state_of(layer))


# Under NNX's transforms, each twice: what the first call leaves must be good enough for the second.


def expected_state(xs, **options):
    layer = NSwish(use_running_average=False, shared=True, **options)
    for x in xs:
        layer(x)
    return state_of(layer)


def test_jit_and_one_trace_a_mode():
    xs, layer = batches(10), NSwish(6)
    layer.train()
    run = nnx.jit(chex.assert_max_traces(lambda layer, x: layer(x), n=2))
    for x in xs:
        run(layer, x)
    chex.assert_trees_all_close(state_of(layer), expected_state(xs), rtol=1e-6)
    layer.eval()
    for x in xs:
        run(layer, x)
    assert layer.count[...].max() == 10


@pytest.mark.parametrize("transform", [nnx.grad, nnx.value_and_grad])
def test_grad(transform):
    xs, net = batches(2), Net(nnx.Rngs(0))
    net.train()
    gradient = nnx.jit(transform(lambda net, x: jnp.mean(net(x) ** 2)))
    for x in xs:
        leaves = jax.tree.leaves(gradient(net, x))
    assert leaves and all(np.isfinite(leaf).all() for leaf in leaves)
    assert net.act.count[...].max() == 2


@pytest.mark.slow
def test_remat():
    xs, net = batches(2), Net(nnx.Rngs(0))
    net.train()
    plain = nnx.clone(net)
    for x in xs:
        expected = nnx.grad(lambda net, x: jnp.mean(net(x) ** 2))(plain, x)
        found = nnx.grad(lambda net, x: jnp.mean(nnx.remat(lambda net, x: net(x))(net, x) ** 2))(net, x)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)
    assert net.act.count[...].max() == 2
    chex.assert_trees_all_close(state_of(net.act), state_of(plain.act), rtol=1e-6)


def test_vmap_over_layers_of_their_own():
    xs = batches(6).reshape(2, 3, 16, 6)

    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(_):
        return NSwish(6, use_running_average=False)

    layers = make(jnp.arange(3))
    run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))
    for x in xs:
        run(layers, x)
    for index in range(3):
        found = jax.tree.map(lambda value, index=index: value[index], state_of(layers))
        chex.assert_trees_all_close(found, expected_state(xs[:, index]), rtol=1e-5)


def test_scan_over_layers_and_carried():
    xs = batches(2)

    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(_):
        return NSwish(6, use_running_average=False)

    layers = make(jnp.arange(3))
    run = nnx.jit(nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry))
    for x in xs:
        y = run(x, layers)
    one_by_one = [NSwish(use_running_average=False) for _ in range(3)]
    for x in xs:
        for layer in one_by_one:
            x = layer(x)
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)
    for index, layer in enumerate(one_by_one):
        found = jax.tree.map(lambda value, index=index: value[index], state_of(layers))
        chex.assert_trees_all_close(found, state_of(layer), rtol=1e-4, atol=1e-6)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def over_batches(layer, x):
        return layer, layer(x)

    shared = NSwish(6, use_running_average=False)
    for _ in range(2):
        shared, _ = over_batches(shared, xs)
    chex.assert_trees_all_close(state_of(shared), expected_state([*xs, *xs]), rtol=1e-5)


def test_eval_shape_and_ahead_of_time_compilation():
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert abstract.act.count.get_value().shape == (12,)
    net, x = Net(nnx.Rngs(0)), batches(1)[0]
    net.train()
    graph, state = nnx.split(net)

    def step(state, x):
        net = nnx.merge(graph, state)
        y = net(x)
        return y, nnx.state(net)

    compiled = jax.jit(step).lower(state, x).compile()
    for _ in range(2):
        y, state = compiled(state, x)
    nnx.update(net, state)
    assert net.act.count[...].max() == 2
    assert y.shape == (16, 3)


def test_split_and_merge_around_jax_grad():
    net, xs = Net(nnx.Rngs(0)), batches(2)
    net.train()
    graph, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)

    @jax.jit
    def step(params, stats, x):
        def loss(params):
            net = nnx.merge(graph, params, stats, copy=True)  # variables of this trace, as for nnx.BatchNorm
            value = jnp.mean(net(x) ** 2)
            return value, nnx.state(net, nnx.BatchStat)

        return jax.grad(loss, has_aux=True)(params)

    for x in xs:
        gradient, stats = step(params, stats, x)
    nnx.update(net, stats)
    assert net.act.count[...].max() == 2
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_mask_leaves_padding_out():
    x = batches(1)[0]
    padded = jnp.concatenate([x, jnp.full((4, 6), 1e6)])
    mask = jnp.arange(20)[:, None] < 16
    layer = NSwish(use_running_average=False)
    y = layer(padded, mask=mask)
    chex.assert_trees_all_close(state_of(layer), expected_state([x]), rtol=1e-5)
    np.testing.assert_allclose(y[:16], NSwish(use_running_average=False)(x), rtol=1e-5, atol=1e-6)


def test_groups_of_shards():
    layer = ANAct(features=6, form="published", axis_name="batch", axis_index_groups=[[0, 1], [2, 3]])
    layer.train()
    x = batches(4)
    in_groups = nnx.vmap(lambda layer, x: layer(x), in_axes=(nnx.StateAxes({nnx.BatchStat: 0}), 0), axis_name="batch")
    state = jax.tree.map(lambda value: jnp.broadcast_to(value, (4, *value.shape)), nnx.state(layer))
    nnx.update(layer, state)
    in_groups(layer, x)
    expected = jnp.repeat(jnp.stack([x[:2].mean(), x[2:].mean()]), 2)
    np.testing.assert_allclose(layer.mean_in[...], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name if name in ("NReLU", "NTanh") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_pickles_and_copies_give_the_same_output(name):
    x, layer = batches(1)[0], getattr(anact_jax.nnx, name)(6, use_running_average=True)
    y = layer(x)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        np.testing.assert_array_equal(copied(x), y)
        chex.assert_trees_all_equal(state_of(copied), state_of(layer))


def test_form_by_the_name_default_is_no_form():
    x = batches(1)[0]
    by_name, without = NSwish(6, form="default", use_running_average=False), NSwish(6, use_running_average=False)
    assert by_name.form == without.form
    np.testing.assert_array_equal(by_name(x), without(x))
    chex.assert_trees_all_equal(state_of(by_name), state_of(without))


def test_traced_momentum_gives_the_state_of_the_number():
    xs = batches(3)

    def three_steps(momentum):
        return expected_state(xs, features=6, momentum=momentum)

    chex.assert_trees_all_close(jax.jit(three_steps)(0.3), three_steps(0.3), rtol=1e-5)
    assert not np.allclose(three_steps(0.3).var_out, three_steps(0.9).var_out, rtol=0.01)


def test_layers_train_as_constructed():
    x, layer = batches(1)[0], NSwish()
    assert layer.use_running_average is False
    np.testing.assert_array_equal(layer(x), NSwish(use_running_average=False)(x))
    assert layer.count[...].max() == 1


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="Flax 0.12.2 has no views")
def test_view_of_a_model_switches_its_layers():
    x, net = batches(1)[0], Net(nnx.Rngs(0))
    inference = nnx.view(net, use_running_average=True)
    expected = nnx.clone(net)
    expected.eval()
    np.testing.assert_array_equal(inference(x), expected(x))
    assert net.act.count[...].max() == 0
    training = nnx.view(inference, use_running_average=False)
    np.testing.assert_array_equal(training(x), net(x))
    assert net.act.count[...].max() == 2  # a view shares the state


@pytest.mark.parametrize(
    "fn",
    [jax.nn.relu, jnp.tanh, functools.partial(jax.nn.leaky_relu, negative_slope=0.2)],
    ids=["jitted", "ufunc", "partial"],
)
def test_a_copy_made_before_training_averages_with_it(fn):
    x, net = batches(1)[0], Net(nnx.Rngs(0), lambda: ANAct(fn, 12))
    average = copy.deepcopy(net)
    net.train()
    net(x)
    mean = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, average, net)
    assert mean.act.count[...].max() == 0.5
    copied = pickle.loads(pickle.dumps(net))
    net.eval()
    copied.eval()
    np.testing.assert_array_equal(copied(x), net(x))


def test_momentum_for_each_channel():
    xs, momentum = batches(3), jnp.linspace(0.0, 1.0, 6)
    found = expected_state(xs, features=6, momentum=momentum).mean_out
    for channel in (0, 2, 5):
        expected = expected_state(xs, features=6, momentum=float(momentum[channel])).mean_out
        np.testing.assert_allclose(found[channel], expected[channel], rtol=1e-5)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", ["ANAct", "NSwish", "NReLU"])
def test_array_in_the_constructor_is_an_error(name):
    with pytest.raises(TypeError, match=rf"{name} is a layer: .* array of shape \(16, 6\) and dtype float32"):
        getattr(anact_jax.nnx, name)(batches(1)[0])


@pytest.mark.parametrize("use_running_average", [False, True])
def test_one_layer_at_two_widths_is_an_error(use_running_average):
    x, layer = batches(1)[0], NSwish()
    layer(x, use_running_average=False)
    with pytest.raises(ValueError, match=r"NSwish has statistics of shape \(6,\).* \(4,\) .*serves one width"):
        layer(x[:, :4], use_running_average)


def test_default_state_holds_three_arrays():
    layer = NSwish(6)
    layer(batches(1)[0])
    assert set(nnx.to_pure_dict(nnx.state(layer))) == {"count", "mean_out", "var_out"}


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("axis", [-1, None])
def test_published_state_in_a_default_layer_is_refused(axis, use_running_average):
    x, saved = batches(1)[0], NSwish(6, form="published")
    saved(x)
    layer = NSwish(6, axis=axis, use_running_average=use_running_average)
    fresh = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    nnx.update(layer, nnx.state(saved))
    message = r"NSwish has mean_in, var_in, slope_sq too, which form Standardized.* does not use.*restored\("
    for read in (lambda: layer(x), layer.running_stats, layer.normalization):
        with pytest.raises(ValueError, match=message):
            read()
    with pytest.raises(ValueError, match="have mean_in, var_in, slope_sq, which the model's form does not use"):
        restored(nnx.to_pure_dict(nnx.state(saved)), fresh)


def test_default_state_in_a_published_layer_is_refused():
    x, saved = batches(1)[0], NSwish(6)
    saved(x)
    layer = NSwish(6, form="published")
    fresh = nnx.to_pure_dict(nnx.state(layer))
    with pytest.raises(ValueError, match=r"have no mean_in, .*var_in, which the model's form uses"):
        restored(nnx.to_pure_dict(nnx.state(saved)), fresh)
    nnx.update(layer, nnx.state(saved))
    for read in (lambda: layer(x), layer.running_stats, layer.normalization):
        with pytest.raises(ValueError, match=r"NSwish has .*another form"):
            read()


@pytest.mark.parametrize("form", [Standardized(), Published(learned=True)], ids=["default", "learned"])
def test_normalization_is_that_of_inference(form):
    x, layer = batches(1)[0], NSwish(6, form=form)
    layer(x)
    factor, shift = (np.reshape(value, (1, -1)) for value in layer.normalization())
    expected = factor * (jax.nn.swish(x) - shift)
    np.testing.assert_allclose(layer(x, use_running_average=True), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(layer.running_stats(), state_of(layer))
    nnx.update(layer, jax.tree.map(lambda value: value.astype(jnp.bfloat16), nnx.state(layer)))
    chex.assert_type(layer.running_stats().mean_out, jnp.float32)


@pytest.mark.parametrize("use_running_average", [False, True])
def test_dtype_is_that_of_the_output_alone(use_running_average):
    for dtype_in, dtype in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)):
        x = batches(1)[0].astype(dtype_in)
        plain, cast = (NSwish(6, use_running_average=use_running_average, dtype=d) for d in (None, dtype))
        y, expected = cast(x), plain(x)
        chex.assert_type([y, expected], [dtype, dtype_in])
        np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), rtol=2.0**-7, atol=1e-6)
        chex.assert_trees_all_equal(state_of(cast), state_of(plain))


@pytest.mark.parametrize("use_running_average", [False, True])
def test_state_in_bfloat16_stays_in_it_and_works(use_running_average):
    x, (layer, wide) = (
        batches(1)[0],
        (NSwish(6, tempering=0.1, use_running_average=use_running_average) for _ in range(2)),
    )
    nnx.update(layer, jax.tree.map(lambda value: value.astype(jnp.bfloat16), nnx.state(layer)))
    chex.assert_type(jax.tree.leaves(state_of(layer)), jnp.bfloat16)
    y = layer(x)
    chex.assert_type(y, jnp.float32)
    chex.assert_type(jax.tree.leaves(state_of(layer)), jnp.bfloat16)
    np.testing.assert_allclose(y, wide(x), rtol=0.02, atol=0.02)
    widened = jax.tree.map(lambda value: value.astype(jnp.float32), state_of(layer))
    chex.assert_trees_all_close(widened, state_of(wide), rtol=2.0**-8)


def test_learned_slope_gradient():
    with jax.enable_x64(True):
        x = jnp.asarray(batches(1)[0], jnp.float64)
        layer = ANAct(nnx.PReLU(0.25, param_dtype=jnp.float64), 6)

        @nnx.jit
        def loss(layer):
            y = layer(x)
            return jnp.mean(y**3) + jnp.mean(jnp.sin(x) * y)

        gradient = nnx.grad(loss)(layer)["fn"]["negative_slope"][...]

        def at(slope):
            layer.fn.negative_slope.set_value(jnp.float64(slope))
            return loss(layer)

        np.testing.assert_allclose(gradient, (at(0.25 + 1e-5) - at(0.25 - 1e-5)) / 2e-5, rtol=1e-6)
        assert abs(float(gradient)) > 1e-3


@pytest.mark.parametrize("use_running_average", [False, True])
def test_changed_slope_eager_is_jit(use_running_average):
    x, layer = batches(1)[0], ANAct(nnx.PReLU(), 6, use_running_average=use_running_average)
    run = nnx.jit(lambda layer, x: layer(x))
    before = layer(x)
    np.testing.assert_allclose(run(layer, x), before, rtol=1e-5, atol=1e-6)
    layer.fn.negative_slope.set_value(jnp.float32(0.6))
    after = layer(x)
    np.testing.assert_allclose(run(layer, x), after, rtol=1e-5, atol=1e-6)
    assert not np.allclose(after, before, atol=0.01)


def test_bridge_keeps_batch_stats():
    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.act = NSwish(6, form="published", rngs=rngs)

        def __call__(self, x):
            return self.act(x)

    xs, model = batches(3), bridge.to_linen(Holder)
    variables = model.init(jax.random.key(0), xs[0])
    taken_in = float(variables["batch_stats"]["act"]["count"].max())  # the bridge's init runs the layer
    for x in xs:
        _, updates = model.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **updates}
    assert set(variables["batch_stats"]["act"]) == set(Stats._fields)
    assert float(variables["batch_stats"]["act"]["count"].max()) == taken_in + 3


def test_options_and_their_order_are_those_of_linen():
    ours = {name: option.default for name, option in inspect.signature(ANAct.__init__).parameters.items()}
    del ours["self"]
    theirs = {field.name: field.default for field in dataclasses.fields(anact_jax.linen.ANAct)}
    for name in ("parent", "name"):  # of any Linen module
        del theirs[name]
    assert set(ours) - set(theirs) == {"features", "frozen", "rngs"}
    assert set(theirs) - set(ours) == {"collection"}
    shared = [name for name in ours if name in theirs]
    assert shared == [name for name in theirs if name in ours]
    differing = [name for name in shared if name != "fn" and ours[name] != theirs[name]]
    assert differing == ["use_running_average"]  # True or False in the call, of Linen; NNX layers train
