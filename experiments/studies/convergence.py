"""How fast a network converges against how far the gains of its activations are from 1.

See `python experiments/studies/convergence.py --help`.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from experiments.cli import BAD_SETTINGS, FAILED, INTERRUPTED, fail, run_program, settings_of

# isort: split

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.stats
from jaxtyping import Array, Float
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
from experiments.data import DataError, Dataset, training_batches
from experiments.forms import form_named
from experiments.networks import MODELS, LayerFunction, check_name
from experiments.studies.results import Cell, Results, not_run_today, run_cells
from experiments.studies.vmapped_training import for_ensemble
from experiments.training.build import check_devices, layers_of, make_network
from experiments.training.gains import gains_of
from experiments.training.metrics import to_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_RESAMPLES = 2_000


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a plain network with activations whose gains are near 1 and with others, and correlates.

    Each activation is used as it is, and normalized with factors multiplied by constants. *Distance*:
    |log forward gain| + |log backward gain|, in the mean over layers, at initialization. *Speed*: the mean
    training loss over all epochs, at the learning rate where it is lowest.
    """

    activations: Annotated[tuple[str, ...], arg(help=f"of {', '.join(ACTIVATIONS)}")] = tuple(ACTIVATIONS)
    form: str = "published"
    """of the normalized ones: published, default, or a label in experiments/forms.py"""
    scales: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0)
    """constants that multiply the factors of the normalized ones"""
    model: Annotated[str, arg(help=f"one of {', '.join(MODELS)}")] = "mlp10"
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    """from which each point takes its best"""
    seeds: int = 3
    """runs at each learning rate"""
    workdir: Path = Path("convergence")
    """folder for results.jsonl, points.json and the picture"""
    data: Data = Data(validation_images=360)
    parts: Parts = Parts()
    training: Training = Training(epochs=10)
    storage: Storage = Storage()

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        for part in (self.data, self.parts, self.training, self.storage):
            part.check()
        for name in self.activations:
            check_name("activation", name, ACTIVATIONS)
        form_named(self.form)
        check_name("model", self.model, MODELS)
        for name in ("learning_rates", "scales"):
            for value in getattr(self, name):
                check_positive(name, value)
        if len(self.activations) < 2:
            raise ValueError(f"a correlation needs at least 2 activations, got {len(self.activations)}")
        check_at_least(1, "seeds", self.seeds)

    def networks(self) -> list[tuple[Recipe, float]]:
        """Every activation as it is and normalized, with what its factor is multiplied by, at no particular rate."""
        forms = [(name, 1.0) for name in self.activations]
        forms += [(f"n{name}", scale) for name in self.activations for scale in self.scales]
        form = FormSettings.of(form_named(self.form))

        def recipe(name: str) -> Recipe:
            return Recipe(self.data, Network(self.model, name, "none", form, self.parts), self.training)

        return [(recipe(name), scale) for name, scale in forms]


class Scaled(nn.Module):
    """A layer times a constant."""

    layer: LayerFunction
    scale: float

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Scale * layer(x)."""
        return self.scale * self.layer(x)


_FACTOR = "factor times "


def _variation(scale: float) -> str:
    return "" if scale == 1 else f"{_FACTOR}{scale:g}"


def network_of(recipe: Recipe, variation: str, dataset: Dataset) -> nn.Module:
    """A recipe's network for an ensemble, with its activations multiplied as the variation says.

    Raises:
        ValueError: there is no such variation, or as `make_network` raises.
    """
    layers = for_ensemble(layers_of(recipe.network))
    if variation.startswith(_FACTOR):
        act, scale = layers.act, float(variation.removeprefix(_FACTOR))
        layers = layers._replace(act=lambda inference: Scaled(act(inference), scale))
    elif variation:
        raise not_run_today(variation)
    return make_network(recipe.network, dataset, layers)


class Point(NamedTuple):
    """One network: how far its gains are from 1, and how fast it learned."""

    activation: str
    scale: float
    distance: float
    loss: float
    learning_rate: float


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    try:
        config.check()
        check_devices(config.training.batch_size)
        dataset = load_for(config.data, config.training, config.storage)
        networks = config.networks()
        results = Results(config.workdir / "results.jsonl")
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    points = []
    try:
        for number, (recipe, scale) in enumerate(networks, start=1):
            points.append(measure_point(recipe, scale, config, dataset, results))
            print(f"{number}/{len(networks)}", *points[-1])
    except KeyboardInterrupt:
        return fail(f"interrupted; what is finished is in {config.workdir}, the same command goes on", INTERRUPTED)
    except OSError as error:
        return fail(f"{error}; what is finished is in {config.workdir}, the same command goes on", FAILED)
    report(points, config)
    return 0


def measure_point(recipe: Recipe, scale: float, config: Config, dataset: Dataset, results: Results) -> Point:
    """Trains one network at all learning rates, with all seeds."""
    cells = {
        rate: [
            Cell(dataclasses.replace(recipe, learning_rate=rate, seed=seed), False, _variation(scale))
            for seed in range(config.seeds)
        ]
        for rate in config.learning_rates
    }
    run_cells(itertools.chain(*cells.values()), results, config.storage, network_of)
    start = float(np.log(dataset.classes))  # the loss of guessing, and what a diverged epoch counts as

    def mean_loss(rate: float) -> float:
        curves = [outcome["curve"] for cell in cells[rate] if (outcome := results.get(cell))]
        losses = [[min(record["train_loss"], start) for record in curve] for curve in curves]
        return float(np.mean([row + [start] * (config.training.epochs - len(row)) for row in losses]))

    rate = min(config.learning_rates, key=mean_loss)
    return Point(recipe.network.activation, scale, distance_from_one(recipe, scale, dataset), mean_loss(rate), rate)


def distance_from_one(recipe: Recipe, scale: float, dataset: Dataset) -> float:
    """|log forward gain| + |log backward gain|, in the mean over layers, at initialization on one training batch."""
    model = network_of(recipe, _variation(scale), dataset)
    images = jnp.asarray(next(training_batches(dataset, recipe.training.batch_size, seed=0, epochs=1)).images)
    variables = model.init(jax.random.key(0), images, train=True)
    # The first batch replaces the prior in the running statistics, so that inference then uses this batch's own.
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    layers = gains_of(model, images)({**variables, **updates})
    gains = scale**2 * np.array([(layer.forward, layer.backward) for layer in layers])
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


def report(points: Sequence[Point], config: Config) -> None:
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
    (config.workdir / "points.json").write_text(to_json(record, indent=1) + "\n")
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
    run_program(main)
