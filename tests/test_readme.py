"""What the README prints is what runs."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
(DIFF,) = re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)
SCRIPT = ROOT / "experiments" / "thirty_layers.py"


def run(snippet, **names):
    printed = io.StringIO()
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), names | {"__name__": "readme"})
    return printed.getvalue()


def test_a_page_with_the_first_use_near_the_top():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert next(number for number, line in enumerate(lines, start=1) if "NSwish(" in line) < 40


@pytest.mark.parametrize("dropped", ["+", "-"])
def test_both_sides_of_the_diff_run(dropped):
    import flax.linen as nn

    kept = "\n".join(line[1:] for line in DIFF.splitlines() if not line.startswith(dropped))
    run(kept, nn=nn, key=jax.random.key(0), x=jnp.ones((4, 8)))


def test_short_snippets_run():
    run(PYTHON[0])


@pytest.mark.slow
def test_the_pair_to_paste_shows_the_difference():
    accuracies = dict(re.findall(r"(\w+) ([0-9.]+)", run(PYTHON[1])))
    assert float(accuracies["swish"]) < 0.2
    assert float(accuracies["NSwish"]) > 0.9


def test_thirty_layers_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize(("word", "low", "high"), [("swish", 0.0, 0.2), ("NSwish", 0.9, 1.0), ("NReLU", 0.8, 1.0)])
def test_thirty_layers_learn_only_when_normalized(word, low, high):
    run = subprocess.run([sys.executable, str(SCRIPT), word], capture_output=True, text=True, check=True)
    accuracy = float(re.search(rf"{word}: test accuracy ([0-9.]+)", run.stdout)[1])
    assert low <= accuracy <= high


def test_cost_is_that_of_the_benchmark():
    rows = json.loads((ROOT / "experiments" / "results" / "cost" / "cost.json").read_text())["rows"]

    def ratios(case, measure, networks):
        found = {row["what"].split(",")[0]: row[measure][1] for row in rows if row["case"] == case}
        return ", ".join(f"{found[network]:.2f}" for network in networks)

    three = ("resnet20", "resnet50", "mlp30")
    of_batch_norm, of_plain = (ratios("NSwish", measure, three) for measure in ("of BatchNorm", "ratio"))
    said = "takes {} of one with BatchNorm and Swish in ResNet-20, {} in ResNet-50, {} in 30 dense layers"
    assert said.format(*of_batch_norm.split(", ")) in README
    assert f"(of plain Swish {of_plain})" in README
