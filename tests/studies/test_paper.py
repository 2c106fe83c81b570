import re

import pytest

from experiments.studies import paper
from experiments.studies.paper import PLAIN, SIDES, report

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_claims_are_held_against_what_was_measured():
    below, above, unclear, far = SIDES
    found = {below: [0.7, 0.71, 0.72], above: [0.72, 0.729, 0.741], unclear: [0.71, 0.70, 0.74], far: [0.6, 0.61, 0.62]}
    text = report("tiny_imagenet", found)
    assert "| BatchNorm, swish | 71.0 ± 2.5 |  |" in text
    lines = dict(re.findall(r"^- (.+): ([+-].+)\.$", text, re.MULTILINE))
    assert lines[above].startswith("+2.0 ± 0.2 points") and lines[above].endswith("1.4 points or more: it held")
    assert lines[unclear].endswith("it did not hold")
    assert lines[far].startswith("-10.0") and lines[far].endswith("it did not hold")
    assert "names no figure" in report("fashion_mnist", found)
    assert "one seed cannot tell" in report("cifar100", {side: values[:1] for side, values in found.items()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "unknown dataset 'imagenet'; expected one of tiny_imagenet"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--dataset", "cifar100", "--data-dir", "/nowhere"], "python experiments/prepare_data.py cifar100"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, refused, tmp_path):
    refused(paper, *arguments, "--workdir", tmp_path, message=message)


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(tmp_path, run_main):
    arguments = ("--dataset", "digits", "--model", "mlp5", "--epochs", "2", "--seeds", "1", "--workdir", tmp_path)
    status, first = run_main(paper, *arguments)
    assert status == 0
    assert first.out.count("test_accuracy=") == len(SIDES)
    assert f"| {PLAIN} | " in first.out
    runs = sorted(path.name for path in tmp_path.iterdir())
    assert len(runs) == len(SIDES)
    unfinished = tmp_path / runs[0] / "metrics.jsonl"
    lines = unfinished.read_text().splitlines(keepends=True)
    unfinished.write_text("".join(lines[:-1]))  # as if stopped before the last evaluation
    status, second = run_main(paper, *arguments)
    assert status == 0
    assert second.out.count("test_accuracy=") == 1
    assert second.out.splitlines()[-8:] == first.out.splitlines()[-8:]
