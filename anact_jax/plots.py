"""Pictures of what `anact_jax.diagnostics` measured."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from anact_jax.diagnostics import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Over: TypeAlias = Literal["depth", "training"]

_LINES_IN_LEGEND = 8


def draw(records: Mapping[Any, Rows], *, over: Over = "depth") -> "Figure":
    """A picture of rows that were recorded at several steps, or of several models: a panel for each number.

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

    numbers = next(iter(fields))[1:]
    figure = Figure(figsize=(1 + 3.4 * len(numbers), 3.6), layout="constrained")
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
            panel.set_yscale("log")
        panel.set(title=field.replace("_", " "), xlabel="layer, from input to output" if over == "depth" else "step")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure
