"""The default form: what was tried to choose it, and whether the verdict's cells bear it out.

See `python experiments/studies/default_form.py --help`.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from experiments.cli import BAD_SETTINGS, fail, run_program, settings_of, table_head, table_row

# isort: split

import numpy as np
import scipy.stats
from jaxtyping import Float

from experiments.forms import label_named
from experiments.studies.intervals import Interval
from experiments.studies.results import Results
from experiments.studies.rivals import DEEP_KERNEL_SHAPING
from experiments.studies.tables import NORM_NAMES, Place, Runs, Side, Table, arrange

IN_SHORT = ("relu", "swish", "tanh")
ALLOWED_LOSS = 0.003  # accuracy
WITHIN = 0.01  # of the best: a learning rate that is usable, a form as good as a rival
MAIN_DATA = "fashion_mnist"
FEW_FORMS = 6  # tried in a network, up to which it is a row of the second table
_Networks = dict[str, dict[str, str]]  # network -> form -> entry
_HEADER = (
    "| activation | plain | default | difference, 95% | corrected | usable rates | best rival | default - rival |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints the verdict on a form of the normalized activation as tables, from cells that compare.py finished.

    *Difference*: of test accuracies in points, default minus plain, paired by seed, with its 95% interval by
    Student's t; *corrected* is the interval's half width by Bonferroni for all rows of all tables. *Usable rates*:
    largest over smallest learning rate within 1 point of the best on the validation split, of plain and
    of default. *Rivals*: other normalization layers and Deep Kernel Shaping with the same
    activation, ReLU in He's initialization, SELU; those that were measured. What is *less* another is a difference
    of test accuracies too, paired by seed, with its 95% interval.
    """

    choice: Path = Path("experiments/results/choice")
    """folder with results.jsonl of the forms that were tried"""
    workdir: Path = Path("experiments/results/verdict")
    """folder with results.jsonl of the verdict"""
    form: str = "default"
    """the form that is judged: default, published, or its label in the results"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One activation in one network: plain, normalized, and what else was tried there."""

    network: str
    activation: str
    plain: Runs
    default: Runs
    rivals: dict[str, Runs]

    @property
    def difference(self) -> Interval:
        """Default minus plain, paired by seed."""
        return self.default.against(self.plain)

    @property
    def best_rival(self) -> str | None:
        """The rival with the highest mean accuracy."""
        return max(self.rivals, key=lambda name: self.rivals[name].accuracy().mean, default=None)


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    try:
        choice, verdict = (_results_in(folder) for folder in (config.choice, config.workdir))
        rows = rows_of(verdict, label_named(config.form))
        if not rows:
            raise ValueError(f"{config.workdir} has no finished runs of form {config.form!r} beside plain ones")
    except (ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    print(forms_table(choice), ways_table(choice), report(rows), short_table(rows), sep="\n\n")
    return 0


def _results_in(folder: Path) -> Results:
    path = folder / "results.jsonl"
    if not path.exists():
        raise ValueError(f"{path} does not exist; experiments/studies/compare.py --workdir {folder} makes it")
    return Results(path)


def forms_table(results: Results) -> str:
    """Test accuracies of the forms that were tried, in two tables.

    Networks in which more than `FEW_FORMS` were tried stand in the first, a column each; the others in the second, a
    row each.
    """
    networks: _Networks = {}
    for network, side, activation, table in _tried(results):
        runs = table[side][activation]
        form = side.label or "plain"
        networks.setdefault(network, {})[form] = f"{runs.accuracy()} at {runs.rate:g}"
    many, few = ({n: f for n, f in networks.items() if (len(f) > FEW_FORMS) == wanted} for wanted in (True, False))
    second = [table_row(network, *(found.get(form, "") for form in _forms(few))) for network, found in few.items()]
    tables = _by_form(many), (table_head("network", *_forms(few)), *second)
    return "\n\n".join("\n".join(lines) for lines in tables if lines[1:])


def ways_table(results: Results) -> str:
    """Ways studied beside the library's own, less the same form without them: accuracies in points, paired by seed."""
    networks: _Networks = {}
    for network, side, activation, table in _tried(results):
        if side.form is None or not side.variation:
            continue
        without = table.get(side._replace(variation=""), {}).get(activation)
        if without is not None:
            networks.setdefault(network, {})[side.label] = table[side][activation].against(without).signed
    return "\n".join(["**Ways beside the library's, less the same form without them**", "", *_by_form(networks)])


def _tried(results: Results) -> Iterator[tuple[str, Side, str, Table]]:
    """Each side and activation that was run: the network's name, where in the table it stands, the table."""
    for place, table in arrange(results).items():
        for side, column in table.items():
            also = [part for part in (side.norm, place.optimizer) if part not in ("none", "sgd")]
            for activation in column:
                yield ", ".join([_network(place), activation, f"pool {place.pool}", *also]), side, activation, table


def _network(place: Place) -> str:
    """The model, and the data where they are not those that most was measured on."""
    return place.model + ("" if place.dataset == MAIN_DATA else f" on {place.dataset}")


def _by_form(networks: _Networks) -> list[str]:
    rows = [table_row(form, *(found.get(form, "") for found in networks.values())) for form in _forms(networks)]
    return [table_head("form", *networks), *rows]


def _forms(networks: _Networks) -> list[str]:
    return sorted({form for found in networks.values() for form in found}, key=lambda form: (len(form), form))


def rows_of(results: Results, label: str) -> list[Row]:
    """Every network and activation in which both plain and the form with this label are finished."""
    rows = []
    for place, table in arrange(results).items():
        for side, column in table.items():
            if side.form == label and not side.variation:
                for activation in sorted(column.keys() & table.get(side.plain, {}).keys()):
                    plain = table[side.plain][activation]
                    network = _network(place) + ("" if side.norm == "none" else f", {side.norm}")
                    rivals = _rivals(table, side, activation)
                    rows.append(Row(network, activation, plain, column[activation], rivals))
    return rows


def _rivals(table: Table, side: Side, activation: str) -> dict[str, Runs]:
    """By name, what a plain activation in the same network would be helped by instead."""
    found: dict[str, Runs] = {}
    for other, column in table.items():
        known = activation
        if other.form is not None:
            continue
        if other.variation:
            name = {DEEP_KERNEL_SHAPING: "DKS"}.get(other.variation, other.variation)
            name += "" if other.norm == "none" else f", {NORM_NAMES[other.norm]}"
        elif other.norm not in ("none", side.norm):
            name = NORM_NAMES[other.norm]
        elif other.norm == "none":
            name, known = ("ReLU, He", "relu") if other.init == "he" else ("SELU", "selu")
        else:
            continue
        if known in column:
            found[name] = column[known]
    return found


def usable_range(runs: Runs) -> float:
    """Largest over smallest learning rate within `WITHIN` of the best on the validation split; 0 if none learns."""
    means = {rate: float(np.mean(values)) for rate, values in runs.by_rate.items()}
    best = max(means.values())
    good = [rate for rate, mean in means.items() if mean >= best - WITHIN]
    return max(good) / min(good) if best > 2 * min(0.1, *means.values()) else 0.0


def half_width(interval: Interval, runs: int, comparisons: int) -> float:
    """Of the interval corrected by Bonferroni for the number of comparisons."""
    t = scipy.stats.t.ppf([1 - 0.025 / comparisons, 0.975], runs - 1)
    return float(interval.half_width * t[0] / t[1])


def report(rows: list[Row]) -> str:
    """Tables, one for each network, and what they come to."""
    parts = []
    for network in dict.fromkeys(row.network for row in rows):
        lines = [table_row(*_cells(row, len(rows))) for row in rows if row.network == network]
        parts.append("\n".join([f"**{network}**", "", *_HEADER, *lines]))
    return "\n\n".join([*parts, _against_rivals(rows), _sum(rows)])


def short_table(rows: list[Row]) -> str:
    """One table of the activations that most people use."""
    head = ("network", "activation", "plain, %", "default, %", "difference, points", "best rival", "default - rival")
    lines = [table_head(*head)]
    for row in rows:
        if row.activation in IN_SHORT:
            _, plain, default, difference, _, _, rival, against = _cells(row, len(rows))
            lines.append(table_row(row.network, row.activation, plain, default, difference, rival, against))
    return "\n".join(lines)


def _against_rivals(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.rivals))
    lines = [
        table_row(
            row.network,
            row.activation,
            *(row.default.against(row.rivals[name]).signed if name in row.rivals else "" for name in names),
        )
        for row in rows
    ]
    return "\n".join(["**Default less each rival**", "", table_head("network", "activation", *names), *lines])


