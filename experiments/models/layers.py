"""The parts that every network takes from outside, and how to make them."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from anact_jax import ACTIVATIONS, Activation
from anact_jax.linen import ANAct

INITS = {"lecun": 1.0, "he": 2.0}  # variance of a weight times fan-in
NORMS = ("batch", "group", "none")


@runtime_checkable
class Layer(Protocol):
    """Anything that maps an array to an array."""

    def __call__(self, x: Array, /) -> Array:
        """The layer's output."""
        ...


class Layers(NamedTuple):
    """Makers of layers, as injected into networks.

    Attributes:
        conv: takes features, kernel size, strides; makes a convolution.
        dense: takes features; makes a hidden dense layer.
        norm: takes `use_running_average`; makes a normalization layer.
        act: takes `use_running_average`; makes an activation.
    """

    conv: Callable[..., Layer]
    dense: Callable[..., Layer]
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


class Scaled(nn.Module):
    """An activation times a constant."""

    layer: Layer
    scale: float

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scale * layer(x)."""
        return self.scale * self.layer(x)


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless `name` is one of `known`."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")


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
    """Maker of batch, group or no normalization over channels-last input.

    Raises:
        ValueError: unknown name.
    """
    check_name("norm", name, NORMS)
    if name == "batch":
        return lambda use_running_average: nn.BatchNorm(use_running_average=use_running_average, momentum=momentum)
    if name == "group":
        return lambda use_running_average: nn.GroupNorm(num_groups=None, group_size=group_size)
    return lambda use_running_average: lambda x: x


def make_layers(
    activation: str,
    norm: str,
    *,
    init: str = "lecun",
    norm_momentum: float = 0.9,
    group_size: int = 8,
    activation_scale: float = 1.0,
    **activation_options: Any,
) -> Layers:
    """The parts of a network by name; weights are truncated normal of variance `INITS[init]` / fan-in.

    A convolution has a bias only where no normalization layer brings one. Activations are multiplied
    by `activation_scale`: 1, but for studies of what happens elsewhere.

    Raises:
        ValueError: unknown activation, norm or init.
    """
    check_name("init", init, INITS)
    act = activation_layer(activation, **activation_options)
    kernel_init = jax.nn.initializers.variance_scaling(INITS[init], "fan_in", "truncated_normal")
    return Layers(
        conv=functools.partial(nn.Conv, use_bias=norm == "none", kernel_init=kernel_init),
        dense=functools.partial(nn.Dense, kernel_init=kernel_init),
        norm=norm_layer(norm, momentum=norm_momentum, group_size=group_size),
        act=act if activation_scale == 1 else lambda mode: Scaled(act(mode), activation_scale),
    )
