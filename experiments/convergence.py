"""How fast a network converges against how far the gains of its activations are from 1.

See `python experiments/convergence.py --help`.
"""

import dataclasses
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.stats
import tyro
from jaxtyping import Float
from tyro.conf import arg

from anact_jax import ACTIVATIONS
from experiments.cells import Cell, Results, run_cells
from experiments.cli import BAD_SETTINGS, FAILED, INTERRUPTED, fail
from experiments.comparison import Variant
from experiments.config import Recipe, TrainConfig, check_positive
from experiments.data import DataError, Dataset, training_batches
from experiments.gains import layer_gains
from experiments.models import MODELS, check_name
from experiments.network import check_devices, make_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_RESAMPLES = 2_000


@dataclasses.dataclass(frozen=True)
class ConvergenceConfig(Recipe):
    """Trains a plain network with activations whose gains are near 1 and with others, and correlates.

    Each activation is used as it is, and normalized with factors multiplied by constants. *Distance*:
    |log forward gain| + |log backward gain|, in the mean over layers, at initialization. *Speed*: the mean
    training loss over all epochs, at the learning rate where it is lowest.
    """

    activations: Annotated[tuple[str, ...], arg(help=f"of {', '.join(ACTIVATIONS)}")] = tuple(ACTIVATIONS)
    variant: str = "mean"
    """how the normalized ones are: a rule, with +center, +unit or +diff as wanted"""
    scales: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0)
    """constants that multiply the factors of the normalized ones"""
    model: Annotated[str, arg(help=f"one of {', '.join(MODELS)}")] = "mlp10"
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    """from which each point takes its best"""
    seeds: int = 3
    """runs at each learning rate"""
    epochs: int = 10
    """passes over the training data"""
    validation_images: int = 360
    """training images held out; nothing is decided on them"""
    workdir: Path = Path("convergence")
    """folder for results.jsonl, points.json and the picture"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        super().check()
        for name in self.activations:
            check_name("activation", name, ACTIVATIONS)
        Variant.parse(self.variant)
        check_name("model", self.model, MODELS)
        for name in ("learning_rates", "scales"):
            for value in getattr(self, name):
                check_positive(name, value)
        if len(self.activations) < 2:
            raise ValueError(f"a correlation needs at least 2 activations, got {len(self.activations)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")

    def networks(self) -> list[TrainConfig]:
        """Every form of every activation, at no particular learning rate."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}
        options: dict[str, Any] = Variant.parse(self.variant)._asdict()
        forms = [(name, 1.0) for name in self.activations]
        forms += [(f"n{name}", scale) for name in self.activations for scale in self.scales]
        return [
            TrainConfig(**shared, **options, model=self.model, norm="none", activation=name, activation_scale=scale)
            for name, scale in forms
        ]


class Point(NamedTuple):
    """One network: how far its gains are from 1, and how fast it learned."""

    activation: str
    scale: float
    distance: float
    loss: float
    learning_rate: float


def main() -> int:
    """Runs the program and returns its exit status."""
    config = tyro.cli(ConvergenceConfig)
    try:
        config.check()
        check_devices(config.batch_size)
        dataset = config.load_data()
        networks = config.networks()
        results = Results(config.workdir / "results.jsonl")
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    points = []
    try:
        for number, network in enumerate(networks, start=1):
            points.append(measure_point(network, config, dataset, results))
            print(f"{number}/{len(networks)}", *points[-1])
    except KeyboardInterrupt:
        return fail(f"interrupted; what is finished is in {config.workdir}, the same command goes on", INTERRUPTED)
    except OSError as error:
        return fail(f"{error}; what is finished is in {config.workdir}, the same command goes on", FAILED)
    report(points, config)
    return 0


