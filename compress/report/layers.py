"""What a compressed folder stores of every layer: rows for machines, a table for people."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from compress.errors import UsageError
from compress.export import Entropy
from compress.io.small_file import read_object
from compress.logs import printable
from compress.report import bars
from compress.report.distribution import Distribution, distribution_of
from compress.report.report import size_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from compress.checkpoint.artifact import Packed
    from compress.encodings.cache import CacheForm

REPORT = "report.json"
CSV = (
    "layer", "rows", "columns", "encoding", "bits", "group_size", "sparsity", "bits_per_weight", "bytes",
    "rank", "inputs", "passes", "error", "fallback",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One stored weight.

    Attributes:
        layer: its name.
        shape: of the matrix, (rows, columns).
        encoding: family of the codes; None where values are stored.
        sparsity: share of zeros.
        bytes: everything stored, scales and masks counted, entropy-coded where it is.
        inputs: how the layer rounds its inputs.
        rank: of the low-rank correction.
        adapter_bits: of the factors of the correction.
        passes: that changed it, in order.
        error: pass -> relative error of the weight, of those that say one.
        fallback: what was done instead of a pass, in words.
        distribution: shape of the generalised Gaussian that its numbers are like, and bits of entropy of its codes;
            None where weights were not read for it.
    """

    layer: str
    shape: list[int]
    encoding: str | None
    bits: int | None
    group_size: int | None
    sparsity: float
    bytes: int
    inputs: str | None
    rank: int | None
    adapter_bits: int | None
    bits_per_weight: float
    passes: list[str]
    error: dict[str, float]
    fallback: list[str]
    distribution: Distribution | None = None

    @property
    def weights(self) -> int:
        """How many the matrix has."""
        return self.shape[0] * self.shape[1]

    @property
    def last_error(self) -> float | None:
        """The relative error of the weight behind the last pass that says one."""
        return next(reversed(self.error.values()), None)


def layers(modules: Mapping[str, Packed], notes: Mapping[str, Any], *, measured: bool = False) -> list[Layer]:
    """Every stored weight, in the order of the folder.

    Args:
        modules: name -> the weight, in the folder.
        notes: name -> pass -> notes, from its report.
        measured: read every weight, for its distribution.
    """
    found = (_layer(name, packed, notes.get(name, {})) for name, packed in modules.items())
    if not measured:
        return list(found)
    return [replace(row, distribution=distribution_of(modules[row.layer])) for row in found]


def notes_of(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Layer -> pass -> notes, of the report of a folder; that of an entropy-coded one lies in the folder around it.

    Raises:
        UsageError: the report is not what a run wrote.
    """
    place = folder.parent if folder.name == Entropy.key and not (folder / REPORT).exists() else folder
    notes = read_object(place / REPORT).get("layers")
    passes = list(notes.values()) if isinstance(notes, dict) else [None]
    each = [note for found in passes for note in (found.values() if isinstance(found, dict) else [None])]
    whole = all(isinstance(note, dict) and isinstance(note.get("error", 0), float | int) for note in each)
    if not isinstance(notes, dict) or not whole:
        raise UsageError(f"{place / REPORT} is not what a run wrote: its `layers` are damaged; run the pipeline again")
    return dict(notes)


def _layer(name: str, packed: Packed, notes: Mapping[str, Any]) -> Layer:
    spec, stored = packed.spec, packed.num_bytes
    weights, form = spec.shape[0] * spec.shape[1], spec.form
    return Layer(
        layer=name,
        shape=list(spec.shape),
        encoding=form.family if form else None,
        bits=form.bits if form else None,
        group_size=spec.shape[1] // form.groups_of(spec.shape[1]) if form else None,
        sparsity=1 - spec.kept / weights if spec.kept is not None else 0.0,
        bytes=stored,
        inputs=str(spec.inputs) if spec.inputs else None,
        rank=spec.low_rank.rank if spec.low_rank else None,
        adapter_bits=spec.low_rank.bits if spec.low_rank else None,
        bits_per_weight=8 * stored / weights,
        passes=list(notes),
        error={p: n["error"] for p, n in notes.items() if "error" in n},
        fallback=[n["fallback"] for n in notes.values() if "fallback" in n],
    )


def as_json(rows: Sequence[Layer]) -> list[dict[str, Any]]:
    """The rows as plain data for JSON."""
    plain = [asdict(row) for row in rows]
    return [{k: v for k, v in row.items() if k != "distribution" or v is not None} for row in plain]


def as_csv(rows: Sequence[Layer]) -> str:
    """The rows for a spreadsheet: numbers in full, one error, behind the last pass."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV)
    for row in rows:
        writer.writerow(
            (row.layer, *row.shape, row.encoding, row.bits, row.group_size, row.sparsity, row.bits_per_weight,
             row.bytes, row.rank, row.inputs, "+".join(row.passes), row.last_error, "; ".join(row.fallback))
        )  # fmt: skip
    return out.getvalue()


def show(rows: Sequence[Layer], console: Console, caches: Mapping[str, CacheForm]) -> None:
    """Print a table, how keys and values are rounded, and the zeros of every block where layers differ."""
    console.print(table(rows))
    for words, count in Counter(map(str, caches.values())).items():
        console.print(f"keys and values of {count} attention layers in {words}")
    found = {row.layer: (row.weights, row.sparsity) for row in rows}
    if bars.uneven(found):
        drawn = bars.zeros(found, console.width, console.options.ascii_only)
        console.print("zeros by block", drawn, sep="\n", soft_wrap=True)


def table(rows: Sequence[Layer]) -> Table:
    """A row for every layer; columns for corrections, distributions and rounded inputs only where there are any."""
    corrected, rounded = any(row.rank for row in rows), any(row.inputs for row in rows)
    measured = any(row.distribution for row in rows)
    headings = ["layer", "shape", "encoding", "bits", "group", "sparsity", "bits/weight", "size", "error"]
    if corrected:
        headings.insert(5, "rank")
    headings += ["shape of numbers", "entropy"] if measured else []
    drawn = Table()
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
    if rounded:
        drawn.add_column("inputs", overflow="fold")
    for row in rows:
        text = (
            printable(row.layer) + (" (fallback)" if row.fallback else ""),
            "x".join(map(str, row.shape)),
            *("" if value is None else str(value) for value in (row.encoding, row.bits, row.group_size)),
            *([_rank(row)] if corrected else []),
            f"{row.sparsity:.1%}",
            f"{row.bits_per_weight:.3f}",
            size_text(row.bytes),
            " ".join(f"{p} {e:.4f}" for p, e in row.error.items()),
            *(_distribution(row) if measured else []),
            *([row.inputs or ""] if rounded else []),
        )
        drawn.add_row(*map(Text, text))
    return drawn


def _distribution(row: Layer) -> list[str]:
    """The shape of the distribution of a layer's numbers, and the entropy of its codes."""
    found = row.distribution or Distribution(None, None)
    return ["" if number is None else f"{number:.3f}" for number in (found.shape, found.entropy)]


def _rank(row: Layer) -> str:
    """The rank of the layer's correction, and the bits of its factors."""
    bits = f" x {row.adapter_bits} bit" if row.adapter_bits else ""
    return f"{row.rank}{bits}" if row.rank else ""
