"""Finished runs as tables: test accuracies with intervals, and differences from the plain activation."""

import dataclasses
import re
from collections import defaultdict
from typing import NamedTuple

from experiments.cli import table_head, table_row
from experiments.networks import ActivationName
from experiments.studies.intervals import Interval
from experiments.studies.results import CLOSED_FORM, Outcome, Results
from experiments.studies.rivals import VARIATIONS_OF_FORMS

NORM_NAMES = {"batch": "BatchNorm", "group": "GroupNorm", "layer": "LayerNorm"}


class Place(NamedTuple):
    """What a table is about: all sides in it differ only in what follows."""

    dataset: str
    train_images: int | None
    half: int | None
    image_size: int | None
    pool: int
    epochs: int
    batch_size: int
    optimizer: str
    model: str

    @property
    def file_name(self) -> str:
        """Short; what is as usual is left out."""
        return re.sub(r"[^\w.-]+", "_", "-".join(str(part) for part in self if part not in (None, "sgd")))


class Side(NamedTuple):
    """A column of the table.

    Attributes:
        norm: the normalization layer.
        init: the initialization.
        form: of normalized activations, None for plain ones.
        variation: see `Cell`.
    """

    norm: str
    init: str
    form: str | None
    variation: str = ""

    @property
    def plain(self) -> "Side":
        """The same network with plain activations."""
        return self._replace(form=None, variation="")

    @property
    def label(self) -> str:
        """What is done to the activation; empty for nothing."""
        if self.form and self.variation in (*VARIATIONS_OF_FORMS, *CLOSED_FORM):
            return f"{self.form}, {self.variation}"
        return self.variation or self.form or ""

    def __str__(self) -> str:
        activation = f"normalized, {self.label}" if self.form else self.label or "plain"
        norm = "" if self.norm == "none" else f", {NORM_NAMES[self.norm]}"
        return activation + norm + ("" if self.init == "lecun" else f", {self.init} init")


@dataclasses.dataclass
class Runs:
    """All runs of one activation on one side.

    Attributes:
        by_rate: validation accuracies at each learning rate that was tried.
        verdict: outcomes at the chosen learning rate, by seed, measured on the test split.
        rate: the chosen learning rate, None before it is.
    """

    by_rate: dict[float, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    verdict: dict[int, Outcome] = dataclasses.field(default_factory=dict)
    rate: float | None = None

    @property
    def at_edge(self) -> bool:
        """Whether the chosen learning rate is the smallest or the largest: a better one may lie beyond."""
        return self.rate in (min(self.by_rate), max(self.by_rate))

    def accuracy(self) -> Interval:
        """Of the test split, in the mean over seeds."""
        return Interval.of([outcome["test_accuracy"] for outcome in self.verdict.values()])

    def against(self, other: "Runs") -> Interval:
        """Difference of test accuracies, seed by seed: the same weights at the start, the same order of examples."""
        seeds = sorted(self.verdict.keys() & other.verdict.keys())
        difference = [self.verdict[s]["test_accuracy"] - other.verdict[s]["test_accuracy"] for s in seeds]
        return Interval.of(difference)


Table = dict[Side, dict[str, Runs]]  # side -> activation without n -> runs


def arrange(results: Results) -> dict[Place, Table]:
    """Everything finished, sorted into tables."""
    tables: dict[Place, Table] = defaultdict(lambda: defaultdict(lambda: defaultdict(Runs)))
    for settings, outcome in results:
        place = Place(*(settings[name] for name in Place._fields))
        _, activation = ActivationName.parse(settings["activation"])
        side = Side(*(settings[name] for name in Side._fields))
        runs = tables[place][side][activation]
        if settings["on_test"]:
            if runs.rate != settings["learning_rate"]:  # chosen anew, from more learning rates
                runs.rate, runs.verdict = settings["learning_rate"], {}
            runs.verdict[settings["seed"]] = outcome
        else:
            runs.by_rate[settings["learning_rate"]].append(outcome["validation_accuracy"])
    return {place: _finished(table) for place, table in tables.items()}


def _finished(table: Table) -> Table:
    """Only what has been measured on the test split, in a fixed order."""
    sides = {side: {name: runs for name, runs in column.items() if runs.verdict} for side, column in table.items()}
    order = sorted(
        sides,
        key=lambda s: (s.norm != "none", s.norm, s.init, s.form is None and s.variation != "", s.label),
    )
    return {side: sides[side] for side in order if sides[side]}


def markdown_table(table: Table) -> str:
    """Test accuracy in percent; in parentheses, beside normalized activations, the difference from the plain ones."""
    sides = list(table)
    rows = [table_head("activation", *map(str, sides))]
    for activation in sorted({name for column in table.values() for name in column}):
        rows.append(table_row(activation, *(cell(table, side, activation) for side in sides)))
    return "\n".join(rows)


def cell(table: Table, side: Side, activation: str) -> str:
    """An entry of the table; empty where nothing was run."""
    runs = table[side].get(activation)
    if runs is None:
        return ""
    diverged = sum(outcome["diverged"] for outcome in runs.verdict.values())
    notes = f" at {runs.rate:g}{'†' if runs.at_edge else ''}" + (f", {diverged} diverged" if diverged else "")
    plain = table.get(side.plain, {}).get(activation)
    if side == side.plain or plain is None:
        return f"{runs.accuracy()}{notes}"
    difference = runs.against(plain)
    text = difference.signed
    return f"{runs.accuracy()} ({f'**{text}**' if difference.excludes_zero else text}){notes}"
