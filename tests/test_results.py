"""The tables of the documentation are those of the finished runs."""

import json
from pathlib import Path

import pytest

from anact_jax import Form
from experiments.benchmarks import cost
from experiments.cli import table_row
from experiments.studies.default_form import Config, forms_table, report, rows_of, short_table, ways_table
from experiments.studies.grid import Results
from experiments.studies.tables import arrange, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
DETAILS = (ROOT / "docs" / "results" / "details.md").read_text()
PAGE = (ROOT / "docs" / "results" / "index.md").read_text()


def results_of(study):
    return Results(RESULTS / study / "results.jsonl")


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
    today = rows_of(verdict, Form.parse(Config().form))
    assert short_table(today) in PAGE
    for rows in (today, rows_of(verdict, Form.parse("mean+center+unit+diff+feature+nu0.1"))):  # and the one before
        assert report(rows) in DETAILS


def test_verdict_behind_batch_norm():
    differences = {}
    for study in ("verdict", "digits_behind"):
        for place, table in arrange(results_of(study)).items():
            for side, column in table.items():
                if side.variation == "closed, plain after additions":
                    for name, runs in column.items():
                        plain = table[side.plain][name]
                        difference = runs.against(plain).signed
                        cells = (f"{each.accuracy()} at {each.rate:g}" for each in (plain, runs))
                        assert table_row(name, *cells, difference) in DETAILS
                        differences[study, place.model, name] = difference
    assert len(differences) == 32
    columns = [(study, model) for model in ("resnet20", "mlp30") for study in ("verdict", "digits_behind")]
    for name in {name for _, _, name in differences}:
        assert table_row(name, *(differences[*column, name] for column in columns)) in PAGE


def test_page_is_short():
    assert len(PAGE.splitlines()) <= 150
