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
from experiments.training.steps import Steps, TrainState, layer_names, steps_per_epoch

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
    state: TrainState = jax.jit(steps.create, out_shardings=replicated)(config.recipe.seed, config.recipe.learning_rate)
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
        checkpoints: takes where the run stands, after each epoch, every `config.run.save_every_steps` and on `stop`.
        gains: measures what activations do to variance, after each evaluation.
        stop: asked after every step, and after every batch of an evaluation; in all processes the same.
        show_progress: with a bar.

    Raises:
        BadStepError: a loss or gradient is infinite or NaN, unless `config.run.skip_bad_steps` has it left out.
        PreemptedError: `stop` said so.
        CheckpointError: a checkpoint could not be written.
    """
    training = config.recipe.training
    per_epoch = steps_per_epoch(training, dataset)
    over_devices = NamedSharding(_mesh(), PartitionSpec("data"))
    factors = jax.jit(lambda variables: factor_range(variables, config.recipe.network.form.chosen))
    progress = Progress(start or Position(first_state(steps, config)), config, per_epoch, log, checkpoints, stop)
    batches = training_batches(
        dataset,
        training.batch_size,
        seed=config.recipe.seed,
        epochs=training.epochs,
        augmentation=config.recipe.data.augmentation(dataset),
        shard=_shard(),
        workers=config.storage.workers,
        start=progress.position.step,
    )
    report_every, save_every = max(1, per_epoch // _RECORDS_PER_EPOCH), config.run.save_every_steps

    for epoch in range(training.epochs):
        first, end = epoch * per_epoch, (epoch + 1) * per_epoch
        left = max(0, end - progress.position.step)  # of this epoch, where an interrupted run goes on
        bar = tqdm(
            itertools.islice(batches, left),
            total=per_epoch,
            initial=min(per_epoch, per_epoch - left),
            desc=f"epoch {epoch + 1}/{training.epochs}",
            unit="step",
            disable=not show_progress or left == 0 or jax.process_index() > 0,
        )
        for batch in bar:
            # A step.
            progress.add(*steps.train(progress.position.state, _placed(batch, over_devices)))
            step = progress.position.step

            # A report on the steps since the last one.
            if (step - first) % report_every == 0 or step == end:
                values = progress.take_recent()
                spread = factors(progress.position.state.variables)
                if spread is not None:
                    values["factor_min"], values["factor_max"] = (float(value) for value in spread)
                progress.report(values)
                bar.set_postfix_str(_summary(_latest_test(progress.position) | values))

            # A checkpoint within the epoch, and the end where it was asked for.
            if save_every and step % save_every == 0 and step < end:
                progress.save()
            progress.end_if_asked()

        # The evaluation, and the checkpoint after the epoch.
        if progress.position.step == end and not progress.position.measured:
            state = progress.position.state
            measured = evaluate(steps, state, dataset, training.batch_size, over_devices, progress.end_if_asked)
            values = {f"test_{name}": float(value) for name, value in measured.items()}
            for row in gains(state.evaluated) if gains else ():
                values |= {f"gain_{way}/{row.name}": float(getattr(row, way)) for way in ("forward", "backward")}
            progress.report(values, evaluated=True)
            progress.save()
    return progress.position.state, _latest_test(progress.position)["test_accuracy"]


class Progress:
    """Where a run stands while it goes on, and what it has reported.

    Attributes:
        position: all that has to be saved of it.
    """

    def __init__(
        self,
        position: Position,
        config: Experiment,
        per_epoch: int,
        log: Log,
        checkpoints: Checkpoints | None,
        stop: Callable[[], bool],
    ) -> None:
        self.position = position
        self._config, self._per_epoch = config, per_epoch
        self._log, self._checkpoints, self._stop = log, checkpoints, stop

    def add(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Goes on by a step."""
        recent = (*self.position.recent, metrics)
        self.position = self.position._replace(state=state, step=self.position.step + 1, measured=False, recent=recent)

    def take_recent(self) -> dict[str, float]:
        """What the steps since the last report come to.

        Raises:
            BadStepError: see `check`.
        """
        self.check()
        values = _summed_up(self.position.recent)
        self.position = self.position._replace(recent=())
        return values

    def report(self, values: dict[str, float], *, evaluated: bool = False) -> None:
        """Writes a record to the log; `evaluated` says that it is of the whole test split."""
        step = self.position.step
        record: Record = {"step": step, "epoch": round(step / self._per_epoch, 4), **values}
        self._log.write(**record)
        self.position = self.position._replace(records=(*self.position.records, record), measured=evaluated)

    def check(self) -> None:
        """Fetches the recent metrics from the devices.

        Raises:
            BadStepError: a step was not sound, and the settings do not leave it out.
        """
        try:
            self.position = _checked(self.position, skip_bad_steps=self._config.run.skip_bad_steps)
        except BadStepError as error:
            if error.before:  # an early end leaves what was measured
                self.position = self.position._replace(step=error.step - 1)
                self.report(_summed_up(error.before))
            raise

    def save(self) -> None:
        """Saves a checkpoint, if there are any; raises as `check` and `Checkpoints.save` do."""
        if self._checkpoints is not None:
            self.check()
            self._checkpoints.save(self.position)

    def end_if_asked(self) -> None:
        """Raises PreemptedError, when all is saved, if the run was asked to stop."""
        if self._stop():
            self.save()
            if self._checkpoints is not None:
                self._checkpoints.wait()
            raise PreemptedError


def evaluate(
    steps: Steps,
    state: TrainState,
    dataset: Dataset,
    batch_size: int,
    sharding: Sharding | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Mean loss and accuracy over the test examples, each counted once; of every run, where there are several.

    `after_batch` is called after every batch.
    """
    sums = []
    for batch in evaluation_batches(dataset, batch_size, shard=_shard()):
        sums.append(jax.device_get(steps.evaluate(state, _placed(batch, sharding))))
        after_batch()
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


def _checked(position: Position, *, skip_bad_steps: bool) -> Position:
    """The same with recent metrics fetched from the devices; a step left out keeps none.

    Raises:
        BadStepError: a step was not sound, and such steps are not left out.
    """
    recent: list[dict[str, Any]] = []
    for step, metrics in enumerate(jax.device_get(position.recent), start=position.step - len(position.recent) + 1):
        sound = bool(metrics["sound"])
        if not sound and not skip_bad_steps:
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
        names = metrics.keys() & {"loss", "accuracy", "learning_rate"} if sound else set()
        values = {name: float(metrics[name]) for name in sorted(names)}
        recent.append({"sound": sound, **values})
    return position._replace(recent=tuple(recent))


def _summed_up(recent: tuple[dict[str, Any], ...]) -> dict[str, float]:
    """Means over the steps that were not left out, the last learning rate, and the number of the others, if any."""
    sound = [metrics for metrics in recent if metrics["sound"]]
    values = {f"train_{name}": float(np.mean([m[name] for m in sound])) for name in ("loss", "accuracy") if sound}
    if sound and "learning_rate" in sound[-1]:  # checkpoints of before have none
        values["learning_rate"] = sound[-1]["learning_rate"]
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
