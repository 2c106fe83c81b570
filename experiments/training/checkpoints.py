"""Checkpoints of a training run, through Orbax: written while training goes on, whole or not at all."""

import itertools
import logging
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from experiments.config import Experiment
from experiments.data.sets import one_line
from experiments.folders import check_writable_name
from experiments.training.metrics import Record
from experiments.training.steps import TrainState

_SCORE = "test_accuracy"
_SET_ASIDE = ".unreadable"
_KEPT = 3  # of the latest checkpoints


class CheckpointError(Exception):
    """A checkpoint cannot be written, or none can be read; the message says why and what to do."""


class _DamageError(Exception):
    """A checkpoint cannot be read, now or ever."""


def silence_orbax() -> None:
    """Keeps Orbax from telling of failures beside raising them; for programs, which report what is raised in one line.

    It logs them with a traceback. Its threads go on with the other files when the first has failed, and find their
    event loop closed, which Python would report as raised where nobody can catch it.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    tell, late = sys.unraisablehook, ("Event loop is closed", "_read_array_index_and_device_put")

    def but_late_reports(report: Any) -> None:
        if not any(part in f"{report.exc_value} {report.object}" for part in late):
            tell(report)

    sys.unraisablehook = but_late_reports


class Position(NamedTuple):
    """Where a run stands: what it takes to go on as if it had never stopped.

    The examples still to come depend on the seed, which is among the settings, and on the step alone; the seed and
    the step are all the random state there is.

    Attributes:
        state: parameters, optimizer and running statistics.
        step: steps taken.
        measured: whether the network was evaluated after them.
        records: all that was reported.
        recent: metrics of the steps since the last report on training.
    """

    state: TrainState
    step: int = 0
    measured: bool = False
    records: tuple[Record, ...] = ()
    recent: tuple[dict[str, Any], ...] = ()


class Checkpoints:
    """The checkpoints of one run, in `checkpoints/` of its folder: the last three and the best.

    A checkpoint's number is twice its step, plus 1 once the network was evaluated there: the second is written beside
    the first, which is removed when it is whole. The first of a run is read back and compared before training goes on.
    A context manager; at its end it waits for the last checkpoint. With `read_only` nothing is written or removed.

    Raises:
        ValueError: no checkpoint can be written to a folder of this name.
    """

    def __init__(self, workdir: Path, config: Experiment, *, read_only: bool = False) -> None:
        check_writable_name(workdir)
        self._config, self._workdir, self._folder = config, workdir, (workdir / "checkpoints").absolute()
        self._saved: int | None = None
        self._read_only = read_only
        policies = [
            LatestN(_KEPT),
            BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            best_fn=_score,
            preservation_policy=AnyPreservationPolicy(policies),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, position: Position) -> None:
        """Saves where the run stands, unless that was done; returns while the files are being written.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written, or the first is not what was saved.
        """
        number = _number(position)
        if number == self._saved:
            return
        progress = position._replace(state=None)._asdict() | {"config": self._config.recipe.key}  # type: ignore[arg-type]
        scores = [record[_SCORE] for record in position.records if _SCORE in record]
        try:
            self._finish()
            self._manager.save(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_by_name(position.state)), progress=ocp.args.JsonSave(progress)
                ),
                metrics={_SCORE: scores[-1]} if position.measured else None,
                force=True,
            )
        except Exception as error:  # whatever the file system makes Orbax raise
            raise CheckpointError(self._unwritten(error)) from error
        if self._saved is None:
            self.wait()
            self._read_back(number, position.state)
        self._saved = number

    def _read_back(self, number: int, state: TrainState) -> None:
        """Reads a checkpoint as another process will; CheckpointError unless that gives the same arrays."""
        try:
            with Checkpoints(self._workdir, self._config, read_only=True) as reader:
                found = reader._position(number, state).state
        except _DamageError as error:
            raise CheckpointError(f"checkpoint {self._folder / str(number)} cannot be read back ({error})") from error
        if jax.tree.map(_bytes, found) != jax.tree.map(_bytes, state):
            raise CheckpointError(f"checkpoint {self._folder / str(number)} reads back other than it was written")

    def wait(self) -> None:
        """Returns when the last checkpoint is written.

        Raises:
            CheckpointError: it could not be.
        """
        try:
            self._finish()
        except Exception as error:
            raise CheckpointError(self._unwritten(error)) from error

    def _finish(self) -> None:
        """Waits for the last checkpoint, and removes the one of the same step that it replaces."""
        self._manager.wait_until_finished()
        numbers = set(self._manager.all_steps())
        for number in numbers:
            if not _evaluated(number) and number + 1 in numbers:
                self._manager.delete(number)

    def restore(self, start: TrainState, on_damage: Callable[[str], None], *, best: bool = False) -> Position | None:
        """Where the run stood at its last checkpoint that can be read; None if it has none.

        Args:
            start: a state of this run, whose devices the restored one is laid out on.
            on_damage: told of each newer checkpoint that is damaged, in one line. They are kept, under another name.
            best: take the one with the best test accuracy first.

        Raises:
            ValueError: the checkpoint is of a run with other settings, or of a network with other arrays.
            CheckpointError: there are checkpoints and none can be read, or memory ran out.
        """
        damaged: list[int] = []
        order = sorted(self._manager.all_steps(), reverse=True)
        if best and (favourite := self._manager.best_step()) is not None:
            order = [favourite, *(number for number in order if number != favourite)]
        for number in order:
            try:
                try:
                    position = self._position(number, start)
                except _DamageError:  # or a file system that failed once
                    position = self._position(number, start)
            except _DamageError as error:
                damaged.append(number)
                on_damage(
                    f"checkpoint {self._folder / str(number)} cannot be read ({error}); going on from the one before"
                    + ("" if self._read_only else f", and keeping this one as {number}{_SET_ASIDE}")
                )
                continue
            self._set_aside(damaged)
            self._saved = number
            return position
        if damaged:
            raise CheckpointError(f"no checkpoint in {self._folder} can be read; to start over, remove that folder")
        return None

    def _set_aside(self, damaged: Sequence[int]) -> None:
        """Renames them, so that the run can save at the same steps."""
        if self._read_only or not damaged:
            return
        if jax.process_index() == 0:
            for number in damaged:
                names = (self._folder / f"{number}{_SET_ASIDE}{count or ''}" for count in itertools.count())
                (self._folder / str(number)).rename(next(path for path in names if not path.exists()))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def _position(self, number: int, start: TrainState) -> Position:
        """What one checkpoint holds; ValueError if it is of another run, _DamageError if it cannot be read."""
        try:
            progress = self._read(number, progress=ocp.args.JsonRestore())["progress"]
            saved: dict[str, Any] = dict(self._manager.item_metadata(number)["state"].tree)
            settings = progress.pop("config")
        except Exception as error:  # whatever the readers of a damaged file raise
            raise self._unread(number, error) from error
        self._config.check_same_run(settings, self._folder)
        wanted: dict[str, Any] = _by_name(start)
        missing = self._missing_statistics(
            number, *({k: v.shape for k, v in leaves.items()} for leaves in (saved, wanted))
        )
        # A layer that lacks a moment counts its batches from 0, so that its first batch replaces all of them.
        anew = {*missing, *(f"{name.rpartition('/')[0]}/count" for name in missing)}
        layout = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, wanted.get(name, leaf).dtype, sharding=wanted.get(name, start.step).sharding
            )
            for name, leaf in saved.items()
        }
        try:
            found = self._read(number, state=ocp.args.StandardRestore(layout))["state"]
        except Exception as error:
            raise self._unread(number, error) from error
        return Position(
            jax.tree.unflatten(jax.tree.structure(start), [(wanted if k in anew else found)[k] for k in wanted]),
            progress["step"],
            progress["measured"],
            tuple(progress["records"]),
            tuple(progress["recent"]),
        )

    def _read(self, number: int, **items: Any) -> Any:
        return self._manager.restore(number, args=ocp.args.Composite(**items))

    def _missing_statistics(
        self, number: int, saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
    ) -> list[str]:
        """Names of wanted statistics that were not saved, to be started anew. Saved ones may be more than are wanted.

        Raises:
            ValueError: they were not asked for anew, or arrays other than statistics differ.
        """
        statistics = "batch_stats/"
        missing = [name for name in wanted if name not in saved]
        other = [
            f"{name} {shape}, now {wanted.get(name, 'none')}"
            for name, shape in sorted(saved.items(), reverse=True)  # params before batch_stats
            if shape != wanted.get(name) and (name in wanted or not name.startswith(statistics))
        ]
        where = f"checkpoint {self._folder / str(number)}"
        if other or not all(name.startswith(statistics) for name in missing):
            differing = "; ".join([*other, *(f"{name} none, now {wanted[name]}" for name in missing)][:5])
            raise ValueError(f"{where} is of another network: {differing}; give another --workdir")
        if missing and not self._config.run.fresh_statistics:
            raise ValueError(
                f"{where} lacks running statistics, {', '.join(missing[:3])}{', ...' if missing[3:] else ''}, which "
                f"this network keeps (form {self._config.recipe.network.label}); --fresh-statistics starts them anew"
            )
        return missing

    def _unread(self, number: int, error: Exception) -> Exception:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            where = self._folder / str(number)
            return CheckpointError(f"checkpoint {where} does not fit into memory ({_in_short(error)}); it is as it was")
        return _DamageError(_in_short(error))

    def _unwritten(self, error: Exception) -> str:
        return f"cannot write a checkpoint to {self._folder} ({_in_short(error)}); those written before are whole"

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if jax.process_count() > 1 and isinstance(error, CheckpointError | jax.errors.JaxRuntimeError):
            return  # another process may be gone, and closing waits for all
        try:
            if not self._read_only:
                self._finish()
            self._manager.close()
        except Exception as problem:
            if not isinstance(error, CheckpointError):  # which has told of it
                raise CheckpointError(self._unwritten(problem)) from problem


def _number(position: Position) -> int:
    return 2 * position.step + position.measured


def _bytes(array: Array) -> bytes:
    return np.asarray(array).tobytes()


def _evaluated(number: int) -> bool:
    return number % 2 == 1


def _score(metrics: dict[str, float]) -> float:
    return metrics[_SCORE]


def _in_short(error: Exception) -> str:
    """TensorStore's lines hold all of its settings."""
    return textwrap.shorten(one_line(error), 160, placeholder=" ...")


def _by_name(state: TrainState) -> dict[str, Array]:
    """Its arrays by names such as `params/Dense_0/kernel`, in the order of the tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }
