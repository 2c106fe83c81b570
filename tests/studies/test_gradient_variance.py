import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anact_jax import ACTIVATIONS, Published
from anact_jax.theory import Variances, plain
from experiments.data import Batch
from experiments.networks import make_layers
from experiments.networks.mlp import MLP
from experiments.studies import gradient_variance
from experiments.studies.gradient_variance import TITLES, measure, over_networks, predict


def network(activation, depth, width, examples, seed=0):
    """A network with random biases too, and a batch."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((examples, 4, 4, 3)).astype(np.float32)
    batch = Batch(images, rng.integers(0, 5, examples).astype(np.int32), np.ones(examples, bool))
    model = MLP(make_layers(activation, "none", form=Published()), 5, depth, width)
    variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(seed), jnp.asarray(images))
    params = {
        name: layer | {"bias": 0.3 * rng.standard_normal(layer["bias"].shape).astype(np.float32)}
        for name, layer in variables["params"].items()
    }
    return model, *jax.tree.map(jnp.asarray, (batch, variables | {"params": params}))


@pytest.mark.parametrize("activation", [pytest.param("relu", marks=pytest.mark.slow), "nswish"])
def test_measured_equals_every_examples_own_gradient(activation):
    """By autodiff through all parameters; the gradient of a bias is delta itself."""
    model, batch, variables = network(activation, depth=3, width=7, examples=6)

    @jax.jit
    @jax.jacrev
    def of_each_example(params):
        full = variables | {"params": params}
        logits, _ = model.apply(full, batch.images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)

    _, captured = model.apply(
        variables, batch.images, train=True, mutable=["batch_stats", "intermediates"], capture_intermediates=True
    )
    gradients, measured = of_each_example(variables["params"]), measure(model, batch, variables)
    for index in range(4):
        name = f"Dense_{index}"
        (z,) = captured["intermediates"][name]["__call__"]
        np.testing.assert_allclose(measured.signal[index], np.mean(z**2, 1), rtol=1e-4)
        np.testing.assert_allclose(measured.gradient[index], np.mean(gradients[name]["bias"] ** 2, 1), rtol=1e-4)
        of_kernel = np.mean(gradients[name]["kernel"] ** 2, (1, 2))
        np.testing.assert_allclose(measured.weight_gradient[index], of_kernel, rtol=1e-4)


@pytest.mark.parametrize("activation", ["relu", pytest.param("ntanh", marks=pytest.mark.slow)])
def test_predicted_for_wide_random_networks(activation):
    """Depth, widths, biases, factors and the loss at the logits enter as they should."""
    model, batch, variables = network(activation, depth=3, width=1024, examples=64)
    measured = jax.jit(functools.partial(measure, model))(batch, variables)
    f, normalize = (
        ACTIVATIONS[activation.removeprefix("n")],
        plain if activation in ACTIVATIONS else Published().factor_and_shift,
    )
    input_sq = jnp.mean(batch.images**2, axis=(1, 2, 3))
    predicted = predict(f, normalize, input_sq, variables["params"], measured.gradient[-1])
    for field, values, expected in zip(TITLES, measured, predicted, strict=True):
        np.testing.assert_allclose(jnp.mean(values, 1), jnp.mean(expected, 1), rtol=0.15, err_msg=field)


def test_geometric_mean_over_networks():
    values = jnp.array([[[1.0, 3.0], [9.0, 9.0]], [[8.0, 8.0], [9.0, 9.0]]])  # networks, layers, examples
    (level,) = over_networks(Variances(values, values, 0.0 * values))["gradient"]
    assert level == pytest.approx(4.0)
    assert over_networks(Variances(values, values, 0.0 * values))["weight_gradient"] == [0.0]


SMALL = ("--depth", 2, "--width", 8, "--batch-size", 32, "--seeds", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_program_draws_prints_and_writes_numbers(tmp_path, run_main):
    output = tmp_path / "new" / "picture.png"
    options = ("--activations", "nrelu", "--steps", 0, 3, "--form", "mean+center")
    status, printed = run_main(gradient_variance, *SMALL, *options, "--output", output)
    assert (status, printed.err) == (0, "")
    assert output.stat().st_size > 0
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert (numbers["seeds"], numbers["form"], numbers["output"]) == (2, "mean+center", "picture.png")
    steps = numbers["variances"]["nrelu"]
    assert list(steps) == ["0", "3"]
    for kind in ("measured", "predicted"):
        assert steps["0"][kind] != steps["3"][kind]
        for field in TITLES:
            first, last = steps["3"][kind][field]
            assert f"{first:.1e}" in printed.out
            assert f"{last:.1e}" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--activations", "nope"), "unknown activation 'nope'"),
        (("--activations", "nrelu", "--form", "best"), "unknown form 'best'"),
        (
            ("--form", "default"),
            "theory predicts forms with one factor a layer that is a constant under differentiation, such as published",
        ),
        (("--batch-size", 0), "batch_size must lie between 1 and 1437, got 0"),
        (("--batch-size", 5000), "batch_size must lie between 1 and 1437, got 5000"),
        (("--depth", 0), "depth must be a positive number, got 0"),
        (("--width", -1), "width must be a positive number, got -1"),
        (("--seeds", 0), "seeds must be a positive number, got 0"),
        (("--steps", 0, -3), "steps must be at least 0, got -3"),
        (("--steps",), "steps needs at least one value"),
        (("--activations",), "activations needs at least one value"),
        (("--learning-rate", "nan"), "learning_rate must be a positive number, got nan"),
        (("--output", "/dev/null/picture.png"), "/dev/null"),
    ],
)
def test_bad_settings_end_in_one_line_and_status_2(arguments, message, run_main):
    status, printed = run_main(gradient_variance, *arguments)
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith("gradient_variance.py: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.usefixtures("standard_promotion")
def test_divergence_ends_in_one_line_and_status_1(tmp_path, run_main):
    options = ("--activations", "swish", "--steps", 5, "--learning-rate", 1e30, "--output", tmp_path / "picture.png")
    status, printed = run_main(gradient_variance, *SMALL, *options)
    assert status == 1
    assert printed.err == "gradient_variance.py: swish diverged within 5 steps; lower --learning-rate\n"
    assert not (tmp_path / "picture.png").exists()
