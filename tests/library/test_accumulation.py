"""Gradient accumulation: what microbatches change, and how they can equal the full batch."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import activation_stats, gaussian_stats, update_stats
from anact_jax.linen import NSwish

X = 0.5 + 2.0 * jax.random.normal(jax.random.key(0), (32, 6))
MICROBATCHES = X.reshape(4, 8, 6)


class Net(nn.Module):
    axis_name: str | None = None
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            act = NSwish(axis_name=self.axis_name, momentum=self.momentum, use_running_average=False)
            x = act(nn.Dense(8)(x))
        return nn.Dense(1)(x)


VARIABLES = Net().init(jax.random.key(1), X)


def gradient_and_state(model, variables, x):
    def loss(params):
        y, updates = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.mean((y - x.sum(-1, keepdims=True)) ** 2), updates["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables["params"])


def test_microbatches_on_an_axis_are_one_batch():
    def microbatch(x):
        gradient, state = gradient_and_state(Net("microbatch"), VARIABLES, x)
        return jax.lax.pmean(gradient, "microbatch"), state

    gradient, state = jax.jit(jax.vmap(microbatch, axis_name="microbatch"))(MICROBATCHES)
    expected = jax.jit(lambda x: gradient_and_state(Net(), VARIABLES, x))(X)
    for i in range(4):
        chex.assert_trees_all_close(
            jax.tree.map(lambda v, i=i: v[i], (gradient, state)), expected, rtol=2e-5, atol=1e-5
        )


@pytest.mark.slow
def test_microbatches_in_sequence_are_batches():
    def microbatch(stats, x):
        gradient, stats = gradient_and_state(Net(), {**VARIABLES, "batch_stats": stats}, x)
        return stats, gradient

    stats, gradients = jax.lax.scan(microbatch, VARIABLES["batch_stats"], MICROBATCHES)
    assert (stats["NSwish_0"]["count"] == 4).all()
    own = [gradient_and_state(Net(), VARIABLES, x)[0] for x in MICROBATCHES]
    mean = jax.tree.map(lambda *each: sum(each) / 4, *own)
    chex.assert_trees_all_close(jax.tree.map(lambda g: g.mean(0), gradients), mean, rtol=1e-4, atol=1e-5)
    # Not the gradient of the full batch: every microbatch is normalized with its own statistics.
    full, _ = gradient_and_state(Net(), VARIABLES, X)
    assert not all(np.allclose(a, b, rtol=0.01) for a, b in zip(*map(jax.tree.leaves, (mean, full)), strict=True))


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_root_of_momentum_keeps_the_memory(momentum):
    running = activation_stats(jax.nn.swish, X)._replace(count=jnp.float32(10_000))
    batch = gaussian_stats(jax.nn.swish)._replace(count=jnp.float32(8), mean_in=jnp.float32(100))
    expected = update_stats(running, batch, momentum=momentum)
    for _ in range(4):
        running = update_stats(running, batch, momentum=momentum**0.25)
    chex.assert_trees_all_close(running._replace(count=expected.count), expected, rtol=1e-4)
