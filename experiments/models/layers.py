"""The three parts that every network takes from outside, and how to make them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from anact_jax import ACTIVATIONS, Activation
from anact_jax.linen import ANAct

INITS = {"lecun": 1.0, "he": 2.0}  # variance of a weight times fan-in
NORMS = ("batch", "group", "none")


class Layer(Protocol):
    """Anything that maps an array to an array."""

    def __call__(self, x: Array, /) -> Array:
        """The layer's output."""
        ...


class Layers(NamedTuple):
    """Makers of layers, as injected into networks.

    Attributes:
        conv: takes features, kernel size, strides; makes a convolution.
        norm: takes `use_running_average`; makes a normalization layer.
        act: takes `use_running_average`; makes an activation.
    """

    conv: Callable[..., Layer]
    norm: Callable[[bool], Layer]
    act: Callable[[bool], Layer]

    def in_mode(self, train: bool) -> tuple[Callable[..., Layer], Callable[[], Layer], Callable[[], Layer]]:
        """The makers of convolution, normalization layer and activation for training or for inference."""
        return self.conv, functools.partial(self.norm, not train), functools.partial(self.act, not train)


class Plain(nn.Module):
    """A plain activation as a module, so that tools find it where they find `ANAct`."""

    fn: Activation

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """fn(x)."""
        return self.fn(x)


def check_activation(name: str) -> None:
    """Raises ValueError unless `name` is an activation, or one with `n` before it for its normalized form."""
    if name not in ACTIVATIONS and name.removeprefix("n") not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; expected one of {', '.join(ACTIVATIONS)}, or n and its name")


def activation_layer(name: str, **options: Any) -> Callable[[bool], Layer]:
    """Maker of the activation called `name`; `"nswish"` is `ANAct(swish, **options)`, `"swish"` is plain.

    Raises:
        ValueError: no activation has this name.
    """
    check_activation(name)
    if name in ACTIVATIONS:
        return lambda use_running_average: Plain(ACTIVATIONS[name])
    return lambda use_running_average: ANAct(
        ACTIVATIONS[name.removeprefix("n")], use_running_average=use_running_average, **options
    )


def norm_layer(name: str, *, momentum: float, group_size: int) -> Callable[[bool], Layer]:
    """Maker of batch, group or no normalization over channels-last input."""
    if name == "batch":
        return lambda use_running_average: nn.BatchNorm(use_running_average=use_running_average, momentum=momentum)
    if name == "group":
        return lambda use_running_average: nn.GroupNorm(num_groups=None, group_size=group_size)
    return lambda use_running_average: lambda x: x


def conv_layer(init: str, *, use_bias: bool) -> Callable[..., Layer]:
    """Maker of convolutions with truncated normal weights; a bias only where no normalization layer brings one."""
    kernel_init = jax.nn.initializers.variance_scaling(INITS[init], "fan_in", "truncated_normal")
    conv: Callable[..., Layer] = functools.partial(nn.Conv, use_bias=use_bias, kernel_init=kernel_init)
    return conv
