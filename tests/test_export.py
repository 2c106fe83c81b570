"""Networks trained for a few steps, exported, and compared with themselves in inference."""

import functools
import itertools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import anact_jax.linen
import anact_jax.nnx
from anact_jax import FactorAndShift, Published, Standardized, gaussian_stats, normalize
from anact_jax.export import as_function, fold

IMAGES = 0.5 + 2 * jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
LABELS = jnp.arange(16) % 4
FORMS = {
    "default": Standardized(),
    "published": Published(),
    "learned": Published(center=True, learned=True),
    "tempered": Standardized(std=1.0, tempering=0.1),
}

conv = functools.partial(nn.Conv, kernel_size=(3, 3))
CONVS = {
    "same": conv(8),  # Flax's default, zeros at the border
    "valid": conv(8, padding="VALID", use_bias=False),
    "circular": conv(8, padding="CIRCULAR", strides=2),
    "grouped": conv(8, padding="VALID", feature_group_count=2),
    "depthwise": conv(12, padding=0, feature_group_count=6),
    "pointwise": nn.Conv(8, (1, 1)),
}


class CNN(nn.Module):
    """With `act`, trained; with the functions of `exported` in its place, the same layers and other constants."""

    second: nn.Conv
    act: nn.Module
    exported: tuple = ()

    @nn.compact
    def __call__(self, x, train=False):
        for index, layer in enumerate(
            (conv(6), self.second.copy(use_bias=self.second.use_bias or bool(self.exported)))
        ):
            x = layer.copy(name=f"conv_{index}")(x)
            act = self.act.copy(name=f"act_{index}")
            x = self.exported[index](x) if self.exported else act(x, use_running_average=not train)
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(4, name="dense")(x.reshape(len(x), -1))


def train(model, x, steps=4):
    variables = jax.jit(model.init)(jax.random.key(1), x)
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(variables, moments):
        def loss(params):
            logits, updates = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), updates

        gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
        change, moments = optimizer.update(gradient, moments)
        return {"params": optax.apply_updates(variables["params"], change), **updates}, moments

    moments = optimizer.init(variables["params"])
    for _ in range(steps):
        variables, moments = step(variables, moments)
    return variables


def bound(act, variables, name):
    return act.bind({kind: collection[name] for kind, collection in variables.items() if name in collection})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("grouped", "default"),
        ("same", "default"),
        ("same", "published"),
        ("valid", "learned"),
        ("circular", "tempered"),
        ("depthwise", "published"),
        ("pointwise", "learned"),
    ],
)
def test_cnn_with_factor_and_shift_folded_into_the_next_layer(kind, form, standard_promotion):
    second = CONVS[kind]
    model = CNN(second, anact_jax.linen.ANAct(jax.nn.gelu, form=FORMS[form]))
    variables = train(model, IMAGES)
    params, layers = variables["params"], [bound(model.act, variables, f"act_{index}") for index in range(2)]
    first, last = (layer.normalization() for layer in layers)
    f = model.act.activation
    rest = FactorAndShift(1.0, 0.0)
    if kind == "same" and np.any(first.shift):
        with pytest.raises(ValueError, match=r"pads with zeros \(padding='SAME'\).*keep f\(x\) - shift"):
            fold(first, **params["conv_1"], padding="SAME")
        first, rest = first._replace(shift=jnp.zeros_like(first.shift)), rest._replace(shift=first.shift)

    def folded(name, numbers, **options):
        return dict(zip(("kernel", "bias"), fold(numbers, **params[name], **options), strict=True))

    places = params["dense"]["kernel"].shape[0] // second.features
    repeated = jax.tree.map(lambda value: jnp.tile(value, places) if value.ndim else value, last)
    padding = second.padding
    exported = {**params, "conv_1": folded("conv_1", first, padding=padding), "dense": folded("dense", repeated)}
    plain = CNN(second, model.act, (lambda x: normalize(f, x, *over_channels(rest)), f))
    expected = jax.jit(model.apply)(variables, IMAGES)
    found = jax.jit(plain.apply)({"params": exported}, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(expected) > 0.1


def over_channels(numbers):
    return (jnp.expand_dims(value, (0, 1, 2)) if np.ndim(value) else value for value in numbers)


class MLP(nnx.Module):
    def __init__(self, form):
        rngs, widths = nnx.Rngs(0), (8, 12, 12, 4)
        self.dense = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(widths)])
        self.act = nnx.List([anact_jax.nnx.NSwish(features=m, form=form) for m in widths[1:-1]])

    def __call__(self, x):
        for dense, act in zip(self.dense, self.act, strict=False):
            x = act(dense(x))
        return self.dense[-1](x)


