"""The uniform grid: value = (code - zero_point) * scale.

Shapes: O = out features, I = in features, R = O (per channel, per group) or 1 (per tensor), G = groups of columns;
each of the G groups covers I / G neighbouring columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from compress.encodings.base import Encoding, Form
from compress.encodings.bits import pack_bits, row_bytes, unpack_bits
from compress.encodings.lookup import Table
from compress.encodings.pieces import rows_in_piece
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.encodings.base import StoredShapes

Search = Literal["minmax", "mse", "weighted"]

SEARCH_NORM = 2.4  # exponent of the error that the mse search minimises, as in GPTQ's and BRECQ's public code
SEARCH_STEPS = 100
SEARCH_SMALLEST = 20  # the narrowest range tried, in steps of 1 / SEARCH_STEPS
COARSE_STEP = 5  # between the ranges that the weighted search tries at first
CHUNK = 1 << 18  # weights worked on at once: temporaries stay in the cache


@dataclass(frozen=True, kw_only=True)
class UniformForm(Form):
    """Stored: `scale` (R, G); unless symmetric, `zero_point` uint8 (R, ceil(G * bits / 8)), packed as codes are."""

    groups: int = 1
    per_tensor: bool = False
    symmetric: bool = False
    scale_dtype: str = "float16"
    family: ClassVar[str] = "uniform"
    whole: ClassVar[bool] = True
    steps: ClassVar[bool] = True

    def tables(self, shape: tuple[int, int]) -> StoredShapes:
        rows = 1 if self.per_tensor else shape[0]
        found: StoredShapes = {"scale": ((rows, self.groups), getattr(torch, self.scale_dtype))}
        if not self.symmetric:
            found["zero_point"] = ((rows, row_bytes(self.groups, self.bits)), torch.uint8)
        return found

    def encoding(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Uniform:
        scale = tables["scale"]
        if self.symmetric:
            zero = torch.full(scale.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=scale.device)
        else:
            zero = unpack_bits(tables["zero_point"], self.bits, self.groups)
        return Uniform(codes, scale, zero, self.bits, self.symmetric)

    def table(self, tensors: Mapping[str, Tensor], device: torch.device) -> Table:
        return _step_table(self.bits, self.symmetric, device)


@dataclass(frozen=True)
class Uniform(Encoding):
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

    @property
    def form(self) -> UniformForm:
        return UniformForm(
            bits=self.bits,
            groups=self.scale.shape[1],
            per_tensor=self.scale.shape[0] == 1 < self.codes.shape[0],
            symmetric=self.symmetric,
            scale_dtype=str(self.scale.dtype).removeprefix("torch."),
        )

    def tables(self) -> dict[str, Tensor]:
        found = {"scale": self.scale.contiguous()}
        if not self.symmetric:
            found["zero_point"] = pack_bits(self.zero_point, self.bits)
        return found

    def dequantize(self) -> Tensor:
        return dequantize(self.codes, self.scale, self.zero_point)

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def rows(self, part: slice) -> Self:
        if self.scale.shape[0] == 1:
            return replace(self, codes=self.codes[part])
        scale = narrowest(self.scale[part])
        return replace(self, codes=self.codes[part], scale=scale, zero_point=self.zero_point[part])

    def above(self, others: Sequence[Self]) -> Self:
        every = (self, *others)
        scale = narrowest(torch.cat([each.scale.float() for each in every]))
        codes, zero = (torch.cat([getattr(each, name) for each in every]) for name in ("codes", "zero_point"))
        return replace(self, codes=codes, scale=scale, zero_point=zero)

    def idle(self) -> Tensor:
        return self.zero_point.repeat_interleave(self.group_size, dim=1)

    def defect(self) -> str | None:
        if not 2 <= self.bits <= 8:
            return f"codes of {self.bits} bits"
        if int(self.zero_point.max()) >= 2**self.bits:
            return f"zero points that do not fit {self.bits} bits"
        return self._codes_defect() or scale_defect(self.scale)


@lru_cache(maxsize=64)
def _step_table(bits: int, symmetric: bool, device: torch.device) -> Table:
    with torch.inference_mode(False):
        steps = torch.arange(2**bits, device=device).float() - (2 ** (bits - 1) if symmetric else 0)
        return Table(steps.view(1, -1, 1), bits)


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
    step = rows_in_piece(CHUNK, columns, weight.device)
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
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group of columns of a weight.

    Args:
        weight: (O, I) float32.
        bits: 2 to 8.
        groups: G, which must divide I.
        per_tensor: one scale for the whole matrix; `groups` must be 1.
        symmetric: zero point fixed at the middle code.
        search: `minmax` covers the whole range; `mse` tries ranges down to a fifth of it and keeps the one with the
            least sum of |error|**2.4; `weighted` the one with the least sum of importance * error**2.
        importance: (I,) of every column, for a weighted search.

    Returns:
        scale (R, G) float16, or float32 where a scale is outside float16's normal range; zero_point (R, G) uint8.
        The scale is rounded to its stored type here, so codes fitted with it mean what the file says.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(1, 1, -1) if per_tensor else weight.reshape(rows, groups, columns // groups)
    if search == "minmax":
        scale, zero = _grid(*_range(grouped), bits, symmetric)
        return narrowest(scale), zero
    if search == "weighted":
        if importance is None:
            raise ValueError("a weighted search needs the importance of every column")
        importance = importance.reshape(1, groups, -1)
    pieces = torch.split(grouped, rows_in_piece(CHUNK, columns, weight.device))
    found = [_searched(piece, bits, symmetric, importance if search == "weighted" else None) for piece in pieces]
    scales, zeros = zip(*found, strict=True)
    return narrowest(torch.cat(scales)), torch.cat(zeros)


def _range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """What the weights of each group span, with zero."""
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def _searched(grouped: Tensor, bits: int, symmetric: bool, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The grid with the least error, of those whose range is a share of the whole."""
    low, high = _range(grouped)
    best_share = torch.full(low.shape, torch.nan)
    best_error = torch.full(low.shape, torch.inf)

    def grid_of(share: Tensor | float) -> tuple[Tensor, Tensor]:
        return _grid(low * share / SEARCH_STEPS, high * share / SEARCH_STEPS, bits, symmetric)

    best_scale, best_zero = grid_of(SEARCH_STEPS)  # not finite where weights are too large: that is found later

    def attempt(share: Tensor | float) -> None:
        scale, zero = grid_of(share)
        error = _search_error(grouped, scale, zero, bits, importance)
        better = error < best_error
        for best, now in ((best_error, error), (best_scale, scale), (best_zero, zero)):
            best.copy_(torch.where(better, now, best))
        best_share.copy_(torch.where(better, share, best_share))

    coarse = 1 if importance is None else COARSE_STEP
    for share in range(SEARCH_STEPS, SEARCH_SMALLEST, -coarse):
        attempt(share)
    step = coarse / 2
    while step > 0.5:
        around = best_share.nan_to_num(SEARCH_STEPS)
        attempt(around - step)
        attempt(around + step)
        step /= 2
    return best_scale, best_zero


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    levels = 2**bits - 1
    if symmetric:
        scale = torch.maximum(-low, high) * (2 / levels)
    else:
        scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # an all-zero group: any scale says zero
    scale = stored_scale(scale)
    if symmetric:
        zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zero = (-low / scale).round().clamp(0, levels).to(torch.uint8)
    return scale, zero


def scale_defect(scale: Tensor) -> str | None:
    """What is impossible about scales, or None."""
    wide = scale.float()
    return None if torch.isfinite(wide).all() and bool((wide > 0).all()) else "scales that are not positive and finite"


def narrowest(scale: Tensor) -> Tensor:
    """float16 if that loses nothing, else as it is."""
    half = scale.to(torch.float16)
    return half if torch.equal(half.float(), scale.float()) else scale


def stored_scale(scale: Tensor) -> Tensor:
    """Each scale as its stored type will hold it, decided for each alone: neighbours do not change a result."""
    limits = torch.finfo(torch.float16)
    fits = (scale >= limits.tiny) & (scale <= limits.max)
    return torch.where(fits, scale.to(torch.float16).float(), scale)


def _search_error(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    s, z = scale.float()[..., None], zero.float()[..., None]
    codes = (grouped / s).round_().add_(z).clamp_(0, 2**bits - 1)
    error = codes.sub_(z).mul_(s).sub_(grouped)
    if importance is not None:
        weighed: Tensor = torch.linalg.vecdot(error.square_(), importance.expand_as(error))
        return weighed
    return error.abs_().pow_(SEARCH_NORM).sum(-1)
