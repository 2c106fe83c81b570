"""A training step over eight devices, as people write it, against one device on the same batch."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import anact_jax.nnx
from anact_jax.linen import NSwish

IMAGES = 1.0 + jax.random.normal(jax.random.key(0), (64, 6, 6, 3))
TARGETS = jnp.sin(IMAGES.sum((1, 2, 3)))[:, None]
# Every shard of eight examples with its own share of valid ones, the third with none.
VALID = (np.arange(8) < np.array([8, 1, 0, 3, 2, 8, 7, 4])[:, None]).astype(np.float32).reshape(64)
MESH = Mesh(np.array(jax.devices()), ("batch",))
SHARDED, REPLICATED = PartitionSpec("batch"), PartitionSpec()
no_pmap_warning = pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")


class ResNet(nn.Module):
    """Two residual blocks between two activations, every activation normalized over the valid examples."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, valid, train):
        act = functools.partial(NSwish, axis_name=self.axis_name, use_running_average=not train)
        mask = valid[:, None, None, None]
        x = act()(nn.Conv(4, (3, 3))(x), mask=mask)
        for _ in range(2):
            y = act()(nn.Conv(4, (3, 3))(x), mask=mask)
            x = x + act()(nn.Conv(4, (3, 3))(y), mask=mask)
        return nn.Dense(1)(jnp.mean(x, axis=(1, 2)))


def step(model, over_shards, combined, variables, images, valid, targets):
    """One step of SGD; `over_shards` adds up a number, `combined` the gradient of the shards' parts of the loss."""

    def loss(params):
        state = {**variables, "params": params}
        prediction, updates = model.apply(state, images, valid, train=True, mutable=["batch_stats"])
        errors = jnp.sum((prediction - targets) ** 2, axis=-1)
        return jnp.sum(errors * valid) / over_shards(jnp.sum(valid)), updates

    gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
    gradient = combined(gradient)
    return {"params": jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], gradient), **updates}


def same(value):
    """For what is whole already."""
    return value


def train(one_step, variables, steps, data):
    for _ in range(steps):
        variables = one_step(variables, *data)
    return variables


@pytest.fixture(scope="module", params=[False, True], ids=["all valid", "uneven"])
def data(request):
    return IMAGES, jnp.asarray(VALID) if request.param else jnp.ones(64), TARGETS


@functools.cache
def start():
    return ResNet().init(jax.random.key(1), IMAGES[:1], jnp.ones(1), train=True)


def on_one_device(steps, data):
    return train(jax.jit(functools.partial(step, ResNet(), same, same)), start(), steps, data)


def pmapped(steps, data):
    psum = functools.partial(jax.lax.psum, axis_name="batch")
    sums = functools.partial(jax.tree.map, psum)
    one_step = jax.pmap(functools.partial(step, ResNet("batch"), psum, sums), axis_name="batch")
    replicated = jax.tree.map(lambda v: jnp.broadcast_to(v[None], (8, *v.shape)), start())
    result = train(one_step, replicated, steps, [value.reshape(8, 8, *value.shape[1:]) for value in data])
    first, last = (jax.tree.map(lambda v, i=device: v[i], result) for device in (0, 7))
    chex.assert_trees_all_equal(first["batch_stats"], last["batch_stats"])
    return last


def shard_mapped(steps, data):
    # Inside shard_map the gradient of replicated parameters is already summed over the devices.
    psum = functools.partial(jax.lax.psum, axis_name="batch")
    one_step = jax.shard_map(
        functools.partial(step, ResNet("batch"), psum, same),
        mesh=MESH,
        in_specs=(REPLICATED, SHARDED, SHARDED, SHARDED),
        out_specs=REPLICATED,
    )
    return train(jax.jit(one_step), start(), steps, data)


def sharded(steps, data):
    data = jax.device_put(data, NamedSharding(MESH, SHARDED))
    variables = jax.device_put(start(), NamedSharding(MESH, REPLICATED))
    return train(jax.jit(functools.partial(step, ResNet(), same, same)), variables, steps, data)


@pytest.mark.slow
@pytest.mark.parametrize("how", [pmapped, shard_mapped, sharded])
@no_pmap_warning
def test_eight_devices_train_as_one(how, data):
    once, expected_once = how(1, data), on_one_device(1, data)
    chex.assert_trees_all_close(once["batch_stats"], expected_once["batch_stats"], rtol=1e-5, atol=1e-6)
    result, expected = how(10, data), on_one_device(10, data)
    chex.assert_trees_all_close(result["params"], expected["params"], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(result["batch_stats"], expected["batch_stats"], rtol=1e-5, atol=1e-5)


def forward(model, merge, variables, images, valid):
    _, updates = model.apply(variables, images, valid, train=True, mutable=["batch_stats"])
    return merge(updates["batch_stats"])


def all_reduces(model, merge, out_specs):
    """Their number in the compiled forward pass of five normalized activations on eight devices."""
    mapped = jax.shard_map(
        functools.partial(forward, model, merge),
        mesh=MESH,
        in_specs=(REPLICATED, SHARDED, SHARDED),
        out_specs=out_specs,
    )
    return jax.jit(mapped).lower(start(), IMAGES, jnp.ones(64)).compile().as_text().count(" all-reduce(")


def test_collectives_one_a_layer_one_a_step_or_none():
    def mean(state):
        return jax.lax.pmean(state, "batch")

    def own(state):
        return jax.tree.map(lambda value: value[None], state)

    assert all_reduces(ResNet("batch"), same, REPLICATED) == 5
    assert all_reduces(ResNet(), mean, REPLICATED) == 1
    assert all_reduces(ResNet(), own, SHARDED) == 0


def test_shards_of_their_own_average_their_states():
    """With one collective a step, or one at the end, running statistics are means over the shards."""
    x = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (4, 16, 5)), jnp.float32)
    layer = NSwish(use_running_average=False, form="published")
    variables = layer.init(jax.random.key(0), x[0])

    def shard(x):
        _, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return updates["batch_stats"], jax.lax.pmean(updates["batch_stats"], "batch")

    own, every_step = jax.vmap(shard, axis_name="batch")(x)
    at_the_end = jax.tree.map(lambda value: value.mean(0), own)
    chex.assert_trees_all_close(jax.tree.map(lambda value: value[1], every_step), at_the_end, rtol=1e-6)
    np.testing.assert_allclose(at_the_end["mean_in"], x.mean(), rtol=1e-5)
    np.testing.assert_allclose(at_the_end["var_in"], x.var((1, 2)).mean(), rtol=1e-5)  # without what lies between them


