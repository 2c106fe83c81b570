"""The network that a configuration asks for."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.config import TrainConfig
from experiments.data import Dataset
from experiments.models import ActivationName, Plain, make_layers, make_model, on_each


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
        rule=config.rule,
        center=config.center,
        reference=config.reference,
        nonlinearity=config.nonlinearity,
        feature_axes=-1 if config.per_feature else (),
        stop_gradient=config.stop_gradient,
        learnable=config.learnable,
        momentum=config.activation_momentum,
        activation_scale=config.activation_scale,
        tracking=config.tracking,
        convs_by_matmul=convs_by_matmul,
    )

    def network(activation: str, depth: int = 1) -> nn.Module:
        layers = make_layers_of(activation, depth=depth)
        return make_model(config.model, layers, dataset.classes, config.stem)

    def try_out(model: nn.Module) -> int:
        """Number of plain activations."""
        calls = []

        with on_each(Plain, lambda module, _: calls.append(module)):
            jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
        return len(calls)

    form, base = ActivationName.parse(config.activation)
    model = network(config.activation, try_out(network(base))) if form == "d" else network(config.activation)
    try_out(model)
    return model


def check_devices(batch_size: int) -> None:
    """Raises ValueError where a batch cannot be divided among the devices."""
    devices = jax.device_count()
    if batch_size % devices:
        raise ValueError(f"batch_size {batch_size} must be a multiple of the number of devices, {devices}")
