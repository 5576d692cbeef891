"""What columns are projected onto, stated as data: called for a column, or read whole by a kernel.

Shapes: O rows, I columns in the order of the factor, G groups of columns; R = O, or 1 for one scale per matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """To the nearest point of a grid, ties to even; weights that are masked go to zero.

    Attributes:
        scales, zeros: (G, R) float32. A group's are read when its first column is projected, no earlier.
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
    def _groups(self) -> list[int]:
        found: list[int] = self.group.cpu().tolist()
        return found

    def __call__(self, j: int, value: Tensor) -> Tensor:
        """(O,) column `j` as it stands -> what is kept of it."""
        s, z = self.scales[self._groups[j]], self.zeros[self._groups[j]]
        code = (value / s).round_().add_(z).clamp_(0, self.highest)
        if self.kept is not None:
            code = torch.where(self.kept[j], code, z)
        self.codes[j].copy_(code)
        return code.sub_(z).mul_(s)


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

    def __call__(self, j: int, value: Tensor) -> Tensor:
        """(O,) column `j` as it stands -> what is kept of it."""
        return value * self.kept[j]


__all__ = ["Choice", "Keeping", "Rounding"]
