"""Trains a residual network: parse, wire, call the loop. See `python experiments/train_resnet.py --help`."""

import argparse
import datetime
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from anact_jax.diagnostics import draw
from experiments.cli import BAD_SETTINGS, FAILED, INTERRUPTED, fail
from experiments.config import TrainConfig
from experiments.data import DataError, evaluation_batches
from experiments.gains import layer_gains
from experiments.loop import DivergenceError, train
from experiments.models import check_name
from experiments.network import check_devices, make_network
from experiments.presets import PRESETS
from experiments.report import MetricsLog, draw_learning_curves
from experiments.steps import make_steps

GAIN_IMAGES = 256  # test images on which the gains in the picture are measured


def main() -> int:
    """Runs the program and returns its exit status."""
    try:
        config = parse(sys.argv[1:])
        config.check()
        dataset = config.load_data()
        check_devices(config.batch_size)
        model = make_network(config, dataset)
        workdir = make_workdir(config)
    except (DataError, ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)

    status, outcome = 0, ""
    try:
        with MetricsLog(workdir) as log:
            state, accuracy = train(make_steps(model, config, dataset), dataset, config, log)
        images = next(evaluation_batches(dataset, GAIN_IMAGES)).images
        picture = draw({"trained": layer_gains(model, state.variables, images)})
        picture.savefig(workdir / "gains.png", dpi=120)
        outcome = f"test_accuracy={accuracy:.4f} workdir={workdir}"
    except DivergenceError as error:
        status = fail(f"{error}; what was measured is in {workdir}", FAILED)
    except KeyboardInterrupt:
        status = fail(f"interrupted; what was measured is in {workdir}", INTERRUPTED)
    draw_learning_curves(workdir)
    if outcome:
        print(outcome)
    return status


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings at the command line; with `--preset NAME` those that are not given are the preset's.

    Raises:
        ValueError: no preset has this name.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--preset", default="digits")
    known, rest = before.parse_known_args(arguments)
    check_name("preset", known.preset, PRESETS)
    listed = "".join(f"\n\n{name}: {preset}" for name, preset in PRESETS.items())
    description = f"{inspect.getdoc(TrainConfig)}\n\n--preset NAME starts from other settings than these:{listed}"
    return tyro.cli(TrainConfig, args=rest, default=PRESETS[known.preset].config, description=description)


def make_workdir(config: TrainConfig) -> Path:
    """Makes the folder for results and writes the settings there.

    Raises:
        ValueError: it holds a run already.
        OSError: it cannot be written.
    """
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    workdir = config.workdir or Path("runs", f"{config.model}-{config.activation}-{now}")
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / "metrics.jsonl").exists():
        raise ValueError(f"{workdir} holds a run already; give another --workdir")
    (workdir / "config.json").write_text(config.to_json())
    return workdir


if __name__ == "__main__":
    sys.exit(main())
