import copy
import functools
import itertools
import pickle

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import anact_jax.linen
import anact_jax.nnx
from anact_jax import (
    ACTIVATIONS,
    MOMENTS,
    Published,
    Standardized,
    Stats,
    anact,
    gaussian_stats,
    initial_stats,
    restored,
)

# How modules thread state does not depend on their form; the published one has a single number of each kind a layer.
ANAct, NReLU, NSwish = (
    functools.partial(module, form=Published())
    for module in (anact_jax.linen.ANAct, anact_jax.linen.NReLU, anact_jax.linen.NSwish)
)

X = 0.5 + 2.0 * jax.random.normal(jax.random.key(0), (32, 6))
NAMES = {
    "relu": "NReLU",
    "leaky_relu": "NLeakyReLU",
    "elu": "NELU",
    "selu": "NSELU",
    "tanh": "NTanh",
    "sigmoid": "NSigmoid",
    "softplus": "NSoftplus",
    "swish": "NSwish",
    "gelu": "NGELU",
    "mish": "NMish",
}


class Net(nn.Module):
    """A stranger's model, written for BatchNorm, with the activation swapped."""

    @nn.compact
    def __call__(self, x, train):
        x = NSwish(use_running_average=not train)(nn.Dense(8)(x))
        x = NReLU()(nn.Dense(8)(x), use_running_average=not train)
        return nn.Dense(2)(x)


def state_of(variables, path="batch_stats"):
    return Stats(**variables[path])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "module"), list(NAMES.items()))
def test_named_modules_are_anact_of_that_function(name, module):
    layer = getattr(anact_jax.linen, module)(use_running_average=False)
    assert getattr(layer.fn, "f", layer.fn) is ACTIVATIONS[name]
    variables = layer.init(jax.random.key(0), X)
    y, _ = layer.apply(variables, X, mutable=["batch_stats"])
    f = ACTIVATIONS[name]
    np.testing.assert_array_equal(y, anact(f, X, initial_stats(f, shape=(6,)))[0])


def test_every_activation_has_a_named_module():
    assert {ACTIVATIONS[name] for name in NAMES} == set(ACTIVATIONS.values())
    assert anact_jax.linen.NSiLU is anact_jax.linen.NSwish


def test_defaults_of_named_modules_are_those_of_anact():
    for name in NAMES.values():
        layer = getattr(anact_jax.linen, name)()
        assert layer.form == Standardized()


@pytest.mark.parametrize(
    "form",
    [
        Standardized(),
        Standardized(std=1.2, center=False, axis=None, tempering=0.1, stop_gradient=True),
        Published(center=True),
    ],
    ids=["default", "options", "published"],
)
def test_is_a_shell_around_the_pure_function(form):
    layer = anact_jax.linen.ANAct(jnp.tanh, momentum=0.7, form=form)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    running = state_of(variables)
    chex.assert_trees_all_equal(running, initial_stats(jnp.tanh, form, () if form.axis is None else (6,)))
    for step in range(4):
        x = X * (1.0 + step)
        y, variables = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        expected, running = anact(jnp.tanh, x, running, form, momentum=0.7)
        np.testing.assert_array_equal(y, expected)
        chex.assert_trees_all_equal(state_of(variables), running)
    y = layer.apply(variables, X, use_running_average=True)
    np.testing.assert_array_equal(y, anact(jnp.tanh, X, running, form, use_running_average=True)[0])


def test_init_depends_on_no_input_and_needs_no_axis():
    """`init` moved statistics or wanted the mapped axis elsewhere (flax#1250)."""
    layer = NSwish(axis_name="batch", use_running_average=False)
    states = [layer.init(jax.random.key(0), x) for x in (X, 100.0 * X, jnp.full_like(X, jnp.nan))]
    chex.assert_trees_all_equal(*states)
    chex.assert_trees_all_close(state_of(states[0]), gaussian_stats(jax.nn.swish))
    assert np.isfinite(NSwish(axis_name="batch").apply(states[0], X, use_running_average=True)).all()


