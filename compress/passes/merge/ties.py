"""Task vectors trimmed, then merged where they agree in sign.

Shapes: K models, n elements of a piece, N of a tensor, or of the whole model with `scope: model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel, Value, values_at
from compress.passes.merge.task_vectors import Combine, Tie, elected
from compress.passes.merge.trimming import Scope, Surveyed, kept_of, limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.errors import OptionError
    from compress.passes.merge.base import Piece, Pieces
    from compress.passes.merge.trimming import Limit


@dataclass(frozen=True, kw_only=True)
class Ties(MergePass):
    """Trim every task vector to its largest entries, elect a sign place by place, and merge what agrees with it.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023, arXiv 2306.01708, section 4.
    Differs from the paper in: by default each tensor is trimmed by itself (`scope: model` trims the whole vector, as
    the paper does); weights, which count in the election; where the election is even, nobody wins.

    Args:
        density: share of entries that each task vector keeps: one for each of `models`, or one for all.
        weights: one for each of `models`, or one for all.
        scale: of the merged task vector.
        combine: `mean` over the models that have the elected sign, or their `sum`.
        scope: what is trimmed to its largest entries: each `tensor` by itself, or the whole `model`.
        tie: where the election is even: `none` leaves the base's value; `positive` lets the positive ones win.

    Example:
        >>> import torch
        >>> from compress import Ties
        >>> from compress.passes.merge.base import Piece
        >>> tuned = torch.tensor([3.0, 0.1, -2.0, 1.0]), torch.tensor([1.0, 0.1, 1.0, 0.1])
        >>> piece = Piece("weight", torch.zeros(4), tuned, total=4)
        >>> ties = Ties(models=("maths", "code"), density=0.5)
        >>> ties.run(piece, ties.look(lambda: iter([piece]), None))
        tensor([ 2.,  0., -2.,  0.])
    """

    density: PerModel = 0.2
    weights: PerModel = 1.0
    scale: Value = 1.0
    combine: Combine = "mean"
    scope: Scope = "tensor"
    tie: Tie = "none"

    key: ClassVar[str] = "ties"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from self.within("density", 0, 1)
        yield from self.of_whole_models("density")

    @property
    def surveys(self) -> bool:
        return self.scope == "model"

    @property
    def looks(self) -> bool:
        return True

    def survey(self, everything: Pieces, sizes: Mapping[str, int]) -> Surveyed:
        total = sum(sizes.values())
        shares = values_at(self.density, len(self.models), "", 0.0, 0.2)
        return Surveyed(limits(lambda: magnitudes(everything), total, [kept_of(s, total) for s in shares]), sizes)

    def look(self, tensor: Pieces, found: Surveyed | None) -> list[Limit]:
        """Which entries of each model's task vector are kept."""
        first = next(tensor())
        if found is not None:
            return found.of(first.name)
        counts = [kept_of(share, first.total) for share in self.of_each(self.density, first, 0.2)]
        return limits(lambda: magnitudes(tensor), first.total, counts)

    def run(self, piece: Piece, facts: list[Limit]) -> Tensor:
        trimmed = [limit.trimmed(d, piece.start) for d, limit in zip(piece.deltas(), facts, strict=True)]
        mixed = elected(trimmed, self.of_each(self.weights, piece, 1.0), self.combine, self.tie)
        return mixed.mul_(self.at_piece(self.scale, piece, 1.0)).add_(piece.base)


def magnitudes(pieces: Pieces) -> Iterator[list[Tensor]]:
    """The magnitudes of every task vector, piece by piece."""
    return ([delta.abs_() for delta in piece.deltas()] for piece in pieces())
