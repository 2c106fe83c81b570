"""Invariants of the method over generated input."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from anact_jax import (
    ACTIVATIONS,
    Published,
    Standardized,
    Stats,
    activation_stats,
    anact,
    gains,
    gaussian_stats,
    update_stats,
)

FORMS = [Standardized(center=center, epsilon=0.0) for center in (True, False)]
FORMS += [Published(center=center, epsilon=0.0) for center in (True, False)]

N = 24
values = st.lists(st.floats(-30, 30, width=32), min_size=N, max_size=N).map(lambda v: np.array(v, np.float32))
masks = st.lists(st.booleans(), min_size=N, max_size=N).filter(any).map(np.array)
names = st.sampled_from(sorted(ACTIVATIONS))
forms = st.sampled_from(FORMS)
stats_strategy = st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2, *[st.floats(0, 1e6, width=32)] * 3).map(
    lambda v: Stats(*(jnp.float32(x) for x in (7, v[0], v[2], v[1], v[3], v[4])))
)

measure = {name: jax.jit(lambda x, m, f=f: activation_stats(f, x, mask=m)) for name, f in ACTIVATIONS.items()}
EVERY = np.ones(N, bool)


@given(names, values, masks, st.floats(allow_nan=True, allow_infinity=True, width=32))
def test_masked_equals_deleted_whatever_stands_there(name, x, mask, filler):
    stats = measure[name](np.where(mask, x, np.float32(filler)), mask)
    kept = np.full(N, x[mask][0])
    kept[: mask.sum()] = x[mask]  # the same elements, packed to the front
    packed = measure[name](kept, np.arange(N) < mask.sum())
    chex.assert_trees_all_close(stats, packed, rtol=1e-4, atol=1e-4)


@given(names, values, st.permutations(range(N)))
def test_order_does_not_matter(name, x, order):
    chex.assert_trees_all_close(measure[name](x, EVERY), measure[name](x[np.array(order)], EVERY), rtol=1e-4, atol=1e-4)


@given(values.filter(lambda x: x.std() > 0.1), st.sampled_from([1e-3, 0.1, 7.0, 1e4]), forms)
def test_scale_law(x, scale, form):
    """ReLU scales with its input: its gains do not depend on the scale, and the default takes it out."""
    x = np.where(np.abs(x) < 1e-20, 0, x)  # what scaling down would take to 0
    small, large = measure["relu"](x, EVERY), measure["relu"](np.float32(scale) * x, EVERY)
    chex.assert_trees_all_close(gains(small), gains(large), rtol=1e-3)
    first, second = (form.factor_and_shift(stats).factor for stats in (small, large))
    if small.var_out > 0 and isinstance(form, Standardized):
        second = second * scale
    chex.assert_trees_all_close(first, second, rtol=1e-3)


@given(names, values.filter(lambda x: x.std() > 0.1), forms)
def test_forms_do_what_they_say_on_any_batch(name, x, form):
    stats = measure[name](x, EVERY)
    factor, shift = form.factor_and_shift(stats)
    forward, backward = (float(factor**2 * gain) for gain in gains(stats, shift=shift))
    if min(gains(stats, shift=shift)) < 1e-6:
        return  # a gain that vanished cannot be restored
    if isinstance(form, Standardized):
        np.testing.assert_allclose(forward * stats.var_in, form.std**2, rtol=1e-3)
    else:
        np.testing.assert_allclose((1 / forward + 1 / backward) / 2, 1, rtol=1e-3)


@given(stats_strategy, forms)
def test_factor_is_finite_and_positive(stats, form):
    factor, shift = form.factor_and_shift(stats)
    assert np.isfinite(shift)
    assert np.isfinite(factor)
    assert factor > 0


@given(st.lists(st.one_of(values, st.just(np.full(N, np.nan, np.float32)))), st.floats(0, 1))
def test_running_statistics_stay_within_what_was_seen(batches, momentum):
    running = gaussian_stats(jax.nn.swish)
    seen = []
    for x in batches:
        batch = measure["swish"](x, EVERY)
        running = update_stats(running, batch, momentum=momentum)
        if np.isfinite(batch.var_in) and batch.var_in > 0 and batch.var_out > 0:
            seen.append(float(batch.var_in))
    chex.assert_tree_all_finite(running)
    assert float(running.count) == len(seen)
    if seen:
        assert min(seen) * (1 - 1e-5) <= float(running.var_in) <= max(seen) * (1 + 1e-5)


_steps = {
    (name, mode): jax.jit(lambda x, s, f=f, mode=mode: anact(f, x, s, Published(center=True), use_running_average=mode))
    for name, f in ACTIVATIONS.items()
    for mode in (True, False)
}


@given(names, values)
def test_first_batch_training_is_inference(name, x):
    trained, running = _steps[name, False](x, gaussian_stats(ACTIVATIONS[name]))
    evaluated, same = _steps[name, True](x, running)
    chex.assert_trees_all_equal(same, running)
    np.testing.assert_allclose(evaluated, trained, rtol=1e-5, atol=1e-5)
    chex.assert_tree_all_finite((trained, running))
