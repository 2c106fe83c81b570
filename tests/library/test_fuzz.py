"""Generated cases over the pure part and the modules: finite input gives finite output, errors are documented ones."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import anact_jax.linen
import anact_jax.nnx
from anact_jax import (
    ACTIVATIONS,
    Published,
    Standardized,
    activation_stats,
    anact,
    initial_stats,
    update_stats,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:a batch of one value")]

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SHAPES = ((), (1,), (7,), (4, 3), (1, 5), (2, 3, 4), (2, 2, 2, 3), (0, 3))
SIGNATURES, DRAWS = 48, 224  # of options and shapes, each compiled once; of values for each
BOTH = (False, True)
KINDS = (Standardized, Standardized, Published)


def values(rng, shape, dtype):
    """Finite input, degenerate in one of many ways."""
    x = rng.standard_normal(shape)
    top = float(jnp.finfo(dtype).max)
    x = [
        lambda: x,
        lambda: np.zeros(shape),
        lambda: -np.zeros(shape),
        lambda: np.full(shape, rng.choice([-3.0, 0.1, 100.0])),  # constant
        lambda: -1 - np.abs(x),  # a dead ReLU
        lambda: 1e4 + x,
        lambda: 1e4 + 1e-3 * x,
        lambda: x * 10.0 ** rng.uniform(-8, 4, shape),
        lambda: x * 1e-6,
        lambda: x * 1e-20,
        lambda: x * 1e-40,
        lambda: x * np.minimum(1e14, top / 100),
        lambda: x * np.minimum(1e20, top / 100),  # too large to be measured
        lambda: np.where(rng.random(shape) < 0.2, 1e3, 0),  # spikes
        lambda: np.where(rng.random(shape) < 0.5, 0, x),
        lambda: np.sign(x),
    ][rng.integers(16)]()
    return np.asarray(np.clip(x, -top / 16, top / 16), dtype)


def masks(rng, shape):
    """From none to all."""
    return np.asarray(rng.random(shape) < rng.choice([0, 0.3, 0.9, 1]))


def signatures(seed):
    """Options that fit together, at random, each shape, dtype, form and activation often enough."""
    rng = random.Random(seed)
    each = [itertools.cycle(rng.sample(sorted(v, key=str), len(v))) for v in (SHAPES, KINDS, ACTIVATIONS, DTYPES)]
    cycles = zip(*each, strict=True)
    for shape, kind, name, dtype in itertools.islice(cycles, SIGNATURES):
        common = {"center": rng.choice(BOTH), "epsilon": rng.choice([0.0, 1e-6])}
        more = {
            "std": rng.choice([0.5, 1.0]),
            "tempering": rng.choice([None, 0.05, 0.5]),
            "axis": rng.choice([None, *range(-len(shape), len(shape))]),
            "stop_gradient": rng.choice(BOTH),
        }
        yield (
            shape,
            dtype,
            name,
            rng.choice(BOTH),  # a mask?
            kind(**common, **(more if kind is Standardized else {})),
            {
                "momentum": rng.choice([0.0, 0.9, 1.0]),
                "use_running_average": rng.choice(BOTH),
                "update": rng.choice([None, *BOTH]),
            },
        )


def draws(signature, number):
    """Inputs, masks or None, and earlier batches that the running statistics come from."""
    shape, dtype, _, masked, *_ = signature
    rng = np.random.default_rng(number)
    x = np.stack([values(rng, shape, dtype) for _ in range(DRAWS)])
    mask = np.stack([masks(rng, shape) for _ in range(DRAWS)]) if masked else None
    return x, mask, rng.standard_normal((DRAWS, *shape)).astype(np.float32)


def check(y, wide, state, x):
    """Everything finite; the output may exceed a narrow dtype only where the same in float32 does."""
    y, wide, largest = np.asarray(y, np.float32), np.asarray(wide), float(jnp.finfo(x.dtype).max)
    assert np.isfinite(np.asarray(x, np.float32)).all()
    assert not np.isnan(y).any()
    assert np.isfinite(wide).all()
    assert np.isfinite(y[np.abs(wide) < largest]).all()
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(leaf).all()


CASES = [pytest.param(number, signature, id=str(number)) for number, signature in enumerate(signatures(0))]


def test_there_are_ten_thousand_cases():
    assert len(CASES) * DRAWS >= 10_000


@pytest.mark.parametrize(("number", "signature"), CASES)
def test_pure_functions_stay_finite(number, signature):
    """Output, state, and the gradient of what passes through."""
    shape, _, name, _, form, options = signature
    f = ACTIVATIONS[name]
    x, mask, earlier = draws(signature, number)
    prior = initial_stats(f, form, () if form.axis is None else (shape[form.axis],))

    @jax.jit
    @jax.vmap
    def case(x, mask, earlier):
        batch = activation_stats(form.activation(f), earlier, axis=form.axis, moments=form.moments)
        running = update_stats(prior, batch)
        y, state = anact(f, x, running, form, mask=mask, **options)
        wide, pull = jax.vjp(lambda x: anact(f, x, running, form, mask=mask, **options)[0], x.astype(jnp.float32))
        return y, wide, state, pull(jnp.ones_like(wide))[0]

    y, wide, state, gradient = case(x, mask, earlier)
    check(y, wide, state, x)
    # Beyond that some activations' own derivatives overflow (JAX's gelu takes x^3), and squares of variances.
    moderate = np.abs(np.asarray(x, np.float32)).reshape(DRAWS, -1).max(1, initial=0) < 1e6
    assert np.isfinite(np.asarray(gradient)[moderate]).all()


@pytest.mark.parametrize(("number", "signature"), CASES[::4])
def test_modules_stay_finite_and_agree(number, signature):
    shape, dtype, name, _, form, options = signature
    x, mask, _ = draws(signature, number)
    features = None if form.axis is None else shape[form.axis]
    linen = anact_jax.linen.ANAct(ACTIVATIONS[name], form=form, **options)
    variables = linen.init(jax.random.key(0), jnp.zeros(shape, dtype))

    @jax.jit
    @jax.vmap
    def case(x, mask):
        y, updates = linen.apply(variables, x, mask=mask, mutable=["batch_stats"])
        wide, _ = linen.apply(variables, x.astype(jnp.float32), mask=mask, mutable=["batch_stats"])
        module = anact_jax.nnx.ANAct(ACTIVATIONS[name], features, form=form, **options)
        same = module(x, mask=mask)
        return y, wide, updates, same, jax.tree.leaves(nnx.state(module))

    y, wide, updates, same, new = case(x, mask)
    check(y, wide, (updates, new), x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(same, np.float32))


def test_wrong_arguments_end_in_documented_errors():
    """Options at random, right and wrong: a result of x's shape and dtype, or a ValueError or TypeError."""
    rng = random.Random(1)
    outcomes = {"fine": 0, "refused": 0}
    for _ in range(600):
        shape = rng.choice([*SHAPES, (3, 4)])
        dtype = rng.choice([*DTYPES, *DTYPES, jnp.int32, jnp.bool_, jnp.complex64])
        name = rng.choice(sorted(ACTIVATIONS))
        axis = rng.choice([None, None, -1, 0, 0, -1, 1, 5, -9, (0, 1), 0.5])
        masked = rng.choice([None, None, None, shape, (1,) * len(shape), (2, 2), (*shape, 1)])
        std = rng.choice([0.5, 0.5, 1.0, 0.0, -1.0])
        options = {
            "momentum": rng.choice([0.9, 0.9, 0.0, 1.0, -0.1, 1.5, float("nan")]),
            "axis_name": rng.choice([None] * 5 + ["batch"]),
        }
        x = jax.ShapeDtypeStruct(shape, dtype)
        mask = None if masked is None else jnp.ones(masked, rng.choice([jnp.bool_, jnp.float32]))
        inside = type(axis) is int and -len(shape) <= axis < len(shape)
        features = (shape[axis],) if inside else ()
        try:
            form = Standardized(std=std, axis=axis)
            running = initial_stats(ACTIVATIONS[name], form, features)
            y, _ = jax.eval_shape(
                lambda x, n=name, r=running, f=form, m=mask, o=options: anact(ACTIVATIONS[n], x, r, f, mask=m, **o), x
            )
        except (ValueError, TypeError) as error:
            outcomes["refused"] += 1
            assert len(str(error)) > 20
        else:
            outcomes["fine"] += 1
            assert (y.shape, y.dtype) == (shape, dtype)
    assert min(outcomes.values()) > 40
