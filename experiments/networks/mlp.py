"""Fully connected networks, plain and residual."""

import flax.linen as nn
from jaxtyping import Array, Float

from experiments.networks.layers import Layers


class MLP(nn.Module):
    """`depth` hidden layers of `width` units; images are flattened.

    Attributes:
        layers: makers of dense layer, normalization layer and activation.
        classes: number of logits.
        depth: number of hidden layers.
        width: units in each.
    """

    layers: Layers
    classes: int
    depth: int
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."], train: bool) -> Float[Array, "batch classes"]:
        """Logits."""
        make = self.layers.in_mode(train)
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.depth):
            x = make.norm_act()(self.layers.dense(self.width)(x))
        return nn.Dense(self.classes)(x)


class ResidualMLP(nn.Module):
    """A dense layer, then `depth` blocks `x + branch(x)` of one dense layer each; images are flattened.

    Attributes:
        layers: makers of dense layer, normalization layer and activation.
        classes: number of logits.
        depth: number of blocks.
        width: units in each.
        activation_first: the branch is `dense(act(norm(x)))`, otherwise `act(norm(dense(x)))`.
    """

    layers: Layers
    classes: int
    depth: int
    width: int
    activation_first: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."], train: bool) -> Float[Array, "batch classes"]:
        """Logits."""
        make = self.layers.in_mode(train)
        x = self.layers.dense(self.width)(x.reshape(x.shape[0], -1))
        for _ in range(self.depth):
            if self.activation_first:
                branch = self.layers.dense(self.width)(make.norm_act()(x))
            else:
                branch = make.norm_act()(self.layers.dense(self.width)(x))
            x = self.layers.join(1)(x, branch)
        return nn.Dense(self.classes)(x)
