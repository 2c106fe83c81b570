import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import upsets
from experiments.studies.upsets import dead, grown

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.slow
def test_program_shows_that_the_default_form_recovers(run_main):
    status, output = run_main(upsets, "--model", "mlp5", "--epochs", "8", "--seeds", "2")
    assert status == 0
    head, _, *rows = (line.strip("|").split("|") for line in output.out.splitlines())
    assert [cell.strip() for cell in head] == ["relu", *upsets.UPSETS]
    assert [row[0].strip() for row in rows] == ["plain", "plain, BatchNorm", "published form", "default form"]
    found = {row[0].strip(): [list(map(float, re.findall(r"[\d.]+", cell)))[:2] for cell in row[1:]] for row in rows}
    for after, end in found["default form"][1:]:
        assert after < found["default form"][0][0] - 5  # it was upset
        assert end > 90
    assert found["plain"][3][1] < 80  # dead units stay dead


def test_upsets_touch_hidden_layers_only():
    layer = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros((2,))}
    params = {f"Dense_{index}": jax.tree.map(lambda value: value[None], layer) for index in range(3)}
    for upset, kernel, bias in ((grown, 10, [0, 0]), (dead, 1, [-100, 0])):
        changed = upset(params)
        for name in ("Dense_0", "Dense_1"):
            np.testing.assert_array_equal(changed[name]["kernel"], np.full((1, 2, 2), kernel))
            np.testing.assert_array_equal(changed[name]["bias"], [bias])
        np.testing.assert_array_equal(changed["Dense_2"]["kernel"], params["Dense_2"]["kernel"])
        np.testing.assert_array_equal(changed["Dense_2"]["bias"], params["Dense_2"]["bias"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet20"], "unknown model 'resnet20'"),
        (["--activation", "nrelu"], "activation must be a plain one, such as relu, got 'nrelu'"),
        (["--seeds", "0"], "seeds must be a positive number"),
        (["--epochs", "1"], "epochs must be at least 2"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, refused):
    refused(upsets, *arguments, message=message)
