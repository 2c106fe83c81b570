"""What the programs share at the command line. Each imports it first: from then on Ctrl-C ends it with one line."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes

Settings = TypeVar("Settings")

# Exit statuses. INTERRUPTED as a shell reports SIGINT; PREEMPTED after SIGTERM, when all is saved and the same command
# goes on: EX_TEMPFAIL of sysexits.h, "try again later", which a process that SIGTERM simply ended does not return.
BAD_SETTINGS, FAILED, INTERRUPTED, PREEMPTED = 2, 1, 130, 75
_PICTURES = (".png", ".pdf", ".svg", ".jpg", ".webp")


def run_program(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit status of `main`; Ctrl-C ends it with one line, whenever it comes.

    In `main` it raises KeyboardInterrupt, so that what was measured can be kept. Where Python can only report an
    exception and goes on, as in a destructor, it is raised a moment later.
    """
    report = sys.unraisablehook

    def report_or_raise_later(problem: Any) -> None:
        if isinstance(problem.exc_value, KeyboardInterrupt):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            report(problem)

    sys.unraisablehook = report_or_raise_later
    try:
        _replace_handler(_leave, signal.default_int_handler)
        status = main()
    except KeyboardInterrupt:
        status = fail("interrupted", INTERRUPTED)
    finally:
        _replace_handler(signal.default_int_handler, _leave)
    sys.exit(status)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Takes Ctrl-C outside `main`: while modules are imported, and when all is done."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        say("interrupted")
    os._exit(INTERRUPTED)


def _replace_handler(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Of SIGINT, unless it is another: a shell has jobs in the background ignore it."""
    if signal.getsignal(signal.SIGINT) is old:
        signal.signal(signal.SIGINT, new)


if Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().is_relative_to(Path(__file__).parent):
    _replace_handler(signal.default_int_handler, _leave)
if "__mp_main__" in sys.modules:  # in a worker, to which a terminal sends Ctrl-C too; its program ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def fail(message: str, status: int) -> int:
    """Says in one line what is wrong; returns the exit status."""
    say(message)
    return status


def say(message: str) -> None:
    """Says something in one line, beside the results."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


def printable(path: Path) -> str:
    """A path as text that can be printed, with backslashes where it cannot: a file's name is bytes of any kind."""
    encoding = sys.stdout.encoding or "utf-8"
    return str(path).encode(encoding, "backslashreplace").decode(encoding)


def check_picture(path: Path) -> None:
    """Raises, before the work, unless a picture can be written there.

    Raises:
        ValueError: the file's name does not end as that of a picture.
        OSError: it cannot be written.
    """
    if path.suffix.lower() not in _PICTURES:
        raise ValueError(f"output must end in one of {', '.join(_PICTURES)}, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()


def usual_picture(path: Path) -> Path | None:
    """The file in a run's folder; None, which is said in a line, where it cannot be written."""
    try:
        check_picture(path)
    except OSError as error:
        say(f"no picture, which --output can put elsewhere: {error}")
        return None
    return path


def table_head(*names: str) -> str:
    """The head of a table in Markdown."""
    return f"{table_row(*names)}\n{table_row(*['---'] * len(names))}"


def table_row(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def settings_of(
    kind: type[Settings],
    default: Settings | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
) -> Settings:
    """The settings at the command line, where each has a flag of its own name whatever part of them it is in.

    Args:
        kind: a dataclass, whose fields may be dataclasses.
        default: those not given, by default `kind()`.
        arguments: by default those of the process.
        description: at the top of the help, by default the docstring.
    """
    if default is None:
        return at_home(tyro.cli(kind, args=arguments, description=description, config=(OmitArgPrefixes,)))
    return at_home(tyro.cli(kind, default=default, args=arguments, description=description, config=(OmitArgPrefixes,)))


def with_home(path: Path) -> Path:
    """The path with the home folder for a `~` that begins it, as the shell leaves it in `--workdir=~/runs`."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (as the shell does, leaves what is no user)


def at_home(settings: Settings) -> Settings:
    """The same settings, with each path as `with_home` has it."""

    def expanded(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(expanded, value))
        if dataclasses.is_dataclass(value):
            return at_home(value)
        return with_home(value) if isinstance(value, Path) else value

    return dataclasses.replace(settings, **{name: expanded(value) for name, value in vars(settings).items()})  # type: ignore[type-var]
