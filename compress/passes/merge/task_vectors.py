"""Sums of what models add to their base, with or without an election of signs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.errors import OptionError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from compress.passes.merge.base import Piece, Pieces

Mix = Literal["linear", "ties"]
Combine = Literal["sum", "mean"]
Tie = Literal["none", "positive"]
NOTHING = 1e-8  # a sum of weights that nothing is divided by
SMALL = 1e-7  # sums of magnitudes below it are not divided by


def summed(deltas: Iterable[Tensor], weights: Sequence[float], combine: Combine) -> Tensor:
    """(n,) the weighted sum of K vectors, or their weighted mean. One of them is in memory at a time."""
    total = torch.zeros(())
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + delta * weight if total.dim() == 0 else total.add_(delta, alpha=weight)
    divisor = sum(weights)
    return total / divisor if combine == "mean" and abs(divisor) >= NOTHING else total


def elected(deltas: Sequence[Tensor], weights: Sequence[float], combine: Combine, tie: Tie) -> Tensor:
    """(n,) the weighted sum, or mean, of those of K vectors that have the sign of their weighted sum, place by place.

    Args:
        deltas: K of (n,); zero where a model does not count. They are overwritten.
        weights: K.
        combine: the mean is over the weights of those that are summed.
        tie: which sign wins where the weighted sum is zero.
    """
    votes = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        votes.add_(delta.mul_(weight))
    sign = torch.copysign(torch.ones(()), votes) if tie == "positive" else votes.sign()
    total, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(sign).clamp_(min=0)
        total.add_(agreeing)
        if combine == "mean":
            divisor.add_(agreeing.sign_(), alpha=weight)
    total.mul_(sign)
    return total.div_(divisor.add_(divisor == 0)) if combine == "mean" else total


def mixed(left: Iterable[Tensor], weights: Sequence[float], merge: Mix, combine: Combine, tie: Tie) -> Tensor:
    """(n,) what is left of K vectors: `linear` as `summed`, `ties` as `elected`, by which they are overwritten."""
    return elected(list(left), weights, combine, tie) if merge == "ties" else summed(left, weights, combine)


def idle_tie(merge: Mix, tie: Tie) -> Iterator[OptionError]:
    """An error where a rule for elections is given, and none is held."""
    if merge == "linear" and tie != "none":
        yield OptionError("tie", "changes nothing with merge: linear, which elects no signs")


def kept_magnitudes(tensor: Pieces, left: Callable[[Piece], Iterable[Tensor]], count: int) -> list[float]:
    """What each of `count` task vectors that are left is multiplied with, for the sum of magnitudes that it had."""
    sums = torch.zeros(2, count, dtype=torch.float64)
    for piece in tensor():
        for k, (delta, kept) in enumerate(zip(piece.deltas(), left(piece), strict=True)):
            sums[0, k] += delta.abs().sum()
            sums[1, k] += kept.abs().sum()
    return [before / after if min(before, after) >= SMALL else 1.0 for before, after in sums.T.tolist()]
