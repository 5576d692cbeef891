"""Ways to multiply with a packed weight on the processor, quicker or smaller than unpacking all of it.

| kernel   | takes                                        | result            | bits per weight beside the packed |
|----------|----------------------------------------------|-------------------|-----------------------------------|
| `Tiles`  | everything                                   | float32 rounding  | none; the packed ones if sparse   |
| `Codes`  | whole numbers times a scale, by row or group | float32 rounding  | 8 or 16                           |
| `Bytes`  | tables of values, no offsets                 | float32 rounding  | 4 or 8                            |
| `Halves` | numbers of 11 bits times a scale per row     | float32 rounding  | 16                                |
| `Int4`   | uniform, to 4 bits, groups of 32 and more    | bfloat16 rounding | 4 and 32 per group                |
| `Int8`   | everything, rounded again where it must be   | that of 8 bits    | 8                                 |

The last three are products of torch's own: see `low_bit.py`. What a kernel keeps is derived from the stored tensors and
never written.

Shapes: O = out features, I = in features, M = rows of an input, G = groups of columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.encodings import pack
from compress.encodings.bits import pack_bits
from compress.encodings.decode import Decoder
from compress.encodings.lookup import wide
from compress.encodings.uniform import CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.encodings import Spec, Weight
    from compress.encodings.lookup import Lookup


class Kernel(ABC):
    """y = x W^T for one weight, without bias."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        """Make the kernel from a weight without correction, or return None where it does not fit."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """(M, I) of a float type -> (M, O) of the same."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the kernel keeps beside the stored tensors."""
        return sum(t.numel() * t.element_size() for t in vars(self).values() if isinstance(t, Tensor))


class Tiles(Kernel):
    """Dequantizes some rows, multiplies, and goes on: never is the whole matrix in float32."""

    name = "tiles"

    def __init__(self, parts: list[tuple[slice, Decoder]], owned: int):
        self.parts, self.owned = parts, owned

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self:
        whole = Decoder(spec, stored)
        tiles = list(whole.tiles())
        if len(tiles) == 1 or (whole.quick and spec.kept is None):
            return cls([(part, whole) for part in tiles], 0)
        # A stream of kept codes has no rows to begin at: every tile gets one of its own.
        packed = [pack(weight.rows(part)) for part in tiles]
        owned = 0 if spec.form is None and spec.kept is None else sum(s.num_bytes for s, _ in packed)
        return cls([(part, Decoder(s, t)) for part, (s, t) in zip(tiles, packed, strict=True)], owned)

    def __call__(self, x: Tensor) -> Tensor:
        return _by_tiles(x, self.parts[-1][0].stop, ((part, self._values(part, d)) for part, d in self.parts))

    def _values(self, part: slice, decoder: Decoder) -> Tensor:
        return decoder.rows(part) if decoder.quick and decoder.spec.kept is None else decoder.dequantize()

    @property
    def num_bytes(self) -> int:
        return self.owned


