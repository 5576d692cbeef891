"""An arc between what two models add to their base.

Shapes: N elements of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import OptionError
from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel
from compress.passes.merge.slerp import Products, slerp_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.passes.merge.base import Piece, Pieces

NOTHING = 1e-6  # a sum of weights that nothing is divided by
SHORT = 1e-7  # a task vector no longer than this is not divided by its length


@dataclass(frozen=True, kw_only=True)
class Nuslerp(MergePass):
    """Go from one task vector to another along an arc, tensor by tensor, and add the point to the base.

    A mean of task vectors that point elsewhere is shorter than either, and so is what the model has learned of both;
    a point on the arc is not. Seen from zero, as by `slerp`, fine-tunes of one base all point the same way.

    Source: NuSLERP of mergekit, Goddard et al., "Arcee's MergeKit: A Toolkit for Merging Large Language Models", 2024,
    arXiv 2403.13257; arcs as in Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985. Differs from the
    original in: arcs are those of whole tensors, not of rows or columns.

    Args:
        weights: of the two; the point is at the second one's share of their sum, in the middle where that is zero.

    Example:
        >>> import torch
        >>> from compress import Nuslerp
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.ones(2), (torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])))
        >>> arc = Nuslerp(models=("one", "other"))
        >>> arc.run(piece, arc.look(lambda: iter([piece]), None))
        tensor([1.7071, 1.7071])
    """

    weights: PerModel = 1.0

    key: ClassVar[str] = "nuslerp"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if len(self.models) != 2:
            yield OptionError("models", f"an arc has two ends beside the base; {len(self.models)} are named")

    @property
    def looks(self) -> bool:
        return True

    def look(self, tensor: Pieces, found: Any) -> float:
        """The cosine of the angle between the two task vectors."""
        products = Products(SHORT)
        for piece in tensor():
            products.see(*piece.deltas())
        return products.cosine()

    def run(self, piece: Piece, facts: float) -> Tensor:
        one, other = self.of_each(self.weights, piece, 1.0)
        share = other / (one + other) if abs(one + other) >= NOTHING else 0.5
        first, second = slerp_weights(share, facts)
        deltas = list(piece.deltas())
        return deltas[0].mul_(first).add_(deltas[1], alpha=second).add_(piece.base)


__all__ = ["Nuslerp"]
