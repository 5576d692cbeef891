"""The straight line between two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.lazy import torch
from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import Value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.errors import OptionError
    from compress.passes.merge.base import Piece


@dataclass(frozen=True, kw_only=True)
class Interpolate(MergePass):
    """A point on the straight line between two models, such as a base and its fine-tune.

    Between a base and its fine-tune there are often models as good as the fine-tune on its task and better elsewhere;
    between an old and a new version, models as good as the new one that change fewer answers.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), 2021, arXiv 2109.01903, eq. 1; between
    versions: Schumann et al. (BCWI), 2023, arXiv 2301.10546. Differs from the papers in: the share may differ by depth
    and by tensor; no Fisher weights; `choose` tries shares on calibration data.

    Args:
        alpha: 0 is the model that the pipeline is run on, 1 the other. 0.5 where nothing can be validated.

    Example:
        >>> import torch
        >>> from compress import Interpolate
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.tensor([1.0, 2.0]), (torch.tensor([2.0, 4.0]),))
        >>> Interpolate(models=("tuned",), alpha=0.25).run(piece, None)
        tensor([1.2500, 2.5000])
    """

    alpha: Value = 0.5

    key: ClassVar[str] = "interpolate"
    pairwise: ClassVar[bool] = True

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from self.within("alpha", 0, 1)

    def run(self, piece: Piece, facts: Any) -> Tensor:
        return torch.lerp(piece.base, piece.others[0], self.at_piece(self.alpha, piece, 0.5))
