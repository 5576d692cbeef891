"""Task vectors of which most entries are dropped at random, then merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.calibration.draws import draw
from compress.errors import OptionError
from compress.lazy import torch
from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel, Value
from compress.passes.merge.task_vectors import SMALL, Combine, Tie, elected, summed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from compress.passes.merge.base import Piece, Pieces


@dataclass(frozen=True, kw_only=True)
class Dare(MergePass):
    """Drop most entries of every task vector at random, rescale those that are left, and merge.

    Works where fine-tuning changed little (entries within about 0.005): not after continued pre-training.

    Source: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    2023, arXiv 2311.03099, section 3. Differs from the paper in: `density` is the share that is kept, 1 - p;
    `rescale: l1` is mergekit's, which gives each tensor the sum of magnitudes it had.

    Args:
        density: share of entries that each task vector keeps: one for each of `models`, or one for all.
        weights: one for each of `models`, or one for all.
        scale: of the merged task vector.
        merge: `linear` is task arithmetic; `ties` elects signs.
        rescale: `unbiased` divides by the density; `l1` keeps the sum of magnitudes; `none` leaves what is left.
        combine: the `sum`, or the `mean` over the weights, with `ties` of those that have the elected sign.
        tie: as of `ties`.

    Example:
        >>> import torch
        >>> from compress import Dare
        >>> from compress.passes.merge.base import Piece
        >>> chance = torch.Generator().manual_seed(0)
        >>> piece = Piece("weight", torch.zeros(6), (torch.ones(6),), (chance,))
        >>> Dare(models=("tuned",), density=0.5).run(piece, None)
        tensor([2., 0., 2., 2., 2., 0.])
    """

    density: PerModel = 0.1
    weights: PerModel = 1.0
    scale: Value = 1.0
    merge: Literal["linear", "ties"] = "linear"
    rescale: Literal["unbiased", "l1", "none"] = "unbiased"
    combine: Combine = "sum"
    tie: Tie = "none"

    key: ClassVar[str] = "dare"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from self.within("density", 0, 1)
        if self.merge == "linear" and self.tie != "none":
            yield OptionError("tie", "changes nothing with merge: linear, which elects no signs")

    @property
    def looks(self) -> bool:
        return self.rescale == "l1"

    def look(self, tensor: Pieces, found: object) -> list[float]:
        """What is left of each task vector is multiplied with this, for the sum of magnitudes that it had."""
        sums = torch.zeros(2, len(self.models), dtype=torch.float64)
        for piece in tensor():
            for k, (delta, left) in enumerate(zip(piece.deltas(), self._left(piece), strict=True)):
                sums[0, k] += delta.abs().sum()
                sums[1, k] += left.abs().sum()
        return [before / after if min(before, after) >= SMALL else 1.0 for before, after in sums.T.tolist()]

    def run(self, piece: Piece, facts: Sequence[float] | None) -> Tensor:
        shares = self.of_each(self.density, piece, 0.1)
        if self.rescale == "unbiased":
            facts = [1 / share if share else 0.0 for share in shares]
        left = (d if facts is None else d.mul_(facts[k]) for k, d in enumerate(self._left(piece)))
        weights = self.of_each(self.weights, piece, 1.0)
        if self.merge == "ties":
            mixed = elected(list(left), weights, self.combine, self.tie)
        else:
            mixed = summed(left, weights, self.combine)
        return mixed.mul_(self.at_piece(self.scale, piece, 1.0)).add_(piece.base)

    def _left(self, piece: Piece) -> Iterator[Tensor]:
        """What is not dropped of every task vector."""
        shares = self.of_each(self.density, piece, 0.1)
        for delta, share, chance in zip(piece.deltas(), shares, piece.generators, strict=True):
            if share < 1:
                delta.mul_(draw(chance, delta.shape, "uniform", delta) < share)
            yield delta
