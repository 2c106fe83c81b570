import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import Published, Standardized, activation_stats
from anact_jax.linen import ANAct
from experiments.config import Recipe, changed
from experiments.data import load
from experiments.networks import (
    MODELS,
    NORMS,
    ActivationName,
    Plain,
    activation_layer,
    make_layers,
    make_model,
    on_each,
)
from experiments.networks.mlp import MLP
from experiments.training.build import make_network
from experiments.training.gains import factor_range, gains_of


def parameter_count(model, image_shape):
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def initialized(model, x):
    """Variables of a model; the `rbg` generator compiles in a third of the time that the default takes."""
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0, impl="rbg"), x)


# He et al. (arXiv 1512.03385), table 6, give 0.27M, 0.46M, 0.85M; torchvision's documentation of its models
# gives the exact figures of the other three. The exact figures of the first three follow by hand from section 4.2:
# 9 * (3 * 16 + 2n * 16^2 + 16 * 32 + (2n - 1) * 32^2 + 32 * 64 + (2n - 1) * 64^2) for convolutions,
# 2 * (16 + 2n * (16 + 32 + 64)) for batch normalization, 650 for the classifier.
def cifar_count(n):
    convolutions = 9 * (3 * 16 + 2 * n * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2)
    return convolutions + 2 * (16 + 2 * n * (16 + 32 + 64)) + 650


@pytest.mark.parametrize(
    ("name", "published", "millions"),
    [("resnet20", cifar_count(3), 0.27), ("resnet32", cifar_count(5), 0.46), ("resnet56", cifar_count(9), 0.85)],
)
def test_cifar_resnets_have_the_published_parameters(name, published, millions):
    count = parameter_count(make_model(name, make_layers("swish", "batch"), classes=10), (32, 32, 3))
    assert count == published
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("name", "published"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)]
)
def test_imagenet_resnets_parameter_counts(name, published):
    model = make_model(name, make_layers("swish", "batch"), classes=1000, stem="imagenet")
    assert parameter_count(model, (224, 224, 3)) == published


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet20", "small"),
        ("resnet50", "imagenet"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("resnet20", "imagenet"),
                ("resnet18", "small"),
                ("resnet18", "imagenet"),
                ("resnet50", "small"),
            )
        ),
    ],
)
def test_no_activation_is_hard_wired(name, stem):
    """With the identity injected and no normalization layer, what remains is linear in a positive factor."""
    layers = make_layers("swish", "none")._replace(act=lambda use_running_average: lambda x: x)
    model = make_model(name, layers, classes=3).clone(stem=stem, stage_sizes=(1, 2))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    variables = initialized(model, x)
    run = jax.jit(functools.partial(model.apply, train=False))
    np.testing.assert_allclose(run(variables, 3.0 * x), 3.0 * run(variables, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [pytest.param("relu", marks=pytest.mark.slow), "nswish"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_and_activation_runs_in_both_modes(norm, activation):
    model = make_model("resnet20", make_layers(activation, norm), classes=10).clone(stage_sizes=(1, 1))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    variables = initialized(model, x)
    assert ("batch_stats" in variables) == (norm == "batch" or activation == "nswish")
    has_bias = any(
        "bias" in path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"]["Conv_0"])
    )
    assert has_bias == (norm == "none")
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    logits, _ = train(variables, x)
    assert logits.shape == (4, 10)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("init", ["lecun", "he"])
def test_initial_variance(init):
    layers, expected = make_layers("relu", "batch", init=init), {"lecun": 1.0, "he": 2.0}[init]
    for layer, x, fan_in in (
        (layers.conv(64, (3, 3)), jnp.zeros((1, 8, 8, 64)), 9 * 64),
        (layers.dense(256), jnp.zeros((1, 256)), 256),
    ):
        kernel = layer.init(jax.random.key(0), x)["params"]["kernel"]
        np.testing.assert_allclose(kernel.var() * fan_in, expected, rtol=0.02)


@pytest.mark.parametrize(
    ("norm", "init", "message"), [("instance", "lecun", "unknown norm"), ("none", "x", "unknown init")]
)
def test_unknown_names_are_refused_by_the_maker(norm, init, message):
    with pytest.raises(ValueError, match=message):
        make_layers("relu", norm, init=init)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("NSwish", "nswish"), ("nSiLU", "nsilu"), ("NLeakyReLU", "nleaky_relu"), ("GELU", "gelu"), ("nselu", "nselu")],
)
def test_activations_go_by_module_names_too(name, meant):
    assert str(ActivationName.parse(name)) == meant


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'nswsh'; expected one of elu"):
        activation_layer("nswsh")


def test_gains_in_order_of_execution():
    form = Published(center=True, epsilon=0.0)
    model = MLP(make_layers("nrelu", "none", form=form), classes=3, depth=12, width=256)
    x = jax.random.normal(jax.random.key(1), (256, 4, 4, 1))
    variables = model.init(jax.random.key(0), x, train=False)
    _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    layers = gains_of(model, np.asarray(x))(variables | updates)
    assert [layer.name for layer in layers] == [f"ANAct_{i}" for i in range(12)]
    for layer in layers:
        stats = updates["batch_stats"][layer.name]
        np.testing.assert_allclose(layer.shift, stats["mean_out"], rtol=1e-5)
        # The rule `mean` makes the inverse gains average to 1 on the batch that it was measured on.
        np.testing.assert_allclose(np.mean([1 / layer.forward, 1 / layer.backward]), 1, rtol=1e-4)
        assert layer.bare_backward * layer.factor**2 == pytest.approx(layer.backward, rel=1e-5)
    low, high = factor_range(variables | updates, form)
    factors = [float(layer.factor) for layer in layers]
    np.testing.assert_allclose((low, high), (min(factors), max(factors)), rtol=1e-5)


def test_a_recipe_with_batch_norm_measures_everywhere():
    model = make_network(changed(Recipe(), model="resnet20").network, load("digits"))
    seen = []
    with on_each(ANAct | Plain, lambda module, x: seen.append(module)):
        jax.eval_shape(lambda: initialized(model, jnp.zeros((4, 8, 8, 1))))
    assert len(seen) == 19
    assert {(type(module), module.form) for module in seen} == {(ANAct, Standardized())}


@pytest.mark.slow
def test_gains_of_channels_are_their_means():
    model = MLP(make_layers("nrelu", "none"), classes=3, depth=2, width=16)
    x = jax.random.normal(jax.random.key(1), (64, 4, 4, 1))
    variables = model.init(jax.random.key(0), x, train=False)
    (first, _) = gains_of(model, np.asarray(x))(variables)
    dense = variables["params"]["Dense_0"]
    z = x.reshape(64, 16) @ dense["kernel"] + dense["bias"][None]
    stats = activation_stats(jax.nn.relu, z, axis=-1)
    np.testing.assert_allclose(first.bare_backward, stats.slope_sq.mean(), rtol=1e-5)
    assert np.shape(first.factor) == ()


def test_gains_of_plain_activations():
    model = MLP(make_layers("relu", "none"), classes=3, depth=2, width=256)
    x = np.random.default_rng(0).standard_normal((256, 16)).astype(np.float32)[:, :, None, None]
    variables = model.init(jax.random.key(0), jnp.asarray(x), train=False)
    layers = gains_of(model, x)(variables)
    assert [layer.name for layer in layers] == ["Plain_0", "Plain_1"]
    assert (layers[0].factor, layers[0].shift) == (1.0, 0.0)
    np.testing.assert_allclose((layers[0].bare_forward, layers[0].bare_backward), (0.5, 0.5), atol=0.03)
    assert factor_range({"batch_stats": {}, "params": {}}, Standardized()) is None


def test_an_activation_is_a_module_in_either_form():
    assert isinstance(activation_layer("relu")(True), Plain)
    assert isinstance(activation_layer("nrelu")(True), ANAct)
    assert isinstance(activation_layer("nrelu")(True), nn.Module)


# torchvision's documentation of its models gives the first three; the authors of wide residual networks
# (arXiv 1605.07146, table 4) give 2.7M and 36.5M.
@pytest.mark.parametrize(
    ("name", "published"), [("resnet101", 44_549_160), ("vgg11", 132_863_336), ("vgg16", 138_357_544)]
)
def test_more_imagenet_parameter_counts(name, published):
    norm = "none" if name.startswith("vgg") else "batch"
    model = make_model(name, make_layers("swish", norm), classes=1000, stem="imagenet")
    assert parameter_count(model, (224, 224, 3)) == published


@pytest.mark.parametrize(("name", "millions"), [("wrn16_4", 2.7), ("wrn28_10", 36.5)])
def test_wide_resnets_have_the_published_parameters(name, millions):
    count = parameter_count(make_model(name, make_layers("swish", "batch"), classes=10), (32, 32, 3))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


DEEP = (
    "resnet32",
    "resnet56",
    "resnet34",
    "resnet50",
    "resnet101",
    "wrn28_10",
    "vgg16",
    "mlp30",
    "mlp100",
    "resmlp100",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in DEEP else ()) for n in MODELS])
