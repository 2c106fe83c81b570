"""The parts that every network takes from outside, and how to make them."""

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anact_jax import ACTIVATIONS, Activation
from anact_jax.linen import ANAct
from experiments.networks.activation_name import ActivationName, check_name

INITS = {"lecun": 1.0, "he": 2.0}  # variance of a weight times fan-in
NORMS = ("batch", "group", "layer", "none")
NORM_MOMENTUM = 0.9  # weight of the past in the running statistics of batch normalization
GROUP_SIZE = 8  # channels in a group of group normalization

LayerFunction: TypeAlias = Callable[[Array], Array]
"""Anything that maps an array to an array."""


class Layers(NamedTuple):
    """Makers of layers, as injected into networks.

    Attributes:
        conv: takes features, kernel size, strides; makes a convolution.
        dense: takes features; makes a hidden dense layer.
        norm: takes `use_running_average`; makes a normalization layer.
        act: takes `use_running_average`; makes an activation.
        join: takes the number of activations in a branch; adds the branch to its shortcut.
    """

    conv: Callable[..., LayerFunction]
    dense: Callable[..., LayerFunction]
    norm: Callable[[bool], LayerFunction]
    act: Callable[[bool], LayerFunction]
    join: Callable[[int], Callable[[Array, Array], Array]]

    def in_mode(self, train: bool) -> "InMode":
        """The makers of layers that are others in training than in inference."""
        norm, act = functools.partial(self.norm, not train), functools.partial(self.act, not train)

        def norm_act() -> LayerFunction:
            first, then = norm(), act()
            return lambda x: then(first(x))

        return InMode(norm, act, norm_act)


class InMode(NamedTuple):
    """Makers from `Layers`, for training or for inference: of a normalization layer, an activation, both in turn."""

    norm: Callable[[], LayerFunction]
    act: Callable[[], LayerFunction]
    norm_act: Callable[[], LayerFunction]


class Plain(nn.Module):
    """A plain activation as a module, so that tools find it where they find `ANAct`."""

    fn: Activation

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """fn(x)."""
        return self.fn(x)


class Join(nn.Module):
    """The sum of a residual block, `x + branch`.

    Attributes:
        activations: in the branch.
    """

    activations: int

    def __call__(self, x: Float[Array, "*shape"], branch: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The block's output, from its shortcut x and its branch."""
        return x + branch


def on_each(kind: type | types.UnionType, visit: Callable[[Any, Array], None]) -> AbstractContextManager[None]:
    """While this context lasts, `visit` is given each module of a kind that is called, and its input."""

    def on_call(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, kind) and context.method_name == "__call__":
            visit(context.module, args[0])
        return call(*args, **kwargs)

    return nn.intercept_methods(on_call)


def activation_layer(name: str, **options: Any) -> Callable[[bool], LayerFunction]:
    """Maker of an activation: `"swish"` is plain, `"nswish"` is `ANAct(swish, **options)`.

    Raises:
        ValueError: no activation has this name.
    """
    normalized, base = ActivationName.parse(name)
    fn = ACTIVATIONS[base]
    if not normalized:
        return lambda inference: Plain(fn)
    return lambda inference: ANAct(fn, use_running_average=inference, **options)


def norm_layer(name: str, *, dtype: DTypeLike | None = None) -> Callable[[bool], LayerFunction]:
    """Maker of batch, group, layer or no normalization over channels-last input.

    LayerFunction normalization is over all of an example, as group normalization with a single group.

    Raises:
        ValueError: unknown name.
    """
    check_name("norm", name, NORMS)
    if name == "batch":
        return lambda use_running_average: nn.BatchNorm(
            use_running_average=use_running_average, momentum=NORM_MOMENTUM, dtype=dtype
        )
    if name == "group":
        return lambda use_running_average: nn.GroupNorm(num_groups=None, group_size=GROUP_SIZE, dtype=dtype)
    if name == "layer":
        return lambda use_running_average: nn.GroupNorm(num_groups=1, dtype=dtype)
    return lambda use_running_average: lambda x: x


def make_layers(
    activation: str,
    norm: str,
    *,
    init: str = "lecun",
    dtype: DTypeLike | None = None,
    **activation_options: Any,
) -> Layers:
    """The parts of a network by name; weights are truncated normal of variance `INITS[init]` / fan-in.

    A convolution has a bias only where no normalization layer brings one. Layers compute in `dtype`, by default that of
    their input and parameters, and activations in that of their input; the last layer of each network, which gives
    the logits, in float32.

    Raises:
        ValueError: unknown activation, norm or init.
    """
    check_name("init", init, INITS)
    kernel_init = jax.nn.initializers.variance_scaling(INITS[init], "fan_in", "truncated_normal")
    return Layers(
        conv=functools.partial(nn.Conv, use_bias=norm == "none", kernel_init=kernel_init, dtype=dtype),
        dense=functools.partial(nn.Dense, kernel_init=kernel_init, dtype=dtype),
        norm=norm_layer(norm, dtype=dtype),
        act=activation_layer(activation, **activation_options),
        join=Join,
    )
