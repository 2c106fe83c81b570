"""The training loop: epochs of steps, an evaluation after each, everything reported as it is measured."""

import itertools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from experiments.config import TrainConfig
from experiments.data import Dataset, evaluation_batches, training_batches
from experiments.gains import factor_range
from experiments.steps import Steps, TrainState, steps_per_epoch

_RECORDS_PER_EPOCH = 5


class DivergenceError(Exception):
    """The loss is no longer a finite number."""


@runtime_checkable
class Log(Protocol):
    """Takes what is measured, as `MetricsLog` does."""

    def write(self, step: int, epoch: float, **values: float) -> None:
        """Adds a record."""
        ...


def train(
    steps: Steps, dataset: Dataset, config: TrainConfig, log: Log, *, show_progress: bool = True
) -> tuple[TrainState, float]:
    """Trains over all devices of this process; returns the final state and its test accuracy.

    Raises:
        DivergenceError: the loss became infinite or NaN.
    """
    per_epoch = steps_per_epoch(config, dataset)
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    over_devices = NamedSharding(mesh, PartitionSpec("data"))
    state = jax.device_put(steps.create(config.seed, config.learning_rate), NamedSharding(mesh, PartitionSpec()))
    options: dict[str, Any] = {"rule": config.rule, "center": config.center, "reference": config.reference}
    factors = jax.jit(lambda variables: factor_range(variables, options))
    batches = training_batches(
        dataset,
        config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        augmentation=config.augmentation(dataset),
        workers=config.workers,
    )
    every = max(1, per_epoch // _RECORDS_PER_EPOCH)
    test: dict[str, float] = {}
    for epoch in range(config.epochs):
        bar = tqdm(
            itertools.islice(batches, per_epoch),
            total=per_epoch,
            desc=f"epoch {epoch + 1}/{config.epochs}",
            unit="step",
            disable=not show_progress,
        )
        recent = []
        for position, batch in enumerate(bar, start=1):
            state, metrics = steps.train(state, jax.device_put(batch, over_devices))
            recent.append(metrics)
            if position % every == 0 or position == per_epoch:
                step = epoch * per_epoch + position
                values = _mean_of(recent)
                recent = []
                if not math.isfinite(values["train_loss"]):
                    raise DivergenceError(
                        f"the loss is {values['train_loss']} at step {step}; a smaller --learning-rate may help"
                    )
                spread = factors(state.variables)
                if spread is not None:
                    values["factor_min"], values["factor_max"] = (float(value) for value in spread)
                log.write(step, step / per_epoch, **values)
                bar.set_postfix_str(_summary(values | {f"test_{name}": value for name, value in test.items()}))
        measured = evaluate(steps, state, dataset, config.batch_size, over_devices)
        test = {name: float(value) for name, value in measured.items()}
        log.write((epoch + 1) * per_epoch, epoch + 1.0, **{f"test_{name}": value for name, value in test.items()})
    return state, test["accuracy"]


def evaluate(
    steps: Steps, state: TrainState, dataset: Dataset, batch_size: int, sharding: Sharding | None = None
) -> dict[str, Any]:
    """Mean loss and accuracy over the test examples, each counted once; of every run, where there are several."""
    sums = [
        jax.device_get(steps.evaluate(state, jax.device_put(batch, sharding)))
        for batch in evaluation_batches(dataset, batch_size)
    ]
    loss, correct, count = (np.sum([s[name] for s in sums], axis=0) for name in ("loss", "correct", "count"))
    return {"loss": loss / count, "accuracy": correct / count}


def _mean_of(metrics: list[dict[str, Any]]) -> dict[str, float]:
    fetched = jax.device_get(metrics)
    return {f"train_{name}": float(np.mean([m[name] for m in fetched])) for name in fetched[0]}


def _summary(values: dict[str, float]) -> str:
    parts = [f"loss {values['train_loss']:.3f}", f"accuracy {values['train_accuracy']:.3f}"]
    if "factor_min" in values:
        parts.append(f"factors {values['factor_min']:.2f} to {values['factor_max']:.2f}")
    if "test_accuracy" in values:
        parts.append(f"test accuracy {values['test_accuracy']:.3f}")
    return ", ".join(parts)
