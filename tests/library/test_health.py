"""The health check finds each misuse, and nothing in sound networks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import anact_jax.nnx
from anact_jax.health import health
from anact_jax.linen import ANAct, NReLU, NSwish
from experiments.networks import make_layers, make_model

NETWORKS = ["mlp10", "resmlp16", "preresmlp16", "cnn12", "vgg11_narrow", "resnet20"]
X = jax.random.normal(jax.random.key(0), (64, 8))


class Net(nn.Module):
    """Two layers, by a maker of activations."""

    make: object = NSwish
    act: object = None

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            act = self.make() if self.act is None else self.act
            x = act(nn.Dense(16)(x), use_running_average=not train)
        return nn.Dense(1)(x)


def trained(model, x=X, steps=5):
    variables = model.init(jax.random.key(1), x, train=True)
    for _ in range(steps):
        _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        variables = {**variables, **updates}
    return variables


def checked(model, variables, x=X):
    return health(lambda variables, x: jnp.sum(model.apply(variables, x, train=False)), variables, x)


@pytest.mark.parametrize("make", [NSwish, NReLU, lambda: NSwish(form="published"), lambda: NSwish(std=0.1)])
def test_sound_network_has_no_findings(make):
    model = Net(make)
    found = checked(model, trained(model))
    assert found.findings == ()
    assert [row.name for row in found.rows] == ["NSwish_0", "NSwish_1"] or make is NReLU
    assert "sum of nu" in str(found)
    assert "nothing found" in str(found)


def test_untrained_layers_are_found():
    model = Net()
    found = checked(model, trained(model, steps=0))
    assert [finding.split(":")[0] for finding in found.findings] == ["NSwish_0", "NSwish_1"]
    assert "no batch was taken" in found.findings[0]


def test_shared_instance_is_found():
    model = Net(act=NSwish())
    with pytest.warns(UserWarning, match="several places"):
        variables = trained(model)
    assert any("called at 2 places" in finding for finding in checked(model, variables).findings)


def test_instance_meant_to_be_shared_is_not_found():
    model = Net(act=NSwish(shared=True))
    assert not any("places" in finding for finding in checked(model, trained(model)).findings)


@pytest.mark.filterwarnings("ignore:a batch of one value")
def test_hidden_batch_is_found():
    model = Net()
    variables = trained(model, steps=0)
    _, updates = jax.vmap(lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"]))(X)
    variables = {**variables, **jax.tree.map(lambda value: value[0], updates)}
    assert "axis_name" in checked(model, variables).findings[0]


def test_dead_units_are_found():
    model = Net(NReLU)
    variables = trained(model)
    params = jax.tree.map(lambda value: value, variables["params"])
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"] - 100.0
    found = checked(model, {**variables, "params": params})
    assert "100% of its channels are constant" in found.findings[0]
    assert found.rows[0].constant == 1


def test_constant_channels_in_training_are_found():
    model = Net(NReLU)
    variables = trained(model, steps=0)
    variables["params"]["Dense_0"]["bias"] = jnp.where(jnp.arange(16) < 4, -100.0, 0.0)
    for _ in range(3):
        _, updates = model.apply(variables, X, train=True, mutable=["batch_stats"])
        variables = {**variables, **updates}
    assert "25% of its channels were never measured" in checked(model, variables).findings[0]


@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_statistics_of_other_data_are_found(scale):
    model = Net()
    found = checked(model, trained(model), scale * X)
    assert "Is this other data" in found.findings[0]


def test_nnx_models_are_checked():
    class Model(nnx.Module):
        def __init__(self, act, other):
            self.first, self.second = (nnx.Linear(8, 8, rngs=nnx.Rngs(seed)) for seed in (0, 1))
            self.act, self.other = act, other

        def __call__(self, x):
            return self.other(self.second(self.act(self.first(x))))

    own = Model(anact_jax.nnx.NSwish(8), anact_jax.nnx.NSwish(8))
    for _ in range(3):
        own(X)
    own.eval()
    assert health(lambda model, x: jnp.sum(model(x)), own, X).findings == ()
    act = anact_jax.nnx.NSwish(8)
    shared = Model(act, act)
    shared(X)
    shared.eval()
    assert "called at 2 places" in health(lambda model, x: jnp.sum(model(x)), shared, X).findings[0]


def test_curvature_follows_the_deviation():
    """Tempering and a smaller deviation both lower nu."""

    def nu(**options):
        model = Net(lambda: ANAct(jax.nn.swish, **options))
        return np.sum([row.nu for row in checked(model, trained(model)).rows])

    assert nu(tempering=0.01) < nu() / 2
    assert nu(std=0.1) < nu()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm"), [*((name, "none") for name in NETWORKS), ("mlp10", "batch"), ("resnet20", "batch")]
)
def test_trained_networks_of_the_programs_are_sound(name, norm):
    digits = load_digits()
    images, labels = jnp.asarray((digits.images[..., None] - 4.9) / 6, jnp.float32), jnp.asarray(digits.target)
    model = make_model(name, make_layers("nswish", norm), classes=10)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0, impl="rbg"), images[:2])

    @jax.jit
    def step(variables, images, labels):
        def loss(params):
            logits, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
        return {"params": jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], gradient), **updates}

    for start in (*range(0, 1280, 64), *range(0, 1280, 64)):
        variables = step(variables, images[start : start + 64], labels[start : start + 64])
    found = checked(model, variables, images[:256])
    assert found.findings == ()
    assert len(found.rows) > 4
