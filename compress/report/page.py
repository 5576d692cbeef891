"""A finished folder as one page: what became of the model after every pass, and the error of every layer."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from compress.report import html, markup
from compress.report.report import caption, cells, headings, size_text, source_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compress.report.finished import Finished
    from compress.report.layers import Layer
    from compress.report.report import Row

HEADS = ("layer", "rows", "columns", "encoding", "bits", "group", "sparsity", "bits/weight", "size", "error")


def page(found: Finished) -> str:
    """The page.

    Raises:
        UsageError: the library that draws is missing.
    """
    report = found.report
    with html.drawing():
        charts = [*_charts(report.rows), *_heat(found.layers)]
    passes = markup.table(headings(report), [cells(row, source_names(report)) for row in report.rows])
    said = markup.paragraph(caption(report))
    layers = markup.table(HEADS, map(_layer, found.layers))
    return html.whole(f"{report.model} in {found.name}", [passes, said, *charts, markup.heading("Layers"), layers])


def _layer(row: Layer) -> tuple[str, ...]:
    codes = ("" if value is None else str(value) for value in (row.encoding, row.bits, row.group_size))
    shares = (f"{row.sparsity:.1%}", f"{row.bits_per_weight:.3f}", size_text(row.bytes))
    error = "" if row.last_error is None else f"{row.last_error:.4f}"
    return (row.layer, *map(str, row.shape), *codes, *shares, error)


def _charts(rows: Sequence[Row]) -> Iterator[str]:
    """Quality and KL behind every pass, those that were measured more than once."""
    charts = (
        ("Perplexity", [row.perplexity for row in rows]),
        ("Accuracy", [row.accuracy for row in rows]),
        ("Relative error of outputs", [row.relative_error for row in rows]),
        ("KL to the original", [row.kl for row in rows]),
    )
    for title, values in charts:
        known = [(row.name, value) for row, value in zip(rows, values, strict=True) if value is not None]
        if len(known) > 1:
            made = html.figure(max(4.0, 1.2 * len(known)), 2.6)
            axes = made.add_subplot()
            axes.plot(range(len(known)), [value for _, value in known], marker="o", color=html.LINES[0])
            axes.set_xticks(range(len(known)), [label for label, _ in known])
            axes.spines[["top", "right"]].set_visible(False)
            yield html.drawn(made, title)


def _heat(rows: Sequence[Layer]) -> Iterator[str]:
    """The relative error of every kind of layer in every block, behind the last pass; of experts, the mean."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        parts = re.split(r"\.(\d+)\.", row.layer, maxsplit=1)
        if row.last_error is not None and len(parts) == 3:
            kind = re.sub(r"\.\d+(?=\.|$)", ".*", parts[2])
            found[kind, int(parts[1])].append(row.last_error)
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    blocks = sorted({block for _, block in found})
    if not found:
        return
    made = html.figure(2.5 + 0.35 * len(blocks), 1.0 + 0.3 * len(kinds))
    axes, every = made.add_subplot(), max(1, len(blocks) // 16)
    shown = axes.pcolormesh([[_mean(found[kind, block]) for block in blocks] for kind in kinds], cmap="viridis")
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
    axes.set_xticks([i + 0.5 for i in range(0, len(blocks), every)], [str(block) for block in blocks[::every]])
    axes.set_xlabel("block")
    axes.invert_yaxis()
    made.colorbar(shown)
    yield html.drawn(made, "Relative error by layer")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


__all__ = ["page"]
