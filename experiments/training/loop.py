"""The training loop: epochs of steps, an evaluation after each, everything reported as it is measured."""

import itertools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, PyTree
from tqdm import tqdm

from experiments.config import Experiment
from experiments.data import Batch, Dataset, Shard, evaluation_batches, training_batches
from experiments.training.checkpoints import Checkpoints, Position
from experiments.training.gains import Gains, factor_range
from experiments.training.metrics import Record
from experiments.training.steps import Steps, TrainState, layer_names, schedule_of, steps_per_epoch, taken

_RECORDS_PER_EPOCH = 5


class DivergenceError(Exception):
    """A loss or gradient is not finite."""


class BadStepError(DivergenceError):
    """A step's loss or gradient is not finite.

    Attributes:
        step: where, counted from 1.
        variables: of the network; finite, as that step did not change them.
        before: metrics of the steps since the last report on training.
    """

    def __init__(
        self, message: str, step: int, variables: PyTree[Array], before: tuple[dict[str, Any], ...] = ()
    ) -> None:
        super().__init__(message)
        self.step, self.variables, self.before = step, variables, before


class PreemptedError(Exception):
    """The run was asked to stop, and has saved where it stands."""


@runtime_checkable
class Log(Protocol):
    """Takes what is measured, as `MetricsLog` does."""

    def write(self, step: int, epoch: float, **values: float) -> None:
        """Adds a record."""
        ...


def first_state(steps: Steps, config: Experiment) -> TrainState:
    """The state that training starts from, on every device."""
    replicated = NamedSharding(_mesh(), PartitionSpec())
    state: TrainState = jax.jit(steps.create, out_shardings=replicated)(config.seed, config.learning_rate)
    return state


