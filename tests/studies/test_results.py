"""The tables of the documentation are those of the finished runs."""

import json

import pytest
from helpers import ROOT

from experiments.benchmarks import cost
from experiments.cli import table_row
from experiments.forms import label_named
from experiments.studies.default_form import forms_table, report, rows_of, short_table, ways_table
from experiments.studies.results import CLOSED_FORM, Results
from experiments.studies.tables import Side, arrange, markdown_table

RESULTS = ROOT / "experiments" / "results"
DETAILS = (ROOT / "docs" / "results" / "details.md").read_text()
PAGE = (ROOT / "docs" / "results" / "index.md").read_text()
GUIDE = (ROOT / "docs" / "how-to" / "batch-norm.md").read_text()


def results_of(study):
    return Results(RESULTS / study / "results.jsonl")


def at_rates(*sides):
    return [f"{runs.accuracy()} at {runs.rate:g}" for runs in sides]


@pytest.mark.parametrize("study", ["digits", "fashion_mnist"])
def test_comparisons(study):
    tables = arrange(results_of(study))
    assert tables
    for place, table in tables.items():
        assert markdown_table(table) in DETAILS, place


def test_cost():
    measured = json.loads((RESULTS / "cost" / "cost.json").read_text())
    assert cost.overview(measured["rows"]) in (ROOT / "docs" / "cost.md").read_text()


def test_choice_and_verdict_of_the_default():
    choice, verdict = results_of("choice"), results_of("verdict")
    assert forms_table(choice) in DETAILS
    assert ways_table(choice) in DETAILS
    assert forms_table(results_of("second_choice")) in DETAILS
    assert forms_table(results_of("behind_batch_norm")) in DETAILS
    today = rows_of(verdict, label_named("default"))
    assert short_table(today) in PAGE
    for rows in (today, rows_of(verdict, "mean+center+unit+diff+feature+nu0.1")):  # and the one before
        assert report(rows) in DETAILS


def test_closed_forms_and_their_control():
    """The control is BatchNorm, then the tempered activation."""
    rows, control = 0, {}
    for study in ("verdict", "digits_behind"):
        for place, table in arrange(results_of(study)).items():
            for side, column in table.items():
                if side.variation != CLOSED_FORM[0]:
                    continue
                others = table.get(side.plain._replace(variation="tempered"), {})
                for name, closed in column.items():
                    rows += 1
                    plain, tempered = table[side.plain][name], others.get(name)
                    if place.model in ("resnet20", "mlp30"):
                        cells = at_rates(plain, closed)
                        assert table_row(name, *cells, closed.against(plain).signed) in DETAILS
                    if tempered is not None:
                        control[place.model, place.dataset, name, side.form] = plain, tempered, closed
                        cells = at_rates(plain, tempered, closed)
                        named = f"{place.model}, {place.dataset}", name, side.form
                        assert table_row(*named, *cells, closed.against(tempered).signed) in DETAILS
    assert (rows, len(control)) == (38, 22)
    form = "forward+center+unit+diff+nu0.1"
    for name in ("swish", "relu", "tanh", "gelu", "mish", "elu", "leaky_relu", "softplus"):
        both = [control["mlp30", dataset, name, form] for dataset in ("fashion_mnist", "digits")]
        gains = ((t.against(plain).signed, closed.against(t).signed) for plain, t, closed in both)
        assert table_row(name, *(cell for pair in gains for cell in pair)) in PAGE
        assert table_row(name, *(str(runs.accuracy()) for sides in both for runs in sides)) in GUIDE


def test_constants_after_batch_norm():
    tables = arrange(results_of("verdict")).items()
    (table,) = (table for place, table in tables if (place.dataset, place.model) == ("mnist1d", "resmlp16"))
    plain = Side("batch", "lecun", None)
    for name in ("swish", "relu", "tanh"):
        sides = (
            plain,
            plain._replace(variation="frozen"),
            Side("batch", "lecun", "mean+center+feature", CLOSED_FORM[0]),
        )
        runs, frozen, closed = (table[side][name] for side in sides)
        differences = frozen.against(runs).signed, closed.against(frozen).signed
        assert table_row(name, *at_rates(runs, frozen, closed), *differences) in DETAILS


def test_page_is_short():
    assert len(PAGE.splitlines()) <= 150
