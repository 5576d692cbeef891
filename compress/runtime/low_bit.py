"""Torch's own products with low-bit weights on the processor.

| kernel   | function of torch               | input and result | sums                               |
|----------|---------------------------------|------------------|------------------------------------|
| `Halves` | `quantized.linear_dynamic_fp16` | float32          | float32 (FBGEMM)                   |
| `Int4`   | `_weight_int4pack_mm_for_cpu`   | bfloat16         | float32                            |
| `Int8`   | `_weight_int8pack_mm`           | bfloat16         | float32                            |

Shapes: O = out features, I = in features, M = rows of an input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from compress.encodings.decode import Decoder
from compress.runtime.kernels import Codes, Kernel, scaled, units_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings import Spec, Weight

INT4_GROUPS = (256, 128, 64, 32)
INT8_COLUMNS = 16  # read at once by torch's product, beyond the end of a row of another width
INT4_ROWS = 64  # packed at once, a multiple of every block the layout has
HALF_TILE = 1 << 22  # weights of a piece that `Halves` hands to torch: nothing larger is ever float32


class Halves(Kernel):
    """Numbers that float16 holds exactly, multiplied and summed up in float32 by FBGEMM."""

    name = "halves"

    def __init__(self, pieces: list[Any], scale: Tensor | None, num_bytes: int):
        self.pieces, self.scale, self.held = pieces, scale, num_bytes

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        if weight.encoding is None:
            return None
        lookup = weight.encoding.form.lookup(spec.shape, stored)
        scale = None if lookup.scale is None else lookup.scale.of()
        if scale is not None and scale.shape[1] > 1:
            return None
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            return None
        pieces = []
        for part in Decoder(spec, stored).tiles(HALF_TILE):
            units = units_of(weight, lookup, part)
            if not torch.equal(units.half().float(), units):
                return None
            pieces.append(torch.ops.quantized.linear_prepack_fp16(units, None))
        return cls(pieces, None if scale is None else scale.view(-1), 2 * spec.shape[0] * spec.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float().contiguous()
        found = [torch.ops.quantized.linear_dynamic_fp16(wide, piece) for piece in self.pieces]
        y = found[0] if len(found) == 1 else torch.cat(found, 1)
        return y.to(x.dtype) if self.scale is None else scaled(y, self.scale, x)

    @property
    def num_bytes(self) -> int:
        return self.held + (0 if self.scale is None else 4 * len(self.scale))


class Int4(Kernel):
    """Torch's product with codes of 4 bits: input, scales and result in bfloat16."""

    name = "int4"

    def __init__(self, codes: Tensor, group: int, tables: Tensor):
        """`codes` in torch's own layout; `tables` (I / group, O, 2) bfloat16: scales, and values of code 8."""
        self.codes, self.group, self.tables = codes, group, tables

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        rows, columns = spec.shape
        if weight.encoding is None or not weight.encoding.form.steps or weight.encoding.form.bits > 4 or rows % 16:
            return None
        codes, lookup = weight.encoding.codes, weight.encoding.form.lookup(spec.shape, stored)
        assert lookup.scale is not None
        group = next((g for g in INT4_GROUPS if lookup.scale.columns % g == 0), None)
        if group is None:
            return None
        shift = 8 - 2 ** (lookup.table.bits - 1)  # code 8 is what values are counted from: near zero little is rounded
        whole = range(0, rows, INT4_ROWS)
        packed = [_int4(codes[start : start + INT4_ROWS] + shift) for start in whole]
        scale, zero = lookup.scale.of(), lookup.steps_from().float() + shift
        tables = torch.stack([scale, (8 - zero) * scale], -1).bfloat16()
        tables = tables.repeat_interleave(columns // group // scale.shape[1], 1).expand(rows, -1, -1)
        return cls(torch.cat(packed), group, tables.transpose(0, 1).contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(
            x.bfloat16().contiguous(), self.codes, self.group, self.tables
        ).to(x.dtype)  # fmt: skip


class Int8(Kernel):
    """Torch's product with codes of 8 bits: input and result in bfloat16."""

    name = "int8"

    def __init__(self, codes: Tensor, scale: Tensor, middle: Tensor | None = None):
        """Takes what `Codes` takes."""
        self.codes, self.scale, self.middle = codes, scale, middle
        self.ones = torch.ones(len(codes), dtype=torch.bfloat16)  # its own scales would be rounded

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        if spec.shape[1] % INT8_COLUMNS:
            return None
        exact = Codes.prepare(spec, weight, stored)
        if exact is not None and exact.codes.dtype == torch.int8 and exact.scale.dim() == 1:
            return cls(exact.codes, exact.scale, exact.middle)
        codes = torch.empty(spec.shape, dtype=torch.int8)
        scale = torch.empty(spec.shape[0])
        for part in Decoder(spec, stored).tiles():
            values = weight.rows(part).dequantize()
            largest = values.abs().amax(1, keepdim=True)
            step = torch.where(largest > 0, largest, 1.0) / 127
            codes[part], scale[part] = (values / step).round_(), step[:, 0]
        return cls(codes, scale)

    def __call__(self, x: Tensor) -> Tensor:
        narrow = x.bfloat16().contiguous()
        y = torch._weight_int8pack_mm(narrow, self.codes, self.ones).float()
        if self.middle is not None:
            y.addr_(narrow.float().sum(1), self.middle)
        return scaled(y, self.scale, x)


def _int4(codes: Tensor) -> Tensor:
    return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
