"""What the README prints is what runs, and what the results print is what was measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from anact_jax import Form
from experiments.benchmarks import cost
from experiments.cli import table_row
from experiments.studies.default_form import Config, forms_table, report, rows_of, ways_table
from experiments.studies.grid import Results
from experiments.studies.tables import arrange, markdown_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SCRIPT = ROOT / "experiments" / "thirty_layers.py"


def test_thirty_layers_stands_in_the_readme_and_is_short():
    text = SCRIPT.read_text()
    assert PYTHON[0] == text
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("snippet", PYTHON[1:])
def test_snippets_run(snippet):
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.slow
@pytest.mark.parametrize(("word", "low", "high"), [("swish", 0.0, 0.2), ("NSwish", 0.9, 1.0), ("NReLU", 0.8, 1.0)])
def test_thirty_layers_learn_only_when_normalized(word, low, high):
    run = subprocess.run([sys.executable, str(SCRIPT), word], capture_output=True, text=True, check=True)
    accuracy = float(re.search(rf"{word}: test accuracy ([0-9.]+)", run.stdout)[1])
    assert low <= accuracy <= high


@pytest.mark.parametrize("study", ["digits", "fashion_mnist"])
def test_tables_of_results_are_those_of_the_finished_cells(study):
    text = (ROOT / "docs" / "results.md").read_text()
    tables = arrange(Results(ROOT / "experiments" / "results" / study / "results.jsonl"))
    assert tables
    for place, table in tables.items():
        assert markdown_table(table) in text, place


def test_tables_of_the_cost_are_those_that_were_measured():
    measured = json.loads((ROOT / "experiments" / "results" / "cost" / "cost.json").read_text())
    assert cost.overview(measured["rows"]) in (ROOT / "docs" / "cost.md").read_text()


def test_tables_of_the_default_are_those_of_the_finished_cells():
    text, folder = (ROOT / "docs" / "results.md").read_text(), ROOT / "experiments" / "results"
    choice = Results(folder / "choice" / "results.jsonl")
    assert forms_table(choice) in text
    assert ways_table(choice) in text
    assert forms_table(Results(folder / "second_choice" / "results.jsonl")) in text
    assert forms_table(Results(folder / "behind_batch_norm" / "results.jsonl")) in text
    verdict = Results(folder / "verdict" / "results.jsonl")
    for form in (Config().form, "mean+center+unit+diff+feature+nu0.1"):  # today's, and the one before
        assert report(rows_of(verdict, Form.parse(form))) in text


def test_verdict_behind_batch_norm_is_that_of_the_finished_cells():
    text = (ROOT / "docs" / "results.md").read_text()
    tables = arrange(Results(ROOT / "experiments" / "results" / "verdict" / "results.jsonl"))
    closed = [
        (table[side.plain][name], runs, name)
        for table in tables.values()
        for side, column in table.items()
        if side.variation == "closed, plain after additions"
        for name, runs in column.items()
    ]
    assert len(closed) == 8
    for plain, runs, name in closed:
        cells = (f"{side.accuracy()} at {side.rate:g}" for side in (plain, runs))
        assert table_row(name, *cells, runs.against(plain).signed) in text
