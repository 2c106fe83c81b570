"""Trains a residual network: parse, wire, call the loop. See `python experiments/train_resnet.py --help`."""

import argparse
import contextlib
import datetime
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli import BAD_SETTINGS, FAILED, INTERRUPTED, PREEMPTED, fail, run_program, say, settings_of, with_home

# isort: split

import flax.linen as nn
import jax

from anact_jax.plots import draw
from experiments.config import SETTINGS, Experiment, Network, changed, flat, read_experiment, read_settings
from experiments.data import DataError, Dataset, first_examples, training_batches
from experiments.data.kept import keep
from experiments.data.sets import one_line
from experiments.folders import check_writable_name
from experiments.networks import ActivationName, check_name
from experiments.recipes import RECIPES
from experiments.training.build import check_devices, make_network
from experiments.training.checkpoints import CheckpointError, Checkpoints, silence_orbax
from experiments.training.comparison_picture import draw_comparison
from experiments.training.gains import gains_of, worst_gains
from experiments.training.loop import BadStepError, PreemptedError, first_state, train
from experiments.training.metrics import MetricsLog, Unheard, draw_learning_curves, read_evaluations, show_pictures
from experiments.training.processes import StopSignal, connect, only_process_in
from experiments.training.steps import make_steps

GAIN_IMAGES = 256  # test images, at most, on which gains are measured


