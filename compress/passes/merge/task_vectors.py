"""Sums of what models add to their base, with or without an election of signs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

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
