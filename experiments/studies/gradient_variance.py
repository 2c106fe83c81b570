"""Variance of signals and gradients by layer and by step, plain and normalized, beside what theory predicts.

See `python experiments/studies/gradient_variance.py --help`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from experiments.cli import BAD_SETTINGS, FAILED, check_picture, fail, run_program, settings_of

# isort: split

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from anact_jax import ACTIVATIONS, Activation, FactorAndShift, Stats, diagnostics
from anact_jax.diagnostics import LayerPass
from anact_jax.theory import Layer, Variances, linear, plain, propagate
from experiments.config import Data, Recipe, Training, check_at_least, check_positive
from experiments.data import Batch, Dataset, load
from experiments.data.pipeline import standardize
from experiments.forms import form_named
from experiments.networks import ActivationName, make_layers
from experiments.networks.mlp import MLP
from experiments.studies.vmapped_training import training
from experiments.training.loop import DivergenceError
from experiments.training.steps import make_steps

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLES = {
    "signal": "variance of the signal $z_l$",
    "gradient": "variance of its gradient $\\delta_l$",
    "weight_gradient": "variance of the weight gradient",
}
ByLayer: TypeAlias = dict[str, Float[np.ndarray, " depth"]]  # a key for each of TITLES
Result: TypeAlias = dict[int, dict[str, ByLayer]]  # step -> "measured" and "predicted"


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains plain MLPs on the digits and measures what each hidden layer does to variance, on one batch.

    Normalized activations have one factor a layer here, since that is what theory predicts.

    Points in the picture were measured; dashes are what theory predicts from the mean squares of
    the weights, of the input, and of the loss gradient at the logits.
    """

    activations: tuple[str, ...] = ("relu", "swish", "nrelu", "nswish")
    """names of activations; with n before it, as in nswish, normalized"""
    form: str = "published"
    """of the normalized ones: published, or a label in experiments/forms.py with one factor a layer, a constant"""
    depth: int = 30
    """hidden layers"""
    width: int = 64
    """units in each"""
    steps: tuple[int, ...] = (0, 300)
    """training steps after which to measure"""
    learning_rate: float = 0.003
    """of SGD without momentum, at the start; it falls to 0 along a cosine"""
    batch_size: int = 256
    """examples in a batch"""
    seeds: int = 5
    """networks to average over (geometric mean)"""
    output: Path = Path("gradient_variance.png")
    """the picture; the numbers go beside it, as JSON"""

    def recipe(self, dataset: Dataset) -> Recipe:
        """How the networks are trained, for at least the steps asked for."""
        per_epoch = len(dataset.train) // self.batch_size
        epochs = max(1, -(-max(self.steps) // per_epoch))
        training = Training(epochs, self.batch_size, warmup_epochs=0.0, momentum=0.0, weight_decay=0.0)
        return Recipe(Data(augment=False), training=training)

    def check(self, dataset: Dataset) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        for field in ("activations", "steps"):
            if not getattr(self, field):
                raise ValueError(f"{field} needs at least one value")
        for name in self.activations:
            ActivationName.parse(name)
        form = form_named(self.form)
        if form.axis is not None or not form.stop_gradient or form.learned:
            raise ValueError(
                "theory predicts forms with one factor a layer that is a constant under differentiation, such as "
                f"published or mean+center, got {form}"
            )
        if not 1 <= self.batch_size <= len(dataset.train):
            raise ValueError(f"batch_size must lie between 1 and {len(dataset.train)}, got {self.batch_size}")
        for field in ("depth", "width", "seeds", "learning_rate"):
            check_positive(field, getattr(self, field))
        check_at_least(0, "steps", min(self.steps))


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    dataset = load("digits")
    try:
        config.check(dataset)
        check_picture(config.output)
    except (ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)

    results = {}
    for name in config.activations:
        try:
            results[name] = study(name, config, dataset)
        except DivergenceError as error:
            return fail(str(error), FAILED)
        print_table(name, results[name])
    draw(results, config.output)
    numbers = dataclasses.asdict(config) | {"output": config.output.name, "variances": results}
    config.output.with_suffix(".json").write_text(json.dumps(numbers, default=four_digits) + "\n")
    return 0


def study(name: str, config: Config, dataset: Dataset) -> Result:
    """Trains a network for each seed, all on the same batches, and measures them after each of the steps.

    Raises:
        DivergenceError: a measured number is not finite.
    """
    form = form_named(config.form)
    normalize = plain if name in ACTIVATIONS else form.factor_and_shift
    f = ACTIVATIONS.get(name) or ACTIVATIONS[name.removeprefix("n")]
    # Differentiated statistics would carry one example's loss to all others.
    layers = make_layers(name, "none", form=form)
    model = MLP(layers, dataset.classes, config.depth, config.width)
    seeds, rates = list(range(config.seeds)), [config.learning_rate] * config.seeds
    recipe, last = config.recipe(dataset), max(config.steps)
    compiled = make_steps(model, recipe.training, dataset, together=True)
    trained = training(compiled, dataset, recipe, seeds, rates, orders=[0] * config.seeds)

    images, labels = dataset.train.fetch(np.arange(config.batch_size))
    batch = Batch(standardize(images, dataset), labels, np.ones(len(labels), bool))
    measure_all = jax.jit(jax.vmap(functools.partial(measure, model), (None, 0)))
    predict_all = jax.vmap(functools.partial(predict, f, normalize, jnp.mean(batch.images**2, axis=(1, 2, 3))))

    result = {}
    state = compiled.create(jnp.array(seeds), jnp.array(rates))
    for step in range(last + 1):
        if step in config.steps:
            measured = measure_all(batch, state.variables)
            if not all(np.isfinite(values).all() for values in measured):
                raise DivergenceError(f"{name} diverged within {step} steps; lower --learning-rate")
            predicted = predict_all(state.params, measured.gradient[:, -1])
            result[step] = {"measured": over_networks(measured), "predicted": over_networks(predicted)}
        if step < last:
            state, _ = next(trained)
    return result


def measure(model: nn.Module, batch: Batch, variables: PyTree[Array]) -> Variances:
    """Variances at every dense layer in training mode, by example; the logits' come last.

    An example's weight gradient is the outer product of what enters the layer and of delta, so that
    the mean square of its elements is the product of their mean squares.
    """
    passed = pass_through(model, batch, variables)

    def squares(field: str) -> Float[Array, "layers examples"]:
        return jnp.stack([jnp.mean(getattr(layer, field) ** 2, axis=-1) for layer in passed])

    gradient = squares("gradient")
    return Variances(squares("signal"), gradient, squares("entering") * gradient)


def pass_through(model: nn.Module, batch: Batch, variables: PyTree[Array]) -> tuple[LayerPass, ...]:
    """What passes through the dense layers in training mode, forward and backward from the sum of the losses."""

    def total_loss(variables: PyTree[Array]) -> Array:
        logits, _ = model.apply(variables, jnp.asarray(batch.images), train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.sum(losses)

    return diagnostics.pass_through(total_loss)(variables)


def predict(
    f: Activation,
    normalize: Callable[[Stats], FactorAndShift],
    input_sq: Float[Array, " examples"],
    params: PyTree[Array],
    gradient_sq: Float[Array, " examples"],
) -> Variances:
    """The same, from the mean squares of the weights, of the input, and of the loss gradient at the logits."""
    layers = []
    for layer in dense_layers(params):
        kernel, bias = layer["kernel"], layer["bias"]
        layers.append(Layer(f, kernel.shape[0], kernel.shape[1], jnp.mean(kernel**2), normalize, jnp.mean(bias**2)))
    layers[-1] = layers[-1]._replace(f=linear, normalization=plain)
    return propagate(layers, input_sq=input_sq, gradient_sq=gradient_sq)


def dense_layers(params: PyTree[Array]) -> list[dict[str, Array]]:
    """Kernel and bias of each layer of an MLP, from input to logits."""
    return [params[f"Dense_{index}"] for index in range(len(params))]


def over_networks(variances: Variances) -> ByLayer:
    """Networks' variances by layer and example -> of the hidden layers: mean over examples, geometric over networks."""
    with np.errstate(divide="ignore"):  # where a network's is 0, so is the mean
        means = (np.exp(np.log(np.mean(values, axis=-1)[:, :-1]).mean(0)) for values in variances)
        return dict(zip(Variances._fields, means, strict=True))


def print_table(name: str, result: Result) -> None:
    """Measured and predicted at the first and at the last hidden layer."""
    print(f"{name:<30} {'first layer':>11} {'predicted':>11} {'last layer':>11} {'predicted':>11}")
    for step, found in result.items():
        for field in TITLES:
            ends = (found[kind][field][layer] for layer in (0, -1) for kind in ("measured", "predicted"))
            print(f"  step {step:<6} {field:<16}", *(f"{value:11.1e}" for value in ends))


def four_digits(values: Float[np.ndarray, " n"]) -> list[float]:
    """As JSON takes them."""
    return [float(f"{value:.4g}") for value in values]


def draw(results: dict[str, Result], output: Path) -> None:
    """A row of panels for each step, a column for each quantity; points were measured, dashes predicted."""
    steps = list(next(iter(results.values())))
    size = (3.4 * len(TITLES), 0.8 + 2.5 * len(steps))
    figure, panels = plt.subplots(
        len(steps), len(TITLES), figsize=size, sharex=True, sharey="col", squeeze=False, layout="constrained"
    )
    for row, step in zip(panels, steps, strict=True):
        for panel, field in zip(row, TITLES, strict=True):
            for index, (name, result) in enumerate(results.items()):
                measured, predicted = (result[step][kind][field] for kind in ("measured", "predicted"))
                layers = range(1, len(measured) + 1)
                panel.plot(layers, measured, ".", color=f"C{index}", markersize=4, label=name)
                panel.plot(layers, predicted, "--", color=f"C{index}", linewidth=1)
            panel.set(yscale="log")
            panel.grid(alpha=0.3)
        row[0].set_ylabel("at initialization" if step == 0 else f"after {step} steps")
    for panel, title in zip(panels[0], TITLES.values(), strict=True):
        panel.set_title(title, fontsize="medium")
    for panel in panels[-1]:
        panel.set_xlabel("layer $l$")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    title = "points: measured, dashes: theory"
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=len(labels), markerscale=2)
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_program(main)