def _cells(row: Row, comparisons: int) -> list[str]:
    difference, rival = row.difference, row.best_rival
    corrected = half_width(difference, len(row.default.verdict), comparisons)
    against = "" if rival is None else row.default.against(row.rivals[rival]).signed
    return [
        row.activation,
        f"{row.plain.accuracy()} at {row.plain.rate:g}",
        f"{row.default.accuracy()} at {row.default.rate:g}",
        difference.signed,
        f"± {100 * corrected:.1f}",
        " / ".join(_ratio(usable_range(runs)) for runs in (row.plain, row.default)),
        "" if rival is None else f"{rival} {row.rivals[rival].accuracy()}",
        against,
    ]


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value else "none learns"


def _sum(rows: list[Row]) -> str:
    differences = [row.difference for row in rows]
    means: Float[np.ndarray, " rows"] = np.array([difference.mean for difference in differences])
    low = np.array([difference.mean - difference.half_width for difference in differences])
    against = [row.default.against(row.rivals[row.best_rival]).mean for row in rows if row.best_rival is not None]
    wide = sum(usable_range(row.default) >= usable_range(row.plain) for row in rows)
    shown_worse = sum(
        d.mean + half_width(d, len(r.default.verdict), len(rows)) < 0 for d, r in zip(differences, rows, strict=True)
    )
    level, near = sum(means > -ALLOWED_LOSS), sum(np.array(against) >= -WITHIN)
    return "\n".join(
        [
            f"- {len(rows)} rows. Mean difference from plain above -0.3 points in {level}, the whole 95% interval "
            f"above it in {sum(low > -ALLOWED_LOSS)}; worse than plain after correction in {shown_worse}.",
            f"- Better than plain by 1 point or more in {sum(means >= WITHIN)}.",
            f"- Usable range of learning rates at least as wide as plain's in {wide}.",
            f"- Within 1 point of the best rival in {near} of {len(against)} rows with rivals.",
        ]
    )


if __name__ == "__main__":
    run_program(main)
