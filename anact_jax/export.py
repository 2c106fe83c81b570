"""A trained layer as a plain function with its constants, and these folded into the layer that follows."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from anact_jax import linen, nnx
from anact_jax.elementwise import wide_dtype
from anact_jax.factors import Normalization, normalization
from anact_jax.form import Form
from anact_jax.statistics import Stats, canonical_axes, other_axes
from anact_jax.step import normalize

Trained: TypeAlias = linen.ANAct | nnx.ANAct
Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]

_PADS_WITH_ZEROS = {"SAME": True, "CAUSAL": True, "VALID": False, "CIRCULAR": False, "REFLECT": False}


def running_stats(layer: Trained) -> Stats:
    """Running statistics that a layer holds: the moments that its form uses.

    Args:
        layer: an NNX `ANAct`, or a Linen one bound to its variables, as `constants` takes it.

    Raises:
        ValueError: a Linen layer without its statistics.
    """
    names = ("count", *Form.parse(layer.form).moments)
    if isinstance(layer, nnx.ANAct):
        return Stats(**{name: jnp.asarray(getattr(layer, name)[...]) for name in names})
    return Stats(**{name: jnp.asarray(_variable(layer, layer.collection, name)) for name in names})


def constants(layer: Trained) -> Normalization:
    """Factor and shift that a trained layer applies in inference, the learned correction included.

    Args:
        layer: an NNX `ANAct`, or a Linen one bound to its variables: `layer.bind({"batch_stats": ...})` with what
            `model.init` and training put under the layer's name; of a learned form its `"params"` too.

    Returns:
        `Normalization` of the statistics' shape. Before training it is that of a standard normal input.

    Raises:
        ValueError: a Linen layer without its variables.

    Examples:
        >>> layer = linen.NReLU(form="forward+center", use_running_average=True)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> [round(float(value), 3) for value in constants(layer.bind(variables))]
        [1.713, 0.399]
    """
    form, alpha = Form.parse(layer.form), None
    if form.learned:
        held: Any = _variable(layer, "params", "alpha") if isinstance(layer, linen.ANAct) else layer.alpha
        alpha = jnp.asarray(held[...])
    stats = jax.tree.map(lambda moment: moment.astype(wide_dtype(moment.dtype)), running_stats(layer))
    return normalization(stats, form, alpha=alpha)


def as_function(layer: Trained) -> Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]:
    """The layer in inference as a function of x alone, `factor * (f(x) - shift)`, with its numbers in it.

    What it returns holds no statistics, equals the layer to rounding, and stays as it is when the layer trains on, an
    activation with parameters included. A function that reads variables goes on reading them.

    Args:
        layer: as `constants` takes it, with concrete values: not under `jit`.

    Returns:
        A function of any array that the layer takes, with output of the input's shape and dtype.

    Raises:
        ValueError: a Linen layer without its variables, or state of several layers, as under `scan` or `vmap`.

    Examples:
        >>> layer = linen.NReLU(form="forward+center", use_running_average=True)
        >>> f = as_function(layer.bind(layer.init(jax.random.key(0), jnp.ones((2, 3)))))
        >>> [round(float(value), 3) for value in f(jnp.array([-1.0, 1.0]))]
        [-0.683, 1.03]
    """
    factor, shift = (np.asarray(value) for value in constants(layer))
    given = Form.parse(layer.form).axes
    feature_axes = given if factor.ndim else ()  # an NNX layer that saw no batch has the same numbers for every feature
    if factor.ndim != len(feature_axes):
        raise ValueError(
            f"the state of shape {factor.shape} does not fit feature_axes {given} of one layer; where a transform "
            "stacked several, take one's state first: jax.tree.map(lambda value: value[index], state)"
        )
    if isinstance(layer, nnx.ANAct) and isinstance(layer.fn, flax.nnx.Module):
        layer = flax.nnx.clone(layer)  # its parameters would go on learning
    f = layer.activation

    def function(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        others = other_axes(canonical_axes(feature_axes, x.ndim), x.ndim)
        return normalize(f, x, jnp.asarray(np.expand_dims(factor, others)), jnp.asarray(np.expand_dims(shift, others)))

    return function


def fold(
    normalization: Normalization,
    kernel: Float[Array, "*window channels out"],
    bias: Float[Array, " out"] | None = None,
    *,
    padding: Padding | None = None,
    input_dilation: int | Sequence[int] | None = None,
    mask: Shaped[Array, "..."] | None = None,
) -> tuple[Float[Array, "*window channels out"], Float[Array, " out"]]:
    """Kernel and bias of the Dense or Conv behind a normalized activation, with factor and shift taken in.

    `W (factor * (f(x) - shift)) + b = W' f(x) + b'` with `W' = W factor` and `b' = b - W' shift`, summed over the
    window. What is left of the activation is `layer.activation`, f itself. Of a grouped convolution (channels of
    the kernel a divisor of those of the factor) each group takes its own part.

    A window that reaches into padding by zeros misses part of that sum, so a shift cannot go into the bias of
    such a layer; a factor can. Between the two layers there may be whatever keeps factor and shift, such as
    average pooling without padding. Flattening channels-last input repeats them:
    `jax.tree.map(lambda value: jnp.tile(value, height * width), normalization)`.

    Args:
        normalization: from `constants`, of shape () or (channels,).
        kernel: of `Dense` or `Conv`, Linen's or NNX's; not of `ConvTranspose` or `DenseGeneral`.
        bias: None for a layer without; it then needs the one returned here (`use_bias=True`).
        padding: that of the Conv, as Flax writes it; a Dense has none.
        input_dilation: likewise.
        mask: likewise; the kernel that is returned is to be used with it, as the one before.

    Returns:
        Kernel and bias, in the kernel's dtype; they are computed in float32 or wider.

    Raises:
        ValueError: shapes do not fit, or the layer pads or dilates its input with zeros (or it is not said how it pads)
            and a shift is not 0. Fold the factor alone then, as
            `normalization._replace(shift=jnp.zeros_like(normalization.shift))`, and keep `f(x) - shift`.

    Examples:
        >>> kernel, bias = fold(Normalization(jnp.array([2.0, 3.0]), jnp.array([0.5, 1.0])), jnp.ones((2, 1)))
        >>> kernel[:, 0].tolist(), bias.tolist()
        ([2.0, 3.0], [-4.0])
    """
    factor, shift = jnp.broadcast_arrays(*normalization)
    *window, channels, out = kernel.shape
    groups = factor.size // channels if factor.ndim else 1
    whole = factor.ndim == 1 and groups * channels == factor.size and (groups == 1 or (window and out % groups == 0))
    if factor.ndim and not whole:
        raise ValueError(
            f"factor and shift of shape {factor.shape} do not fit a kernel of shape {kernel.shape}, which takes "
            f"{channels} channels; behind a flattened image, repeat them for each of its places: "
            "jax.tree.map(lambda value: jnp.tile(value, height * width), normalization)"
        )
    if mask is not None and mask.shape != kernel.shape:
        raise ValueError(f"mask of shape {mask.shape} is not that of a kernel of shape {kernel.shape}")
    unshifted = not isinstance(shift, jax.core.Tracer) and not np.any(shift)
    dilated = any(step != 1 for step in jax.tree.leaves(input_dilation))
    if not unshifted and (dilated or _pads_with_zeros(padding, window)):
        if dilated:
            how, instead = f"dilates its input with zeros (input_dilation={input_dilation})", ""
        else:
            how = "does not say how it pads (padding=...)" if padding is None else f"pads with zeros ({padding=})"
            instead = "; or pad f(x) with the shift first and fold with padding='VALID'"
        raise ValueError(
            f"a shift cannot be folded into the bias of a convolution that {how}: the zeros have no part in the shift. "
            "Fold the factor alone, "
            "fold(normalization._replace(shift=jnp.zeros_like(normalization.shift)), kernel, bias), and keep "
            f"f(x) - shift before it{instead}"
        )

    dtype = wide_dtype(kernel.dtype)

    def over_kernel(value: Array) -> Array:
        by_group = jnp.broadcast_to(value, (groups * channels,)).reshape(groups, channels).T
        return by_group.astype(dtype).reshape(*(1 for _ in window), channels, groups, 1)

    weights = over_kernel(factor) * kernel.astype(dtype).reshape(*window, channels, groups, out // groups)
    applied = weights if mask is None else weights * mask.astype(dtype).reshape(weights.shape)
    moved = jnp.sum(applied * over_kernel(shift), axis=tuple(range(len(window) + 1))).reshape(out)
    new_bias = (jnp.zeros(out, dtype) if bias is None else bias.astype(dtype)) - moved
    return weights.reshape(kernel.shape).astype(kernel.dtype), new_bias.astype(kernel.dtype)


def _pads_with_zeros(padding: Padding | None, window: Sequence[int]) -> bool:
    if math.prod(window) == 1 and (padding is None or isinstance(padding, str)):
        return False
    if padding is None:
        return True
    if isinstance(padding, str):
        if padding not in _PADS_WITH_ZEROS:
            raise ValueError(f"unknown padding {padding!r}; expected numbers or one of {', '.join(_PADS_WITH_ZEROS)}")
        return _PADS_WITH_ZEROS[padding]
    return any(side != 0 for side in jax.tree.leaves(padding))


def _variable(layer: linen.ANAct, collection: str, name: str) -> Array:
    value: Array | None = None if layer.scope is None else layer.get_variable(collection, name)
    if value is None:
        wanted = ", ".join(
            f"{kind!r}: ..." for kind in (layer.collection, *(["params"] if Form.parse(layer.form).learned else []))
        )
        raise ValueError(
            f"{type(layer).__name__} has no {collection}/{name}: a Linen layer must be bound to its own variables, "
            f"layer.bind({{{wanted}}}), each as it stands in the model's under the layer's name"
        )
    return value
