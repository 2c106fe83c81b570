"""What a comparison found: tables with intervals, pictures, and the reports that hold them."""

import base64
import dataclasses
import html
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from jaxtyping import Float
from matplotlib.axes import Axes

from anact_jax import RULES
from anact_jax.form import check_nonlinearity
from experiments.cells import Outcome, Results
from experiments.cli import table_head, table_row
from experiments.models import BOUNDS, TEMPERINGS, TRACKINGS, ActivationName, check_name

_WAYS_OF = {"tracking": TRACKINGS, "tempering": TEMPERINGS, "bounds": BOUNDS}  # the library's own comes first
_PANELS_IN_A_ROW = 3
_HOW_TO_READ = (
    "Test accuracy in percent: mean over seeds and 95% interval (Student's t). In parentheses: the difference from the "
    "plain activation in the same network, paired by seed; bold where its interval excludes 0. The intervals are not "
    "corrected for the number of comparisons. After *at*: the learning rate, chosen on a validation split with other "
    "seeds († at the edge of the grid: a better one may lie beyond it). A diverged run counts as guessing."
)


class Variant(NamedTuple):
    """Options of a normalized activation, written as a rule and what is added to it.

    `"mean+center+unit+feature+nu0.1"` is `rule="mean", center=True, reference="unit", feature_axes=-1,
    nonlinearity=0.1`; `+diff` is `stop_gradient=False`, `+learn` is `learnable=True`; `+lag` and `+fixed` are its
    `tracking`, `+scale` and `+measured` its `tempering`, `+step` and `+range` its `bounds`.
    """

    rule: str
    center: bool
    reference: str
    stop_gradient: bool
    learnable: bool
    per_feature: bool
    nonlinearity: float | None
    tracking: str = "batch"
    tempering: str = "leak"
    bounds: str = "none"

    @property
    def usual(self) -> "Variant":
        """The same form in the library's own ways."""
        return self._replace(tracking=TRACKINGS[0], tempering=TEMPERINGS[0], bounds=BOUNDS[0])

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Raises ValueError where a part is unknown."""
        rule, *extras = text.split("+")
        check_name("rule", rule, RULES)
        limits = [extra for extra in extras if extra.startswith("nu")]
        for extra in extras:
            if extra not in limits[:1]:
                check_name(
                    "extra of a rule",
                    extra,
                    (
                        "center",
                        "unit",
                        "diff",
                        "learn",
                        "feature",
                        *(way for known in _WAYS_OF.values() for way in known[1:]),
                        "nu and one number",
                    ),
                )
        try:
            nonlinearity = float(limits[0].removeprefix("nu")) if limits else None
        except ValueError:
            raise ValueError(f"expected a number after nu, such as nu0.1, got {limits[0]!r}") from None
        if nonlinearity is not None:
            check_nonlinearity(nonlinearity)
        reference = "unit" if "unit" in extras else "input"
        constant, learned = "diff" not in extras, "learn" in extras
        ways = (next((extra for extra in extras if extra in known), known[0]) for known in _WAYS_OF.values())
        return cls(rule, "center" in extras, reference, constant, learned, "feature" in extras, nonlinearity, *ways)

    def __str__(self) -> str:
        extras = {
            "center": self.center,
            "unit": self.reference == "unit",
            "diff": not self.stop_gradient,
            "learn": self.learnable,
            "feature": self.per_feature,
            **{getattr(self, name): getattr(self, name) != known[0] for name, known in _WAYS_OF.items()},
            f"nu{self.nonlinearity:g}" if self.nonlinearity else "": self.nonlinearity is not None,
        }
        return "+".join([self.rule, *(name for name, present in extras.items() if present)])


class Place(NamedTuple):
    """What a table is about: all sides in it differ only in what follows."""

    dataset: str
    train_images: int | None
    half: int | None
    pool: int
    epochs: int
    batch_size: int
    optimizer: str
    model: str

    @property
    def file_name(self) -> str:
        """Short; what is as usual is left out."""
        return "-".join(str(part) for part in self if part not in (None, "sgd"))


class Side(NamedTuple):
    """A column of the table: `variant` is None for activations that are not normalized."""

    norm: str
    init: str
    variant: Variant | None
    shaped: bool = False

    @property
    def plain(self) -> "Side":
        """The same network with plain activations."""
        return self._replace(variant=None, shaped=False)

    def __str__(self) -> str:
        activation = "plain" if self.variant is None else f"normalized, {self.variant}"
        activation = "Deep Kernel Shaping" if self.shaped else activation
        norm = {"none": "", "batch": ", BatchNorm", "group": ", GroupNorm", "layer": ", LayerNorm"}[self.norm]
        return activation + norm + ("" if self.init == "lecun" else f", {self.init} init")


class Interval(NamedTuple):
    """A mean and the half width of its 95% interval by Student's t; NaN for a single value."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float] | Float[np.ndarray, " n"]) -> "Interval":
        """Of independent values."""
        n = len(values)
        if n < 2:
            return cls(float(np.mean(values)), float("nan"))
        return cls(float(np.mean(values)), float(scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values)))

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of 0."""
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        width = "" if np.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{width}"


@dataclasses.dataclass
class Runs:
    """All runs of one activation on one side.

    Attributes:
        by_rate: validation accuracies at each learning rate that was tried.
        verdict: outcomes at the chosen learning rate, by seed, measured on the test split.
        rate: the chosen learning rate, None before it is.
    """

    by_rate: dict[float, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    verdict: dict[int, Outcome] = dataclasses.field(default_factory=dict)
    rate: float | None = None

    @property
    def at_edge(self) -> bool:
        """Whether the chosen learning rate is the smallest or the largest: a better one may lie beyond."""
        return self.rate in (min(self.by_rate), max(self.by_rate))

    def accuracy(self) -> Interval:
        """Of the test split, in the mean over seeds."""
        return Interval.of([outcome["test_accuracy"] for outcome in self.verdict.values()])

    def against(self, other: "Runs") -> Interval:
        """Difference of test accuracies, seed by seed: the same weights at the start, the same order of examples."""
        seeds = sorted(self.verdict.keys() & other.verdict.keys())
        difference = [self.verdict[s]["test_accuracy"] - other.verdict[s]["test_accuracy"] for s in seeds]
        return Interval.of(difference)


Table = dict[Side, dict[str, Runs]]  # side -> activation without n -> runs


def arrange(results: Results) -> dict[Place, Table]:
    """Everything finished, sorted into tables."""
    tables: dict[Place, Table] = defaultdict(lambda: defaultdict(lambda: defaultdict(Runs)))
    for settings, outcome in results:
        place = Place(*(settings[name] for name in Place._fields))
        form, activation = ActivationName.parse(settings["activation"])
        variant = Variant(*(settings[field] for field in Variant._fields)) if form == "n" else None
        runs = tables[place][Side(settings["norm"], settings["init"], variant, form == "d")][activation]
        if settings["on_test"]:
            if runs.rate != settings["learning_rate"]:  # chosen anew, from more learning rates
                runs.rate, runs.verdict = settings["learning_rate"], {}
            runs.verdict[settings["seed"]] = outcome
        else:
            runs.by_rate[settings["learning_rate"]].append(outcome["validation_accuracy"])
    return {place: _finished(table) for place, table in tables.items()}


def _finished(table: Table) -> Table:
    """Only what has been measured on the test split, in a fixed order."""
    sides = {side: {name: runs for name, runs in column.items() if runs.verdict} for side, column in table.items()}
    order = sorted(
        sides, key=lambda side: (side.norm != "none", side.norm, side.init, side.shaped, str(side.variant or ""))
    )
    return {side: sides[side] for side in order if sides[side]}


def markdown_table(table: Table) -> str:
    """Test accuracy in percent; in parentheses, beside normalized activations, the difference from the plain ones."""
    sides = list(table)
    rows = [table_head("activation", *map(str, sides))]
    for activation in sorted({name for column in table.values() for name in column}):
        rows.append(table_row(activation, *(_cell(table, side, activation) for side in sides)))
    return "\n".join(rows)


def _cell(table: Table, side: Side, activation: str) -> str:
    runs = table[side].get(activation)
    if runs is None:
        return ""
    diverged = sum(outcome["diverged"] for outcome in runs.verdict.values())
    notes = f" at {runs.rate:g}{'†' if runs.at_edge else ''}" + (f", {diverged} diverged" if diverged else "")
    plain = table.get(side.plain, {}).get(activation)
    if side == side.plain or plain is None:
        return f"{runs.accuracy()}{notes}"
    difference = runs.against(plain)
    text = f"{'+' if difference.mean > 0 else ''}{difference}"
    return f"{runs.accuracy()} ({f'**{text}**' if difference.excludes_zero else text}){notes}"


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
