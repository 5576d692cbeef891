"""Finished folders as their reports tell of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from compress.errors import UsageError
from compress.io.small_file import read_object
from compress.report.layers import REPORT
from compress.report.report import Report

if TYPE_CHECKING:
    from pathlib import Path

    from compress.report.layers import Layer
    from compress.report.report import Row


@dataclass(frozen=True)
class Finished:
    """A finished folder.

    Attributes:
        name: what it is called beside others.
        report: of its run; it has rows.
        layers: what it stores.
    """

    name: str
    report: Report
    layers: list[Layer]

    @property
    def original(self) -> Row:
        """The model that the run began with."""
        return self.report.rows[0]

    @property
    def result(self) -> Row:
        """The model behind the last pass."""
        return self.report.rows[-1]

    @property
    def seconds(self) -> float:
        """What all passes took, without measuring."""
        return sum(row.seconds for row in self.report.rows)


def read_report(folder: Path) -> Report:
    """The report of a finished folder.

    Raises:
        UsageError: it is not what a run wrote.
    """
    try:
        found = TypeAdapter(Report).validate_python(read_object(folder / REPORT))
    except ValidationError as error:
        what = ".".join(map(str, error.errors()[0]["loc"])) or "content"
        raise UsageError(_damaged(folder, what)) from error
    if not found.rows:
        raise UsageError(_damaged(folder, "rows"))
    return found


def _damaged(folder: Path, what: str) -> str:
    return f"{folder / REPORT} is not what a run wrote: its `{what}` is damaged; run the pipeline again"
