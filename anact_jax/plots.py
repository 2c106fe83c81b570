"""Pictures of what `anact_jax.diagnostics` measured."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np

from anact_jax.diagnostics import LayerGains, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Over: TypeAlias = Literal["depth", "training"]

_LINES_IN_LEGEND = 8
_LAYERS = "layer, from input to output"
_GAINS = {"forward": "signals", "backward": "gradients"}
_MARKERS = "osD^vP*X"
_GOOD_GAINS = (
    "Bad: signals or gradients that grow or vanish over the layers. In a chain gains and weights multiply,\n"
    "and their product should stay near 1. After weights or additions that raise the variance, a gain below 1 is right."
)


def draw(records: Mapping[Any, Rows], *, over: Over = "depth") -> "Figure":
    """A picture of rows that were recorded at several steps, or of several models.

    There is a panel for each number. Gains over depth have one for each record instead, with a line at 1; a plain
    activation, whose factor is 1 and whose shift is 0, has one line for each gain there, a normalized one two.

    Args:
        records: label, such as the training step or the model's name -> rows.
        over: `"depth"` draws numbers over layers, a line for each record; `"training"` draws them over
            the labels, which must be numbers then, a line for each layer. Of many lines the legend names some.

    Returns:
        A matplotlib figure; `figure.savefig("picture.png")` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: over training with labels that are not numbers.
        ValueError: nothing to draw, rows of different kinds, or `over` is unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from anact_jax.diagnostics import LayerVariances
        >>> rows = {step: [LayerVariances("Dense_0", jnp.array(1.0), jnp.array(1.0 + step))] for step in (0, 100)}
        >>> [panel.get_title() for panel in draw(rows, over="training").axes]
        ['signal', 'gradient']
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    if over not in get_args(Over):
        raise ValueError(f"unknown over {over!r}; expected one of {', '.join(get_args(Over))}")
    fields = {rows[0]._fields for rows in records.values() if rows}
    if len(fields) != 1 or not all(records.values()):
        raise ValueError(
            f"draw needs records with rows of one kind in each, got {len(records)} records of {len(fields)} kinds"
        )
    if over == "training" and not all(isinstance(label, int | float) for label in records):
        raise TypeError(f"over training the labels must be numbers, such as steps, got {', '.join(map(repr, records))}")
    if over == "training" and len({len(rows) for rows in records.values()}) != 1:
        raise ValueError("over training all records must have as many layers, those of one model")

    if over == "depth" and next(iter(fields)) == LayerGains._fields:
        return _gains_by_layer(cast(Mapping[Any, Sequence[LayerGains]], records))
    numbers = next(iter(fields))[1:]
    figure = Figure(figsize=(1 + 3.4 * len(numbers), 3.8), layout="constrained")
    panels = figure.subplots(1, len(numbers), squeeze=False)[0]
    for panel, field in zip(panels, numbers, strict=True):
        values = {label: [float(getattr(row, field)) for row in rows] for label, rows in records.items()}
        if over == "depth":
            lines = [(str(label), list(range(1, len(line) + 1)), line) for label, line in values.items()]
        else:
            names = [row.name for row in next(iter(records.values()))]
            by_layer = zip(names, zip(*values.values(), strict=True), strict=True)
            lines = [(name, list(values), line) for name, line in by_layer]
        shown = set(np.linspace(0, len(lines) - 1, min(len(lines), _LINES_IN_LEGEND)).round())
        for index, (label, places, line) in enumerate(lines):
            color = mpl.colormaps["viridis"](0.9 * index / max(1, len(lines) - 1))
            panel.plot(places, line, ".-", color=color, label=label if index in shown else None)
        finite = [number for line in values.values() for number in line if np.isfinite(number)]
        if finite and 0 <= 10 * min(finite) < max(finite):  # over decades
            plain_log_scale(panel)
        panel.set(title=field.replace("_", " "), xlabel=_LAYERS if over == "depth" else "step")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    if over == "depth":
        figure.supxlabel("Good: level from layer to layer, whatever the level.", fontsize="medium")
    return figure


def plain_log_scale(panel: "Axes") -> None:
    """A logarithmic y axis with ticks at 0.5, 1, 2, or at powers of 10 where it spans more than three decades.

    To be called after drawing.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _gains_by_layer(records: Mapping[Any, Sequence[LayerGains]]) -> "Figure":
    """A panel for each record, with both gains on one axis; a line joins layers that stand at the same place."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(2.6 + 5.4 * len(records), 4.6), layout="constrained")
    panels = figure.subplots(1, len(records), squeeze=False, sharey=True)[0]
    places = list(dict.fromkeys(_place(row.name) for rows in records.values() for row in rows))
    markers = {place: _MARKERS[index % len(_MARKERS)] for index, place in enumerate(places)}
    legend: dict[str, Line2D] = {}
    for panel, (label, rows) in zip(panels, records.items(), strict=True):
        panel.axhline(1, color="black", linewidth=1)
        alike: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            alike.setdefault(_place(row.name), []).append(index)
        for color, (gain, of_what) in zip(("C0", "C1"), _GAINS.items(), strict=True):
            for place, layers in alike.items():
                plain = all(_is_plain(rows[layer]) for layer in layers)
                lines = [(gain, "-", "plain activation" if plain else "normalized")]
                lines += [] if plain else [(f"bare_{gain}", ":", "f(x) alone")]
                for field, style, what in lines:
                    values = [float(getattr(rows[layer], field)) for layer in layers]
                    marker = markers[place] if field == gain else ""
                    look: dict[str, Any] = {"color": color, "linestyle": style, "markersize": 4}
                    panel.plot([layer + 1 for layer in layers], values, marker=marker, **look)
                    legend[f"{gain} ({of_what}), {what}"] = Line2D([], [], **look)
        panel.set(title=str(label), xlabel=_LAYERS)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("gain: variance out / variance in")
    drawn = np.concatenate([np.ravel(line.get_ydata()) for panel in panels for line in panel.lines])
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]  # never empty: the line at 1
    panels[0].set_ylim(min(0.45, 0.9 * drawn.min()), max(2.2, 1.1 * drawn.max()))
    for panel in panels:
        plain_log_scale(panel)
    if len(places) > 1:
        for place in places[:_LINES_IN_LEGEND]:
            legend[place] = Line2D([], [], color="gray", linestyle="", marker=markers[place], markersize=4)
    figure.legend(list(legend.values()), list(legend), loc="outside upper center", ncols=2)
    figure.supxlabel(_GOOD_GAINS, fontsize="medium")
    return figure


def _is_plain(row: LayerGains) -> bool:
    return float(row.factor) == 1 and float(row.shift) == 0


def _place(name: str) -> str:
    """Where a layer stands, whatever the number of its block: the second activation of a block, for instance."""
    *blocks, layer = name.split("/")
    without_numbers = [re.sub(r"_?\d+", "", part) for part in (*blocks, layer)]
    return "/".join([*without_numbers[:-1], layer] if blocks else without_numbers)
