"""Residual networks: those of He et al., arXiv 1512.03385, and wide ones."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.networks.layers import Layers

STEMS = ("small", "imagenet")


class ResNet(nn.Module):
    """Stages of residual blocks; each stage doubles the channels, all but the first halve the image.

    The networks for CIFAR (section 4.2) have three stages of `BasicBlock` that start with 16
    channels and shortcuts without parameters; those for ImageNet (table 1) have four stages that
    start with 64 channels and projecting shortcuts.

    Attributes:
        layers: makers of convolution, normalization layer and activation.
        classes: number of logits.
        stage_sizes: blocks in each stage.
        features: channels of the first stage.
        block: `BasicBlock` or `BottleneckBlock`.
        project: shortcuts that change the shape are 1x1 convolutions (option B); otherwise they take
            every other pixel and fill the new channels with zeros (option A).
        stem: `"imagenet"`, a 7x7 convolution of stride 2 and pooling, or `"small"`, a 3x3
            convolution, for images of about 32 pixels.
    """

    layers: Layers
    classes: int
    stage_sizes: tuple[int, ...]
    features: int
    block: Callable[..., nn.Module]
    project: bool
    stem: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch classes"]:
        """Logits."""
        conv, make = self.layers.conv, self.layers.in_mode(train)
        kernel, strides = ((7, 7), 2) if self.stem == "imagenet" else ((3, 3), 1)
        x = make.norm_act()(conv(self.features, kernel, strides)(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stage_sizes):
            for position in range(blocks):
                strides = 2 if stage > 0 and position == 0 else 1
                x = self.block(self.layers, self.features * 2**stage, strides, self.project)(x, train)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    layers: Layers
    features: int
    strides: int
    project: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], train: bool) -> Float[Array, "batch h2 w2 c2"]:
        """Output of the block."""
        conv, make = self.layers.conv, self.layers.in_mode(train)
        y = make.norm_act()(conv(self.features, (3, 3), self.strides)(x))
        y = make.norm()(conv(self.features, (3, 3))(y))
        shortcut = _shortcut(self.layers, x, self.features, self.strides, self.project, train)
        return make.act()(self.layers.join(1)(shortcut, y))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, four times as many channels out, and a shortcut."""

    layers: Layers
    features: int
    strides: int
    project: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], train: bool) -> Float[Array, "batch h2 w2 c2"]:
        """Output of the block."""
        conv, make = self.layers.conv, self.layers.in_mode(train)
        y = make.norm_act()(conv(self.features, (1, 1))(x))
        y = make.norm_act()(conv(self.features, (3, 3), self.strides)(y))
        y = make.norm()(conv(4 * self.features, (1, 1))(y))
        shortcut = _shortcut(self.layers, x, 4 * self.features, self.strides, self.project, train)
        return make.act()(self.layers.join(2)(shortcut, y))


def _shortcut(layers: Layers, x: Array, features: int, strides: int, project: bool, train: bool) -> Array:
    if x.shape[-1] == features and strides == 1:
        return x
    if project:
        norm = layers.in_mode(train).norm
        return norm()(layers.conv(features, (1, 1), strides)(x))
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


class WideResNet(nn.Module):
    """The networks of Zagoruyko and Komodakis, arXiv 1605.07146: few layers, many channels.

    Three stages of blocks whose normalization layers and activations come before the convolutions.

    Attributes:
        layers: makers of convolution, normalization layer and activation.
        classes: number of logits.
        depth: 6n + 4, where n is the number of blocks in a stage.
        widen: factor on the channels 16, 32, 64.
    """

    layers: Layers
    classes: int
    depth: int
    widen: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch classes"]:
        """Logits."""
        conv, make = self.layers.conv, self.layers.in_mode(train)
        x = conv(16, (3, 3))(x)
        for stage in range(3):
            for position in range((self.depth - 4) // 6):
                strides = 2 if stage > 0 and position == 0 else 1
                x = PreActivationBlock(self.layers, 16 * self.widen * 2**stage, strides)(x, train)
        x = make.norm_act()(x)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


class PreActivationBlock(nn.Module):
    """Twice normalization, activation and 3x3 convolution, and a shortcut around them."""

    layers: Layers
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], train: bool) -> Float[Array, "batch h2 w2 c2"]:
        """Output of the block."""
        conv, make = self.layers.conv, self.layers.in_mode(train)
        y = make.norm_act()(x)
        same_shape = x.shape[-1] == self.features and self.strides == 1
        shortcut = x if same_shape else conv(self.features, (1, 1), self.strides)(y)
        y = conv(self.features, (3, 3), self.strides)(y)
        y = make.norm_act()(y)
        return self.layers.join(2 if same_shape else 1)(shortcut, conv(self.features, (3, 3))(y))
