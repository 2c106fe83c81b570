import numpy as np
import pytest

from experiments.config import Recipe, changed
from experiments.forms import label_named
from experiments.studies import default_form
from experiments.studies.default_form import forms_table, half_width, report, rows_of, usable_range, ways_table
from experiments.studies.results import Cell, Results
from experiments.studies.tables import Runs

DEFAULT = label_named("default")


def runs(by_rate):
    return Runs(by_rate={rate: [accuracy] for rate, accuracy in by_rate.items()}, rate=0.1)


@pytest.mark.parametrize(
    ("by_rate", "expected"),
    [
        ({0.01: 0.80, 0.1: 0.81, 1.0: 0.5}, 10),
        ({0.01: 0.795, 0.1: 0.81, 1.0: 0.805}, 10),
        ({0.01: 0.7, 0.1: 0.81, 1.0: 0.7}, 1),
        ({0.01: 0.1, 0.1: 0.11, 1.0: 0.1}, 0),
    ],
)
def test_usable_range(by_rate, expected):
    np.testing.assert_allclose(usable_range(runs(by_rate)), expected)


def add(results, activation, accuracies, norm="none", variation="", init="lecun", **form):
    recipe = changed(Recipe(), activation=activation, norm=norm, init=init, model="mlp10", learning_rate=0.1, **form)
    empty = {"curve": [], "diverged": False, "seconds": 1.0}
    results.add(Cell(changed(recipe, seed=9), False, variation), empty | {"validation_accuracy": 0.5})
    for seed, accuracy in enumerate(accuracies):
        cell = Cell(changed(recipe, seed=seed), True, variation)
        results.add(cell, empty | {"test_accuracy": accuracy})


def test_rows_pair_plain_with_the_form_and_find_rivals(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    add(results, "swish", [0.5, 0.6, 0.7])
    add(results, "nswish", [0.6, 0.7, 0.8])  # the default form
    add(results, "nswish", [0.9, 0.9, 0.9], std=1.0)  # another one
    add(results, "swish", [0.7, 0.8, 0.9], variation="Deep Kernel Shaping")
    add(results, "swish", [0.6, 0.6, 0.6], norm="batch")
    add(results, "selu", [0.1, 0.1, 0.1])
    (row,) = rows_of(results, DEFAULT)
    assert (row.network, row.activation, row.best_rival) == ("mlp10 on digits", "swish", "DKS")
    assert set(row.rivals) == {"DKS", "BatchNorm", "SELU"}
    np.testing.assert_allclose(row.difference, (0.1, 0), atol=1e-9)
    text = report([row])
    assert "| swish | 60.0 ± 24.8 at 0.1 | 70.0 ± 24.8 at 0.1 | +10.0 ± 0.0 | ± 0.0 | 1 / 1 | DKS 80.0" in text
    assert "Better than plain by 1 point or more in 1." in text
    assert "Within 1 point of the best rival in 0 of 1" in text
    head, _, line = text.split("**Default less each rival**\n\n")[1].splitlines()[:3]
    assert head == "| network | activation | SELU | DKS | BatchNorm |"
    assert line == "| mlp10 on digits | swish | +60.0 ± 24.8 | -10.0 ± 0.0 | +10.0 ± 24.8 |"


def test_rivals_after_a_normalization_layer(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for norm, activation in (("batch", "swish"), ("batch", "nswish"), ("layer", "swish"), ("none", "swish")):
        add(results, activation, [0.5, 0.6], norm=norm)
    add(results, "selu", [0.1, 0.1])
    add(results, "relu", [0.7, 0.7], init="he")
    (row,) = rows_of(results, DEFAULT)
    assert row.network == "mlp10 on digits, batch"
    assert set(row.rivals) == {"LayerNorm", "SELU", "ReLU, He"}
    assert row.best_rival == "ReLU, He"


def test_many_forms_are_rows_few_are_columns(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    add(results, "swish", [0.5, 0.5])
    for number, std in enumerate((0.3, 0.4, 0.5, 0.6, 0.7, 1.0)):
        add(results, "nswish", [0.6 + number / 100] * 2, std=std)
    add(results, "swish", [0.7, 0.7], norm="batch")
    add(results, "nswish", [0.8, 0.8], norm="batch")
    lines = forms_table(results).splitlines()
    assert lines[:3] == ["| form | mlp10 on digits, swish, pool 1 |", "| --- | --- |", "| plain | 50.0 ± 0.0 at 0.1 |"]
    assert f"| {DEFAULT} | 62.0 ± 0.0 at 0.1 |" in lines[3:9]
    assert lines[9:] == [
        "",
        f"| network | plain | {DEFAULT} |",
        "| --- | --- | --- |",
        "| mlp10 on digits, swish, pool 1, batch | 70.0 ± 0.0 at 0.1 | 80.0 ± 0.0 at 0.1 |",
    ]


def test_variations_against_their_form(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for norm in ("none", "batch"):
        add(results, "nswish", [0.5, 0.6], norm=norm)
    add(results, "nswish", [0.4, 0.6], variation="mean+center+unit+diff+feature+scale+nu0.1")
    add(results, "nswish", [0.7, 0.7], std=1.0, variation="exact, bounded")  # nothing to set it against
    add(results, "swish", [0.1, 0.1])
    assert ways_table(results).splitlines()[2:] == [
        "| form | mlp10 on digits, swish, pool 1 |",
        "| --- | --- |",
        "| mean+center+unit+diff+feature+scale+nu0.1 | -5.0 ± 63.5 |",
    ]


def test_correction_for_one_comparison_is_none():
    row = runs({0.1: 0.5})
    row.verdict = {seed: {"test_accuracy": accuracy} for seed, accuracy in enumerate([0.1, 0.2, 0.4])}
    interval = row.accuracy()
    np.testing.assert_allclose(half_width(interval, 3, 1), interval.half_width)
    assert half_width(interval, 3, 10) > 3 * interval.half_width


def test_a_missing_folder_is_named(run_main, tmp_path):
    status, output = run_main(default_form, "--choice", str(tmp_path))
    assert status == 2
    assert "results.jsonl does not exist; experiments/studies/compare.py --workdir" in output.err


def test_form_without_runs_is_refused(refused, tmp_path):
    add(Results(tmp_path / "results.jsonl"), "swish", [0.5, 0.5])
    folders = ("--choice", tmp_path, "--workdir", tmp_path)
    refused(default_form, *folders, "--form", "median", message="no finished runs of form 'median' beside plain ones")