@pytest.mark.parametrize("size", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_every_network_takes_small_images(name, size):
    model = make_model(name, make_layers("nswish", "batch"), classes=7)
    x = jnp.zeros((2, size, size, 1))
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    logits, _ = jax.eval_shape(functools.partial(model.apply, train=True, mutable=["batch_stats"]), variables, x)
    assert logits.shape == (2, 7)


def test_a_stem_that_a_network_lacks_is_refused():
    with pytest.raises(ValueError, match="cnn12 has no stem 'imagenet'"):
        make_model("cnn12", make_layers("swish", "batch"), classes=10, stem="imagenet")
    with pytest.raises(ValueError, match="unknown model 'alexnet'; expected one of resnet20"):
        make_model("alexnet", make_layers("swish", "batch"), classes=10)


def test_shown_factors_include_the_learned_correction():
    form = Published(learned=True)
    model = MLP(make_layers("nrelu", "none", form=form), classes=3, depth=2, width=16)
    x = np.random.default_rng(0).standard_normal((8, 4, 4, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), jnp.asarray(x), train=False)
    before = [float(layer.factor) for layer in gains_of(model, x)(variables)]
    variables["params"]["ANAct_1"]["alpha"] = jnp.float32(100.0)
    after = [float(layer.factor) for layer in gains_of(model, x)(variables)]
    np.testing.assert_allclose(after, [before[0], before[1] + 0.3], rtol=1e-6)
    np.testing.assert_allclose(factor_range(variables, form), (min(after), max(after)), rtol=1e-6)
