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


def table_head(*names: str) -> str:
    """The head of a table in Markdown."""
    return f"{table_row(*names)}\n{table_row(*['---'] * len(names))}"


def table_row(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
