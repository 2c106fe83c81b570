"""One picture of two runs that differ in their activation."""

from pathlib import Path

import jax
import matplotlib

from anact_jax.diagnostics import LayerVariances
from anact_jax.plots import plain_log_scale
from experiments.config import Experiment
from experiments.data import Dataset, first_examples
from experiments.networks.build import make_network
from experiments.training.metrics import read_evaluations
from experiments.training.runs import variances_of
from experiments.training.steps import make_steps

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_IMAGES = 128  # test images, at most, on which gradients are measured


def draw_comparison(runs: tuple[Experiment, ...], dataset: Dataset, path: Path) -> None:
    """Draws test accuracy over epochs, and gradients by layer before training, a line for each run in its `workdir`."""
    figure, (accuracies, gradients) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for run in runs:
        assert run.workdir is not None
        measured = read_evaluations(run.workdir)
        epochs, values = ([record[name] for record in measured] for name in ("epoch", "test_accuracy"))
        accuracies.plot(epochs, values, ".-", label=run.activation)
        sizes = [float(row.gradient) for row in gradients_at_the_start(run, dataset)]
        gradients.plot(range(1, len(sizes) + 1), sizes, ".-", label=run.activation)
    accuracies.set(title="accuracy on test images", xlabel="epoch", ylim=(0, 1))
    gradients.set(title="gradients before training", xlabel="layer, from input to output", ylabel="mean square")
    plain_log_scale(gradients)
    for panel in (accuracies, gradients):
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def gradients_at_the_start(run: Experiment, dataset: Dataset) -> tuple[LayerVariances, ...]:
    """Signals and gradients of a run's network with its initial weights, on test images."""
    model = make_network(run, dataset)
    initial = make_steps(model, run, dataset).create(run.seed, run.learning_rate)
    images, labels, _ = first_examples(dataset, _IMAGES)
    found: tuple[LayerVariances, ...] = jax.device_get(variances_of(model)(initial.variables, images, labels))
    return found
