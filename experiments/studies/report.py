"""The report on a comparison: its tables and pictures, in Markdown and in one HTML file."""

import base64
import html
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.studies.grid import Results
from experiments.studies.tables import Place, Runs, Table, arrange, markdown_table

_PANELS_IN_A_ROW = 3
_HOW_TO_READ = (
    "Test accuracy in percent: mean over seeds and 95% interval (Student's t). In parentheses: the difference from the "
    "plain activation in the same network, paired by seed; bold where its interval excludes 0. The intervals are not "
    "corrected for the number of comparisons. After *at*: the learning rate, chosen on a validation split with other "
    "seeds († at the edge of the grid: a better one may lie beyond it). A diverged run counts as guessing."
)


def draw_curves(table: Table, path: Path) -> None:
    """Validation accuracy over epochs at the chosen learning rate: mean over seeds, band from worst to best.

    From where a run has diverged on, it is drawn as guessing.
    """

    def draw(panel: Axes, runs: Runs, **style: Any) -> None:
        curves = [
            ([record["validation_accuracy"] for record in outcome["curve"]], outcome["validation_accuracy"])
            for outcome in runs.verdict.values()
        ]
        epochs = max(len(curve) for curve, _ in curves)
        values = np.array([curve + [final] * (epochs - len(curve)) for curve, final in curves])
        panel.plot(range(1, epochs + 1), values.mean(0), marker=".", **style)
        panel.fill_between(range(1, epochs + 1), values.min(0), values.max(0), color=style["color"], alpha=0.15)
        panel.set(xlabel="epoch", ylabel="validation accuracy")

    _draw_panels(table, path, draw)


def draw_rates(table: Table, path: Path) -> None:
    """Validation accuracy over learning rates: how wide the range is that works."""

    def draw(panel: Axes, runs: Runs, **style: Any) -> None:
        rates = sorted(runs.by_rate)
        panel.plot(rates, [np.mean(runs.by_rate[rate]) for rate in rates], marker=".", **style)
        panel.set(xlabel="learning rate", ylabel="validation accuracy", xscale="log")

    _draw_panels(table, path, draw)


def _draw_panels(table: Table, path: Path, draw: Callable[..., None]) -> None:
    activations = sorted({name for column in table.values() for name in column})
    columns = min(_PANELS_IN_A_ROW, len(activations))
    rows = -(-len(activations) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3 * rows), layout="constrained", squeeze=False, sharey=True
    )
    for panel in panels.flat[len(activations) :]:
        panel.axis("off")
    for panel, activation in zip(panels.flat, activations, strict=False):
        for number, (side, column) in enumerate(table.items()):
            if activation in column:
                line = "--" if side == side.plain else "-"
                draw(panel, column[activation], color=f"C{number}", linestyle=line, label=str(side))
        panel.set(title=activation, ylim=(0, 1.02))
        panel.label_outer()
        panel.grid(alpha=0.3)
    handles = {
        text: line for panel in panels.flat for line, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_reports(results: Results, workdir: Path, command: str) -> list[Path]:
    """Writes all results to `report.md`, with the pictures beside it, and to `report.html`, with the pictures in it."""
    intro = [f"Last addition by `{command}`.", _HOW_TO_READ]
    markdown = ["# Comparison", *intro]
    page = ["<h1>Comparison</h1>", *(f"<p>{html.escape(text)}</p>" for text in intro)]
    for place, table in arrange(results).items():
        title, recipe = f"{place.dataset}, {place.model}", _recipe(place, table)
        markdown += [f"## {title}", recipe, markdown_table(table)]
        page += [f"<h2>{html.escape(title)}</h2>", f"<p>{html.escape(recipe)}</p>", _html_table(markdown_table(table))]
        for kind, draw in (("curves", draw_curves), ("rates", draw_rates)):
            picture = workdir / f"{place.file_name}-{kind}.png"
            draw(table, picture)
            markdown.append(f"![{title}, {kind}]({picture.name})")
            encoded = base64.b64encode(picture.read_bytes()).decode()
            page.append(f'<img alt="{html.escape(title)}, {kind}" src="data:image/png;base64,{encoded}">')
    reports = workdir / "report.md", workdir / "report.html"
    reports[0].write_text("\n\n".join(markdown) + "\n")
    reports[1].write_text(_PAGE.format(body="\n".join(page)))
    return list(reports)


def _recipe(place: Place, table: Table) -> str:
    images = "all" if place.train_images is None else f"{place.train_images:,}"
    part = f" of half {place.half}" if place.half else ""
    size = f", pixels averaged in blocks of {place.pool}x{place.pool}" if place.pool > 1 else ""
    seeds = sorted({len(runs.verdict) for column in table.values() for runs in column.values()})
    rates = sorted({rate for column in table.values() for runs in column.values() for rate in runs.by_rate})
    return (
        f"{images} training images{part}{size}, {place.optimizer}, {place.epochs} epochs, batches "
        f"of {place.batch_size}; learning rates "
        f"{', '.join(f'{rate:g}' for rate in rates)}; {' to '.join(map(str, {seeds[0]: 0, seeds[-1]: 0}))} seeds."
    )


def _html_table(markdown: str) -> str:
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_emphasis(html.escape(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _emphasis(text: str) -> str:
    before, *middle = text.split("**")
    return f"{before}<b>{middle[0]}</b>{middle[1]}" if middle else before


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Comparison</title>
<style>
body {{ font-family: sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }} th, td {{ border: 1px solid #ccc; padding: 0.2rem 0.6rem; text-align: left }}
img {{ max-width: 100%; display: block; margin: 1rem 0 }}
</style>
{body}
</html>
"""
