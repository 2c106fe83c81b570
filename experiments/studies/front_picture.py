"""The picture of the README: accuracy over learning rates, and gradients by layer.

See `python experiments/studies/front_picture.py --help`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experiments.cli import BAD_SETTINGS, check_picture, fail, run_program, settings_of, table_head, table_row

# isort: split

import matplotlib
import numpy as np

from experiments.config import Recipe, Storage, changed, check_at_least
from experiments.data import DataError
from experiments.studies.results import Cell, Results, run_cells
from experiments.studies.rivals import network_of
from experiments.training.comparison_picture import gradients_at_the_start

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "Swish": {"activation": "swish", "norm": "none"},
        "BatchNorm, then Swish": {"activation": "swish", "norm": "batch"},
        "NSwish, without BatchNorm": {"activation": "nswish", "norm": "none"},
    }
)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains one network with Swish in three ways, at every learning rate, and draws how well each does.

    Test accuracy is shown at all learning rates: none is chosen. What is finished is kept in the workdir.
    """

    model: str = "mlp30"
    """the network"""
    epochs: int = 15
    """passes over the digits"""
    seeds: int = 3
    """runs at each learning rate"""
    workdir: Path = Path("experiments/results/front")
    """folder for results.jsonl"""
    output: Path = Path("docs/pictures/front.png")
    """the picture"""
    storage: Storage = Storage()

    def recipe(self, side: str) -> Recipe:
        """The settings of a side, at no particular learning rate."""
        return changed(Recipe(), model=self.model, epochs=self.epochs, **SIDES[side])

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        self.storage.check()
        check_at_least(1, "seeds", self.seeds)
        for side in SIDES:
            self.recipe(side).check()


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    try:
        config.check()
        results = Results(config.workdir / "results.jsonl")
        check_picture(config.output)
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    accuracies = {side: measure(config, side, results) for side in SIDES}
    print(table_head("test accuracy, %", *(f"{rate:g}" for rate in RATES)))
    for side, values in accuracies.items():
        print(table_row(side, *(f"{100 * mean:.1f}" for mean in values.mean(axis=1))))
    draw(config, accuracies)
    print(config.output)
    return 0


def measure(config: Config, side: str, results: Results) -> np.ndarray:
    """Test accuracies, by learning rate and seed."""
    cells = [
        [
            Cell(dataclasses.replace(config.recipe(side), learning_rate=rate, seed=seed), on_test=True)
            for seed in range(config.seeds)
        ]
        for rate in RATES
    ]
    run_cells([cell for row in cells for cell in row], results, config.storage, network_of)
    outcomes = [[results.get(cell) for cell in row] for row in cells]
    return np.array([[outcome["test_accuracy"] for outcome in row if outcome] for row in outcomes])


def draw(config: Config, accuracies: Mapping[str, np.ndarray]) -> None:
    """Draws the mean over seeds, with the range of all, and the gradients before training."""
    dataset = Recipe().data.load(config.storage)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (side, values), color in zip(accuracies.items(), ("tab:red", "tab:gray", "tab:blue"), strict=True):
        left.plot(RATES, values.mean(axis=1), "o-", color=color, label=side)
        left.fill_between(RATES, values.min(axis=1), values.max(axis=1), color=color, alpha=0.2)
        sizes = [float(row.gradient) for row in gradients_at_the_start(config.recipe(side), dataset)]
        right.plot(range(1, len(sizes)), sizes[:-1], "o-", markersize=3, color=color, label=side)
    left.set(xscale="log", ylim=(0, 1), xlabel="learning rate", ylabel="accuracy on test images")
    left.set_title(f"{config.seeds} runs at each learning rate")
    right.set(yscale="log", xlabel="layer, from input to output", ylabel="mean square of the gradient")
    right.set_title("gradients before training")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    right.legend(loc="lower right")
    figure.savefig(config.output, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_program(main)
