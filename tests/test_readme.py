"""What the README prints is what runs."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
(PYTHON,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
(DIFF,) = re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)


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


def test_short_snippet_runs():
    run(PYTHON)


@pytest.mark.parametrize("example", [PYTHON, DIFF], ids=["python", "diff"])
def test_examples_are_short(example):
    assert len(example.splitlines()) <= 15


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
