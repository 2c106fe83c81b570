"""Several processes that train together, and being asked to stop, alone or together."""

import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from experiments.config import Experiment

_SILENCE = 20  # seconds without a sign of life after which a process counts as dead


def connect(config: Experiment) -> None:
    """Waits for the other processes, if there are any; to be called before JAX computes anything. Once is enough."""
    if config.processes > 1 and not jax.distributed.is_initialized():
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            heartbeat_timeout_seconds=_SILENCE,
            shutdown_timeout_seconds=_SILENCE,
        )


class StopSignal:
    """Takes SIGTERM, which a machine that is about to be taken away sends; called, it tells whether one came.

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

    def __enter__(self) -> "StopSignal":
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)