def test_layer_called_twice_updates_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            act = NSwish(use_running_average=not train, shared=True)
            return act(act(x) * 3.0)

    variables = Twice().init(jax.random.key(0), X, train=True)
    assert float(variables["batch_stats"]["NSwish_0"]["count"]) == 0
    y, variables = Twice().apply(variables, X, train=True, mutable=["batch_stats"])
    first, running = anact(jax.nn.swish, X, gaussian_stats(jax.nn.swish), Published())
    second, running = anact(jax.nn.swish, first * 3.0, running, Published())
    np.testing.assert_allclose(y, second, rtol=1e-6)
    chex.assert_trees_all_close(state_of(variables["batch_stats"], "NSwish_0"), running, rtol=1e-6)


def test_stock_batchnorm_loop_runs_unchanged():
    """The training loop of Flax's own BatchNorm guide, word for word in what it threads."""

    class BatchNormNet(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
            return nn.Dense(2)(x)

    def run(model):
        variables = model.init(jax.random.key(0), X, train=False)
        params, batch_stats = variables["params"], variables["batch_stats"]
        optimizer = optax.sgd(0.3)
        opt_state = optimizer.init(params)

        @jax.jit
        def step(params, batch_stats, opt_state, x, labels):
            def loss_fn(params):
                logits, updates = model.apply(
                    {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
                )
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

            (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates_params, opt_state = optimizer.update(grads, opt_state)
            return optax.apply_updates(params, updates_params), updates["batch_stats"], opt_state, loss

        labels = (X[:, 0] > 0.5).astype(jnp.int32)
        losses = []
        for _ in range(60):
            params, batch_stats, opt_state, loss = step(params, batch_stats, opt_state, X, labels)
            losses.append(float(loss))
        logits = model.apply({"params": params, "batch_stats": batch_stats}, X, train=False)
        return losses, float(jnp.mean(jnp.argmax(logits, -1) == labels))

    for model in (BatchNormNet(), Net()):
        losses, accuracy = run(model)
        assert losses[-1] < 0.5 * losses[0]
        assert accuracy > 0.9


def test_evaluation_writes_nothing():
    variables = Net().init(jax.random.key(0), X, train=False)
    y, updates = Net().apply(variables, X, train=False, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    np.testing.assert_array_equal(y, Net().apply(variables, X, train=False))


def test_missing_mutable_is_answered_with_the_fix():
    variables = Net().init(jax.random.key(0), X, train=False)
    with pytest.raises(
        ValueError, match=r"NSwish 'NSwish_0' updates its running statistics.*mutable=\['batch_stats'\]"
    ):
        Net().apply(variables, X, train=True)


def test_missing_state_is_answered_with_the_fix():
    params = Net().init(jax.random.key(0), X, train=False)["params"]
    with pytest.raises(
        ValueError, match=r"NSwish 'NSwish_0' has no running statistics: collection 'batch_stats' is missing"
    ):
        Net().apply({"params": params}, X, train=False)


def test_unbound_axis_in_training_is_named():
    layer = NSwish(axis_name="batch", use_running_average=False)
    with pytest.raises(ValueError, match="axis_name='batch' is not bound here"):
        layer.apply(layer.init(jax.random.key(0), X), X, mutable=["batch_stats"])


def test_groups_of_shards():
    layer = NSwish(use_running_average=False, axis_name="batch", axis_index_groups=[[0, 1], [2, 3]])
    variables = layer.init(jax.random.key(0), X)
    x = X.reshape(4, 8, 6)
    _, updates = jax.vmap(lambda x: layer.apply(variables, x, mutable=["batch_stats"]), axis_name="batch")(x)
    means = updates["batch_stats"]["mean_in"]
    np.testing.assert_allclose(means, jnp.repeat(jnp.stack([X[:16].mean(), X[16:].mean()]), 2), rtol=1e-6)


def test_mode_is_set_exactly_once_as_for_batchnorm():
    for module in (NSwish, nn.BatchNorm):
        with pytest.raises(ValueError, match="use_running_average"):
            module().init(jax.random.key(0), X)
        with pytest.raises(ValueError, match="use_running_average"):
            module(use_running_average=True).init(jax.random.key(0), X, use_running_average=True)


def test_mode_in_the_constructor_works_in_sequential():
    """`nn.Sequential` passes keyword arguments to its first layer only (flax#3017)."""
    model = nn.Sequential([nn.Dense(4), NSwish(use_running_average=False), nn.Dense(2)])
    variables = model.init(jax.random.key(0), X)
    _, updates = model.apply(variables, X, mutable=["batch_stats"])
    assert float(updates["batch_stats"]["layers_1"]["count"]) == 1


@pytest.mark.parametrize(("use_running_average", "update"), list(itertools.product((True, False), (True, False, None))))
def test_using_and_updating_are_independent(use_running_average, update):
    layer = NSwish(use_running_average=use_running_average, update=update)
    variables = layer.init(jax.random.key(0), X)
    y, updates = layer.apply(variables, X, mutable=["batch_stats"])
    expected, running = anact(
        jax.nn.swish,
        X,
        gaussian_stats(jax.nn.swish),
        Published(),
        use_running_average=use_running_average,
        update=update,
    )
    np.testing.assert_array_equal(y, expected)
    chex.assert_trees_all_equal(state_of(updates), running)
    if update is False:  # then no mutable collection is needed
        np.testing.assert_array_equal(layer.apply(variables, X), expected)


def test_one_trace_a_mode_over_ten_steps():
    """A fresh but equal module traced again elsewhere (flax#4994)."""

    @jax.jit
    def evaluate(variables, x):
        return Net().apply(variables, x, train=False)

    def apply(model, variables, x, train):
        return model.apply(variables, x, train=train, mutable=["batch_stats"])

    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(apply, n=2), static_argnames=("model", "train"))
    variables = Net().init(jax.random.key(0), X, train=False)
    for _ in range(10):
        _, updates = step(Net(), variables, X, train=True)
        variables = {**variables, **updates}
        step(Net(), variables, X, train=False)
    assert float(variables["batch_stats"]["NSwish_0"]["count"]) == 10
    assert hash(NSwish()) == hash(NSwish())
    assert NSwish() == NSwish()


def test_learned_correction_is_bounded():
    layer = anact_jax.linen.NSwish(form=Published(learned=True), use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    chex.assert_trees_all_equal(variables["params"]["alpha"], jnp.zeros(()))
    plain = NSwish(use_running_average=False)
    y, _ = layer.apply(variables, X, mutable=["batch_stats"])
    y_plain, _ = plain.apply({"batch_stats": variables["batch_stats"]}, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, y_plain)

    far = {**variables, "params": {"alpha": jnp.float32(100.0)}}
    y_far, _ = layer.apply(far, X, mutable=["batch_stats"])
    np.testing.assert_allclose(y_far - y_plain, 0.3 * jax.nn.swish(X), rtol=1e-4, atol=1e-5)

    def loss(params):
        y, _ = layer.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return jnp.sum(y)

    gradient = jax.grad(loss)(variables["params"])["alpha"]
    np.testing.assert_allclose(gradient, 0.3 * jnp.sum(jax.nn.swish(X)), rtol=1e-4)


def test_collection_can_be_named():
    layer = NSwish(collection="act_stats", use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    assert set(variables) == {"act_stats"}
    with pytest.raises(ValueError, match=r"mutable=\['act_stats'\]"):
        layer.apply(variables, X)


def test_mask_in_the_call():
    mask = jnp.arange(32)[:, None] < 20
    layer = NSwish(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    _, updates = layer.apply(variables, X, mask=mask, mutable=["batch_stats"])
    _, sliced = layer.apply(variables, X[:20], mutable=["batch_stats"])
    chex.assert_trees_all_close(updates, sliced, rtol=1e-6)


def test_remat_changes_nothing_and_updates_once():
    class Remat(nn.Module):
        remat: bool

        @nn.compact
        def __call__(self, x):
            module = nn.remat(NSwish) if self.remat else NSwish
            return module(use_running_average=False, name="act")(x)

    variables = Remat(False).init(jax.random.key(0), X)

    def loss(x, remat):
        y, updates = Remat(remat).apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(y**2), updates

    (gradient, updates), (gradient_remat, updates_remat) = (
        jax.grad(loss, has_aux=True)(X, remat) for remat in (False, True)
    )
    chex.assert_trees_all_close(gradient, gradient_remat, rtol=1e-6)
    chex.assert_trees_all_equal(updates, updates_remat)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fn": "swish"}, TypeError, "fn must be an elementwise function"),
        ({"form": "median"}, ValueError, "unknown form 'median'; expected 'default', 'published'"),
        ({"form": None, "std": -1.0}, ValueError, "std must be a positive number"),
        ({"momentum": 1.5}, ValueError, r"\[0, 1\], got 1.5"),
    ],
)
def test_bad_options_are_refused_when_made(options, error, message):
    with pytest.raises(error, match=message):
        ANAct(**options)


@pytest.mark.parametrize(
    "module",
    [name if name in ("NReLU", "NTanh") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES.values()],
)
def test_pickles_and_copies_give_the_same_output(module):
    layer = getattr(anact_jax.linen, module)(use_running_average=True)
    variables = layer.init(jax.random.key(0), X)
    y = layer.apply(variables, X)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert copied == layer
        np.testing.assert_array_equal(copied.apply(variables, X), y)


def test_form_by_the_name_default_is_no_form():
    layers = [anact_jax.linen.NSwish(use_running_average=False, **form) for form in ({"form": "default"}, {})]
    assert layers[0] == layers[1]
    variables = layers[0].init(jax.random.key(0), X)
    chex.assert_trees_all_equal(*(layer.apply(variables, X, mutable=["batch_stats"]) for layer in layers))


def test_traced_momentum_gives_the_state_of_the_number():
    def two_steps(momentum):
        layer = anact_jax.linen.NSwish(momentum=momentum, use_running_average=False)
        variables = layer.init(jax.random.key(0), X)
        for x in (X, 2 * X, X - 1):
            _, variables = layer.apply(variables, x, mutable=["batch_stats"])
        return variables

    chex.assert_trees_all_close(jax.jit(two_steps)(0.3), two_steps(0.3), rtol=1e-5)
    assert not np.allclose(
        two_steps(0.3)["batch_stats"]["var_out"], two_steps(0.9)["batch_stats"]["var_out"], rtol=0.01
    )


def test_missing_mode_is_an_error():
    model = nn.Sequential([nn.Dense(4), NSwish()])
    with pytest.raises(ValueError, match=r"NSwish 'layers_1' does not know.*pass use_running_average=False or True"):
        model.init(jax.random.key(0), X)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("module", ["ANAct", "NSwish", "NReLU"])
def test_array_in_the_constructor_is_an_error(module):
    with pytest.raises(TypeError, match=rf"{module} is a layer: .* array of shape \(32, 6\) and dtype float32"):
        getattr(anact_jax.linen, module)(X)


def test_one_layer_at_two_widths_is_an_error():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            act = anact_jax.linen.NSwish(use_running_average=False)
            return act(nn.Dense(3)(act(x)))

    with pytest.raises(ValueError, match=r"NSwish 'NSwish_0' has statistics of shape \(6,\).*serves one width"):
        Shared().init(jax.random.key(0), X)
    layer = anact_jax.linen.NSwish(use_running_average=True)
    with pytest.raises(ValueError, match=r"of shape \(6,\), but its input has \(4,\) features.*serves one width"):
        layer.apply(layer.init(jax.random.key(0), X), X[:, :4])


# State as version 0.1.0 saved it, by the names of its moments.
SAVED = {"default": ("count", "mean_out", "var_out"), "published": ("count", *MOMENTS)}


def saved_state(kind, shape):
    values = {"count": 7.0, "mean_in": 0.4, "var_in": 3.0, "mean_out": 0.6, "var_out": 1.5, "slope_sq": 0.7}
    return {name: jnp.full(shape, values[name], jnp.float32) for name in SAVED[kind]}


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize(
    ("form", "shape"),
    [
        (Standardized(), (6,)),
        (Standardized(), ()),
        (Standardized(axis=None), ()),
        (Published(), ()),
        (Published(center=True, learned=True), ()),
    ],
    ids=["default", "default of one", "one a layer", "published", "learned"],
)
def test_state_of_version_0_1_loads(form, shape, use_running_average):
    kind = "published" if isinstance(form, Published) else "default"
    alpha = jnp.float32(0.4) if form.learned else None
    state = saved_state(kind, shape)
    variables = {"batch_stats": state} | ({"params": {"alpha": alpha}} if form.learned else {})
    layer = anact_jax.linen.NSwish(form=form, use_running_average=use_running_average)
    chex.assert_trees_all_equal(restored(state, state), state)
    y, updates = layer.apply(variables, X, mutable=["batch_stats"])
    expected, running = anact(
        jax.nn.swish, X, Stats(**state), form, use_running_average=use_running_average, alpha=alpha
    )
    np.testing.assert_array_equal(y, expected)
    chex.assert_trees_all_equal(state_of(updates), running)
    assert float(running.count.max()) == (7 if use_running_average else 8)
    chex.assert_trees_all_equal(layer.bind(variables).running_stats(), Stats(**state))
    numbers = layer.bind(variables).normalization()
    chex.assert_trees_all_equal(numbers, form.factor_and_shift(Stats(**state), alpha))

    same = anact_jax.nnx.NSwish(6, form=form, use_running_average=use_running_average)
    nnx.update(same, nnx.State(state | ({"alpha": alpha} if form.learned else {})))
    chex.assert_trees_all_equal(same.running_stats(), Stats(**state))
    chex.assert_trees_all_equal(same.normalization(), numbers)
    np.testing.assert_array_equal(same(X), y)
    chex.assert_trees_all_equal(same.running_stats(), running)


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize(
    ("saved", "form", "message"),
    [
        ("published", Standardized(), "has mean_in, var_in, slope_sq too, which form Standardized.* does not use"),
        ("published", Standardized(axis=None), "has mean_in, var_in, slope_sq too, which form Standardized"),
        ("default", Published(), "has no mean_in, var_in, slope_sq, which form Published.* uses"),
    ],
)
def test_state_of_another_form_is_refused(saved, form, message, use_running_average):
    layer = anact_jax.linen.NSwish(use_running_average=use_running_average, form=form)
    remedy = r".*the form it was trained with.*anact_jax\.restored\(saved, fresh, start_anew=True\)"
    for shape in ((), (6,)):
        variables = {"batch_stats": saved_state(saved, shape)}
        with pytest.raises(ValueError, match=f"NSwish {message}{remedy}"):
            layer.apply(variables, X, mutable=["batch_stats"])
        for read in (layer.bind(variables).running_stats, layer.bind(variables).normalization):
            with pytest.raises(ValueError, match="has no batch_stats/mean_in" if saved == "default" else message):
                read()
        fresh = layer.init(jax.random.key(0), X)["batch_stats"]
        with pytest.raises(ValueError, match="the model's form"):
            restored(variables["batch_stats"], fresh)
        state = restored(variables["batch_stats"], fresh, start_anew=True)
        y, updates = layer.apply({"batch_stats": state}, X, mutable=["batch_stats"])
        np.testing.assert_array_equal(y, layer.apply({"batch_stats": fresh}, X, mutable=["batch_stats"])[0])
        assert set(updates["batch_stats"]) == set(fresh)


def test_default_state_of_one_layer_holds_three_arrays():
    layer = anact_jax.linen.NSwish(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    assert set(variables["batch_stats"]) == {"count", "mean_out", "var_out"}
    _, updates = layer.apply(variables, X, mutable=["batch_stats"])
    assert set(updates["batch_stats"]) == {"count", "mean_out", "var_out"}


def test_normalization_is_that_of_inference():
    for form in (Standardized(), Published(learned=True)):
        layer = anact_jax.linen.NSwish(form=form, use_running_average=False)
        variables = layer.init(jax.random.key(0), X)
        _, updates = layer.apply(variables, X, mutable=["batch_stats"])
        bound = layer.copy(use_running_average=True).bind(variables | updates)
        factor, shift = bound.normalization()
        expected = np.asarray(factor).reshape(1, -1) * (jax.nn.swish(X) - np.asarray(shift).reshape(1, -1))
        np.testing.assert_allclose(bound(X), expected, rtol=1e-5, atol=1e-6)
        assert bound.running_stats().mean_out.shape == () if form.learned else (6,)
        narrow = jax.tree.map(lambda value: value.astype(jnp.bfloat16), variables)
        chex.assert_type(bound.clone().bind(narrow).running_stats().mean_out, jnp.float32)


@pytest.mark.parametrize("use_running_average", [False, True])
def test_dtype_is_that_of_the_output_alone(use_running_average):
    layer = anact_jax.linen.NSwish(use_running_average=use_running_average)
    variables = layer.init(jax.random.key(0), X)
    for x, dtype in ((X, jnp.bfloat16), (X.astype(jnp.bfloat16), jnp.float32)):
        plain, state = layer.apply(variables, x, mutable=["batch_stats"])
        cast, cast_state = layer.clone(dtype=dtype).apply(variables, x, mutable=["batch_stats"])
        assert cast.dtype == dtype
        chex.assert_trees_all_equal(cast_state, state)
        rounding = 2.0**-7
        np.testing.assert_allclose(cast.astype(jnp.float32), plain.astype(jnp.float32), rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("use_running_average", [False, True])
def test_state_in_bfloat16_stays_in_it_and_works(use_running_average):
    layer = anact_jax.linen.NSwish(use_running_average=use_running_average)
    variables = layer.init(jax.random.key(0), X)
    narrow = jax.tree.map(lambda value: value.astype(jnp.bfloat16), variables)
    y, updates = layer.apply(narrow, X, mutable=["batch_stats"])
    expected, expected_updates = layer.apply(variables, X, mutable=["batch_stats"])
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, narrow)
    chex.assert_type(y, jnp.float32)
    np.testing.assert_allclose(y, expected, rtol=0.02, atol=0.02)
    widened = jax.tree.map(lambda value: value.astype(jnp.float32), updates)
    chex.assert_trees_all_close(widened, expected_updates, rtol=2.0**-8)


class LearnedSlope(nn.Module):
    """A function that closes over a parameter, and that tempering changes in more than its scale."""

    @nn.compact
    def __call__(self, x):
        slope = self.param("slope", nn.initializers.constant(0.25), ())
        return anact_jax.linen.ANAct(lambda x: x * jax.nn.sigmoid(5 * slope * x), use_running_average=False)(x)


def prelu():
    fn = nn.PReLU(param_dtype=jnp.float64, negative_slope_init=0.25)
    return anact_jax.linen.ANAct(fn, use_running_average=False)


@pytest.mark.parametrize("make", [LearnedSlope, prelu])
def test_learned_slope_gradient(make):
    with jax.enable_x64(True):
        model, x = make(), jnp.asarray(X, jnp.float64)
        variables = model.init(jax.random.key(0), x)

        @jax.jit
        def loss(params):
            y, _ = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.mean(y**3) + jnp.mean(jnp.sin(x) * y)

        params = variables["params"]
        (slope,) = jax.tree.leaves(params)
        assert float(slope) == 0.25
        (gradient,) = jax.tree.leaves(jax.grad(loss)(params))
        above, below = (loss(jax.tree.map(lambda value, h=h: value + h, params)) for h in (1e-5, -1e-5))
        np.testing.assert_allclose(gradient, (above - below) / 2e-5, rtol=1e-6)
        assert abs(float(gradient)) > 1e-3


class Scaled(nn.Module):
    """An elementwise module that holds another."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.param("scale", nn.initializers.constant(2.0), ()) * self.inner(x)


class InSetup(nn.Module):
    make: object

    def setup(self):
        self.act = self.make()

    def __call__(self, x):
        return self.act(x)


class InCompact(nn.Module):
    make: object

    @nn.compact
    def __call__(self, x):
        return self.make()(x)


class Given(nn.Module):
    act: nn.Module

    def __call__(self, x):
        return self.act(x)


@pytest.mark.parametrize(
    ("place", "lift"),
    [
        *((place, "plain") for place in ("top", "setup", "compact", "given")),
        *(("top", "remat"), ("compact", "jit")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(("top", "setup", "compact", "given"), ("remat", "jit"))
            if case not in (("top", "remat"), ("compact", "jit"))
        ),
    ],
)
def test_module_within_a_module_learns_wherever_made(place, lift):
    lift = {"plain": lambda module: module, "remat": nn.remat, "jit": nn.jit}[lift]

    def make():
        fn = nn.Sequential([Scaled(nn.PReLU(negative_slope_init=0.25)), jnp.tanh])
        return lift(anact_jax.linen.ANAct)(fn, use_running_average=False)

    model = {
        "top": make,
        "setup": lambda: InSetup(make),
        "compact": lambda: InCompact(make),
        "given": lambda: Given(make()),
    }
    model = model[place]()
    variables = model.init(jax.random.key(0), X)
    assert len(jax.tree.leaves(variables["params"])) == 2

    def loss(params):
        y, _ = model.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y))

    def by_hand(slope, scale):
        f = lambda x: jnp.tanh(scale * jnp.where(x > 0, x, slope * x))  # noqa: E731
        return jnp.sum(jnp.sin(anact(f, X, anact_jax.initial_stats(f, shape=(6,)))[0]))

    found = {
        path[-1].key: value for path, value in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables["params"]))
    }
    expected = jax.grad(by_hand, argnums=(0, 1))(jnp.float32(0.25), jnp.float32(2.0))
    np.testing.assert_allclose((found["negative_slope"], found["scale"]), expected, rtol=1e-3)


def test_module_made_in_the_function_is_refused():
    with pytest.raises(
        TypeError, match=r"fn of ANAct 'ANAct_0' makes a module each time .*PReLU_0.*ANAct\(nn.PReLU\(\)\)"
    ):
        InCompact(lambda: anact_jax.linen.ANAct(lambda x: nn.PReLU()(x), use_running_average=False)).init(
            jax.random.key(0), X
        )


SPELLINGS = {
    "jitted": jax.nn.relu,
    "ufunc": jnp.tanh,
    "partial": functools.partial(jax.nn.leaky_relu, negative_slope=0.2),
}


@pytest.mark.parametrize("fn", SPELLINGS.values(), ids=SPELLINGS)
def test_layers_of_functions_of_jax_copy_and_pickle(fn):
    layer = anact_jax.linen.ANAct(fn, use_running_average=True)
    variables = layer.init(jax.random.key(0), X)
    assert copy.deepcopy(layer) == layer
    copied = pickle.loads(pickle.dumps(layer))
    np.testing.assert_array_equal(copied.apply(variables, X), layer.apply(variables, X))
    assert copied == layer or isinstance(fn, functools.partial)


def test_momentum_for_each_channel():
    momentum = jnp.linspace(0.0, 1.0, 6)

    def two_steps(momentum):
        layer = anact_jax.linen.NSwish(momentum=momentum, use_running_average=False)
        variables = layer.init(jax.random.key(0), X)
        for x in (X, 2 * X, X - 1):
            _, variables = layer.apply(variables, x, mutable=["batch_stats"])
        return variables["batch_stats"]["mean_out"]

    found = two_steps(momentum)
    for channel in range(6):
        np.testing.assert_allclose(found[channel], two_steps(float(momentum[channel]))[channel], rtol=1e-5)
    with pytest.raises(ValueError, match=r"momentum must be one number, or one for each feature, of shape \(6,\); got"):
        two_steps(momentum[:3])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        two_steps(momentum * 2)


def test_layer_with_a_module_works_as_an_nnx_module():
    layer = anact_jax.linen.ANAct(nn.PReLU(), use_running_average=False)
    model = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(X)
    y = model(X, mutable=["batch_stats"])
    expected, updates = layer.apply(layer.init(jax.random.key(0), X), X, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.mean_out[...], updates["batch_stats"]["mean_out"], rtol=1e-5)
    assert model.fn["negative_slope"][...] == nn.PReLU().negative_slope_init


def test_nnx_module_in_a_linen_layer_is_refused():
    with pytest.raises(TypeError, match=r"is the NNX module PReLU, .* or anact_jax.nnx.ANAct"):
        anact_jax.linen.ANAct(nnx.PReLU())
