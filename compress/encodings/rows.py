"""Single rows of a packed weight, wherever they stand: what an embedding looks up. Nothing else is decoded.

Every number is the result of the same operations as in `unpack(spec, tensors).dequantize()`, bit for bit. Kept codes or
values of a sparse weight are one stream, so where a row begins in it is counted once: see `row_starts`.

Shapes: O rows, I columns, N rows that are asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.encodings.bits import unpack_bits
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings.lookup import Lookup
    from compress.encodings.weight import Spec

BY_ROW = ("scale", "zero_point", "outer_scale", "offset", "outer_offset")  # tables with a row for each of scales


def streamed(spec: Spec) -> bool:
    """Whether what is kept of a weight is one stream, in which rows begin anywhere."""
    return spec.kept is not None and not (spec.form is not None and spec.form.stores_idle)


def row_starts(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
    """(O,) int64: how many numbers of a stream are kept in the rows before each."""
    rows, columns = spec.shape
    if spec.pattern is not None:
        each = columns // spec.pattern.of * spec.pattern.keep
        return torch.arange(rows, device=tensors["pattern"].device) * each
    ones = torch.tensor([byte.bit_count() for byte in range(256)], device=tensors["mask"].device)
    kept = torch.cat([ones[part.int()].sum(1) for part in torch.split(tensors["mask"], 1 << 14)])
    return kept.cumsum(0) - kept


def decode_rows(
    spec: Spec,
    tensors: Mapping[str, Tensor],
    rows: Tensor,
    starts: Tensor | None = None,
    codes: Tensor | None = None,
) -> Tensor:
    """Some rows of a weight without a correction.

    Args:
        spec: of the weight.
        tensors: stored under their names.
        rows: (N,) their numbers, in any order, any of them several times.
        starts: of `row_starts`; needed where `streamed`.
        codes: (N, I) uint8 of the rows, where they are known; those among the tensors are not read then.

    Returns:
        (N, I) float32.
    """
    columns, form = spec.shape[1], spec.form
    if not len(rows) or spec.kept == 0:
        return torch.zeros(len(rows), columns, device=rows.device)
    mask = _mask(spec, tensors, rows)
    places = None
    if streamed(spec):
        assert mask is not None
        assert starts is not None
        places = starts[rows][:, None] + mask.cumsum(1) - 1
        places = places.clamp_(min=0)  # of what is masked any will do
    if form is None and places is None:
        return tensors["values"][rows].float()
    if form is None:
        assert mask is not None
        return tensors["values"][places].float().masked_fill_(~mask, 0.0)
    if codes is None:
        stored = tensors["codes"]
        codes = unpack_bits(stored[rows], form.bits, columns) if places is None else _at(stored, form.bits, places)
    lookup = _lookup(spec, tensors, rows)
    found = lookup.scaled(lookup.units(codes))
    return found if mask is None else found.masked_fill_(~mask, 0.0)


def _mask(spec: Spec, tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor | None:
    stored = {name: tensors[name][rows] for name in ("pattern", "mask") if name in tensors}
    return spec.mask(stored)


def _at(stream: Tensor, bits: int, places: Tensor) -> Tensor:
    """The codes at some places of one stream, uint8; a code lies in two neighbouring bytes at most."""
    bit = places * bits
    byte = bit >> 3
    word = stream[byte].int() | stream[(byte + 1).clamp_(max=len(stream) - 1)].int() << 8
    return (word >> (bit & 7).int() & (1 << bits) - 1).to(torch.uint8)


def _lookup(spec: Spec, tensors: Mapping[str, Tensor], rows: Tensor) -> Lookup:
    """What the codes of some rows mean, as if these rows were all of the weight."""
    form, (count, columns) = spec.form, spec.shape
    assert form is not None
    beside = {name: tensors[name] for name in form.tables(spec.shape)}
    scale = beside.get("scale")
    if scale is not None and len(scale) > 1:
        owner = rows // (count // len(scale))
        beside |= {name: beside[name][owner] for name in BY_ROW if name in beside and beside[name].dim() > 1}
    found = form.lookup((len(rows), columns), {**beside, "codes": tensors["codes"]})
    table = form.row_table(count, beside)
    return found if table is None else replace(found, row_table=table[rows])


__all__ = ["decode_rows", "row_starts", "streamed"]
