"""Predicted variance of signals and gradients through depth. Equations as in docs/explanation/method.md.

Mean-field theory of random networks (Poole et al., arXiv 1606.05340; Schoenholz et al., arXiv
1611.01232), with the factors that normalized activations take from their batch: one example's signal
is normal, a batch's a mixture of as many normals. It holds for wide layers whose weights are
independent of each other and of what comes in, as at initialization; where a trained network
differs, its weights have learned to.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anact_jax.gaussian import gaussian_stats
from anact_jax.statistics import FactorAndShift, Stats
from anact_jax.tracing import Activation, permanent, wide_dtype

Scalar: TypeAlias = Float[Array, ""] | float
ByExample: TypeAlias = Float[Array, " examples"] | Scalar

_compiled_stats = jax.jit(gaussian_stats, static_argnums=0)  # once for all layers of an activation


def plain(stats: Stats) -> FactorAndShift:
    """Factor 1 and shift 0, whatever the statistics: the `Layer.normalization` of a plain activation."""
    return FactorAndShift(jnp.ones_like(stats.var_in), jnp.zeros_like(stats.var_in))


def linear(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x: the `Layer.f` of weights with no activation behind them."""
    return x


class Layer(NamedTuple):
    """Weights and the activation behind them: `z = W a + b`, then `factor * (f(z) - shift)`.

    Attributes:
        f: any elementwise JAX function; `linear` where there is none, as behind logits.
        fan_in: inputs of a unit; of a convolution, kernel area times channels.
        fan_out: units that an input reaches; of a convolution, kernel area times channels, divided by
            the product of its strides.
        weight_var: E[W^2].
        normalization: the activation's statistics -> its factor and shift; for what `ANAct` does
            in training, `form.factor_and_shift`.
        bias_var: E[b^2].
        positions: places at which a convolution's weights are applied; 1 for a dense layer.
    """

    f: Activation
    fan_in: float
    fan_out: float
    weight_var: Scalar
    normalization: Callable[[Stats], FactorAndShift] = plain
    bias_var: Scalar = 0.0
    positions: int = 1


class Elementwise(NamedTuple):
    """An activation without weights before it, `factor * (f(a) - shift)`, as at the start of a pre-activation branch.

    What comes in must be normal over units: the outputs of layers with `f=linear`, or sums of such.

    Attributes:
        f: any elementwise JAX function.
        normalization: see `Layer`.
    """

    f: Activation
    normalization: Callable[[Stats], FactorAndShift] = plain


class Residual(NamedTuple):
    """The sum of two paths from the same input, `shortcut(a) + branch(a)`.

    Attributes:
        branch: elements of the branch, with a `Layer` among them, whose weights make the two paths independent.
        shortcut: elements of the other path; none for a itself.
    """

    branch: "Sequence[Element]"
    shortcut: "Sequence[Element]" = ()


Element: TypeAlias = Layer | Elementwise | Residual


class Variances(NamedTuple):
    """Mean squares over units, by layer and example; L is the loss of that example alone.

    Attributes:
        signal: `E[z_l^2]`, of what enters the activation.
        gradient: `E[delta_l^2]` with `delta_l = dL/dz_l`.
        weight_gradient: `E[(dL/dW_l)^2]`.
    """

    signal: Float[Array, "layers ..."]
    gradient: Float[Array, "layers ..."]
    weight_gradient: Float[Array, "layers ..."]


