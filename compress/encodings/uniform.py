"""The uniform grid: value = (code - zero_point) * scale.

Shapes: O = out features, I = in features, R = O (per channel, per group) or 1 (per tensor), G = groups of columns;
each of the G groups covers I / G neighbouring columns.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Search = Literal["minmax", "mse"]

SEARCH_NORM = 2.4  # exponent of the error that the mse search minimises, as in GPTQ's and BRECQ's public code
SEARCH_STEPS = 100
SEARCH_SMALLEST = 20  # the narrowest range tried, in steps of 1 / SEARCH_STEPS
CHUNK = 1 << 18  # weights worked on at once: temporaries stay in the cache


@dataclass(frozen=True)
class Uniform:
    """Integer codes on a uniform grid.

    Attributes:
        codes: (O, I) uint8, below 2**bits.
        scale: (R, G) float16 or float32, positive.
        zero_point: (R, G) uint8; 2**(bits - 1) everywhere when symmetric.
        bits: 2 to 8.
        symmetric: whether the zero point is the fixed middle, and therefore not stored.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool

    def dequantize(self) -> Tensor:
        """(O, I) float32."""
        return dequantize(self.codes, self.scale, self.zero_point)

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales and zero points counted."""
        zero_bits = 0 if self.symmetric else self.bits
        parameters = self.scale.numel() * (self.scale.element_size() * 8 + zero_bits)
        return self.bits + parameters / self.codes.numel()


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(O, I) codes, (R, G) scale, (R, G) zero point -> (O, I) float32."""
    rows, columns = codes.shape
    grouped = codes.reshape(rows, scale.shape[1], -1).float()
    grouped -= zero_point.float()[..., None]
    grouped *= scale.float()[..., None]
    return grouped.view(rows, columns)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """(O, I) float32 -> (O, I) uint8 codes: nearest grid point, ties to even."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step) if scale.shape[0] > 1 else slice(None)
        piece = weight[start : start + step]
        scaled = piece.reshape(piece.shape[0], scale.shape[1], -1) / scale[part].float()[..., None]
        scaled.round_().add_(zero_point[part].float()[..., None]).clamp_(0, 2**bits - 1)
        codes[start : start + step] = scaled.view(piece.shape)
    return codes


def fit(
    weight: Tensor,
    bits: int,
    *,
    groups: int = 1,
    per_tensor: bool = False,
    symmetric: bool = False,
    search: Search = "minmax",
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group of columns of a weight.

    Args:
        weight: (O, I) float32.
        bits: 2 to 8.
        groups: G, which must divide I.
        per_tensor: one scale for the whole matrix; `groups` must be 1.
        symmetric: zero point fixed at the middle code.
        search: `minmax` covers the whole range; `mse` tries ranges down to a fifth of it and keeps the one
            with the least sum of |error|**2.4.

    Returns:
        scale (R, G) float16, or float32 where a scale is outside float16's normal range; zero_point (R, G) uint8.
        The scale is rounded to its stored type here, so codes fitted with it mean what the file says.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(1, 1, -1) if per_tensor else weight.reshape(rows, groups, columns // groups)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if search == "minmax":
        scale, zero = _grid(low, high, bits, symmetric)
        return narrowest(scale), zero
    ranges = [(low * k / SEARCH_STEPS, high * k / SEARCH_STEPS) for k in range(SEARCH_STEPS, SEARCH_SMALLEST, -1)]
    best_scale, best_zero = _grid(*ranges[0], bits, symmetric)
    best_error = torch.full(low.shape, torch.inf)
    for candidate in ranges:
        scale, zero = _grid(*candidate, bits, symmetric)
        error = _search_error(grouped, scale, zero, bits)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return narrowest(best_scale), best_zero


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    levels = 2**bits - 1
    if symmetric:
        scale = torch.maximum(-low, high) * (2 / levels)
    else:
        scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # an all-zero group: any scale says zero
    scale = _rounded(scale)
    if symmetric:
        zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zero = (-low / scale).round().clamp(0, levels).to(torch.uint8)
    return scale, zero


def narrowest(scale: Tensor) -> Tensor:
    """float16 if that loses nothing, else as it is."""
    half = scale.to(torch.float16)
    return half if torch.equal(half.float(), scale.float()) else scale


def _rounded(scale: Tensor) -> Tensor:
    """Each scale as its stored type will hold it, decided for each alone: neighbours do not change a result."""
    limits = torch.finfo(torch.float16)
    fits = (scale >= limits.tiny) & (scale <= limits.max)
    return torch.where(fits, scale.to(torch.float16).float(), scale)


def _search_error(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    s, z = scale.float()[..., None], zero.float()[..., None]
    codes = (grouped / s).round_().add_(z).clamp_(0, 2**bits - 1)
    return ((codes - z) * s - grouped).abs_().pow_(SEARCH_NORM).sum(-1)
