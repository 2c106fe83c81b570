"""The runs of a study: each is done once, and kept in a file as soon as it is finished."""

import dataclasses
import fcntl
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import numpy as np

from experiments.config import LAST_WITH_CLOSED_FORM, Data, Recipe, Storage, as_today
from experiments.data import Dataset
from experiments.studies.vmapped_training import training
from experiments.training.loop import evaluate
from experiments.training.metrics import Record, to_json
from experiments.training.steps import Steps, make_steps, steps_per_epoch

LAST_WITH_ALL_VARIATIONS = "ce3e8fc"
"""The commit at which variations that lost can be run again, as flags of experiments/compare.py."""
CLOSED_FORM = ("closed, plain after additions", "closed, measured after additions")
"""Variations of forms whose factors follow from the parameters of batch normalization."""


class Cell(NamedTuple):
    """One run of a study.

    Attributes:
        recipe: with `validation_images`, on which the run is measured after each epoch.
        on_test: whether the final network is measured on the test split too.
        variation: what a study changed that no recipe can say, in words; empty for nothing.
    """

    recipe: Recipe
    on_test: bool
    variation: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """All that the outcome depends on."""
        return self.recipe.key | {"on_test": self.on_test, "variation": self.variation}

    @property
    def key(self) -> str:
        """The same, as text."""
        return json.dumps(self.settings, sort_keys=True)


Outcome: TypeAlias = dict[str, Any]
"""`curve`, a record an epoch; `validation_accuracy`, `test_accuracy` (None unless asked for); `diverged`; `seconds`."""

NetworkOf: TypeAlias = Callable[[Recipe, str, Dataset], nn.Module]
"""Makes the network of a recipe and a variation, for an ensemble."""


def not_run_today(variation: str) -> ValueError:
    """The error to raise for a variation that no study knows."""
    compare, commit = "experiments/compare.py", LAST_WITH_ALL_VARIATIONS
    if variation in CLOSED_FORM:
        compare, commit = "experiments/studies/compare.py", LAST_WITH_CLOSED_FORM
    return ValueError(f"variation {variation!r} is kept in the results only; {compare} of commit {commit} runs it")


class Results:
    """A file with a line of JSON for each finished cell; it only grows. Several programs may add to it at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, Outcome] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # written by a run that was stopped in the middle of it
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                settings = as_today(record["cell"], path)
                self._outcomes[json.dumps(settings, sort_keys=True)] = record["outcome"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a finished cell; remove that line") from error

    def get(self, cell: Cell) -> Outcome | None:
        """What came of a cell, if it is finished."""
        return self._outcomes.get(cell.key)

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Keeps what came of a cell, in a line of its own."""
        line = to_json({"cell": cell.settings, "outcome": outcome}) + "\n"
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            _drop_cut_line(file)
            file.write(line.encode())
        self._outcomes[cell.key] = outcome

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Outcome]]:
        return ((json.loads(key), outcome) for key, outcome in self._outcomes.items())


