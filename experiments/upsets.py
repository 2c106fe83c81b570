"""What a network does after something went wrong in the middle of its training.

See `python experiments/upsets.py --help`.
"""

import dataclasses
import sys
from collections.abc import Callable
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, PyTree
from tyro.conf import arg

from anact_jax import DEFAULT, PUBLISHED, Form
from experiments.cli import BAD_SETTINGS, fail, table_head, table_row
from experiments.comparison import Interval
from experiments.config import TrainConfig, check_positive
from experiments.data import Batch, Dataset, load, training_batches
from experiments.loop import evaluate
from experiments.models import CHAINS, ActivationName, check_name
from experiments.network import make_network
from experiments.steps import Steps, make_steps, steps_per_epoch


@dataclasses.dataclass(frozen=True)
class Config:
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
        if ActivationName.parse(self.activation).form:
            raise ValueError(f"activation must be a plain one, such as relu, got {self.activation!r}")
        for field in ("epochs", "learning_rate", "seeds"):
            check_positive(field, getattr(self, field))
        if self.epochs < 2:
            raise ValueError(f"epochs must be at least 2, one before the upset and one after it, got {self.epochs}")

    def sides(self) -> dict[str, TrainConfig]:
        """The networks that are upset."""
        plain, normalized = self.activation, "n" + self.activation
        return {
            "plain": self._training(plain),
            "plain, BatchNorm": self._training(plain, norm="batch"),
            "published form": self._training(normalized, **_settings_of(PUBLISHED)),
            "default form": self._training(normalized, **_settings_of(DEFAULT)),
        }

    def _training(self, activation: str, norm: str = "none", **form: Any) -> TrainConfig:
        shared: dict[str, Any] = {name: getattr(self, name) for name in ("model", "epochs", "learning_rate")}
        return TrainConfig(activation=activation, norm=norm, **shared, **form)


def _settings_of(form: Form) -> dict[str, Any]:
    options = {name: getattr(form, name) for name in ("rule", "center", "reference", "nonlinearity", "stop_gradient")}
    return options | {"per_feature": form.axes == (-1,)}


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
    config = tyro.cli(Config)
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
    steps: Steps, config: TrainConfig, dataset: Dataset, seeds: int, upset: Upset
) -> tuple[Float[np.ndarray, " seeds"], Float[np.ndarray, " seeds"]]:
    """Test accuracies of the networks right after the upset, and at the end."""
    state = steps.create(jnp.arange(seeds), jnp.full(seeds, config.learning_rate))
    total = config.epochs * steps_per_epoch(config, dataset)
    after = np.zeros(seeds)
    for step, batch in enumerate(training_batches(dataset, config.batch_size, seed=0, epochs=config.epochs)):
        upsetting = step == total // 2
        if upsetting:
            state = state._replace(params=upset.params(state.params))
            batch = batch._replace(images=np.float32(upset.images) * batch.images)
        state, _ = steps.train(state, Batch(*(np.stack([part] * seeds) for part in batch)))
        if upsetting:
            after = evaluate(steps, state, dataset, config.batch_size)["accuracy"]
    return after, evaluate(steps, state, dataset, config.batch_size)["accuracy"]


def in_words(after: Float[np.ndarray, " seeds"], end: Float[np.ndarray, " seeds"]) -> str:
    """Means in percent, that of the end with its interval."""
    return f"{100 * np.mean(after):.1f}, {Interval.of(end)}"


if __name__ == "__main__":
    sys.exit(main())
