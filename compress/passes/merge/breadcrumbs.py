"""Task vectors without their smallest and their very largest entries, then merged.

Shapes: K models, n elements of a piece, N of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel, Value
from compress.passes.merge.task_vectors import Combine, Mix, Tie, idle_tie, mixed
from compress.passes.merge.ties import magnitudes
from compress.passes.merge.trimming import kept_of, limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.errors import OptionError
    from compress.passes.merge.base import Piece, Pieces
    from compress.passes.merge.trimming import Limit


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(MergePass):
    """Leave the smallest entries of every task vector out, which are noise, and the few largest, and merge the rest.

    Source: Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", 2023, arXiv
    2312.06795, section 3. Differs from the paper in: `density` is the share that is kept, and tensors are masked one by
    one, as mergekit does, which has the elections of TIES too; weights.

    Args:
        density: share of entries that each task vector keeps: one for each of `models`, or one for all.
        gamma: share of entries, the largest, that each loses; fewer where `density` leaves no room for it.
        weights: one for each of `models`, or one for all.
        scale: of the merged task vector.
        merge: `linear` is task arithmetic; `ties` elects signs.
        combine: the `sum`, or the `mean` over the weights, with `ties` of those that have the elected sign.
        tie: as of `ties`.

    Example:
        >>> import torch
        >>> from compress import Breadcrumbs
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.zeros(4), (torch.tensor([9.0, 0.1, -2.0, 1.0]),), total=4)
        >>> crumbs = Breadcrumbs(models=("tuned",), density=0.5, gamma=0.25)
        >>> crumbs.run(piece, crumbs.look(lambda: iter([piece]), None))
        tensor([ 0.,  0., -2.,  1.])
    """

    density: PerModel = 0.9
    gamma: PerModel = 0.01
    weights: PerModel = 1.0
    scale: Value = 1.0
    merge: Mix = "linear"
    combine: Combine = "sum"
    tie: Tie = "none"

    key: ClassVar[str] = "breadcrumbs"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from self.within("density", 0, 1)
        yield from self.within("gamma", 0, 1)
        yield from idle_tie(self.merge, self.tie)

    @property
    def looks(self) -> bool:
        return True

    def look(self, tensor: Pieces, found: Any) -> list[tuple[Limit, Limit]]:
        """Which entries of each model's task vector are large enough, and which of those too large."""
        first = next(tensor())
        shares = zip(self.of_each(self.density, first, 0.9), self.of_each(self.gamma, first, 0.01), strict=True)
        counts = [_counts(density, gamma, first.total) for density, gamma in shares]
        doubled = lambda: ([m for m in each for _ in range(2)] for each in magnitudes(tensor))  # noqa: E731
        places = limits(doubled, first.total, [count for pair in counts for count in pair])
        return list(zip(places[::2], places[1::2], strict=True))

    def run(self, piece: Piece, facts: list[tuple[Limit, Limit]]) -> Tensor:
        left = [
            enough.trimmed(delta, piece.start) - most.trimmed(delta, piece.start)
            for delta, (enough, most) in zip(piece.deltas(), facts, strict=True)
        ]
        weights = self.of_each(self.weights, piece, 1.0)
        made = mixed(left, weights, self.merge, self.combine, self.tie)
        return made.mul_(self.at_piece(self.scale, piece, 1.0)).add_(piece.base)


def _counts(density: float, gamma: float, total: int) -> tuple[int, int]:
    """How many of the largest entries there are with those that are too large, and how many are too large."""
    if density >= 1:
        return total, 0
    kept = kept_of(density, total)
    most = min(int(gamma * total), total - kept)
    return kept + most, most


__all__ = ["Breadcrumbs"]
