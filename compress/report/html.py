"""Pieces of a page for a browser, which fetches nothing and is light or dark as its reader's screen is."""

from __future__ import annotations

import io
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.export.refusals import refuse_missing
from compress.report import markup

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

INK = "#123456"  # a colour that nothing else has, in the place of which the page's own is put
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "compress", "text.parse_math": False, "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
LINES = ("#4c8bd0", "#d0804c", "#3f9f6b", "#b05fc0", "#b8a03a", "#d0566a")  # readable on white and on black
PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font-family: sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .7rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} tr + tr {{ border-top: 1px solid #8888; }}
svg {{ max-width: 100%; height: auto; }} .wide {{ overflow-x: auto; }}
pre {{ white-space: pre-wrap; background: #8882; padding: .5rem 1rem; }}
</style></head><body>
{body}
</body></html>
"""


@contextmanager
def drawing() -> Iterator[None]:
    """Within it drawings have the colours of the page.

    Raises:
        UsageError: the library that draws is missing.
    """
    for missing in refuse_missing("matplotlib", "page"):
        raise UsageError(missing)
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield


def whole(title: str, parts: Iterable[str]) -> str:
    """The page of some parts, which are HTML already; the title is text."""
    return PAGE.format(title=escape(title), body="\n".join([f"<h1>{escape(title)}</h1>", *parts]))


def figure(width: float, height: float) -> Any:
    """An empty drawing. Sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def drawn(made: Any, title: str) -> str:
    """A drawing as SVG below a heading."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    canvas: Any = FigureCanvasSVG(made)
    canvas.print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    return f"{markup.heading(title)}\n{text[text.index('<svg') :].replace(INK, 'currentColor')}"
