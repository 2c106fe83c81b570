"""Factors that follow from BatchNorm's own parameters against those measured on a batch, by layer and epoch.

See `python experiments/studies/closed_factor.py --help`.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from experiments.cli import BAD_SETTINGS, check_picture, fail, run_program, settings_of, table_head, table_row

# isort: split

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float, PyTree

from anact_jax import Form, activation_stats, closed_normalization, normalization
from anact_jax.closed import behind_batch_norm
from anact_jax.linen import BatchNormAct
from experiments.config import Recipe, Storage
from experiments.data import DataError, Dataset
from experiments.data.pipeline import standardize
from experiments.networks import on_each
from experiments.networks.build import check_devices, layers_of, make_network
from experiments.studies.ensemble import for_ensemble, training
from experiments.studies.gradient_variance import four_digits
from experiments.training.loop import evaluate
from experiments.training.steps import make_steps, steps_per_epoch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FORMS = ("mean+center+feature", "forward+center+feature", "mean+center", "forward+center")
_IMAGES = 512  # on which is measured
_ALIVE = 1e-3  # variance of f over that of x, from which on a channel's factor is compared


@dataclasses.dataclass(frozen=True)
class Config(Storage, Recipe):
    """Trains a network with BatchNormAct, and compares its factors with measured ones before and after each epoch.

    *Off*: |closed / measured - 1| of the factor, in the median over a layer's channels and in the worst of them; where
    all channels share a factor both are one number. *Kurtosis*: of BatchNorm's output, 3 for a normal distribution.
    """

    norm: str = "batch"
    form: str = "mean+center+feature"
    """of the layers while they train"""
    output: Path = Path("closed_factor.png")
    """the picture; the numbers go beside it, as JSON"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        super().check()
        if not self.is_closed:
            raise ValueError(
                "only norm batch, behind closed and a normalized activation have factors in closed form, got "
                f"{self.norm}, {self.behind} and {self.activation}"
            )


class Off(NamedTuple):
    """Of each layer, how far the closed factor is from the measured one, and what its input is like."""

    median: Float[Array, " layers"]
    worst: Float[Array, " layers"]
    kurtosis: Float[Array, " layers"]


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    try:
        config.check()
        check_devices(config.batch_size)
        dataset = config.load(config)
        config.check_batch(dataset)
        recipe = Recipe.part_of(config)
        model = make_network(recipe, dataset, for_ensemble(layers_of(recipe)))
        check_picture(config.output)
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    found = study(model, recipe, dataset)
    print(by_epoch_table(found), by_layer_table(found), sep="\n\n")
    draw(found, config.output)
    numbers = {form: [off._asdict() for off in by_epoch] for form, by_epoch in found.items()}
    settings = recipe.recipe | {"seed": recipe.seed}
    config.output.with_suffix(".json").write_text(
        json.dumps({"settings": settings, "off": numbers}, default=four_digits) + "\n"
    )
    return 0


def study(model: nn.Module, recipe: Recipe, dataset: Dataset) -> dict[str, list[Off]]:
    """Of each of FORMS, before training and after each epoch."""
    steps = make_steps(model, recipe, dataset, together=True)
    images = jnp.asarray(standardize(dataset.train.fetch(np.arange(min(_IMAGES, len(dataset.train))))[0], dataset))
    measure = jax.jit(functools.partial(factors_off, model, images))
    rates, seeds = [recipe.learning_rate], [recipe.seed]

    def first(variables: PyTree[Array]) -> dict[str, Off]:
        return jax.device_get(measure(jax.tree.map(lambda value: value[0], variables)))  # type: ignore[no-any-return]

    state = steps.create(jnp.array(seeds), jnp.array(rates))
    by_epoch = [first(state.variables)]
    each = steps_per_epoch(recipe, dataset)
    for step, (now, _) in enumerate(training(steps, dataset, recipe, seeds, rates), start=1):
        state = now
        if step % each == 0:
            by_epoch.append(first(state.variables))
    accuracy = evaluate(steps, state, dataset, recipe.batch_size)["accuracy"]
    print(f"test accuracy {float(np.squeeze(accuracy)):.4f}")
    return {form: [found[form] for found in by_epoch] for form in FORMS}


