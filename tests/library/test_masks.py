"""Padding: left out of the statistics, normalized like all the rest."""

import chex
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import Published, Standardized
from anact_jax.linen import NSwish

SEQUENCES = 1.0 + 2.0 * jax.random.normal(jax.random.key(0), (6, 5, 4))
IMAGES = 1.0 + 2.0 * jax.random.normal(jax.random.key(1), (6, 5, 5, 3))
LENGTHS = np.array([5, 3, 1, 0, 4, 2])
INSIDE = np.arange(5) < LENGTHS[:, None]  # (example, position)

MASKS = {
    "sequence, each position": (SEQUENCES, INSIDE[:, :, None]),
    "sequence, whole examples": (SEQUENCES, (LENGTHS > 2)[:, None, None]),
    "sequence, same positions": (SEQUENCES, (np.arange(5) < 3)[:, None]),
    "sequence, each element": (SEQUENCES, np.random.default_rng(0).random((6, 5, 4)) < 0.5),
    "images, whole examples": (IMAGES, (LENGTHS > 2)[:, None, None, None]),
    "images, each pixel": (IMAGES, (INSIDE[:, :, None] & INSIDE[:, None, :])[..., None]),
    "images, same pixels": (IMAGES, np.tri(5, dtype=bool)[:, :, None]),
    "all": (IMAGES, np.array(True)),
}


@pytest.mark.parametrize("form", [Standardized(), Published()], ids=["default", "published"])
@pytest.mark.parametrize(
    "dtype", [bool, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (np.int32, np.float32))]
)
@pytest.mark.parametrize("name", MASKS)
def test_any_broadcastable_mask(name, dtype, form):
    x, mask = MASKS[name]
    layer = NSwish(use_running_average=False, form=form)
    variables = layer.init(jax.random.key(0), x)
    y, updates = layer.apply(variables, x, mask=jnp.asarray(mask.astype(dtype)), mutable=["batch_stats"])

    valid = np.broadcast_to(mask, x.shape)
    values = np.asarray(x)
    measured = {"mean_in": values, "mean_out": helpers.VALUE_AND_SLOPE["swish"](np.float64(values))[0]}
    for name in set(measured) & set(form.moments):
        values = measured[name]
        parts = [values[..., i][valid[..., i]] for i in range(x.shape[-1])] if form.axis else [values[valid]]
        means, variances = (np.squeeze([getattr(np, moment)(part) for part in parts]) for moment in ("mean", "var"))
        np.testing.assert_allclose(updates["batch_stats"][name], means, rtol=1e-5)
        np.testing.assert_allclose(updates["batch_stats"][name.replace("mean", "var")], variances, rtol=1e-5)
    # After one batch the running statistics are its own: inference treats every element the same, masked or not.
    inference = NSwish(use_running_average=True, form=form)
    np.testing.assert_allclose(y, inference.apply(updates, x), rtol=1e-5, atol=1e-6)


class Tagger(nn.Module):
    """One answer for each position of a padded sequence."""

    @nn.compact
    def __call__(self, x, mask):
        for _ in range(2):
            x = NSwish(use_running_average=False)(nn.Dense(8)(x), mask=mask)
        return nn.Dense(1)(x)


def test_what_padding_holds_changes_nothing():
    mask = jnp.asarray(INSIDE[:, :, None])
    variables = Tagger().init(jax.random.key(0), SEQUENCES, mask)

    def loss(params, x):
        y, updates = Tagger().apply({**variables, "params": params}, x, mask, mutable=["batch_stats"])
        return jnp.sum(y**2, where=mask), updates["batch_stats"]

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, state), (gradient, by_input) = step(variables["params"], jnp.where(mask, SEQUENCES, 0.0))
    other = step(variables["params"], jnp.where(mask, SEQUENCES, 1e4))
    chex.assert_trees_all_close(((value, state), gradient), (other[0], other[1][0]), rtol=1e-5, atol=1e-6)
    assert not by_input[~INSIDE].any()

    packed = SEQUENCES[INSIDE][:, None]  # the valid positions alone
    ones = jnp.ones((len(packed), 1, 1))
    y, updates = Tagger().apply(variables, packed, ones, mutable=["batch_stats"])
    np.testing.assert_allclose(jnp.sum(y**2), value, rtol=1e-5)
    chex.assert_trees_all_close(updates["batch_stats"], state, rtol=1e-5, atol=1e-6)
