"""Predictions against Monte Carlo on wide random networks, in closed form, and under changes of scale."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anact_jax import (
    ACTIVATIONS,
    FactorAndShift,
    Published,
    Standardized,
    activation_stats,
    normalize,
)
from anact_jax.theory import Elementwise, Layer, Residual, Variances, linear, propagate

OPTIONS = {
    "plain": None,
    "published": Published(epsilon=0.0),
    "published centered": Published(center=True, epsilon=0.0),
    "uncentered": Standardized(center=False, epsilon=0.0),
    "default": Standardized(epsilon=0.0),
}
FAST = [("relu", "plain"), ("swish", "published"), ("softplus", "default")]
WIDTHS = (300, 640, 512, 768, 512)
NETWORKS = 12


def layer(f, form, fan_in, fan_out, **more):
    if form is not None:
        more["normalization"] = form.factor_and_shift
    return Layer(f, fan_in, fan_out, **more)


def monte_carlo(variances, weights, output, batch):
    """Mean of what `variances` finds in networks with random weights, for a random gradient at the output.

    `weights` has shape and standard deviation of each layer's, `output` the shape of an example's output.
    """
    rng = np.random.default_rng(0)

    def sample(shape, deviation=1.0):
        return np.float32(deviation) * rng.standard_normal(shape, np.float32)

    found = [variances([sample(*each) for each in weights], sample((batch, *output))) for _ in range(NETWORKS)]
    return jax.tree.map(lambda *values: np.mean(values, axis=0), *found)


def layers_of(elements):
    """In the order in which they are written."""
    for element in elements:
        if isinstance(element, Residual):
            yield from layers_of((*element.branch, *element.shortcut))
        elif isinstance(element, Layer):
            yield element


def run(elements, a, parts, record):
    """Output of a network with weights and added terms from `parts`; what enters and leaves layers goes to `record`."""
    for element in elements:
        if isinstance(element, Residual):
            branch = run(element.branch, a, parts, record)
            a = branch + run(element.shortcut, a, parts, record)
            continue
        if isinstance(element, Layer):
            weight, term = next(parts)
            entering, a = a, (a @ weight if weight.ndim == 2 else convolve(element, a, weight)) + term
            record.append((entering, a))
        factor, shift = element.normalization(activation_stats(element.f, jax.lax.stop_gradient(a)))
        a = normalize(element.f, a, factor, shift)
    return a


class Convolution(Layer):
    """A layer with the `shape` of its kernel, its `stride`, and the `side` of its output, which is square."""


def convolution(n, m, side, f=linear, options=None, *, size=3, stride=1):
    area = size**2
    plain = layer(f, options, area * n, area * m / stride**2, weight_var=1 / (area * n), positions=side**2)
    made = Convolution(*plain)
    made.shape, made.stride, made.side = (size, size, n, m), stride, side
    return made


def convolve(layer, a, weight):
    """With circular padding."""
    margin, dimensions = len(weight) // 2, ("NHWC", "HWIO", "NHWC")
    padded = jnp.pad(a, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="wrap")
    strides = (layer.stride, layer.stride)
    return jax.lax.conv_general_dilated(padded, weight, strides, "VALID", dimension_numbers=dimensions)


def dense(elements, x):
    """Variances by layer and example in networks of dense layers, and theory; factors are those of the batch."""
    layers = list(layers_of(elements))

    def loss(added, weights, cotangent):
        record = []
        a = run(elements, x, zip(weights, added, strict=True), record)
        return jnp.sum(a * cotangent), record

    @jax.jit
    def variances(weights, cotangent):
        zeros = [jnp.zeros((len(x), layer.fan_out)) for layer in layers]
        deltas, record = jax.grad(loss, has_aux=True)(zeros, weights, cotangent)
        before, signal, gradient = (
            jnp.stack([jnp.mean(v**2, axis=1) for v in values]) for values in (*zip(*record, strict=True), deltas)
        )
        return Variances(signal, gradient, before * gradient)

    weights = [((layer.fan_in, layer.fan_out), np.sqrt(layer.weight_var)) for layer in layers]
    found = monte_carlo(variances, weights, (layers[-1].fan_out,), len(x))
    return found, propagate(elements, input_sq=jnp.mean(x**2, axis=1))


def chain(f, options, scale=1.0):
    """Layers of `WIDTHS` with weights of variance scale / fan-in."""
    return [layer(f, options, n, m, weight_var=scale / n) for n, m in itertools.pairwise(WIDTHS)]


def check_means(found, predicted):
    for field, values, expected in zip(Variances._fields, found, predicted, strict=True):
        np.testing.assert_allclose(np.mean(values, 1), np.mean(expected, 1), rtol=0.1, err_msg=field)


def check_dense(name, kind):
    x = 1.3 * jax.random.normal(jax.random.key(1), (32, WIDTHS[0]))
    check_means(*dense(chain(ACTIVATIONS[name], OPTIONS[kind], 1.5 if kind == "plain" else 1.0), x))


@pytest.mark.parametrize(("name", "kind"), FAST)
def test_dense_layers_of_unequal_width(name, kind):
    check_dense(name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dense_layers_of_unequal_width_all_activations(name, kind):
    check_dense(name, kind)


@pytest.mark.slow
def test_examples_of_unequal_size():
    """The factor is that of all examples together, and each goes its own way."""
    x = jnp.repeat(jnp.array([0.3, 1.0, 4.0]), 8)[:, None] * jax.random.normal(jax.random.key(1), (24, WIDTHS[0]))
    found, predicted = dense(chain(jax.nn.swish, OPTIONS["published"]), x)
    for field, values, expected in zip(Variances._fields, found, predicted, strict=True):
        by_size, expected_by_size = (v.reshape(-1, 3, 8).mean(-1) for v in (values, expected))
        np.testing.assert_allclose(by_size, expected_by_size, rtol=0.1, err_msg=field)
    growth = predicted.signal[-1] / predicted.signal[0]
    assert growth[-1] > 1.2 > 0.8 > growth[0]


def residual_network(form, f, options):
    """Residual blocks between two layers, as in `ResidualMLP`; or of unequal widths, with a block within a block."""
    act, weights = layer(f, options, 512, 512, weight_var=1 / 512), Layer(linear, 512, 512, 1 / 512)
    if form == "after":
        return [weights, *[Residual([act])] * 5, weights]
    first = Elementwise(f, act.normalization)
    if form == "before":
        return [weights, *[Residual([first, weights])] * 5, weights]
    narrow, wide = act._replace(fan_out=300), Layer(linear, 300, 640, 1 / 300)
    change = Residual([narrow, wide], [Layer(linear, 512, 640, 1 / 512)])
    inner = layer(f, options, 640, 400, weight_var=1 / 640)
    back = Layer(linear, 400, 640, 1 / 400)
    nested = Residual([first, inner, Residual([layer(f, options, 400, 400, weight_var=1 / 400)]), back])
    return [weights, change, nested, first, Layer(linear, 640, 300, 1 / 640)]


FAST_BLOCKS = [
    ("after", "relu", "plain"),
    ("before", "tanh", "published centered"),
    ("unequal", "swish", "uncentered"),
]
ALL_BLOCKS = itertools.product(("after", "before", "unequal"), ACTIVATIONS, OPTIONS)


@pytest.mark.parametrize(
    ("form", "name", "kind"),
    [
        *FAST_BLOCKS,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL_BLOCKS if case not in FAST_BLOCKS),
    ],
)
def test_residual_blocks(form, name, kind):
    x = 1.3 * jax.random.normal(jax.random.key(1), (32, 512))
    check_means(*dense(residual_network(form, ACTIVATIONS[name], OPTIONS[kind]), x))


def chain_of_convolutions(f, options):
    return [
        convolution(48, 64, 8, f, options),
        convolution(64, 96, 4, f, options, stride=2),
        convolution(96, 64, 4, f, options),
    ]


def residual_convolutions(f, options):
    act = layer(f, options, 1, 1, weight_var=1.0)
    first = Elementwise(f, act.normalization)
    smaller = Residual([first, convolution(64, 96, 4, stride=2)], [convolution(64, 96, 4, size=1, stride=2)])
    block = Residual([convolution(96, 96, 4, f, options)])
    return [convolution(48, 64, 8), smaller, block, convolution(96, 64, 4)]


@pytest.mark.parametrize(
    ("network", "name", "kind"),
    [
        (chain_of_convolutions, "swish", "published"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (chain_of_convolutions, "relu", "plain"),
                (chain_of_convolutions, "tanh", "default"),
                (residual_convolutions, "relu", "plain"),
                (residual_convolutions, "swish", "uncentered"),
                (residual_convolutions, "gelu", "published centered"),
            ]
        ),
    ],
)
def test_convolutions(network, name, kind):
    """Strides of 1 and 2, unequal numbers of channels; weight gradients of one example, factors of all, by autodiff."""
    elements, x = network(ACTIVATIONS[name], OPTIONS[kind]), jax.random.normal(jax.random.key(1), (4, 8, 8, 48))
    layers = list(layers_of(elements))

    def loss(weights, added, cotangent):
        record = []
        a = run(elements, x, zip(weights, added, strict=True), record)
        return jnp.sum(a[0] * cotangent[0]), [
            signal for _, signal in record
        ]  # of one example; the factor is that of all

    @jax.jit
    def variances(weights, cotangent):
        zeros = [jnp.zeros((len(x), each.side, each.side, each.shape[-1])) for each in layers]
        (of_weights, deltas), signals = jax.grad(loss, (0, 1), has_aux=True)(weights, zeros, cotangent)
        by_layer = (signals, [delta[0] for delta in deltas], of_weights)
        return Variances(*(jnp.stack([jnp.mean(v**2) for v in values]) for values in by_layer))

    weights = [(each.shape, np.sqrt(each.weight_var)) for each in layers]
    found = monte_carlo(variances, weights, (layers[-1].side, layers[-1].side, layers[-1].shape[-1]), len(x))
    predicted = propagate(elements, input_sq=jnp.mean(x**2))
    for field, values, expected in zip(Variances._fields, found, predicted, strict=True):
        np.testing.assert_allclose(values, expected, rtol=0.1, err_msg=field)


def test_he_initialization_keeps_relu_level():
    variances = propagate([Layer(jax.nn.relu, 100, 100, 2 / 100)] * 40, input_sq=0.7, gradient_sq=3.0)
    for values, level in zip(variances, (1.4, 1.5, 0.7 * 1.5), strict=True):
        np.testing.assert_allclose(values, level, rtol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forms_keep_what_they_say(name):
    """The default makes every signal std^2; the published rule balances the gains of signals and gradients."""

    def chain(form):
        return propagate([layer(ACTIVATIONS[name], form, 100, 100, weight_var=1 / 100)] * 10, input_sq=2.0)

    np.testing.assert_allclose(chain(Standardized(std=0.7, epsilon=0.0)).signal[1:], 0.49, rtol=1e-3)
    balanced = chain(OPTIONS["published"])
    forward = balanced.signal[1:] / balanced.signal[:-1]
    backward = balanced.gradient[:-1] / balanced.gradient[1:]
    np.testing.assert_allclose((1 / forward + 1 / backward) / 2, 1, rtol=1e-3)


numbers = st.floats(0.1, 10.0)


@pytest.mark.slow
@given(scale=numbers, input_sq=numbers, gradient_sq=numbers)
def test_scale_laws(scale, input_sq, gradient_sq):
    """ReLU networks are homogeneous in input and weights, normalized ones too; gradients are linear in the gradient."""
    for options in (None, OPTIONS["published"]):
        layers = [layer(jax.nn.relu, options, n, m, weight_var=0.02) for n, m in ((50, 80), (80, 20))]
        base = propagate(layers)
        moved = propagate(layers, input_sq=input_sq, gradient_sq=gradient_sq)
        larger = propagate([each._replace(weight_var=scale * each.weight_var) for each in layers])
        np.testing.assert_allclose(moved.signal, input_sq * base.signal, rtol=1e-4)
        np.testing.assert_allclose(moved.gradient, gradient_sq * base.gradient, rtol=1e-4)
        np.testing.assert_allclose(moved.weight_gradient, input_sq * gradient_sq * base.weight_gradient, rtol=1e-4)
        np.testing.assert_allclose(larger.signal, scale ** np.array([1, 2]) * base.signal, rtol=1e-4)
        np.testing.assert_allclose(larger.gradient, scale ** np.array([1, 0]) * base.gradient, rtol=1e-4)


def test_constant_factor_shift_and_bias():
    """By hand: z = W a + b has variance 4 * 0.125 + 0.25 = 0.75, what follows it is 2 (relu(z) - 0.1)."""
    fixed = FactorAndShift(jnp.float32(2.0), jnp.float32(0.1))
    first = Layer(jax.nn.relu, 4, 3, 0.125, lambda stats: fixed, bias_var=0.25)
    variances = propagate([first, Layer(lambda x: x, 3, 5, 1.0)])
    mean = np.sqrt(0.75 / (2 * np.pi))
    np.testing.assert_allclose(variances.signal, (0.75, 3 * 4 * (0.375 - 0.2 * mean + 0.01)), rtol=1e-4)
    np.testing.assert_allclose(variances.gradient, (5 * 4 * 0.5, 1.0), rtol=1e-4)


def test_activation_before_or_after_weights():
    act, weights = layer(jnp.tanh, OPTIONS["published"], 40, 50, weight_var=0.03), Layer(linear, 40, 50, 0.03)
    apart = propagate([weights, Elementwise(jnp.tanh, act.normalization), weights], input_sq=jnp.array([0.5, 2.0]))
    chex.assert_trees_all_close(apart, propagate([act, weights], input_sq=jnp.array([0.5, 2.0])), rtol=1e-6)


def test_residual_block_by_hand():
    """a + (relu(W a) - 0.1): means add up with those that the shortcut brings."""
    fixed = FactorAndShift(jnp.float32(1.0), jnp.float32(0.1))
    act, back = Layer(jax.nn.relu, 3, 3, 1 / 3, lambda stats: fixed), Layer(linear, 3, 5, 1.0)
    variances = propagate([act, Residual([act]), back], gradient_sq=2.0)
    first = np.array([1 / np.sqrt(2 * np.pi) - 0.1, 0.5 - 0.2 / np.sqrt(2 * np.pi) + 0.01])
    deviation = np.sqrt(first[1])
    second = np.array(
        [deviation / np.sqrt(2 * np.pi) - 0.1, deviation**2 / 2 - 0.2 * deviation / np.sqrt(2 * np.pi) + 0.01]
    )
    total = first[1] + second[1] + 2 * first[0] * second[0]
    np.testing.assert_allclose(variances.signal, (1, first[1], 3 * total), rtol=1e-4)
    np.testing.assert_allclose(variances.gradient, (0.5 * (1 + 0.5) * 10, 0.5 * 10, 2), rtol=1e-4)
    np.testing.assert_allclose(variances.weight_gradient, (7.5, 5 * first[1], 2 * total), rtol=1e-4)


def test_both_paths_of_a_block_may_have_weights():
    """Two branches of variance 1/2 each are one layer; the order of the rows is that of writing."""
    half, back = Layer(linear, 10, 10, 1 / 20), Layer(linear, 10, 10, 1 / 10)
    block = propagate([Residual([half], [half._replace(bias_var=0.25)]), Elementwise(jnp.tanh), back])
    single = propagate([Layer(jnp.tanh, 10, 10, 1 / 10, bias_var=0.25), back])
    np.testing.assert_allclose(block.signal, (0.5, 0.75, single.signal[1]), rtol=1e-5)
    np.testing.assert_allclose(block.gradient[:2], single.gradient[0], rtol=1e-5)


def test_traces_and_takes_networks_by_vmap():
    def last_signal(weight_var):
        return propagate([Layer(jnp.tanh, 10, 10, weight_var)] * 2).signal[-1]

    together = jax.jit(jax.vmap(last_signal))(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(together, [last_signal(0.1), last_signal(0.2)], rtol=1e-5)


RELU = Layer(jax.nn.relu, 10, 10, 0.1)
LINEAR = RELU._replace(f=linear)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: propagate([]), "at least one layer, got none"),
        (lambda: propagate([RELU, Residual([RELU._replace(fan_in=0)])]), "fan_in of layer 1 .* got 0"),
        (
            lambda: propagate([RELU, Elementwise(jnp.tanh)]),
            "must be normal over units.*give the layer before it f=linear",
        ),
        (lambda: propagate([RELU, Residual([Elementwise(jnp.tanh)])]), "branch of a Residual needs a Layer"),
        (lambda: propagate([LINEAR, Residual([RELU]), Elementwise(jnp.tanh)]), "must be normal over units"),
        (lambda: propagate([RELU], input_sq=-1.0), "input_sq must be finite and at least 0, got -1.0"),
        (lambda: propagate([RELU], gradient_sq=float("nan")), "gradient_sq must be finite and at least 0, got nan"),
        (lambda: propagate([RELU, RELU._replace(fan_in=0)]), "fan_in of layer 1 must be finite and at least 1, got 0"),
        (lambda: propagate([RELU._replace(weight_var=-0.1)]), "weight_var of layer 0 must be .* got -0.1"),
        (lambda: propagate([RELU._replace(positions=0)]), "positions of layer 0 must be .* at least 1, got 0"),
        (lambda: propagate([RELU._replace(f=jnp.sum)]), "elementwise"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_propagate_follows_a_slope_that_changes():
    class Scaled:
        slope = 0.5

        def __call__(self, x):
            return self.slope * x

    f = Scaled()
    layer = Layer(f, fan_in=64, fan_out=64, weight_var=1 / 64)
    found = []
    for slope in (0.5, 2.0):
        f.slope = slope
        found.append(propagate([layer] * 3).signal[-1])
    np.testing.assert_allclose(found, [0.5**4, 2.0**4], rtol=1e-5)