def factors_off(model: nn.Module, images: Float[Array, "n ..."], variables: PyTree[Array]) -> dict[str, Off]:
    """Of each of FORMS, on the batch that is given."""
    found: dict[str, list[tuple[Array, Array, Array]]] = {form: [] for form in FORMS}

    def visit(layer: BatchNormAct, x: Array) -> None:
        parameters: Any = layer.variables["params"]
        scale, bias = parameters["scale"], parameters["bias"]
        reduced = tuple(range(x.ndim - 1))
        variance = jnp.var(x, reduced)
        normal = (x - jnp.mean(x, reduced, keepdims=True)) * jax.lax.rsqrt(
            jnp.expand_dims(variance, reduced) + layer.epsilon
        )
        output = jnp.expand_dims(scale, reduced) * normal + jnp.expand_dims(bias, reduced)
        kurtosis = jnp.mean(normal**4, reduced) / jnp.mean(normal**2, reduced) ** 2
        mean, std = behind_batch_norm(scale, bias, variance, layer.epsilon)
        for form in FORMS:
            per_channel = Form.parse(form).axes
            stats = activation_stats(layer.fn, output, feature_axes=per_channel)
            ratio = closed_normalization(layer.fn, mean, std, form).factor / normalization(stats, form).factor
            off = jnp.where(stats.var_out > _ALIVE * stats.var_in, jnp.abs(ratio - 1), 0)
            found[form].append((jnp.median(off), jnp.max(off), jnp.median(kurtosis)))

    with on_each(BatchNormAct, visit):
        model.apply(variables, images, train=True, mutable=["batch_stats"])
    return {form: Off(*map(jnp.stack, zip(*rows, strict=True))) for form, rows in found.items()}


def by_epoch_table(found: dict[str, list[Off]]) -> str:
    """Percent off, in the mean over layers and in the worst layer, before training and after each epoch."""
    rows = [
        table_row(str(epoch), *(f"{100 * np.mean(off.median):.1f}, {100 * np.max(off.median):.1f}" for off in at))
        for epoch, at in enumerate(zip(*found.values(), strict=True))
    ]
    return "\n".join([table_head("epoch", *found), *rows])


def by_layer_table(found: dict[str, list[Off]]) -> str:
    """After the last epoch: percent off, and in brackets the worst channel; below it the kurtosis."""
    last = {form: by_epoch[-1] for form, by_epoch in found.items()}
    rows = [
        table_row(form, *(f"{100 * m:.1f} ({100 * w:.0f})" for m, w in zip(off.median, off.worst, strict=True)))
        for form, off in last.items()
    ]
    kurtosis = next(iter(last.values())).kurtosis
    head = table_head("layer", *map(str, range(1, len(kurtosis) + 1)))
    return "\n".join([head, *rows, table_row("kurtosis", *(f"{value:.1f}" for value in kurtosis))])


def draw(found: dict[str, list[Off]], output: Path) -> None:
    """A panel for each form, a line for each epoch."""
    figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6), layout="constrained", sharey=True)
    for panel, (form, by_epoch) in zip(panels, found.items(), strict=True):
        for epoch, off in enumerate(by_epoch):
            color = plt.get_cmap("viridis")(epoch / len(by_epoch))
            panel.plot(np.arange(1, len(off.median) + 1), 100 * off.median, color=color, marker=".", label=f"{epoch}")
        panel.set_title(form, fontsize="medium")
        panel.set_xlabel("layer")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("percent that the closed factor is off")
    panels[0].legend(title="epoch", fontsize="small", ncols=2)
    figure.savefig(output, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    run_program(main)
