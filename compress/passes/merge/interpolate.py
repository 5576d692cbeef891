"""The straight line between a model and another one, or the mean of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.errors import OptionError
from compress.lazy import torch
from compress.passes.merge.base import MergePass
from compress.passes.merge.fisher import informations
from compress.passes.merge.schedules import Value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.passes.merge.base import Piece
    from compress.passes.merge.models import Models


@dataclass(frozen=True, kw_only=True)
class Interpolate(MergePass):
    """A point on the straight line between two models, such as a base and its fine-tune.

    Between a base and its fine-tune there are often models as good as the fine-tune on its task and better elsewhere;
    between an old and a new version, models as good as the new one that change fewer answers. Of several new versions
    the other end is the mean.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), 2021, arXiv 2109.01903, eq. 1; between
    versions, by Fisher information, and with several new ones: Schumann et al. (BCWI), 2023, arXiv 2301.10546. A
    reconstruction of the last two, as only the abstract could be read. Differs from the papers in: the share may differ
    by depth and by tensor; `choose` tries shares on calibration data; information is that of answers drawn from the
    model's own predictions, which needs no labels.

    Args:
        alpha: 0 is the model that the pipeline is run on, 1 the other. 0.5 where nothing can be validated.
        importance: `equal` moves all numbers as far; `fisher` weighs each by how much the predictions of its model
            depend on it, on the calibration data: what matters to the base and not to the other stays near the base.

    Example:
        >>> import torch
        >>> from compress import Interpolate
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.tensor([1.0, 2.0]), (torch.tensor([2.0, 4.0]),))
        >>> Interpolate(models=("tuned",), alpha=0.25).run(piece, None)
        tensor([1.2500, 2.5000])
    """

    alpha: Value = 0.5
    importance: Literal["equal", "fisher"] = "equal"

    key: ClassVar[str] = "interpolate"
    common: ClassVar[frozenset[str]] = MergePass.common | {"importance"}
    other_end: ClassVar[str | None] = "alpha"

    @property
    def learns(self) -> bool:
        return self.importance == "fisher"

    @property
    def learns_once(self) -> bool:
        return self.learns

    @property
    def trains_whole(self) -> bool:
        return self.learns

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from self.within("alpha", 0, 1)
        if self.learns and self.vocabulary == "common":
            yield OptionError("vocabulary", "with importance: fisher the models are run, so they must be of one size")

    def learn(self, models: Models) -> Mapping[str, Sequence[Tensor]]:
        """Tensor -> how much the predictions of the base, and of each other model, depend on its numbers."""
        return informations(models, 1 + len(self.models))

    def run(self, piece: Piece, facts: Mapping[str, Sequence[Tensor]] | None) -> Tensor:
        alpha, others = self.at_piece(self.alpha, piece, 0.5), piece.others
        if facts is None or piece.name not in facts:  # no gradient reaches running means
            return torch.lerp(piece.base, _mean(others), alpha)
        old, *new = (each.flatten()[piece.start : piece.start + len(piece.base)] for each in facts[piece.name])
        whole = torch.stack(new).sum(0)
        other = others[0] if len(others) == 1 else (torch.stack(others) * torch.stack(new)).sum(0) / whole
        towards = alpha * whole / len(new)
        return torch.lerp(piece.base, other, towards / (towards + (1 - alpha) * old))


def _mean(others: Sequence[Tensor]) -> Tensor:
    return others[0] if len(others) == 1 else torch.stack(tuple(others)).mean(0)
