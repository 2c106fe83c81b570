"""How near the factor from a part of the batch comes to that of the whole.

See `python experiments/benchmarks/part_of_batch.py --help`.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array

from anact_jax import DEFAULT, Form, activation_stats, normalization
from anact_jax.linen import ANAct
from experiments.cli import BAD_SETTINGS, fail, table_head, table_row
from experiments.config import Experiment
from experiments.data import DataError, training_batches
from experiments.networks import on_each
from experiments.networks.build import make_network
from experiments.training.steps import make_steps

PARTS = (2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a network for some steps, then takes the factors of each layer and channel from the first examples only.

    Prints a table in Markdown: how far they are from those of the whole batch, the median and the 95th percentile over
    layers, channels and batches. For comparison, how far the next batch's are from this one's.
    """

    dataset: str = "digits"
    models: tuple[str, ...] = ("mlp10", "resnet20")
    batch_size: int = 128
    steps: int = 50
    """training steps before"""
    batches: int = 5
    """batches that are measured"""


def main() -> int:
    """Runs the program and returns its exit status."""
    settings = tyro.cli(Config, description=Config.__doc__)
    print(table_head("network", "statistics", *(f"from 1/{part}" for part in PARTS), "the next batch's"))
    for model, per_feature in itertools.product(settings.models, (True, False)):
        form = DEFAULT.replace(feature_axes=-1 if per_feature else ())
        config = Experiment(
            dataset=settings.dataset, model=model, norm="none", batch_size=settings.batch_size, form=str(form)
        )
        try:
            config.check()
            factors = list(itertools.islice(_factors(config, settings.steps), settings.batches + 1))
        except (DataError, ValueError) as error:
            return fail(str(error), BAD_SETTINGS)
        of_parts = [[found[part] for found in factors[:-1]] for part in PARTS]
        whole = [found[1] for found in factors]
        cells = (_off(other, whole[:-1]) for other in (*of_parts, whole[1:]))
        print(table_row(model, "a channel" if per_feature else "a layer", *cells), flush=True)
    return 0


def _off(factors: list[np.ndarray], whole: list[np.ndarray]) -> str:
    off = np.abs(np.concatenate(factors) / np.concatenate(whole) - 1)
    return f"{np.median(off):.1%}, {np.quantile(off, 0.95):.1%}"


def _factors(config: Experiment, steps: int) -> Iterator[dict[int, np.ndarray]]:
    """Of one batch after another, all factors of the network, from 1/part of its examples, by part."""
    dataset = config.load_data()
    model = make_network(config, dataset)
    compiled = make_steps(model, config, dataset)
    state = compiled.create(config.seed, config.learning_rate)
    epochs = 1 + steps // (len(dataset.train) // config.batch_size) + 1
    batches = training_batches(dataset, config.batch_size, seed=config.seed, epochs=epochs, workers=0)
    for batch in itertools.islice(batches, steps):
        state, _ = compiled.train(state, batch)

    @jax.jit
    def measure(images: Array) -> dict[int, list[Array]]:
        found: dict[int, list[Array]] = {part: [] for part in (1, *PARTS)}

        def visit(act: ANAct, x: Array) -> None:
            for part, factors in found.items():
                form = Form.parse(act.form)
                stats = activation_stats(act.activation, x[: len(x) // part], feature_axes=form.axes)
                factors.append(jnp.ravel(normalization(stats, form).factor))

        with on_each(ANAct, visit):
            model.apply(state.variables, images, train=True, mutable=["batch_stats"])
        return found

    for batch in batches:
        yield {part: np.concatenate(factors) for part, factors in measure(batch.images).items()}


if __name__ == "__main__":
    sys.exit(main())
