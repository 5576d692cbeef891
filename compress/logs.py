"""Where log records of the logger `compress` go: stderr for the command line, and the log file of a run."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOGGER = logging.getLogger("compress")
PROGRESS = logging.getLogger("compress.progress")  # lines that stand for bars


def printable(text: str) -> str:
    """Text as a terminal may be given it: control characters, which it would obey, are spelled out."""
    return "".join(c if c.isprintable() or c in "\n " else c.encode("unicode_escape").decode() for c in text)


class Stderr(logging.Handler):
    """Prints to what is stderr now: a terminal with bars puts something else in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record)), file=sys.stderr, flush=True)


class _LogFile(logging.FileHandler):
    """Appends to a file. Where the disk is full, it is for what writes results to say so."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Onward(logging.Handler):
    """Hands records on to the handlers above the logger `compress`."""

    def emit(self, record: logging.LogRecord) -> None:
        if LOGGER.parent is not None:
            LOGGER.parent.callHandlers(record)


@contextmanager
def on_stderr(level: int = logging.INFO) -> Iterator[None]:
    """While open, records of at least this level are printed on stderr."""
    before, handler = LOGGER.level, Stderr(level)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before)


def set_level(level: int) -> None:
    """Set the level of what is printed, while `on_stderr` is open."""
    LOGGER.setLevel(level)
    for handler in LOGGER.handlers:
        handler.setLevel(level)


@contextmanager
def kept_in(file: Path) -> Iterator[None]:
    """While open, every record is also appended to `file`, with the time; elsewhere no more is said than before."""
    level, propagate = LOGGER.level, LOGGER.propagate
    handler, onward = _LogFile(file, encoding="utf-8"), _Onward(LOGGER.getEffectiveLevel())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    above = LOGGER.parent is not None and LOGGER.parent.hasHandlers()
    added = [handler, onward] if propagate and (above or not LOGGER.handlers) else [handler]
    for each in added:
        LOGGER.addHandler(each)
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
    try:
        yield
    except BaseException as error:
        _note(handler, error)
        raise
    finally:
        for each in added:
            LOGGER.removeHandler(each)
        handler.close()
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate


def _note(handler: logging.Handler, error: BaseException) -> None:
    """Write what ended the work, and where, into the log file only: the command line says it in its own way."""
    where = (type(error), error, error.__traceback__)
    handler.emit(LOGGER.makeRecord(LOGGER.name, logging.ERROR, __file__, 0, "ended by:", (), where))
