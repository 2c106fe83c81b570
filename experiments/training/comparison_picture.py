"""One picture of two runs that differ in their activation."""

from pathlib import Path

import jax
import matplotlib

from anact_jax.diagnostics import LayerVariances
from anact_jax.plots import plain_log_scale
from experiments.config import Experiment, Recipe
from experiments.data import Dataset, first_examples
from experiments.training.build import make_network
from experiments.training.load_run import variances_of
from experiments.training.metrics import read_evaluations
from experiments.training.steps import make_steps

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_IMAGES = 128  # test images, at most, on which gradients are measured


def draw_comparison(runs: tuple[Experiment, ...], dataset: Dataset, path: Path) -> None:
    """Draws test accuracy over epochs, and gradients by layer before training, a line for each run in its `workdir`."""
    figure, (accuracies, gradients) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for run in runs:
        assert run.run.workdir is not None
        measured = read_evaluations(run.run.workdir)
        epochs, values = ([record[name] for record in measured] for name in ("epoch", "test_accuracy"))
        accuracies.plot(epochs, values, ".-", label=run.recipe.network.activation)
        sizes = [float(row.gradient) for row in gradients_at_the_start(run.recipe, dataset)]
        gradients.plot(range(1, len(sizes) + 1), sizes, ".-", label=run.recipe.network.activation)
    accuracies.set(title="accuracy on test images", xlabel="epoch", ylim=(0, 1))
    gradients.set(title="gradients before training", xlabel="layer, from input to output", ylabel="mean square")
    plain_log_scale(gradients)
    for panel in (accuracies, gradients):
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def gradients_at_the_start(recipe: Recipe, dataset: Dataset) -> tuple[LayerVariances, ...]:
    """Signals and gradients of a recipe's network with its initial weights, on test images."""
    model = make_network(recipe.network, dataset)
    initial = make_steps(model, recipe.training, dataset).create(recipe.seed, recipe.learning_rate)
    images, labels, _ = first_examples(dataset, _IMAGES)
    found: tuple[LayerVariances, ...] = jax.device_get(variances_of(model)(initial.variables, images, labels))
    return found
