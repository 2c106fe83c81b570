import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Experiment
from experiments.data import Batch, load
from experiments.data.pipeline import standardize
from experiments.networks.build import make_network
from experiments.studies import ingredients
from experiments.studies.ingredients import similarity_and_gradient

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.slow
def test_program_draws_prints_and_writes_numbers(tmp_path, run_main):
    settings = ("--model", "mlp5", "--epochs", "2", "--seeds", "2", "--forms", "plain", "mean+center")
    status, output = run_main(ingredients, *settings, "--output", str(tmp_path / "new" / "picture.png"))
    assert status == 0
    assert output.out.count("similarity") == 2
    assert (tmp_path / "new" / "picture.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "new" / "picture.json").read_text())["results"]["mean+center"]
    assert len(found["similarity"]) == len(found["gradient"]) == 5
    assert found["gradient"][-1] == found["weights"][0] == 1
    assert found["loss"][-1] < found["loss"][0]


@pytest.mark.slow
def test_similarity_is_the_mean_cosine_of_pairs_and_channels_remove_it():
    digits = load("digits")
    images, labels = digits.train.fetch(np.arange(16))
    batch = Batch(standardize(images, digits), labels, np.ones(16, bool))
    found = {}
    for activation in ("swish", "nswish"):
        model = make_network(Experiment(model="mlp5", norm="none", activation=activation), digits)
        variables = model.init(jax.random.key(0), jnp.asarray(batch.images), train=False)
        found[activation], gradient = similarity_and_gradient(model, batch, variables)
        assert gradient.shape == (5,)
    dense = variables["params"]["Dense_0"]
    signal = np.asarray(batch.images).reshape(16, -1) @ dense["kernel"] + dense["bias"][None]
    cosines = np.asarray(signal @ signal.T) / np.outer(*[np.linalg.norm(signal, axis=1)] * 2)
    np.testing.assert_allclose(found["swish"][0], cosines[~np.eye(16, dtype=bool)].mean(), rtol=1e-4)
    assert found["swish"][-1] > 0.2
    assert abs(found["nswish"][-1]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet20"], "unknown model 'resnet20'"),
        (["--forms", "median"], "unknown form 'median'"),
        (["--seeds", "0"], "seeds must be a positive number"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, refused):
    refused(ingredients, *arguments, message=message)
