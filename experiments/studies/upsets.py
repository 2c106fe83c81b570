"""What a network does after something went wrong in the middle of its training.

See `python experiments/studies/upsets.py --help`.
"""

import dataclasses
from collections.abc import Callable
from types import MappingProxyType
from typing import Annotated, NamedTuple

from experiments.cli import BAD_SETTINGS, fail, run_program, settings_of, table_head, table_row

# isort: split

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from tyro.conf import arg

from experiments.config import Recipe, Settings, check_positive
from experiments.data import Batch, Dataset, load
from experiments.networks import CHAINS, ActivationName, check_name
from experiments.networks.build import make_network
from experiments.studies.ensemble import training
from experiments.studies.intervals import Interval
from experiments.training.loop import evaluate
from experiments.training.steps import Steps, TrainState, make_steps, steps_per_epoch


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Trains deep plain networks on the digits, upsets them halfway, and shows how they go on.

    Of test accuracies, the mean over seeds right after the step that saw the upset, then at the end of training with
    its 95% interval.
    """

    activation: str = "relu"
    model: Annotated[str, arg(help="one of " + ", ".join(CHAINS))] = "mlp10"
    epochs: int = 20
    """passes over the digits; 20 are 440 steps"""
    learning_rate: float = 0.01
    """peak learning rate of SGD"""
    seeds: int = 5
    """networks to average over"""

    def check(self) -> None:
        """Raises ValueError, in one line, at the first setting that cannot be."""
        check_name("model", self.model, CHAINS)
        if ActivationName.parse(self.activation).normalized:
            raise ValueError(f"activation must be a plain one, such as relu, got {self.activation!r}")
        for field in ("epochs", "learning_rate", "seeds"):
            check_positive(field, getattr(self, field))
        if self.epochs < 2:
            raise ValueError(f"epochs must be at least 2, one before the upset and one after it, got {self.epochs}")

    def sides(self) -> dict[str, Recipe]:
        """The networks that are upset."""
        normalized = "n" + self.activation
        return {
            "plain": Recipe.part_of(self, norm="none"),
            "plain, BatchNorm": Recipe.part_of(self, norm="batch"),
            "published form": Recipe.part_of(self, norm="none", activation=normalized, form="published"),
            "default form": Recipe.part_of(self, norm="none", activation=normalized, form="default"),
        }


class Upset(NamedTuple):
    """Something that goes wrong: with the parameters before a step, and with the images of that step."""

    params: Callable[[PyTree[Array]], PyTree[Array]] = lambda params: params
    images: float = 1.0


def grown(params: PyTree[Array]) -> PyTree[Array]:
    """Hidden weights ten times as large."""
    return _hidden(params, lambda layer: layer | {"kernel": 10 * layer["kernel"]})


def dead(params: PyTree[Array]) -> PyTree[Array]:
    """Every other unit of each hidden layer pushed to where ReLU is 0 for every example."""

    def push(bias: Array) -> Array:
        return bias - jnp.where(jnp.arange(bias.shape[-1]) % 2, 0.0, 100.0)

    return _hidden(params, lambda layer: layer | {"bias": jax.vmap(push)(layer["bias"])})


def _hidden(params: PyTree[Array], change: Callable[[dict[str, Array]], dict[str, Array]]) -> PyTree[Array]:
    dense = [name for name in params if name.startswith("Dense_")]
    return params | {name: change(params[name]) for name in dense if name != f"Dense_{len(dense) - 1}"}


UPSETS = MappingProxyType(
    {
        "none": Upset(),
        "weights times 10": Upset(params=grown),
        "a batch times 100": Upset(images=100.0),
        "half of the units dead": Upset(params=dead),
    }
)


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    try:
        config.check()
    except ValueError as error:
        return fail(str(error), BAD_SETTINGS)
    dataset = load("digits")
    print(table_head(config.activation, *UPSETS))
    for name, side in config.sides().items():
        steps = make_steps(make_network(side, dataset), side, dataset, together=True)
        cells = (in_words(*accuracies(steps, side, dataset, config.seeds, upset)) for upset in UPSETS.values())
        print(table_row(name, *cells), flush=True)
    return 0


def accuracies(
    steps: Steps, recipe: Recipe, dataset: Dataset, seeds: int, upset: Upset
) -> tuple[Float[np.ndarray, " seeds"], Float[np.ndarray, " seeds"]]:
    """Test accuracies of the networks right after the upset, and at the end."""
    at = recipe.epochs * steps_per_epoch(recipe, dataset) // 2

    def change(step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Batch]:
        if step != at:
            return state, batch
        images = np.float32(upset.images) * batch.images
        return state._replace(params=upset.params(state.params)), batch._replace(images=images)

    measured = []
    rates = [recipe.learning_rate] * seeds
    run = training(steps, dataset, recipe, range(seeds), rates, orders=[0] * seeds, change=change)
    for step, (now, _) in enumerate(run):
        state = now
        if step == at:
            measured.append(evaluate(steps, state, dataset, recipe.batch_size)["accuracy"])
    return measured[0], evaluate(steps, state, dataset, recipe.batch_size)["accuracy"]


def in_words(after: Float[np.ndarray, " seeds"], end: Float[np.ndarray, " seeds"]) -> str:
    """Means in percent, that of the end with its interval."""
    return f"{100 * np.mean(after):.1f}, {Interval.of(end)}"


if __name__ == "__main__":
    run_program(main)
