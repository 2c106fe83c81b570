import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import gaussian_stats
from experiments.config import Recipe
from experiments.data import load
from experiments.networks import Plain, on_each
from experiments.studies.rivals import DEEP_KERNEL_SHAPING, Depth, WeightedSum, deep_kernel_shaped, network_of


@pytest.mark.parametrize("name", ["swish", "tanh", "gelu"])
def test_deep_kernel_shaping_meets_its_conditions(name):
    """For N(0, 1) input: mean 0, mean square 1, and a slope that 12 layers raise to 1.5."""
    stats = gaussian_stats(deep_kernel_shaped(name, Depth(12)))
    np.testing.assert_allclose((stats.mean_out, stats.var_out), (0, 1), atol=5e-3)
    np.testing.assert_allclose(stats.slope_sq**12, 1.5, rtol=2e-2)


@pytest.mark.parametrize(
    ("model", "depth"),
    [
        ("mlp5", Depth(5)),
        ("cnn12", Depth(12)),
        ("resmlp16", Depth(0, (1,) * 16)),
        ("preresmlp16", Depth(0, (1,) * 16)),
        ("resnet20", Depth(10, (1,) * 9)),
        ("resnet50", Depth(17, (2,) * 16)),
        ("wrn16_4", Depth(4, (1, 2) * 3)),
    ],
)
def test_deep_kernel_shaping_knows_the_depth(model, depth):
    recipe = Recipe(model=model, activation="tanh", norm="none")
    [shaped] = {module.fn for module in plain_activations(network_of(recipe, DEEP_KERNEL_SHAPING, load("digits")))}
    assert shaped is deep_kernel_shaped("tanh", depth)


@pytest.mark.slow
def test_deep_kernel_shaping_counts_shortcuts_by_their_weight():
    depth = Depth(3, (2, 1))
    assert depth.slope(1.1) == pytest.approx(1.1**3 * (0.64 + 0.36 * 1.1**2) * (0.64 + 0.36 * 1.1))
    assert Depth(0, (2,)).slope(1.1) == pytest.approx(1.1**2)  # the branch alone
    x, branch = jax.random.normal(jax.random.key(0), (2, 4096))
    np.testing.assert_allclose(WeightedSum()(x, branch), 0.8 * x + 0.6 * branch, rtol=1e-5, atol=1e-6)


def plain_activations(model):
    found = []
    with on_each(Plain, lambda module, _: found.append(module)):
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return found
