"""Pictures of measured rows."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

import anact_jax.nnx
from anact_jax.diagnostics import LayerVariances, nnx_gains
from anact_jax.plots import draw


def rows_at(step, layers=12):
    return [LayerVariances(f"Dense_{i}", jnp.array(1.0 + i), jnp.array(10.0 ** (i - step))) for i in range(layers)]


def test_pictures_over_depth_and_over_training(tmp_path):
    records = {step: rows_at(step) for step in (0, 5, 10)}
    over_depth, over_training = draw(records), draw(records, over="training")
    assert [len(panel.lines) for panel in over_depth.axes] == [3, 3]
    assert [len(panel.lines) for panel in over_training.axes] == [12, 12]
    line = over_depth.axes[1].lines[1]
    np.testing.assert_allclose(line.get_ydata(), [10.0 ** (i - 5) for i in range(12)], rtol=1e-6)
    np.testing.assert_array_equal(over_training.axes[1].lines[3].get_xdata(), [0, 5, 10])
    assert [text.get_text() for text in over_depth.legends[0].get_texts()] == ["0", "5", "10"]
    assert len(over_training.legends[0].get_texts()) == 8
    assert over_depth.axes[1].get_yscale() == "log"
    over_depth.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_picture_of_gains_has_a_panel_for_each_number():
    rows = nnx_gains(anact_jax.nnx.NSwish())
    figure = draw({"swish": [*rows, rows[0]._replace(shift=-rows[0].shift, factor=20 * rows[0].factor)]})
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["forward", "backward", "factor", "shift", "bare forward", "bare backward"]
    assert [panel.get_yscale() for panel in figure.axes] == ["linear", "linear", "log", "linear", "linear", "linear"]


@pytest.mark.parametrize(
    ("records", "over", "error", "message"),
    [
        ({}, "depth", ValueError, "got 0 records"),
        ({"a": rows_at(0), "b": []}, "depth", ValueError, "got 2 records of 1 kinds"),
        ({"a": rows_at(0)}, "width", ValueError, "unknown over 'width'; expected one of depth, training"),
        ({"a": rows_at(0)}, "training", TypeError, "must be numbers, such as steps, got 'a'"),
        ({0: rows_at(0), 1: rows_at(0, 3)}, "training", ValueError, "as many layers"),
    ],
)
def test_what_cannot_be_drawn_is_named(records, over, error, message, unchecked_types):
    with pytest.raises(error, match=message):
        draw(records, over=over)


def test_without_matplotlib_pictures_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw({0: rows_at(0)})