def train(
    steps: Steps,
    dataset: Dataset,
    config: Experiment,
    log: Log,
    *,
    start: Position | None = None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] = lambda: False,
    gains: Gains | None = None,
    show_progress: bool = True,
) -> tuple[TrainState, float]:
    """Trains over all devices of all processes; returns the final state and its test accuracy.

    Args:
        steps: from `make_steps`.
        dataset: of which each process takes its part.
        config: the settings.
        log: takes what is measured.
        start: where an interrupted run stood, by default the beginning. It is consumed.
        checkpoints: takes where the run stands, after each epoch, every `config.save_every_steps` and on `stop`.
        gains: measures what activations do to variance, after each evaluation.
        stop: asked after every step, and after every batch of an evaluation; in all processes the same.
        show_progress: with a bar.

    Raises:
        BadStepError: a loss or gradient is infinite or NaN, unless `config.skip_bad_steps` has it left out.
        PreemptedError: `stop` said so.
        CheckpointError: a checkpoint could not be written.
    """
    per_epoch = steps_per_epoch(config, dataset)
    over_devices = NamedSharding(_mesh(), PartitionSpec("data"))
    position = start or Position(first_state(steps, config))
    factors = jax.jit(lambda variables: factor_range(variables, config.chosen_form))
    batches = training_batches(
        dataset,
        config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        augmentation=config.augmentation(dataset),
        shard=_shard(),
        workers=config.workers,
        start=position.step,
    )
    every, schedule = max(1, per_epoch // _RECORDS_PER_EPOCH), schedule_of(config, per_epoch)

    def report(**values: float) -> None:
        nonlocal position
        progress: Record = {"step": position.step, "epoch": round(position.step / per_epoch, 4)}
        record = progress | values
        log.write(**record)
        position = position._replace(records=(*position.records, record))

    def check() -> None:
        nonlocal position
        try:
            position = _checked(position, config)
        except BadStepError as error:
            if error.before:  # an early end leaves what was measured
                position = position._replace(step=error.step - 1)
                report(**_mean_of(error.before))
            raise

    def save() -> None:
        if checkpoints is not None:
            check()
            checkpoints.save(position)

    def heed() -> None:
        if stop():
            save()
            if checkpoints is not None:
                checkpoints.wait()
            raise PreemptedError

    for epoch in range(config.epochs):
        first, end = epoch * per_epoch, (epoch + 1) * per_epoch
        bar = tqdm(
            itertools.islice(batches, max(0, end - position.step)),
            total=per_epoch,
            initial=min(per_epoch, max(0, position.step - first)),
            desc=f"epoch {epoch + 1}/{config.epochs}",
            unit="step",
            disable=not show_progress or position.step >= end or jax.process_index() > 0,
        )
        for batch in bar:
            state, metrics = steps.train(position.state, _placed(batch, over_devices))
            position = position._replace(
                state=state, step=position.step + 1, measured=False, recent=(*position.recent, metrics)
            )
            if (position.step - first) % every == 0 or position.step == end:
                check()
                values = _mean_of(position.recent)
                values["learning_rate"] = config.learning_rate * float(schedule(taken(position.state) - 1))
                position = position._replace(recent=())
                spread = factors(position.state.variables)
                if spread is not None:
                    values["factor_min"], values["factor_max"] = (float(value) for value in spread)
                report(**values)
                bar.set_postfix_str(_summary(_latest_test(position) | values))
            if config.save_every_steps and position.step % config.save_every_steps == 0 and position.step < end:
                save()
            heed()
        if position.step == end and not position.measured:
            measured = evaluate(steps, position.state, dataset, config.batch_size, over_devices, heed)
            values = {f"test_{name}": float(value) for name, value in measured.items()}
            for row in gains(position.state.evaluated) if gains else ():
                values |= {f"gain_{way}/{row.name}": float(getattr(row, way)) for way in ("forward", "backward")}
            report(**values)
            position = position._replace(measured=True)
            save()
    return position.state, _latest_test(position)["test_accuracy"]


def evaluate(
    steps: Steps,
    state: TrainState,
    dataset: Dataset,
    batch_size: int,
    sharding: Sharding | None = None,
    heed: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Mean loss and accuracy over the test examples, each counted once; of every run, where there are several.

    `heed` is called after every batch.
    """
    sums = []
    for batch in evaluation_batches(dataset, batch_size, shard=_shard()):
        sums.append(jax.device_get(steps.evaluate(state, _placed(batch, sharding))))
        heed()
    loss, correct, count = (np.sum([s[name] for s in sums], axis=0) for name in ("loss", "correct", "count"))
    return {"loss": loss / count, "accuracy": correct / count}


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


def _shard() -> Shard:
    return Shard(jax.process_index(), jax.process_count())


def _placed(batch: Batch, sharding: Sharding | None) -> Batch:
    """The whole batch on the devices, of which this process has its part."""
    if sharding is None:
        return batch
    return Batch(*(jax.make_array_from_process_local_data(sharding, part) for part in batch))


def _checked(position: Position, config: Experiment) -> Position:
    """The same with recent metrics fetched from the devices; a step left out keeps none.

    Raises:
        BadStepError: a step was not sound and `config` does not leave it out.
    """
    recent: list[dict[str, Any]] = []
    for step, metrics in enumerate(jax.device_get(position.recent), start=position.step - len(position.recent) + 1):
        sound = bool(metrics["sound"])
        if not sound and not config.skip_bad_steps:
            layers = layer_names(position.state.params)
            each = zip(layers, metrics["sound_gradient"], strict=True)
            bad = list(dict.fromkeys(name for name, good in each if not good))
            where = f"the gradient of {', '.join(bad[:3])}{', ...' if bad[3:] else ''} is not finite; " if bad else ""
            raise BadStepError(
                f"the loss is {metrics['loss']} at step {step}; {where}a smaller --learning-rate may help",
                step,
                position.state.variables,
                tuple(recent),
            )
        values = {name: float(metrics[name]) for name in ("loss", "accuracy")} if sound else {}
        recent.append({"sound": sound, **values})
    return position._replace(recent=tuple(recent))


def _mean_of(recent: tuple[dict[str, Any], ...]) -> dict[str, float]:
    """Means over the steps that were not left out, and the number of those that were, if any."""
    sound = [metrics for metrics in recent if metrics["sound"]]
    values = {f"train_{name}": float(np.mean([m[name] for m in sound])) for name in ("loss", "accuracy") if sound}
    return values | ({"steps_left_out": float(len(recent) - len(sound))} if len(sound) < len(recent) else {})


def _latest_test(position: Position) -> dict[str, float]:
    """What the last evaluation found."""
    tests = [record for record in position.records if "test_accuracy" in record]
    return {name: value for name, value in tests[-1].items() if name.startswith("test_")} if tests else {}


def _summary(values: dict[str, float]) -> str:
    parts = []
    if "train_loss" in values:
        parts += [f"loss {values['train_loss']:.3f}", f"accuracy {values['train_accuracy']:.3f}"]
    if "steps_left_out" in values:
        parts.append(f"{values['steps_left_out']:g} steps left out")
    if "factor_min" in values:
        parts.append(f"factors {values['factor_min']:.2f} to {values['factor_max']:.2f}")
    if "test_accuracy" in values:
        parts.append(f"test accuracy {values['test_accuracy']:.3f}")
    return ", ".join(parts)
