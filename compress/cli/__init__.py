"""The console script: runs a command, and ends with one line and an exit code (see errors.py), whatever happens.

Nothing heavy is imported before the guard is up: Ctrl-C ends with one line while libraries are being imported, too.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

INFO = 20  # logging.INFO, which is not imported yet
INTERRUPTED = 130
NO_ROOM = (28, 122)  # ENOSPC, EDQUOT


def main() -> None:
    """The console script."""
    interrupts = Interrupts()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks ends no command
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = guarded(_command, interrupts)
    atexit.register(interrupts.ignore)
    sys.exit(code)


class Interrupts:
    """Remembers that Ctrl-C or SIGTERM came, for where a library makes another exception of it."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGTERM, self._interrupt)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self.came = True
        raise KeyboardInterrupt

    def ignore(self) -> None:
        """Nothing is left to interrupt: the process is ending."""
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)


def guarded(command: Callable[[], Any], interrupts: Interrupts | None = None, level: int = INFO) -> int:
    """Run a command; every exception becomes a line on stderr and an exit code.

    Args:
        command: what is run.
        interrupts: asked whether an exception comes of one.
        level: of the log records that are printed; `-v` and `-q` change it.
    """
    try:
        from compress.logs import on_stderr

        with on_stderr(level):
            try:
                code = command()
            except Exception as error:
                if interrupts is not None and interrupts.came:
                    raise KeyboardInterrupt from error
                return _failed(error)
        if code == INTERRUPTED:  # how the command line parser reports Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED


def _command() -> Any:
    from compress.cli.commands import app

    return app(standalone_mode=False)


def _failed(error: Exception) -> int:
    """The exit code of an error, having said what it is."""
    from compress.errors import CompressError

    if isinstance(error, CompressError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        print("error: out of memory; use fewer or shorter calibration samples", file=sys.stderr)
        return 4
    if isinstance(error, OSError):
        print(f"error: {error}", file=sys.stderr)
        return 4 if error.errno in NO_ROOM else 1
    if type(error).__module__.startswith(("click", "typer")):
        return _usage(error)
    return _unexpected(error)


def _usage(error: Any) -> int:
    """Bad usage, as the command line parser words it."""
    if hasattr(error, "show"):
        error.show()
    return int(getattr(error, "exit_code", 2))


def _unexpected(error: Exception) -> int:
    """A mistake of this package or of a library."""
    import logging
    import traceback

    from compress.logs import LOGGER

    hint = "`compress -v COMMAND` shows the traceback"
    if LOGGER.isEnabledFor(logging.DEBUG):
        traceback.print_exception(error)
        hint = "the traceback is above"
    text = " ".join(str(error).split()) or "no message"
    print(f"error: unexpected {type(error).__name__}: {text}; {hint}", file=sys.stderr)
    return 1
