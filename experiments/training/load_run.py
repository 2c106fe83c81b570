"""Finished runs of train_resnet.py, read back, and what their layers did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from anact_jax.diagnostics import LayerVariances, variances
from experiments.cli import say
from experiments.config import Experiment, changed, read_experiment
from experiments.data import DATASETS, Dataset
from experiments.data.kept import check_kept, read_kept
from experiments.training.build import make_network
from experiments.training.checkpoints import Checkpoints
from experiments.training.steps import TrainState, make_steps

MeasuredVariances: TypeAlias = Callable[
    [dict[str, Any], Float[np.ndarray, "n height width channels"], Int[np.ndarray, " n"]], tuple[LayerVariances, ...]
]


class TrainedRun(NamedTuple):
    """A run.

    Attributes:
        config: its settings.
        dataset: what it was trained on.
        model: its network.
        initial: where its training started.
        trained: where its training stood at the checkpoint.
    """

    config: Experiment
    dataset: Dataset
    model: nn.Module
    initial: TrainState
    trained: TrainState


def load_run(workdir: Path, *, data_dir: Path | None = None, best: bool = False, examples: bool = True) -> TrainedRun:
    """The run in a folder, at its last checkpoint, or at the one with the best test accuracy.

    Its data set is read from `data_dir`, by default from where it was at training. Where it is a folder of one's own
    images, those must be the same as at training; without `examples` they are not read, and may be gone.

    Raises:
        OSError: there is none.
        ValueError: its settings are damaged, or it has no checkpoint yet, or one of other settings.
        DataError: what it was trained on cannot be read.
        CheckpointError: no checkpoint can be read.
    """
    config = read_experiment(workdir)
    if data_dir is not None:
        config = changed(config, data_dir=data_dir)
    if examples or config.recipe.data.dataset in DATASETS:
        dataset = config.load_data()
        check_kept(workdir, config.recipe.data.dataset, dataset)
    else:
        dataset = read_kept(workdir, config.recipe.data.dataset)
    model = make_network(config.recipe.network, dataset)
    initial = make_steps(model, config.recipe.training, dataset).create(config.recipe.seed, config.recipe.learning_rate)
    with Checkpoints(workdir, config, read_only=True) as checkpoints:
        position = checkpoints.restore(initial, say, best=best)
    if position is None:
        raise ValueError(f"{workdir} has no checkpoint yet; train first: python experiments/train_resnet.py")
    return TrainedRun(config, dataset, model, initial, position.state)


def variances_of(model: nn.Module) -> MeasuredVariances:
    """The function from variables, images and labels to a network's signals and gradients by layer, in training mode.

    Every image counts, in the statistics too.
    """

    def loss(
        variables: dict[str, Any], images: Float[Array, "n height width channels"], labels: Int[Array, " n"]
    ) -> Array:
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        losses: Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return jax.jit(variances(loss))
