import json

import numpy as np
import pytest

from experiments.config import Recipe, changed
from experiments.data import load
from experiments.studies import convergence
from experiments.studies.convergence import Point, distance_from_one, rank_correlation

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activations", "relu", "nswish"], "unknown activation 'nswish'"),
        (["--activations", "relu"], "a correlation needs at least 2 activations, got 1"),
        (["--form", "mean+unit"], "unknown form 'mean+unit'; expected default, published, or a label"),
        (["--scales", "1", "-1"], "scales must be a positive number, got -1"),
        (["--model", "mlp11"], "unknown model 'mlp11'"),
        (["--seeds", "0"], "seeds must be at least 1"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, refused):
    refused(convergence, *arguments, message=message)


@pytest.mark.slow
def test_distance_is_that_of_he_for_relu():
    """ReLU halves second moments both ways; multiplied by sqrt(2), as He's initialization does, it keeps them."""
    network = changed(Recipe(), model="mlp10", norm="none", activation="relu")
    digits = load("digits")
    assert abs(distance_from_one(network, 1.0, digits) - 2 * np.log(2)) < 0.35
    assert distance_from_one(network, 2**0.5, digits) < 0.35
    normalized = changed(Recipe(), model="mlp10", norm="none", activation="nrelu", form="published")
    assert distance_from_one(normalized, 1.0, digits) < 0.35
    assert distance_from_one(normalized, 8.0, digits) == pytest.approx(2 * np.log(64), rel=0.05)


def points(pairs, activation):
    return [Point(activation, 1.0, distance, loss, 0.1) for distance, loss in pairs]


def test_rank_correlation():
    up = points([(1, 0.1), (2, 0.2), (3, 0.9)], "relu") + points([(1.5, 0.15), (2.5, 0.25)], "nrelu")
    more = points([(4, 1.0), (5, 1.2)], "nswish")
    assert rank_correlation(up + more) == (1, 1, 1)
    down = [point._replace(distance=-point.distance) for point in up + more]
    assert rank_correlation(down).rank == -1


def test_interval_resamples_whole_activations():
    """Within each activation the order is perfect, but three activations are too few to know more."""
    groups = [
        points([(i + 3 * shift, i + 10 * ((shift * 2) % 3)) for i in range(20)], name)
        for shift, name in enumerate(["relu", "tanh", "elu"])
    ]
    correlation = rank_correlation([point for group in groups for point in group])
    assert correlation.low < correlation.rank < correlation.high
    assert correlation.high - correlation.low > 0.2


@pytest.mark.slow
def test_program_reports_and_does_not_run_twice(tmp_path, run_main):
    arguments = [
        *("--activations", "tanh", "relu", "--scales", "1", "2", "--learning-rates", "0.01", "0.1"),
        *("--seeds", "1", "--epochs", "2", "--workdir", str(tmp_path)),
    ]
    status, first = run_main(convergence, *arguments)
    assert status == 0
    lines = (tmp_path / "results.jsonl").read_text()
    assert lines.count("\n") == 2 * 3 * 2
    record = json.loads((tmp_path / "points.json").read_text())
    assert len(record["points"]) == 6
    assert f"all: rank correlation {record['correlations']['all']['rank']:.2f}" in first.out
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert all(0 < point["loss"] <= np.log(10) + 1e-9 for point in record["points"])
    status, second = run_main(convergence, *arguments)
    assert second.out == first.out
    assert (tmp_path / "results.jsonl").read_text() == lines
