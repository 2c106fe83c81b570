from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from helpers import small_dataset, small_experiment, small_model

from experiments import inspect_runs, train_resnet
from experiments.config import Recipe, Storage, changed
from experiments.data import load
from experiments.data.pipeline import standardize
from experiments.inspect_runs import by_name, layer_variances
from experiments.training.build import make_network
from experiments.training.comparison_picture import gradients_at_the_start
from experiments.training.gains import gains_of
from experiments.training.load_run import TrainedRun, load_run, variances_of
from experiments.training.metrics import read_evaluations
from experiments.training.steps import make_steps

DATASET = small_dataset()

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def untrained():
    """A run whose network has its initial weights, with 100 test images."""
    state = make_steps(small_model(), small_experiment().recipe.training, DATASET).create(0, 0.1)
    return TrainedRun(small_experiment(), DATASET, small_model(), state, state)


def test_more_images_than_there_are_is_all_of_them(untrained):
    chex.assert_trees_all_equal(layer_variances(untrained, 5000), layer_variances(untrained, 100))


def test_comparison_measures_real_images_alone():
    few = changed(Recipe(), model="mlp5", norm="none", validation_images=20)
    dataset = few.data.load(Storage())
    model = make_network(few.network, dataset)
    steps = make_steps(model, few.training, dataset)
    images, labels = dataset.test.fetch(np.arange(20))
    expected = variances_of(model)(steps.create(0, 0.1).variables, standardize(images, dataset), labels)
    chex.assert_trees_all_close(gradients_at_the_start(few, dataset), jax.device_get(expected), rtol=1e-5)


@pytest.mark.slow
def test_gains_in_training_are_of_real_images_alone(tmp_path, run_main):
    settings = ("--model", "mlp5", "--norm", "none", "--epochs", "1", "--no-compare", "--validation-images", "20")
    assert run_main(train_resnet, *settings, "--workdir", tmp_path)[0] == 0
    run = load_run(tmp_path)
    images = standardize(run.dataset.test.fetch(np.arange(20))[0], run.dataset)
    recorded = read_evaluations(tmp_path)[-1]
    for row in gains_of(run.model, images)(run.trained.evaluated):
        np.testing.assert_allclose(recorded[f"gain_forward/{row.name}"], row.forward, rtol=1e-3)
        np.testing.assert_allclose(recorded[f"gain_backward/{row.name}"], row.backward, rtol=1e-3)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/swish", "/a/nswish"], ["swish", "nswish"]),
        (["/a/swish/seed0", "/a/nswish/seed0"], ["swish/seed0", "nswish/seed0"]),
        (["/seed0", "/a/seed0", "/b/seed1"], ["/seed0", "a/seed0", "b/seed1"]),
        (["/a/run", "/a/run", "/a/./run/"], ["run"]),
    ],
)
def test_folders_are_named_apart(folders, names):
    assert list(by_name(map(Path, folders))) == names


def test_the_folder_one_is_in_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert by_name([Path()]) == {tmp_path.name: tmp_path}


def test_runs_of_one_base_name_are_two_tables(tmp_path, monkeypatch, run_main, untrained):
    other = untrained._replace(config=changed(untrained.config, seed=1))
    found = {tmp_path / side / "seed0": run for side, run in (("a", untrained), ("b", other))}
    monkeypatch.setattr(inspect_runs, "load_run", lambda workdir, **_: found[workdir])
    for folder in found:
        folder.mkdir(parents=True)
    status, output = run_main(inspect_runs, *found, "--images", "200")
    assert status == 0
    titles = [line for line in output.out.splitlines() if "seed0" in line]
    assert titles == [f"{side}/seed0, {when}" for side in "ab" for when in ("at the start", "trained")]
    picture = tmp_path / "a" / "seed0" / "variances.png"
    assert output.err.splitlines() == [
        "inspect_runs.py: a/seed0 has 100 test images, fewer than --images 200; all are taken",
        "inspect_runs.py: b/seed0 has 100 test images, fewer than --images 200; all are taken",
        f"inspect_runs.py: the picture is {picture}",
    ]
    assert picture.stat().st_size > 10_000
    picture.unlink()
    picture.mkdir()  # stands for a folder of somebody else's: it cannot be written either
    status, output = run_main(inspect_runs, *found)
    assert status == 0
    assert output.out.count("seed0, trained") == 2
    assert "no picture, which --output can put elsewhere: " in output.err


@pytest.mark.slow
def test_program_shows_runs_before_and_after_training(tmp_path, run_main):
    workdirs = [tmp_path / name for name in ("swish", "nswish")]
    for workdir in workdirs:
        settings = ("--model", "mlp5", "--norm", "none", "--epochs", "3", "--no-compare", "--activation", workdir.name)
        assert run_main(train_resnet, *settings, "--workdir", workdir)[0] == 0
    status, output = run_main(inspect_runs, *workdirs, "--output", tmp_path / "new" / "picture.png")
    assert status == 0
    titles = [line for line in output.out.splitlines() if line.startswith(("swish", "nswish"))]
    assert titles == [f"{name}, {when}" for name in ("swish", "nswish") for when in ("at the start", "trained")]
    assert (tmp_path / "new" / "picture.png").stat().st_size > 10_000

    run = load_run(workdirs[0])
    found = layer_variances(run, 64)
    digits = load("digits")
    images = standardize(digits.test.fetch(np.arange(64))[0], digits).reshape(64, -1)
    for when, state in (("at the start", run.initial), ("trained", run.trained)):
        dense = jax.device_get(state.params["Dense_0"])
        np.testing.assert_allclose(
            found[when][0].signal, np.mean((images @ dense["kernel"] + dense["bias"]) ** 2), rtol=1e-4
        )
    ratio = {
        name: [row.gradient for row in layer_variances(load_run(tmp_path / name), 64)["at the start"]]
        for name in ("swish", "nswish")
    }
    assert ratio["swish"][4] > 20 * ratio["swish"][0]  # lost on the way to the first layer
    assert ratio["nswish"][4] < 5 * ratio["nswish"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected at least one folder of a run"),
        (["/nowhere"], "No such file"),
        (["/nowhere", "--images", "0"], "images must be a positive number, got 0"),
        (["/nowhere", "--output", "picture.txt"], "output must end in one of .png, .pdf, .svg, .jpg, .webp"),
        (["/nowhere", "--output", "/dev/null/new/picture.png"], "Not a directory"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, refused):
    refused(inspect_runs, *arguments, message=message)
