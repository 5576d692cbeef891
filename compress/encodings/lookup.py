"""What codes mean, stated once: decoding, kernels and exporters read a `Lookup` and never ask which family it is.

A weight is (table[code] - zero) * scale - offset. What a family leaves out is not there:

| part        | uniform          | power levels | codebook         | pairs           | floats         | super-blocks |
|-------------|------------------|--------------|------------------|-----------------|----------------|--------------|
| `table`     | whole steps      | levels       | free values      | of two codes    | small floats   | whole steps  |
| `row_table` |                  |              | of several       |                 |                |              |
| `zero`      | unless symmetric |              |                  |                 |                |              |
| `scale`     | groups           | groups       | per row, or none | per row         | blocks, groups | groups       |
| `offset`    |                  |              |                  |                 |                | of some      |

Shapes: O = out features, I = in features, R = rows of scales, G = groups of columns; T = tables, E = entries of a
table, C = codes of an index, K = 2**bits.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from compress.lazy import functional, torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

JOINED = {1: "float32", 2: "int64", 4: "complex128"}  # a type as wide as so many float32


@dataclass(frozen=True, eq=False)
class Table:
    """What the codes of an index mean, in units of their scale.

    Attributes:
        values: (T, E, C) float32. An index is C neighbouring codes, the first in its low bits.
        bits: of a code.
    """

    values: Tensor
    bits: int

    @property
    def codes_per_index(self) -> int:
        """C."""
        return self.values.shape[2]

    @property
    def codes_joined(self) -> int:
        """How many neighbouring codes `joined` holds the values of."""
        return codes_an_index(self.bits) if self.codes_per_index == 1 else self.codes_per_index

    @cached_property
    def joined(self) -> Tensor:
        """(T * K**codes_joined,): each element holds the values of so many codes, the first in the low bits."""
        # A table may be shared, and outlive the mode. Entering one costs as much as a small lookup.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if self.codes_per_index == 1:
                return wide(self.values[..., 0], self.bits)
            return self.values.view(getattr(torch, JOINED[self.codes_per_index])).flatten()


@dataclass(frozen=True, eq=False)
class BlockScale:
    """One scale for each block of a weight.

    Attributes:
        values: (R, G), as stored; what they mean where bytes are stored.
        rows: of a block; all of them where R is 1.
        columns: of a block.
        outer: a scale of the scales, (1,), or (R, S) with one for every G / S neighbours; or None.
    """

    values: Tensor
    rows: int
    columns: int
    outer: Tensor | None = None

    @property
    def groups(self) -> int:
        """G."""
        return self.values.shape[1]

    def of(self, part: slice = slice(None)) -> Tensor:
        """(rows, G) float32: the scales of some rows of the weight; (1, G) where all rows share them."""
        found = _of_rows(self.values, self.rows, part).float()
        if self.outer is None or self.outer.dim() == 1:
            return found if self.outer is None else found * self.outer.float()
        outer = _of_rows(self.outer, self.rows, part).float()
        return (found.view(*outer.shape, -1) * outer[..., None]).view(found.shape)

    def as_stored(self) -> Tensor:
        """`of` all rows, in the stored type where one scale is all there is."""
        return self.of() if self.outer is not None else _of_rows(self.values, self.rows, slice(None))

    def rows_of(self, part: slice) -> BlockScale:
        """Those of some rows of a weight of which each has its own."""
        outer = self.outer if self.outer is None or self.outer.dim() == 1 else self.outer[part]
        return replace(self, values=self.values[part], outer=outer)

    def put_columns(self, part: slice, own: BlockScale) -> None:
        """Put those of some neighbouring super-blocks, the groups `part`, in the place of what is here."""
        assert self.outer is not None
        assert own.outer is not None
        each = self.groups // self.outer.shape[1]
        self.values[:, part] = own.values
        self.outer[:, part.start // each : part.stop // each] = own.outer

    @classmethod
    def joined(cls, each: Sequence[BlockScale]) -> BlockScale:
        """Those of several weights, one below the other, whose rows have their own scales on two levels."""
        outer = [block.outer for block in each if block.outer is not None]
        return replace(each[0], values=torch.cat([block.values for block in each]), outer=torch.cat(outer))


@dataclass(frozen=True, eq=False)
class Lookup:
    """What the codes of one weight mean.

    Attributes:
        table: what the codes of an index mean.
        row_table: (O,) uint8 below T, the table of each row; None where there is one table.
        zero: (R, G) uint8, what is subtracted from the table's values; None where nothing is, or codes count no steps.
        scale: what they are then multiplied with; None where values are as they are.
        offset: what is then subtracted, for the blocks that have scales; None where nothing is.
    """

    table: Table
    row_table: Tensor | None = None
    zero: Tensor | None = None
    scale: BlockScale | None = None
    offset: BlockScale | None = None

    @property
    def placeless(self) -> bool:
        """Whether a code means the same in all rows and beside any code, up to scale and zero point."""
        return self.row_table is None and self.table.codes_per_index == 1

    def zero_of(self, part: slice) -> Tensor | None:
        """(rows, G) float32: the zero points of some rows; (1, G) where all rows share them."""
        if self.zero is None or self.scale is None:
            return None
        return _of_rows(self.zero, self.scale.rows, part).float()

    def scaled(self, units: Tensor, part: slice = slice(None)) -> Tensor:
        """(rows, I) float32 of some rows in units of their scales -> what they are, in place."""
        if self.scale is None:
            return units
        scale = self.scale.of(part)
        grouped = units.view(len(units), scale.shape[1], -1).mul_(scale[..., None])
        if self.offset is not None:
            grouped.sub_(self.offset.of(part)[..., None])
        return grouped.view(units.shape)

    def steps_from(self) -> Tensor:
        """The codes of zero where codes count steps, uint8 (O, G) or (1, G): the middle ones where none are stored."""
        assert self.scale is not None
        values, zero = self.scale.values, self.zero
        if zero is None:
            zero = torch.full(values.shape, 2 ** (self.table.bits - 1), dtype=torch.uint8, device=values.device)
        return _of_rows(zero, self.scale.rows, slice(None))

    def units(self, codes: Tensor, part: slice = slice(None)) -> Tensor:
        """(rows, I) uint8 codes of some rows -> (rows, I) float32: what they mean, in units of their scales."""
        rows, columns = codes.shape
        entries, each = self.table.values.shape[1:]
        codes = functional.pad(codes, (0, -columns % each)).int().view(rows, -1, each)
        index = codes[..., 0].clone()
        for i in range(1, each):
            index |= codes[..., i] << (self.table.bits * i)
        if self.row_table is not None:
            index += self.row_table[part].int()[:, None] * entries
        found = self.table.values.view(-1, each).index_select(0, index.flatten()).view(rows, -1)[:, :columns]
        zero = self.zero_of(part)
        if zero is None:
            return found.contiguous()
        return found.view(rows, zero.shape[1], -1).sub_(zero[..., None]).view(rows, columns)


def codes_an_index(bits: int) -> int:
    """How many neighbouring codes are looked up together."""
    return 1 if bits == 8 else 4 if bits <= 3 else 2


def wide(table: Tensor, bits: int) -> Tensor:
    """(T, up to K) float32 -> (T * K**count,), each element the values of `count` codes, the first in the low bits."""
    count = codes_an_index(bits)
    table = functional.pad(table, (0, 2**bits - table.shape[1]))
    entries = torch.arange(2 ** (bits * count), device=table.device)
    codes = torch.stack([entries >> (bits * i) & (2**bits - 1) for i in range(count)], -1)
    return table[:, codes].view(getattr(torch, JOINED[count])).flatten()


def _of_rows(values: Tensor, rows: int, part: slice) -> Tensor:
    """(R, G), one row for each block of `rows` -> those of some rows of the weight; the only one if all share it."""
    if len(values) == 1:
        return values
    return values[part] if rows == 1 else values.repeat_interleave(rows, 0)[part]


__all__ = ["BlockScale", "Lookup", "Table", "codes_an_index", "wide"]
