"""Any elementwise function: learned, mutable, short-lived, with a reverse rule alone; nothing stale, nothing kept."""

import functools
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import anact_jax.linen
import anact_jax.nnx
import anact_jax.step
from anact_jax import Published, Standardized, anact, gaussian_stats, initial_stats
from anact_jax.step import check_activation
from anact_jax.tracing import check_elementwise, permanent, traced, while_tracing

X = 0.4 + 1.3 * jax.random.normal(jax.random.key(0), (32, 6))
KEY = jax.random.key(0)
SLOPE = 0.3


def leaky(x, slope):
    return jnp.where(x > 0, x, slope * x)


def swish(x, slope):
    return x * jax.nn.sigmoid(slope * x)


def named(x):
    return x * jnp.tanh(jax.nn.softplus(x))


def reads_a_variable(x):
    return swish(x, jnp.asarray(SLOPE, x.dtype))


WAYS = {
    "closure": lambda f, slope: lambda x: f(x, slope),
    "default argument": lambda f, slope: lambda x, slope=slope: f(x, slope),
    "partial": lambda f, slope: functools.partial(f, slope=slope),
    "jitted closure": lambda f, slope: jax.jit(lambda x: f(x, slope)),
    "custom_jvp closure": lambda f, slope: lambda x: jax.nn.relu(x) - slope * jax.nn.relu(-x),
}


def by_hand(f, x, form):
    """The layer's formula written out, in jnp alone."""
    z = form.activation(f)(x)
    mean, var = jnp.mean(z, 0, keepdims=True), jnp.var(z, 0, keepdims=True)
    if form.stop_gradient:
        mean, var = jax.lax.stop_gradient((mean, var))
    return form.std * (z - mean) / jnp.sqrt(var + form.epsilon)


@pytest.mark.parametrize(
    "way",
    [
        *("closure", "default argument", "custom_jvp closure"),
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("partial", "jitted closure")),
    ],
)
def test_learned_slope_gradient(way):
    f = leaky if way == "custom_jvp closure" else swish
    with jax.enable_x64(True):
        x, form = jnp.asarray(X, jnp.float64), Standardized(std=1.0, tempering=0.1, epsilon=1e-3)

        def ours(slope, x):
            g = WAYS[way](f, slope)
            return jnp.sum(jnp.sin(anact(g, x, initial_stats(g, form, (6,)), form)[0]))

        def expected(slope, x):
            return jnp.sum(jnp.sin(by_hand(WAYS[way](f, slope), x, form)))

        slope = jnp.asarray(0.3)
        found, wanted = (jax.jit(jax.grad(g, argnums=(0, 1)))(slope, x) for g in (ours, expected))
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-10)
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-8, atol=1e-11)
        loss = jax.jit(ours)
        differences = (loss(slope + 1e-5, x) - loss(slope - 1e-5, x)) / 2e-5
        np.testing.assert_allclose(found[0], differences, rtol=1e-6)
        assert abs(float(differences)) > 1e-3
        if way == "closure":
            second = [jax.jit(jax.hessian(g))(slope, x) for g in (ours, expected)]
            np.testing.assert_allclose(second[0], second[1], rtol=1e-8)


def test_modules_as_activations_learn():
    form = Standardized(std=1.0)
    layer = anact_jax.nnx.ANAct(nnx.PReLU(), 6, form=form, use_running_average=False)
    gradient = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X))))(layer)
    model = anact_jax.linen.ANAct(nn.PReLU(), form=form, use_running_average=False)
    variables = model.init(jax.random.key(0), X)
    of_linen = jax.grad(
        lambda params: jnp.sum(jnp.sin(model.apply(variables | {"params": params}, X, mutable=["batch_stats"])[0]))
    )(variables["params"])
    expected = jax.grad(lambda slope: jnp.sum(jnp.sin(by_hand(lambda x: leaky(x, slope), X, form))))(0.01)
    for found in (*jax.tree.leaves(nnx.to_pure_dict(gradient)), *jax.tree.leaves(of_linen)):
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert abs(expected) > 0.1


