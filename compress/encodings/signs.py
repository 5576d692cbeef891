"""A vector as a sum of signs, each times a scale: what compressed deltas are made of.

Shapes: n elements, k terms of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Signs:
    """n elements, each the sum of k scales that are added, subtracted, or left out.

    Attributes:
        scales: (k,) float32.
        signs: (k, n) int8 of -1, 0 and 1.
    """

    scales: Tensor
    signs: Tensor

    def value(self) -> Tensor:
        """(n,) float32, added up in the order of the terms: the same bits wherever it is computed."""
        total = self.signs[0].float().mul_(self.scales[0])
        for scale, signs in zip(self.scales[1:], self.signs[1:], strict=True):
            total.add_(signs.float().mul_(scale))
        return total
