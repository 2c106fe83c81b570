"""What each part of the default form does in a deep chain: to examples, to gradients, to weights.

See `python experiments/studies/ingredients.py --help`.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any

from experiments.cli import BAD_SETTINGS, check_picture, fail, run_program, settings_of

# isort: split

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float, PyTree
from tyro.conf import arg

from anact_jax import Form
from experiments.config import Recipe, Settings, check_positive
from experiments.data import Batch, Dataset, load
from experiments.data.pipeline import standardize
from experiments.networks import CHAINS, ActivationName, check_name
from experiments.networks.build import make_network
from experiments.studies.ensemble import training
from experiments.studies.gradient_variance import dense_layers, four_digits, pass_through
from experiments.training.steps import make_steps, steps_per_epoch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLES = {
    "similarity": "correlation of two examples' signals",
    "gradient": "gradient $E[\\delta_l^2]$ over that of the last layer",
    "weights": "mean square of hidden weights over initial",
    "loss": "training loss",
}
_POINTS = 50  # on a curve over training


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Measures deep plain networks at initialization and while they train on the digits, form by form."""

    activation: str = "swish"
    forms: Annotated[tuple[str, ...], arg(help="plain, published, default, or options as in mean+center+unit")] = (
        "plain",
        "mean",
        "forward+center",
        "forward+center+unit",
        "forward+center+unit+diff",
        "forward+center+unit+diff+feature",
        "forward+center+unit+feature+level0.5",
        "forward+center+unit+diff+feature+level0.5",
        "forward+center+unit+diff+feature+nu0.1+level0.5",
    )
    model: Annotated[str, arg(help="one of " + ", ".join(CHAINS))] = "mlp30"
    epochs: int = 45
    """passes over the digits; 45 are 990 steps"""
    learning_rate: float = 0.01
    """peak learning rate of SGD"""
    batch_size: int = 64
    """examples in a step"""
    seeds: int = 5
    """networks to average over"""
    output: Path = Path("ingredients.png")
    """the picture; the numbers go beside it, as JSON"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        check_name("model", self.model, CHAINS)
        ActivationName.parse(self.activation)
        for form in self.forms:
            if form != "plain":
                Form.parse(form)
        for field in ("epochs", "learning_rate", "batch_size", "seeds"):
            check_positive(field, getattr(self, field))

    def recipe(self, form: str) -> Recipe:
        """The settings of one form's networks."""
        if form == "plain":
            return Recipe.part_of(self, norm="none")
        return Recipe.part_of(self, norm="none", activation="n" + self.activation, form=form)


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    dataset = load("digits")
    try:
        config.check()
        networks = {form: make_network(config.recipe(form), dataset) for form in config.forms}
        check_picture(config.output)
    except (ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    results = {}
    for form, model in networks.items():
        results[form] = study(model, config.recipe(form), dataset, config.seeds)
        ends = {name: (values[0], values[-1]) for name, values in results[form].items()}
        print(f"{form:<40}", *(f"{name} {first:.2g} to {last:.2g}" for name, (first, last) in ends.items()), sep="  ")
    draw(results, config.output)
    numbers = dataclasses.asdict(config) | {"output": config.output.name, "results": results}
    config.output.with_suffix(".json").write_text(json.dumps(numbers, default=four_digits) + "\n")
    return 0


def study(model: Any, recipe: Recipe, dataset: Dataset, seeds: int) -> dict[str, Float[np.ndarray, " points"]]:
    """Each of TITLES: the first two by hidden layer at initialization, the others by time; means over networks."""
    steps = make_steps(model, recipe, dataset, together=True)
    rates = [recipe.learning_rate] * seeds
    states = steps.create(jnp.arange(seeds), jnp.array(rates))
    images, labels = dataset.train.fetch(np.arange(256))
    batch = Batch(standardize(images, dataset), labels, np.ones(len(labels), bool))
    at_start = jax.jit(jax.vmap(functools.partial(similarity_and_gradient, model, batch)))(states.variables)
    similarity, gradient = (np.asarray(values) for values in at_start)

    initial = weight_squares(states.params)
    total = recipe.epochs * steps_per_epoch(recipe, dataset)
    every = max(1, total // _POINTS)
    weights, losses, recent = [np.ones(seeds)], [], []
    run = training(steps, dataset, recipe, range(seeds), rates, orders=[0] * seeds)
    for step, (states, metrics) in enumerate(run, start=1):
        recent.append(metrics["loss"])
        if step % every == 0:
            losses.append(np.mean(jax.device_get(recent), axis=0))
            recent = []
            weights.append(np.asarray(weight_squares(states.params) / initial))
    with np.errstate(divide="ignore", invalid="ignore"):  # signals or gradients that are 0, runs that diverged
        level = np.exp(np.log(gradient / gradient[:, -1:]).mean(0))
        return {
            "similarity": np.mean(similarity, axis=0),
            "gradient": level,
            "weights": np.mean(weights, axis=1),
            "loss": np.mean(losses, axis=1),
        }


def similarity_and_gradient(
    model: Any, batch: Batch, variables: PyTree[Array]
) -> tuple[Float[Array, " depth"], Float[Array, " depth"]]:
    """Of each hidden layer: mean cosine between the signals of two examples, and mean square of the gradients."""
    passed = pass_through(model, batch, variables)

    def cosine(signal: Array) -> Array:
        unit = signal / jnp.maximum(jnp.linalg.norm(signal, axis=-1, keepdims=True), 1e-30)
        count = len(signal)
        return (jnp.sum(jnp.sum(unit, axis=0) ** 2) / count - 1) / (count - 1)

    return (
        jnp.stack([cosine(layer.signal) for layer in passed[:-1]]),
        jnp.stack([jnp.mean(layer.gradient**2) for layer in passed[:-1]]),
    )


def weight_squares(params: PyTree[Array]) -> Float[Array, " seeds"]:
    """Mean square of the weights between hidden layers, of each network."""
    kernels = [layer["kernel"] for layer in dense_layers(params)[1:-1]]
    return jnp.mean(jnp.stack([jnp.mean(kernel**2, axis=(1, 2)) for kernel in kernels]), axis=0)


def draw(results: dict[str, dict[str, Float[np.ndarray, " points"]]], output: Path) -> None:
    """A panel for each quantity, a line for each form."""
    figure, panels = plt.subplots(1, len(TITLES), figsize=(4 * len(TITLES), 4.2), layout="constrained")
    for panel, (name, title) in zip(panels, TITLES.items(), strict=True):
        for index, (form, result) in enumerate(results.items()):
            values = result[name]
            over = (
                np.arange(1, len(values) + 1) if name in ("similarity", "gradient") else np.linspace(0, 1, len(values))
            )
            panel.plot(over, values, color=f"C{index}", label=form)
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("layer $l$" if name in ("similarity", "gradient") else "time, as a part of training")
        panel.grid(alpha=0.3)
        if name == "gradient":
            panel.set_yscale("log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(output, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    run_program(main)