class Codes(Kernel):
    """Unpacked whole numbers, of one or two bytes."""

    name = "codes"

    def __init__(self, codes: Tensor, scale: Tensor, middle: Tensor | None = None):
        """`codes` (O, I) int8 or int16; `scale` (O,) float32, or with several groups (O, G, 1).

        `middle` (O,) float32: what is to be added to the codes of a row, or None.
        """
        self.codes, self.scale, self.middle = codes, scale, middle

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        if weight.encoding is None or not weight.encoding.form.whole:
            return None
        lookup, form = weight.encoding.form.lookup(spec.shape, stored), weight.encoding.form
        if lookup.scale is None:
            return None
        scale, zero = lookup.scale.of(), lookup.zero_of(slice(None))
        if scale.shape[1] == 1:
            scale = scale.expand(spec.shape[0], 1).contiguous()
            if form.steps and form.bits == 8 and zero is not None:
                middle = 128 - zero.expand(spec.shape[0], 1)[:, 0]
                return cls((weight.encoding.codes ^ 128).view(torch.int8), scale[:, 0], middle)
        codes = torch.empty(spec.shape, dtype=torch.int16, device=scale.device)
        for part in Decoder(spec, stored).tiles():
            units = units_of(weight, lookup, part)
            if float(units.abs().max()) > torch.iinfo(torch.int16).max:
                return None
            codes[part] = units
        limits = torch.iinfo(torch.int8)
        if limits.min <= int(codes.min()) and int(codes.max()) <= limits.max:
            codes = codes.to(torch.int8)
        return cls(codes, scale.view(-1) if scale.shape[1] == 1 else scale[..., None])

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = self.codes.shape
        step = max(1, CHUNK // columns)
        parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        if self.scale.dim() == 1:  # the scale of a row can wait for the sums
            wide = x.float()
            y = _by_tiles(wide, rows, ((p, self.codes[p].float()) for p in parts))
            return scaled(y if self.middle is None else y.addr_(wide.sum(1), self.middle), self.scale, x)
        return _by_tiles(x, rows, ((p, self._values(p)) for p in parts))

    def _values(self, part: slice) -> Tensor:
        values = self.codes[part].float()
        values.view(len(values), self.scale.shape[1], -1).mul_(self.scale[part])
        return values


class Bytes(Kernel):
    """Numbers of values in a table, two in a byte or one, masked weights among them."""

    name = "bytes"

    def __init__(self, packed: Tensor, table: Tensor, first: Tensor, scale: Tensor, columns: int):
        """`packed` (O, B) uint8; `table` as of `wide`; `first` (O, 1) int32 into it; `scale` (R, G, 1) float32."""
        self.packed, self.table, self.first, self.scale, self.columns = packed, table, first, scale, columns

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        if weight.encoding is None or weight.encoding.form.steps:
            return None
        lookup = weight.encoding.form.lookup(spec.shape, stored)
        found = None if lookup.offset is not None else numbered(weight, lookup)
        if found is None or (weight.mask is None and found[1].shape[1] in (4, 16, 256)):
            return None  # as they are stored they are looked up as quickly
        codes, table, first = found
        bits = 4 if table.shape[1] <= 16 else 8
        if table.shape[1] > 256:
            return None
        scale = torch.ones(1, 1, device=table.device) if lookup.scale is None else lookup.scale.of()
        begins = (first << 8)[:, None]  # 256 entries per table, either way
        return cls(pack_bits(codes, bits), wide(table, bits), begins, scale[..., None], spec.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(self.packed)
        step = max(1, CHUNK // self.columns)
        parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        return _by_tiles(x, rows, ((p, self._values(p)) for p in parts))

    def _values(self, part: slice) -> Tensor:
        index = self.packed[part].int()
        if len(self.table) > 256:
            index += self.first[part]
        values = self.table.index_select(0, index.flatten()).view(torch.float32).view(len(index), -1)
        scale = self.scale if len(self.scale) == 1 else self.scale[part]
        grouped = values[:, : self.columns].contiguous().view(len(index), scale.shape[1], -1)
        return grouped.mul_(scale).view(len(index), -1)


class Factors(Kernel):
    """Two thin products in the place of B A multiplied out, beside what another kernel does or alone."""

    name = "factors"

    def __init__(self, base: Kernel | None, spec: Spec, stored: dict[str, Tensor]):
        self.base, self.spec, self.stored = base, spec, stored

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        return None if spec.low_rank is None else cls(None, spec, stored)

    def __call__(self, x: Tensor) -> Tensor:
        assert self.spec.low_rank is not None
        a, b = self.spec.low_rank.low_rank(self.stored, self.spec.shape).factors()
        added = linear(linear(x, a.to(x.dtype)), b.to(x.dtype))
        return added if self.base is None else added.add_(self.base(x))

    @property
    def num_bytes(self) -> int:
        return 0 if self.base is None else self.base.num_bytes


def scaled(y: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """(M, O) float32 sums times the scales (O,) of their rows of the weight, in the type of `like`."""
    return y.mul_(scale).to(like.dtype)


def numbered(weight: Weight, lookup: Lookup) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes (O, I) uint8, tables (T, E) float32 and (O,) int32, each row's table, of what is looked up code by code.

    Where weights are masked, the last entry is zero and theirs: no other code may mean exactly zero. None where codes
    mean something only beside others, or where more than 256 entries would be needed.
    """
    assert weight.encoding is not None
    codes, values, rows = weight.encoding.codes, lookup.table.values, lookup.row_table
    if values.shape[2] > 1:
        return None
    table = values[..., 0]
    first = torch.zeros(len(codes), dtype=torch.int32, device=table.device) if rows is None else rows.int()
    if weight.mask is None:
        return codes, table, first
    entries = table.shape[1]
    if entries == 256:
        return None
    return torch.where(weight.mask, codes, entries), torch.nn.functional.pad(table, (0, 1)), first


def without_extras(spec: Spec) -> Spec:
    """A spec with the same codes and mask, but without correction and input grid."""
    return replace(spec, low_rank=None, inputs=None)


def _by_tiles(x: Tensor, rows: int, tiles: Iterator[tuple[slice, Tensor]]) -> Tensor:
    found = x.new_empty(len(x), rows)
    for part, values in tiles:
        y = linear(x, values.to(x.dtype))
        if len(values) == rows:
            return y
        found[:, part] = y
    return found


def units_of(weight: Weight, lookup: Lookup, part: slice) -> Tensor:
    """(rows, I) float32: the values of some rows in units of their scales."""
    assert weight.encoding is not None
    units = lookup.units(weight.encoding.codes[part], part)
    return units if weight.mask is None else units.masked_fill_(~weight.mask[part], 0.0)
