import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anact_jax import gaussian_stats
from experiments.config import Recipe, changed
from experiments.data import load
from experiments.networks import Plain, on_each
from experiments.studies.rivals import DEEP_KERNEL_SHAPING, Depth, UnitKernel, deep_kernel_shaped, network_of


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
    recipe = changed(Recipe(), model=model, activation="tanh", norm="none")
    [shaped] = {module.fn for module in plain_activations(network_of(recipe, DEEP_KERNEL_SHAPING, load("digits")))}
    assert shaped is deep_kernel_shaped("tanh", depth)


@pytest.mark.slow
def test_deep_kernel_shaping_weighs_shortcuts():
    depth = Depth(3, (2, 1))
    assert depth.slope(1.1) == pytest.approx(1.1**3 * (0.64 + 0.36 * 1.1**2) * (0.64 + 0.36 * 1.1))
    assert Depth(0, (2,)).slope(1.1) == pytest.approx(1.1**2)  # the branch alone


KEEPS = ["normalizer-free", "magnitude-preserving", "BatchNorm behind", "tempered, BatchNorm behind"]


@pytest.mark.parametrize(
    "variation",
    [
        "tempered, BatchNorm behind",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "normalizer-free",
                "magnitude-preserving",
                "BatchNorm behind",
                "tempered",
                "frozen",
                DEEP_KERNEL_SHAPING,
            )
        ),
    ],
)
@pytest.mark.parametrize("model", ["resmlp16", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_each_rival_holds_the_signal_and_trains(model, variation):
    recipe = changed(Recipe(), model=model, activation="softplus", norm="batch" if variation == "tempered" else "none")
    network = network_of(recipe, variation, load("digits"))
    x, labels = jax.random.normal(jax.random.key(0), (64, 8, 8, 1)), jnp.arange(64) % 10
    variables = jax.jit(lambda x: network.init(jax.random.key(1), x, train=False))(x)

    def loss(params):
        logits, _ = network.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    (before, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    if (
        variation in KEEPS and model == "resmlp16"
    ):  # ResNet-20 has an activation behind each sum, which those know nothing of
        assert 0.05 < float(jnp.std(logits)) < 20
    rate = 1e-3 / optax.tree.norm(gradient)
    after, _ = jax.jit(loss)(jax.tree.map(lambda p, g: p - rate * g, variables["params"], gradient))
    assert float(after) < float(before)


@pytest.mark.parametrize("center", [True, False])
def test_kernels_of_unit_norm(center):
    layer = UnitKernel(5, (3, 3), 2, center=center)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 6))
    variables = layer.init(jax.random.key(1), x)
    scaled = jax.tree.map(lambda p: 7 * p if p.ndim > 1 else p, variables)
    np.testing.assert_allclose(layer.apply(variables, x), layer.apply(scaled, x), rtol=1e-4, atol=1e-5)
    assert layer.apply(variables, x).shape == (4, 4, 4, 5)
    assert float(jnp.var(layer.apply(variables, x)[:, 1:3, 1:3])) == pytest.approx(1, rel=0.3)  # x has variance 1
    constant = layer.apply(variables, jnp.ones_like(x))[:, 1:3, 1:3]
    assert (float(jnp.abs(constant).max()) < 1e-4) == center  # without padding a centered kernel takes no mean


def plain_activations(model):
    found = []
    with on_each(Plain, lambda module, _: found.append(module)):
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return found
