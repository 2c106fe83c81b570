"""The network that a recipe asks for."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.config import Network
from experiments.data import Dataset
from experiments.networks import Layers, make_layers, make_model


def layers_of(network: Network) -> Layers:
    """Makers of its layers.

    Raises:
        ValueError: a name is unknown.
    """
    parts = network.parts
    return make_layers(
        network.activation,
        network.norm,
        init=parts.init,
        dtype=None if parts.dtype == "float32" else parts.dtype,
        form=network.form.chosen,
        momentum=parts.activation_momentum,
    )


def make_network(network: Network, dataset: Dataset, layers: Layers | None = None) -> nn.Module:
    """The network, tried out on the data set's shapes without computing anything.

    Args:
        network: the settings.
        dataset: gives the size of images and the number of classes.
        layers: by default `layers_of(network)`; studies put others in.

    Raises:
        ValueError: a name is unknown, or its layers do not fit together, or not with the images.
    """
    model = make_model(network.model, layers or layers_of(network), dataset.classes, network.parts.stem)
    images = jnp.zeros((1, *dataset.train.shape))
    jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    return model


def check_devices(batch_size: int) -> None:
    """Raises ValueError where a batch cannot be divided among the devices."""
    devices = jax.device_count()
    if batch_size % devices:
        raise ValueError(f"batch_size {batch_size} must be a multiple of the number of devices, {devices}")
