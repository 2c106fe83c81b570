"""Networks by name. Convolution, normalization layer and activation come from outside: see `layers`."""

import functools

from experiments.models.layers import (
    INITS,
    NORMS,
    Layers,
    Plain,
    activation_layer,
    check_activation,
    conv_layer,
    norm_layer,
)
from experiments.models.mlp import MLP
from experiments.models.resnet import STEMS, BasicBlock, BottleneckBlock, ResNet

__all__ = [
    "INITS",
    "MLP",
    "MODELS",
    "NORMS",
    "STEMS",
    "Layers",
    "Plain",
    "activation_layer",
    "check_activation",
    "conv_layer",
    "norm_layer",
]

_cifar = functools.partial(ResNet, features=16, block=BasicBlock, project=False)
_imagenet = functools.partial(ResNet, features=64, project=True)

# Each takes `layers`, `classes` and `stem`.
MODELS: dict[str, functools.partial[ResNet]] = {
    "resnet20": functools.partial(_cifar, stage_sizes=(3, 3, 3)),
    "resnet32": functools.partial(_cifar, stage_sizes=(5, 5, 5)),
    "resnet56": functools.partial(_cifar, stage_sizes=(9, 9, 9)),
    "resnet18": functools.partial(_imagenet, stage_sizes=(2, 2, 2, 2), block=BasicBlock),
    "resnet34": functools.partial(_imagenet, stage_sizes=(3, 4, 6, 3), block=BasicBlock),
    "resnet50": functools.partial(_imagenet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock),
}
