"""The weighted mean of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import OptionError
from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel, numbers_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.passes.merge.base import Piece


@dataclass(frozen=True, kw_only=True)
class Average(MergePass):
    """The mean of models, weighted: a soup of fine-tunes of one model.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", 2022, arXiv 2203.05482, the uniform soup. Differs from the paper in: weights, which may
    differ by depth and by tensor.

    Args:
        weights: one for each model, the one that the pipeline is run on first; or one for all.
        normalize: divide by the sum of the weights. Without, the sum is taken as it is.

    Example:
        >>> import torch
        >>> from compress import Average
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.tensor([1.0, 2.0]), (torch.tensor([3.0, 2.0]),))
        >>> Average(models=("other",)).run(piece, None)
        tensor([2., 2.])
    """

    weights: PerModel = 1.0
    normalize: bool = True

    key: ClassVar[str] = "average"
    with_base: ClassVar[bool] = True

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.normalize and not any(numbers_in(self.weights)):
            yield OptionError("weights", "all are zero: there is nothing to divide by")

    def run(self, piece: Piece, facts: Any) -> Tensor:
        return weighted_mean((piece.base, *piece.others), self.of_each(self.weights, piece, 1.0), self.normalize)


def weighted_mean(values: tuple[Tensor, ...], weights: list[float], normalize: bool) -> Tensor:
    """The weighted sum, divided by the sum of the weights if asked."""
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.add_(value, alpha=weight)
    return total.div_(sum(weights)) if normalize else total
