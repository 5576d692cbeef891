"""Codebooks: value = table[code], every row with one of a few tables, and optionally times scales of its own.

Shapes: O = out features, I = in features, K = entries of a table, G = tables, S = scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from compress.encodings.base import Encoding, Form
from compress.encodings.bits import pack_bits, row_bytes, unpack_bits
from compress.encodings.lookup import Table
from compress.encodings.pieces import rows_in_piece
from compress.encodings.uniform import CHUNK, narrowest
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings.base import StoredShapes

MOST_ENTRIES = 256
MOST_TABLES = 256


def index_bits(count: int) -> int:
    """Bits of a number below `count`."""
    return (count - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class CodebookForm(Form):
    """Codes are ceil(log2 K) bits wide.

    Stored: `table` (G, K); with several tables `row_group` uint8 (1, ceil(O * ceil(log2 G) / 8)), packed as codes are,
    or, where rows have their tables in runs, `run_ends` int32 (G,); if scaled `scale` (O, S), each of a scale's I / S
    neighbouring columns.

    Attributes:
        period: rows this far apart share a table, and run r of the rows between, up to `run_ends[r]`, has table r;
            0 where every row has a number of its own.
        groups: S; 1 where a row has one scale, or none.
    """

    entries: int
    num_tables: int = 1
    scaled: bool = False
    table_dtype: str = "float16"
    scale_dtype: str = "float16"
    period: int = 0
    groups: int = 1
    family: ClassVar[str] = "codebook"

    def __post_init__(self) -> None:
        if self.entries > 2**self.bits or self.num_tables > MOST_TABLES:
            raise ValueError(f"{self.num_tables} tables of {self.entries} values for codes of {self.bits} bits")

    def tables(self, shape: tuple[int, int]) -> StoredShapes:
        found: StoredShapes = {"table": ((self.num_tables, self.entries), getattr(torch, self.table_dtype))}
        if self.num_tables > 1 and self.period:
            found["run_ends"] = ((self.num_tables,), torch.int32)
        elif self.num_tables > 1:
            found["row_group"] = ((1, row_bytes(shape[0], index_bits(self.num_tables))), torch.uint8)
        if self.scaled:
            found["scale"] = ((shape[0], self.groups), getattr(torch, self.scale_dtype))
        return found

    def encoding(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Codebooks:
        row_group = self.row_table(len(codes), tables)
        if row_group is None:
            row_group = torch.zeros(len(codes), dtype=torch.uint8, device=codes.device)
        return Codebooks(codes, tables["table"], row_group, tables.get("scale"), self.period or None)

    def table(self, tensors: Mapping[str, Tensor], device: torch.device) -> Table:
        return Table(tensors["table"].float()[..., None], self.bits)

    def row_table(self, rows: int, tensors: Mapping[str, Tensor]) -> Tensor | None:
        if self.num_tables == 1:
            return None
        if not self.period:
            return unpack_bits(tensors["row_group"], index_bits(self.num_tables), rows)[0]
        places = torch.arange(self.period, device=tensors["run_ends"].device)
        of_first = torch.searchsorted(tensors["run_ends"], places, right=True)
        return of_first.to(torch.uint8).repeat(rows // self.period)


@dataclass(frozen=True)
class Codebooks(Encoding):
    """Indices into tables of free values.

    Attributes:
        codes: (O, I) uint8, below K.
        table: (G, K) float16 or float32, ascending in each table; K is 2 to 256, G is 1 to 256.
        row_group: (O,) uint8 below G, the table of each row.
        scale: (O, S) float16 or float32, not negative; None when the tables hold the values themselves.
        period: rows this far apart share a table, and tables do not fall over the rows between; None: any row has any.
    """

    codes: Tensor
    table: Tensor
    row_group: Tensor
    scale: Tensor | None = None
    period: int | None = None

    @property
    def form(self) -> CodebookForm:
        num_tables, entries = self.table.shape
        return CodebookForm(
            bits=index_bits(entries),
            entries=entries,
            num_tables=num_tables,
            scaled=self.scale is not None,
            table_dtype=_dtype_name(self.table.dtype),
            scale_dtype="float16" if self.scale is None else _dtype_name(self.scale.dtype),
            period=self.period or 0,
            groups=1 if self.scale is None else self.scale.shape[1],
        )

    def tables(self) -> dict[str, Tensor]:
        found = {"table": self.table.contiguous()}
        if len(self.table) > 1 and self.period:
            of_first = torch.bincount(self.row_group[: self.period].long(), minlength=len(self.table))
            found["run_ends"] = of_first.cumsum(0).to(torch.int32)
        elif len(self.table) > 1:
            found["row_group"] = pack_bits(self.row_group[None], index_bits(len(self.table)))
        if self.scale is not None:
            found["scale"] = self.scale.contiguous()
        return found

    def dequantize(self) -> Tensor:
        return dequantize(self.codes, self.table, self.row_group, self.scale)

    def rows(self, part: slice) -> Self:
        scale = None if self.scale is None else narrowest(self.scale[part])
        return replace(self, codes=self.codes[part], row_group=self.row_group[part], scale=scale, period=None)

    def idle(self) -> Tensor:
        nearest_to_zero = self.table.float().abs().argmin(1).to(torch.uint8)
        return nearest_to_zero[self.row_group.long()][:, None]

    def defect(self) -> str | None:
        num_tables, entries = self.table.shape
        if not 2 <= entries <= MOST_ENTRIES:
            return f"tables of {entries} entries"
        if len(self.row_group) != len(self.codes):
            return "not one table for each row"
        if not 1 <= num_tables <= MOST_TABLES or int(self.row_group.max()) >= num_tables:
            return f"rows that use tables beyond the {num_tables} there are"
        if self.period and not self._in_runs(self.period):
            return f"rows whose tables are not in runs that repeat every {self.period} rows"
        if not torch.isfinite(self.table).all() or bool((self.table.float().diff(dim=1) < 0).any()):
            return "tables that are not finite and ascending"
        if self.scale is not None and not (torch.isfinite(self.scale) & (self.scale >= 0)).all():
            return "scales that are negative or not finite"
        if self.scale is not None and self.codes.shape[1] % self.scale.shape[1]:
            return f"{self.scale.shape[1]} scales for each row of {self.codes.shape[1]} columns"
        if int(self.codes.max()) >= entries:
            return f"codes beyond tables of {entries} entries"
        return self._codes_defect()

    def _in_runs(self, period: int) -> bool:
        if len(self.row_group) % period:
            return False
        each = self.row_group.view(-1, period)
        return bool((each == each[:1]).all()) and bool((each[0].int().diff() >= 0).all())


def dequantize(codes: Tensor, table: Tensor, row_group: Tensor, scale: Tensor | None = None) -> Tensor:
    """(O, I) codes, (G, K) table, (O,) row_group, (O, S) scale -> (O, I) float32."""
    index = codes.int()
    if len(table) > 1:
        index += row_group.int()[:, None] * table.shape[1]
    values = table.float().flatten().index_select(0, index.flatten()).view(codes.shape)
    return values if scale is None else values.mul_(of_columns(scale.float(), codes.shape[1]))


def nearest(weight: Tensor, table: Tensor, row_group: Tensor, scale: Tensor | None = None) -> Tensor:
    """(O, I) float32 -> (O, I) uint8 codes of the nearest entries; halfway, of the lower one."""
    rows, columns = weight.shape
    wide = table.float()
    borders = (wide[:, 1:] + wide[:, :-1]) / 2
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    step = rows_in_piece(CHUNK, columns, weight.device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        piece = weight[part] if scale is None else unscaled(weight[part], scale[part])
        if len(table) == 1:
            codes[part] = torch.bucketize(piece, borders[0], out_int32=True)
        else:
            codes[part] = torch.searchsorted(borders[row_group[part].long()], piece, out_int32=True)
    return codes


def unscaled(weight: Tensor, scale: Tensor) -> Tensor:
    """(O, I) weights in units of their scales (O, S); zero where a scale is."""
    wide = of_columns(scale.float(), weight.shape[1])
    return torch.where(wide > 0, weight / wide, 0.0)


def of_columns(scale: Tensor, columns: int) -> Tensor:
    """(O, S) -> the scale of each weight, (O, columns); as it is where a row has one."""
    groups = scale.shape[1]
    return scale if groups == 1 else scale.repeat_interleave(columns // groups, 1)


def stored_table(table: Tensor) -> Tensor:
    """(G, K) float32 -> each table as its stored type will hold it, decided for each alone."""
    limits = torch.finfo(torch.float16)
    largest = table.abs().amax(1, keepdim=True)
    fits = (largest == 0) | ((largest >= limits.tiny) & (largest <= limits.max))
    return torch.where(fits, table.to(torch.float16).float(), table)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
