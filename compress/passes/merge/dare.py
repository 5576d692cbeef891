"""Task vectors of which most entries are dropped at random, then merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.calibration.draws import draw
from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel, Value
from compress.passes.merge.task_vectors import Combine, Mix, Tie, idle_tie, kept_magnitudes, mixed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from compress.errors import OptionError
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
    merge: Mix = "linear"
    rescale: Literal["unbiased", "l1", "none"] = "unbiased"
    combine: Combine = "sum"
    tie: Tie = "none"

    key: ClassVar[str] = "dare"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from self.within("density", 0, 1)
        yield from idle_tie(self.merge, self.tie)

    @property
    def looks(self) -> bool:
        return self.rescale == "l1"

    def look(self, tensor: Pieces, found: object) -> list[float]:
        return kept_magnitudes(tensor, self._left, len(self.models))

    def run(self, piece: Piece, facts: Sequence[float] | None) -> Tensor:
        shares = self.of_each(self.density, piece, 0.1)
        if self.rescale == "unbiased":
            facts = [1 / share if share else 0.0 for share in shares]
        left = (d if facts is None else d.mul_(facts[k]) for k, d in enumerate(self._left(piece)))
        weights = self.of_each(self.weights, piece, 1.0)
        made = mixed(left, weights, self.merge, self.combine, self.tie)
        return made.mul_(self.at_piece(self.scale, piece, 1.0)).add_(piece.base)

    def _left(self, piece: Piece) -> Iterator[Tensor]:
        """What is not dropped of every task vector."""
        shares = self.of_each(self.density, piece, 0.1)
        for delta, share, chance in zip(piece.deltas(), shares, piece.generators, strict=True):
            if share < 1:
                delta.mul_(draw(chance, delta.shape, "uniform", delta) < share)
            yield delta
