"""What a compressed folder stores of every layer: rows for machines, a table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from compress.encodings import Spec
from compress.logs import printable
from compress.report import bars
from compress.report.report import size_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console


@dataclass(frozen=True)
class Layer:
    """One stored weight.

    Attributes:
        layer: its name.
        shape: of the matrix, (rows, columns).
        encoding: family of the codes; None where values are stored.
        sparsity: share of zeros.
        bytes: everything stored, scales and masks counted.
        inputs: how the layer rounds its inputs.
        rank: of the low-rank correction.
        adapter_bits: of the factors of the correction.
        passes: that changed it, in order.
        error: pass -> relative error of the weight.
        fallback: what was done instead of a pass, in words.
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

    @property
    def weights(self) -> int:
        """How many the matrix has."""
        return self.shape[0] * self.shape[1]


def layers(modules: Mapping[str, Any], notes: Mapping[str, Any]) -> list[Layer]:
    """Every stored weight, in the order of the folder.

    Args:
        modules: name -> specification, from the folder's configuration.
        notes: name -> pass -> notes, from its report.
    """
    return [_layer(name, Spec.from_json(data), notes.get(name, {})) for name, data in modules.items()]


def _layer(name: str, spec: Spec, notes: Mapping[str, Any]) -> Layer:
    weights, form = spec.shape[0] * spec.shape[1], spec.form
    return Layer(
        layer=name,
        shape=list(spec.shape),
        encoding=form.family if form else None,
        bits=form.bits if form else None,
        group_size=spec.shape[1] // getattr(form, "groups", 1) if form else None,
        sparsity=1 - spec.kept / weights if spec.kept is not None else 0.0,
        bytes=spec.num_bytes,
        inputs=str(spec.inputs) if spec.inputs else None,
        rank=spec.low_rank.rank if spec.low_rank else None,
        adapter_bits=spec.low_rank.bits if spec.low_rank else None,
        bits_per_weight=8 * spec.num_bytes / weights,
        passes=list(notes),
        error={p: n["error"] for p, n in notes.items()},
        fallback=[n["fallback"] for n in notes.values() if "fallback" in n],
    )


def as_json(rows: Sequence[Layer]) -> list[dict[str, Any]]:
    """The rows as plain data for JSON."""
    return [asdict(row) for row in rows]


def show(rows: Sequence[Layer], console: Console) -> None:
    """Print a table, and the zeros of every block where layers differ."""
    console.print(table(rows))
    found = {row.layer: (row.weights, row.sparsity) for row in rows}
    if bars.uneven(found):
        drawn = bars.zeros(found, console.width, console.options.ascii_only)
        console.print("zeros by block", drawn, sep="\n", soft_wrap=True)


def table(rows: Sequence[Layer]) -> Table:
    """A row for every layer; columns for corrections and rounded inputs only where there are any."""
    corrected, rounded = any(row.rank for row in rows), any(row.inputs for row in rows)
    headings = ["layer", "shape", "encoding", "bits", "group", "sparsity", "bits/weight", "size", "error"]
    if corrected:
        headings.insert(5, "rank")
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
            *([row.inputs or ""] if rounded else []),
        )
        drawn.add_row(*map(Text, text))
    return drawn


def _rank(row: Layer) -> str:
    """The rank of the layer's correction, and the bits of its factors."""
    bits = f" x {row.adapter_bits} bit" if row.adapter_bits else ""
    return f"{row.rank}{bits}" if row.rank else ""
