import re

import pytest

from experiments.studies import front_picture
from experiments.studies.front_picture import RATES, SIDES

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.slow
def test_redrawn_from_finished_runs(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr("experiments.studies.results.train_together", None)  # nothing is left to train
    picture = tmp_path / "front.png"
    status, output = run_main(front_picture, "--output", str(picture))
    assert status == 0
    assert picture.stat().st_size > 10_000
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in table(output.out)}
    assert list(rows) == list(SIDES)
    assert all(len(row) == len(RATES) for row in rows.values())
    assert max(rows["Swish"]) < 20 < min(rows["BatchNorm, then Swish"])
    assert min(rows["NSwish, without BatchNorm"]) > max(rows["BatchNorm, then Swish"])


def table(text):
    lines = [line for line in text.splitlines() if re.match(r"\| [A-Z]", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_bad_settings_end_in_one_line(refused):
    refused(front_picture, "--seeds", "0", message="seeds must be at least 1, got 0")