@pytest.mark.slow
def test_mlp_of_nnx_with_factor_and_shift_folded_into_the_next_layer():
    model, x = MLP(FORMS["learned"]), IMAGES[:, 0, :, 0]
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    model.train()

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), LABELS).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(4):
        step(model, optimizer)
    assert model.act[0].alpha[...] != 0
    model.eval()
    expected = model(x)
    for index, act in enumerate(model.act):
        following = model.dense[index + 1]
        kernel, bias = fold(act.normalization(), following.kernel[...], following.bias[...])
        following.kernel[...], following.bias[...] = kernel, bias
    functions = [act.activation for act in model.act]
    for dense, f in zip(model.dense, functions, strict=False):
        x = f(dense(x))
    np.testing.assert_allclose(model.dense[-1](x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [Standardized(), Standardized(axis=1), Published(learned=True)],
    ids=["default", "another axis", "learned"],
)
def test_function_equals_linen_s_inference_and_holds_two_constants(form):
    layer = anact_jax.linen.NGELU(form=form, use_running_average=False)
    variables = layer.init(jax.random.key(0), IMAGES)
    _, updates = layer.apply(variables, IMAGES, mutable=["batch_stats"])
    variables = {**jax.tree.map(lambda alpha: alpha + 0.7, variables), **updates}
    function = as_function(layer.bind(variables))
    expected = layer.copy(use_running_average=True).apply(variables, IMAGES)
    np.testing.assert_allclose(function(IMAGES), expected, rtol=1e-5, atol=1e-6)
    assert function(IMAGES.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    factor, shift = layer.bind(variables).normalization()
    jaxpr = jax.make_jaxpr(function)(IMAGES)
    assert [np.squeeze(constant).shape for constant in jaxpr.consts] == [factor.shape, shift.shape]
    assert not {"sqrt", "rsqrt", "reduce_sum", "div"} & set(re.findall(r"= (\w+)", str(jaxpr)))


def test_function_of_nnx_stays_when_the_layer_trains_on():
    layer = anact_jax.nnx.NSwish()
    x = IMAGES[:, 0, 0]
    prior = as_function(layer)
    np.testing.assert_allclose(prior(x), layer(x, use_running_average=True), rtol=1e-5, atol=1e-6)
    layer(x, use_running_average=False)
    trained = as_function(layer)
    y = trained(x)
    np.testing.assert_allclose(y, layer(x, use_running_average=True), rtol=1e-5, atol=1e-6)
    layer(3 * x, use_running_average=False)
    np.testing.assert_array_equal(trained(x), y)
    assert np.abs(y - layer(x, use_running_average=True)).max() > 0.1


@pytest.mark.parametrize("form", [Standardized(), Published(learned=True)], ids=["default", "published"])
def test_normalization_before_training_is_that_of_normal_input(form):
    layer = anact_jax.linen.ANAct(jnp.tanh, form=form, use_running_average=True)
    expected = form.factor_and_shift(gaussian_stats(jnp.tanh))
    found = layer.bind(layer.init(jax.random.key(0), IMAGES)).normalization()
    shape = () if form.axis is None else (3,)
    chex.assert_trees_all_close(found, jax.tree.map(lambda value: jnp.full(shape, value), expected), rtol=1e-6)
    same = anact_jax.nnx.ANAct(jnp.tanh, 3, form=form)
    chex.assert_trees_all_equal(same.normalization(), found)


def test_fold_keeps_the_kernel_s_dtype_and_takes_a_traced_factor():
    numbers, kernel = FactorAndShift(jnp.float32(2.0), jnp.float32(0.5)), jnp.ones((3, 2), jnp.bfloat16)
    folded = jax.jit(fold)(numbers, kernel)
    chex.assert_trees_all_equal(folded, (2 * kernel, jnp.full(2, -3.0, jnp.bfloat16)))


PER_CHANNEL = FactorAndShift(jnp.full(6, 2.0), jnp.full(6, 0.5))
DENSE, WINDOW = jnp.ones((6, 4)), jnp.ones((3, 3, 6, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PER_CHANNEL, jnp.ones((24, 4))), r"shape \(6,\) do not fit a kernel of shape \(24, 4\).*jnp.tile"),
        ((PER_CHANNEL, jnp.ones((3, 4))), r"shape \(6,\) do not fit"),
        ((PER_CHANNEL, jnp.ones((1, 1, 2, 4))), r"shape \(6,\) do not fit"),  # three groups of 4 features
        ((jax.tree.map(lambda value: value[None], PER_CHANNEL), DENSE), r"shape \(1, 6\) do not fit"),
        ((PER_CHANNEL, WINDOW), r"does not say how it pads"),
        ((PER_CHANNEL, WINDOW, None, "CAUSAL"), r"padding='CAUSAL'"),
        ((PER_CHANNEL, WINDOW, None, 1), r"padding=1"),
        ((PER_CHANNEL, WINDOW, None, [(0, 0), (0, 1)]), r"pads with zeros"),
        ((PER_CHANNEL, WINDOW, None, "same"), r"unknown padding 'same'; expected numbers or one of SAME"),
    ],
)
def test_what_cannot_be_folded_is_named(arguments, message):
    numbers, kernel, *rest = arguments
    bias, padding = rest or (None, None)
    with pytest.raises(ValueError, match=message):
        fold(numbers, kernel, bias, padding=padding)


