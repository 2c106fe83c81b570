"""How large the output of a normalized activation should be in a network of a given depth.

See `python experiments/studies/depth.py --help`.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from experiments.cli import BAD_SETTINGS, INTERRUPTED, fail, run_program, settings_of

# isort: split

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tyro.conf import arg

from anact_jax import Activation, Standardized, tempered
from anact_jax.gaussian import gaussian_stats
from anact_jax.linen import ANAct
from experiments.config import Recipe, Storage, changed
from experiments.data import DataError, Dataset
from experiments.data.sets import mnist1d, with_subset
from experiments.networks import Layers, make_layers, make_model
from experiments.studies.results import Cell, Results, Splits, load_splits, rounded, run_pending
from experiments.studies.vmapped_training import for_ensemble
from experiments.training.steps import Steps, TrainState, make_steps

ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "softsign": jax.nn.soft_sign,
    "log_sigmoid": jax.nn.log_sigmoid,
}
KNOWN = ("relu", "swish", "tanh", "gelu", "elu")
"""Activations of the choice; the others are new to the held-out part."""
CHAINS = {"mlp3": 3, "mlp12": 12, "mlp48": 48, "mlp100": 100, "cnn12": 12}
BLOCKS = {"resmlp4": 4, "resmlp16": 16, "resmlp48": 48}
FACTORS = (0.5, 1 / math.sqrt(2), 1.0, math.sqrt(2), 2.0)
"""Multiples of the predicted deviation that are tried."""
RATES = (0.01, 0.03, 0.1)
FIRST_BUDGET = 0.5
"""For the choice, before a budget is known."""
SEEDS = {"choice": (20, 21), "held-out": (30, 31, 32)}
SIGNALS = {"choice": 1001}
"""Seeds of MNIST-1D's generator; that of the held-out part is drawn when the budget is fixed."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains networks of many depths with normalized activations of several output deviations.

    The deviations are those at which the sum over the layers of `nu` equals a budget, and multiples of them. What is
    finished is kept in the workdir: the same command goes on.
    """

    part: Annotated[str, arg(help=f"one of {', '.join(SIGNALS)}")] = "choice"
    budget: float = FIRST_BUDGET
    """sum of nu over the layers, at which the middle one of the deviations stands"""
    workdir: Path = Path("experiments/results/depth")
    """folder for the results"""
    storage: Storage = Storage()


class Place(NamedTuple):
    """A network with an activation on a data set: the place of one curve, accuracy over deviation."""

    dataset: str
    model: str
    activation: str


def nu(f: Activation, std: float | Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """`E[f'^2] Var[x] / Var[f] - 1` for x ~ N(0, std^2)."""
    stats = gaussian_stats(f, 0.0, jnp.asarray(std, jnp.float32))
    return np.asarray(jnp.maximum(stats.slope_sq * std**2 / stats.var_out - 1, 0))


def spent(f: Activation, model: str, std: float | Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """The sum of nu over the activations of a network whose normalized activations have this output deviation.

    In a chain each layer sees the scale std. In `x + f(Wx)` block k sees `std sqrt(1 + k)`, and adds `1 / (1 + k)` of
    the variance.
    """
    if model in CHAINS:
        return np.asarray(CHAINS[model] * nu(f, std))
    variances = 1 + np.arange(BLOCKS[model])
    shares = nu(f, np.multiply.outer(std, np.sqrt(variances))) / variances
    return np.asarray(shares.sum(axis=-1))


def has_scale(f: Activation) -> bool:
    """Whether nu falls with the scale of the input, so that a smaller deviation can lower it."""
    return bool(nu(f, 0.05) < 0.5 * nu(f, 1.0))


def predicted(f: Activation, model: str, budget: float) -> float:
    """The largest deviation in [0.05, 2] up to which no more than the budget is spent."""
    grid = np.geomspace(0.05, 2.0, 200)
    exceeds = np.append(spent(f, model, grid) > budget, True)
    return float(grid[max(0, int(np.argmax(exceeds)) - 1)])


def limit(model: str, budget: float) -> float:
    """The nonlinearity, the same at every scale, with which a network spends the budget."""
    weight = CHAINS.get(model) or sum(1 / (1 + k) for k in range(BLOCKS[model]))
    return budget / weight


def forms(place: Place, budget: float) -> list[Standardized]:
    """Of the curve: the prediction times `FACTORS`, and the constant 0.5.

    Of functions without a scale, the limit of the tempering is multiplied instead, by the squares of the factors.
    """
    f = ACTIVATIONS[place.activation]
    if not has_scale(f):
        middle = limit(place.model, budget)
        return [*(Standardized(tempering=rounded(middle * factor**2)) for factor in FACTORS), Standardized()]
    middle = predicted(f, place.model, budget)
    return [*(Standardized(std=rounded(middle * factor)) for factor in FACTORS), Standardized()]


def places(part: str) -> list[Place]:
    """The curves of a part: in each network three activations, in turn."""
    names = KNOWN if part == "choice" else tuple(ACTIVATIONS)
    found = []
    for number, model in enumerate(["mlp3", "resmlp4", "mlp12", "resmlp16", "cnn12", "mlp48", "resmlp48"]):
        for dataset in ("fashion_mnist", *(["mnist1d"] if model != "cnn12" else [])):
            start = number + 2 * (dataset == "mnist1d") + 3 * (part != "choice")
            found += [Place(dataset, model, names[(start + step) % len(names)]) for step in (0, 1, 3)]
    return found


def recipe_of(place: Place, part: str) -> Recipe:
    """The recipe of a curve, as in the study of the default form."""
    signals = place.dataset == "mnist1d"
    return changed(
        Recipe(),
        dataset=place.dataset,
        model=place.model,
        activation="nswish",  # stands for the activation, which `variation` names
        norm="none",
        train_images=4000,
        validation_images=1000,
        half=None if signals else {"choice": 1, "held-out": 2}[part],
        pool=1 if signals else 2,
        augment=False,
        epochs=12 if signals else 4,
        learning_rate=1.0,
    )


def cells_of(
    place: Place, part: str, forms: Sequence[Standardized], rates: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """A cell for each form, learning rate and seed, in this order."""
    recipe = recipe_of(place, part)
    variation = place.activation + (f", signals of seed {SIGNALS[part]}" if place.dataset == "mnist1d" else "")
    return [
        Cell(
            changed(recipe, std=form.std, tempering=form.tempering, learning_rate=rate, seed=seed),
            on_test=True,
            variation=variation,
        )
        for form, rate, seed in itertools.product(forms, rates, seeds)
    ]


class OfAnyForm(nn.Module):
    """A normalized activation whose deviation and leak are numbers in its state, so that runs compiled as one differ.

    Attributes:
        f: the activation.
        leaks: whether it has a leak, `f(x) + kappa x`.
        inference: whether running statistics are used.
    """

    f: Activation
    leaks: bool
    inference: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """`std` times the activation, normalized to deviation 1."""
        std = self.variable("batch_stats", "std", jnp.ones, ()).value
        fn = self.f
        if self.leaks:
            kappa = self.variable("batch_stats", "kappa", jnp.zeros, ()).value

            def fn(x: Array) -> Array:
                return self.f(x) + kappa * x

        return std * ANAct(fn, std=1.0, use_running_average=self.inference)(x)


def network_of(place: Place, dataset: Dataset) -> nn.Module:
    """The network with the activation in the state of which deviation and leak stand."""
    f = ACTIVATIONS[place.activation]
    layers: Layers = for_ensemble(make_layers("swish", "none"))
    leaks = not has_scale(f)
    return make_model(
        place.model, layers._replace(act=lambda inference: OfAnyForm(f, leaks, inference)), dataset.classes
    )


def with_forms(steps: Steps, f: Activation, forms: Sequence[Standardized]) -> Steps:
    """The same steps, whose runs begin with these forms in their state."""
    numbers = {
        "std": jnp.array([form.std for form in forms], jnp.float32),
        "kappa": jnp.array([_kappa(f, form.tempering) for form in forms], jnp.float32),
    }

    def create(seeds: Any, rates: Any) -> TrainState:
        state = steps.create(seeds, rates)

        def number(path: Any, leaf: Array) -> Array:
            return jnp.copy(numbers[path[-1].key]) if path[-1].key in numbers else leaf  # each step consumes its own

        return state._replace(batch_stats=jax.tree.map_with_path(number, state.batch_stats))

    return steps._replace(create=create)


def _kappa(f: Activation, tempering: float | None) -> float:
    if tempering is None:
        return 0.0
    return float(tempered(f, tempering)(jnp.float32(1.0)) - f(jnp.float32(1.0)))


def splits_of(place: Place, part: str, storage: Storage) -> Splits:
    """The data of a curve: rates are chosen on the validation split, all else is read on the test split."""
    recipe = recipe_of(place, part)
    if place.dataset == "mnist1d":
        whole = mnist1d(SIGNALS[part])
        chosen_on = with_subset(whole, train=recipe.data.train_images, validation=recipe.data.validation_images)
        return Splits(chosen_on, dataclasses.replace(chosen_on, test=whole.test))
    return load_splits(recipe.data, storage)


def run_curve(place: Place, part: str, budget: float, results: Results, storage: Storage) -> str:
    """Runs what is not finished of a curve: all rates with the first seed, the best one with the others."""
    tried = forms(place, budget)
    first, *others = SEEDS[part]
    start = time.perf_counter()
    f = ACTIVATIONS[place.activation]

    def compiled(cells: list[Cell]) -> tuple[Splits, Steps]:
        data = splits_of(place, part, storage)
        model = network_of(place, data.chosen_on)
        chosen = [form for cell in cells if isinstance(form := cell.recipe.network.form.chosen, Standardized)]
        steps = make_steps(model, cells[0].recipe.training, data.chosen_on, together=True)
        return data, with_forms(steps, f, chosen)

    run_pending(cells_of(place, part, tried, RATES, [first]), results, compiled)
    rest = []
    for form in tried:
        rate = best_rate(place, part, form, results)
        rest += cells_of(place, part, [form], [rate], others)
    run_pending(rest, results, compiled)
    means = [
        np.mean([results.get(cell)["test_accuracy"] for cell in cells_of(place, part, [form], [rate], SEEDS[part])])  # type: ignore[index]
        for form in tried
        for rate in [best_rate(place, part, form, results)]
    ]
    return " ".join(f"{100 * mean:.1f}" for mean in means) + f" ({time.perf_counter() - start:.0f} s)"


def best_rate(place: Place, part: str, form: Standardized, results: Results) -> float:
    """The learning rate with the highest validation accuracy of the first seed."""

    def accuracy(rate: float) -> float:
        (cell,) = cells_of(place, part, [form], [rate], SEEDS[part][:1])
        outcome = results.get(cell)
        assert outcome is not None
        return float(outcome["validation_accuracy"])

    return max(RATES, key=accuracy)


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    try:
        config.storage.check()
        if config.part not in SIGNALS:
            raise ValueError(f"part must be one of {', '.join(SIGNALS)}, got {config.part!r}")
        results = Results(config.workdir / "results.jsonl")
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    todo = places(config.part)
    try:
        for number, place in enumerate(todo, start=1):
            print(f"{number}/{len(todo)} {' '.join(place)}:", end=" ", flush=True)
            print(run_curve(place, config.part, config.budget, results, config.storage), flush=True)
    except KeyboardInterrupt:
        return fail("interrupted; what is finished is kept, the same command goes on", INTERRUPTED)
    return 0


if __name__ == "__main__":
    run_program(main)
