"""Being asked to stop, as one process or as one of several."""

import signal
from types import FrameType


class StopSignal:
    """Takes SIGTERM, which a machine that is about to be taken away sends; called, it tells whether one came."""

    def __init__(self) -> None:
        self._received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def __call__(self) -> bool:
        """Whether the run is to stop now."""
        return self._received
