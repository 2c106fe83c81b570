import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax import MOMENTS, Published, Standardized, Stats, activation_stats, gaussian_stats, restored, update_stats

PRIOR = gaussian_stats(jax.nn.swish)


def batch(seed, shape=(64,), **options):
    return activation_stats(jax.nn.swish, 1.0 + 2.0 * jax.random.normal(jax.random.key(seed), shape), **options)


def test_first_batch_replaces_the_prior():
    first = batch(0)
    new = update_stats(PRIOR, first)
    chex.assert_trees_all_equal(new._replace(count=first.count), first)
    assert float(new.count) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_plain_average_until_warm_then_exponential(momentum):
    """new = momentum * old + (1 - momentum) * batch; the opposite convention was a trap elsewhere (scvi-tools#2309)."""
    running, expected = PRIOR, None
    for step in range(25):
        new = batch(step)
        running = update_stats(running, new, momentum=momentum)
        values = np.array(new[1:], np.float64)
        keep = min(momentum, step / (step + 1))
        expected = values if expected is None else keep * expected + (1 - keep) * values
        np.testing.assert_allclose(running[1:], expected, rtol=1e-5)
        assert float(running.count) == step + 1


def test_repeated_batch_is_a_fixed_point_at_every_step():
    """Running averages were wrong for hundreds of steps elsewhere (flax#1360, equinox#659, #955)."""
    same, running = batch(0), PRIOR
    for _ in range(300):
        running = update_stats(running, same, momentum=0.99)
        chex.assert_trees_all_equal(*map(Published().factor_and_shift, (running, same)))


MOMENTS_OF = {"default": ("mean_out", "var_out"), "published": MOMENTS}


@pytest.mark.parametrize(("saved", "fresh"), [("default", "published"), ("published", "default")])
def test_restored_refuses_another_form(saved, fresh):
    states = {
        name: {"block": {"act": {"count": 9.0 * (name == saved), **dict.fromkeys(moments, 1.0 + (name == saved))}}}
        for name, moments in MOMENTS_OF.items()
    }
    for same in states.values():
        assert restored(same, same) == same
    which = r"no block/act/mean_in, .* uses" if saved == "default" else r"have block/act/mean_in, .* does not use"
    with pytest.raises(ValueError, match=rf"{which}; make the layer with the form .*start_anew=True"):
        restored(states[saved], states[fresh])
    assert restored(states[saved], states[fresh], start_anew=True) == states[fresh]


def test_restored_starts_missing_layers_anew():
    state = {"act": {"count": 9.0, "mean_out": 0.3, "var_out": 0.5}}
    fresh = {name: {"count": 0.0, "mean_out": 0.1, "var_out": 0.2} for name in ("act", "new")}
    with pytest.raises(ValueError, match=r"have no new, which"):
        restored(state, fresh)
    assert restored(state, fresh, start_anew=True) == {**fresh, **state}


def bad_batches():
    good = batch(0)
    yield "empty", good._replace(count=jnp.zeros(()))
    for field in Stats._fields:
        for value in (jnp.nan, jnp.inf, -jnp.inf):
            yield f"{field}={value}", good._replace(**{field: jnp.asarray(value)})
    for f, x in [(jax.nn.swish, jnp.zeros(9)), (jax.nn.relu, -1 - jnp.arange(9.0)), (jax.nn.relu, jnp.ones(1))]:
        yield f"{f.__name__} of {x[:3]}", activation_stats(f, x)


@pytest.mark.parametrize(("name", "bad"), list(bad_batches()))
def test_bad_batch_changes_nothing(name, bad):
    running = update_stats(PRIOR, batch(1))
    chex.assert_trees_all_equal(update_stats(running, bad), running)
    after = update_stats(update_stats(running, bad), batch(2))
    chex.assert_trees_all_equal(after, update_stats(running, batch(2)))


def test_each_feature_decides_for_itself():
    running = Stats(*(jnp.broadcast_to(value, (3,)) for value in PRIOR))
    x = jax.random.normal(jax.random.key(0), (16, 3)).at[3, 1].set(jnp.nan)
    new = update_stats(running, activation_stats(jax.nn.swish, x, axis=-1))
    np.testing.assert_array_equal(new.count, [1, 0, 1])
    chex.assert_trees_all_equal(jax.tree.map(lambda v: v[1], new), PRIOR)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_state_dtype_never_changes(dtype):
    x = jax.random.normal(jax.random.key(0), (64,)).astype(dtype)
    running = PRIOR
    for _ in range(3):
        running = update_stats(running, activation_stats(jax.nn.swish, x))
        chex.assert_type(list(running), jnp.float32)
    with jax.enable_x64(True):
        wide = activation_stats(jax.nn.swish, jnp.linspace(-1.0, 1.0, 9, dtype=jnp.float64))
        chex.assert_type(list(update_stats(running, wide)), jnp.float32)


def test_untrained_layer_uses_the_reference():
    for form in (Standardized(), Published()):
        chex.assert_tree_all_finite(form.factor_and_shift(PRIOR))


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_must_be_a_weight(momentum):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        update_stats(PRIOR, batch(0), momentum=momentum)