def propagate(layers: Sequence[Element], *, input_sq: ByExample = 1.0, gradient_sq: ByExample = 1.0) -> Variances:
    """Predicted variance of signals and gradients in a chain of layers and residual blocks (method.md, "Derivation").

    With n, m, s^2 and P a layer's fan-in, fan-out, E[W^2] and positions, one example's z normal with
    variance q, and lambda, c the layer's factor and shift at the statistics of all examples' z:

    - `q_l = n_l s_l^2 E[a_{l-1}^2] + E[b_l^2]` and `E[a_l^2] = lambda_l^2 E[(f(z_l) - c_l)^2]`;
    - `E[delta_l^2] = lambda_l^2 E[f'(z_l)^2] E[(dL/da_l)^2]`, where
      `E[(dL/da_l)^2] = m_{l+1} s_{l+1}^2 E[delta_{l+1}^2]`;
    - `E[(dL/dW_l)^2] = P_l E[a_{l-1}^2] E[delta_l^2]`.

    A residual block `a' = u + v`, u and v its two paths, whose weights are independent:

    - `E[a'] = E[u] + E[v]` and `E[a'^2] = E[u^2] + E[v^2] + 2 E[u] E[v]`;
    - `E[(dL/da)^2]` is the sum of what the two paths make of `E[(dL/da')^2]`, each as if it were alone.

    The mean over units, `E[a_l] = lambda_l (E[f(z_l)] - c_l)`, is what uncentered branches pile up.

    For convolutions that is without borders (circular padding), and for the weight gradient with
    dL/da uncorrelated between the places of the last layer's output. Factors and shifts are
    constants under differentiation.

    Args:
        layers: the network, from input to output.
        input_sq: E[a_0^2], the mean square of the input's elements: one number for all examples, or
            an array with each example's. Where examples differ, a factor that fits them together
            fits none of them alone, unless f is homogeneous as ReLU is. A residual block that takes the input
            itself takes its mean over units for 0.
        gradient_sq: E[(dL/da_L)^2] for the last layer's output a_L, likewise.

    Returns:
        `Variances` of shape (layers,), or (layers, examples) where an array was given: of each `Layer`, in the order
        in which they are written, a block's branch before its shortcut.

    Raises:
        ValueError: no layers; a number that is negative, not finite or, where something is counted, below 1; an
            `Elementwise` whose input is not normal; a branch without weights.

    Examples:
        >>> import jax
        >>> he = Layer(jax.nn.relu, fan_in=500, fan_out=500, weight_var=2 / 500)
        >>> variances = propagate([he] * 30)  # He's initialization keeps the variance of ReLU networks
        >>> [round(float(value), 3) for value in (variances.signal[0], variances.signal[29])]
        [2.0, 2.0]
        >>> from anact_jax import Standardized
        >>> unit = Standardized(std=1.0).factor_and_shift
        >>> lecun = Layer(jax.nn.swish, fan_in=500, fan_out=500, weight_var=1 / 500, normalization=unit)
        >>> [round(float(variance), 3) for variance in propagate([lecun] * 30).signal[::10]]
        [1.0, 1.0, 1.0]
        >>> weights = Layer(linear, fan_in=500, fan_out=500, weight_var=1 / 500)
        >>> block = Residual([Elementwise(jax.nn.relu), weights])  # x + W relu(x): half as much again
        >>> [round(float(value), 3) for value in propagate([weights, block, block]).gradient]
        [2.25, 1.5, 1.0]
    """
    every = _layers(layers)
    if not every:
        raise ValueError("propagate needs at least one layer, got none")
    _check("input_sq", input_sq, 0)
    _check("gradient_sq", gradient_sq, 0)
    for index, layer in enumerate(every):
        for field, least in (("fan_in", 1), ("fan_out", 1), ("weight_var", 0), ("bias_var", 0), ("positions", 1)):
            _check(f"{field} of layer {index}", getattr(layer, field), least)

    dtype = wide_dtype(jnp.result_type(float))
    incoming, outgoing = jnp.broadcast_arrays(jnp.asarray(input_sq, dtype), jnp.asarray(gradient_sq, dtype))
    _, back = _through(layers, _Units(jnp.zeros_like(incoming), incoming, normal=False))
    _, found = back(outgoing)
    return Variances(*(jnp.stack(values) for values in zip(*found, strict=True)))


class _Units(NamedTuple):
    """What runs between elements: E[a] and E[a^2] over units, by example, and whether a is normal."""

    mean: Array
    square: Array
    normal: bool


# E[(dL/d output)^2] of an element -> E[(dL/d input)^2], and the variances at the layers within.
_Back: TypeAlias = Callable[[Array], tuple[Array, list[Variances]]]


