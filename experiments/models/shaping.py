"""Deep Kernel Shaping (Martens et al., arXiv 2110.01765), a rival: activations shaped once, for a network's depth."""

import functools
import math
from typing import NamedTuple

import numpy as np
from dks.base.activation_transform import get_transformed_activations

from anact_jax import ACTIVATIONS, Activation

_SHAPEABLE = ("elu", "gelu", "relu", "selu", "sigmoid", "softplus", "swish", "tanh")
SHORTCUT_WEIGHT = 0.8  # w of the sums `w x + sqrt(1 - w^2) branch` that the method asks for in residual networks


class Depth(NamedTuple):
    """Activations on the way through a network.

    Attributes:
        chain: those that are in no branch.
        branches: those in each branch that has a shortcut.
    """

    chain: int = 1
    branches: tuple[int, ...] = ()

    def slope(self, local: float) -> float:
        """Slope at 1 of the map from two inputs' correlation to that of the outputs: the largest of its subnetworks.

        As the authors' example of a residual network has it.

        Args:
            local: that of one activation.
        """
        kept = SHORTCUT_WEIGHT**2
        blocks = math.prod(kept + (1 - kept) * local**activations for activations in self.branches)
        return max([local**self.chain * blocks, *(local**activations for activations in self.branches)])


@functools.cache
def deep_kernel_shaped(name: str, depth: Depth) -> Activation:
    """The activation, shifted and scaled inside and out, for networks of this depth.

    By the authors' package `dks`, with its defaults (zeta = 1.5).

    Raises:
        ValueError: that package does not know the activation.
    """
    if name not in _SHAPEABLE:
        raise ValueError(f"Deep Kernel Shaping is to be had for {', '.join(_SHAPEABLE)}, not for {name!r}")
    with np.errstate(over="ignore"):  # its derivative of tanh far out, where it is 0
        shaped: Activation = get_transformed_activations(
            [name],
            max_slope_func=depth.slope,
            activation_getter=lambda known: ACTIVATIONS[known],
        )[name]
    return shaped
