"""Progress of a run: bars where stderr is a terminal, and log lines with elapsed and remaining time everywhere."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar

from compress.logs import LOGGER, PROGRESS, Stderr

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.progress import Progress

T = TypeVar("T")
Lines = Literal["each", "end"]  # a line for each item, or one when all are done

PATIENCE = 30.0  # seconds without a line, after which any loop writes one
BRIEF = 0.1  # items that took less than this share of the longest were found done, and say nothing of the others


class Bars:
    """Nested loops of a run, shown as bars on a terminal and written as lines to the log.

    Args:
        drawn: draw bars where stderr is a terminal.
    """

    def __init__(self, drawn: bool = True) -> None:
        self._drawn = drawn
        self._progress: Progress | None = None
        self._last_line = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw on stderr while open, if it is a terminal."""
        if not (self._drawn and sys.stderr.isatty()):
            yield
            return
        with _drawing() as progress, _without_lines():
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, there are no bars on the screen, so that something else can be printed."""
        if self._progress is None:
            yield
            return
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def over(
        self,
        items: Iterable[T],
        total: int | None,
        label: str | Callable[[], str],
        lines: Lines | None = None,
    ) -> Iterator[T]:
        """Iterate, and show how far it is.

        Args:
            items: what is iterated.
            total: how many there are; None: nobody knows.
            label: what is done, as in `gptq: block`; a function is asked again after every item.
            lines: which lines are written to the log at level INFO. By default, only what makes a silence of half a
                minute end.
        """
        task = self._progress.add_task(_text(label), total=total) if self._progress else None
        clock = _Clock(total)
        try:
            for item in items:
                yield item
                clock.tick()
                if self._progress is not None and task is not None:
                    self._progress.update(task, advance=1, description=_text(label))
                silent = clock.last - max(self._last_line, clock.started) > PATIENCE and clock.done != total
                if lines == "each" or silent:
                    self._line(logging.INFO, label, clock)
        finally:
            if self._progress is not None and task is not None:
                self._progress.remove_task(task)
        if lines != "each" and clock.done:
            self._line(logging.INFO if lines else logging.DEBUG, label, clock)

    def _line(self, level: int, label: str | Callable[[], str], clock: _Clock) -> None:
        if level >= logging.INFO:
            self._last_line = time.monotonic()
        if PROGRESS.isEnabledFor(level):
            what, comma, detail = _text(label).partition(",")
            PROGRESS.log(level, "%s %s%s%s, %s", what, clock.count(), comma, detail, clock.times())


class _Clock:
    """How far a loop is, and how long the rest of it will take."""

    def __init__(self, total: int | None):
        self.total, self.done = total, 0
        self.started = self.last = time.monotonic()
        self.longest = self.sum = 0.0
        self.counted = 0

    def tick(self) -> None:
        """One more item is done."""
        now = time.monotonic()
        took, self.last = now - self.last, now
        self.done += 1
        if took * BRIEF > self.longest:  # those before were found done
            self.sum, self.counted = 0.0, 0
        self.longest = max(self.longest, took)
        if took >= BRIEF * self.longest:
            self.sum, self.counted = self.sum + took, self.counted + 1

    def count(self) -> str:
        """`3 of 12`."""
        return f"{self.done} of {self.total}" if self.total is not None else str(self.done)

    def times(self) -> str:
        """`14 s, 42 s left`."""
        elapsed = duration(self.last - self.started)
        if self.total is None or self.done >= self.total:
            return elapsed
        return f"{elapsed}, {duration((self.total - self.done) * self.sum / max(1, self.counted))} left"


def duration(seconds: float) -> str:
    """For people: `14 s`, `2 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def _drawing() -> Iterator[Progress]:
    """Bars on stderr, taken away at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
    )
    # What is printed on stdout stays there: it may be a file.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        yield progress


@contextmanager
def _without_lines() -> Iterator[None]:
    """While open, the lines that stand for bars are not printed, unless everything is."""

    def passes(record: logging.LogRecord) -> bool:
        return record.name != PROGRESS.name

    printing = [h for h in LOGGER.handlers if isinstance(h, Stderr) and h.level > logging.DEBUG]
    for handler in printing:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in printing:
            handler.removeFilter(passes)


def _text(label: str | Callable[[], str]) -> str:
    return label if isinstance(label, str) else label()
