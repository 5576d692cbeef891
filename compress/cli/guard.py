"""The outermost guard: whatever happens in a command becomes one sentence on stderr and an exit code (`errors.py`)."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from compress.cli.interrupts import Interrupts, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable

INFO = 20  # logging.INFO, which is not imported yet
FAILED, BAD_INPUT, NO_ROOM, FAULT, NO_READER = 1, 2, 4, 70, 141  # 70 is EX_SOFTWARE of sysexits.h; 141 is 128 + SIGPIPE
FULL = (errno.ENOSPC, errno.EDQUOT)
# A path that was given: not there, not allowed, of the wrong kind, or impossible.
PATHS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EROFS, errno.ELOOP,
         errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.EBUSY, errno.EINVAL)  # fmt: skip
MOST_LINES, MOST_LETTERS = 50, 2000  # of what is said of an error, and of one of its lines
OF_PYTHON = r"<class '(?:\w+\.)*(\w+)'>"  # how libraries name types
KEPT = "nothing was left half-written; run the same command again"


def guarded(command: Callable[[], Any], interrupts: Interrupts | None = None, level: int = INFO) -> int:
    """Run a command; every exception becomes a line on stderr and an exit code.

    Args:
        command: what is run.
        interrupts: listens for signals until the command has ended.
        level: of the log records that are printed; `-v` and `-q` change it.
    """
    interrupts = interrupts or Interrupts(heard=())
    try:
        interrupts.listen()
        code = _logged(command, interrupts, level)
        interrupts.ignore()
        return code
    except Stopped as stopped:
        interrupts.ignore()
        print(f"{stopped.said}; {'; '.join(_notes(stopped)) or KEPT}", file=sys.stderr)
        return stopped.exit_code


def _logged(command: Callable[[], Any], interrupts: Interrupts, level: int) -> int:
    """The exit code of a command, with log records and errors on stderr."""
    from compress.logs import on_stderr

    with on_stderr(level):
        try:
            return _flushed(command)
        except Exception as error:
            stopped = interrupts.stopped
            if stopped is None:
                return _failed(error)
            for note in _notes(error):  # a library has made another exception of the signal
                stopped.add_note(note)
            raise stopped from error


def _flushed(command: Callable[[], Any]) -> int:
    """The exit code of a command whose output was taken."""
    try:
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as ended:  # how rich and typer end where nobody reads stdout
        if isinstance(ended.__context__, OSError):
            return _unread()
        code = ended.code
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    """The exit code of an error, having said what it is."""
    from compress.errors import CompressError, ConfigError

    if isinstance(error, ConfigError):
        return _said(str(error), error.exit_code, error)
    if isinstance(error, CompressError):
        return _said(" ".join(str(error).split()), error.exit_code, error)
    if isinstance(error, BrokenPipeError):
        return _unread()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return _said("out of memory; use fewer or shorter calibration samples", NO_ROOM, error)
    if isinstance(error, OSError) and error.errno in (*FULL, *PATHS):
        return _said(str(error), NO_ROOM if error.errno in FULL else BAD_INPUT, error)
    if isinstance(error, OSError):
        return _said(str(error), FAILED, error)
    if type(error).__module__.startswith(("click", "typer")):
        return _usage(error)
    return _unexpected(error)


def _said(text: str, code: int, error: Exception) -> int:
    """Print what went wrong, and after `-v` where."""
    _trace(error)
    print(f"error: {shortened(text)}", file=sys.stderr)
    return code


def shortened(text: str) -> str:
    """What is said of an error, without what a terminal would obey, and no longer than anybody reads."""
    from compress.logs import printable

    text = re.sub(OF_PYTHON, r"\1", text)
    lines = [line if len(line) <= MOST_LETTERS else f"{line[:MOST_LETTERS]} ..." for line in text.splitlines()]
    more = len(lines) - MOST_LINES
    return printable("\n".join([*lines[:MOST_LINES], *([f"and {more} lines more"] if more > 0 else [])]))


def _usage(error: Any) -> int:
    """Bad usage, as the command line parser words it."""
    if hasattr(error, "show"):
        error.show()
    return int(getattr(error, "exit_code", BAD_INPUT))


def _unread() -> int:
    """Nobody reads what is printed any more, as in `compress list | head -1`: nothing is left to say, and to flush."""
    if sys.__stdout__ is not None and not isinstance(sys.stdout, io.StringIO):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
    return NO_READER


def _unexpected(error: Exception) -> int:
    """A mistake of this package or of a library."""
    hint = "the traceback is above" if _trace(error) else "`compress -v COMMAND` shows the traceback"
    text = " ".join(str(error).split()) or "no message"
    said = f"error: unexpected {type(error).__name__}: {shortened(text)}; a fault of compress, not of yours"
    print(f"{said}: please report it ({hint})", file=sys.stderr)
    return FAULT


def _trace(error: Exception) -> bool:
    """Print where an error was raised, if that is wanted."""
    import logging
    import traceback

    from compress.logs import LOGGER

    wanted = LOGGER.isEnabledFor(logging.DEBUG)
    if wanted:
        traceback.print_exception(error)
    return wanted


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
