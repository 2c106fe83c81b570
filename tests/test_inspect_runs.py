import jax
import numpy as np
import pytest

from experiments import inspect_runs, train_resnet
from experiments.data import load
from experiments.data.pipeline import standardize
from experiments.inspect_runs import layer_variances
from experiments.training.runs import load_run

pytestmark = pytest.mark.usefixtures("standard_promotion")


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
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, refused):
    refused(inspect_runs, *arguments, message=message)
