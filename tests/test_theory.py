"""Predictions against Monte Carlo on wide random networks, in closed form, and under changes of scale."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anact_jax import ACTIVATIONS, Normalization, anact, gaussian_stats, normalization
from anact_jax.theory import Layer, Variances, propagate

OPTIONS = {
    "plain": None,
    "mean": {},
    "exact": {"rule": "exact"},
    "centered": {"center": True},
    "unit": {"reference": "unit"},
}
FAST = [("relu", "plain"), ("swish", "mean"), ("softplus", "exact")]
WIDTHS = (300, 640, 512, 768, 512)
NETWORKS = 12


def layer(f, options, fan_in, fan_out, **more):
    if options is not None:
        more["normalization"] = functools.partial(normalization, **options)
    return Layer(f, fan_in, fan_out, **more)


def activate(f, options, z):
    """As a module does in training."""
    return f(z) if options is None else anact(f, z, gaussian_stats(f), **options)[0]


def monte_carlo(variances, weights, output, batch):
    """Mean of what `variances` finds in networks with random weights, for a random gradient at the output.

    `weights` has shape and standard deviation of each layer's, `output` the shape of an example's output.
    """
    rng = np.random.default_rng(0)

    def sample(shape, deviation=1.0):
        return np.float32(deviation) * rng.standard_normal(shape, np.float32)

    found = [variances([sample(*each) for each in weights], sample((batch, *output))) for _ in range(NETWORKS)]
    return jax.tree.map(lambda *values: np.mean(values, axis=0), *found)


def dense(f, options, scale, x):
    """Variances by layer and example in chains of `WIDTHS` with weights of variance scale / fan-in, and theory."""
    pairs = list(itertools.pairwise(WIDTHS))

    def loss(added, weights, cotangent):
        a, entering, signals = x, [], []
        for weight, term in zip(weights, added, strict=True):
            entering.append(a)
            signals.append(a @ weight + term)
            a = activate(f, options, signals[-1])
        return jnp.sum(a * cotangent), (entering, signals)

    @jax.jit
    def variances(weights, cotangent):
        zeros = [jnp.zeros((len(x), n)) for n in WIDTHS[1:]]
        deltas, (entering, signals) = jax.grad(loss, has_aux=True)(zeros, weights, cotangent)
        signal, gradient, before = (
            jnp.stack([jnp.mean(v**2, axis=1) for v in values]) for values in (signals, deltas, entering)
        )
        return Variances(signal, gradient, before * gradient)

    found = monte_carlo(variances, [((n, m), np.sqrt(scale / n)) for n, m in pairs], WIDTHS[-1:], len(x))
    layers = [layer(f, options, n, m, weight_var=scale / n) for n, m in pairs]
    return found, propagate(layers, input_sq=jnp.mean(x**2, axis=1))


def check_dense(name, kind):
    x = 1.3 * jax.random.normal(jax.random.key(1), (32, WIDTHS[0]))
    found, predicted = dense(ACTIVATIONS[name], OPTIONS[kind], 1.5 if kind == "plain" else 1.0, x)
    for field, values, expected in zip(Variances._fields, found, predicted, strict=True):
        np.testing.assert_allclose(np.mean(values, 1), np.mean(expected, 1), rtol=0.1, err_msg=field)


@pytest.mark.parametrize(("name", "kind"), FAST)
def test_dense_layers_of_unequal_width(name, kind):
    check_dense(name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dense_layers_of_unequal_width_all_activations(name, kind):
    check_dense(name, kind)


def test_examples_of_unequal_size():
    """The factor is that of all examples together, and each goes its own way."""
    x = jnp.repeat(jnp.array([0.3, 1.0, 4.0]), 8)[:, None] * jax.random.normal(jax.random.key(1), (24, WIDTHS[0]))
    found, predicted = dense(jax.nn.swish, {}, 1.0, x)
    for field, values, expected in zip(Variances._fields, found, predicted, strict=True):
        by_size, expected_by_size = (v.reshape(-1, 3, 8).mean(-1) for v in (values, expected))
        np.testing.assert_allclose(by_size, expected_by_size, rtol=0.1, err_msg=field)
    growth = predicted.signal[-1] / predicted.signal[0]
    assert growth[-1] > 1.2 > 0.8 > growth[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("swish", "mean"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("relu", "plain"), ("tanh", "exact")]),
    ],
)
def test_convolutions(name, kind):
    """Circular padding, strides of 1, 2 and 1, unequal numbers of channels; weight gradients by autodiff."""
    f, options, channels, strides, sides = ACTIVATIONS[name], OPTIONS[kind], (48, 64, 96, 64), (1, 2, 1), (8, 4, 4)
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, channels[0]))
    pairs = list(itertools.pairwise(channels))

    def loss(weights, added, cotangent):
        a, signals = x, []
        for weight, term, stride in zip(weights, added, strides, strict=True):
            padded = jnp.pad(a, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
            z = jax.lax.conv_general_dilated(
                padded, weight, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            signals.append(z + term)
            a = activate(f, options, signals[-1])
        return jnp.sum(a[0] * cotangent[0]), signals  # of one example; the factor is that of all

    @jax.jit
    def variances(weights, cotangent):
        zeros = [jnp.zeros((len(x), side, side, m)) for side, m in zip(sides, channels[1:], strict=True)]
        (of_weights, deltas), signals = jax.grad(loss, (0, 1), has_aux=True)(weights, zeros, cotangent)
        by_layer = (signals, [delta[0] for delta in deltas], of_weights)
        return Variances(*(jnp.stack([jnp.mean(v**2) for v in values]) for values in by_layer))

    shapes = [((3, 3, n, m), np.sqrt(1 / (9 * n))) for n, m in pairs]
    found = monte_carlo(variances, shapes, (4, 4, channels[-1]), len(x))
    layers = [
        layer(f, options, 9 * n, 9 * m / stride**2, weight_var=1 / (9 * n), positions=side**2)
        for (n, m), stride, side in zip(pairs, strides, sides, strict=True)
    ]
    predicted = propagate(layers, input_sq=jnp.mean(x**2))
    for field, values, expected in zip(Variances._fields, found, predicted, strict=True):
        np.testing.assert_allclose(values, expected, rtol=0.1, err_msg=field)


def test_he_initialization_keeps_relu_level():
    variances = propagate([Layer(jax.nn.relu, 100, 100, 2 / 100)] * 40, input_sq=0.7, gradient_sq=3.0)
    for values, level in zip(variances, (1.4, 1.5, 0.7 * 1.5), strict=True):
        np.testing.assert_allclose(values, level, rtol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rules_keep_what_they_say(name):
    def chain(rule):
        return propagate([layer(ACTIVATIONS[name], {"rule": rule}, 100, 100, weight_var=1 / 100)] * 10, input_sq=2.0)

    np.testing.assert_allclose(chain("forward").signal, 2.0, rtol=1e-3)
    np.testing.assert_allclose(chain("backward").gradient, 1.0, rtol=1e-3)
    for values, level in zip(chain("exact"), (2.0, 1.0, 2.0), strict=True):
        np.testing.assert_allclose(values, level, rtol=1e-2)


numbers = st.floats(0.1, 10.0)


@given(scale=numbers, input_sq=numbers, gradient_sq=numbers)
def test_scale_laws(scale, input_sq, gradient_sq):
    """ReLU networks are homogeneous in input and weights, normalized ones too; gradients are linear in the gradient."""
    for options in (None, {}):
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
    fixed = Normalization(jnp.float32(2.0), jnp.float32(0.1))
    first = Layer(jax.nn.relu, 4, 3, 0.125, lambda stats: fixed, bias_var=0.25)
    variances = propagate([first, Layer(lambda x: x, 3, 5, 1.0)])
    mean = np.sqrt(0.75 / (2 * np.pi))
    np.testing.assert_allclose(variances.signal, (0.75, 3 * 4 * (0.375 - 0.2 * mean + 0.01)), rtol=1e-4)
    np.testing.assert_allclose(variances.gradient, (5 * 4 * 0.5, 1.0), rtol=1e-4)


def test_traces_and_takes_networks_by_vmap():
    def last_signal(weight_var):
        return propagate([Layer(jnp.tanh, 10, 10, weight_var)] * 2).signal[-1]

    together = jax.jit(jax.vmap(last_signal))(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(together, [last_signal(0.1), last_signal(0.2)], rtol=1e-5)


RELU = Layer(jax.nn.relu, 10, 10, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: propagate([]), "at least one layer, got none"),
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
