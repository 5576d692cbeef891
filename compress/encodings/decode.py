"""Packed tensors to values in one go: `Decoder(spec, tensors)` gives exactly what `unpack` and `dequantize` give.

An index of several neighbouring codes is looked up in a table of what they mean together, so codes never stand alone in
memory, and large weights are worked on by tiles of rows that stay in the cache. Every family is read through its
`Lookup`, and every number is the result of the same operations as in the family's own `dequantize`, bit for bit.

| bits of a code | codes per index | entries           |
|----------------|----------------:|------------------:|
| 2              | 4               | 256               |
| 3              | 4               | 4096              |
| 4              | 2               | 256               |
| 5, 6, 7        | 2               | 1024, 4096, 16384 |
| 8              | 1               | 256               |

Shapes: O = out features, I = in features, G = groups of columns, T = tables, K = 2**bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.encodings.bits import padded
from compress.encodings.pieces import rows_in_piece
from compress.encodings.uniform import CHUNK
from compress.encodings.weight import spread, unpack
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.encodings.weight import Spec


class Decoder:
    """What a quantized weight is, by tiles of rows; what is not quick to look up goes through `unpack`.

    Args:
        spec: of the weight.
        tensors: stored under their names; kept, not copied.

    Attributes:
        quick: whether values are looked up from the packed codes: those of a sparse weight are only where they mean
            the same wherever they stand.
    """

    def __init__(self, spec: Spec, tensors: Mapping[str, Tensor]):
        self.spec, self.tensors = spec, tensors
        self.shape = spec.shape
        self.quick = False
        if spec.form is None:
            return
        self.lookup = spec.form.lookup(spec.shape, tensors)
        self.quick = spec.kept is None or (self.lookup.placeless and not spec.form.stores_idle)
        if not self.quick:
            return
        table, rows = self.lookup.table, self.lookup.row_table
        self.table, self.count = table.joined, table.codes_joined
        # (O, 1) int32, where the table of each row begins
        self.first = None if rows is None else rows.int()[:, None] << (table.bits * self.count)

    def rows(self, part: slice) -> Tensor:
        """(rows, I) float32 of some rows, corrections left out. Dense and quantized weights only."""
        form, columns = self.spec.form, self.shape[1]
        assert form is not None
        packed = self.tensors["codes"][part]
        if form.steps and form.bits == 8:
            return self._scaled(packed.float() if self.lookup.zero is not None else packed.float().sub_(128), part)
        index = indices(packed, form.bits, self.count)
        if self.first is not None:
            index += self.first[part]
        found = self.table.index_select(0, index.flatten()).view(torch.float32).view(len(index), -1)
        return self._scaled(found[:, :columns], part)

    def tiles(self, most: int | None = None) -> Iterator[slice]:
        """Rows to work on at once, of at most so many weights where a row has not more.

        By default so many that temporaries stay in the cache of a processor, or give another device enough to do.
        """
        rows, columns = self.shape
        device = next(iter(self.tensors.values())).device
        step = rows_in_piece(CHUNK, columns, device) if most is None else max(1, most // columns)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def dequantize(self) -> Tensor:
        """(O, I) float32 of all of it: bit for bit `unpack(spec, tensors).dequantize()`."""
        if not self.quick:
            return unpack(self.spec, self.tensors).dequantize()
        if self.spec.kept is not None:
            base = self._sparse()
        elif len(parts := list(self.tiles())) == 1:
            base = self.rows(parts[0])
        else:
            base = torch.empty(self.shape, device=self.table.device)
            for part in parts:
                base[part] = self.rows(part)
        if self.spec.low_rank is None:
            return base
        return base + self.spec.low_rank.low_rank(self.tensors, self.shape).product()

    def _sparse(self) -> Tensor:
        """Kept codes as one stream: what they mean is spread out over the kept places, with zeros between."""
        form, kept = self.spec.form, self.spec.kept
        assert form is not None
        assert kept is not None
        mask = self.spec.mask(self.tensors)
        assert mask is not None
        index = indices(self.tensors["codes"][None], form.bits, self.count).flatten()
        values = self.table.index_select(0, index).view(torch.float32)[:kept]
        found = self._scaled(spread(values, mask), slice(None))
        if self.lookup.zero is not None or self.lookup.offset is not None:
            found.mul_(mask).add_(0.0)  # adding zero makes a plus of minus zero; it is quicker than filling
        return found

    def _scaled(self, found: Tensor, part: slice) -> Tensor:
        """Values times their scales, less their offsets, in place, or in a copy of rows that end within an index.

        The copy has no gaps: products with gaps in memory are summed in another order.
        """
        found, zero = found.contiguous(), self.lookup.zero_of(part)
        if zero is not None:
            found.view(len(found), zero.shape[1], -1).sub_(zero[..., None])
        return self.lookup.scaled(found, part)


def indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """(R, B) uint8 stream -> (R, N / count or a few more) int32: so many codes each, the first in the low bits."""
    width = bits * count
    if width == 8:
        return packed.int()
    if width == 16:
        pairs = padded(packed, 2).view(len(packed), -1, 2).int()
        return pairs[..., 0] | pairs[..., 1] << 8
    # Eight codes fill exactly `bits` bytes.
    groups = padded(packed, bits).view(len(packed), -1, bits)
    groups = groups.int() if bits == 3 else groups.long()
    word = groups[..., 0].clone()
    for i in range(1, bits):
        word |= groups[..., i] << (8 * i)
    mask = (1 << width) - 1
    return torch.stack([word >> (width * i) & mask for i in range(8 // count)], -1).int().flatten(1)


__all__ = ["Decoder", "indices"]
