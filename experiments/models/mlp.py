"""Plain fully connected networks."""

import flax.linen as nn
from jaxtyping import Array, Float

from experiments.models.layers import Layers


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
        _, norm, act = self.layers.in_mode(train)
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.depth):
            x = act()(norm()(self.layers.dense(self.width)(x)))
        return nn.Dense(self.classes)(x)
