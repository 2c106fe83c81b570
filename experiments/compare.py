"""Compares activations, plain and normalized, each at its own best learning rate.

See `python experiments/compare.py --help`.
"""

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tyro.conf import arg

from anact_jax import ACTIVATIONS, RULES
from experiments.cells import Cell, Outcome, Results, run_cells
from experiments.cli import BAD_SETTINGS, FAILED, INTERRUPTED, fail
from experiments.comparison import Variant, write_reports
from experiments.config import Recipe, TrainConfig, check_positive
from experiments.data import DataError
from experiments.models import MODELS, NORMS, ActivationName, check_name
from experiments.network import check_devices, make_network

FINALISTS = 2  # learning rates that are tried with all seeds of the choice
_VARIANT = (
    f"a rule ({', '.join(RULES)}), with +center, +unit, +diff, +learn, +feature, +nu0.1 (limit of the nonlinearity), "
    "+lag or +fixed (tracking), +scale or +measured (tempering), +step or +range (bounds) as wanted"
)


@dataclasses.dataclass(frozen=True)
class CompareConfig(Recipe):
    """Trains every network with every activation, each at its own best learning rate.

    The rate is chosen on a validation split; runs with other seeds are then measured on the test
    split. What is finished is kept in the workdir: run the same command again to go on, or another one
    on the same workdir to add to the report.
    """

    activations: Annotated[
        tuple[str, ...], arg(help=f"of {', '.join(ACTIVATIONS)}; with n before it, normalized; with d, shaped")
    ] = (
        "swish",
        "nswish",
    )
    variants: Annotated[tuple[str, ...], arg(help=f"how normalized ones are, each {_VARIANT}")] = ("mean", "mean+unit")
    models: Annotated[tuple[str, ...], arg(help=f"of {', '.join(MODELS)}")] = ("mlp10",)
    norms: Annotated[tuple[str, ...], arg(help=f"normalization layers, of {', '.join(NORMS)}")] = ("none", "batch")
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """from which each side's best one is chosen, by its accuracy on the validation split"""
    choice_seeds: int = 2
    """runs, with seeds of their own, at each of the two best learning rates; one at the others"""
    seeds: int = 5
    """runs at the chosen learning rate, measured on the test split"""
    validation_images: int = 360
    """training images held out to choose the learning rate on"""
    workdir: Path = Path("comparison")
    """folder for results.jsonl and the reports"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        super().check()
        for name in self.activations:
            ActivationName.parse(name)
        for variant in self.variants:
            Variant.parse(variant)
        for name in self.models:
            check_name("model", name, MODELS)
        for name in self.norms:
            check_name("norm", name, NORMS)
        for rate in self.learning_rates:
            check_positive("learning_rate", rate)
        for name in ("activations", "variants", "models", "norms", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for name in ("choice_seeds", "seeds", "validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def sides(self) -> Iterator[TrainConfig]:
        """Every network with every activation, each plain one once, at no particular learning rate."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}
        for model, norm, activation in itertools.product(self.models, self.norms, self.activations):
            normalized = ActivationName.parse(activation).form == "n"
            variants = self.variants if normalized else ("mean",)  # others have no rule
            for variant in variants:
                options: dict[str, Any] = Variant.parse(variant)._asdict()
                yield TrainConfig(**shared, **options, model=model, norm=norm, activation=activation)


def main() -> int:
    """Runs the program and returns its exit status."""
    config = tyro.cli(CompareConfig)
    try:
        config.check()
        sides = list(config.sides())
        check_devices(config.batch_size)
        dataset = config.load_data()
        for side in sides:
            make_network(side, dataset)
        results = Results(config.workdir / "results.jsonl")
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    try:
        for number, side in enumerate(sides, start=1):
            print(f"{number}/{len(sides)} {side.model} {side.norm} {side.activation}", end=" ", flush=True)
            print(compare_side(side, config, results))
    except KeyboardInterrupt:
        return fail(f"interrupted; what is finished is in {config.workdir}, the same command goes on", INTERRUPTED)
    except OSError as error:
        return fail(f"{error}; what is finished is in {config.workdir}, the same command goes on", FAILED)
    command = shlex.join(["python", "experiments/compare.py", *sys.argv[1:]])
    for path in write_reports(results, config.workdir, command):
        print(path)
    return 0


def compare_side(side: TrainConfig, config: CompareConfig, results: Results) -> str:
    """Chooses the learning rate of one network, then runs it with all seeds; returns what came out, in words."""
    rate = choose_rate(side, config, results)
    verdict = [Cell(dataclasses.replace(side, learning_rate=rate, seed=s), on_test=True) for s in range(config.seeds)]
    run_cells(verdict, results)
    accuracies = [finished(cell, results)["test_accuracy"] for cell in verdict]
    return f"learning rate {rate:g}, test accuracy {np.mean(accuracies):.4f}"


def choose_rate(side: TrainConfig, config: CompareConfig, results: Results) -> float:
    """The learning rate with the highest validation accuracy; of equals, the smallest.

    All are tried with one seed, the best `FINALISTS` with the others too: one lucky run at a rate
    that mostly fails does not win.
    """

    def mean_accuracies(rates: Sequence[float], seeds: Iterable[int]) -> dict[float, float]:
        cells = {
            rate: [Cell(dataclasses.replace(side, learning_rate=rate, seed=seed), on_test=False) for seed in seeds]
            for rate in rates
        }
        run_cells(itertools.chain(*cells.values()), results)
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
    sys.exit(main())
