import json

import jax.numpy as jnp
import pytest

from anact_jax import Standardized
from experiments.benchmarks import activation_alone, cost, scaling, training_step
from experiments.benchmarks.measuring import Spread, ratios, seconds
from experiments.config import changed


def test_cases_are_timed_in_turn():
    calls = []
    taken = seconds({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(times) for times in taken.values()] == [2, 2]
    assert ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}, "a")["b"] == Spread(0.75, 1.0, 1.5)


@pytest.mark.slow
def test_backward_pass_keeps_the_input_alone():
    shape, channels = (4, 8, 8, 16), 16
    x = 4 * 8 * 8 * 16 * 4
    kept = {
        name: activation_alone.residual_bytes(layer, shape, jnp.float32)
        for name, layer in activation_alone.LAYERS.items()
    }
    for name in activation_alone.LAYERS:
        if name.startswith("NSwish"):
            assert x <= kept[name] <= x + 40 * 4 * channels
    assert kept["swish"] >= 2 * x
    assert kept["BatchNorm, swish"] > kept["swish"]


@pytest.mark.slow
def test_operation_cost_is_printed_and_drawn(run_main, tmp_path, standard_promotion):
    arguments = ("--shapes", "8x16", "--dtypes", "bfloat16", "--networks", "--repeats", "1", "--workdir", tmp_path)
    status, output = run_main(cost, *arguments)
    assert status == 0
    assert "**8x16 bfloat16**" in output.out
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [row["case"] for row in rows] == list(activation_alone.LAYERS)
    assert rows[0]["ratio"] == [1, 1, 1]
    assert output.out.endswith(f"\n{cost.overview(rows)}\n")
    assert cost.overview(rows).splitlines()[-1] == "| NSwish, inference | 0.42 |"  # saved MB: x and the variances
    assert (tmp_path / "cost.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "8xx"], "8xx"),
        (["--dtypes", "int8"], "int8"),
        (["--networks", "resnet1"], "resnet1"),
        (["--repeats", "0"], "repeats"),
    ],
)
def test_bad_settings_of_the_cost_are_named(arguments, named, refused):
    refused(cost, *arguments, message=named)


@pytest.mark.slow
def test_training_step_goes_on_and_is_timed(standard_promotion):
    network = training_step.NETWORKS["mlp30"]
    network = network._replace(recipe=changed(network.recipe, model="mlp5"), image=(8, 8, 1))
    program = training_step.compiled(network, "NSwish", 8)
    losses = [float(program.call()["loss"]) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert min(program.trace, program.compile, program.temporary_bytes, program.cost["flops"]) > 0


def test_messages_between_devices():
    """Of the default's moments m, with k means among them."""
    moments = Standardized.moments
    m, k = len(moments), sum(name.startswith("mean") for name in moments)
    assert scaling._messages([16, 32], 1) == [(0, 0)] * 3
    assert scaling._messages([16, 32], 8) == [(2, (48 * m + 2) * 8), (1, 48 * (m + 1)), (2, 48 * 2)]
    assert scaling._messages([16, 32], 256) == [(4, 48 * (m + k) + 2), (1, 48 * (m + 1)), (2, 48 * 2)]


def test_scaling_counts_messages(run_main, refused):
    status, output = run_main(scaling, "--sides")
    assert status == 0
    assert "ResNet-50: 49 activations of 22720 channels; gradient 102 MB" in output.out
    refused(scaling, "--sides", "batch", message="unknown side 'batch'; expected swish, NSwish")
