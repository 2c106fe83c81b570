"""Every number that changes a training result, and the checks on it."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from anact_jax import ACTIVATIONS, REFERENCES, RULES
from anact_jax.linen import ANAct
from experiments.data import DATASETS
from experiments.models import INITS, MODELS, NORMS, STEMS, check_name


def _one_of(*names: str) -> str:
    return "one of " + ", ".join(names)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains a residual network and reports its test accuracy.

    The same configuration and seed give the same numbers on the same machine.
    """

    dataset: Annotated[str, arg(help=_one_of(*DATASETS))] = "digits"
    model: Annotated[str, arg(help=_one_of(*MODELS))] = "resnet20"
    activation: Annotated[str, arg(help=f"{_one_of(*ACTIVATIONS)}; with n before it, as in nswish, normalized")] = (
        "nswish"
    )
    rule: Annotated[str, arg(help=f"how the normalization factor is chosen: {_one_of(*RULES)}")] = ANAct.rule
    center: bool = ANAct.center
    """subtract the mean of f(x) before scaling"""
    reference: Annotated[
        str, arg(help=f"output variance is kept relative to that of the input, or to 1: {_one_of(*REFERENCES)}")
    ] = "unit"  # with "input", the published reference, every residual block may raise the level: it diverges at 0.1
    stop_gradient: bool = ANAct.stop_gradient
    """treat factor and shift as constants under differentiation"""
    learnable: bool = ANAct.learnable
    """learn a bounded correction of each factor"""
    activation_momentum: float = ANAct.momentum
    """weight of the past in the running statistics of activations, 0 to 1"""
    norm: Annotated[str, arg(help=f"normalization layer: {_one_of(*NORMS)}")] = "batch"
    norm_momentum: float = 0.9
    """weight of the past in the running statistics of batch normalization, 0 to 1"""
    group_size: int = 8
    """channels in a group of group normalization"""
    stem: Annotated[
        str, arg(help=f"first layers, {_one_of(*STEMS)}: a 3x3 convolution, or 7x7 of stride 2 and pooling")
    ] = "small"
    init: Annotated[
        str, arg(help=f"{_one_of(*INITS)}: variance of a kernel's weights, 1/fan_in or 2/fan_in; normalized: lecun")
    ] = "lecun"
    epochs: int = 15
    """passes over the training data"""
    batch_size: int = 64
    """examples in a step, over all devices"""
    learning_rate: float = 0.05
    """peak learning rate of SGD; it rises linearly, then falls to 0 along a cosine"""
    warmup_epochs: float = 1.0
    """epochs during which the learning rate rises"""
    momentum: float = 0.9
    """momentum of SGD, 0 to 1"""
    weight_decay: float = 5e-4
    """L2 penalty on kernels, added to their gradient"""
    seed: int = 0
    """of initial weights and of the order of examples"""
    workdir: Path | None = None
    """folder for results, made if it does not exist; by default a new one under runs/"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be; `build_model` tries the network's."""
        for name, value, known in (
            ("dataset", self.dataset, DATASETS),
            ("rule", self.rule, RULES),
            ("reference", self.reference, REFERENCES),
        ):
            check_name(name, value, known)
        for name in ("epochs", "batch_size", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate}")
        for name in ("warmup_epochs", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs ({self.epochs}), got {self.warmup_epochs}")
        for name in ("momentum", "activation_momentum", "norm_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def to_json(self) -> str:
        """All settings, readable."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"