def _through(elements: Sequence[Element], units: _Units) -> tuple[_Units, _Back]:
    """Forward through elements in turn; what takes gradients back through them comes out as a function."""
    backs = []
    for element in elements:
        match element:
            case Layer():
                units, back = _through_layer(element, units)
            case Elementwise():
                units, back = _through_elementwise(element, units)
            case Residual():
                units, back = _through_residual(element, units)
        backs.append(back)

    def back_through_all(outgoing: Array) -> tuple[Array, list[Variances]]:
        found: list[Variances] = []
        for back in reversed(backs):
            outgoing, of_element = back(outgoing)
            found = of_element + found
        return outgoing, found

    return units, back_through_all


def _through_layer(layer: Layer, units: _Units) -> tuple[_Units, _Back]:
    signal = layer.fan_in * layer.weight_var * units.square + layer.bias_var
    after, slope_sq = _activate(layer, jnp.zeros_like(signal), signal)

    def back(outgoing: Array) -> tuple[Array, list[Variances]]:
        gradient = slope_sq * outgoing
        found = Variances(signal, gradient, layer.positions * units.square * gradient)
        return layer.fan_out * layer.weight_var * gradient, [found]

    return after, back


def _through_elementwise(element: Elementwise, units: _Units) -> tuple[_Units, _Back]:
    if not units.normal:
        raise ValueError(
            "the input of an Elementwise must be normal over units: the output of a layer with "
            "f=anact_jax.theory.linear, or a sum of such; give the layer before it f=linear, or put the activation "
            "into a Layer, behind its weights"
        )
    after, slope_sq = _activate(element, units.mean, units.square)
    return after, lambda outgoing: (slope_sq * outgoing, [])


def _through_residual(block: Residual, units: _Units) -> tuple[_Units, _Back]:
    if not any(isinstance(element, Layer) for element in block.branch):
        raise ValueError("the branch of a Residual needs a Layer: without weights of its own it follows the shortcut")
    (branch, back_branch), (shortcut, back_shortcut) = (
        _through(path, units) for path in (block.branch, block.shortcut)
    )
    square = branch.square + shortcut.square + 2 * branch.mean * shortcut.mean

    def back(outgoing: Array) -> tuple[Array, list[Variances]]:
        (by_branch, in_branch), (by_shortcut, in_shortcut) = back_branch(outgoing), back_shortcut(outgoing)
        return by_branch + by_shortcut, in_branch + in_shortcut

    return _Units(branch.mean + shortcut.mean, square, branch.normal and shortcut.normal), back


def _activate(element: Layer | Elementwise, mean: Array, square: Array) -> tuple[_Units, Float[Array, "..."]]:
    """What an element's activation makes of a normal signal of these moments, and the mean square of its slope."""
    stats_of = _compiled_stats if permanent(element.f) else gaussian_stats
    stats = stats_of(element.f, mean, jnp.sqrt(square - mean**2))
    factor, shift = element.normalization(_of_all(stats))
    mean = factor * (stats.mean_out - shift)
    return _Units(mean, factor**2 * stats.var_out + mean**2, element.f is linear), factor**2 * stats.slope_sq


def _layers(elements: Sequence[Element]) -> list[Layer]:
    """All layers in the order in which they are written."""
    found: list[Layer] = []
    for element in elements:
        if isinstance(element, Layer):
            found.append(element)
        elif isinstance(element, Residual):
            found += _layers(element.branch) + _layers(element.shortcut)
    return found


def _of_all(stats: Stats) -> Stats:
    """Each example's statistics -> those of the elements of all of them."""

    def variance(within: Array, mean: Array) -> Array:
        return within + (mean - jnp.mean(mean)) ** 2

    var_in, var_out = variance(stats.var_in, stats.mean_in), variance(stats.var_out, stats.mean_out)
    return Stats(*(jnp.mean(moment) for moment in stats._replace(var_in=var_in, var_out=var_out)))


def _check(name: str, number: ByExample | int, least: int) -> None:
    """Raises ValueError where a number that is known while tracing is not finite or too small."""
    if isinstance(number, jax.core.Tracer):
        return
    if not np.all(np.isfinite(number) & (np.asarray(number) >= least)):
        raise ValueError(f"{name} must be finite and at least {least}, got {number}")
