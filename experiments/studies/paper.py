"""The paper's claim on a data set: a network with its activation normalized against the same network without.

See `python experiments/studies/paper.py --help`.
"""

import dataclasses
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from experiments.cli import BAD_SETTINGS, fail, run_program, settings_of, table_head, table_row

# isort: split

from tyro.conf import arg

from experiments import train_resnet
from experiments.config import Dtype, Experiment, Storage, changed, check_at_least
from experiments.networks import ModelName, check_name
from experiments.recipes import RECIPES
from experiments.studies.intervals import Interval
from experiments.training.checkpoints import silence_orbax
from experiments.training.metrics import read_evaluations
from experiments.training.processes import StopSignal

_FASHION_MNIST = changed(
    Experiment(), dataset="fashion_mnist", model="resnet18", epochs=8, batch_size=256, learning_rate=0.1, nesterov=True
)
SETTINGS = MappingProxyType(
    {
        "tiny_imagenet": RECIPES["resnet50_tiny_imagenet"].config,
        "cifar100": RECIPES["resnet50_cifar100"].config,
        "fashion_mnist": _FASHION_MNIST,
        "digits": changed(Experiment(), model="resnet20", epochs=15),
    }
)
CLAIMED = MappingProxyType({"tiny_imagenet": 1.4, "cifar100": 1.2})
"""Points of accuracy by which normalized Swish is above Swish there, in the paper's abstract."""
PLAIN = "BatchNorm, swish"
SIDES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        PLAIN: {"norm": "batch", "activation": "swish", "form": "default"},
        "BatchNorm, normalized, published form": {"norm": "batch", "activation": "nswish", "form": "published"},
        "BatchNorm, normalized, default form": {"norm": "batch", "activation": "nswish", "form": "default"},
        "normalized, default form": {"norm": "none", "activation": "nswish", "form": "default"},
    }
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a network with Swish, plain and normalized, and prints the table of differences and what it says.

    Each run has a folder of its own; the same command goes on where it stopped. All sides have the recipe's learning
    rate; see compare.py for each side's own best.
    """

    dataset: Annotated[str, arg(help="one of " + ", ".join(SETTINGS))] = "fashion_mnist"
    seeds: int = 3
    """runs of each side"""
    epochs: int | None = None
    """passes over the training data, by default the recipe's"""
    model: ModelName | None = None
    """another network than the recipe's"""
    dtype: Dtype = "bfloat16"
    """in which layers compute"""
    workdir: Path = Path("paper")
    """folder for the runs"""
    storage: Storage = Storage()

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be; each run checks the others."""
        self.storage.check()
        check_name("dataset", self.dataset, SETTINGS)
        check_at_least(1, "seeds", self.seeds)

    def experiment(self, side: str, seed: int) -> Experiment:
        """The settings of a run."""
        base = SETTINGS[self.dataset]
        changes = {name: value for name in ("epochs", "model") if (value := getattr(self, name)) is not None}
        folder = f"{self.dataset}-{side.replace(', ', '-').replace(' ', '_')}-{seed}"
        base = dataclasses.replace(base, storage=self.storage)
        return changed(base, **SIDES[side], **changes, dtype=self.dtype, seed=seed, workdir=self.workdir / folder)


def main() -> int:
    """Runs the program and returns its exit status."""
    silence_orbax()
    config = settings_of(Config)
    try:
        config.check()
        runs = {side: [config.experiment(side, seed) for seed in range(config.seeds)] for side in SIDES}
        for experiments in runs.values():
            for experiment in experiments:
                experiment.check()
    except ValueError as error:
        return fail(str(error), BAD_SETTINGS)
    with StopSignal() as stop:
        for seed in range(config.seeds):  # seed by seed: what is finished can be compared
            for side in SIDES:
                experiment = runs[side][seed]
                if final_accuracy(experiment) is None and (status := train_resnet.run(experiment, stop)):
                    return status
    found = {side: [final_accuracy(experiment) or 0.0 for experiment in runs[side]] for side in SIDES}
    print(report(config.dataset, found))
    return 0


def final_accuracy(experiment: Experiment) -> float | None:
    """The test accuracy that a run ended with; None unless it is finished."""
    assert experiment.run.workdir is not None
    if not (experiment.run.workdir / "metrics.jsonl").exists():
        return None
    records = read_evaluations(experiment.run.workdir)
    return (
        records[-1]["test_accuracy"] if records and records[-1]["epoch"] == experiment.recipe.training.epochs else None
    )


def report(dataset: str, accuracies: dict[str, list[float]]) -> str:
    """The table of test accuracies and differences, and what the abstract claims beside what was measured."""
    lines = [table_head("network", "test accuracy, %", "against plain, points")]
    answers = []
    for side, values in accuracies.items():
        difference = Interval.of([value - plain for value, plain in zip(values, accuracies[PLAIN], strict=True)])
        lines.append(table_row(side, str(Interval.of(values)), "" if side == PLAIN else difference.signed))
        if side != PLAIN:
            answers.append(f"- {side}: {difference.signed} points against {PLAIN}; {_verdict(dataset, difference)}.")
    return "\n".join([*lines, "", *answers])


def _verdict(dataset: str, difference: Interval) -> str:
    if dataset not in CLAIMED:
        claim = "the abstract names no figure for this data set, and claims an improvement"
        holds = difference.mean > 0 and difference.excludes_zero
    else:
        claim = f"the abstract claims {CLAIMED[dataset]} points or more"
        holds = difference.mean - difference.half_width > 0 and 100 * difference.mean >= CLAIMED[dataset]
    if not difference.half_width >= 0:
        return f"{claim}; one seed cannot tell"
    return f"{claim}: {'it held' if holds else 'it did not hold'}"


if __name__ == "__main__":
    run_program(main)
