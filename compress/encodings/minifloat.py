"""Floating-point numbers of 4 and 8 bits: their values, rounding to them, and their codes.

A code is the bits of the number: sign, exponent, mantissa. Rounding is to nearest, ties to the even mantissa, and what
is too large becomes the largest number: of E4M3 bit for bit what torch's cast makes of numbers that are within range.

| name   | sign, exponent, mantissa | largest | smallest above zero |
|--------|--------------------------|--------:|--------------------:|
| `e4m3` | 1, 4, 3                  | 448     | 2**-9               |
| `e2m1` | 1, 2, 1                  | 6       | 0.5                 |

Sources: E4M3 of Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv 2209.05433; E2M1 of Rouhani et al.,
"Microscaling Data Formats for Deep Learning", 2023, arXiv 2310.10537.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

from compress.encodings.lookup import Table
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Number = Literal["e4m3", "e2m1"]

MANTISSA, BIAS, ONES = 23, 127, 255  # of float32: bits of its mantissa, what its exponents count from, and all of them


@dataclass(frozen=True)
class Minifloat:
    """One kind of number.

    Attributes:
        bits: of a code.
        mantissa: bits of it.
        lowest: the exponent of the smallest normal number.
        count: how many magnitudes there are; codes beyond them are no numbers.
    """

    bits: int
    mantissa: int
    lowest: int
    count: int

    @cached_property
    def magnitudes(self) -> Tensor:
        """(count,) float32, ascending from zero: what the codes without a sign mean."""
        with torch.inference_mode(False):
            codes = torch.arange(self.count, dtype=torch.float64, device="cpu")
            step = 2**self.mantissa
            exponent, fraction = (codes / step).floor(), codes % step / step
            scale = 2.0 ** (self.lowest + (exponent - 1).clamp(min=0))
            found: Tensor = ((fraction + (exponent > 0)) * scale).float()
            return found

    @cached_property
    def largest(self) -> float:
        """The largest number."""
        return float(self.magnitudes[-1])

    def round(self, values: Tensor) -> Tensor:
        """Numbers, float32 of any shape -> the nearest that there are, float32."""
        exponent = (values.view(torch.int32) >> MANTISSA & ONES).clamp_(self.lowest + BIAS, ONES - 1)
        step = (exponent.sub_(self.mantissa) << MANTISSA).view(torch.float32)
        return (values / step).round_().mul_(step).clamp_(-self.largest, self.largest)

    def codes(self, rounded: Tensor) -> Tensor:
        """Numbers that there are, float32 of any shape -> uint8."""
        place = torch.bucketize(rounded.abs(), self.magnitudes.to(rounded.device), out_int32=True).to(torch.uint8)
        return place | torch.signbit(rounded).to(torch.uint8) << (self.bits - 1)

    def table(self, device: torch.device) -> Table:
        """What every code means; one that is no number is never written, and stands for zero."""
        return _table(self, device)


MINIFLOATS: dict[Number, Minifloat] = {"e4m3": Minifloat(8, 3, -6, 127), "e2m1": Minifloat(4, 1, 0, 8)}


@lru_cache(maxsize=16)
def _table(number: Minifloat, device: torch.device) -> Table:
    with torch.inference_mode(False):
        positive = torch.zeros(2 ** (number.bits - 1), device="cpu")
        positive[: number.count] = number.magnitudes
        return Table(torch.cat([positive, -positive]).view(1, -1, 1).to(device), number.bits)


__all__ = ["MINIFLOATS", "Minifloat", "Number"]
