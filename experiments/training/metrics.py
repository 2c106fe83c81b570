"""What a run leaves behind: metrics as lines of JSON and TensorBoard events, and pictures."""

import contextlib
import json
import math
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from anact_jax.plots import plain_log_scale

Record: TypeAlias = dict[str, Any]


class MetricsLog:
    """Writes each record at once to `metrics.jsonl` and TensorBoard events: an interrupted run keeps them.

    It starts with `records`, in place of all that stands there: what an interrupted run wrote after its last
    checkpoint is measured again. What cannot be written raises OSError.
    """

    def __init__(self, workdir: Path, records: Iterable[Record] = ()) -> None:
        for old in workdir.glob("events.out.tfevents.*"):
            old.unlink()
        with contextlib.ExitStack() as opened:
            self._lines = opened.enter_context((workdir / "metrics.jsonl").open("w"))
            self._events = opened.enter_context(contextlib.closing(_Events(workdir)))
            for record in records:
                self.write(**record)
            self._opened = opened.pop_all()

    def write(self, step: int, epoch: float, **values: float) -> None:
        """Adds a record; `values` such as `train_loss` become TensorBoard's `train/loss`."""
        self._lines.write(to_json({"step": step, "epoch": round(epoch, 4), **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add(step=step, summary=summary.scalar(name.replace("_", "/", 1), value))
        self._events.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


class _Events(RecordWriter):  # type: ignore[misc]
    """TensorBoard events, written at once: `SummaryWriter` has a thread write them, whose errors cannot be caught."""

    def __init__(self, workdir: Path, suffix: str = "") -> None:
        super().__init__(str(workdir / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}{suffix}"))
        self.add(file_version="brain.Event:2")

    def add(self, **what: Any) -> None:
        """Adds an event."""
        self.write(Event(wall_time=time.time(), **what).SerializeToString())


class Unheard:
    """Takes records and keeps none: of several processes, one reports."""

    def write(self, step: int, epoch: float, **values: float) -> None:
        """Takes a record."""


def show_pictures(workdir: Path, *pictures: Path) -> None:
    """Puts pictures into the run's TensorBoard events."""
    with contextlib.closing(_Events(workdir, ".pictures")) as events:
        for picture in pictures:
            events.add(summary=summary.image(picture.stem, plt.imread(picture)[..., :3], dataformats="HWC"))


def to_json(value: Any, indent: int | None = None) -> str:
    """Text that every reader of JSON takes, with null for each number that is not finite."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def read_metrics(workdir: Path) -> list[Record]:
    """The records of a run, finished or not, with NaN for null; a line that was cut off is left out."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: math.nan if value is None else value for name, value in record.items()} for record in records]


def read_evaluations(workdir: Path) -> list[Record]:
    """Those of them that measure the test split, one an epoch."""
    return [record for record in read_metrics(workdir) if "test_accuracy" in record]


def draw_learning_curves(workdir: Path) -> None:
    """Draws loss and accuracy over epochs from `metrics.jsonl` into `learning_curves.png`."""
    records = read_metrics(workdir)
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for panel, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for split in ("train", "test"):
            points = [(r["epoch"], r[f"{split}_{quantity}"]) for r in records if f"{split}_{quantity}" in r]
            if points:
                panel.plot(*zip(*points, strict=True), label=split, marker="." if split == "test" else None)
        panel.set(xlabel="epoch", ylabel=quantity)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    losses = [value for line in panels[0].lines for value in line.get_ydata() if math.isfinite(value) and value > 0]
    if losses and 10 * min(losses) < max(losses):
        plain_log_scale(panels[0])
    if any("factor_min" in record for record in records):  # a run with normalized activations
        note = "Test images are measured with running statistics, which lag behind the weights in the first epochs."
        figure.supxlabel(note, fontsize="medium")
    figure.savefig(workdir / "learning_curves.png", dpi=120)
    plt.close(figure)
