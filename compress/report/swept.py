"""The runs of a sweep beside each other: a file for a spreadsheet, and lines for a terminal."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.report import comparison
from compress.report.report import cells, headings, source_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compress.report.finished import Finished

FIGURES = (
    "perplexity", "change", "kl", "accuracy", "negative_flips", "relative_error", "cosine", "bytes", "bits_per_weight",
    "bits_per_parameter", "sparsity",
)  # fmt: skip
OF_SOURCE = ("perplexity", "accuracy", "change", "kl")


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        name: of its folder.
        values: key of the grid -> value.
        finished: the result; None where it failed.
        error: why it failed.
    """

    name: str
    values: Mapping[str, Any]
    finished: Finished | None
    error: Exception | None = None


def as_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each run; `on_front` is set of those that no other beats in quality and size together."""
    best = {each.name for each in comparison.front(_finished(outcomes))}
    return [_row(each, each.name in best) for each in outcomes]


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """The rows for a spreadsheet, numbers in full; a column that is empty in all of them is left out."""
    rows = as_rows(outcomes)
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return out.getvalue()


def line(outcome: Outcome) -> str:
    """One run in a sentence, as soon as it has ended."""
    if outcome.finished is None:
        return f"{outcome.name}: failed: {said(outcome.error)}"
    row, names = outcome.finished.result, source_names(outcome.finished.report)
    named = zip(headings(outcome.finished.report), cells(row, names), strict=True)
    return f"{outcome.name}: " + ", ".join(f"{head} {cell}" for head, cell in list(named)[1:-2] if cell)


def said(error: Exception | None) -> str:
    """An error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _finished(outcomes: Sequence[Outcome]) -> list[Finished]:
    return [each.finished for each in outcomes if each.finished is not None]


def _row(outcome: Outcome, best: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"run": outcome.name, **outcome.values}
    if outcome.finished is None:
        return {**found, "error": said(outcome.error)}
    row = outcome.finished.result
    found |= {name: getattr(row, name) for name in FIGURES}
    found |= dict(_of_sources(row.sources))
    return {**found, "seconds": outcome.finished.seconds, "on_front": best}


def _of_sources(sources: Mapping[str, Mapping[str, float | None]]) -> Iterator[tuple[str, float | None]]:
    for source, figures in sources.items():
        yield from ((f"{name} of {source}", figures.get(name)) for name in OF_SOURCE)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list | bool) else value


__all__ = ["Outcome", "as_csv", "as_rows", "line", "said"]