class Mutable:
    def __init__(self, slope):
        self.slope = slope

    def __call__(self, x):
        return swish(x, jnp.asarray(self.slope, x.dtype))


def test_changed_function_is_traced_again(monkeypatch):
    def output(f, x):
        form = Standardized(std=1.0, axis=None, stop_gradient=True, tempering=0.05)
        return anact(f, x, initial_stats(f, form), form)[0]

    def default(x, slope=0.3):
        return swish(x, jnp.asarray(slope, x.dtype))

    changing = Mutable(0.3)
    for f in (changing, reads_a_variable, default):
        before = output(f, X)
        jax.jit(functools.partial(output, f))(X)
        changing.slope = 3.0
        monkeypatch.setattr(f"{__name__}.SLOPE", 3.0)
        default.__defaults__ = (3.0,)
        expected = output(lambda x: swish(x, jnp.asarray(3.0, x.dtype)), X)
        np.testing.assert_allclose(output(f, X), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(lambda x, f=f: output(f, x))(X), expected, rtol=1e-5, atol=1e-6)
        assert np.abs(before - expected).max() > 1e-3
        changing.slope = 0.3
        monkeypatch.setattr(f"{__name__}.SLOPE", 0.3)
        default.__defaults__ = (0.3,)


@jax.custom_jvp
def with_a_rule(x):
    return jnp.tanh(x)


@with_a_rule.defjvp
def _rule(primals, tangents):
    return with_a_rule(*primals), jnp.asarray(SLOPE, jnp.float32) * tangents[0]


@functools.wraps(jax.nn.relu)
def decorated(x):
    return reads_a_variable(x)


def test_only_functions_of_the_libraries_are_permanent():
    assert permanent(jax.nn.swish)
    assert permanent(jnp.tanh)
    assert permanent(anact_jax.ACTIVATIONS["mish"])
    changing = (named, decorated, with_a_rule, lambda x: x, functools.partial(swish, slope=1.0), Mutable(1.0), len)
    for f in changing:
        assert not permanent(f)


@pytest.mark.parametrize("f", [with_a_rule, decorated], ids=["rule", "decorated"])
def test_variables_read_by_rules_are_current(f, monkeypatch):
    def gradient(x):
        form = Standardized(stop_gradient=True)
        return jax.grad(lambda x: jnp.sum(anact(f, x, initial_stats(f, form, (6,)), form)[0]))(x)

    before = jax.jit(gradient)(X)
    monkeypatch.setattr(f"{__name__}.SLOPE", 3.0)
    after = jax.jit(lambda x: gradient(x))(X)
    np.testing.assert_allclose(after, gradient(X), rtol=1e-4, atol=1e-5)
    assert np.abs(after - before).max() > 0.1


def test_layers_with_equal_functions_are_traced_once(monkeypatch):
    found = []
    measure = anact_jax.step.measure
    monkeypatch.setattr(anact_jax.step, "measure", lambda *args: found.append(args) or measure(*args))

    def traces(*functions):
        def network(x):
            for f in functions:
                x, _ = anact(f, x, initial_stats(jax.nn.swish, shape=(6,)))
            return x

        found.clear()
        jax.make_jaxpr(network)(X[:7])
        return len(found)

    factor = 1.0 + np.random.default_rng().uniform()  # what no other test has traced
    assert traces(*(lambda x: factor * jnp.tanh(x) for _ in range(5))) == 1
    assert traces(*(lambda x, factor=factor + index: factor * jnp.tanh(x) for index in (1, 2))) == 2


def fixed_point(x):
    """The w with w + w**3 = x, by iterations that end when all elements have converged."""

    def step(state):
        w, _ = state
        new = w - (w + w**3 - x) / (1 + 3 * w**2)
        return new, jnp.max(jnp.abs(new - w))

    return jax.lax.while_loop(lambda state: state[1] > 1e-5, step, (x, jnp.asarray(1, x.dtype)))[0]


