"""Power levels: value = scale * sign(x) * |x|**(1 / exponent), with x evenly spaced from -1 to 1.

Two layouts of levels. `zero` has one at zero and leaves one code unused; `half` has none at zero and uses all codes.
Codes count the levels from the lowest.

Shapes: O = out features, I = in features, R = O (per channel, per group) or 1 (per tensor), G = groups of columns;
L = levels, N = occupied bins of a histogram, S = ranges tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from compress.encodings.base import Encoding, Form
from compress.encodings.counting import sums_by_number
from compress.encodings.lookup import Table
from compress.encodings.pieces import rows_in_piece
from compress.encodings.uniform import CHUNK, SEARCH_NORM, narrowest, scale_defect, stored_scale
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from compress.encodings.base import StoredShapes
    from compress.encodings.uniform import Search

Levels = Literal["zero", "half"]

EXPONENTS = tuple(k / 20 for k in range(2, 31))  # searched first, 0.1 to 1.5, and then around the best of them
GOLDEN_STEPS = 10  # of that finer search, which leave about 1 % of the interval
SHARES = tuple(k / 100 for k in range(100, 19, -5))  # of the largest magnitude: ranges searched first
FINER = tuple(k / 100 for k in range(-4, 5) if k)  # and then around the best of them
BINS = 2048
KEPT_TABLES = 4096  # more than a model has matrices: they come in turn, so that with fewer none would be found again
EMPTY = 2.0**-24  # scale of a group that holds nothing but zeros: the smallest float16


@dataclass(frozen=True, kw_only=True)
class PowerForm(Form):
    """Stored: `scale` (R, G); `exponent` float32 (1,)."""

    groups: int = 1
    per_tensor: bool = False
    levels: Levels = "zero"
    scale_dtype: str = "float16"
    family: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        if self.levels not in ("zero", "half"):
            raise ValueError(f"levels {self.levels!r} are not known to this version; it reads 'zero' and 'half'")

    def tables(self, shape: tuple[int, int]) -> StoredShapes:
        rows = 1 if self.per_tensor else shape[0]
        return {
            "scale": ((rows, self.groups), getattr(torch, self.scale_dtype)),
            "exponent": ((1,), torch.float32),
        }

    def encoding(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Power:
        return Power(codes, tables["scale"], tables["exponent"], self.bits, self.levels)

    def table(self, tensors: Mapping[str, Tensor], device: torch.device) -> Table:
        return _levels(self.bits, self.levels, float(tensors["exponent"]), device)


@dataclass(frozen=True)
class Power(Encoding):
    """Integer codes of power levels.

    Attributes:
        codes: (O, I) uint8, below L.
        scale: (R, G) float16 or float32, positive: the value of the highest level.
        exponent: (1,) float32, positive; below 1 levels are denser near zero, at 1 they are evenly spaced.
        bits: 2 to 8.
        levels: the layout. L is 2**bits - 1 with `zero`, 2**bits with `half`.
    """

    codes: Tensor
    scale: Tensor
    exponent: Tensor
    bits: int
    levels: Levels

    @property
    def form(self) -> PowerForm:
        return PowerForm(
            bits=self.bits,
            groups=self.scale.shape[1],
            per_tensor=self.scale.shape[0] == 1 < self.codes.shape[0],
            levels=self.levels,
            scale_dtype=str(self.scale.dtype).removeprefix("torch."),
        )

    def tables(self) -> dict[str, Tensor]:
        return {"scale": self.scale.contiguous(), "exponent": self.exponent}

    def dequantize(self) -> Tensor:
        values = level_values(self.bits, self.levels, self.exponent)
        return dequantize(self.codes, self.scale, values)

    def rows(self, part: slice) -> Self:
        if self.scale.shape[0] == 1:
            return replace(self, codes=self.codes[part])
        return replace(self, codes=self.codes[part], scale=narrowest(self.scale[part]))

    def idle(self) -> Tensor:
        code = 2 ** (self.bits - 1) - 1 if self.levels == "zero" else 0
        return torch.full((1, 1), code, dtype=torch.uint8, device=self.codes.device).expand(self.codes.shape)

    def defect(self) -> str | None:
        if not 2 <= self.bits <= 8:
            return f"codes of {self.bits} bits"
        if self.exponent.shape != (1,) or not bool(self.exponent > 0):
            return "an exponent that is not one positive number"
        values = level_values(self.bits, self.levels, self.exponent)
        if not bool((values.diff() > 0).all()):
            return f"levels that do not increase, of exponent {float(self.exponent)}"
        if int(self.codes.max()) >= len(values):
            return f"codes beyond its {len(values)} levels"
        return self._codes_defect() or scale_defect(self.scale)


def level_values(bits: int, levels: Levels, exponent: Tensor) -> Tensor:
    """(1,) float32 exponent -> (L,) float32 ascending from -1 to 1, odd-symmetric: levels in units of the scale."""
    return _exact_values(bits, levels, exponent).float().to(exponent.device)


@lru_cache(maxsize=KEPT_TABLES)
def _levels(bits: int, levels: Levels, exponent: float, device: torch.device) -> Table:
    with torch.inference_mode(False):
        values = level_values(bits, levels, torch.tensor([exponent], device=device))
        return Table(values.view(1, -1, 1), bits)


def _exact_values(bits: int, levels: Levels, exponent: Tensor) -> Tensor:
    """(L,) float64 on the processor: every device then reads the same table, and small powers do not underflow."""
    first = 0 if levels == "zero" else 0.5
    steps = torch.arange(2 ** (bits - 1), dtype=torch.float64, device="cpu") + first
    magnitudes = (steps / steps[-1]).pow(1 / exponent.to("cpu", torch.float64))
    return torch.cat([-magnitudes[1 if levels == "zero" else 0 :].flip(0), magnitudes])


def dequantize(codes: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """(O, I) codes, (R, G) scale, (L,) values -> (O, I) float32."""
    rows, columns = codes.shape
    grouped = values.index_select(0, codes.flatten().int()).view(rows, scale.shape[1], -1)
    return grouped.mul_(scale.float()[..., None]).view(rows, columns)


@dataclass(frozen=True)
class PowerGrid:
    """The levels of an exponent, and the nearest of them.

    Attributes:
        bits: 2 to 8.
        exponent: positive; counts as rounded to float32, as it is stored.
        levels: the layout.
    """

    bits: int
    exponent: float
    levels: Levels

    @cached_property
    def stored_exponent(self) -> Tensor:
        """(1,) float32."""
        return torch.tensor([self.exponent], dtype=torch.float32)

    @cached_property
    def values(self) -> Tensor:
        """(L,) float32, ascending, in units of the scale."""
        return level_values(self.bits, self.levels, self.stored_exponent)

    @cached_property
    def borders(self) -> Tensor:
        """(L - 1,) float32: a number above border c is nearer to level c + 1 than to level c."""
        exact = _exact_values(self.bits, self.levels, self.stored_exponent)
        borders = ((exact[1:] + exact[:-1]) / 2).float()
        # Halfway goes up from even codes: with a level at zero and exponent 1, to even multiples, as rounding does.
        borders[::2] = torch.nextafter(borders[::2], torch.tensor(-torch.inf, device="cpu"))
        return borders.to(self.stored_exponent.device)

    def nearest(self, unit: Tensor) -> Tensor:
        """Numbers in units of the scale, float32 of any shape -> int32 codes of the nearest levels."""
        # The power says between which two levels a number lies, many times quicker than a search of the borders; the
        # border says which is nearer. A power that is rounded across a level does no harm: that level is the nearest.
        middle = (len(self.values) - 1) / 2
        x = unit.abs().clamp_(max=1).pow_(self.exponent).copysign_(unit)
        below = x.add_(1).mul_(middle).clamp_(max=len(self.values) - 2).int()
        return below.add_(unit > self.borders.index_select(0, below.flatten()).view(unit.shape))

    def lost(self, unit: Tensor, norm: float) -> Tensor:
        """Numbers in units of the scale -> |rounding error|**norm of each, in those units."""
        rounded_to = self.values.index_select(0, self.nearest(unit).flatten()).view(unit.shape)
        return rounded_to.sub_(unit).abs_().pow_(norm)


def nearest(weight: Tensor, scale: Tensor, grid: PowerGrid, mask: Tensor | None = None) -> Power:
    """(O, I) float32, (R, G) scale of its stored type -> every weight at its nearest level; what is masked, idle."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for part, of_scale in _pieces_and_scales(weight, scale):
        unit = weight[part].reshape(-1, scale.shape[1], columns // scale.shape[1]) / scale[of_scale].float()[..., None]
        codes[part] = grid.nearest(unit).view(-1, columns)
    found = Power(codes, scale, grid.stored_exponent, grid.bits, grid.levels)
    return found if mask is None else replace(found, codes=torch.where(mask, codes, found.idle()))


def fit_scale(
    weight: Tensor,
    grid: PowerGrid,
    *,
    groups: int = 1,
    per_tensor: bool = False,
    mask: Tensor | None = None,
    search: Search = "mse",
    norm: float = SEARCH_NORM,
) -> Tensor:
    """Scale of every group of columns of a weight, for the levels of a grid.

    Args:
        weight: (O, I) float32, zero where masked.
        groups: G, which must divide I.
        per_tensor: one scale for the whole matrix; `groups` must be 1.
        mask: (O, I) bool, True = kept; what is masked counts as no error.
        search: `minmax` puts the highest level at the largest magnitude; `mse` tries ranges down to a fifth of that
            and keeps the one with the least sum of |error|**norm.

    Returns:
        (R, G) float16, or float32 where a scale is outside float16's normal range. Rounded to its stored type here, so
        codes fitted with it mean what the file says.
    """
    largest = _largest(weight, groups, per_tensor)
    empty = largest == 0

    def stored(share: Tensor) -> Tensor:
        return stored_scale(largest * share).masked_fill_(empty, EMPTY)

    share = torch.ones_like(largest)
    if search == "minmax":
        return narrowest(stored(share))
    least = torch.full_like(largest, torch.inf)
    for steps in ([s - 1 for s in SHARES], FINER):
        centre = share
        for step in steps:
            tried = (centre + step).clamp_(SHARES[-1], 1)
            scale = stored(tried)
            lost = _lost(weight, scale, grid, mask, norm).mul_((scale / largest.masked_fill(empty, 1)) ** norm)
            better = lost < least
            least, share = torch.where(better, lost, least), torch.where(better, tried, share)
    return narrowest(stored(share))


@dataclass(frozen=True)
class Profile:
    """How the magnitudes of a weight are distributed below the largest of their group: all an exponent depends on.

    Attributes:
        places: (N,) float32 from 0 to 1, in units of the largest magnitude.
        masses: (N,) float64, sums of the largest magnitude**norm: an error there counts so much.
    """

    places: Tensor
    masses: Tensor

    def error(self, grid: PowerGrid, shares: Tensor, norm: float) -> float:
        """Sum of |error|**norm with the best of S ranges; (S,) shares of the largest magnitude, for every group."""
        lost = grid.lost(self.places / shares[:, None], norm).double() @ self.masses
        return float((lost * shares.double() ** norm).min())


def profile(
    weight: Tensor, *, groups: int = 1, per_tensor: bool = False, mask: Tensor | None = None, norm: float = SEARCH_NORM
) -> Profile:
    """The profile of an (O, I) float32 weight; what is masked is left out. Arguments as in `fit_scale`."""
    largest = _largest(weight, groups, per_tensor)
    masses, moments = torch.zeros(2, BINS, dtype=torch.float64)
    for part, of_scale in _pieces_and_scales(weight, largest):
        top = largest[of_scale][..., None]
        grouped = weight[part].abs().reshape(-1, groups, weight.shape[1] // groups)
        unit = grouped / top.masked_fill(top == 0, 1)
        mass = (top.double() ** norm).expand(unit.shape)
        if mask is not None:
            mass = mass * mask[part].reshape(unit.shape)
        # Bins narrow towards zero, as levels do.
        bins = unit.sqrt().mul_(BINS - 1).long().flatten()
        masses += sums_by_number(bins, mass.flatten(), BINS)
        moments += sums_by_number(bins, (mass * unit).flatten(), BINS)
    there = masses > 0
    return Profile((moments[there] / masses[there]).float(), masses[there])


def fit_exponent(
    profiles: Sequence[Profile],
    bits: int,
    levels: Levels,
    *,
    exponent: float | None = None,
    search: Search = "mse",
    norm: float = SEARCH_NORM,
) -> tuple[float, float]:
    """The exponent with the least sum, over weights, of ||W - rounded W||_norm, and that sum.

    With search `mse` the range is searched along, one share of the largest magnitude for all groups of a weight. A
    given exponent is only measured.
    """
    shares = torch.tensor(SHARES if search == "mse" else [1.0])

    def total(exponent: float) -> float:
        grid = PowerGrid(bits, exponent, levels)
        return math.fsum(p.error(grid, shares, norm) ** (1 / norm) for p in profiles)

    if exponent is None:
        start = min(sorted(EXPONENTS, key=lambda a: abs(a - 1)), key=total)  # of equals, the nearest to even spacing
        place = EXPONENTS.index(start)
        finer = _golden(total, EXPONENTS[max(place - 1, 0)], EXPONENTS[min(place + 1, len(EXPONENTS) - 1)])
        exponent = min(start, finer, key=total)
    return exponent, total(exponent)


def _golden(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum between `low` and `high` is least."""
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(GOLDEN_STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2


def _largest(weight: Tensor, groups: int, per_tensor: bool) -> Tensor:
    """(R, G): the largest magnitude of every group."""
    rows = 1 if per_tensor else weight.shape[0]
    grouped = weight.reshape(rows, groups, -1)
    return torch.maximum(grouped.amax(-1), -grouped.amin(-1))


def _lost(weight: Tensor, scale: Tensor, grid: PowerGrid, mask: Tensor | None, norm: float) -> Tensor:
    """(R, G): sum of |error|**norm of every group, in units of its scale."""
    rows, groups = weight.shape[0], scale.shape[1]
    found = torch.empty(rows, groups)
    for part, of_scale in _pieces_and_scales(weight, scale):
        unit = weight[part].reshape(-1, groups, weight.shape[1] // groups) / scale[of_scale][..., None]
        lost = grid.lost(unit, norm)
        if mask is not None:
            lost *= mask[part].reshape(unit.shape)
        found[part] = lost.sum(-1)
    return found if len(scale) == rows else found.sum(0, keepdim=True)


def _pieces_and_scales(weight: Tensor, scale: Tensor) -> list[tuple[slice, slice]]:
    """Rows to work on at once, and their scales': temporaries stay in the cache."""
    rows, columns = weight.shape
    step = rows_in_piece(CHUNK, columns, weight.device)
    parts = [slice(start, start + step) for start in range(0, rows, step)]
    return [(part, part if len(scale) == rows else slice(None)) for part in parts]
