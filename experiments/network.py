"""The network that a configuration asks for."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.config import TrainConfig
from experiments.data import Dataset
from experiments.models import ActivationName, Depth, Join, Plain, make_layers, make_model, on_each


def make_network(config: TrainConfig, dataset: Dataset, *, convs_by_matmul: bool = False) -> nn.Module:
    """The network, tried out on the data set's shapes without computing anything.

    Raises:
        ValueError: a name is unknown, or its layers do not fit together, or not with the images.
    """
    images = jnp.zeros((1, *dataset.train.shape))
    make_layers_of = functools.partial(
        make_layers,
        norm=config.norm,
        init=config.init,
        norm_momentum=config.norm_momentum,
        group_size=config.group_size,
        form=config.form,
        momentum=config.activation_momentum,
        activation_scale=config.activation_scale,
        tracking=config.tracking,
        tempering=config.tempering,
        bounds=config.bounds,
        convs_by_matmul=convs_by_matmul,
    )

    def network(activation: str, depth: Depth) -> nn.Module:
        layers = make_layers_of(activation, depth=depth)
        return make_model(config.model, layers, dataset.classes, config.stem)

    def try_out(model: nn.Module) -> Depth:
        """Of plain activations."""
        found: list[nn.Module] = []
        with on_each(Plain | Join, lambda module, _: found.append(module)):
            jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
        branches = tuple(module.activations for module in found if isinstance(module, Join))
        return Depth(sum(isinstance(module, Plain) for module in found) - sum(branches), branches)

    form, base = ActivationName.parse(config.activation)
    depth = try_out(network(base, Depth())) if form == "d" else Depth()
    model = network(config.activation, depth)
    try_out(model)
    return model


def check_devices(batch_size: int) -> None:
    """Raises ValueError where a batch cannot be divided among the devices."""
    devices = jax.device_count()
    if batch_size % devices:
        raise ValueError(f"batch_size {batch_size} must be a multiple of the number of devices, {devices}")
