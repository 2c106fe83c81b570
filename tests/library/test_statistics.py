import functools

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

import anact_jax.statistics
from anact_jax import ACTIVATIONS, MOMENTS, Stats, activation_stats, informative


def normal(shape, mean=0.0, std=1.0, seed=0):
    return (mean + std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def assert_moments(actual, expected, rtol):
    for field, got, want in zip(Stats._fields, actual, expected, strict=True):
        # A mean near zero is as good as the spread that it averages over.
        scale = {"mean_in": np.sqrt(expected[2]), "mean_out": np.sqrt(expected[4])}.get(field, 0.0)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-30 + rtol * np.max(scale), err_msg=field)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.3), (-1.0, 3.0)])
def test_equals_float64_oracle(name, mean, std):
    x = normal((32, 8, 8, 16), mean, std)
    assert_moments(activation_stats(ACTIVATIONS[name], jnp.asarray(x)), helpers.stats(name, x), rtol=3e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_offset_of_ten_thousand(name):
    x = normal((64, 256), 1e4)
    assert_moments(activation_stats(ACTIVATIONS[name], jnp.asarray(x)), helpers.stats(name, x), rtol=1e-3)


@pytest.mark.parametrize(("axis", "reduced"), [(None, None), (-1, (0, 1)), (1, (0, 2)), (0, (1, 2))])
def test_axis(axis, reduced):
    x = normal((6, 5, 4))
    stats = activation_stats(jax.nn.swish, jnp.asarray(x), axis=axis)
    expected = helpers.stats("swish", x, axes=reduced)
    chex.assert_shape(list(stats), np.shape(expected[0]))
    assert_moments(stats, expected, rtol=3e-5)


@pytest.mark.parametrize("shape", [(6, 1, 1, 1), (6, 4, 4, 1), (6, 4, 4, 3), (4, 1), (1, 1, 1, 1)])
def test_broadcast_mask_equals_slicing(shape):
    """Masks that broadcast were miscounted elsewhere (flax#3508, keras#20815)."""
    x = normal((6, 4, 4, 3))
    mask = np.random.default_rng(1).random(shape) < 0.6
    mask.flat[0] = True
    spoiled = np.where(np.broadcast_to(mask, x.shape), x, np.nan)
    for given in (mask, mask.astype(np.float32), mask.astype(np.int8)):
        stats = activation_stats(jax.nn.gelu, jnp.asarray(spoiled), mask=jnp.asarray(given))
        assert_moments(stats, helpers.stats("gelu", x, mask=mask), rtol=3e-5)
    sliced = x[np.broadcast_to(mask, x.shape)]
    chex.assert_trees_all_close(stats, activation_stats(jax.nn.gelu, jnp.asarray(sliced)), rtol=2e-6, atol=1e-7)


def test_mask_per_feature_counts_each_feature():
    x, mask = normal((50, 3)), np.ones((50, 3), bool)
    mask[:20, 0], mask[:49, 1] = False, False
    stats = activation_stats(jnp.tanh, jnp.asarray(x), axis=-1, mask=jnp.asarray(mask))
    np.testing.assert_array_equal(stats.count, [30, 1, 50])
    assert_moments(stats, helpers.stats("tanh", x, axes=0, mask=mask), rtol=3e-5)


def test_users_own_callable():
    def f(x):
        return jnp.where(x > 0.5, x**3, 0.2 * x) + jnp.sin(x)

    x = normal((4000,))
    stats = activation_stats(f, jnp.asarray(x))
    wide = x.astype(np.float64)
    slope = np.where(wide > 0.5, 3 * wide**2, 0.2) + np.cos(wide)
    np.testing.assert_allclose(stats.slope_sq, np.mean(slope**2), rtol=3e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_measured_in_float32(dtype):
    x = jnp.asarray(normal((2**16,), 0.3)).astype(dtype)
    stats = activation_stats(jax.nn.swish, x)
    chex.assert_type(list(stats), jnp.float32)
    assert_moments(stats, helpers.stats("swish", np.asarray(x, np.float32)), rtol=3e-5)


def test_float64_stays():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((64, 3))
        stats = activation_stats(jax.nn.mish, jnp.asarray(x))
        chex.assert_type(list(stats), jnp.float64)
        assert_moments(stats, helpers.stats("mish", x), rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e4, 1e-30])
def test_constant_input_is_finite_and_tells_nothing(value):
    stats = activation_stats(jax.nn.relu, jnp.full((7, 3), value))
    chex.assert_tree_all_finite(stats)
    assert float(stats.var_in) == 0.0
    assert not informative(stats)


def test_no_elements():
    for stats in (
        activation_stats(jax.nn.swish, jnp.zeros((0, 4))),
        activation_stats(jax.nn.swish, jnp.ones((5, 4)), mask=jnp.zeros((5, 1), bool)),
    ):
        assert [float(v) for v in stats] == [0.0] * 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_spoiled_batch_has_a_finite_gradient(bad):
    x = jnp.asarray(normal((8, 3))).at[2, 1].set(bad)

    def total(x):
        stats = activation_stats(jax.nn.swish, x, axis=-1)
        return jnp.sum(jnp.where(informative(stats), sum(stats[1:]), 0.0)), stats

    gradient, stats = jax.grad(total, has_aux=True)(x)
    np.testing.assert_array_equal(informative(stats), [True, False, True])
    np.testing.assert_array_equal(np.isnan(stats.mean_out), [False, True, False])
    chex.assert_tree_all_finite(gradient)
    assert np.all(np.asarray(gradient)[:, [0, 2]] != 0)


@pytest.mark.parametrize("moments", [MOMENTS, ("mean_out", "var_out")])
@pytest.mark.parametrize("row", [0, 20])
def test_infinite_input_is_flagged_though_f_bounds_it(moments, row):
    x = jnp.asarray(normal((32, 3))).at[row, 1].set(-jnp.inf)
    stats = activation_stats(jax.nn.relu, x, axis=-1, moments=moments)
    np.testing.assert_array_equal(informative(stats), [True, False, True])


def test_first_elements_far_from_the_rest():
    """The others are summed about them."""
    x = normal((4096, 3))
    x[:8] += 30
    stats = activation_stats(jax.nn.elu, jnp.asarray(x), axis=-1)
    assert_moments(stats, helpers.stats("elu", x, axes=(0,)), rtol=5e-5)


def test_masked_elements_get_no_gradient():
    x, mask = jnp.array([0.0, -1.0, 2.0, 3.0]), jnp.array([False, False, True, True])
    gradient = jax.grad(lambda x: sum(activation_stats(jnp.log, x, mask=mask)[1:]))(x)
    np.testing.assert_array_equal(gradient[:2], 0.0)
    assert np.all(np.isfinite(gradient) & ((gradient != 0) == mask))


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
        mask = jnp.asarray([[True], [True], [False], [True], [True]])
        for f in (jax.nn.swish, jnp.tanh, jax.nn.softplus):
            check_grads(
                lambda x, f=f: tuple(activation_stats(f, jnp.asarray(x), mask=mask)[1:]),
                (x,),
                order=1,
                modes=("fwd", "rev"),
            )


def test_traces_once():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def measure(x):
        return activation_stats(jax.nn.swish, x)

    chex.clear_trace_counter()
    for seed in range(3):
        measure(jnp.asarray(normal((16, 4), seed=seed)))


# Eight devices, every shard with its own share of valid elements, the third with none.
SHARDED_MASK = np.arange(6)[None, :, None] < np.array([6, 1, 0, 3, 2, 6, 5, 4])[:, None, None]


def sharded_stats(how, x, mask, **options):
    measure = functools.partial(activation_stats, jax.nn.swish, **options)
    if how == "pmap":
        return jax.pmap(lambda x, m: measure(x, mask=m, axis_name="batch"), axis_name="batch")(x, mask)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    over_batch = PartitionSpec("batch")
    if how == "shard_map":
        mapped = jax.shard_map(
            lambda x, m: measure(x, mask=m, axis_name="batch"),
            mesh=mesh,
            in_specs=(over_batch, over_batch),
            out_specs=PartitionSpec(),  # accepted only if every shard is known to hold the same value
        )
        return jax.jit(mapped)(x, mask)
    sharding = NamedSharding(mesh, over_batch)
    return jax.jit(lambda x, m: measure(x, mask=m))(jax.device_put(x, sharding), jax.device_put(mask, sharding))


@pytest.fixture(params=["few", "many"])
def shards_are(request, monkeypatch):
    """Whether eight shards are few, which gather their moments, or many, which sum twice."""
    monkeypatch.setattr(anact_jax.statistics, "FEW_SHARDS", {"few": 8, "many": 7}[request.param])


@pytest.mark.parametrize("how", ["pmap", "shard_map", "jit"])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize(("offset", "rtol"), [(0.5, 1e-6), pytest.param(1e4, 1e-3, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_shards_equal_the_full_batch(how, axis, offset, rtol, shards_are):
    """Cross-device statistics were wrong elsewhere with uneven masks (flax#2417)."""
    x, mask = jnp.asarray(normal((8, 6, 5), offset)), jnp.asarray(SHARDED_MASK)
    whole = activation_stats(jax.nn.swish, x, mask=mask, axis=axis)
    shards = sharded_stats(how, x, mask, axis=axis)
    if how == "pmap":
        for shard in range(8):
            chex.assert_trees_all_close(jax.tree.map(lambda v, i=shard: v[i], shards), whole, rtol=rtol)
    else:
        chex.assert_trees_all_close(shards, whole, rtol=rtol)


GROUPS = ((0, 3, 4, 6), (1, 2, 5, 7))


@pytest.mark.parametrize("how", ["pmap", "vmap"])
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_groups_of_shards_share_a_batch(how, shards_are):
    x, mask = jnp.asarray(normal((8, 6, 5), 0.5)), jnp.asarray(SHARDED_MASK)
    x = x.at[1].set(jnp.nan)  # spoils its own group, not the other

    def measure(x, mask):
        return activation_stats(jax.nn.swish, x, mask=mask, axis_name="batch", axis_index_groups=GROUPS)

    stats = (jax.pmap if how == "pmap" else jax.vmap)(measure, axis_name="batch")(x, mask)
    good, bad = (jnp.array(group) for group in GROUPS)
    whole = activation_stats(jax.nn.swish, x[good], mask=mask[good])
    for shard in GROUPS[0]:
        chex.assert_trees_all_close(jax.tree.map(lambda v, i=shard: v[i], stats), whole, rtol=1e-6)
    assert float(stats.count[1]) == 5 * int(mask[bad].sum())
    assert jnp.isnan(stats.mean_in[bad]).all()


@pytest.mark.parametrize("groups", [((0, 1, 2), (3, 4, 5, 6)), ((0, 1, 2, 3), (3, 4, 5, 6, 7)), ()])
def test_groups_must_hold_each_shard_once(groups):
    def measure(x):
        return activation_stats(jax.nn.swish, x, axis_name="batch", axis_index_groups=groups)

    with pytest.raises(ValueError, match="each index of axis 'batch', 0 to 7, once"):
        jax.vmap(measure, axis_name="batch")(jnp.ones((8, 3)))


def test_two_mapped_axes_share_one_batch():
    x = jnp.asarray(normal((2, 3, 10), 5.0))
    measure = functools.partial(activation_stats, jax.nn.relu, axis_name=("a", "b"))
    stats = jax.vmap(jax.vmap(measure, axis_name="b"), axis_name="a")(x)
    whole = activation_stats(jax.nn.relu, x)
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[1, 2], stats), whole, rtol=1e-6)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: activation_stats(jax.nn.relu, x.astype(int)),
            TypeError,
            "x must be floating point, got dtype int32",
        ),
        (
            lambda x: activation_stats(lambda x: x > 0, x),
            TypeError,
            "floating-point values; <lambda> returned dtype bool",
        ),
        (lambda x: activation_stats(jnp.sum, x), ValueError, r"elementwise: sum turned shape \(4, 3\) into \(\)"),
        (lambda x: activation_stats(jax.nn.relu, x, axis=2), ValueError, "must lie between -2 and 1"),
        (lambda x: activation_stats(jax.nn.relu, x, mask=jnp.ones((4,))), ValueError, "does not broadcast"),
        (lambda x: activation_stats(jax.nn.relu, x, mask=jnp.ones((1, 4, 3))), ValueError, "does not broadcast"),
        (lambda x: activation_stats(jax.nn.relu, x, axis_name="bach"), ValueError, "'bach' is not bound here"),
        (lambda x: activation_stats(jax.nn.relu, x, axis_index_groups=((0,),)), ValueError, "name it by axis_name"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((4, 3)))


@pytest.mark.parametrize("share", [8 / 100_000, 0.01, 0.33])
@pytest.mark.parametrize("start", [0.0, 0.4, 0.66])
def test_outlying_run_costs_no_digits(share, start):
    """Rows far from all others, wherever they lie: a tenth of a percent of the variance, of x and of f(x)."""
    rows, far = 100_000, 3000.0
    x = np.random.default_rng(0).normal(size=(rows, 2)).astype(np.float32)
    first = int(start * rows)
    x[first : first + int(share * rows)] -= far

    def f(x):
        return jax.nn.relu(x + far)

    found = jax.jit(lambda x: activation_stats(f, x, axis=-1))(x)
    for ours, values in ((found.var_in, np.float64(x)), (found.var_out, np.maximum(np.float64(x) + far, 0))):
        np.testing.assert_allclose(ours, values.var(0), rtol=1e-3)
