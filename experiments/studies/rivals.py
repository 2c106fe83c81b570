"""Deep Kernel Shaping (Martens et al., arXiv 2110.01765): activations shaped once, for a network's depth."""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from dks.base.activation_transform import get_transformed_activations
from jaxtyping import Array, Float

from anact_jax import ACTIVATIONS, Activation
from experiments.config import Recipe
from experiments.data import Dataset
from experiments.networks import Join, Plain, on_each
from experiments.networks.build import layers_of, make_network
from experiments.studies.ensemble import for_ensemble
from experiments.studies.grid import not_run_today

DEEP_KERNEL_SHAPING = "Deep Kernel Shaping"

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


class WeightedSum(nn.Module):
    """The sum of a residual block as the method has it: `w x + sqrt(1 - w^2) branch` with w = `SHORTCUT_WEIGHT`."""

    def __call__(self, x: Float[Array, "*shape"], branch: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The block's output, from its shortcut x and its branch."""
        return SHORTCUT_WEIGHT * x + math.sqrt(1 - SHORTCUT_WEIGHT**2) * branch


def depth_of(model: nn.Module, dataset: Dataset) -> Depth:
    """Of a network with plain activations."""
    found: list[nn.Module] = []
    with on_each(Plain | Join, lambda module, _: found.append(module)):
        images = jnp.zeros((1, *dataset.train.shape))
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    branches = tuple(module.activations for module in found if isinstance(module, Join))
    return Depth(sum(isinstance(module, Plain) for module in found) - sum(branches), branches)


def network_of(recipe: Recipe, variation: str, dataset: Dataset) -> nn.Module:
    """A recipe's network for an ensemble, as it is or with its plain activation shaped.

    Raises:
        ValueError: there is no such variation, or as `make_network` and `deep_kernel_shaped` raise.
    """
    layers = for_ensemble(layers_of(recipe))
    if variation == DEEP_KERNEL_SHAPING:
        depth = depth_of(make_network(recipe, dataset, layers), dataset)
        shaped = deep_kernel_shaped(recipe.activation, depth)
        layers = layers._replace(act=lambda inference: Plain(shaped), join=lambda activations: WeightedSum())
    elif variation:
        raise not_run_today(variation)
    return make_network(recipe, dataset, layers)
