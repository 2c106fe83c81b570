"""Networks by name. Convolution, normalization layer and activation come from outside: see `layers`."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import flax.linen as nn
from tyro.extras import literal_type_from_choices

from experiments.networks.activation_name import ActivationName, check_name
from experiments.networks.cnn import VGG, PlainCNN
from experiments.networks.layers import (
    INITS,
    NORMS,
    Join,
    LayerFunction,
    Layers,
    Plain,
    activation_layer,
    make_layers,
    on_each,
)
from experiments.networks.mlp import MLP, ResidualMLP
from experiments.networks.resnet import STEMS, BasicBlock, BottleneckBlock, ResNet, WideResNet

__all__ = [
    "MODELS",
    "NORMS",
    "ActivationName",
    "Init",
    "Join",
    "LayerFunction",
    "Layers",
    "ModelName",
    "NormName",
    "Plain",
    "Stem",
    "activation_layer",
    "check_name",
    "make_layers",
    "make_model",
    "on_each",
]

_cifar = functools.partial(ResNet, features=16, block=BasicBlock, project=False)
_imagenet = functools.partial(ResNet, features=64, project=True)

_MAKERS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": functools.partial(_cifar, stage_sizes=(3, 3, 3)),
    "resnet32": functools.partial(_cifar, stage_sizes=(5, 5, 5)),
    "resnet56": functools.partial(_cifar, stage_sizes=(9, 9, 9)),
    "resnet18": functools.partial(_imagenet, stage_sizes=(2, 2, 2, 2), block=BasicBlock),
    "resnet34": functools.partial(_imagenet, stage_sizes=(3, 4, 6, 3), block=BasicBlock),
    "resnet50": functools.partial(_imagenet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock),
    "resnet101": functools.partial(_imagenet, stage_sizes=(3, 4, 23, 3), block=BottleneckBlock),
    "wrn16_4": functools.partial(WideResNet, depth=16, widen=4),
    "wrn28_10": functools.partial(WideResNet, depth=28, widen=10),
    "vgg11": functools.partial(VGG, stage_sizes=(1, 1, 2, 2, 2), features=64),
    "vgg11_narrow": functools.partial(VGG, stage_sizes=(1, 1, 2, 2, 2), features=16),
    "vgg16": functools.partial(VGG, stage_sizes=(2, 2, 3, 3, 3), features=64),
    "cnn12": functools.partial(PlainCNN, depth=12, features=16),
    "mlp3": functools.partial(MLP, depth=3, width=128),
    "mlp5": functools.partial(MLP, depth=5, width=128),
    "mlp10": functools.partial(MLP, depth=10, width=128),
    "mlp12": functools.partial(MLP, depth=12, width=128),
    "mlp30": functools.partial(MLP, depth=30, width=128),
    "mlp48": functools.partial(MLP, depth=48, width=128),
    "mlp100": functools.partial(MLP, depth=100, width=128),
    "resmlp4": functools.partial(ResidualMLP, depth=4, width=128),
    "resmlp16": functools.partial(ResidualMLP, depth=16, width=128),
    "resmlp48": functools.partial(ResidualMLP, depth=48, width=128),
    "resmlp100": functools.partial(ResidualMLP, depth=100, width=128),
    "preresmlp16": functools.partial(ResidualMLP, depth=16, width=128, activation_first=True),
}
MODELS = tuple(_MAKERS)

if TYPE_CHECKING:  # the choices are known when the program runs
    Init: TypeAlias = str
    ModelName: TypeAlias = str
    NormName: TypeAlias = str
    Stem: TypeAlias = str
else:
    Init, ModelName, NormName, Stem = map(literal_type_from_choices, (tuple(INITS), MODELS, NORMS, tuple(STEMS)))


def make_model(name: str, layers: Layers, classes: int, stem: str = "small") -> nn.Module:
    """The network called `name`. Only those with a stem made for ImageNet heed `stem`.

    Raises:
        ValueError: unknown name or stem, or a stem that this network does not have.
    """
    check_name("model", name, MODELS)
    check_name("stem", stem, STEMS)
    maker = _MAKERS[name]
    if "stem" in inspect.signature(maker).parameters:
        return maker(layers=layers, classes=classes, stem=stem)
    if stem != "small":
        raise ValueError(f"{name} has no stem {stem!r}, only networks made for ImageNet do; leave the stem at 'small'")
    return maker(layers=layers, classes=classes)