# A layer under jit alone: the compiler places what it needs between devices, wherever x is divided.

ACTIVATIONS_BY_SHAPE = {
    shape: np.float32(np.random.default_rng(2).normal(0.5, np.linspace(0.5, 3, 16), shape))
    for shape in ((64, 32, 32, 16), (64, 16))
}
DIVIDED = {"batch": ((8,), "b", None), "features": ((8,), None, "b"), "both": ((4, 2), "b", "c")}


def layer_in(framework):
    """A layer's initial state, and a function from state and x to output and next state."""
    if framework == "linen":
        layer = NSwish(use_running_average=False)
        return layer.init(jax.random.key(0), jnp.ones((1, 16))), functools.partial(layer.apply, mutable=["batch_stats"])
    graph, state = nnx.split(anact_jax.nnx.NSwish(16, use_running_average=False))

    def apply(state, x):
        layer = nnx.merge(graph, state, copy=True)  # variables of this trace
        return layer(x), nnx.state(layer)

    return state, apply


@functools.cache
def compiled_layer(framework):
    state, apply = layer_in(framework)

    @jax.jit
    def step(state, x):
        def loss(x):
            y, new = apply(state, x)
            return jnp.sum(y**3), (y, new)

        gradient, (y, new) = jax.grad(loss, has_aux=True)(x)
        return y, gradient, new

    return state, step


@functools.cache
def undivided(framework, shape):
    state, step = compiled_layer(framework)
    first = step(state, ACTIVATIONS_BY_SHAPE[shape])
    return first, step(first[2], -ACTIVATIONS_BY_SHAPE[shape])


@pytest.mark.parametrize(
    ("kind", "framework"),
    [
        (AxisType.Explicit, "linen"),
        (AxisType.Auto, "nnx"),
        pytest.param(AxisType.Explicit, "nnx", marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, "linen", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("shape", ACTIVATIONS_BY_SHAPE, ids=str)
@pytest.mark.parametrize("divided", DIVIDED)
def test_layer_on_a_mesh_equals_one_device(kind, divided, shape, framework):
    sizes, first, last = DIVIDED[divided]
    names = ("b", "c")[: len(sizes)]
    mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))
    spec = PartitionSpec(first, *[None] * (len(shape) - 2), last)
    x = jax.device_put(ACTIVATIONS_BY_SHAPE[shape], NamedSharding(mesh, spec))
    state, step = compiled_layer(framework)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        steps = [step(state, x)]
        if x.ndim == 2:  # once more, from the state as the first step placed it
            steps.append(step(steps[0][2], -x))
    assert steps[0][0].sharding.is_equivalent_to(x.sharding, x.ndim)
    for result, expected in zip(steps, undivided(framework, shape), strict=False):
        chex.assert_trees_all_close(*jax.device_get((result, expected)), rtol=1e-4, atol=5e-5)


def test_meshes_are_explicit_by_default():
    assert jax.make_mesh((8,), ("b",)).axis_types == (AxisType.Explicit,)


@pytest.mark.parametrize("form", ["default", "published"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_partly_manual_shard_map_with_sharded_features(kind, form):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    x = IMAGES[:, 0, 0].repeat(2, -1) + jnp.arange(6.0)[None]
    layer = NSwish(axis_name="data", form=form, use_running_average=False)
    variables = layer.init(jax.random.key(0), x)

    def run(layer, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    def gradient(run, x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(run(x)[0])))(x)

    with jax.set_mesh(mesh):
        over_shards = jax.shard_map(
            functools.partial(run, layer),
            in_specs=PartitionSpec("data"),
            out_specs=(PartitionSpec("data"), PartitionSpec()),
            axis_names={"data"},
        )
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "model")))
        found = jax.device_get(
            (jax.jit(over_shards)(sharded), jax.jit(functools.partial(gradient, over_shards))(sharded))
        )
    alone = functools.partial(run, layer.copy(axis_name=None))
    chex.assert_trees_all_close(found, (alone(x), gradient(alone, x)), rtol=1e-4, atol=1e-5)