@pytest.mark.parametrize("padding", ["SAME", "CAUSAL", 2, [(0, 1), 0], None])
def test_without_a_shift_padding_does_not_matter(padding):
    kernel, bias = fold(PER_CHANNEL._replace(shift=jnp.zeros(6)), WINDOW, jnp.ones(4), padding=padding)
    chex.assert_trees_all_equal((kernel, bias), (2 * WINDOW, jnp.ones(4)))


def test_linen_layer_without_variables_says_how_to_bind():
    layer = anact_jax.linen.NReLU(use_running_average=True, form=Published(learned=True))
    for wrong in (layer, layer.bind({}), layer.bind({"batch_stats": {"NReLU_0": {}}})):
        with pytest.raises(ValueError, match=r"layer.bind\({'batch_stats': ..., 'params': ...}\)"):
            wrong.normalization()
    with pytest.raises(ValueError, match=r"no batch_stats/count: .*layer.bind\({'batch_stats': ..., 'params'"):
        layer.running_stats()
    state = layer.init(jax.random.key(0), IMAGES)["batch_stats"]
    with pytest.raises(ValueError, match="no params/alpha"):
        layer.bind({"batch_stats": state}).normalization()


def test_stacked_state_is_refused():
    layer = anact_jax.linen.NReLU(use_running_average=True)
    state = layer.init(jax.random.key(0), IMAGES)["batch_stats"]
    stacked = jax.tree.map(lambda value: jnp.stack([value, value]), state)
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*take one's state first"):
        as_function(layer.bind({"batch_stats": stacked}))


@pytest.mark.parametrize("form", [Published(), Standardized(std=1.0, tempering=0.1)], ids=["published", "tempered"])
def test_layers_with_few_and_all_moments_are_exported(form):
    layer = anact_jax.linen.NSwish(form=form, use_running_average=False)
    variables = layer.init(jax.random.key(0), IMAGES)
    assert set(variables["batch_stats"]) == {"count", *form.moments}
    _, updates = layer.apply(variables, IMAGES, mutable=["batch_stats"])
    same = anact_jax.nnx.NSwish(3, form=form)
    same(IMAGES, use_running_average=False)
    expected = layer.copy(use_running_average=True).apply(updates, IMAGES)
    for exported in (as_function(layer.bind(updates)), as_function(same)):
        np.testing.assert_allclose(exported(IMAGES), expected, rtol=1e-5, atol=1e-6)


