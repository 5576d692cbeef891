"""The kernel for graphics processors: every encoding is a lookup, or a step, times a scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from compress.encodings import OutlierVictim, Uniform
from compress.encodings.bits import pack_bits
from compress.encodings.outlier_victim import TYPES
from compress.runtime import triton_kernels
from compress.runtime.kernels import Kernel, numbered

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings import Spec, Weight


class Lookup(Kernel):
    """Multiplies with the codes as they lie; under a mask, with a stream in which masked weights have a code too."""

    name = "lookup"

    def __init__(self, codes: Tensor, table: Tensor, first: Tensor, zero: Tensor, scale: Tensor, owned: int):
        """As in `triton_kernels.multiply`; `owned`: bytes that are not the stored ones."""
        self.codes, self.table, self.first, self.zero, self.scale = codes, table, first, zero, scale
        self.owned = owned
        self.columns, self.bits, self.lookup = 0, 0, 0

    @classmethod
    def prepare(cls, spec: Spec, weight: Weight, stored: dict[str, Tensor]) -> Self | None:
        encoding = weight.encoding
        if encoding is None or not triton_kernels.usable(encoding.codes.device):
            return None
        rows, device = spec.shape[0], encoding.codes.device
        table = torch.zeros(1, device=device)
        first = torch.zeros(rows, dtype=torch.int32, device=device)
        zero = torch.zeros(1, 1, dtype=torch.uint8, device=device)
        scale = torch.ones(1, 1, device=device)
        codes, bits, lookup = encoding.codes, encoding.form.bits, 1
        packed = stored["codes"]
        if isinstance(encoding, Uniform):
            zero, scale, lookup = encoding.zero_point.contiguous(), encoding.scale, 0
        elif isinstance(encoding, OutlierVictim):
            victim = TYPES[encoding.normal].identifier
            if weight.mask is not None and bool((codes % victim != 0).logical_and_(~weight.mask).any()):
                return None  # under the mask stands neither zero nor a victim
            pairs = TYPES[encoding.normal].pairs.view(torch.float32)
            table, scale, lookup = pairs.to(device), encoding.scale, 2
        elif (found := numbered(weight)) is not None:
            codes, table, first = found
            first = first * table.shape[1]
            bits = max(bits, (table.shape[1] - 1).bit_length())
            own = getattr(encoding, "scale", None)
            scale = scale if own is None else own
        else:
            return None
        if weight.mask is not None and not encoding.form.stores_idle:
            packed = pack_bits(codes, bits)
        made = cls(packed, table.flatten(), first, zero, scale.contiguous(), 0)
        made.columns, made.bits, made.lookup = spec.shape[1], bits, lookup
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
            columns=self.columns, bits=self.bits, lookup=self.lookup,
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        return self.owned
