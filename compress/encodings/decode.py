"""Packed tensors to values in one go: `Decoder(spec, tensors)` gives exactly what `unpack` and `dequantize` give.

An index of several neighbouring codes is looked up in a table of what they mean together, so codes never stand alone in
memory, and large weights are worked on by tiles of rows that stay in the cache. Every number is the result of the same
operations as in the families' own `dequantize`, bit for bit.

| bits of a code | codes an index | entries |
|----------------|---------------:|--------:|
| 2              | 4              | 256     |
| 3              | 4              | 4096    |
| 4              | 2              | 256     |
| 5, 6, 7        | 2              | 1024, 4096, 16384 |
| 8              | 1              | 256     |

Shapes: O = out features, I = in features, G = groups of columns, T = tables, K = 2**bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from compress.encodings.bits import unpack_bits
from compress.encodings.codebook import CodebookForm
from compress.encodings.outlier_victim import TYPES, OutlierVictimForm
from compress.encodings.power import PowerForm, level_values
from compress.encodings.uniform import CHUNK, UniformForm
from compress.encodings.weight import spread, unpack
from compress.lazy import functional, torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.encodings.power import Levels
    from compress.encodings.weight import Spec

WIDE = {1: "float32", 2: "int64", 4: "complex128"}  # a type as wide as so many float32


class Decoder:
    """What a dense quantized weight of one table lookup is, by tiles of rows; everything else goes through `unpack`.

    Args:
        spec: of the weight.
        tensors: stored under their names; kept, not copied.
    """

    def __init__(self, spec: Spec, tensors: Mapping[str, Tensor]):
        self.spec, self.tensors = spec, tensors
        self.shape = spec.shape
        self.quick = spec.form is not None and (spec.kept is None or _scattered(spec))
        if not self.quick:
            return
        form, device = spec.form, tensors["codes"].device
        assert form is not None
        self.count = codes_an_index(form.bits)
        self.first: Tensor | None = None  # (O, 1) int32, where a row's table begins
        if isinstance(form, UniformForm):
            self.table = _steps(form.bits, form.symmetric, str(device))
        elif isinstance(form, PowerForm):
            self.table = _levels(form.bits, form.levels, float(tensors["exponent"]), str(device))
        elif isinstance(form, CodebookForm):
            self.table = wide(tensors["table"].float(), form.bits)
            if form.num_tables > 1:
                row_group = form.row_groups(spec.shape[0], tensors)
                self.first = row_group.int()[:, None] << (form.bits * self.count)
        else:
            assert isinstance(form, OutlierVictimForm)
            self.table, self.count = TYPES[form.normal].pairs.to(device), 2

    def rows(self, part: slice) -> Tensor:
        """(rows, I) float32 of some rows, corrections left out. Dense and quantized weights only."""
        form, columns = self.spec.form, self.shape[1]
        assert form is not None
        packed = self.tensors["codes"][part]
        if isinstance(form, UniformForm) and form.bits == 8:
            return self._scaled(packed.float().sub_(128) if form.symmetric else packed.float(), part)
        index = indices(packed, form.bits, self.count)
        if self.first is not None:
            index += self.first[part]
        found = self.table.index_select(0, index.flatten()).view(torch.float32).view(len(index), -1)
        return self._scaled(found[:, :columns], part)

    def tiles(self, most: int = CHUNK) -> Iterator[slice]:
        """Rows to work on at once, of at most so many weights where a row has not more."""
        rows, columns = self.shape
        step = max(1, most // columns)
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
        if isinstance(form, UniformForm) and not form.symmetric:
            found.mul_(mask).add_(0.0)  # adding zero makes a plus of minus zero; it is quicker than filling
        return found

    def _scaled(self, found: Tensor, part: slice) -> Tensor:
        """In place, or on a copy of rows that end within an index: products of what has gaps are summed otherwise."""
        form, found = self.spec.form, found.contiguous()
        scale = self.tensors.get("scale")
        if scale is None:
            return found
        of_rows = part if len(scale) == self.shape[0] else slice(None)
        scale = scale[of_rows]
        grouped = found.view(len(found), scale.shape[1], -1)
        if isinstance(form, UniformForm) and not form.symmetric:
            packed = self.tensors["zero_point"][of_rows]
            grouped.sub_(unpack_bits(packed, form.bits, form.groups).float()[..., None])
        return grouped.mul_(scale.float()[..., None]).view(found.shape)


def codes_an_index(bits: int) -> int:
    """How many neighbouring codes are looked up together."""
    return 1 if bits == 8 else 4 if bits <= 3 else 2


def indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """(R, B) uint8 stream -> (R, N / count or a few more) int32: so many codes each, the first in the low bits."""
    width = bits * count
    if width == 8:
        return packed.int()
    if width == 16:
        pairs = _padded(packed, 2).view(len(packed), -1, 2).int()
        return pairs[..., 0] | pairs[..., 1] << 8
    # Eight codes fill exactly `bits` bytes.
    groups = _padded(packed, bits).view(len(packed), -1, bits)
    groups = groups.int() if bits == 3 else groups.long()
    word = groups[..., 0].clone()
    for i in range(1, bits):
        word |= groups[..., i] << (8 * i)
    mask = (1 << width) - 1
    return torch.stack([word >> (width * i) & mask for i in range(8 // count)], -1).int().flatten(1)


def wide(table: Tensor, bits: int) -> Tensor:
    """(T, up to K) float32 -> (T * K**count,), each element the values of `count` codes, the first in the low bits."""
    count = codes_an_index(bits)
    table = functional.pad(table, (0, 2**bits - table.shape[1]))
    entries = torch.arange(2 ** (bits * count), device=table.device)
    codes = torch.stack([entries >> (bits * i) & (2**bits - 1) for i in range(count)], -1)
    return table[:, codes].view(getattr(torch, WIDE[count])).flatten()


@lru_cache(maxsize=64)
def _steps(bits: int, symmetric: bool, device: str) -> Tensor:
    with torch.inference_mode(False):
        return wide(torch.arange(2**bits, device=device).float()[None] - (2 ** (bits - 1) if symmetric else 0), bits)


@lru_cache(maxsize=64)
def _levels(bits: int, levels: Levels, exponent: float, device: str) -> Tensor:
    with torch.inference_mode(False):
        return wide(level_values(bits, levels, torch.tensor([exponent], device=device))[None], bits)


def _scattered(spec: Spec) -> bool:
    """Whether the kept codes of a sparse weight mean the same wherever they stand, up to a scale."""
    form = spec.form
    return isinstance(form, UniformForm | PowerForm) or (isinstance(form, CodebookForm) and form.num_tables == 1)


def _padded(packed: Tensor, multiple: int) -> Tensor:
    missing = -packed.shape[1] % multiple
    return functional.pad(packed, (0, missing)) if missing else packed.contiguous()


__all__ = ["Decoder", "codes_an_index", "indices", "wide"]
