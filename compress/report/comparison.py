"""Finished folders beside each other: what each came to, and the layers in which they differ most."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from compress.logs import printable
from compress.report.report import Report, cells, headings, source_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from compress.report.finished import Finished
    from compress.report.layers import Layer
    from compress.report.report import Row

SAME = 1e-3  # relative differences of a model's figures that devices make
PEAK = -1  # the last column, which is of a process and not of a model


def table_of(found: Sequence[Finished]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The headings, and a row for each folder below one for the original that all began with."""
    rows = [replace(each.result, name=each.name, seconds=each.seconds) for each in found]
    if _begun_alike(found) and _measured_alike(found):
        rows.insert(0, found[0].original)
    drawn = Report("", rows)
    names = source_names(drawn)
    return ("result", *headings(drawn)[1:PEAK]), [cells(row, names)[:PEAK] for row in rows]


def notes(found: Sequence[Finished]) -> Iterator[str]:
    """Sentences on what cannot be set beside each other, and on what is no better for being larger."""
    if not _measured_alike(found):
        yield (
            "they were measured on different data, so that their figures cannot be set beside each other; measure them "
            "alike with `compress eval`"
        )
    if not _begun_alike(found):
        yield "they began as different models: " + "; ".join(f"{e.name} as {e.report.model}" for e in found)
    if not (_begun_alike(found) and _measured_alike(found)):
        return
    for each in found:
        better = [other.name for other in found if other is not each and _beats(other.result, each.result)]
        if better:
            yield f"{each.name} is no better than {' or '.join(better)}, and no smaller"


def differing(found: Sequence[Finished], most: int) -> list[tuple[str, list[Layer | None]]]:
    """Layers that are stored in other ways, or whose errors differ, those that differ most before the others.

    Args:
        found: two or more.
        most: layers.

    Returns:
        the layer's name, and what each folder has of it; None where it stores it as it was.
    """
    each = [{layer.layer: layer for layer in one.layers} for one in found]
    names = list(dict.fromkeys(name for one in each for name in one))
    rows = [(name, [one.get(name) for one in each]) for name in names]
    unlike = [row for row in rows if len({_said(layer) for layer in row[1]}) > 1]
    return sorted(unlike, key=lambda row: -_spread(row[1]))[:most]


def layers_of(found: Sequence[Finished], most: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The headings, and a row for each layer that differs."""
    rows = [(printable(name), *map(_said, layers)) for name, layers in differing(found, most)]
    return ("layer", *(each.name for each in found)), rows


def show(found: Sequence[Finished], most: int, console: Console) -> None:
    """Print both tables and the notes."""
    for heads, rows in (table_of(found), layers_of(found, most)):
        if rows:
            drawn = Table()
            for i, heading in enumerate(heads):
                drawn.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
            for row in rows:
                drawn.add_row(*map(Text, row))
            console.print(drawn)
    for note in notes(found):
        console.print(Text(f"note: {note}"), soft_wrap=True)


def as_json(found: Sequence[Finished], most: int) -> dict[str, Any]:
    """The same as plain data for JSON."""
    return {
        "results": [
            {
                "result": each.name, "model": each.report.model, "data": each.report.data,
                "original": asdict(each.original), "found": asdict(each.result), "seconds": each.seconds,
            }
            for each in found
        ],
        "layers": [
            {"layer": name, "found": [None if layer is None else _facts(layer) for layer in layers]}
            for name, layers in differing(found, most)
        ],
        "notes": list(notes(found)),
    }  # fmt: skip


def front(found: Sequence[Finished]) -> list[Finished]:
    """Those that none of the others beats in quality and size together, the smallest first; none if not comparable."""
    if not (_begun_alike(found) and _measured_alike(found)):
        return []
    known = [each for each in found if quality(each.result) is not None]
    best = [one for one in known if not any(_beats(other.result, one.result) for other in known)]
    return sorted(best, key=lambda each: each.result.bytes)


def judged_by(row: Row) -> str:
    """The figure that `quality` goes by."""
    if row.kl is not None:
        return "kl"
    return "relative_error" if row.accuracy is None else "accuracy"


def quality(row: Row) -> float | None:
    """What a result is judged by, the smaller the better: KL, or what is measured where there is none."""
    if row.kl is not None:
        return row.kl
    return row.relative_error if row.accuracy is None else -row.accuracy


def _measured_alike(found: Sequence[Finished]) -> bool:
    said = [{key: value for key, value in each.report.data.items() if key != "kl_tokens"} for each in found]
    return all(each == said[0] for each in said)


def _begun_alike(found: Sequence[Finished]) -> bool:
    """Whether all began as one model, which may have been measured on several devices and lie under several names."""
    first = found[0].original

    def alike(other: Row) -> bool:
        figures = [(getattr(first, name), getattr(other, name)) for name in ("perplexity", "accuracy")]
        known = [pair for pair in figures if None not in pair] if _measured_alike(found) else []
        return first.bytes == other.bytes and all(math.isclose(*pair, rel_tol=SAME) for pair in known)

    return all(alike(each.original) for each in found)


def _beats(one: Row, other: Row) -> bool:
    """Whether one is at least as good and as small as the other, and either of both more so."""
    first, second = quality(one), quality(other)
    if first is None or second is None:
        return False
    return first <= second and one.bytes <= other.bytes and (first, one.bytes) != (second, other.bytes)


def _said(layer: Layer | None) -> str:
    """How a layer is stored and how far its weight is off, in a few words."""
    if layer is None:
        return "as it was"
    parts = [layer.encoding or "values", f"{layer.bits_per_weight:.2f} bits/weight"]
    parts += [f"{layer.sparsity:.0%} zeros"] if layer.sparsity else []
    parts += [f"rank {layer.rank}"] if layer.rank else []
    parts += [] if layer.last_error is None else [f"error {layer.last_error:.4f}"]
    return ", ".join(parts)


def _facts(layer: Layer) -> dict[str, Any]:
    names = ("encoding", "bits", "group_size", "sparsity", "rank", "bits_per_weight", "bytes")
    return {**{name: getattr(layer, name) for name in names}, "error": layer.last_error}


def _spread(layers: Sequence[Layer | None]) -> float:
    """How many times as large the largest error is as the smallest; a layer that is as it was has none."""
    errors = [0.0 if layer is None else layer.last_error or 0.0 for layer in layers]
    return max(errors) / max(min(errors), 1e-12) if max(errors) > 0 else 0.0
