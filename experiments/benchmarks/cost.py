"""What an adaptively normalized activation costs, alone and in whole training steps.

See `python experiments/benchmarks/cost.py --help`.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.cli import BAD_SETTINGS, fail, run_program, settings_of, table_head, table_row

# isort: split

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.benchmarks import activation_alone, training_step
from experiments.benchmarks.measuring import BATCH_NORM, PLAIN, Spread, ratios, seconds
from experiments.networks import check_name

SHAPES = ((128, 512), (8192, 512), (64, 32, 32, 64), (256, 56, 56, 64))
DTYPES = ("float32", "bfloat16")
_COPY = "copying"


@dataclasses.dataclass(frozen=True)
class Config:
    """Times all cases in turn and gives the ratios to plain and to BatchNorm: median and quartiles of the rounds.

    Prints tables in Markdown; writes all figures to `cost.json` and draws `cost.png`. The last tables are relative to
    plain, whose own line has the figures. *Of copying*: the fewest readings and writings that a case takes, in the time
    that copying takes for as many, as a part of the time that it took.
    """

    shapes: tuple[str, ...] = tuple("x".join(map(str, shape)) for shape in SHAPES)
    """shapes of the operation's input; none skips it"""
    dtypes: tuple[str, ...] = ("float32",)
    """its dtypes"""
    networks: tuple[str, ...] = ("mlp30", "resnet20", "resnet50", "mlp100")
    """networks whose training step is timed; none skips it"""
    gpu: bool = False
    """time what counts on a GPU instead, in bfloat16: 256x56x56x64, 8192x4096, and ResNet-50 with 128 images"""
    repeats: int = 15
    """rounds that count, after one that does not"""
    workdir: Path = Path("runs/cost")
    """where the results go"""

    def check(self) -> None:
        """Raises ValueError at the first setting that cannot be."""
        for network in self.networks:
            check_name("network", network, training_step.NETWORKS)
        for dtype in self.dtypes:
            check_name("dtype", dtype, DTYPES)
        for shape in self.shapes:
            if not all(size.isdigit() and int(size) for size in shape.split("x")):
                raise ValueError(f"a shape is positive numbers with x between, such as 128x512, got {shape!r}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


def main() -> int:
    """Runs the program and returns its exit status."""
    config = settings_of(Config)
    if config.gpu:
        shapes = ("256x56x56x64", "8192x4096")
        config = dataclasses.replace(config, shapes=shapes, dtypes=("bfloat16",), networks=("resnet50_gpu",))
    try:
        config.check()
        config.workdir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return fail(str(error), BAD_SETTINGS)
    rows: list[dict[str, Any]] = []
    for shape in config.shapes:
        for dtype in config.dtypes:
            rows += _shown(measure_operation(tuple(map(int, shape.split("x"))), dtype, config.repeats))
    for network in config.networks:
        rows += _shown(measure_training_step(network, config.repeats))
    results = {"machine": _machine(), "repeats": config.repeats, "rows": rows}
    (config.workdir / "cost.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(rows, config.workdir / "cost.png")
    print(f"\n{overview(rows)}")
    return 0


def measure_operation(shape: tuple[int, ...], dtype: str, repeats: int) -> list[dict[str, Any]]:
    """The activation alone, forward and backward, a row for each case."""
    programs = {}
    for name, layer in activation_alone.LAYERS.items():
        program, arguments = activation_alone.compiled(layer, shape, jnp.dtype(dtype))
        programs[name] = lambda program=program, arguments=arguments: program(*arguments)
    x = jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype))
    copy = jax.jit(lambda x: -x)
    taken = seconds({_COPY: lambda: copy(x)} | programs, repeats)
    copying = taken.pop(_COPY)  # two passes
    of_batch_norm = ratios(taken, BATCH_NORM)
    return [
        {
            "what": f"{'x'.join(map(str, shape))} {dtype}",
            "case": name,
            "ratio": ratio,
            "of BatchNorm": of_batch_norm[name],
            "of copying": Spread.of(activation_alone.PASSES[name] / 2 * np.divide(copying, taken[name])).median,
            "ms": 1e3 * Spread.of(taken[name]).median,
            "saved MB": activation_alone.residual_bytes(activation_alone.LAYERS[name], shape, jnp.dtype(dtype)) / 1e6,
        }
        for name, ratio in ratios(taken, PLAIN).items()
    ]


def measure_training_step(network: str, repeats: int) -> list[dict[str, Any]]:
    """A network's training step, a row for each side."""
    chosen = training_step.NETWORKS[network]
    programs = {side: training_step.compiled(chosen, side) for side in training_step.SIDES}
    taken = seconds({side: program.call for side, program in programs.items()}, repeats)
    of_batch_norm = ratios(taken, BATCH_NORM)
    return [
        {
            "what": str(chosen),
            "case": side,
            "ratio": ratio,
            "of BatchNorm": of_batch_norm[side],
            "ms": 1e3 * Spread.of(taken[side]).median,
            "temporary MB": programs[side].temporary_bytes / 1e6,
            "trace s": programs[side].trace,
            "compile s": programs[side].compile,
        }
        for side, ratio in ratios(taken, PLAIN).items()
    ]


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """Tables of what `cost.json` holds, each a measure, of all cases in all places, where plain is 1."""
    kinds = dict.fromkeys(tuple(name for name in row if name not in ("what", "case", "ms")) for row in rows)
    tables = []
    for kind in kinds:
        of_kind = [row for row in rows if set(kind) <= set(row)]
        places, cases = (list(dict.fromkeys(row[key] for row in of_kind)) for key in ("what", "case"))
        found = {(row["what"], row["case"]): row for row in of_kind}
        for measure in kind:
            lines = [table_head("time" if measure == "ratio" else measure, *places)]
            for case in cases:
                lines.append(table_row(case, *(_told(found, place, case, measure) for place in places)))
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _told(found: dict[tuple[str, str], dict[str, Any]], place: str, case: str, measure: str) -> str:
    row, plain = found[place, case], found[place, PLAIN]
    if measure == "ratio" and row is plain:
        return f"{1e-3 * row['ms']:.2g} s"
    if isinstance(row[measure], list | tuple):  # quartiles
        return str(Spread(*row[measure]))
    if measure == "of copying":
        return f"{row[measure]:.0%}"
    return f"{plain[measure]:.3g}" if row is plain else f"{row[measure] / plain[measure]:.2f}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the ratios, a panel for each thing measured."""
    panels = list(dict.fromkeys(row["what"] for row in rows))
    lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(12, 2.4 * lines), layout="constrained", squeeze=False)
    for panel, what in zip(axes.flat, panels, strict=False):
        cases = [row for row in rows if row["what"] == what][::-1]
        medians = [row["ratio"].median for row in cases]
        errors = [
            [row["ratio"].median - row["ratio"].low for row in cases],
            [row["ratio"].high - row["ratio"].median for row in cases],
        ]
        colors = ["tab:blue" if row["case"].startswith("NSwish") else "tab:gray" for row in cases]
        panel.barh([row["case"] for row in cases], medians, xerr=errors, color=colors)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(title=what, xlabel="time, plain swish = 1")
    for panel in axes.flat[len(panels) :]:
        panel.remove()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints the rows as a table."""
    columns = [name for name in rows[0] if name not in ("what", "case")]
    print(f"\n**{rows[0]['what']}**\n\n{table_head('case', *columns)}")
    for row in rows:
        cells = (
            str(value) if isinstance(value, Spread) else f"{value:.3g}" for value in (row[name] for name in columns)
        )
        print(table_row(row["case"], *cells), flush=True)
    return rows


def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    run_program(main)
