"""What a run leaves behind: metrics as lines of JSON and TensorBoard events, and pictures."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboardX import SummaryWriter

Record: TypeAlias = dict[str, Any]


class MetricsLog:
    """Writes each record at once to `metrics.jsonl` and TensorBoard events: an interrupted run keeps them.

    It starts with `records`, in place of all that stands there: what an interrupted run wrote after its last
    checkpoint is measured again.
    """

    def __init__(self, workdir: Path, records: Iterable[Record] = ()) -> None:
        for old in workdir.glob("events.out.tfevents.*"):
            old.unlink()
        self._lines = (workdir / "metrics.jsonl").open("w")
        self._events = SummaryWriter(str(workdir))
        for record in records:
            self.write(**record)

    def write(self, step: int, epoch: float, **values: float) -> None:
        """Adds a record; `values` such as `train_loss` become TensorBoard's `train/loss`."""
        self._lines.write(json.dumps({"step": step, "epoch": round(epoch, 4), **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name.replace("_", "/", 1), value, step)
        self._events.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._events.close()


class Unheard:
    """Takes records and keeps none: of several processes, one reports."""

    def write(self, step: int, epoch: float, **values: float) -> None:
        """Takes a record."""


def show_pictures(workdir: Path, *pictures: Path) -> None:
    """Puts pictures into the run's TensorBoard events."""
    with SummaryWriter(str(workdir)) as events:
        for picture in pictures:
            events.add_image(picture.stem, plt.imread(picture)[..., :3], dataformats="HWC")


def read_metrics(workdir: Path) -> list[Record]:
    """The records of a run, finished or not."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


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
    panels[0].set_yscale("log")
    figure.savefig(workdir / "learning_curves.png", dpi=120)
    plt.close(figure)
