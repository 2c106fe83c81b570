import jax
import numpy as np
import pytest

from anact_jax import nonlinearity
from experiments.networks import MODELS
from experiments.studies.depth import ACTIVATIONS, BLOCKS, CHAINS, forms, limit, nu, places, predicted, spent


@pytest.mark.parametrize("name", ["swish", "tanh", "log_sigmoid"])
def test_nu_at_scale_1_is_the_nonlinearity(name):
    f = ACTIVATIONS[name]
    np.testing.assert_allclose(nu(f, 1.0), nonlinearity(f), rtol=1e-4)


@pytest.mark.parametrize("model", ["mlp12", "mlp48", "resmlp16"])
def test_prediction_spends_the_budget(model):
    std = predicted(jax.nn.swish, model, 0.5)
    assert 0.45 < spent(jax.nn.swish, model, std) <= 0.5
    assert spent(jax.nn.swish, model, 1.1 * std) > 0.5


def test_prediction_is_at_most_2():
    assert predicted(ACTIVATIONS["elu"], "mlp3", 0.5) == pytest.approx(2)


def test_relu_has_a_limit_instead_of_a_deviation():
    place = next(place for place in places("choice") if place.activation == "relu")
    *tried, constant = forms(place, 0.5)
    assert (constant.std, constant.tempering) == (0.5, None)
    assert tried[2].tempering == pytest.approx(limit(place.model, 0.5), rel=1e-4)


@pytest.mark.parametrize("part", ["choice", "held-out"])
def test_each_curve_comes_once_in_a_network_that_exists(part):
    found = places(part)
    assert len(found) == len(set(found)) == 39
    assert {place.model for place in found} <= {*CHAINS, *BLOCKS} <= set(MODELS)
    assert (part == "choice") != any(place.activation == "softsign" for place in found)
