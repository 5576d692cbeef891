"""Finished folders beside each other as one page for a browser."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from compress.report import comparison, html, markup

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compress.report.finished import Finished

AXES = {"kl": "KL to the original", "relative_error": "relative error of outputs", "accuracy": "accuracy"}


def page(found: Sequence[Finished], most: int, written: Mapping[str, Mapping[str, str]], title: str = "") -> str:
    """The page.

    Args:
        found: two or more.
        most: layers to list.
        written: prompt -> who goes on with it -> what with.
        title: their names where none is given.

    Raises:
        UsageError: the library that draws is missing.
    """
    with html.drawing():
        charts = [*_sizes(found), *_errors(found)]
    parts = [markup.table(*comparison.table_of(found)), *map(markup.paragraph, comparison.notes(found)), *charts]
    heads, rows = comparison.layers_of(found, most)
    if rows:
        parts += [markup.heading("Layers that differ most"), markup.table(heads, rows)]
    for prompt, texts in written.items():
        parts += [markup.heading(f"After {prompt!r}"), *(markup.passage(name, text) for name, text in texts.items())]
    return html.whole(title or " and ".join(each.name for each in found), parts)


def _sizes(found: Sequence[Finished]) -> Iterator[str]:
    """Quality against size; only of what was measured. A line joins those that no other beats in both."""
    best = comparison.front(found)
    for name, title in AXES.items():
        known = [(each.name, each.result.bytes / 1e6, getattr(each.result, name)) for each in found]
        known = [point for point in known if point[2] is not None]
        if len(known) > 1:
            made = html.figure(6.0, 3.4)
            axes = made.add_subplot()
            for i, (label, size, value) in enumerate(known):
                axes.plot([size], [value], marker="o", linestyle="", color=html.LINES[i % len(html.LINES)])
                axes.annotate(label, (size, value), textcoords="offset points", xytext=(6, 4))
            if len(best) > 1 and name == comparison.judged_by(best[0].result):
                points = [(each.result.bytes / 1e6, getattr(each.result, name)) for each in best]
                axes.plot(*zip(*points, strict=True), linestyle="--", linewidth=1, color="#8888", zorder=0)
            axes.set_xlabel("MB of weights")
            axes.margins(x=0.2, y=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            yield html.drawn(made, f"{title[0].upper()}{title[1:]} and size")


def _errors(found: Sequence[Finished]) -> Iterator[str]:
    """The mean relative error of the weights of each block."""
    lines: dict[str, dict[int, list[float]]] = {}
    for each in found:
        blocks: dict[int, list[float]] = defaultdict(list)
        for layer in each.layers:
            number = re.search(r"\.(\d+)\.", layer.layer)
            if number and layer.last_error is not None:
                blocks[int(number[1])].append(layer.last_error)
        lines[each.name] = blocks
    if sum(map(bool, lines.values())) < 2:
        return
    made = html.figure(6.0, 3.0)
    axes = made.add_subplot()
    for i, (name, blocks) in enumerate(lines.items()):
        places = sorted(blocks)
        means = [sum(blocks[place]) / len(blocks[place]) for place in places]
        axes.plot(places, means, marker="o", label=name, color=html.LINES[i % len(html.LINES)])
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    yield html.drawn(made, "Relative error of weights by block")


__all__ = ["page"]
