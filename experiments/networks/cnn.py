"""Convolutional networks without shortcuts."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.networks.layers import Layers


class PlainCNN(nn.Module):
    """`depth` 3x3 convolutions in three stages; each stage after the first halves the image and doubles the channels.

    Attributes:
        layers: makers of convolution, normalization layer and activation.
        classes: number of logits.
        depth: number of convolutions, a multiple of 3.
        features: channels of the first stage.
    """

    layers: Layers
    classes: int
    depth: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch classes"]:
        """Logits."""
        conv, make = self.layers.conv, self.layers.in_mode(train)
        for layer in range(self.depth):
            stage, position = divmod(layer, self.depth // 3)
            strides = 2 if stage > 0 and position == 0 else 1
            x = make.norm_act()(conv(self.features * 2**stage, (3, 3), strides)(x))
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


class VGG(nn.Module):
    """The networks of Simonyan and Zisserman, arXiv 1409.1556: stages of 3x3 convolutions with pooling between.

    Attributes:
        layers: makers of convolution, normalization layer and activation.
        classes: number of logits.
        stage_sizes: convolutions in each of the five stages.
        features: channels of the first stage, 64 in the publication; the others have 2, 4, 8, 8 times as many.
        stem: `"imagenet"` has the two hidden layers of 4,096 units on the flattened image of the
            publication (without its dropout); `"small"`, for images of about 32 pixels, classifies the
            mean over the image, as is usual there.
    """

    layers: Layers
    classes: int
    stage_sizes: tuple[int, ...]
    features: int
    stem: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], train: bool) -> Float[Array, "batch classes"]:
        """Logits."""
        conv, make = self.layers.conv, self.layers.in_mode(train)
        for multiple, convolutions in zip((1, 2, 4, 8, 8), self.stage_sizes, strict=True):
            for _ in range(convolutions):
                x = make.norm_act()(conv(multiple * self.features, (3, 3))(x))
            if min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        if self.stem == "imagenet":
            x = x.reshape(x.shape[0], -1)
            for _ in range(2):
                x = make.act()(self.layers.dense(4096)(x))
        else:
            x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes)(x)
