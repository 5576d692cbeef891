"""Tables of pairs, as the quick kernels look them up: one code at a time, from one of two tables.

A table of pairs may be anything. Those of outlier-victim pairs are of a kind that needs no table of all pairs: a code
means one thing beside any code but one, the escape, and another thing beside that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings.lookup import Table

SIGN = 8  # of a code of 4 bits, and the escape that the kernels know


@dataclass(frozen=True)
class Pairs:
    """What codes of pairs mean.

    Attributes:
        normal: (E,) float32, beside any code but the escape,
        other: (E,) float32, beside the escape.
        escape: the code.
        recoded: (E,) uint8, the code of the kernels for each code that is not beside the escape.
    """

    normal: Tensor
    other: Tensor
    escape: int
    recoded: Tensor

    @classmethod
    def of(cls, table: Table) -> Pairs | None:
        """What a table of two codes an index says, or None where it is of no such kind, or not for these kernels."""
        entries = 2**table.bits
        if table.codes_per_index != 2 or table.values.shape[:2] != (1, entries**2) or table.bits not in (4, 8):
            return None
        high_low = table.values[0].view(entries, entries, 2)
        first, second = high_low[..., 0].T, high_low[..., 1]  # of a code (row) beside another (column)
        if not torch.equal(first, second):
            return None
        apart = (first != first[:, :1]).any(0).nonzero()[:, 0]
        if len(apart) not in (1, entries - 1):
            return None
        escape = int(apart[0]) if len(apart) == 1 else 0
        normal, other = first[:, 0 if escape else 1].contiguous(), first[:, escape].contiguous()
        if table.bits == 8:
            return cls(normal, other, escape, torch.arange(entries, dtype=torch.uint8, device=normal.device))
        recoded = _signs_and_magnitudes(normal, other) if escape == SIGN else None
        return None if recoded is None else cls(normal, other, escape, recoded)

    def magnitudes(self) -> Tensor:
        """(1, 16) float32 of 4-bit codes: the 8 that are normal, and those beside the escape."""
        return torch.cat([self.normal[:SIGN], self.other[:SIGN]])[None]

    def values(self) -> Tensor:
        """(512,) float32: by codes of the kernels, and from 256 on beside the escape."""
        found = torch.zeros(2, 256, device=self.normal.device)
        found[0, self.recoded.long()] = self.normal
        found[1, : len(self.other)] = self.other
        return found.flatten()

    def recode(self, codes: Tensor) -> Tensor:
        """(O, I) codes -> those of the kernels."""
        return self._replaced(codes, self.recoded)

    def stored(self, codes: Tensor) -> Tensor:
        """The inverse of `recode`."""
        return self._replaced(codes, self.recoded.argsort().to(torch.uint8))

    def _replaced(self, codes: Tensor, by: Tensor) -> Tensor:
        columns = codes.shape[1]
        even = torch.nn.functional.pad(codes, (0, columns % 2)).view(len(codes), -1, 2)
        beside = even.flip(2) == self.escape
        replaced = by.index_select(0, even.flatten().int()).view(even.shape)
        return torch.where(beside, even, replaced).view(len(codes), -1)[:, :columns]


def _signs_and_magnitudes(normal: Tensor, other: Tensor) -> Tensor | None:
    """(16,) uint8: a code for each, with 8 for the minus of what it is without; None where there is none."""
    if not torch.equal(other[SIGN:], -other[:SIGN]) or bool((torch.cat([normal[:SIGN], other[:SIGN]]) < 0).any()):
        return None
    recoded = torch.arange(2 * SIGN, dtype=torch.uint8)
    for code in range(SIGN + 1, 2 * SIGN):
        found = (normal[1:SIGN] == -normal[code]).nonzero()
        if len(found) != 1:
            return None
        recoded[code] = SIGN + 1 + int(found[0])
    one_each = len(set(recoded.tolist())) == len(recoded) and float(normal[SIGN]) == 0 == float(normal[0])
    return recoded.to(normal.device) if one_each else None
