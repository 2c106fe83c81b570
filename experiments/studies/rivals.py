"""What a plain activation could be helped by instead: other places for BatchNorm, and networks that need none."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anact_jax import ACTIVATIONS, Activation, Standardized, gaussian_stats, tempered
from anact_jax.linen import ANAct
from experiments.config import Recipe
from experiments.data import Dataset
from experiments.networks import Join, Layers, Plain, on_each
from experiments.studies.results import not_run_today
from experiments.studies.vmapped_training import conv_by_matmul, for_ensemble
from experiments.training.build import layers_of, make_network

DEEP_KERNEL_SHAPING = "Deep Kernel Shaping"
TEMPERED_TO = 0.1  # limit of the nonlinearity, where it is tempered
UNIT = Standardized(std=1.0, axis=None, stop_gradient=True)

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
        ValueError: that package does not know the activation, or is missing.
    """
    if name not in _SHAPEABLE:
        raise ValueError(f"Deep Kernel Shaping is to be had for {', '.join(_SHAPEABLE)}, not for {name!r}")
    try:
        from dks.base.activation_transform import get_transformed_activations
    except ImportError as error:
        raise ValueError(
            f"Deep Kernel Shaping needs {error.name}; install it: pip install -e '.[experiments]'"
        ) from error
    with np.errstate(over="ignore"):  # its derivative of tanh far out, where it is 0
        shaped: Activation = get_transformed_activations(
            [name],
            max_slope_func=depth.slope,
            activation_getter=lambda known: ACTIVATIONS[known],
        )[name]
    return shaped


def depth_of(model: nn.Module, dataset: Dataset) -> Depth:
    """Of a network with plain activations."""
    found: list[nn.Module] = []
    with on_each(Plain | Join, lambda module, _: found.append(module)):
        images = jnp.zeros((1, *dataset.train.shape))
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    branches = tuple(module.activations for module in found if isinstance(module, Join))
    return Depth(sum(isinstance(module, Plain) for module in found) - sum(branches), branches)


class UnitKernel(nn.Module):
    """A dense layer, or a convolution, whose kernel has the norm `gain` for each unit, whatever was learned.

    Attributes:
        features: number of units.
        kernel_size: of a convolution, None for a dense layer.
        strides: of a convolution.
        center: take the mean of a unit's kernel out first: with a learned gain, scaled weight standardization (Brock et
            al., arXiv 2101.08692); without both, EDM2's forced weight normalization (Karras et al., arXiv 2312.02696).
    """

    features: int
    kernel_size: tuple[int, int] | None = None
    strides: int | tuple[int, int] = 1
    center: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """The layer's output."""
        init = jax.nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (*(self.kernel_size or ()), x.shape[-1], self.features))
        axes = tuple(range(kernel.ndim - 1))
        if self.center:
            kernel = kernel - jnp.mean(kernel, axes, keepdims=True)
        kernel = kernel * jax.lax.rsqrt(jnp.sum(kernel**2, axes, keepdims=True) + 1e-8)
        if self.center:
            kernel = kernel * jnp.expand_dims(self.param("gain", nn.initializers.ones, (self.features,)), axes)
        if self.kernel_size is None:
            y = x @ kernel
        else:
            strides = self.strides if isinstance(self.strides, tuple) else (self.strides,) * 2
            y = conv_by_matmul(x, kernel, strides, "SAME")
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))


