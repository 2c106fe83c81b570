"""The report on a comparison: its tables and pictures, in Markdown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.data import DATASETS
from experiments.data.kept import read_kept
from experiments.forms import WORDS, label_of
from experiments.studies.results import Results
from experiments.studies.tables import Place, Runs, Side, Table, arrange, markdown_table

_PANELS_IN_A_ROW = 3
_HOW_TO_READ = (
    "Test accuracy in percent: mean over seeds and 95% interval (Student's t). In parentheses: the difference from the "
    "plain activation in the same network, paired by seed; bold where its interval excludes 0. The intervals are not "
    "corrected for the number of comparisons. After *at*: the learning rate, chosen on a validation split with other "
    "seeds († at the edge of the grid: a better one may lie beyond it). A diverged run counts as guessing."
)


def draw_curves(table: Table, path: Path, guessing: float) -> None:
    """Validation accuracy over epochs at the chosen learning rate: mean over seeds, band from worst to best.

    From where a run has diverged on, it is drawn as guessing.
    """
    outcomes = [found for column in table.values() for runs in column.values() for found in runs.verdict.values()]
    epochs = max(len(found["curve"]) for found in outcomes)

    def draw(panel: Axes, runs: Runs, **style: Any) -> None:
        curves = [
            ([record["validation_accuracy"] for record in outcome["curve"]], outcome["validation_accuracy"])
            for outcome in runs.verdict.values()
        ]
        values = np.array([curve + [final] * (epochs - len(curve)) for curve, final in curves])
        panel.plot(range(1, epochs + 1), values.mean(0), marker=".", **style)
        panel.fill_between(range(1, epochs + 1), values.min(0), values.max(0), color=style["color"], alpha=0.15)
        panel.set(xlabel="epoch", ylabel="validation accuracy")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))

    _draw_panels(table, path, guessing, draw)


def draw_rates(table: Table, path: Path, guessing: float) -> None:
    """Validation accuracy over learning rates: how wide the range is that works."""

    def draw(panel: Axes, runs: Runs, **style: Any) -> None:
        rates = sorted(runs.by_rate)
        panel.plot(rates, [np.mean(runs.by_rate[rate]) for rate in rates], marker=".", **style)
        panel.set(xlabel="learning rate", ylabel="validation accuracy", xscale="log")

    _draw_panels(table, path, guessing, draw)


def _draw_panels(table: Table, path: Path, guessing: float, draw: Callable[..., None]) -> None:
    """A panel for each activation, with a line for each side and one for guessing."""
    activations = sorted({name for column in table.values() for name in column})
    columns = min(_PANELS_IN_A_ROW, len(activations))
    rows = -(-len(activations) // columns)
    width, height = max(4.2 * columns, 7), 3 * rows + 0.25 * len(table)  # the legend: a line for each side
    figure, panels = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, sharey=True
    )
    for panel in panels.flat[len(activations) :]:
        panel.axis("off")
    for panel, activation in zip(panels.flat, activations, strict=False):
        for number, (side, column) in enumerate(table.items()):
            if activation in column:
                line = "--" if side == side.plain else "-"
                draw(panel, column[activation], color=f"C{number}", linestyle=line, label=in_words(side))
        panel.axhline(guessing, color="gray", linestyle=":", linewidth=1, label="guessing")
        panel.set(title=activation, ylim=(0, 1.02))
        panel.label_outer()
        panel.grid(alpha=0.3)
    handles = {
        text: line for panel in panels.flat for line, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def in_words(side: Side) -> str:
    """A side's label, with the names of the forms that have one."""
    named = {label_of(form): f"{name} form" for name, form in WORDS.items()}
    return str(side if side.variation else side._replace(form=named.get(side.form or "", side.form)))


def winner(table: Table) -> str:
    """One sentence: what has the highest accuracy, and by how much it is ahead of the plain activation and of the rest.

    Differences are paired by seed, with their 95% intervals.
    """
    entries = [(side, name, runs) for side, column in table.items() for name, runs in column.items()]
    entries.sort(key=lambda entry: -entry[2].accuracy().mean)
    (side, name, best), *others = entries

    def entry(side: Side, name: str) -> str:
        return f"{name} ({in_words(side)})"

    parts = [f"**{entry(side, name)}** has the highest test accuracy, {best.accuracy()}%"]
    plain = table.get(side.plain, {}).get(name)
    if plain is not None and side != side.plain:
        parts.append(f"{best.against(plain).signed} points against the plain activation in the same network")
    rest = [(s, n, runs) for s, n, runs in others if (s, n) != (side.plain, name)]
    if rest:
        other_side, other_name, other = rest[0]
        parts.append(f"{best.against(other).signed} against the next best, {entry(other_side, other_name)}")
    return "; ".join(parts) + "."


def write_report(results: Results, workdir: Path, command: str) -> Path:
    """Writes all results to `report.md`, with the pictures beside it."""
    tables = arrange(results)
    won = [f"{place.dataset}, {place.model}: {winner(table)}" for place, table in tables.items()]
    opening = won[0] if len(won) == 1 else "\n".join(f"- {sentence}" for sentence in won)
    parts = ["# Comparison", opening, f"Last addition by `{command}`.", _HOW_TO_READ]
    for place, table in tables.items():
        title = f"{place.dataset}, {place.model}"
        guessing = 1 / (DATASETS.get(place.dataset) or read_kept(workdir, place.dataset).classes)
        parts += [f"## {title}", _recipe(place, table), markdown_table(table)]
        for kind, draw in (("curves", draw_curves), ("rates", draw_rates)):
            picture = workdir / f"{place.file_name}-{kind}.png"
            draw(table, picture, guessing)
            parts.append(f"![{title}, {kind}]({picture.name})")
    report = workdir / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def _recipe(place: Place, table: Table) -> str:
    images = "all" if place.train_images is None else f"{place.train_images:,}"
    part = f" of half {place.half}" if place.half else ""
    size = f" of {place.image_size}x{place.image_size} pixels" if place.image_size else ""
    size += f", pixels averaged in blocks of {place.pool}x{place.pool}" if place.pool > 1 else ""
    seeds = sorted({len(runs.verdict) for column in table.values() for runs in column.values()})
    rates = sorted({rate for column in table.values() for runs in column.values() for rate in runs.by_rate})
    return (
        f"{images} training images{part}{size}, {place.optimizer}, {place.epochs} epochs, batches "
        f"of {place.batch_size}; learning rates "
        f"{', '.join(f'{rate:g}' for rate in rates)}; {' to '.join(map(str, {seeds[0]: 0, seeds[-1]: 0}))} seeds."
    )
