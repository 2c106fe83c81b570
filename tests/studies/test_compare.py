import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from helpers import ROOT

from anact_jax import Standardized
from experiments.config import Experiment, Recipe, Storage, changed
from experiments.data import load, with_subset
from experiments.forms import label_named
from experiments.networks import make_layers
from experiments.networks.mlp import MLP
from experiments.studies import compare
from experiments.studies.compare import Config, choose_rate
from experiments.studies.intervals import Interval
from experiments.studies.report import write_report
from experiments.studies.results import Cell, Results, Splits, run_cells, train_together
from experiments.studies.rivals import network_of
from experiments.studies.tables import Runs, Side, arrange, markdown_table
from experiments.training.loop import evaluate, train
from experiments.training.steps import make_steps

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activations", "swsh"], "unknown activation 'swsh'"),
        (["--forms", "median"], "unknown form 'median'; expected default, published, or a label in experiments/forms"),
        (["--forms", "default", "exact+unit"], "forms that are gone: commit 517581d is the last that runs them"),
        (["--models", "resnet21"], "unknown model 'resnet21'"),
        (["--norms", "instance"], "unknown norm 'instance'"),
        (
            ["--activations", "mish", "--variations", "Deep Kernel Shaping"],
            "Deep Kernel Shaping is to be had for elu, gelu, relu",
        ),
        (["--dataset", "digits", "--half", "3"], "half must be 1 or 2, got 3"),
        (["--learning-rates", "0"], "learning_rate must be a positive number, got 0"),
        (["--learning-rates"], "learning_rates must name at least one"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--validation-images", "0"], "validation_images must be at least 1"),
        (["--validation-images", "1437"], "cannot take 0 images for training and 1437 for validation out of 1437"),
        (["--train-images", "32"], "batch_size 64 is larger than the training data, 32 examples"),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], "python experiments/prepare_data.py cifar10"),
        (["--workdir", "/dev/null/here"], "Not a directory"),
    ],
)
def test_bad_settings_end_in_one_line_before_training(arguments, message, refused):
    output = refused(compare, *arguments, message=message)
    assert output.err.startswith("compare.py: ")
    assert output.out == ""


def test_every_side_comes_once():
    config = Config(
        activations=("swish", "nswish"),
        variations=("Deep Kernel Shaping",),
        forms=("published", "default", "forward+center+unit+diff+nu0.1"),
        models=("mlp10",),
        norms=("none", "batch"),
    )
    settings = [side.settings for side in config.sides()]
    of_one_norm = [("swish", None, ""), ("swish", None, "Deep Kernel Shaping")]
    labels = ("mean", "forward+center+unit+diff+feature+level0.5", "forward+center+unit+diff+nu0.1")
    of_one_norm += [("nswish", label, "") for label in labels]
    assert [(s["norm"], s["activation"], s["form"], s["variation"]) for s in settings] == [
        (norm, *side) for norm in ("none", "batch") for side in of_one_norm
    ]


def outcome(validation, test=None, diverged=False):
    record = {"epoch": 1.0, "train_loss": 1.0, "validation_loss": 1.0, "validation_accuracy": validation}
    return {"curve": [record], "validation_accuracy": validation, "test_accuracy": test, "diverged": diverged}


def cell(seed=0, rate=0.1, on_test=True, **settings):
    usual = {"validation_images": 360}
    return Cell(changed(Recipe(), learning_rate=rate, seed=seed, **(usual | settings)), on_test)


def test_learning_rate_is_chosen_on_validation(tmp_path):
    """With the first seed 0.3 looks best, but it mostly fails; on the test split 0.01 would win."""
    results = Results(tmp_path / "results.jsonl")
    config = Config(learning_rates=(0.01, 0.1, 0.3), choice_seeds=3, seeds=5)
    validation = {0.01: [0.5, 0.99, 0.99], 0.1: [0.8, 0.8, 0.8], 0.3: [0.9, 0.1, 0.1]}
    test = {0.01: 1.0, 0.1: 0.0, 0.3: 0.5}
    for rate, accuracies in validation.items():
        for seed, accuracy in enumerate(accuracies, start=5):
            results.add(cell(seed, rate, on_test=False), outcome(accuracy))
        for seed in range(5):
            results.add(cell(seed, rate), outcome(accuracies[0], test[rate]))
    assert choose_rate(cell(on_test=False), config, results) == 0.1


def test_smallest_of_equal_rates_is_chosen(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    config = Config(learning_rates=(0.3, 0.1, 0.2), choice_seeds=1, seeds=1)
    for rate in config.learning_rates:
        results.add(cell(1, rate, on_test=False), outcome(0.5))
    assert choose_rate(cell(on_test=False), config, results) == 0.1


def test_results_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "results.jsonl"
    results = Results(path)
    results.add(cell(0), outcome(0.5, 0.6))
    results.add(cell(1), outcome(0.7, 0.8))
    whole = path.read_text()
    path.write_text(whole[:-20])
    results = Results(path)
    assert results.get(cell(0)) == outcome(0.5, 0.6)
    assert results.get(cell(1)) is None
    results.add(cell(1), outcome(0.7, 0.8))
    assert path.read_text() == whole


def test_results_are_strict_json(tmp_path):
    path = tmp_path / "results.jsonl"
    record = {"epoch": 1.0, "train_loss": 2.0, "validation_accuracy": 0.1}
    Results(path).add(cell(), outcome(0.1) | {"curve": [record | {"validation_loss": float("nan")}]})
    found = json.loads(path.read_text(), parse_constant=pytest.fail)["outcome"]
    assert found == outcome(0.1) | {"curve": [record | {"validation_loss": None}]}


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"cell": {}, "outcome": {}}\nnonsense\n')
    with pytest.raises(ValueError, match=r"results.jsonl, line 2: not a finished cell"):
        Results(path)


def test_the_key_of_a_cell_spells_the_form_out():
    assert cell().key == cell(form="default", std=0.5).key != cell(form="published").key
    assert cell(std=0.5).key != cell(std=1.0).key != cell(std=1.0, axis=None).key
    assert json.loads(cell().key)["form"] == "forward+center+unit+diff+feature+level0.5"
    assert json.loads(cell(form="published", center=True).key)["form"] == "mean+center"
    assert json.loads(cell(std=0.3).key)["form"] == repr(Standardized(std=0.3))  # of those without an old label
    assert cell(activation="swish").key == cell(activation="swish", form="published").key  # of no meaning there
    assert cell(momentum=0.8).key != cell().key
    assert cell(on_test=False).key != cell().key
    assert cell()._replace(variation="another").key != cell().key


def test_lost_variation_names_its_commit(tmp_path):
    lost = cell(model="mlp5")._replace(variation="mean+center+unit+diff+feature+lag")
    with pytest.raises(ValueError, match=r"experiments/compare\.py of commit ce3e8fc runs it"):
        run_cells([lost], Results(tmp_path / "results.jsonl"), Storage(), network_of)
    closed = cell(model="mlp5")._replace(variation="closed, plain after additions")
    with pytest.raises(ValueError, match=r"experiments/studies/compare\.py of commit e6f5b91 runs it"):
        run_cells([closed], Results(tmp_path / "results.jsonl"), Storage(), network_of)


@pytest.mark.parametrize("old", [{"behind": "measured"}, {"behind": None}, {}])
def test_rows_with_settings_of_old_are_found(tmp_path, old):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"cell": cell().settings | old, "outcome": outcome(0.5)}) + "\n")
    assert Results(path).get(cell()) == outcome(0.5)


@pytest.mark.slow
def test_two_studies_in_one_file_cut_no_line(tmp_path):
    path = tmp_path / "results.jsonl"
    program = (
        "import sys; sys.path[:0] = ['tests', 'tests/studies']; from pathlib import Path; from test_compare import *\n"
        "results = Results(Path(sys.argv[1]))\n"
        "for seed in range(100): results.add(cell(seed, float(sys.argv[2])), outcome(0.5, 0.6) | {'long': 'x' * 9000})"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, path, rate], cwd=ROOT) for rate in ("0.1", "0.2")]
    assert [process.wait() for process in running] == [0, 0]
    assert len(list(Results(path))) == 200


def test_intervals_are_student_s():
    values = np.array([0.91, 0.93, 0.90, 0.96])
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    mean, half_width = Interval.of(values)
    np.testing.assert_allclose((mean - half_width, mean + half_width), expected, rtol=1e-9)
    assert np.isnan(Interval.of([0.5]).half_width)
    assert Interval(0.3, 0.2).excludes_zero
    assert not Interval(-0.1, 0.2).excludes_zero
    assert not Interval.of([0.5]).excludes_zero


