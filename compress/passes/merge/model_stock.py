"""A point between the base and the mean of fine-tunes, tensor by tensor, found from the angles between them.

Shapes: K fine-tunes, N elements of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import OptionError
from compress.lazy import torch
from compress.passes.merge.base import MergePass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.passes.merge.base import Piece, Pieces

LEAST = 1e-6  # a product of lengths below it is not divided by


@dataclass(frozen=True, kw_only=True)
class ModelStock(MergePass):
    """Take of each tensor t times the mean of fine-tunes and 1 - t times the base, t by the angle between fine-tunes.

    Fine-tunes of one task lie on a shell around its centre. How far their mean is from that is known from the cosine of
    the angle between them, seen from the base: t = K cos / (1 + (K - 1) cos) is the point next to the centre.

    Source: Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024, arXiv 2403.19522,
    section 4. Differs from the paper in: the fine-tunes are finished, and not brought together again while they are
    trained; of more than two the cosine is the mean of those of all pairs, as mergekit has it.

    Example:
        >>> import torch
        >>> from compress import ModelStock
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.zeros(2), (torch.tensor([2.0, 2.0]), torch.tensor([2.0, 0.0])))
        >>> stock = ModelStock(models=("one", "other"))
        >>> stock.run(piece, stock.look(lambda: iter([piece]), None))
        tensor([1.6569, 0.8284])
    """

    key: ClassVar[str] = "model_stock"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if len(self.models) == 1:
            yield OptionError("models", "an angle is between two: name at least two fine-tunes of the model")

    @property
    def looks(self) -> bool:
        return True

    def look(self, tensor: Pieces, found: Any) -> float:
        """How much of the mean is taken."""
        count = len(self.models)
        products = torch.zeros(count, count, dtype=torch.float64)
        for piece in tensor():
            deltas = list(piece.deltas())
            for i, one in enumerate(deltas):
                for j in range(i, count):
                    products[i, j] += torch.dot(one, deltas[j]).double()
        lengths = products.diagonal().sqrt()
        cosines = [
            min(1.0, max(-1.0, float(products[i, j] / max(float(lengths[i] * lengths[j]), LEAST))))
            for i, j in combinations(range(count), 2)
        ]
        return stock_share(sum(cosines) / len(cosines), count)

    def run(self, piece: Piece, facts: float) -> Tensor:
        total = torch.zeros_like(piece.base)
        for other in piece.others:
            total.add_(other)
        return total.mul_(facts / len(self.models)).add_(piece.base, alpha=1 - facts)


def stock_share(cosine: float, count: int) -> float:
    """t, from the cosine between `count` fine-tunes: 0 where they have nothing in common, 1 where they are the same."""
    below = 1 + (count - 1) * cosine
    return count * cosine / below if below else 0.0


__all__ = ["ModelStock"]
