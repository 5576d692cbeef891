"""Projection of columns onto steps that begin anywhere, stated as the projections of `projections.py` are.

Shapes: O rows, I columns in the order of the factor, t of them in a tile, G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.encodings.super_blocks import divisor
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OffsetRounding:
    """To the nearest step of a grid that begins anywhere, ties to even; weights that are masked go to zero.

    Attributes:
        scales, offsets: (G, O) float32, changed by `put` only; a value is step * scale - offset. A group's are read
            when its columns are projected. Scales may be zero, or negative.
        group: (I,) int64, the group of every column.
        lowest: the step that code 0 stands for.
        highest: the last step.
        kept: (I, O) bool, True = kept; None where all are.
        codes: (I, O) uint8, written here.
    """

    scales: Tensor
    offsets: Tensor
    group: Tensor
    lowest: int
    highest: int
    kept: Tensor | None
    codes: Tensor

    def put(self, groups: slice, scales: Tensor, offsets: Tensor | None) -> None:
        """The grids of some groups, (groups, O) both."""
        self.scales[groups] = scales
        self.offsets[groups] = 0.0 if offsets is None else offsets

    def values(self, part: slice) -> Tensor:
        """What codes of some columns stand for, (t, O)."""
        group, steps = self.group[part], self.codes[part].float() + self.lowest
        values = steps * self.scales[group] - self.offsets[group]
        return values if self.kept is None else values * self.kept[part]

    def tile(self, part: slice, chosen: Tensor) -> OffsetRoundingTile:
        """The projection of some columns into `chosen` (t, O)."""
        return OffsetRoundingTile(self, part, chosen)


class OffsetRoundingTile:
    """The columns of one tile, counted from its first."""

    def __init__(self, rounding: OffsetRounding, part: slice, chosen: Tensor):
        self.rounding, self.part, self.chosen = rounding, part, chosen
        self.groups = rounding.group[part].tolist()
        self.steps = torch.empty_like(chosen)
        self.kept = None if rounding.kept is None else rounding.kept[part]

    def __call__(self, j: int, value: Tensor) -> None:
        """Round column `j`, which stands as (O,) `value`."""
        rounding, group, step = self.rounding, self.groups[j], self.steps[j]
        scale, offset = rounding.scales[group], rounding.offsets[group]
        torch.div(value + offset, divisor(scale), out=step).round_()
        step.clamp_(rounding.lowest, rounding.highest)
        if self.kept is not None:
            step.mul_(self.kept[j])
        torch.sub(step * scale, offset, out=self.chosen[j])
        if self.kept is not None:
            self.chosen[j].mul_(self.kept[j])

    def finish(self) -> None:
        """Write the codes."""
        self.rounding.codes[self.part] = self.steps.sub_(self.rounding.lowest).to(torch.uint8)


__all__ = ["OffsetRounding", "OffsetRoundingTile"]
