"""Trains a residual network: parse, wire, call the loop. See `python experiments/train_resnet.py --help`."""

import datetime
import functools
import sys
from pathlib import Path

import flax.linen as nn
import jax
import tyro

from experiments.config import TrainConfig
from experiments.data import DATASETS, Dataset
from experiments.gains import layer_gains
from experiments.loop import DivergenceError, train
from experiments.models import make_layers, make_model
from experiments.report import MetricsLog, draw_gains, draw_learning_curves

INTERRUPTED = 130  # as a shell reports SIGINT
GAIN_IMAGES = 256  # test images on which the gains in the picture are measured


def main() -> int:
    """Runs the program and returns its exit status."""
    config = tyro.cli(TrainConfig)
    try:
        config.check()
        dataset = DATASETS[config.dataset]()
        check_batch_size(config.batch_size, dataset)
        model = build_model(config, dataset)
        workdir = make_workdir(config)
    except (ValueError, OSError) as error:
        return fail(str(error), status=2)

    status, outcome = 0, ""
    try:
        with MetricsLog(workdir) as log:
            state, accuracy = train(model, dataset, config, log)
        draw_gains(layer_gains(model, state.variables, dataset.test.images[:GAIN_IMAGES]), workdir)
        outcome = f"test_accuracy={accuracy:.4f} workdir={workdir}"
    except DivergenceError as error:
        status = fail(f"{error}; what was measured is in {workdir}", status=1)
    except KeyboardInterrupt:
        status = fail(f"interrupted; what was measured is in {workdir}", status=INTERRUPTED)
    draw_learning_curves(workdir)
    if outcome:
        print(outcome)
    return status


def build_model(config: TrainConfig, dataset: Dataset) -> nn.Module:
    """The network, tried out on the data set's shapes without computing anything.

    Raises:
        ValueError: a name is unknown, or its layers do not fit together, or not with the images.
    """
    layers = make_layers(
        config.activation,
        config.norm,
        init=config.init,
        norm_momentum=config.norm_momentum,
        group_size=config.group_size,
        rule=config.rule,
        center=config.center,
        reference=config.reference,
        stop_gradient=config.stop_gradient,
        learnable=config.learnable,
        momentum=config.activation_momentum,
    )
    model = make_model(config.model, layers, dataset.classes, config.stem)
    jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), dataset.train.images[:1])
    return model


def check_batch_size(batch_size: int, dataset: Dataset) -> None:
    """Raises ValueError where a batch cannot be filled, or not divided among the devices."""
    examples, devices = len(dataset.train.labels), jax.local_device_count()
    if batch_size > examples:
        raise ValueError(f"batch_size {batch_size} is larger than the training data, {examples} examples")
    if batch_size % devices:
        raise ValueError(f"batch_size {batch_size} must be a multiple of the number of devices, {devices}")


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


def fail(message: str, status: int) -> int:
    """Says in one line what is wrong; returns the exit status."""
    print(f"train_resnet.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
