"""How heavy-tailed a weight matrix's spectrum is: a sign of how much it has learned.

Shapes: O rows, I columns, N eigenvalues.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 256  # largest side of a window
POSITIONS = 5  # windows along a side, or as many as cover it
FEWEST = 5  # eigenvalues that say anything about a tail


def alpha(weight: Tensor) -> float | None:
    """The exponent of the power law that the largest squared singular values of (O, I) follow; None where few differ.

    Hill's estimate over the larger half.

    Source: Lu et al., "AlphaPruning", NeurIPS 2024, arXiv 2410.10912. Differs from the paper in: the tail begins at the
    median, one of the choices of its public code, which does not depend on a histogram as the search for it does.
    """
    return _alpha(torch.linalg.svdvals(weight.double()).square())


def farms_alpha(weight: Tensor) -> float | None:
    """The exponent of `alpha`, from all singular values of square windows of one size, whatever the shape of (O, I).

    Source: Hu et al., "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias", 2025, arXiv 2506.06280.
    Differs from the paper in: windows of up to 256, five along a side or as many as cover it.
    """
    side = min(*weight.shape, WINDOW)
    found = [
        torch.linalg.svdvals(weight[top : top + side, left : left + side].double()).square()
        for top in _starts(weight.shape[0], side)
        for left in _starts(weight.shape[1], side)
    ]
    return _alpha(torch.cat(found))


def _starts(length: int, side: int) -> list[int]:
    room = length - side
    count = min(room + 1, max(POSITIONS, -(-length // side)))
    return [round(i * room / (count - 1)) for i in range(count)] if count > 1 else [0]


def _alpha(eigenvalues: Tensor) -> float | None:
    ascending = eigenvalues[eigenvalues > 0].sort().values
    if len(ascending) < FEWEST or float(ascending[-1]) <= float(ascending[0]) * (1 + 1e-9):
        return None
    return hill(ascending, len(ascending) // 2)


def hill(ascending: Tensor, first: int) -> float | None:
    """1 + n / sum(ln(x / x_first)) over the n values from `first` on; None where they do not differ."""
    tail = ascending[first:]
    total = float((tail / tail[0]).log().sum())
    return 1 + len(tail) / total if total > 0 else None
