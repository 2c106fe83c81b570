"""What the programs share at the command line."""

import sys
from pathlib import Path

# Exit statuses. INTERRUPTED as a shell reports SIGINT; PREEMPTED after SIGTERM, when all is saved and the same command
# goes on: EX_TEMPFAIL of sysexits.h, "try again later", which a process that SIGTERM simply ended does not return.
BAD_SETTINGS, FAILED, INTERRUPTED, PREEMPTED = 2, 1, 130, 75


def fail(message: str, status: int) -> int:
    """Says in one line what is wrong; returns the exit status."""
    say(message)
    return status


def say(message: str) -> None:
    """Says something in one line, beside the results."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