def measure_point(network: TrainConfig, config: ConvergenceConfig, dataset: Dataset, results: Results) -> Point:
    """Trains one network at all learning rates, with all seeds."""
    cells = {
        rate: [
            Cell(dataclasses.replace(network, learning_rate=rate, seed=seed), on_test=False)
            for seed in range(config.seeds)
        ]
        for rate in config.learning_rates
    }
    run_cells(itertools.chain(*cells.values()), results)
    start = float(np.log(dataset.classes))  # the loss of guessing, and what a diverged epoch counts as

    def mean_loss(rate: float) -> float:
        curves = [outcome["curve"] for cell in cells[rate] if (outcome := results.get(cell))]
        losses = [[min(record["train_loss"], start) for record in curve] for curve in curves]
        return float(np.mean([row + [start] * (config.epochs - len(row)) for row in losses]))

    rate = min(config.learning_rates, key=mean_loss)
    return Point(
        network.activation, network.activation_scale, distance_from_one(network, dataset), mean_loss(rate), rate
    )


def distance_from_one(network: TrainConfig, dataset: Dataset) -> float:
    """|log forward gain| + |log backward gain|, in the mean over layers, at initialization on one training batch."""
    model = make_network(network, dataset)
    images = jnp.asarray(next(training_batches(dataset, network.batch_size, seed=0, epochs=1)).images)
    variables = model.init(jax.random.key(0), images, train=True)
    # The first batch replaces the prior in the running statistics, so that inference then uses this batch's own.
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    layers = layer_gains(model, {**variables, **updates}, images)
    gains = network.activation_scale**2 * np.array([(layer.forward, layer.backward) for layer in layers])
    return float(np.abs(np.log(np.maximum(gains, np.finfo(np.float32).tiny))).sum(1).mean())


class Correlation(NamedTuple):
    """Spearman's rank correlation and its 95% interval."""

    rank: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rank:.2f} ({self.low:.2f} to {self.high:.2f})"


def rank_correlation(points: Sequence[Point]) -> Correlation:
    """Of distance and loss; the interval by resampling whole activations, since one's points are not independent."""
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        name = point.activation if point.activation in ACTIVATIONS else point.activation.removeprefix("n")
        groups[name].append((point.distance, point.loss))
    blocks = [np.array(group, float) for group in groups.values()]
    rng = np.random.default_rng(0)
    draws = [
        _spearman(np.concatenate([blocks[i] for i in rng.integers(0, len(blocks), len(blocks))]))
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    return Correlation(_spearman(np.concatenate(blocks)), float(low), float(high))


def _spearman(pairs: Float[np.ndarray, "n 2"]) -> float:
    return float(scipy.stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def report(points: Sequence[Point], config: ConvergenceConfig) -> None:
    """Prints the correlations; writes them with all points to `points.json`, and draws `convergence.png`."""
    groups = {
        "all": points,
        "plain": [p for p in points if p.activation in ACTIVATIONS],
        "normalized": [p for p in points if p.activation not in ACTIVATIONS],
    }
    correlations = {name: rank_correlation(group) for name, group in groups.items() if len(group) > 2}
    for name, correlation in correlations.items():
        print(f"{name}: rank correlation {correlation}, {len(groups[name])} networks")
    record = {
        "correlations": {name: correlation._asdict() for name, correlation in correlations.items()},
        "points": [point._asdict() for point in points],
    }
    (config.workdir / "points.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(points, str(correlations["all"]), config.workdir / "convergence.png")


def draw(points: Sequence[Point], correlation: str, path: Path) -> None:
    """Training loss over distance, a colour for each activation."""
    figure, panel = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for number, name in enumerate(dict.fromkeys(p.activation for p in points if p.activation in ACTIVATIONS)):
        for form, marker in (("", "x"), ("n", "o")):
            group = [p for p in points if p.activation == form + name]
            panel.scatter(
                [p.distance for p in group],
                [p.loss for p in group],
                color=f"C{number}",
                marker=marker,
                label=name if form else None,
            )
    panel.set(
        xlabel="distance of the gains from 1: |log forward| + |log backward|, mean over layers",
        ylabel="mean training loss, at the best learning rate",
        title=f"o normalized, at several scales; x plain; rank correlation {correlation}",
    )
    panel.grid(alpha=0.3)
    panel.legend(title="activation", fontsize="small", loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
