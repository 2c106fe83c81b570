"""A training step over eight devices, as people write it, against one device on the same batch."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from anact_jax.linen import NSwish

X = 1.0 + jax.random.normal(jax.random.key(0), (64, 5))
Y = jnp.sin(X.sum(-1, keepdims=True))


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        for _ in range(3):
            x = nn.Dense(8)(x)
            x = NSwish(axis_name=self.axis_name, use_running_average=not train, center=True, stop_gradient=False)(x)
        return nn.Dense(1)(x)


def step(model, average, variables, x, y):
    """One step of SGD; `average` takes the mean of the gradients over devices."""

    def loss(params):
        prediction, updates = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.mean((prediction - y) ** 2), updates

    gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
    gradient = average(gradient)
    return {"params": jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], gradient), **updates}


def train(one_step, variables, x, y, steps=10):
    for _ in range(steps):
        variables = one_step(variables, x, y)
    return variables


@pytest.fixture(scope="module")
def single():
    variables = Net().init(jax.random.key(1), X, train=True)
    return variables, train(jax.jit(functools.partial(step, Net(), lambda g: g)), variables, X, Y)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmapped_step(single):
    start, expected = single
    mean = functools.partial(jax.lax.pmean, axis_name="batch")
    pmapped = jax.pmap(functools.partial(step, Net("batch"), mean), axis_name="batch")
    replicated = jax.tree.map(lambda v: jnp.broadcast_to(v[None], (8, *v.shape)), start)
    result = train(pmapped, replicated, X.reshape(8, 8, 5), Y.reshape(8, 8, 1))
    for device in (0, 7):
        on_device = jax.tree.map(lambda v, i=device: v[i], result)
        chex.assert_trees_all_close(on_device, expected, rtol=1e-5, atol=1e-5)


def test_shard_mapped_step(single):
    start, expected = single
    # Inside shard_map the gradient of replicated parameters is already summed over the devices.
    mapped = jax.shard_map(
        functools.partial(step, Net("batch"), lambda gradient: jax.tree.map(lambda g: g / 8, gradient)),
        mesh=Mesh(np.array(jax.devices()), ("batch",)),
        in_specs=(PartitionSpec(), PartitionSpec("batch"), PartitionSpec("batch")),
        out_specs=PartitionSpec(),
    )
    chex.assert_trees_all_close(train(jax.jit(mapped), start, X, Y), expected, rtol=1e-5, atol=1e-5)
