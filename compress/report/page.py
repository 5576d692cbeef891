"""A finished folder as one page for a browser, which fetches nothing and is light or dark as its reader's screen is."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from html import escape
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.export.refusals import refuse_missing
from compress.io.small_file import read_object
from compress.report.layers import CSV, REPORT
from compress.report.report import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from compress.report.layers import Layer

INK = "#123456"  # a colour that nothing else has, in the place of which the page's own is put
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "compress", "text.parse_math": False, "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
LINE = "#4c8bd0"  # readable on white and on black
HEADS = ("after", "perplexity", "accuracy", "KL", "size", "bits/weight", "sparsity", "seconds")
PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font-family: sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .7rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} tr + tr {{ border-top: 1px solid #8888; }}
svg {{ max-width: 100%; height: auto; }} .wide {{ overflow-x: auto; }}
</style></head><body>
{body}
</body></html>
"""


def page(folder: Path, rows: Sequence[Layer]) -> str:
    """The page: what became of the model after every pass, and the error of every layer.

    Args:
        folder: a finished one.
        rows: its layers, as `layers` gives them.

    Raises:
        UsageError: the library that draws is missing, or the report is not what a run wrote.
    """
    for missing in refuse_missing("matplotlib", "page"):
        raise UsageError(missing)
    found = read_object(folder / REPORT)
    after = found.get("rows")
    if not isinstance(after, list) or not after or not all(isinstance(r, dict) and "name" in r for r in after):
        raise UsageError(f"{folder / REPORT} is not what a run wrote: its `rows` are damaged; run the pipeline again")
    title = f"{found.get('model', folder.name)} in {folder.name}"
    from matplotlib import rc_context

    with rc_context(STYLE):
        drawn = [*_charts(after), *_heat(rows)]
    parts = [f"<h1>{escape(title)}</h1>", _table(HEADS, map(_after, after)), *drawn]
    parts += ["<h2>Layers</h2>", _table(CSV[:9], map(_layer, rows))]
    return PAGE.format(title=escape(title), body="\n".join(parts))


def _after(row: Mapping[str, Any]) -> tuple[str, ...]:
    sparsity = row.get("sparsity")
    return (
        str(row["name"]), _number(row.get("perplexity"), 3), _number(row.get("accuracy"), 4), _number(row.get("kl"), 4),
        size_text(int(row.get("bytes") or 0)), _number(row.get("bits_per_weight"), 3),
        "" if sparsity is None else f"{sparsity:.1%}", _number(row.get("seconds"), 1),
    )  # fmt: skip


def _layer(row: Layer) -> tuple[str, ...]:
    codes = ("" if value is None else str(value) for value in (row.encoding, row.bits, row.group_size))
    shares = (f"{row.sparsity:.1%}", f"{row.bits_per_weight:.3f}", size_text(row.bytes))
    return (row.layer, *map(str, row.shape), *codes, *shares)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(heads: Sequence[str], rows: Any) -> str:
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _charts(after: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Perplexity, accuracy and KL behind every pass, those that were measured more than once."""
    for name, title in (("perplexity", "Perplexity"), ("accuracy", "Accuracy"), ("kl", "KL to the original")):
        known = [(str(row["name"]), float(row[name])) for row in after if isinstance(row.get(name), float | int)]
        if len(known) > 1:
            figure = _figure(max(4.0, 1.2 * len(known)), 2.6)
            axes = figure.add_subplot()
            axes.plot(range(len(known)), [value for _, value in known], marker="o", color=LINE)
            axes.set_xticks(range(len(known)), [label for label, _ in known])
            axes.spines[["top", "right"]].set_visible(False)
            yield f"<h2>{title}</h2>\n{_drawn(figure)}"


def _heat(rows: Sequence[Layer]) -> Iterator[str]:
    """The relative error of every kind of layer in every block, behind the last pass; of experts, the mean."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        parts = re.split(r"\.(\d+)\.", row.layer, maxsplit=1)
        if row.error and len(parts) == 3:
            kind = re.sub(r"\.\d+(?=\.|$)", ".*", parts[2])
            found[kind, int(parts[1])].append(float(next(reversed(row.error.values()))))
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    blocks = sorted({block for _, block in found})
    if not found:
        return
    figure = _figure(2.5 + 0.35 * len(blocks), 1.0 + 0.3 * len(kinds))
    axes, every = figure.add_subplot(), max(1, len(blocks) // 16)
    shown = axes.pcolormesh([[_mean(found[kind, block]) for block in blocks] for kind in kinds], cmap="viridis")
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
    axes.set_xticks([i + 0.5 for i in range(0, len(blocks), every)], [str(block) for block in blocks[::every]])
    axes.set_xlabel("block")
    axes.invert_yaxis()
    figure.colorbar(shown)
    yield f"<h2>Relative error by layer</h2>\n{_drawn(figure)}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _drawn(figure: Any) -> str:
    """A drawing as SVG, in the colours of the page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


__all__ = ["page"]
