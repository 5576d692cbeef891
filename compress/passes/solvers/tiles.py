"""The columns of a tile projected one after the other, each as the errors of those before it leave it.

Shapes: O rows, t columns in a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CHUNK = 16  # columns whose errors are applied one by one; those before it in the tile are applied together

Begin: TypeAlias = "Callable[[int, Tensor], None]"  # (first column, current columns (O, width)): decide scales or masks


class ProjectionTile(Protocol):
    """The projection of the columns of one tile, counted from its first."""

    def __call__(self, j: int, value: Tensor) -> None:
        """Put what is kept of column `j`, which stands as (O,) `value`, into the row `j` of what is chosen."""

    def finish(self) -> None:
        """Called when all columns are projected."""


def project_tile(
    weights: Tensor,
    now: Tensor,
    errors: Tensor,
    chosen: Tensor,
    project: ProjectionTile,
    chunk: int = CHUNK,
    every: int = 1,
    begin: Begin | None = None,
    before: Tensor | None = None,
) -> None:
    """Project the columns of a tile, one after the other.

    Args:
        weights: (t, t), in row j what the errors before column j take from it.
        now: (t, O), the columns as they stand before any of them is projected; ends as what was projected.
        errors: (t, O), written: what is lost of each column.
        chosen: (t, O), written: what is kept of each.
        project: the projection.
        chunk: columns whose errors are applied one by one.
        every, begin: as in `compensate`.
        before: (t, O), what errors are taken of; what was projected if not given.
    """
    values, lost, kept, by_row = now.unbind(), errors.unbind(), chosen.unbind(), errors.T
    compared = values if before is None else before.unbind()
    first = 0  # `now` holds the effect of all errors before this column, up to the end of its chunk
    for j, of_errors in enumerate(weights.unbind()):
        if begin and j % every == 0:
            known, group = first if j % chunk else 0, slice(j, j + every)
            begin(j, torch.addmm(now[group], weights[group, known:j], errors[known:j], alpha=-1).T)
        if j % chunk == 0:
            now[j : j + chunk].addmm_(weights[j : j + chunk, :j], errors[:j], alpha=-1)
            first = j
        elif j > first:
            values[j].addmv_(by_row.narrow(1, first, j - first), of_errors.narrow(0, first, j - first), alpha=-1)
        project(j, values[j])
        torch.sub(compared[j], kept[j], out=lost[j])
