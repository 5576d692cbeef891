"""The nearest matrix of a low rank: the largest singular values of a matrix, so many or so much of its energy.

Shapes: matrix (O, I); factors A (R, I) and B (O, R).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Truncated:
    """A matrix as B A.

    Attributes:
        a, b: its factors, float32, equally long.
        kept: the share of the squared entries that is kept.
    """

    a: Tensor
    b: Tensor
    kept: float


def truncated(matrix: Tensor, rank: int | None, energy: float | None) -> Truncated:
    """The nearest matrix of a rank.

    Args:
        matrix: (O, I), any float type, finite and not zero.
        rank: at most that many singular values; None for no limit.
        energy: the fewest whose squares are this share of all; None for as many as `rank` says.

    Returns:
        Of rank 1 or more.
    """
    wide = matrix.double()
    turned = wide.shape[0] > wide.shape[1]
    wide = wide.T if turned else wide
    # Of the smaller side, in float64: what is lost by squaring is below what float32 can hold.
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, vectors = squares.flip(0).clamp_(min=0), vectors.flip(1)
    count = min(len(squares), rank or len(squares), max(1, int(torch.count_nonzero(squares))))
    if energy is not None:
        shares = squares.cumsum(0) / squares.sum()
        count = min(count, 1 + int(torch.count_nonzero(shares < energy)))
    root = squares[:count].sqrt().clamp_(min=torch.finfo(torch.float32).tiny).sqrt()
    left = vectors[:, :count]
    b, a = left * root, (left.T @ wide) / root[:, None]
    kept = float(squares[:count].sum() / squares.sum())
    if turned:
        a, b = b.T, a.T
    return Truncated(a.float().contiguous(), b.float().contiguous(), kept)
