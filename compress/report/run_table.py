"""The table of a run on a terminal or in a file, printed row by row as stages finish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from compress.calibration.metrics import perplexity_of
from compress.report.report import Report, caption, cells, figures, headings, source_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from compress.report.report import Row

# Rows to come are not known: columns are as wide as their numbers usually are.
USUAL = {
    "perplexity": 10, "accuracy": 8, "error": 7, "cosine": 8, "change": 7, "KL": 6, "size": 8, "seconds": 7, "peak": 7,
}  # fmt: skip
ROOMY = {**USUAL, "perplexity": 12, "change": 12, "KL": 7}  # where a pass did much damage
USUAL_OF_SOURCE = 18
USUAL_IN_POINTS = 13  # a change of accuracy


class RunTable:
    """Prints the rows of a report as they come. Columns that do not fit the console follow in tables below.

    Args:
        console: what to print on.
        model: the title.
        names: what rows will be called, as far as it is known.
    """

    def __init__(self, console: Console, model: str, names: Sequence[str] = ()):
        self.console, self.model, self.names = console, model, names
        self.rows: list[Row] = []
        self.headings: tuple[str, ...] = ()
        self.widths: list[int] = []
        self.parts: list[list[int]] = []  # columns of each table
        self.open = False

    def add(self, row: Row) -> None:
        """Print a row, below the head of the table where it is the first one."""
        self.rows.append(row)
        if not self.open:
            self._begin(row)
        text = cells(row, self._sources())
        for i in self.parts[0][1:]:  # out of line with the rows above rather than cut off
            self.widths[i] = max(self.widths[i], cell_len(text[i]))
        top, head, line, *drawn, bottom = self._lines(self.parts[0], [row])
        if not self.open:
            self.console.print(Text(self.model, "table.title"))
            self._print(top, head, line)
        self._print(*drawn)
        self.bottom, self.open = bottom, True

    def close(self) -> None:
        """Print the lower edge, also where the run fails."""
        if self.open:
            self._print(self.bottom)
            self.open = False

    def finish(self, report: Report) -> None:
        """Print what stands below the rows: columns that did not fit, what merges tried, and what was measured on."""
        self.close()
        for part in self.parts[1:]:
            self._print(*self._lines(part, self.rows))
        for merge in report.merged:
            if "tried" in merge.get("notes", {}):
                self.console.print(tried(merge))
        self.console.print(Text(caption(report), "table.caption"))

    def _begin(self, row: Row) -> None:
        """Fix the columns by the first row, which is the original's and has everything measured."""
        self.headings = headings(Report(self.model, [row]))
        for usual in (ROOMY, USUAL):
            self.widths = self._widths(row, usual)
            if self._drawn_width(range(len(self.widths))) <= self.console.width:
                break
        self.parts = [[0]]
        for i in range(1, len(self.widths)):
            if len(self.parts[-1]) > 1 and self._drawn_width([*self.parts[-1], i]) > self.console.width:
                self.parts.append([0])
            self.parts[-1].append(i)

    def _widths(self, row: Row, usual: Mapping[str, int]) -> list[int]:
        sources = self._sources()
        usual = {**usual, **dict.fromkeys(sources, USUAL_OF_SOURCE)}
        if row.accuracy is not None:
            usual["change"] = USUAL_IN_POINTS
        widths = [
            max(cell_len(heading), cell_len(cell), usual.get(heading, 0))
            for heading, cell in zip(self.headings, cells(row, sources), strict=True)
        ]
        room = self.console.width - 7 - max(widths[1:])  # beside the widest column, with the lines between
        widths[0] = max(cell_len("after"), min(room, max(map(cell_len, (row.name, *self.names)))))
        return widths

    def _sources(self) -> list[str]:
        return source_names(Report(self.model, self.rows[:1]))

    def _drawn_width(self, columns: Sequence[int]) -> int:
        """The width of some columns with the lines and room between them."""
        return 1 + sum(3 + self.widths[i] for i in columns)

    def _lines(self, part: Sequence[int], rows: Sequence[Row]) -> list[list[Segment]]:
        """A table of some columns, line by line."""
        drawn = Table()
        for i in part:
            justify: Literal["left", "right"] = "right" if i else "left"
            drawn.add_column(
                Text(self.headings[i]), justify=justify, width=self.widths[i], no_wrap=i > 0, overflow="fold"
            )
        for row in rows:
            text = cells(row, self._sources())
            drawn.add_row(*(Text(text[i]) for i in part))
        options = self.console.options.update(width=self._drawn_width(part))
        return self.console.render_lines(drawn, options, pad=False)

    def _print(self, *lines: list[Segment]) -> None:
        ended = [segment for line in lines for segment in (*line, Segment.line())]
        self.console.print(Segments(ended), end="", crop=False)


def tried(merge: dict[str, Any]) -> Table:
    """What a merge tried on the calibration data: options, quality on each source, and answers that turned wrong."""
    tries, chosen = merge["notes"]["tried"], merge["notes"]["chosen"]
    sources = list(tries[0]["found"])
    drawn = Table(title=Text(f"tried by {merge['pass']}"), title_justify="left")
    for heading in (*chosen, *(source or "quality" for source in sources), "negative flips"):
        drawn.add_column(Text(heading), justify="right", overflow="fold")
    for each in tries:
        found = [each["found"][source] for source in sources]
        text = (figures(None if f["accuracy"] else perplexity_of(f["loss"]), f["accuracy"], None)[0] for f in found)
        drawn.add_row(
            *(f"{each[option]:g}" for option in chosen),
            *text,
            f"{sum(f['negative_flips'] for f in found) / len(found):.2%}",
            style="bold" if all(each[option] == value for option, value in chosen.items()) else "",
        )
    return drawn