ELEMENTWISE = {
    "basis": lambda x: jnp.sum(jnp.tanh(x[..., None] - jnp.linspace(-2, 2, 9).reshape((1,) * x.ndim + (9,))), -1),
    "matrix": lambda x: jnp.stack([x, x**2], -1) @ jnp.asarray([1.0, 0.5], x.dtype),
    "largest of lines": lambda x: jnp.max(jnp.stack([x, 0.1 * x, jnp.full_like(x, -1)]), 0),
    "table": lambda x: jnp.interp(x, np.linspace(-3, 3, 7), np.arange(7.0) ** 2),
    "loop": fixed_point,
    "noise": lambda x: x * jax.random.uniform(jax.random.key(0), x.shape, x.dtype),
    "vmap": lambda x: jax.vmap(lambda each: jax.lax.cond(each > 0, jnp.sin, jnp.cos, each))(x.ravel()).reshape(x.shape),
    "not finite": lambda x: jnp.log(x) * jnp.inf,
    "special": lambda x: x * jax.scipy.special.gammainc(2.0, jnp.abs(x)),
    **{
        name: getattr(jax.nn, name) for name in ("relu6", "celu", "hard_swish", "squareplus", "log_sigmoid", "identity")
    },
}
OTHERS = {
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "cumsum": jnp.cumsum,
    "sort": jnp.sort,
    "flip": jnp.flip,
    "roll": lambda x: jnp.roll(x, 1),
    "less its mean": lambda x: x - jnp.mean(x),
    "by its size": lambda x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)),
    "by its maximum": lambda x: x / jnp.max(jnp.abs(x)),
    "less its minimum": lambda x: x - jnp.min(x),
    "any": lambda x: jnp.where(jnp.any(x > 2), x, 2 * x),
    "neighbours": lambda x: jnp.convolve(x.ravel(), jnp.ones(3, x.dtype), "same").reshape(x.shape),
    "glu": jax.nn.glu,
    "of rows": lambda x: jnp.tanh(x) * jnp.arange(6.0)[None],
}


@pytest.mark.parametrize("f", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_elementwise_functions_are_taken(f):
    check_elementwise(f)


@pytest.mark.parametrize("name", ["basis", "table"])
def test_functions_over_numpy_arrays_have_gradients(name):
    f = ELEMENTWISE[name]
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(anact(f, x, initial_stats(f, shape=(6,)))[0]))))(X)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(by_hand(f, x, Standardized(std=1.0)) / 2)))(X)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("f", OTHERS.values(), ids=OTHERS)
def test_others_are_refused_by_name(f):
    for make in (anact_jax.nnx.ANAct, lambda f: anact_jax.linen.ANAct(f, use_running_average=True).init(KEY, X)):
        with pytest.raises(ValueError, match=rf"an activation must be.* elementwise.*{f.__name__}"):
            make(f)


def test_other_layers_are_refused_by_name():
    layer = anact_jax.linen.ANAct(nn.LayerNorm(), use_running_average=True)
    with pytest.raises(ValueError, match=r"an activation must be.* elementwise.*LayerNorm refuses shape"):
        layer.init(KEY, X)
    with pytest.raises(TypeError, match=r"an activation must be.* elementwise.*LayerNorm refuses shape"):
        anact_jax.nnx.ANAct(nnx.LayerNorm(6, rngs=nnx.Rngs(0)), 6)
    for wrong in (None, [jax.nn.relu]):
        with pytest.raises(TypeError, match="fn must be an elementwise function such as"):
            check_activation(wrong, "ANAct")


def test_learned_functions_are_checked_too():
    @functools.partial(jax.jit, static_argnums=0)
    def prior(f, slope):
        return initial_stats(lambda x: f(x, slope)).mean_out

    assert np.isfinite(prior(swish, jnp.float32(1.5)))
    with pytest.raises(ValueError, match="outputs of <lambda> depend on other elements"):
        prior(lambda x, slope: jax.nn.softmax(slope * x), jnp.float32(1.5))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad], ids=["eager", "jit", "grad"])
def test_a_function_is_not_kept_alive(transform):
    slope = jnp.float32(1.5)

    def run():
        def f(x):
            return swish(x, slope)

        jax.block_until_ready(transform(lambda x: jnp.sum(anact(f, x, initial_stats(f, shape=(6,)))[0]))(X))
        return weakref.ref(f)

    alive = run()
    jax.clear_caches()  # of jax.jit, which would hold a plain function as well
    gc.collect()
    assert alive() is None