def _drop_cut_line(file: BinaryIO) -> None:
    """Ends the file after its last whole line: nobody is writing the rest any more."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


class Splits(NamedTuple):
    """What a cell trains on, with the validation part as its test split, and the same with the real test split."""

    chosen_on: Dataset
    judged_on: Dataset


def run_cells(cells: Iterable[Cell], results: Results, storage: Storage, network_of: NetworkOf) -> None:
    """Runs those that are not finished; the cells differ in nothing but learning rate and seed."""

    def compiled(pending: list[Cell]) -> tuple[Splits, Steps]:
        recipe = dataclasses.replace(pending[0].recipe, learning_rate=1.0, seed=0)
        return _compiled(recipe, pending[0].variation, storage, network_of)

    run_pending(cells, results, compiled)


def run_pending(
    cells: Iterable[Cell], results: Results, compiled: Callable[[list[Cell]], tuple[Splits, Steps]]
) -> None:
    """Runs those that are not finished in one program, and keeps what came of them.

    Args:
        cells: that differ in nothing but what `compiled` can tell apart, learning rate and seed.
        results: where they are kept.
        compiled: the data and the steps for these cells; not called where all are finished.
    """
    pending = [cell for cell in cells if results.get(cell) is None]
    if not pending:
        return
    start = time.perf_counter()
    data, steps = compiled(pending)
    outcomes = train_together(steps, data, pending)
    for cell, outcome in zip(pending, outcomes, strict=True):
        results.add(cell, outcome | {"seconds": rounded((time.perf_counter() - start) / len(pending))})


@functools.lru_cache(maxsize=1)
def _compiled(recipe: Recipe, variation: str, storage: Storage, network_of: NetworkOf) -> tuple[Splits, Steps]:
    data = load_splits(recipe.data, storage)
    # All runs in one program: on two cores 18 runs of mlp10 on the digits train 4.6 times as fast as one by one.
    model = network_of(recipe, variation, data.chosen_on)
    return data, make_steps(model, recipe.training, data.chosen_on, together=True)


@functools.lru_cache(maxsize=1)
def load_splits(data: Data, storage: Storage) -> Splits:
    """The part of a data set that cells are trained on, and its whole test split."""
    chosen_on = data.load(storage)
    whole = dataclasses.replace(data, train_images=None, validation_images=0).load(storage)
    return Splits(chosen_on, dataclasses.replace(chosen_on, test=whole.test))


def train_together(steps: Steps, data: Splits, cells: list[Cell]) -> list[Outcome]:
    """Trains all runs in one program, and measures them after each epoch."""
    recipe = cells[0].recipe
    seeds, rates = ([getattr(cell.recipe, name) for cell in cells] for name in ("seed", "learning_rate"))
    per_epoch = steps_per_epoch(recipe.training, data.chosen_on)
    curves: list[list[Record]] = [[] for _ in cells]
    losses = []
    for step, (now, metrics) in enumerate(training(steps, data.chosen_on, recipe, seeds, rates), start=1):
        state = now
        losses.append(metrics["loss"])
        if step % per_epoch == 0:
            train_loss = np.mean(jax.device_get(losses), axis=0).tolist()
            losses = []
            measured = evaluate(steps, state, data.chosen_on, recipe.training.batch_size)
            by_run = zip(curves, train_loss, measured["loss"].tolist(), measured["accuracy"].tolist(), strict=True)
            for curve, *values in by_run:
                curve.append(_record(step / per_epoch, *values))
    test: list[float | None] = [None] * len(cells)
    if any(cell.on_test for cell in cells):
        test = evaluate(steps, state, data.judged_on, recipe.training.batch_size)["accuracy"].tolist()
    finite = [[record for record in curve if np.isfinite(record["train_loss"])] for curve in curves]
    return [
        _outcome(kept, data.judged_on.classes, len(kept) < len(curve), accuracy, cell.on_test)
        for kept, curve, cell, accuracy in zip(finite, curves, cells, test, strict=True)
    ]


def _record(epoch: float, train_loss: float, loss: float, accuracy: float) -> Record:
    values = {"epoch": epoch, "train_loss": train_loss, "validation_loss": loss, "validation_accuracy": accuracy}
    return {name: rounded(value) for name, value in values.items()}


def _outcome(curve: list[Record], classes: int, diverged: bool, test_accuracy: float | None, on_test: bool) -> Outcome:
    guessing = 1 / classes
    validation = guessing if diverged else curve[-1]["validation_accuracy"]
    test = None if not on_test or test_accuracy is None else rounded(test_accuracy)
    return {
        "curve": curve,
        "validation_accuracy": validation,
        "test_accuracy": guessing if diverged and on_test else test,
        "diverged": diverged,
    }


def rounded(value: float) -> float:
    """Short in the file; an accuracy stays exact for up to 100,000 examples."""
    return float(f"{value:.6g}")
