"""The kernel for graphics processors: every encoding is a lookup, or a step, times a scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from compress.encodings.bits import pack_bits
from compress.encodings.decode import Decoder
from compress.runtime import triton_kernels
from compress.runtime.kernels import Kernel, numbered

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings import Spec, Weight
    from compress.encodings.lookup import Lookup

STEPS, CODES, PAIRS = 0, 1, 2  # LOOKUP in `triton_kernels`


class GpuLookup(Kernel):
    """Multiplies with the codes as they lie; under a mask, with a stream in which masked weights have a code too."""

    name = "lookup"

    def __init__(self, codes: Tensor, table: Tensor, first: Tensor, zero: Tensor, scale: Tensor, owned: int):
        """Takes what `triton_kernels.multiply` takes; `owned`: bytes that are not the stored ones."""
        self.codes, self.table, self.first, self.zero, self.scale = codes, table, first, zero, scale
        self.owned = owned
        self.columns, self.bits, self.mode = 0, 0, CODES

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        encoding = weight.encoding
        if encoding is None or not triton_kernels.usable(encoding.codes.device):
            return None
        rows, device = spec.shape[0], encoding.codes.device
        lookup = encoding.form.lookup(spec.shape, stored)
        table = torch.zeros(1, device=device)
        first = torch.zeros(rows, dtype=torch.int32, device=device)
        zero = torch.zeros(1, 1, dtype=torch.uint8, device=device)
        scale = torch.ones(1, 1, device=device) if lookup.scale is None else lookup.scale.as_stored()
        codes, bits, mode = encoding.codes, encoding.form.bits, CODES
        packed = stored["codes"]
        if encoding.form.steps:
            zero, mode = lookup.steps_from().contiguous(), STEPS
        elif lookup.table.codes_per_index == 2:
            parts = Decoder(spec, stored).tiles()
            if bits not in (4, 8) or lookup.row_table is not None:
                return None
            if weight.mask is not None and any(_means_something(weight, weight.mask, lookup, part) for part in parts):
                return None
            table, mode = lookup.table.values, PAIRS
        elif (found := numbered(weight, lookup)) is not None:
            codes, table, first = found
            first = first * table.shape[1]
            bits = max(bits, (table.shape[1] - 1).bit_length())
        else:
            return None
        if weight.mask is not None and not encoding.form.stores_idle:
            packed = pack_bits(codes, bits)
        made = cls(packed, table.flatten(), first, zero, scale.contiguous(), 0)
        made.columns, made.bits, made.mode = spec.shape[1], bits, mode
        theirs = {t.data_ptr() for t in stored.values()}
        made.owned = sum(
            t.numel() * t.element_size()
            for t in (made.codes, made.table, made.first, made.zero, made.scale)
            if t.data_ptr() not in theirs
        )
        return made

    def __call__(self, x: Tensor) -> Tensor:
        return triton_kernels.multiply(
            x, self.codes, self.table, self.first, self.zero, self.scale,
            columns=self.columns, bits=self.bits, lookup=self.mode,
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        return self.owned


def _means_something(weight: Weight, mask: Tensor, lookup: Lookup, part: slice) -> bool:
    """Whether codes under the mask mean anything but zero, in some rows."""
    assert weight.encoding is not None
    return bool(lookup.units(weight.encoding.codes[part], part).masked_fill_(mask[part], 0.0).any())