def training_step(api, form, features):
    """A step as a function of the layer's state, the input and a target; and the state at the start."""
    if api == "linen":
        layer = anact_jax.linen.NSwish(form=form, use_running_average=False)
        leaves, treedef = jax.tree.flatten(layer.init(jax.random.key(0), jnp.ones((2, features))))

        def output(state, x):
            return layer.apply(state, x, mutable=["batch_stats"])
    else:
        graph, state = nnx.split(anact_jax.nnx.NSwish(features, form=form, use_running_average=False))
        leaves, treedef = jax.tree.flatten(state)

        def output(state, x):
            layer = nnx.merge(graph, state)
            return layer(x), nnx.state(layer)

    def step(leaves, x, target):
        def loss(x):
            y, new = output(jax.tree.unflatten(treedef, leaves), x)
            return jnp.mean((y - target) ** 2), jax.tree.leaves(new)

        return jax.value_and_grad(loss, has_aux=True)(x)

    return step, leaves


@pytest.mark.parametrize(
    ("api", "form"),
    [
        ("linen", "published"),
        ("nnx", "default"),
        pytest.param("linen", "default", marks=pytest.mark.slow),
    ],
)
def test_training_step_is_exported_with_a_batch_of_any_size(api, form):
    step, state = training_step(api, form, 6)
    symbols = jax.export.symbolic_shape("b, 5, 5, 6")
    x = jax.ShapeDtypeStruct(symbols, jnp.float32)
    exported = jax.export.export(jax.jit(step))(state, x, x)
    for size in (3, 8):
        x, target = jax.random.normal(jax.random.key(size), (2, size, 5, 5, 6))
        chex.assert_trees_all_close(
            exported.call(state, x, target), jax.jit(step)(state, x, target), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("shape", [(4, 5, 5, 6), (64, 32, 32, 16)])
def test_training_step_is_exported_for_cpu_gpu_and_tpu_in_one(shape):
    step, state = training_step("linen", "default", shape[-1])
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(state, x, x)
    x, target = jax.random.normal(jax.random.key(0), (2, *shape))
    expected = jax.jit(step)(state, x, target)
    chex.assert_trees_all_close(exported.call(state, x, target), expected, rtol=1e-4, atol=1e-6)


def test_function_of_a_learned_activation_is_a_snapshot():
    x = IMAGES[:, 0, 0]
    layer = anact_jax.nnx.ANAct(nnx.PReLU(), 3, tempering=0.1)
    layer(x)
    function, expected = as_function(layer), layer(x, use_running_average=True)
    layer.fn.negative_slope[...] = 0.7
    np.testing.assert_allclose(function(x), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(layer(x, use_running_average=True) - expected).max() > 0.1

    of_linen = anact_jax.linen.ANAct(nn.Sequential([nn.PReLU(), jnp.tanh]), use_running_average=True)
    variables = of_linen.init(jax.random.key(0), x)
    function = as_function(of_linen.bind(variables))
    np.testing.assert_allclose(function(x), of_linen.apply(variables, x), rtol=1e-5, atol=1e-6)


def test_fold_follows_a_masked_convolution():
    mask = jnp.tril(jnp.ones((3, 6, 4)))
    layer = nn.Conv(4, (3,), mask=mask, padding="VALID")
    x = jax.random.normal(jax.random.key(0), (2, 9, 6))
    params = layer.init(jax.random.key(1), x)["params"]
    normalized = PER_CHANNEL.factor[None, None] * (x - PER_CHANNEL.shift[None, None])
    kernel, bias = fold(PER_CHANNEL, params["kernel"], params["bias"], padding="VALID", mask=mask)
    folded = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(folded, layer.apply({"params": params}, normalized), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"mask of shape \(3, 6, 1\) is not that of a kernel of shape \(3, 6, 4\)"):
        fold(PER_CHANNEL, params["kernel"], padding="VALID", mask=mask[..., :1])


@pytest.mark.parametrize("input_dilation", [2, (1, 2)])
def test_fold_refuses_a_shift_before_input_dilation(input_dilation):
    kernel = jnp.ones((1, 1, 6, 4))
    with pytest.raises(ValueError, match=r"dilates its input with zeros \(input_dilation="):
        fold(PER_CHANNEL, kernel, padding="VALID", input_dilation=input_dilation)
    found, _ = fold(PER_CHANNEL._replace(shift=jnp.zeros(6)), kernel, padding="VALID", input_dilation=input_dilation)
    np.testing.assert_array_equal(found, 2 * kernel)
    fold(PER_CHANNEL, kernel, padding="VALID", input_dilation=(1, 1))
