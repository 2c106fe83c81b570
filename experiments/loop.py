"""The training loop: epochs of steps, an evaluation after each, everything reported as it is measured."""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments.config import TrainConfig
from experiments.data import Dataset, Split, evaluation_batches, training_batches
from experiments.gains import factor_range
from experiments.report import MetricsLog
from experiments.steps import TrainState, create_state, make_eval_step, make_optimizer, make_train_step

_RECORDS_PER_EPOCH = 5


class DivergenceError(Exception):
    """The loss is no longer a finite number."""


def train(model: nn.Module, dataset: Dataset, config: TrainConfig, log: MetricsLog) -> tuple[TrainState, float]:
    """Trains over all devices of this process; returns the final state and its test accuracy.

    Raises:
        DivergenceError: the loss became infinite or NaN.
    """
    steps_per_epoch = len(dataset.train.labels) // config.batch_size
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    over_devices = NamedSharding(mesh, PartitionSpec("data"))
    optimizer = make_optimizer(config, steps_per_epoch)
    state = create_state(model, optimizer, dataset.train.images.shape[1:], config.seed)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    train_step, eval_step = make_train_step(model, optimizer), make_eval_step(model)
    options: dict[str, Any] = {"rule": config.rule, "center": config.center, "reference": config.reference}
    factors = jax.jit(lambda variables: factor_range(variables, options))

    def evaluate(split: Split) -> dict[str, float]:
        sums = [
            jax.device_get(eval_step(state, jax.device_put(batch, over_devices)))
            for batch in evaluation_batches(split, config.batch_size)
        ]
        count = sum(int(s["count"]) for s in sums)
        return {
            "loss": sum(float(s["loss"]) for s in sums) / count,
            "accuracy": sum(int(s["correct"]) for s in sums) / count,
        }

    every = max(1, steps_per_epoch // _RECORDS_PER_EPOCH)
    test: dict[str, float] = {}
    for epoch in range(config.epochs):
        batches = training_batches(dataset.train, config.batch_size, config.seed, epoch)
        bar = tqdm(batches, total=steps_per_epoch, desc=f"epoch {epoch + 1}/{config.epochs}", unit="step")
        recent = []
        for position, batch in enumerate(bar, start=1):
            state, metrics = train_step(state, jax.device_put(batch, over_devices))
            recent.append(metrics)
            if position % every == 0 or position == steps_per_epoch:
                step = epoch * steps_per_epoch + position
                values = _mean_of(recent)
                recent = []
                if not math.isfinite(values["train_loss"]):
                    raise DivergenceError(
                        f"the loss is {values['train_loss']} at step {step}; a smaller --learning-rate may help"
                    )
                spread = factors(state.variables)
                if spread is not None:
                    values["factor_min"], values["factor_max"] = (float(value) for value in spread)
                log.write(step, step / steps_per_epoch, **values)
                bar.set_postfix_str(_summary(values | {f"test_{name}": value for name, value in test.items()}))
        test = evaluate(dataset.test)
        log.write((epoch + 1) * steps_per_epoch, epoch + 1.0, **{f"test_{name}": value for name, value in test.items()})
    return state, test["accuracy"]


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