class BlendedSum(nn.Module):
    """The sum of a residual block as `keep x + add branch`."""

    keep: float
    add: float

    def __call__(self, x: Float[Array, "*shape"], branch: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The block's output, from its shortcut x and its branch."""
        return self.keep * x + self.add * branch


def _shaped(recipe: Recipe, layers: Layers, dataset: Dataset) -> Layers:
    depth = depth_of(make_network(recipe.network, dataset, layers), dataset)
    shaped = deep_kernel_shaped(recipe.network.activation, depth)
    join = BlendedSum(SHORTCUT_WEIGHT, math.sqrt(1 - SHORTCUT_WEIGHT**2))
    return layers._replace(act=lambda inference: Plain(shaped), join=lambda activations: join)


def _tempered(recipe: Recipe, layers: Layers, dataset: Dataset) -> Layers:
    fn = tempered(ACTIVATIONS[recipe.network.activation], TEMPERED_TO)
    return layers._replace(act=lambda inference: Plain(fn))


def _batch_norm_behind(recipe: Recipe, layers: Layers, dataset: Dataset, limit: float | None = None) -> Layers:
    """BatchNorm(f(x)), f tempered to a limit of its nonlinearity."""
    fn = tempered(ACTIVATIONS[recipe.network.activation], limit)
    norm = layers_of(dataclasses.replace(recipe.network, norm="batch")).norm
    return layers._replace(act=lambda inference: nn.Sequential([Plain(fn), norm(inference)]))


def _frozen(recipe: Recipe, layers: Layers, dataset: Dataset) -> Layers:
    """Normalized to deviation 1, with the statistics under N(0, 1) instead of the batch's."""
    frozen = ANAct(ACTIVATIONS[recipe.network.activation], form=UNIT, use_running_average=True)
    return layers._replace(act=lambda inference: frozen.copy())


def _normalizer_free(recipe: Recipe, layers: Layers, dataset: Dataset) -> Layers:
    """Kernels standardized, f by its deviation under N(0, 1), branches weighted by 0.2, as in Brock et al."""
    fn = ACTIVATIONS[recipe.network.activation]
    scale = UNIT.factor_and_shift(gaussian_stats(fn)).factor
    return layers._replace(
        conv=UnitKernel,
        dense=UnitKernel,
        act=lambda inference: Plain(lambda x: scale * fn(x)),
        join=lambda activations: BlendedSum(1.0, 0.2),
    )


def _magnitude_preserving(recipe: Recipe, layers: Layers, dataset: Dataset) -> Layers:
    """Kernels of unit norm, f by its mean square under N(0, 1), sums that keep the variance, as in EDM2."""
    fn = ACTIVATIONS[recipe.network.activation]
    scale = dataclasses.replace(UNIT, center=False).factor_and_shift(gaussian_stats(fn)).factor
    return _with_magnitudes_kept(recipe, layers, dataset)._replace(act=lambda inference: Plain(lambda x: scale * fn(x)))


def _with_magnitudes_kept(recipe: Recipe, layers: Layers, dataset: Dataset) -> Layers:
    """The same kernels and sums, whatever the activation."""
    del recipe, dataset
    part = math.hypot(0.7, 0.3)
    return layers._replace(
        conv=functools.partial(UnitKernel, center=False),
        dense=functools.partial(UnitKernel, center=False),
        join=lambda activations: BlendedSum(0.7 / part, 0.3 / part),
    )


VARIATIONS_OF_FORMS: Mapping[str, Callable[[Recipe, Layers, Dataset], Layers]] = MappingProxyType(
    {
        "in a magnitude-preserving network": _with_magnitudes_kept,
    }
)
"""By name, what is changed in a network with a normalized activation."""

VARIATIONS: Mapping[str, Callable[[Recipe, Layers, Dataset], Layers]] = MappingProxyType(
    {
        DEEP_KERNEL_SHAPING: _shaped,
        "tempered": _tempered,
        "BatchNorm behind": _batch_norm_behind,
        "tempered, BatchNorm behind": functools.partial(_batch_norm_behind, limit=TEMPERED_TO),
        "frozen": _frozen,
        "normalizer-free": _normalizer_free,
        "magnitude-preserving": _magnitude_preserving,
    }
)
"""By name, what is changed in a network with a plain activation."""


def network_of(recipe: Recipe, variation: str, dataset: Dataset) -> nn.Module:
    """A recipe's network for an ensemble, as it is or with its activation in another way.

    Raises:
        ValueError: there is no such variation, or as `make_network` and `deep_kernel_shaped` raise.
    """
    layers = for_ensemble(layers_of(recipe.network))
    known = {**VARIATIONS, **VARIATIONS_OF_FORMS}
    if variation in known:
        layers = known[variation](recipe, layers, dataset)
    elif variation:
        raise not_run_today(variation)
    return make_network(recipe.network, dataset, layers)