def test_differences_are_paired_by_seed():
    plain, normalized = Runs(), Runs()
    for seed in (2, 0, 1):
        plain.verdict[seed] = outcome(0.5, [0.1, 0.5, 0.9][seed])
    for seed in (0, 1, 2):
        normalized.verdict[seed] = outcome(0.5, [0.2, 0.61, 0.99][seed])
    normalized.verdict[7] = outcome(0.5, 0.0)  # without a partner
    expected = scipy.stats.ttest_rel([0.2, 0.61, 0.99], [0.1, 0.5, 0.9]).confidence_interval()
    mean, half_width = normalized.against(plain)
    np.testing.assert_allclose((mean - half_width, mean + half_width), expected, rtol=1e-9)


def test_table_has_plain_beside_normalized(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for seed in range(3):
        for activation, norm, accuracy in (
            ("swish", "none", 0.5),
            ("nswish", "none", 0.7),
            ("swish", "batch", 0.8),
            ("relu", "none", 0.1),
        ):
            found = outcome(0.5, accuracy + 0.01 * seed, diverged=activation == "relu")
            results.add(cell(seed, 0.1, activation=activation, norm=norm), found)
            for rate in (0.01, 0.1, 1.0):
                choice = cell(seed + 3, rate, on_test=False, activation=activation, norm=norm)
                results.add(choice, outcome(0.5))
    ((place, table),) = arrange(results).items()
    assert (place.dataset, place.model) == ("digits", "resnet20")
    default = label_named("default")
    assert list(table)[:2] == [Side("none", "lecun", None), Side("none", "lecun", default)]
    assert markdown_table(table).splitlines() == [
        f"| activation | plain | normalized, {default} | plain, BatchNorm |",
        "| --- | --- | --- | --- |",
        "| relu | 11.0 ± 2.5 at 0.1, 3 diverged |  |  |",
        "| swish | 51.0 ± 2.5 at 0.1 | 71.0 ± 2.5 (**+20.0 ± 0.0**) at 0.1 | 81.0 ± 2.5 at 0.1 |",
    ]


def test_report_opens_with_the_winner(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for activation, form, norm, accuracy in (
        ("swish", "default", "none", 0.5),
        ("nswish", "default", "none", 0.7),
        ("nswish", "published", "none", 0.6),
        ("tanh", "default", "batch", 0.65),
    ):
        for seed in range(3):
            settings = {"activation": activation, "form": form, "norm": norm}
            results.add(cell(seed, 0.1, **settings), outcome(0.5, accuracy + 0.01 * seed))
            results.add(cell(seed + 3, 0.1, on_test=False, **settings), outcome(0.5))
    markdown = write_report(results, tmp_path, "compare.py --seeds 3").read_text()
    assert markdown.splitlines()[2] == (
        "digits, resnet20: **swish (normalized, default form)** has the highest test accuracy, 71.0 ± 2.5%; "
        "+20.0 ± 0.0 points against the plain activation in the same network; +5.0 ± 0.0 against the next best, tanh "
        "(plain, BatchNorm)."
    )
    assert "61.0 ± 2.5 (**+10.0 ± 0.0**) at 0.1†" in markdown
    assert "Last addition by `compare.py --seeds 3`." in markdown


def test_new_rate_replaces_runs_at_the_old_one(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for seed, rate, accuracy in ((0, 0.1, 0.5), (1, 0.1, 0.5), (0, 0.01, 0.9)):
        results.add(cell(seed, rate), outcome(0.5, accuracy))
        results.add(cell(seed + 3, rate, on_test=False), outcome(0.5))
    (table,) = arrange(results).values()
    (column,) = table.values()
    runs = column["swish"]
    assert runs.rate == 0.01
    assert {seed: run["test_accuracy"] for seed, run in runs.verdict.items()} == {0: 0.9}


class Silent:
    def write(self, step, epoch, **values):
        """Keeps nothing."""


def small_digits():
    whole = load("digits")
    return Splits(with_subset(whole, train=256, validation=100), whole)


def small_cells(*runs, on_test=True, **settings):
    recipe = changed(
        Recipe(), epochs=2, batch_size=32, validation_images=100, activation="nswish", norm="none", **settings
    )
    return [Cell(changed(recipe, learning_rate=rate, seed=seed), on_test) for rate, seed in runs]


@pytest.mark.slow
def test_runs_in_one_program_equal_runs_alone():
    data = small_digits()
    model = MLP(make_layers("nswish", "none", form="published"), classes=10, depth=2, width=16)
    cells = small_cells((0.01, 0), (0.1, 0), (0.1, 1))
    alone = make_steps(model, cells[0].recipe.training, data.chosen_on)
    found = train_together(make_steps(model, cells[0].recipe.training, data.chosen_on, together=True), data, cells)
    for cell, outcome in zip(cells, found, strict=True):
        state, validation_accuracy = train(
            alone, data.chosen_on, Experiment(cell.recipe), Silent(), show_progress=False
        )
        assert abs(outcome["validation_accuracy"] - validation_accuracy) < 0.0101
        test_accuracy = evaluate(alone, state, data.judged_on, cell.recipe.training.batch_size)["accuracy"]
        assert abs(outcome["test_accuracy"] - test_accuracy) < 0.01
    assert found[0]["curve"] != found[1]["curve"]
    assert found[1]["curve"] != found[2]["curve"]


@pytest.mark.slow
def test_diverged_run_counts_as_guessing():
    data = small_digits()
    model = MLP(make_layers("relu", "none"), classes=10, depth=2, width=16)
    cells = small_cells((1e20, 0), (0.1, 0))
    together = make_steps(model, cells[0].recipe.training, data.chosen_on, together=True)
    failed, fine = train_together(together, data, cells)
    assert failed == {"curve": [], "validation_accuracy": 0.1, "test_accuracy": 0.1, "diverged": True}
    assert not fine["diverged"]
    assert fine["test_accuracy"] > 0.3


@pytest.mark.slow
def test_finished_cells_are_not_run_again(tmp_path, run_main):
    arguments = [
        *("--models", "mlp10", "--norms", "none", "--activations", "tanh", "ntanh", "--forms", "mean"),
        *("--epochs", "2", "--seeds", "2", "--learning-rates", "0.01", "0.1", "--workdir", str(tmp_path)),
    ]
    status, first = run_main(compare, *arguments)
    assert status == 0
    file = tmp_path / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * (2 + 2 + 2)  # sides; first choice, second choice, verdict
    status, second = run_main(compare, *arguments)
    assert second.out == first.out
    assert file.read_text() == "".join(lines)

    file.write_text("".join(lines[:5]))  # as if stopped after five
    run_main(compare, *arguments)

    def curves(lines):
        """By cell; runs that train together with others agree to rounding."""
        records = map(json.loads, lines)
        return {json.dumps(each["cell"]): [r["train_loss"] for r in each["outcome"]["curve"]] for each in records}

    assert file.read_text().startswith("".join(lines[:5]))
    redone, expected = curves(file.read_text().splitlines()), curves(lines)
    assert redone.keys() == expected.keys()
    for cell, losses in expected.items():
        assert redone[cell] == pytest.approx(losses, rel=1e-3)

    markdown = (tmp_path / "report.md").read_text()
    assert "| activation | plain | normalized, mean |" in markdown
    pictures = re.findall(r"!\[.*\]\((.*)\)", markdown)
    assert len(pictures) == 2
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_cells_of_a_network_with_convolutions_run_too(tmp_path):
    config = changed(Recipe(), epochs=2, model="vgg11_narrow", norm="none", validation_images=360, activation="nelu")
    results = Results(tmp_path / "results.jsonl")
    cells = [Cell(changed(config, seed=seed), on_test=True) for seed in range(2)]
    run_cells(cells, results, Storage(), network_of)
    for c in cells:
        found = results.get(c)
        assert len(found["curve"]) == 2
        assert 0 <= found["test_accuracy"] <= 1
    assert results.get(cells[0])["curve"] != results.get(cells[1])["curve"]


@pytest.mark.slow
@pytest.mark.usefixtures("heed_ctrl_c")
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    program = [
        sys.executable,
        str(ROOT / "experiments" / "studies" / "compare.py"),
        "--models",
        "mlp10",
        "--workdir",
        tmp_path,
    ]
    run = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first_line = run.stdout.readline()
    assert "learning rate" in first_line
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 130
    assert err.splitlines()[-1].startswith("compare.py: interrupted; what is finished is in")
    assert len(list(Results(tmp_path / "results.jsonl"))) > 0
