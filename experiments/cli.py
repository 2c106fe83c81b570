"""What the programs share at the command line."""

import sys
from pathlib import Path

BAD_SETTINGS, FAILED, INTERRUPTED = 2, 1, 130  # exit statuses; the last as a shell reports SIGINT


def fail(message: str, status: int) -> int:
    """Says in one line what is wrong; returns the exit status."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status
