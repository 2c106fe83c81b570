"""Being asked to stop, as one process or as one of several."""

import signal
from types import FrameType, TracebackType


class StopSignal:
    """Takes SIGTERM, which a machine that is about to be taken away sends; called, it tells whether one came."""

    def __init__(self) -> None:
        self._received = False

    def __call__(self) -> bool:
        """Whether the run is to stop now."""
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
