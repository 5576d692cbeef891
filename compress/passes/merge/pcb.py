"""Task vectors merged by how much each entry matters in its own task and fits the others'.

Shapes: K models, n elements of a piece, N of the whole model, or of a tensor with `scope: tensor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Lt

from compress.lazy import torch
from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel, Value, values_at
from compress.passes.merge.trimming import Scope, kept_of, kth_largest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.errors import OptionError
    from compress.passes.merge.base import Piece, Pieces

NOTHING = 1e-12  # a sum of scores that nothing is divided by


@dataclass(frozen=True)
class Measures:
    """What is measured on one task vector.

    Attributes:
        low, high: its magnitudes are clipped to these.
        cut, top: scores from `cut` to `top` count from 0 to 1; lower ones do not.
    """

    low: float
    high: float
    cut: float = 0.0
    top: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pcb(MergePass):
    """Score every entry of every task vector by itself and beside the others', drop the lowest, and weigh by the score.

    Source: Du et al., "Parameter Competition Balancing for Model Merging", 2024, arXiv 2410.02396, section 3. Differs
    from the paper in: the form is that of the authors' published code (pcb_ES.py), with tanh between tasks instead of a
    softmax; the weights of the tasks are given, not searched; with `scope: tensor` every tensor is scored by itself, so
    that tensors of different scale do not decide.

    Args:
        density: the paper's r, the share of entries that each task keeps: one for each of `models`, or one for all.
        weights: one for each of `models`, or one for all.
        scale: of the merged task vector, the paper's lambda.
        clip: this share of the smallest and of the largest magnitudes is clipped.
        scope: what is scored together: the whole `model`, or each `tensor` by itself.

    Example:
        >>> import torch
        >>> from compress import Pcb
        >>> from compress.passes.merge.base import Piece
        >>> tuned = torch.tensor([4.0, 1.0, -3.0, 2.0]), torch.tensor([4.0, -1.0, 3.0, 2.0])
        >>> piece = Piece("weight", torch.zeros(4), tuned, total=4)
        >>> pcb = Pcb(models=("maths", "code"), density=0.5, clip=0.0, scope="tensor")
        >>> pcb.run(piece, pcb.look(lambda: iter([piece]), None))
        tensor([4., 0., 0., 2.])
    """

    density: PerModel = 0.1
    weights: PerModel = 1.0
    scale: Value = 1.0
    clip: Annotated[float, Ge(0), Lt(0.5)] = 0.01
    scope: Scope = "model"

    key: ClassVar[str] = "pcb"

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

    def survey(self, everything: Pieces, sizes: Mapping[str, int]) -> list[Measures]:
        shares = values_at(self.density, len(self.models), "", 0.0, 0.1)
        return measured_bounds(everything, sum(sizes.values()), shares, self.clip)

    def look(self, tensor: Pieces, found: list[Measures] | None) -> list[Measures]:
        """What is measured on every task vector."""
        if found is not None:
            return found
        first = next(tensor())
        return measured_bounds(tensor, first.total, self.of_each(self.density, first, 0.1), self.clip)

    def run(self, piece: Piece, facts: list[Measures]) -> Tensor:
        deltas = list(piece.deltas())
        weights = self.of_each(self.weights, piece, 1.0)
        mixed, total = torch.zeros_like(piece.base), torch.zeros_like(piece.base)
        for delta, score, m, weight in zip(deltas, scores(deltas, facts), facts, weights, strict=True):
            share = ((score - m.cut) / (m.top - m.cut)).clamp_(min=0) if m.top > m.cut else (score >= m.top).float()
            total += share
            mixed.addcmul_(share, clipped(delta, m), value=weight)
        mixed /= total.clamp_(min=NOTHING)
        return mixed.mul_(self.at_piece(self.scale, piece, 1.0)).add_(piece.base)


def measured_bounds(pieces: Pieces, total: int, shares: Sequence[float], clip: float) -> list[Measures]:
    """The bounds of the magnitudes of every task vector, then of its scores, for the whole that `pieces` gives."""
    least, most = total - int(clip * (total - 1)), total - int((1 - clip) * (total - 1))

    def magnitudes() -> Iterator[list[Tensor]]:
        return ([m for delta in piece.deltas() for m in [delta.abs_()] * 2] for piece in pieces())

    found = [rank.value for rank in kth_largest(magnitudes, total, [least, most] * len(shares))]
    bounds = [Measures(low, high) for low, high in zip(found[::2], found[1::2], strict=True)]

    def scored() -> Iterator[list[Tensor]]:
        return ([s for score in scores(list(p.deltas()), bounds) for s in [score] * 2] for p in pieces())

    # The bottom 1 - r of the scores become 0, the highest 1.
    wanted = [k for share in shares for k in (min(kept_of(share, total) + 1, total), 1)]
    found = [rank.value for rank in kth_largest(scored, total, wanted, signed=True)]
    ends = zip(bounds, found[::2], found[1::2], strict=True)
    return [Measures(m.low, m.high, cut, top) for m, cut, top in ends]


def clipped(delta: Tensor, m: Measures) -> Tensor:
    """A task vector with its magnitudes between two bounds."""
    return delta.sign() * delta.abs().clamp_(m.low, m.high)


def scores(deltas: Sequence[Tensor], bounds: Sequence[Measures]) -> Iterator[Tensor]:
    """For each of K task vectors how much its entries matter: exp(K u^2) * sum over all j of tanh(v v_j).

    u is the magnitude, from 0 at its lower bound to 1 at its upper one; v is u with the sign. All are divided by
    exp(K), which changes nothing where they end and is finite for any number of models.
    """
    signed = []
    for delta, m in zip(deltas, bounds, strict=True):
        height = delta.abs().clamp_(m.low, m.high)
        u = height.sub_(m.low).div_(m.high - m.low) if m.high > m.low else torch.ones_like(delta)
        signed.append(delta.sign().mul_(u))
    for v in signed:
        fits = torch.zeros_like(v)
        for other in signed:
            fits += (v * other).tanh_()
        yield v.square().sub_(1).mul_(len(signed)).exp_().mul_(fits)
