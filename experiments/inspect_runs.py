"""Variance of signals and gradients by layer in finished runs. See `python experiments/inspect_runs.py --help`."""

import dataclasses
from pathlib import Path

from experiments.cli import BAD_SETTINGS, FAILED, fail, run_program, settings_of

# isort: split

import jax
from tyro.conf import Positional

from anact_jax.diagnostics import LayerVariances, table
from anact_jax.plots import draw
from experiments.config import check_positive
from experiments.data import DataError, evaluation_batches
from experiments.training.checkpoints import CheckpointError, silence_orbax
from experiments.training.runs import Run, load_run, variances_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws what runs of train_resnet.py did to variance: of signals and of their gradients, layer by layer.

    At the output of each layer with weights, before training and after it, on test images, in training
    mode. Several runs go into one picture: a plain network and the same one normalized, for instance.
    """

    workdirs: Positional[tuple[Path, ...]]
    """folders of runs of train_resnet.py"""
    images: int = 256
    """test images in the batch on which it is measured"""
    output: Path = Path("variances.png")
    """the picture"""


def main() -> int:
    """Runs the program and returns its exit status."""
    silence_orbax()
    config = settings_of(Config)
    try:
        check_positive("images", config.images)
        if not config.workdirs:
            raise ValueError("expected at least one folder of a run of train_resnet.py")
        config.output.parent.mkdir(parents=True, exist_ok=True)
        runs = {workdir.name: load_run(workdir) for workdir in config.workdirs}
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    except CheckpointError as error:
        return fail(str(error), FAILED)
    records = {}
    for name, run in runs.items():
        for when, rows in layer_variances(run, config.images).items():
            records[f"{name}, {when}"] = rows
            print(f"{name}, {when}", table(rows), sep="\n")
    draw(records).savefig(config.output, dpi=120)
    return 0


def layer_variances(run: Run, images: int) -> dict[str, tuple[LayerVariances, ...]]:
    """Of a run's network before and after training, on a batch of its test images."""
    batch = next(evaluation_batches(run.dataset, images))
    measure = variances_of(run.model)
    states = {"at the start": run.initial, "trained": run.trained}
    return {when: jax.device_get(measure(state.variables, batch)) for when, state in states.items()}


if __name__ == "__main__":
    run_program(main)
