"""What columns are projected onto, stated as data: done column by column, or read whole by a kernel.

Shapes: O rows, I columns in the order of the factor, t of them in a tile, G groups of columns; R = O, or 1 for one
scale per matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings.minifloat import Minifloat


@dataclass(frozen=True)
class Rounding:
    """To the nearest point of a grid, ties to even; weights that are masked go to zero.

    Attributes:
        scales, zeros: (G, R) float32, changed by `put` only. A group's are read when its first column is projected.
        group: (I,) int64, the group of every column.
        highest: the largest code.
        kept: (I, O) bool, True = kept; None where all are.
        codes: (I, O) uint8, written here.
    """

    scales: Tensor
    zeros: Tensor
    group: Tensor
    highest: int
    kept: Tensor | None
    codes: Tensor

    @cached_property
    def lowest(self) -> Tensor:
        """(G, R), what the smallest code stands for, in units of the scale."""
        return -self.zeros

    @cached_property
    def highest_unit(self) -> Tensor:
        """(G, R), what the largest code stands for."""
        return self.highest - self.zeros

    def put(self, group: int, scale: Tensor, zero: Tensor) -> None:
        """The grid of a group, (R,) both."""
        self.scales[group], self.zeros[group] = scale, zero
        self.lowest[group], self.highest_unit[group] = -self.zeros[group], self.highest - self.zeros[group]

    def units(self, part: slice) -> Tensor:
        """What codes of some columns stand for, in units of their scales: (t, O)."""
        return self.codes[part].float() - self.zeros[self.group[part]]

    def values(self, part: slice) -> Tensor:
        """What codes of some columns stand for, (t, O)."""
        return _kept(self.units(part) * self.scales[self.group[part]], self.kept, part)

    def tile(self, part: slice, chosen: Tensor) -> RoundingTile:
        """The projection of some columns into `chosen` (t, O)."""
        return RoundingTile(self, part, chosen)


class RoundingTile:
    """The columns of one tile, counted from its first."""

    def __init__(self, rounding: Rounding, part: slice, chosen: Tensor):
        self.rounding, self.part = rounding, part
        self.groups = rounding.group[part].tolist()
        self.units = torch.empty_like(chosen)  # values in units of the scale
        self.rows, self.chosen = self.units.unbind(), chosen.unbind()
        self.kept = None if rounding.kept is None else rounding.kept[part]
        self.scales, self.lowest, self.highest = (
            t.unbind() for t in (rounding.scales, rounding.lowest, rounding.highest_unit)
        )

    def __call__(self, j: int, value: Tensor) -> None:
        """Round column `j`, which stands as (O,) `value`."""
        group, unit = self.groups[j], self.rows[j]
        scale = self.scales[group]
        torch.div(value, scale, out=unit).round_()
        torch.clamp(unit, self.lowest[group], self.highest[group], out=unit)
        if self.kept is not None:
            unit.mul_(self.kept[j])
        torch.mul(unit, scale, out=self.chosen[j])

    def finish(self) -> None:
        """Write the codes."""
        self.units += self.rounding.zeros[self.rounding.group[self.part]]
        self.rounding.codes[self.part] = self.units.to(torch.uint8)


@dataclass(frozen=True)
class FloatRounding:
    """To the nearest of the small floats, ties to the even mantissa; weights that are masked go to zero.

    Attributes:
        scales: (G, R) float32.
        group: (I,) int64, the group of every column.
        kind: the floats.
        kept: (I, O) bool, True = kept; None where all are.
        codes: (I, O) uint8, written here.
    """

    scales: Tensor
    group: Tensor
    kind: Minifloat
    kept: Tensor | None
    codes: Tensor

    def values(self, part: slice) -> Tensor:
        """What codes of some columns stand for, (t, O)."""
        codes = self.codes[part]
        units = self.kind.table(codes.device).values.flatten().index_select(0, codes.flatten().int())
        return _kept(units.view(codes.shape) * self.scales[self.group[part]], self.kept, part)

    def tile(self, part: slice, chosen: Tensor) -> FloatRoundingTile:
        """The projection of some columns into `chosen` (t, O)."""
        return FloatRoundingTile(self, part, chosen)


class FloatRoundingTile:
    """The columns of one tile, counted from its first."""

    def __init__(self, rounding: FloatRounding, part: slice, chosen: Tensor):
        self.rounding, self.part, self.chosen = rounding, part, chosen
        self.scales = rounding.scales[rounding.group[part]]
        self.units = torch.empty_like(chosen)
        self.kept = None if rounding.kept is None else rounding.kept[part]

    def __call__(self, j: int, value: Tensor) -> None:
        """Round column `j`, which stands as (O,) `value`."""
        unit = self.rounding.kind.round(value / self.scales[j])
        self.units[j] = unit if self.kept is None else unit.masked_fill_(~self.kept[j], 0.0)
        torch.mul(self.units[j], self.scales[j], out=self.chosen[j])

    def finish(self) -> None:
        """Write the codes."""
        self.rounding.codes[self.part] = self.rounding.kind.codes(self.units)


def _kept(values: Tensor, kept: Tensor | None, part: slice) -> Tensor:
    return values if kept is None else values * kept[part]


@dataclass(frozen=True)
class Choice:
    """The best of neighbouring columns: those with the largest (value * size)**2 are kept, ties by position.

    Attributes:
        keep, of: how many of how many.
        size: (I,) float32.
    """

    keep: int
    of: int
    size: Tensor


@dataclass(frozen=True)
class Keeping:
    """Weights that are not kept go to zero.

    Attributes:
        kept: (I, O) bool. A column's is read when the column is projected, or where there is a choice, chosen by then.
        choice: how a kernel chooses by itself, among what `kept` has at first; None where it is chosen beforehand.
    """

    kept: Tensor
    choice: Choice | None = None

    def tile(self, part: slice, chosen: Tensor) -> KeepingTile:
        """The projection of some columns into `chosen` (t, O)."""
        return KeepingTile(self.kept[part], chosen)


class KeepingTile:
    """The columns of one tile, counted from its first."""

    def __init__(self, kept: Tensor, chosen: Tensor):
        self.kept, self.chosen = kept.unbind(), chosen.unbind()

    def __call__(self, j: int, value: Tensor) -> None:
        """Zero what is not kept of column `j`, which stands as (O,) `value`."""
        torch.mul(value, self.kept[j], out=self.chosen[j])

    def finish(self) -> None:
        """Nothing is left to do."""


__all__ = ["Choice", "FloatRounding", "FloatRoundingTile", "Keeping", "KeepingTile", "Rounding", "RoundingTile"]
