import json

import jax
import numpy as np
import pytest

from anact_jax.linen import BatchNormAct
from experiments.networks import make_layers
from experiments.networks.mlp import MLP
from experiments.studies import closed_factor
from experiments.studies.closed_factor import FORMS, factors_off

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_each_layer_is_measured_once_and_of_normal_input_the_factors_agree():
    layers = make_layers("swish", "batch")._replace(
        norm_act=lambda inference: BatchNormAct(use_running_average=inference)
    )
    model = MLP(layers, classes=2, depth=1, width=16)
    x = jax.random.normal(jax.random.key(0), (20_000, 8))
    found = factors_off(model, x, model.init(jax.random.key(1), x, train=True))
    for form in FORMS:
        assert found[form].median.shape == (1,)
        assert float(found[form].worst[0]) < 0.03
        np.testing.assert_allclose(found[form].kurtosis, 3, rtol=0.05)


@pytest.mark.slow
def test_program_leaves_numbers_and_a_picture(run_main, tmp_path):
    picture = tmp_path / "off.png"
    arguments = ("--model", "mlp5", "--epochs", "1", "--output", str(picture))
    status, output = run_main(closed_factor, *arguments)
    assert status == 0
    assert "| epoch | " + " | ".join(FORMS) in output.out
    off = json.loads(picture.with_suffix(".json").read_text())["off"]
    for form in FORMS:
        assert np.shape([row["median"] for row in off[form]]) == (2, 5)  # before and after the epoch, by layer
    assert picture.stat().st_size > 10_000


def test_bad_settings_end_in_one_line(refused):
    refused(
        closed_factor,
        "--norm",
        "layer",
        message="have factors in closed form, got layer, closed and nswish",
    )
