"""Variance of signals and gradients by layer in finished runs. See `python experiments/inspect_runs.py --help`."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from experiments.cli import (
    BAD_SETTINGS,
    FAILED,
    check_picture,
    fail,
    printable,
    run_program,
    say,
    settings_of,
    usual_picture,
)

# isort: split

import jax
from tyro.conf import Positional

from anact_jax.diagnostics import LayerVariances, table
from anact_jax.plots import draw
from experiments.config import check_positive
from experiments.data import DataError, first_examples
from experiments.training.checkpoints import CheckpointError, silence_orbax
from experiments.training.load_run import TrainedRun, load_run, variances_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws what runs of train_resnet.py did to variance: of signals and of their gradients, layer by layer.

    At the output of each layer with weights, before training and after it, on test images, in training
    mode. Several runs go into one picture: a plain network and the same one normalized, for instance.
    """

    workdirs: Positional[tuple[Path, ...]]
    """folders of runs of train_resnet.py"""
    images: int = 256
    """test images in the batch on which it is measured; at most all that there are"""
    data_dir: Path | None = None
    """folder of data sets, by default the one that each run was trained from"""
    output: Path | None = None
    """the picture, by default variances.png in the folder of the first run"""


def main() -> int:
    """Runs the program and returns its exit status."""
    silence_orbax()
    config = settings_of(Config)
    try:
        check_positive("images", config.images)
        if not config.workdirs:
            raise ValueError("expected at least one folder of a run of train_resnet.py")
        if config.output is not None:
            check_picture(config.output)
        runs = {name: load_run(workdir, data_dir=config.data_dir) for name, workdir in by_name(config.workdirs).items()}
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    except CheckpointError as error:
        return fail(str(error), FAILED)
    picture = config.output or usual_picture(config.workdirs[0] / "variances.png")
    records = {}
    for name, run in runs.items():
        if len(run.dataset.test) < config.images:
            say(f"{name} has {len(run.dataset.test)} test images, fewer than --images {config.images}; all are taken")
        for when, rows in layer_variances(run, config.images).items():
            records[f"{name}, {when}"] = rows
            print(f"{name}, {when}", table(rows), sep="\n")
    if picture is not None:
        try:
            draw(records).savefig(picture, dpi=120)
        except OSError as error:
            return fail(f"no picture: {error}", FAILED)
        say(f"the picture is {picture}")
    return 0


def by_name(workdirs: Iterable[Path]) -> dict[str, Path]:
    """The folders, each once, by the last parts of their paths: as many as it takes to tell them apart."""
    folders = list(dict.fromkeys(workdir.absolute() for workdir in workdirs))
    names: list[Path] = []
    count = 0
    while len(set(names)) < len(folders):
        count += 1
        names = [Path(*folder.parts[-count:]) for folder in folders]
    return {printable(name): folder for name, folder in zip(names, folders, strict=True)}


def layer_variances(run: TrainedRun, images: int) -> dict[str, tuple[LayerVariances, ...]]:
    """Of a run's network before and after training, on a batch of its test images."""
    batch, labels, _ = first_examples(run.dataset, images)
    measure = variances_of(run.model)
    states = {"at the start": run.initial, "trained": run.trained}
    return {when: jax.device_get(measure(state.variables, batch, labels)) for when, state in states.items()}


if __name__ == "__main__":
    run_program(main)
