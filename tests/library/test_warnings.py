"""Uses of a layer that give wrong statistics say so; sound ones are silent (a warning fails a test)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import anact_jax.nnx
from anact_jax import Standardized, anact, initial_stats
from anact_jax.linen import NSwish

X = jax.random.normal(jax.random.key(0), (8, 4))
TRAINED = functools.partial(NSwish, use_running_average=False)
SHARING = "several places of one pass"
ONE_VALUE = "batch of one value a feature"


class Linen(nn.Module):
    """Two dense layers with an activation each, from a maker; or with one instance at both places."""

    make: object = None
    act: object = None

    @nn.compact
    def __call__(self, x, **mode):
        for _ in range(2):
            act = self.make() if self.act is None else self.act
            x = act(nn.Dense(4)(x), **mode)
        return x


class InSetup(nn.Module):
    def setup(self):
        self.first, self.second, self.act = nn.Dense(4), nn.Dense(4), TRAINED()

    def __call__(self, x):
        return self.act(self.second(self.act(self.first(x))))


def trained(model, x=X):
    variables = model.init(jax.random.key(1), x)
    return model.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("model", [Linen(act=TRAINED()), InSetup()], ids=["attribute", "setup"])
def test_shared_linen_instance_warns(model):
    with pytest.warns(UserWarning, match=f"'act'.*{SHARING}"):
        variables = model.init(jax.random.key(1), X)
    with pytest.warns(UserWarning, match=SHARING):
        model.apply(variables, X, mutable=["batch_stats"])
    with pytest.warns(UserWarning, match=SHARING):
        jax.jit(lambda v: model.apply(v, X, mutable=["batch_stats"]))(variables)


def test_shared_option_silences_linen():
    trained(Linen(act=TRAINED(shared=True)))


def test_shared_instance_in_inference_is_silent():
    model = Linen(act=NSwish())
    variables = model.init(jax.random.key(1), X, use_running_average=True)
    model.apply(variables, X, use_running_average=True)


def test_own_linen_layers_are_silent():
    model = Linen(make=NSwish)
    variables = model.init(jax.random.key(1), X, use_running_average=False)
    _, updates = model.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    model.apply(variables | updates, X, use_running_average=True)


def test_two_applies_in_one_loss_are_silent():
    model = Linen(make=TRAINED)
    variables = model.init(jax.random.key(1), X)

    @jax.jit
    @jax.grad
    def gradient(params):
        first, updates = model.apply(variables | {"params": params}, X, mutable=["batch_stats"])
        second, _ = model.apply(variables | updates | {"params": params}, 2 * X, mutable=["batch_stats"])
        return jnp.sum(first * second)

    gradient(variables["params"])


def test_microbatches_of_linen_are_silent():
    model = Linen(make=TRAINED)
    variables = model.init(jax.random.key(1), X)

    def body(state, x):
        return model.apply(variables | state, x, mutable=["batch_stats"])[1], None

    jax.jit(lambda: jax.lax.scan(body, {"batch_stats": variables["batch_stats"]}, X.reshape(4, 2, 4)))()


@pytest.mark.parametrize("lifted", ["scan", "remat", "vmap", "jit"])
def test_lifted_transforms_are_silent(lifted):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            return TRAINED()(nn.Dense(4)(x)), None

    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    make = {
        "scan": lambda: nn.scan(Body, length=3, **axes)(),
        "remat": lambda: nn.remat(Body)(),
        "vmap": lambda: nn.vmap(Body, in_axes=None, axis_size=2, **axes)(),
        "jit": lambda: nn.jit(Body)(),
    }[lifted]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return make()(x)[0]

    variables = Net().init(jax.random.key(1), X)
    jax.grad(lambda x: jnp.sum(Net().apply(variables, x, mutable=["batch_stats"])[0]))(X)


def test_ensembles_are_silent():
    model = Linen(make=TRAINED)
    variables = jax.vmap(lambda key: model.init(key, X))(jax.random.split(jax.random.key(1), 3))
    jax.vmap(lambda v: model.apply(v, X, mutable=["batch_stats"]))(variables)


class OfNNX(nnx.Module):
    def __init__(self, *acts):
        self.first, self.second = (nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in (0, 1))
        self.acts = nnx.List(acts)

    def __call__(self, x):
        return self.acts[-1](self.second(self.acts[0](self.first(x))))


def of_nnx(**options):
    return anact_jax.nnx.NSwish(4, use_running_average=False, **options)


@nnx.jit
def loss_and_gradient(model, x):
    return nnx.value_and_grad(lambda model: jnp.sum(model(x)))(model)


def test_shared_nnx_instance_warns_in_a_trace():
    with pytest.warns(UserWarning, match=SHARING):
        loss_and_gradient(OfNNX(of_nnx()), X)
    graph, state = nnx.split(OfNNX(of_nnx()))
    with pytest.warns(UserWarning, match=SHARING):
        jax.jit(lambda state: nnx.merge(graph, state)(X))(state)


def test_shared_option_silences_nnx():
    loss_and_gradient(OfNNX(of_nnx(shared=True)), X)


def test_own_nnx_layers_are_silent():
    model = OfNNX(of_nnx(), of_nnx())
    for _ in range(2):
        loss_and_gradient(model, X)
        model(X)


def test_microbatches_of_nnx_are_silent():
    model = OfNNX(of_nnx(), of_nnx())

    @nnx.jit
    def step(model):
        for x in (X, 2 * X):
            loss_and_gradient(model, x)

    step(model)


@pytest.mark.parametrize("batch", [(4,), (1, 4), (1, 1, 4)])
def test_one_value_a_feature_warns(batch):
    layer = TRAINED()
    variables = layer.init(jax.random.key(1), jnp.ones(batch))
    with pytest.warns(UserWarning, match=ONE_VALUE):
        _, updates = layer.apply(variables, jnp.ones(batch), mutable=["batch_stats"])
    assert not updates["batch_stats"]["count"].any()


def test_hidden_batch_warns_without_its_axis_name():
    running = initial_stats(jax.nn.swish, shape=(4,))
    with pytest.warns(UserWarning, match="axis_name"):
        jax.vmap(lambda x: anact(jax.nn.swish, x, running))(X)
    _, new = jax.vmap(lambda x: anact(jax.nn.swish, x, running, axis_name="batch"), axis_name="batch")(X)
    assert new.count.all()


def test_one_value_is_silent_where_nothing_updates():
    running = initial_stats(jax.nn.swish, shape=(4,))
    anact(jax.nn.swish, X[0], running, use_running_average=True)
    anact(jax.nn.swish, X[0], running, update=False)
    form = Standardized(axis=None)
    anact(jax.nn.swish, X[0], initial_stats(jax.nn.swish, form), form)


def test_groups_of_one_shard_warn():
    running = initial_stats(jax.nn.swish, shape=(4,))

    def step(x, groups):
        return anact(jax.nn.swish, x, running, axis_name="batch", axis_index_groups=groups)

    with pytest.warns(UserWarning, match=ONE_VALUE):
        jax.vmap(lambda x: step(x, [[i] for i in range(8)]), axis_name="batch")(X)
    jax.vmap(lambda x: step(x, [[0, 1, 2, 3], [4, 5, 6, 7]]), axis_name="batch")(X)