def main() -> int:
    """Runs the program and returns its exit status."""
    silence_orbax()
    try:
        config = parse(sys.argv[1:])
    except (ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    with StopSignal() as stop:
        return run_both(config, stop) if config.run.compare else run(config, stop)


def run_both(config: Experiment, stop: StopSignal) -> int:
    """Trains with the plain activation, in a folder within the run's own, then as `run` does.

    Where the activation of the run is a plain one itself there is nothing to compare.
    """
    try:
        config.check()
        if not ActivationName.parse(activation_of(config)).normalized:
            return run(config, stop)
        config = changed(config, workdir=find_workdir(config))
    except (ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    plain = plain_one(config)
    status = run(plain, stop, part_of=config)
    if status not in (0, FAILED):  # a plain activation that diverges is a result
        return status
    return run(config, stop, beside=plain)


def plain_one(config: Experiment) -> Experiment:
    """The same with the plain activation; what has no effect then as if it was not set."""
    assert config.run.workdir is not None
    base = ActivationName.parse(activation_of(config)).base
    plain = changed(config, activation=base, workdir=config.run.workdir / "plain")
    usual = flat(Network())
    return changed(plain, **{name: usual[name] for name in plain.recipe.network.without_effect})


def run(
    config: Experiment, stop: StopSignal, *, part_of: Experiment | None = None, beside: Experiment | None = None
) -> int:
    """Trains, or goes on; saves and ends when `stop` says so. Returns the exit status, and says what went wrong.

    Args:
        config: the settings.
        stop: asked after each step.
        part_of: the run whose command goes on with this one; by default itself.
        beside: a run that has ended, to be drawn in one picture with this one.
    """
    with contextlib.ExitStack() as held:
        try:
            config.check()
            workdir = find_workdir(config)
            config = changed(config, workdir=workdir)
            connect(config)
            dataset = config.load_data()
            check_devices(config.recipe.training.batch_size)
            model = make_network(config.recipe.network, dataset)
            if config.run.process == 0:
                held.enter_context(only_process_in(workdir))
                keep(workdir, config.recipe.data.dataset, dataset)
                prepare_workdir(find_workdir(config), config)  # the process before may have left another run there
        except (DataError, ValueError, OSError) as error:
            return fail(str(error), BAD_SETTINGS)
        if dataset.description and beside is None:
            say(dataset.description)
        return _train(config, dataset, model, stop, part_of=part_of, beside=beside)


def _train(
    config: Experiment,
    dataset: Dataset,
    model: nn.Module,
    stop: StopSignal,
    *,
    part_of: Experiment | None,
    beside: Experiment | None,
) -> int:
    """What `run` does once the folder is its own."""
    workdir = config.run.workdir
    assert workdir is not None
    try:
        with Checkpoints(workdir, config) as checkpoints:
            steps = make_steps(model, config.recipe.training, dataset)
            gains = gains_of(model, first_examples(dataset, GAIN_IMAGES).images)
            try:
                start = checkpoints.restore(first_state(steps, config), say)
            except ValueError as error:
                return fail(str(error), BAD_SETTINGS)
            if start is not None:
                say(f"going on from step {start.step} in {workdir}")
            if part_of is not None:
                say(f"first with plain {activation_of(config)}, for comparison; --no-compare leaves this out")
            devices = jax.devices()
            say(f"training on {len(devices)} x {devices[0].device_kind}; the first step is compiled before it is taken")
            records = start.records if start else ()
            with MetricsLog(workdir, records) if config.run.process == 0 else contextlib.nullcontext(Unheard()) as log:
                state, accuracy = train(
                    steps, dataset, config, log, start=start, checkpoints=checkpoints, stop=stop, gains=gains
                )
    except BadStepError as error:
        where = gains_at(error, model, dataset, config)
        status = fail(f"{error}; {where}; what was measured is in {workdir}", FAILED)
    except (CheckpointError, DataError, OSError, jax.errors.JaxRuntimeError) as error:
        message = str(error) if isinstance(error, CheckpointError | DataError) else one_line(error)
        hint = "is another process gone? Start all again, with the same commands; " if config.run.processes > 1 else ""
        status = fail(f"{message}; {hint}what was measured is in {workdir}", FAILED)
        if config.run.processes > 1:
            sys.stderr.flush()
            os._exit(status)  # the way out of Python waits for the others
    except PreemptedError:
        whole = part_of.run.workdir if part_of else workdir
        status = fail(f"asked to stop; saved, the same command with --workdir {whole} goes on", PREEMPTED)
    except KeyboardInterrupt:
        status = fail(f"interrupted; what was measured is in {workdir}", INTERRUPTED)
    else:
        status = 0
    if config.run.process > 0:
        return status
    try:
        draw_learning_curves(workdir)
        if status == 0:
            pictures = workdir / "learning_curves.png", workdir / "gains.png"
            draw({f"{activation_of(config)}, trained": gains(state.evaluated)}).savefig(pictures[1], dpi=120)
            show_pictures(workdir, *pictures)
            print(f"pictures: {pictures[0]}, {pictures[1]}")
            if beside is not None:
                picture = workdir / "comparison.png"
                draw_comparison((beside, config), dataset, picture)
                accuracies = f"{activation_of(beside)}: {accuracy_of(beside)}, {activation_of(config)}: {accuracy:.4f}"
                print(f"{accuracies}; both: {picture}")
            if part_of is None:
                print(f"test_accuracy={accuracy:.4f} workdir={workdir}")
    except OSError as error:  # nothing was measured, or the disk is full, of which one line is enough
        return status or fail(f"cannot draw the results in {workdir} ({one_line(error)})", FAILED)
    return status


def activation_of(config: Experiment) -> str:
    """Its activation, as messages and folders name it."""
    return config.recipe.network.activation


def accuracy_of(config: Experiment) -> str:
    """The last test accuracy of a run that has ended, as its log has it."""
    assert config.run.workdir is not None
    measured = read_evaluations(config.run.workdir)
    return f"{measured[-1]['test_accuracy']:.4f}" if measured else "diverged in the first epoch"


def parse(arguments: Sequence[str]) -> Experiment:
    """The settings at the command line; those not given are those of `--recipe NAME` or of `--config FILE`.

    Raises:
        ValueError: no recipe has this name, the file does not hold settings, or both are given.
        OSError: the file cannot be read.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--recipe")
    before.add_argument("--config", type=Path)
    start, rest = before.parse_known_args(arguments)
    if start.recipe is not None and start.config is not None:
        raise ValueError("--recipe and --config both say where the settings start; give one of them")
    recipe = start.recipe or "digits"
    check_name("recipe", recipe, RECIPES)
    config = RECIPES[recipe].config
    if start.config is not None:
        config = changed(read_experiment(with_home(start.config)), workdir=None)
    description = (
        f"{inspect.getdoc(Experiment)}\n\n--config FILE starts from the settings that a run wrote, in its {SETTINGS}. "
        f"--recipe NAME starts from those of {', '.join(RECIPES)}; with --help it says what to expect. These are the "
        f"settings of {start.config or recipe}."
    )
    if start.config is None:
        description += f"\n\n{recipe}: {RECIPES[recipe]}"
    return settings_of(Experiment, config, rest, description)


def find_workdir(config: Experiment) -> Path:
    """The folder for results, which may be new, or hold this run already.

    Raises:
        ValueError: it holds another run, or can hold none.
    """
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    workdir = config.run.workdir or Path(
        "runs", f"{config.recipe.network.model}-{config.recipe.network.activation}-{now}"
    )
    check_writable_name(workdir)
    if (workdir / SETTINGS).exists():
        config.check_same_run(read_settings(workdir), workdir)
    elif (workdir / "metrics.jsonl").exists():
        raise ValueError(f"{workdir} holds a run already; give another --workdir")
    return workdir


def prepare_workdir(workdir: Path, config: Experiment) -> None:
    """Makes the folder and writes the settings there, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    unfinished = workdir / f"{SETTINGS}.part"
    unfinished.write_text(config.to_json())
    unfinished.rename(workdir / SETTINGS)


def gains_at(error: BadStepError, model: nn.Module, dataset: Dataset, config: Experiment) -> str:
    """In words, the worst gains in the network on the batch that it could not take."""
    batch = next(
        training_batches(
            dataset,
            config.recipe.training.batch_size,
            seed=config.recipe.seed,
            epochs=config.recipe.training.epochs,
            augmentation=config.recipe.data.augmentation(dataset),
            start=error.step - 1,
        )
    )
    return worst_gains(gains_of(model, batch.images)(error.variables))


if __name__ == "__main__":
    run_program(main)
