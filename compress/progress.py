"""Progress on stderr: a bar where stderr is a terminal, nothing otherwise."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")


class Bars:
    """Nested bars: the pass, and within it blocks and samples. Silent unless opened on a terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw on stderr while open, if it is a terminal."""
        if not sys.stderr.isatty():
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None

    def over(self, items: Iterable[T], total: int | None, label: str | Callable[[], str]) -> Iterator[T]:
        """Iterate with a bar; `total` None: nobody knows how many."""
        if self._progress is None:
            yield from items
            return
        task = self._progress.add_task(_said(label), total=total)
        try:
            for item in items:
                yield item
                self._progress.update(task, advance=1, description=_said(label))
        finally:
            self._progress.remove_task(task)


def _said(label: str | Callable[[], str]) -> str:
    return label if isinstance(label, str) else label()