def compilations(call):
    """How often XLA compiles while it runs."""
    found = []

    def listen(name, duration, **more):
        del duration, more
        if "backend_compile" in name:
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(call())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


@pytest.mark.parametrize(
    "make",
    [lambda: jax.nn.swish, lambda: lambda x: swish(x, 1.5), lambda: WAYS["closure"](swish, jnp.float32(1.5))],
    ids=["named", "fresh lambda", "fresh closure"],
)
def test_eager_calls_on_a_large_batch_compile_once(make):
    x = jax.random.normal(jax.random.key(0), (64, 32, 32, 16))

    def call():
        f = make()
        running = initial_stats(f, shape=(16,))
        y, _ = anact(f, x, running)
        return y, jax.grad(lambda x: jnp.sum(anact(f, x, running)[0] ** 2))(x)

    assert compilations(call) > 0
    assert compilations(call) == 0


def reverse_only(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * jax.grad(lambda x: jnp.sum(f(x)))(x),))
    return g


@pytest.mark.parametrize("form", ["default", pytest.param("published", marks=pytest.mark.slow)])
def test_a_reverse_rule_alone_serves_both_modes(form):
    ours, plain = reverse_only(named), named
    running = initial_stats(plain, form)

    def loss(f):
        return lambda x: jnp.sum(jnp.sin(anact(f, x, running, form)[0]))

    np.testing.assert_allclose(loss(ours)(X), loss(plain)(X), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss(ours))(X), jax.grad(loss(plain))(X), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(gaussian_stats(ours), gaussian_stats(plain), rtol=1e-6)


def test_reverse_rule_over_an_array_is_refused():
    slope = jnp.float32(0.3)
    with pytest.raises(TypeError, match=r"jax.custom_vjp, which has no forward mode; define it by jax.custom_jvp"):
        anact(reverse_only(lambda x: swish(x, slope)), X, initial_stats(jax.nn.swish, shape=(6,)))


def test_slope_for_each_channel_is_refused():
    slopes = jnp.linspace(0.1, 1.0, 6)[None]
    with pytest.raises(ValueError, match=r"A slope for each channel is not supported, since"):
        anact_jax.linen.ANAct(lambda x: leaky(x, slopes), use_running_average=False).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"A slope for each channel is not supported, since"):
        anact_jax.nnx.ANAct(lambda x: leaky(x, slopes), 6)


def test_closed_over_arrays_become_constants():
    g, constants = traced(lambda x: swish(x, jnp.float32(2.0)), X)
    assert constants == ()  # a literal
    g, constants = traced(WAYS["closure"](swish, jnp.full((1, 1), 2.0)), X)
    assert [value.tolist() for value in constants] == [[[2.0]]]
    np.testing.assert_allclose(g((jnp.full((1, 1), 0.5),), X[:2]), swish(X[:2], jnp.float32(0.5)), rtol=1e-6)


def test_constants_are_numpy_under_any_trace():
    found = []

    @jax.jit
    def program(x):
        found.append(while_tracing(gaussian_stats, lambda x: swish(x, 0.7)))
        return x

    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        program(jnp.ones(8))
    assert all(isinstance(value, np.ndarray) for value in found[0])
    np.testing.assert_allclose(found[0], gaussian_stats(lambda x: swish(x, 0.7)), rtol=1e-6)


def test_published_form_is_that_of_the_formula():
    y, _ = anact(jax.nn.swish, X, initial_stats(jax.nn.swish, "published"), "published")
    stats = gaussian_stats(jax.nn.swish)
    assert stats.count == 0
    z, dz = jax.jvp(jax.nn.swish, (X,), (jnp.ones_like(X),))
    eps = Published().epsilon
    forward, backward = (jnp.mean(z**2) + eps) / (jnp.var(X) + eps), jnp.mean(dz**2) + eps
    np.testing.assert_allclose(y, jnp.sqrt((1 / forward + 1 / backward) / 2) * z, rtol=1e-5)
    assert Published().factor_and_shift(stats).shift == 0
