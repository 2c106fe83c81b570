"""Compares activations, plain and normalized, each at its own best learning rate.

See `python experiments/studies/compare.py --help`.
"""

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from experiments.cli import BAD_SETTINGS, FAILED, INTERRUPTED, fail, run_program, say, settings_of

# isort: split

import numpy as np
from tyro.conf import arg

from anact_jax import ACTIVATIONS
from experiments.config import (
    Data,
    FormSettings,
    Network,
    Parts,
    Recipe,
    Storage,
    Training,
    check_at_least,
    check_positive,
    load_for,
)
from experiments.data import DataError
from experiments.data.kept import keep
from experiments.forms import form_named
from experiments.networks import MODELS, NORMS, ActivationName, check_name
from experiments.studies.report import write_report
from experiments.studies.results import Cell, Outcome, Results, run_cells
from experiments.studies.rivals import VARIATIONS, VARIATIONS_OF_FORMS, network_of
from experiments.training.build import check_devices

FINALISTS = 2  # learning rates that are tried with all seeds of the choice


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains every network with every activation, each at its own best learning rate.

    The rate is chosen on a validation split; runs with other seeds are then measured on the test
    split. What is finished is kept in the workdir: run the same command again to go on, or another one
    on the same workdir to add to the report.
    """

    activations: Annotated[
        tuple[str, ...],
        arg(help=f"of {', '.join(ACTIVATIONS)}; with n before it, normalized"),
    ] = (
        "swish",
        "nswish",
    )
    forms: tuple[str, ...] = ("published", "default")
    """of normalized ones: published, default, or labels in experiments/forms.py"""
    variations: Annotated[
        tuple[str, ...],
        arg(help=f"of plain ones too: {', '.join(VARIATIONS)}; of normalized ones: {', '.join(VARIATIONS_OF_FORMS)}"),
    ] = ()
    models: Annotated[tuple[str, ...], arg(help=f"of {', '.join(MODELS)}")] = ("mlp10",)
    norms: Annotated[tuple[str, ...], arg(help=f"normalization layers, of {', '.join(NORMS)}")] = ("none", "batch")
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """from which each side's best one is chosen, by its accuracy on the validation split"""
    choice_seeds: int = 2
    """runs, with seeds of their own, at each of the two best learning rates; one at the others"""
    seeds: int = 5
    """runs at the chosen learning rate, measured on the test split"""
    workdir: Path = Path("comparison")
    """folder for results.jsonl and the report"""
    data: Data = Data(validation_images=360)
    parts: Parts = Parts()
    training: Training = Training()
    storage: Storage = Storage()

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        for part in (self.data, self.parts, self.training, self.storage):
            part.check()
        for name in self.activations:
            ActivationName.parse(name)
        for name in self.variations:
            check_name("variation", name, (*VARIATIONS, *VARIATIONS_OF_FORMS))
        for form in self.forms:
            form_named(form)
        for name in self.models:
            check_name("model", name, MODELS)
        for name in self.norms:
            check_name("norm", name, NORMS)
        for rate in self.learning_rates:
            check_positive("learning_rate", rate)
        for name in ("activations", "forms", "models", "norms", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for name in ("choice_seeds", "seeds"):
            check_at_least(1, name, getattr(self, name))
        check_at_least(1, "validation_images", self.data.validation_images)

    def sides(self) -> Iterator[Cell]:
        """Every network with every activation, each plain one once, at no particular learning rate."""
        for model, norm, name in itertools.product(self.models, self.norms, self.activations):
            normalized = ActivationName.parse(name).normalized
            known = VARIATIONS_OF_FORMS if normalized else VARIATIONS
            for form in self.forms if normalized else ("default",):  # of no meaning
                network = Network(model, name, norm, FormSettings.of(form_named(form)), self.parts)
                recipe = Recipe(self.data, network, self.training)
                for variation in ("", *(name for name in self.variations if name in known)):
                    yield Cell(recipe, on_test=False, variation=variation)


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    try:
        config.check()
        sides = list(config.sides())
        check_devices(config.training.batch_size)
        dataset = load_for(config.data, config.training, config.storage)
        for side in sides:
            network_of(side.recipe, side.variation, dataset)
        results = Results(config.workdir / "results.jsonl")
        keep(config.workdir, config.data.dataset, dataset)
        if dataset.description:
            say(dataset.description)
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    try:
        for number, side in enumerate(sides, start=1):
            network = side.recipe.network
            which = side.variation or network.label or "plain"
            named = f"{number}/{len(sides)} {network.model} {network.norm} {network.activation}, {which}:"
            print(named, end=" ", flush=True)
            print(compare_side(side, config, results))
    except KeyboardInterrupt:
        return fail(f"interrupted; what is finished is in {config.workdir}, the same command goes on", INTERRUPTED)
    except OSError as error:
        return fail(f"{error}; what is finished is in {config.workdir}, the same command goes on", FAILED)
    command = shlex.join(["python", "experiments/studies/compare.py", *sys.argv[1:]])
    print(write_report(results, config.workdir, command))
    return 0


def compare_side(side: Cell, config: Config, results: Results) -> str:
    """Chooses the learning rate of one network, then runs it with all seeds; returns what came out, in words."""
    rate = choose_rate(side, config, results)
    verdict = [_at(side, rate, seed)._replace(on_test=True) for seed in range(config.seeds)]
    run_cells(verdict, results, config.storage, network_of)
    accuracies = [finished(cell, results)["test_accuracy"] for cell in verdict]
    return f"learning rate {rate:g}, test accuracy {np.mean(accuracies):.4f}"


def _at(side: Cell, rate: float, seed: int) -> Cell:
    return side._replace(recipe=dataclasses.replace(side.recipe, learning_rate=rate, seed=seed))


def choose_rate(side: Cell, config: Config, results: Results) -> float:
    """The learning rate with the highest validation accuracy; of equals, the smallest.

    All are tried with one seed, the best `FINALISTS` with the others too: one lucky run at a rate
    that mostly fails does not win.
    """

    def mean_accuracies(rates: Sequence[float], seeds: Iterable[int]) -> dict[float, float]:
        cells = {rate: [_at(side, rate, seed) for seed in seeds] for rate in rates}
        run_cells(itertools.chain(*cells.values()), results, config.storage, network_of)
        return {
            rate: float(np.mean([finished(cell, results)["validation_accuracy"] for cell in row]))
            for rate, row in cells.items()
        }

    seeds = range(config.seeds, config.seeds + config.choice_seeds)  # not those that are reported
    first = mean_accuracies(sorted(config.learning_rates), seeds[:1])
    finalists = sorted(sorted(first, key=lambda rate: -first[rate])[:FINALISTS])
    final = mean_accuracies(finalists, seeds)
    return max(finalists, key=lambda rate: final[rate])


def finished(cell: Cell, results: Results) -> Outcome:
    """What came of a cell that has been run."""
    outcome = results.get(cell)
    assert outcome is not None
    return outcome


if __name__ == "__main__":
    run_program(main)
