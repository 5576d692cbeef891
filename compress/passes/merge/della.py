"""Task vectors whose small entries are dropped more often than large ones, then merged.

Shapes: K models, n elements of a piece, R rows of a tensor, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.calibration.draws import draw
from compress.errors import OptionError
from compress.lazy import torch
from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel, Value, numbers_in
from compress.passes.merge.task_vectors import SMALL, Combine, Mix, Tie, idle_tie, kept_magnitudes, mixed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from compress.passes.merge.base import Piece, Pieces


@dataclass(frozen=True, kw_only=True)
class Della(MergePass):
    """Drop entries of every task vector at random, those of large magnitude less often, rescale the rest, and merge.

    An entry is kept with a probability that rises by its rank in its row, evenly from density - epsilon of the smallest
    to density + epsilon of the largest. A vector is one row.

    Source: Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", 2024,
    arXiv 2406.11617, section 3. Differs from the paper in: `density` is the share that is kept, 1 - p; `rescale: l1` is
    mergekit's, which gives each tensor the sum of magnitudes it had.

    Args:
        density: share of entries that each task vector keeps: one for each of `models`, or one for all.
        epsilon: how far the probabilities of the smallest and the largest entry of a row are from the density.
        weights: one for each of `models`, or one for all.
        scale: of the merged task vector.
        merge: `ties` elects signs; `linear` is task arithmetic.
        rescale: `unbiased` divides each entry by its probability; `l1` keeps the sum of magnitudes; `none` leaves what
            is left.
        combine: the `sum`, or the `mean` over the weights, with `ties` of those that have the elected sign.
        tie: as of `ties`.

    Example:
        >>> import torch
        >>> from compress import Della
        >>> from compress.passes.merge.base import Piece
        >>> chance = torch.Generator().manual_seed(0)
        >>> piece = Piece("weight", torch.zeros(4), (torch.tensor([4.0, 3.0, 2.0, 1.0]),), (chance,), 0, 4, shape=(4,))
        >>> Della(models=("tuned",), density=0.5, epsilon=0.25, rescale="none").run(piece, None)
        tensor([4., 0., 2., 1.])
    """

    density: PerModel = 0.5
    epsilon: float = 0.15
    weights: PerModel = 1.0
    scale: Value = 1.0
    merge: Mix = "ties"
    rescale: Literal["unbiased", "l1", "none"] = "unbiased"
    combine: Combine = "sum"
    tie: Tie = "none"

    key: ClassVar[str] = "della"
    whole_rows: ClassVar[bool] = True

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from self.within("density", 0, 1)
        yield from self.within("epsilon", 0, 0.5)
        yield from idle_tie(self.merge, self.tie)
        outside = [d for d in numbers_in(self.density) if 0 < d < 1 and not self.epsilon <= d <= 1 - self.epsilon]
        if outside and self.epsilon <= 0.5:
            most = min(outside[0], 1 - outside[0])
            said = f"{self.epsilon} below and above a density of {outside[0]} is no probability; use at most {most:g}"
            yield OptionError("epsilon", said)

    @property
    def looks(self) -> bool:
        return self.rescale == "l1"

    def look(self, tensor: Pieces, found: object) -> list[float]:
        return kept_magnitudes(tensor, self._left, len(self.models))

    def run(self, piece: Piece, facts: Sequence[float] | None) -> Tensor:
        left = (d if facts is None else d.mul_(facts[k]) for k, d in enumerate(self._left(piece)))
        weights = self.of_each(self.weights, piece, 1.0)
        made = mixed(left, weights, self.merge, self.combine, self.tie)
        return made.mul_(self.at_piece(self.scale, piece, 1.0)).add_(piece.base)

    def _left(self, piece: Piece) -> Iterator[Tensor]:
        """What is not dropped of every task vector."""
        shares = self.of_each(self.density, piece, 0.5)
        for delta, share, chance in zip(piece.deltas(), shares, piece.generators, strict=True):
            if share >= 1:
                yield delta
                continue
            kept = self.probabilities(delta.view(-1, width_of(piece)), share).flatten()
            delta.mul_(draw(chance, delta.shape, "uniform", delta) < kept)
            yield delta.div_(kept.clamp(min=SMALL)) if self.rescale == "unbiased" else delta

    def probabilities(self, rows: Tensor, density: float) -> Tensor:
        """(R, I) -> the same, with what probability each entry is kept; none where the density is zero."""
        if density <= 0:
            return torch.zeros_like(rows)
        count = rows.shape[1]
        ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).to(rows.dtype)
        even = ranks / (count - 1) if count > 1 else torch.full_like(ranks, 0.5)
        return (density - self.epsilon + 2 * self.epsilon * even).clamp(0, 1)


def width_of(piece: Piece) -> int:
    """Elements of a row of a piece's tensor, whose pieces are whole rows."""
    return max(1, piece.total) if len(piece.shape) < 2 else max(1, torch.Size(piece.shape[1:]).numel())


__all__ = ["Della"]
