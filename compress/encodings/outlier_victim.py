"""Pairs of an outlier and its victim: a large weight borrows the slot of its neighbour, which becomes zero.

Columns 2i and 2i + 1 are a pair. Both hold codes of a low-bit *normal* type that withholds one code point, the
*identifier*. Where one of them is too large for that type it is an *outlier*: its slot holds an abfloat code (sign,
exponent, mantissa, with a bias that puts the smallest value above the largest normal one), and the slot of its partner,
the *victim*, holds the identifier and means zero. Every pair keeps its size; nothing is stored on the side.

| type   | normal values, in units of the scale     | identifier  | abfloat                                          |
|--------|------------------------------------------|-------------|--------------------------------------------------|
| int4   | 0 to ±7, two's complement                | 1000 (-8)   | E2M1, bias 2: ±12, 16, 24, 32, 48, 64, 96        |
| flint4 | 0 to ±4, ±6, ±8, ±16, sign and magnitude | 1000 (-0)   | E2M1, bias 3: ±24, 32, 48, 64, 96, 128, 192      |
| int8   | 0 to ±127, two's complement              | 0x80 (-128) | E4M3, bias 4: ±144 to 15 * 2^19, written to 2^15 |

An ExMy code of sign s, exponent e and mantissa m is (-1)^s * (2^y + m) * 2^(e + bias); e = m = 0 is not used. Packed by
`bits.py`, a 4-bit pair is one byte with the even column in the low nibble (a reconstruction: the paper draws a left
and a right half). 253 of the 256 bytes are pairs; 0x88 (two victims), 0x08 and 0x80 (a victim of nothing) are none.
The last of an odd number of columns has an implicit zero as its partner, hence no victim: it is always normal.

Source: Guo et al., "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair Quantization",
ISCA 2023, arXiv 2304.07493; flint from Guo et al., "ANT: Exploiting Adaptive Numerical Data Type for Low-bit Deep
Neural Network Quantization", MICRO 2022, arXiv 2208.14286.

Shapes: O = out features, I = in features, R rows of any tensor, C its columns, S = R (a scale per row) or 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from compress.encodings.base import Encoding, Form
from compress.encodings.lookup import Table
from compress.encodings.pieces import rows_in_piece
from compress.encodings.uniform import CHUNK, narrowest, scale_defect, stored_scale
from compress.lazy import functional, torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.encodings.base import StoredShapes

Normal = Literal["int4", "flint4", "int8"]
DoubleOutlier = Literal["larger", "even"]


class PairType:
    """A normal type and the abfloat beside it.

    Args:
        values: what each code means where it is a normal one; 0 for the identifier.
        ones: the magnitudes are 0, 1, ... up to this,
        ramps: then (start, step, count), evenly spaced stretches each of which begins where the last one ended.
        mantissa_bits: M of the abfloat.
        bias: of its exponent.
        last: code of the largest abfloat magnitude that is written.

    Attributes:
        identifier: code of a victim.
        largest: largest normal magnitude.
        border: magnitudes from here on are outliers: half-way between the largest normal and the smallest abfloat one.
    """

    def __init__(
        self,
        values: list[int],
        ones: int,
        ramps: list[tuple[int, int, int]],
        *,
        mantissa_bits: int,
        bias: int,
        last: int,
    ):
        self.ones, self.ramps, self.mantissa_bits, self.bias, self.last = ones, ramps, mantissa_bits, bias, last
        self.values = values
        self.bits = (len(values) - 1).bit_length()
        self.identifier = len(values) // 2
        self.largest = max(values)
        unit = 1 << mantissa_bits
        self.magnitudes = [0.0] + [math.ldexp(unit + k % unit, k // unit + bias) for k in range(1, self.identifier)]
        self.border = (self.largest + self.magnitudes[1]) / 2

    @cached_property
    def outliers(self) -> Tensor:
        """(2**(bits - 1),) abfloat magnitude of each code without sign; 0 for the one not used."""
        with torch.inference_mode(False):
            return torch.tensor(self.magnitudes, dtype=torch.float32, device="cpu")

    @cached_property
    def codes(self) -> Tensor:
        """(2 * largest + 1,) uint8, code of each whole number from -largest; 0 for those that are no value."""
        with torch.inference_mode(False):
            codes = torch.zeros(2 * self.largest + 1, dtype=torch.uint8, device="cpu")
            for code, value in enumerate(self.values):
                if code != self.identifier:
                    codes[value + self.largest] = code
            return codes

    @cached_property
    def pairs(self) -> Tensor:
        """(2**(2 * bits),) int64, the two float32 values of every pair of codes, even column in the low bits."""
        with torch.inference_mode(False):
            normal, count = torch.tensor(self.values, dtype=torch.float32, device="cpu"), len(self.values)
            abfloat = torch.cat([self.outliers, -self.outliers])
            # [high, low, (low, high)]
            pairs = torch.stack([normal.expand(count, -1), normal[:, None].expand(-1, count)], dim=-1).clone()
            pairs[self.identifier, :, 0], pairs[self.identifier, :, 1] = abfloat, 0
            pairs[:, self.identifier, 0], pairs[:, self.identifier, 1] = 0, abfloat
            return pairs.view(-1, 2).view(torch.int64)[:, 0].contiguous()

    def nearest(self, magnitude: Tensor) -> Tensor:
        """Magnitudes in units -> the nearest normal ones; what is too large becomes the largest."""
        found = magnitude.round().clamp_(max=self.ones)
        for start, step, count in self.ramps:
            found.add_((magnitude - start).div_(step).round_().clamp_(0, count), alpha=step)
        return found

    def abfloat(self, magnitude: Tensor) -> Tensor:
        """Magnitudes in units -> codes, without sign, of the nearest outliers; half-way goes up."""
        mantissa, exponent = magnitude.clamp(max=float(self.outliers[self.last])).frexp()
        unit = 1 << self.mantissa_bits
        # One more in the mantissa's place carries into the exponent by itself.
        significand = (mantissa * (2 * unit) + 0.5).floor_().int()
        exponent = exponent - 1 - self.mantissa_bits - self.bias
        return (exponent * unit + significand - unit).clamp_(1, self.last)


_FLINT = [0, 1, 2, 3, 16, 8, 4, 6]  # of the codes 000 to 111
PAIR_TYPES: dict[Normal, PairType] = {
    "int4": PairType([*range(8), 0, *range(-7, 0)], 7, [], mantissa_bits=1, bias=2, last=7),
    "flint4": PairType([*_FLINT, *(-v for v in _FLINT)], 4, [(4, 2, 2), (8, 8, 1)], mantissa_bits=1, bias=3, last=7),
    "int8": PairType([*range(128), 0, *range(-127, 0)], 127, [], mantissa_bits=3, bias=4, last=64),
}


@dataclass(frozen=True, kw_only=True)
class OutlierVictimForm(Form):
    """Stored: `scale` (O, 1).

    Attributes:
        normal: the normal type; `int8` is the one of 8 bits.
    """

    normal: Normal
    scale_dtype: str = "float16"
    family: ClassVar[str] = "outlier_victim"
    stores_idle: ClassVar[bool] = True  # a victim's identifier is what makes its partner an outlier
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.normal not in PAIR_TYPES or PAIR_TYPES[self.normal].bits != self.bits:
            raise ValueError(f"the type {self.normal!r} of {self.bits} bits is not known to this version")

    def tables(self, shape: tuple[int, int]) -> StoredShapes:
        return {"scale": ((shape[0], 1), getattr(torch, self.scale_dtype))}

    def encoding(self, codes: Tensor, tables: Mapping[str, Tensor]) -> OutlierVictim:
        return OutlierVictim(codes, tables["scale"], self.normal)

    def table(self, tensors: Mapping[str, Tensor], device: torch.device) -> Table:
        return _pair_table(self.normal, device)


@dataclass(frozen=True)
class OutlierVictim(Encoding):
    """Codes of outlier-victim pairs, one scale per row.

    Attributes:
        codes: (O, I) uint8, one code per weight; columns 2i and 2i + 1 are a pair.
        scale: (O, 1) float16 or float32, positive.
        normal: the normal type.
    """

    codes: Tensor
    scale: Tensor
    normal: Normal

    @property
    def form(self) -> OutlierVictimForm:
        dtype = str(self.scale.dtype).removeprefix("torch.")
        return OutlierVictimForm(bits=PAIR_TYPES[self.normal].bits, normal=self.normal, scale_dtype=dtype)

    def tables(self) -> dict[str, Tensor]:
        return {"scale": self.scale.contiguous()}

    def dequantize(self) -> Tensor:
        return decode(self.codes, self.scale, self.normal)

    def rows(self, part: slice) -> Self:
        return replace(self, codes=self.codes[part], scale=narrowest(self.scale[part]))

    def idle(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.uint8, device=self.codes.device)

    def defect(self) -> str | None:
        identifier = PAIR_TYPES[self.normal].identifier
        even, odd = _even(self.codes).view(-1, 2).unbind(1)
        first, second = even == identifier, odd == identifier
        if bool(((first & (second | (odd == 0))) | (second & (even == 0))).any()):
            return "pairs with a victim and no outlier"
        return self._codes_defect() or scale_defect(self.scale)


@lru_cache(maxsize=64)
def _pair_table(normal: Normal, device: torch.device) -> Table:
    with torch.inference_mode(False):
        return Table(PAIR_TYPES[normal].pairs.view(torch.float32).view(1, -1, 2).to(device), PAIR_TYPES[normal].bits)


def encode(x: Tensor, scale: Tensor, normal: Normal, double_outlier: DoubleOutlier = "larger") -> Tensor:
    """(R, C) float32, (S, 1) scale -> (R, C) uint8 codes.

    Args:
        x: weights, or activations with a token a row.
        scale: what one unit of the normal type means.
        normal: the type.
        double_outlier: where both of a pair are outliers, the `larger` one stays (the even one of two that are equal),
            as in the paper, or always the `even` one, as in its public code. The other is the victim.
    """
    type_ = PAIR_TYPES[normal]
    table = type_.codes.to(x.device)
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for rows in _pieces(x):
        units = _units(x, scale, rows)
        magnitude = units.abs()
        whole = type_.nearest(magnitude).copysign_(units).int().add_(type_.largest)
        found = table.index_select(0, whole.view(-1))
        at, index = _outliers(magnitude, x.shape[1], type_, double_outlier)
        found[at ^ 1] = type_.identifier
        found[at] = (index + type_.identifier * (units.view(-1)[at] < 0)).to(torch.uint8)
        codes[rows] = found.view(units.shape)[:, : x.shape[1]]
    return codes


def decode(codes: Tensor, scale: Tensor, normal: Normal) -> Tensor:
    """(R, C) uint8 codes, (S, 1) scale -> (R, C) float32: a table of pairs is looked up."""
    type_ = PAIR_TYPES[normal]
    table = type_.pairs.to(codes.device)
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rows in _pieces(codes):
        piece = _even(codes[rows])
        pairs = piece.view(-1, 2)
        index = pairs[:, 0].int() | (pairs[:, 1].int() << type_.bits)
        found = table.index_select(0, index).view(torch.float32).view(piece.shape)
        values[rows] = found[:, : codes.shape[1]] * _scale(scale, rows)
    return values


def quantize_dequantize(x: Tensor, scale: Tensor, normal: Normal, double_outlier: DoubleOutlier = "larger") -> Tensor:
    """(R, C) float32, (S, 1) scale -> (R, C) float32: exactly `decode(encode(x))`, without the codes in between."""
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in _pieces(x):
        units = _units(x, scale, rows)
        found = _nearest_pairs(units.abs(), x.shape[1], PAIR_TYPES[normal], double_outlier).copysign_(units)
        values[rows] = found[:, : x.shape[1]] * _scale(scale, rows)
    return values


def search(
    x: Tensor,
    normal: Normal,
    *,
    per: Literal["row", "tensor"] = "row",
    mask: Tensor | None = None,
    double_outlier: DoubleOutlier = "larger",
    lower: float = 0.75,
    upper: float = 2.5,
    step: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """The scale with the least squared error, victims counted, among multiples of the three-sigma threshold.

    The largest normal value stands for f * (|mean| + 3 * standard deviation), f = lower, lower + step, ... below upper.
    Under a mask the same number of candidates reaches from `lower` times the threshold of the row with its zeros, to
    `upper` times that of what is kept: beside a masked weight an outlier costs nothing, so smaller scales may pay.

    Args:
        x: (R, C) float32: weights, or activations with a token a row.
        normal: the type.
        per: one scale a `row` (weights), or one for the `tensor` (activations).
        mask: (R, C) bool, True = kept; x is zero elsewhere.
        double_outlier: as in `encode`.
        lower: the first f.
        upper: where f ends.
        step: between two f.

    Returns:
        scale (S, 1) float16, or float32 where one is outside float16's normal range; each is rounded to its stored type
        before it is tried. error (S, 1) float64: its sum of squared errors.
    """
    type_ = PAIR_TYPES[normal]
    whole = _three_sigma(x, per, None)
    kept = whole if mask is None else _three_sigma(x, per, mask)
    first = lower * torch.minimum(whole, kept)
    move = step / (upper - lower) * (upper * torch.maximum(whole, kept) - first)
    count = max(1, math.ceil((upper - lower) / step - 1e-6))
    scales = torch.stack([stored_scale(((first + k * move) / type_.largest).float()) for k in range(count)])
    scales = torch.where(scales > 0, scales, 1.0)
    errors = torch.zeros(count, len(x), 1, dtype=torch.float64, device=x.device)
    for rows in _pieces(x):
        piece = _even(x[rows].abs())
        for k, scale in enumerate(scales):
            magnitude = piece / _scale(scale, rows)
            found = _nearest_pairs(magnitude, x.shape[1], type_, double_outlier)
            errors[k, rows] = found.sub_(magnitude).square_().sum(1, keepdim=True)
    if per == "tensor":
        errors = errors.sum(1, keepdim=True)
    errors *= scales.double().square()
    best = errors.argmin(0, keepdim=True)
    return narrowest(scales.gather(0, best)[0]), errors.gather(0, best)[0]


def _three_sigma(x: Tensor, per: Literal["row", "tensor"], mask: Tensor | None) -> Tensor:
    """(S, 1) float64: |mean| + 3 standard deviations (unbiased) of what is kept; 1 where that is nothing but zeros."""
    moments = torch.empty(3, len(x), 1, dtype=torch.float64, device=x.device)
    for rows in _pieces(x):
        piece = x[rows].double()
        moments[0, rows] = x.shape[1] if mask is None else mask[rows].sum(1, keepdim=True).double()
        moments[1, rows] = piece.sum(1, keepdim=True)
        moments[2, rows] = piece.square_().sum(1, keepdim=True)
    count, total, squares = moments.sum(1, keepdim=True) if per == "tensor" else moments
    mean = total / count.clamp(min=1)
    variance = (squares - total * mean) / (count - 1).clamp(min=1)
    threshold = mean.abs() + 3 * variance.clamp(min=0).sqrt()
    return torch.where(threshold > 0, threshold, 1.0)


def _nearest_pairs(magnitude: Tensor, columns: int, type_: PairType, double_outlier: DoubleOutlier) -> Tensor:
    """Magnitudes as `_units` gives them -> what the pairs make of them: normal ones, outliers, and victims at zero."""
    found = type_.nearest(magnitude)
    at, index = _outliers(magnitude, columns, type_, double_outlier)
    flat = found.view(-1)
    flat[at ^ 1] = 0
    flat[at] = type_.outliers.to(flat.device)[index]
    return found


def _outliers(magnitude: Tensor, columns: int, type_: PairType, double_outlier: DoubleOutlier) -> tuple[Tensor, Tensor]:
    """Where in the flattened magnitudes the outliers are that keep their value, and their abfloat codes."""
    flat = magnitude.view(-1)
    at = (flat >= type_.border).nonzero()[:, 0]
    if columns % 2:  # the last column has no partner to sacrifice
        at = at[at % (columns + 1) != columns - 1]
    own, other, even = flat[at], flat[at ^ 1], at % 2 == 0
    if double_outlier == "larger":
        keeps = (own > other) | ((own == other) & even)
    else:
        keeps = (other < type_.border) | even
    return at[keeps], type_.abfloat(own[keeps])


def _pieces(x: Tensor) -> Iterator[slice]:
    rows, columns = x.shape
    step = rows_in_piece(CHUNK, columns, x.device)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _units(x: Tensor, scale: Tensor, rows: slice) -> Tensor:
    """Some rows in units of the normal type, with an even number of columns."""
    return _even(x[rows] / _scale(scale, rows))


def _scale(scale: Tensor, rows: slice) -> Tensor:
    return (scale[rows] if scale.shape[0] > 1 else scale).float()


def _even(x: Tensor) -> Tensor:
    """The matrix, contiguous, with one more column of zeros if their number is odd."""
    return (functional.pad(x, (0, 1)) if x.shape[1] % 2 else x).contiguous()


__all__ = [
    "PAIR_TYPES",
    "Normal",
    "OutlierVictim",
    "OutlierVictimForm",
    "PairType",
    "decode",
    "encode",
    "quantize_dequantize",
    "search",
]
