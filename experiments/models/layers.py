"""The parts that every network takes from outside, and how to make them."""

import functools
import math
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anact_jax import ACTIVATIONS, Activation
from experiments.models.names import ActivationName, check_name
from experiments.models.shaping import SHORTCUT_WEIGHT, Depth, deep_kernel_shaped
from experiments.models.studied import normalized

_SHALLOW = Depth()
INITS = {"lecun": 1.0, "he": 2.0}  # variance of a weight times fan-in
NORMS = ("batch", "group", "layer", "none")


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
        join: takes the number of activations in a branch; adds the branch to its shortcut.
    """

    conv: Callable[..., Layer]
    dense: Callable[..., Layer]
    norm: Callable[[bool], Layer]
    act: Callable[[bool], Layer]
    join: Callable[[int], "Join"]

    def in_mode(self, train: bool) -> tuple[Callable[..., Layer], Callable[[], Layer], Callable[[], Layer]]:
        """The makers of convolution, normalization layer and activation for training or for inference."""
        return self.conv, functools.partial(self.norm, not train), functools.partial(self.act, not train)


class Plain(nn.Module):
    """A plain activation as a module, so that tools find it where they find `ANAct`."""

    fn: Activation

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """fn(x)."""
        return self.fn(x)


class Join(nn.Module):
    """The sum of a residual block.

    Attributes:
        activations: in the branch.
        shortcut_weight: w where the sum is `w x + sqrt(1 - w^2) branch`, None where it is `x + branch`.
    """

    activations: int
    shortcut_weight: float | None

    def __call__(self, x: Float[Array, "*shape"], branch: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The block's output, from its shortcut x and its branch."""
        if self.shortcut_weight is None:
            return x + branch
        return self.shortcut_weight * x + math.sqrt(1 - self.shortcut_weight**2) * branch


def on_each(kind: type | types.UnionType, visit: Callable[[Any, Array], None]) -> AbstractContextManager[None]:
    """While this context lasts, `visit` is given each module of a kind that is called, and its input."""

    def on_call(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, kind) and context.method_name == "__call__":
            visit(context.module, args[0])
        return call(*args, **kwargs)

    return nn.intercept_methods(on_call)


class Scaled(nn.Module):
    """An activation times a constant."""

    layer: Layer
    scale: float

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scale * layer(x)."""
        return self.scale * self.layer(x)


def activation_layer(name: str, *, depth: Depth = _SHALLOW, **options: Any) -> Callable[[bool], Layer]:
    """Maker of an activation: `"swish"` is plain, `"nswish"` is `normalized(swish, **options)`, `"dswish"` shaped.

    Args:
        name: see `ActivationName`.
        depth: of the network, which Deep Kernel Shaping needs to know.
        **options: see `normalized`.

    Raises:
        ValueError: no activation has this name, or it cannot be normalized so.
    """
    form, base = ActivationName.parse(name)
    fn = ACTIVATIONS[base]
    if form == "n":
        return normalized(fn, **options)
    if form == "d":
        fn = deep_kernel_shaped(base, depth)
    return lambda inference: Plain(fn)


def norm_layer(name: str, *, momentum: float, group_size: int) -> Callable[[bool], Layer]:
    """Maker of batch, group, layer or no normalization over channels-last input.

    Layer normalization is over all of an example, as group normalization with a single group.

    Raises:
        ValueError: unknown name.
    """
    check_name("norm", name, NORMS)
    if name == "batch":
        return lambda use_running_average: nn.BatchNorm(use_running_average=use_running_average, momentum=momentum)
    if name == "group":
        return lambda use_running_average: nn.GroupNorm(num_groups=None, group_size=group_size)
    if name == "layer":
        return lambda use_running_average: nn.GroupNorm(num_groups=1)
    return lambda use_running_average: lambda x: x


def make_layers(
    activation: str,
    norm: str,
    *,
    init: str = "lecun",
    norm_momentum: float = 0.9,
    group_size: int = 8,
    activation_scale: float = 1.0,
    convs_by_matmul: bool = False,
    **activation_options: Any,
) -> Layers:
    """The parts of a network by name; weights are truncated normal of variance `INITS[init]` / fan-in.

    A convolution has a bias only where no normalization layer brings one. Deep Kernel Shaping weights shortcuts, all
    others add them. Activations are multiplied
    by `activation_scale`: 1, but for studies of what happens elsewhere. `convs_by_matmul` computes the same
    convolutions in another way: see `conv_by_matmul`.

    Raises:
        ValueError: unknown activation, norm or init.
    """
    check_name("init", init, INITS)
    act = activation_layer(activation, **activation_options)
    shaped = ActivationName.parse(activation).form == "d"
    kernel_init = jax.nn.initializers.variance_scaling(INITS[init], "fan_in", "truncated_normal")
    return Layers(
        conv=functools.partial(
            nn.Conv,
            use_bias=norm == "none",
            kernel_init=kernel_init,
            conv_general_dilated=conv_by_matmul if convs_by_matmul else None,
        ),
        dense=functools.partial(nn.Dense, kernel_init=kernel_init),
        norm=norm_layer(norm, momentum=norm_momentum, group_size=group_size),
        act=act if activation_scale == 1 else lambda mode: Scaled(act(mode), activation_scale),
        join=functools.partial(Join, shortcut_weight=SHORTCUT_WEIGHT if shaped else None),
    )


def conv_by_matmul(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels features"],
    strides: Sequence[int],
    padding: Any,
    **unused: Any,
) -> Float[Array, "batch height2 width2 features"]:
    """`jax.lax.conv_general_dilated` for `nn.Conv` with padding "SAME", as one matrix product of shifted images.

    On a CPU several times as fast where channels are few, and the only fast way where `vmap` gives each of
    several networks its own kernel, which XLA takes for a grouped convolution.
    """
    batch, *size, channels = x.shape
    *window, _, features = kernel.shape
    out = [-(-n // stride) for n, stride in zip(size, strides, strict=True)]
    missing = [max((m - 1) * s + w - n, 0) for m, s, w, n in zip(out, strides, window, size, strict=True)]
    x = jnp.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in missing), (0, 0)))
    shifted = [
        x[:, i : i + (out[0] - 1) * strides[0] + 1 : strides[0], j : j + (out[1] - 1) * strides[1] + 1 : strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, math.prod(window) * channels)
    return (patches @ kernel.reshape(-1, features)).reshape(batch, *out, features)
