"""What theory predicts for the variance of signals and gradients through depth. Equations as in docs/method.md.

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

from anact_jax.activations import Activation
from anact_jax.factors import Normalization
from anact_jax.gaussian import gaussian_stats
from anact_jax.statistics import Stats, wide_dtype

Scalar: TypeAlias = Float[Array, ""] | float
ByExample: TypeAlias = Float[Array, " examples"] | Scalar

_gaussian_stats = jax.jit(gaussian_stats, static_argnums=0)  # compiled once for all layers of an activation


def plain(stats: Stats) -> Normalization:
    """Factor 1 and shift 0, whatever the statistics: the `Layer.normalization` of a plain activation."""
    return Normalization(jnp.ones_like(stats.var_in), jnp.zeros_like(stats.var_in))


class Layer(NamedTuple):
    """Weights and the activation behind them: `z = W a + b`, then `factor * (f(z) - shift)`.

    Attributes:
        f: any elementwise JAX function; `lambda x: x` where there is none, as behind logits.
        fan_in: inputs of a unit; of a convolution, kernel area times channels.
        fan_out: units that an input reaches; of a convolution, kernel area times channels, divided by
            the product of its strides.
        weight_var: E[W^2].
        normalization: the activation's statistics -> its factor and shift; for what `ANAct` does
            in training, `anact_jax.normalization` with its options bound by `functools.partial`.
        bias_var: E[b^2].
        positions: places at which a convolution's weights are applied; 1 for a dense layer.
    """

    f: Activation
    fan_in: float
    fan_out: float
    weight_var: Scalar
    normalization: Callable[[Stats], Normalization] = plain
    bias_var: Scalar = 0.0
    positions: int = 1


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


def propagate(layers: Sequence[Layer], *, input_sq: ByExample = 1.0, gradient_sq: ByExample = 1.0) -> Variances:
    """Predicted variance of signals and gradients in a chain of layers (method.md, "Derivation").

    With n, m, s^2 and P a layer's fan-in, fan-out, E[W^2] and positions, one example's z normal with
    variance q, and lambda, c the layer's factor and shift at the statistics of all examples' z:

    - `q_l = n_l s_l^2 E[a_{l-1}^2] + E[b_l^2]` and `E[a_l^2] = lambda_l^2 E[(f(z_l) - c_l)^2]`;
    - `E[delta_l^2] = lambda_l^2 E[f'(z_l)^2] E[(dL/da_l)^2]`, where
      `E[(dL/da_l)^2] = m_{l+1} s_{l+1}^2 E[delta_{l+1}^2]`;
    - `E[(dL/dW_l)^2] = P_l E[a_{l-1}^2] E[delta_l^2]`.

    For convolutions that is without borders (circular padding), and for the weight gradient with
    dL/da uncorrelated between the places of the last layer's output. Factors and shifts are
    constants under differentiation.

    Args:
        layers: the chain, from input to output.
        input_sq: E[a_0^2], the mean square of the input's elements: one number for all examples, or
            an array with each example's. Where examples differ, a factor that fits them together
            fits none of them alone, unless f is homogeneous as ReLU is.
        gradient_sq: E[(dL/da_L)^2] for the last layer's output a_L, likewise.

    Returns:
        `Variances` of shape (layers,), or (layers, examples) where an array was given.

    Raises:
        ValueError: no layers, or a number that is negative, not finite or, where something is counted, below 1.

    >>> import jax
    >>> he = Layer(jax.nn.relu, fan_in=500, fan_out=500, weight_var=2 / 500)
    >>> variances = propagate([he] * 30)  # He's initialization keeps the variance of ReLU networks
    >>> [round(float(value), 3) for value in (variances.signal[0], variances.signal[29])]
    [2.0, 2.0]
    >>> import functools
    >>> from anact_jax import normalization
    >>> exact = functools.partial(normalization, rule="exact")
    >>> lecun = Layer(jax.nn.swish, fan_in=500, fan_out=500, weight_var=1 / 500, normalization=exact)
    >>> [round(float(variance), 3) for variance in propagate([lecun] * 30).weight_gradient[::10]]
    [1.0, 1.0, 1.0]
    """
    if not layers:
        raise ValueError("propagate needs at least one layer, got none")
    _check("input_sq", input_sq, 0)
    _check("gradient_sq", gradient_sq, 0)
    for index, layer in enumerate(layers):
        for field, least in (("fan_in", 1), ("fan_out", 1), ("weight_var", 0), ("bias_var", 0), ("positions", 1)):
            _check(f"{field} of layer {index}", getattr(layer, field), least)

    dtype = wide_dtype(jnp.result_type(float))
    incoming, outgoing = jnp.broadcast_arrays(jnp.asarray(input_sq, dtype), jnp.asarray(gradient_sq, dtype))
    entering, signal, slope_sq = [], [], []
    for layer in layers:
        entering.append(incoming)
        signal.append(layer.fan_in * layer.weight_var * incoming + layer.bias_var)
        stats = _gaussian_stats(layer.f, std=jnp.sqrt(signal[-1]))
        factor, shift = layer.normalization(_of_all(stats))
        incoming = factor**2 * (stats.var_out + (stats.mean_out - shift) ** 2)
        slope_sq.append(factor**2 * stats.slope_sq)

    gradient = []
    for layer, slope in zip(reversed(layers), reversed(slope_sq), strict=True):
        gradient.append(slope * outgoing)
        outgoing = layer.fan_out * layer.weight_var * gradient[-1]
    gradient.reverse()

    each = zip(layers, entering, gradient, strict=True)
    weight_gradient = [layer.positions * before * delta for layer, before, delta in each]
    return Variances(jnp.stack(signal), jnp.stack(gradient), jnp.stack(weight_gradient))


def _of_all(stats: Stats) -> Stats:
    """Each example's statistics -> those of the elements of all of them; every mean of x is 0."""
    between = (stats.mean_out - jnp.mean(stats.mean_out)) ** 2
    return Stats(*(jnp.mean(moment) for moment in stats._replace(var_out=stats.var_out + between)))


def _check(name: str, number: ByExample | int, least: int) -> None:
    """Raises ValueError where a number that is known while tracing is not finite or too small."""
    if isinstance(number, jax.core.Tracer):
        return
    if not np.all(np.isfinite(number) & (np.asarray(number) >= least)):
        raise ValueError(f"{name} must be finite and at least {least}, got {number}")
