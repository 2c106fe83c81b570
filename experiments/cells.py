"""The runs that a study is made of: each is done once, and kept as soon as it is finished."""

import dataclasses
import functools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import NO_PART_IN_THE_RESULT, TrainConfig
from experiments.data import Batch, Dataset, training_batches
from experiments.loop import evaluate
from experiments.network import make_network
from experiments.report import Record
from experiments.steps import Steps, make_steps, steps_per_epoch

_DATA_SETTINGS = ("dataset", "data_dir", "train_images", "validation_images", "half", "pool")


class Cell(NamedTuple):
    """One run of a study.

    Attributes:
        config: with `validation_images`, on which the run is measured after each epoch.
        on_test: whether the final network is measured on the test split too.
    """

    config: TrainConfig
    on_test: bool

    @property
    def key(self) -> str:
        """All that the outcome depends on."""
        return json.dumps(self.settings, sort_keys=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The same, as a dictionary."""
        fields = dataclasses.asdict(self.config)
        return {name: value for name, value in fields.items() if name not in NO_PART_IN_THE_RESULT} | {
            "on_test": self.on_test
        }


Outcome: TypeAlias = dict[str, Any]
"""`curve`, a record an epoch; `validation_accuracy`, `test_accuracy` (None unless asked for); `diverged`; `seconds`."""


class Results:
    """A file with a line of JSON for each finished cell; it only grows.

    Cells finished before a setting was added to `TrainConfig` had its default.
    """

    _before_added: Mapping[str, Any] = MappingProxyType(
        {
            "activation_scale": 1.0,
            "nonlinearity": None,
            "per_feature": False,
            "half": None,
            "optimizer": "sgd",
            "tracking": "batch",
            "tempering": "leak",
            "bounds": "none",
        }
    )

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, Outcome] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # written by a run that was stopped in the middle of it
            lines.pop()
            path.write_text("".join(lines))
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                settings = self._before_added | record["cell"]
                self._outcomes[json.dumps(settings, sort_keys=True)] = record["outcome"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a finished cell; remove that line") from error

    def get(self, cell: Cell) -> Outcome | None:
        """What came of a cell, if it is finished."""
        return self._outcomes.get(cell.key)

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Keeps what came of a cell."""
        line = json.dumps({"cell": cell.settings, "outcome": outcome}) + "\n"
        with self._path.open("a") as file:
            file.write(line)
        self._outcomes[cell.key] = outcome

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Outcome]]:
        return ((json.loads(key), outcome) for key, outcome in self._outcomes.items())


def run_cells(cells: Iterable[Cell], results: Results) -> None:
    """Runs those that are not finished; the cells differ in nothing but learning rate and seed."""
    pending = [cell for cell in cells if results.get(cell) is None]
    if not pending:
        return
    start = time.perf_counter()
    data, steps = _compiled(dataclasses.replace(pending[0].config, learning_rate=1.0, seed=0))
    outcomes = train_together(steps, data, pending)
    for cell, outcome in zip(pending, outcomes, strict=True):
        results.add(cell, outcome | {"seconds": _rounded((time.perf_counter() - start) / len(pending))})


class Data(NamedTuple):
    """What a cell trains on, with the validation part as its test split, and the same with the real test split."""

    chosen_on: Dataset
    judged_on: Dataset


@functools.lru_cache(maxsize=1)
def _compiled(network: TrainConfig) -> tuple[Data, Steps]:
    data = _data(*(getattr(network, name) for name in _DATA_SETTINGS))
    # All runs in one program: on two cores 18 runs of mlp10 on the digits train 4.6 times as fast as one by one.
    model = make_network(network, data.chosen_on, convs_by_matmul=True)
    return data, make_steps(model, network, data.chosen_on, together=True)


@functools.lru_cache(maxsize=1)
def _data(*settings: Any) -> Data:
    recipe = TrainConfig(**dict(zip(_DATA_SETTINGS, settings, strict=True)))
    chosen_on = recipe.load_data()
    whole = dataclasses.replace(recipe, train_images=None, validation_images=0).load_data()
    return Data(chosen_on, dataclasses.replace(chosen_on, test=whole.test))


def train_together(steps: Steps, data: Data, cells: list[Cell]) -> list[Outcome]:
    """Trains all runs in one program that has a leading axis of runs; the same numbers to rounding."""
    config = cells[0].config
    seeds = [cell.config.seed for cell in cells]
    state = steps.create(jnp.array(seeds), jnp.array([cell.config.learning_rate for cell in cells]))
    augmentation = config.augmentation(data.chosen_on)
    batches = {
        seed: training_batches(
            data.chosen_on, config.batch_size, seed=seed, epochs=config.epochs, augmentation=augmentation
        )
        for seed in set(seeds)
    }
    curves: list[list[Record]] = [[] for _ in cells]
    for epoch in range(config.epochs):
        losses = []
        for _ in range(steps_per_epoch(config, data.chosen_on)):
            drawn = {seed: next(iterator) for seed, iterator in batches.items()}
            state, metrics = steps.train(state, Batch(*map(np.stack, zip(*(drawn[s] for s in seeds), strict=True))))
            losses.append(metrics["loss"])
        train_loss = np.mean(jax.device_get(losses), axis=0).tolist()
        measured = evaluate(steps, state, data.chosen_on, config.batch_size)
        by_run = zip(curves, train_loss, measured["loss"].tolist(), measured["accuracy"].tolist(), strict=True)
        for curve, *values in by_run:
            curve.append(_record(epoch + 1.0, *values))
    test: list[float | None] = [None] * len(cells)
    if any(cell.on_test for cell in cells):
        test = evaluate(steps, state, data.judged_on, config.batch_size)["accuracy"].tolist()
    finite = [[record for record in curve if np.isfinite(record["train_loss"])] for curve in curves]
    return [
        _outcome(kept, data.judged_on.classes, len(kept) < len(curve), accuracy, cell.on_test)
        for kept, curve, cell, accuracy in zip(finite, curves, cells, test, strict=True)
    ]


def _record(epoch: float, train_loss: float, loss: float, accuracy: float) -> Record:
    values = {"epoch": epoch, "train_loss": train_loss, "validation_loss": loss, "validation_accuracy": accuracy}
    return {name: _rounded(value) for name, value in values.items()}


def _outcome(curve: list[Record], classes: int, diverged: bool, test_accuracy: float | None, on_test: bool) -> Outcome:
    guessing = 1 / classes
    validation = guessing if diverged else curve[-1]["validation_accuracy"]
    test = None if not on_test or test_accuracy is None else _rounded(test_accuracy)
    return {
        "curve": curve,
        "validation_accuracy": validation,
        "test_accuracy": guessing if diverged and on_test else test,
        "diverged": diverged,
    }


def _rounded(value: float) -> float:
    """Short in the file; an accuracy stays exact for up to 100,000 examples."""
    return float(f"{value:.6g}")
