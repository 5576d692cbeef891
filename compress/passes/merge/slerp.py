"""Spherical interpolation between two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le

from compress.lazy import torch
from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import Value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.errors import OptionError
    from compress.passes.merge.base import Piece, Pieces

PARALLEL = 1 - 1e-12  # a cosine from which on no angle is divided by


@dataclass(frozen=True, kw_only=True)
class Slerp(MergePass):
    """Go from one model to another along an arc, tensor by tensor.

    Between tensors of equal length every point has that length; the mean of two that point elsewhere is shorter.

    Source: Shoemake, "Animating rotation with quaternion curves", 1985, SIGGRAPH. Differs from the paper in: the
    tensors are not normalised, only the angle between them is; where they point the same or opposite ways, the straight
    line is taken. Both are what users of mergekit know.

    Args:
        t: 0 is the model that the pipeline is run on, 1 the other.
        eps: a tensor no longer than this is not divided by its length.
        straight: the cosine, either way, beyond which the straight line is taken.

    Example:
        >>> import torch
        >>> from compress import Slerp
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.tensor([1.0, 0.0]), (torch.tensor([0.0, 1.0]),))
        >>> slerp = Slerp(models=("other",))
        >>> slerp.run(piece, slerp.look(lambda: iter([piece]), None))
        tensor([0.7071, 0.7071])
    """

    t: Value = 0.5
    eps: Annotated[float, Ge(0)] = 1e-8
    straight: Annotated[float, Gt(0), Le(1)] = 0.9995

    key: ClassVar[str] = "slerp"
    pairwise: ClassVar[bool] = True

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from self.within("t", 0, 1)

    @property
    def looks(self) -> bool:
        return True

    def look(self, tensor: Pieces, found: Any) -> float:
        """The cosine of the angle between the two."""
        products = Products(self.eps)
        for piece in tensor():
            products.see(piece.base, piece.others[0])
        return products.cosine()

    def run(self, piece: Piece, facts: float) -> Tensor:
        first, second = slerp_weights(self.at_piece(self.t, piece, 0.5), facts, self.straight)
        return (piece.base * first).add_(piece.others[0], alpha=second)


class Products:
    """Products of two vectors that come in pieces. `short`: one no longer than this is not divided by its length."""

    def __init__(self, short: float):
        self.short, self.sums = short, torch.zeros(3, dtype=torch.float64)

    def see(self, one: Tensor, other: Tensor) -> None:
        """A piece of each, (n,) float32."""
        self.sums += torch.stack([torch.dot(x, y).double() for x, y in ((one, one), (other, other), (one, other))])

    def cosine(self) -> float:
        """That of the angle between them."""
        lengths = [length if length > self.short else 1.0 for length in self.sums[:2].sqrt().tolist()]
        return min(1.0, max(-1.0, float(self.sums[2]) / (lengths[0] * lengths[1])))


def slerp_weights(t: float, cosine: float, straight: float = 1.0) -> tuple[float, float]:
    """What each of two vectors is multiplied with, given the cosine of their angle; beyond `straight`, of a line."""
    if abs(cosine) > min(straight, PARALLEL):
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
