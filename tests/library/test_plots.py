"""Pictures of measured rows."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from anact_jax.diagnostics import LayerGains, LayerVariances
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


def gains_at(names, forward):
    return [
        LayerGains(name, *(jnp.float32(value) for value in (gain, 2 * gain, 1.5, 0.1, 0.3, 0.4)))
        for name, gain in zip(names, forward, strict=True)
    ]


def test_gains_share_an_axis_with_a_line_at_1():
    blocks = [f"Block_{block}/ANAct_{index}" for block in range(3) for index in range(2)]
    figure = draw({"residual": gains_at(blocks, range(1, 7)), "chain": gains_at(["ANAct_0", "ANAct_1"], [1.0, 3.0])})
    residual, chain = figure.axes
    assert [panel.get_title() for panel in (residual, chain)] == ["residual", "chain"]
    assert residual.get_yscale() == "log"
    one, first, _, second, *_ = residual.lines
    assert one.get_ydata() == [1, 1]
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([1, 3, 5], [1, 3, 5])
    assert (second.get_xdata().tolist(), second.get_ydata().tolist()) == ([2, 4, 6], [2, 4, 6])
    assert chain.lines[1].get_ydata().tolist() == [1, 3]
    assert "product should stay near 1" in figure.get_supxlabel()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[0] == "forward (signals), normalized"
    assert names[4:] == ["Block/ANAct_0", "Block/ANAct_1", "ANAct"]
    assert len(residual.lines) == 1 + 2 * 2 * 2


def test_a_plain_activation_has_one_line():
    plain = [LayerGains("Plain_0", *map(jnp.float32, (0.6, 0.5, 1.0, 0.0, 0.6, 0.5)))]
    figure = draw({"plain": plain})
    assert len(figure.axes[0].lines) == 1 + 2
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["forward (signals), plain activation", "backward (gradients), plain activation"]


def test_ticks_are_plain_numbers():
    figure = draw({"a": gains_at(["ANAct_0"], [0.6])})
    figure.draw_without_rendering()
    panel = figure.axes[0]
    low, high = panel.get_ylim()
    shown = [label.get_text() for label in panel.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert {"0.5", "1", "2"} <= set(shown)
    assert panel.yaxis.get_minorticklocs().size == 0


def test_gains_over_training_have_panels():
    rows = gains_at(["NSwish"], [1.0])
    figure = draw({0: rows, 1: [rows[0]._replace(shift=-rows[0].shift, factor=20 * rows[0].factor)]}, over="training")
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


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw({0: rows_at(0)})
