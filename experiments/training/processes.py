"""Several processes that train together, those that must not, and being asked to stop, alone or together."""

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from experiments.cli import say
from experiments.config import Experiment

_PATIENCE = 30  # seconds in which a process that was asked to stop has saved
_SILENCE = 20  # seconds without a sign of life after which a process counts as dead
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def connect(config: Experiment) -> None:
    """Waits for the other processes, if there are any; to be called before JAX computes anything. Once is enough."""
    if config.run.processes > 1 and not jax.distributed.is_initialized():
        jax.distributed.initialize(
            config.run.coordinator,
            config.run.processes,
            config.run.process,
            heartbeat_timeout_seconds=_SILENCE,
            shutdown_timeout_seconds=_SILENCE,
        )


@contextlib.contextmanager
def only_process_in(workdir: Path, patience: float = _PATIENCE) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it; it is free again when this one ends, however that ends.

    Where another one has it, waits for its end. Where the file system has no locks, says so and goes on.

    Raises:
        ValueError: the other one goes on.
        OSError: the folder cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    with (workdir / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise ValueError(
                        f"another process trains in {workdir}; wait until it ends, or give another --workdir"
                    ) from error
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                say(f"{workdir} cannot be locked ({error}); nothing keeps another process from writing there")
                break
        yield


class StopSignal:
    """Takes SIGTERM and SIGHUP; called, it tells whether one came.

    A machine that is about to be taken away sends the first, a terminal that is closed the second. A SIGHUP that is
    ignored already, as under nohup, stays so.

    Of several processes each gets the same answers, whichever of them was asked; they have to call equally often.
    """

    def __init__(self) -> None:
        self._received, self._calls = False, 0

    def __call__(self) -> bool:
        """Whether the run is to stop now."""
        self._calls += 1
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(self._calls))
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        """Writing to a terminal that is gone would fail; the rest is as for SIGTERM, which JAX takes too."""
        for stream in self._terminals:
            if not os.isatty(stream):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream)
                os.close(nothing)
        signal.raise_signal(signal.SIGTERM)

    def __enter__(self) -> "StopSignal":
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._receive)}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._hang_up)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
