"""What `compress list` says: ready-made pipelines and what they did to the bundled model; methods and options."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

from compress.config.measured import GROUPS, original
from compress.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from compress.config.measured import Measured
    from compress.export import Exporter
    from compress.passes import Pass

HEAD = ("", "perplexity", "KL", "MB", "bits", "seconds")
WIDTHS = (9, 7, 6, 6, 8)  # of the columns behind the name
METHODS = "methods"  # the word for a list of all of them
MORE = """\
Measured on the bundled model, {perplexity:.2f} and {size:.2f} MB before, on two processor cores (scripts/results.py).
Fewer of them: compress list prune, compress list gptq --bits 3. Methods and options: compress list methods.
Which to take: compress advise MODEL"""


def chosen(rows: Iterable[Measured], words: Sequence[str], bits: int | None) -> list[Measured]:
    """The ready-made pipelines of a group, with a method or with a word in their name; all words must fit.

    Raises:
        UsageError: there is none.
    """
    ready = [row for row in rows if row.name]
    found = [row for row in ready if all(map(row.fits, words)) and bits in (None, row.bits)]
    if not found:
        widths = sorted({row.bits for row in ready if row.bits is not None and all(map(row.fits, words))})
        if bits is not None and widths:
            there = ", ".join(map(str, widths))
            raise UsageError(f"--bits {bits}: those that are ready-made have {there}; `compress quantize` takes 2 to 8")
        raise UsageError(
            f"no ready-made pipeline is {' '.join(words)}{'' if bits is None else f' with {bits} bits'}; a word is one "
            f"of {', '.join(GROUPS)}, a method or a part of a name"
        )
    return found


def pipelines(rows: Sequence[Measured]) -> str:
    """Ready-made pipelines by what they do, the best first; those that nobody measured by name."""
    width = 2 + max(len(row.name) for row in rows)
    lines = []
    for group in dict.fromkeys(row.group for row in sorted(rows, key=lambda row: GROUPS.index(row.group))):
        own = [row for row in rows if row.group == group]
        own.sort(key=lambda row: (row.perplexity is None, row.perplexity or 0.0, row.name))
        measured = own[0].perplexity is not None
        head = "".join(f"{title:>{size + 2}}" for title, size in zip(HEAD[1:], WIDTHS, strict=True)) if measured else ""
        lines += [f"{group:{width}}{head}".rstrip(), *(_line(row, width, measured) for row in own), ""]
    before = original()
    return "\n".join([*lines, MORE.format(perplexity=before.perplexity, size=before.size / 1e6)])


def _line(row: Measured, width: int, measured: bool) -> str:
    cells = ["", "", "", "", ""]
    if row.perplexity is not None and row.size is not None:
        cells = [f"{row.perplexity:.2f}", f"{row.kl:.4f}", f"{row.size / 1e6:.2f}", f"{row.bits_per_weight:.2f}"]
        cells += [f"{row.seconds:.0f}"]
    numbers = "".join(f"{cell:>{size + 2}}" for cell, size in zip(cells, WIDTHS, strict=True)) if measured else ""
    return f"  {row.name:{width - 2}}{numbers}  {row.description}"


def methods(passes: Sequence[type[Pass]], formats: Iterable[str], common: type[Pass], quantizer: type[Pass]) -> str:
    """Every method with its options.

    Args:
        passes: the methods.
        formats: as `signature` gives them.
        common: the class whose options all have.
        quantizer: the class whose options all quantizers have.
    """
    every = [f.name for f in fields(common)]
    quantizers = [f.name for f in fields(quantizer) if f.name not in every]
    lines, width = [], max(18, 2 + max(len(pass_.key) for pass_ in passes))
    for pass_ in passes:
        first = (pass_.__doc__ or "").strip().splitlines()[0]
        own = [f for f in fields(pass_) if f.name not in (*every, *quantizers) and f.default is not MISSING]
        lines += [f"{pass_.key:{width}}{first}", f"{'':{width}}{', '.join(f'{f.name}={f.default}' for f in own)}"]
    rest = {"every method": every, "every quantizer": quantizers, "export": formats}
    return "\n".join([*lines, "", *(f"{f'{what}:':{width}}{', '.join(names)}" for what, names in rest.items())])


def signature(exporter: type[Exporter]) -> str:
    """The name of a format, with its options."""
    options = ", ".join(f"{f.name}={f.default}" for f in fields(exporter))
    return f"{exporter.key} ({options})" if options else str(exporter.key)
