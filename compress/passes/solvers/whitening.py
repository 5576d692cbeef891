"""A matrix seen through the inputs it is multiplied with, and the two thin factors that come nearest to it there.

A change M of a weight changes the outputs on all inputs X by ||M X|| = ||M S||, where S S^T = X X^T. The best factors
of M S are its largest singular directions; times S^-1 they are the best ones of M for the outputs.

Shapes: O rows, I columns, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from compress.encodings import LowRankFactors
from compress.errors import SolveError
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.statistics import Need, Statistics

SMALLEST, LARGEST = 1e-3, 6e4  # largest numbers of a factor that float16 holds with all its digits


@dataclass(frozen=True)
class WhitenedMatrix:
    """A matrix M, seen through its inputs as M S.

    Attributes:
        matrix: (O, I) float64, M.
        root, inverse: (I, I) or (1, I) float64, S and S^-1; a row for diagonal ones.
        right: (I, min(O, I)) float64, orthonormal right singular vectors of M S, largest first.
        energies: (min(O, I),) float64, squared singular values, largest first.
    """

    matrix: Tensor
    root: Tensor
    inverse: Tensor
    right: Tensor
    energies: Tensor

    @classmethod
    def through(cls, matrix: Tensor, statistics: Statistics | None, need: Need, floor: float) -> Self:
        """`need` says how much of the inputs is looked at: their Gram matrix, their norms, or nothing.

        Raises:
            SolveError: no input ever reached the layer.
        """
        root, inverse = _roots(matrix, statistics, need, floor)
        seen = times(matrix, root)
        small = seen.T @ seen if seen.shape[1] <= seen.shape[0] else seen @ seen.T
        values, vectors = torch.linalg.eigh(small)
        energies, vectors = values.flip(0).clamp_(min=0), vectors.flip(1)
        if seen.shape[1] > seen.shape[0]:  # left singular vectors: turn them round
            vectors = seen.T @ vectors / energies.sqrt().clamp(min=1e-300)
        return cls(matrix, root, inverse, vectors, energies)

    def basis(self, rank: int) -> Tensor:
        """(r, I) the A of the best factors, its rows at most 1: B takes the size, and both fit 16 bits."""
        a = times(self.right[:, :rank].T, self.inverse)
        return a / a.abs().amax(1, keepdim=True).clamp(min=1e-300)

    def fitted(self, a: Tensor) -> Tensor:
        """(O, r) the B that loses least with an A (r, I)."""
        thin, wanted = times(a, self.root).T, times(self.matrix, self.root).T
        if a.device.type == "cpu":
            solution: Tensor = torch.linalg.lstsq(thin, wanted, driver="gelsd")[0]
        else:  # a device has no driver for factors that depend on each other
            solution = torch.linalg.pinv(thin) @ wanted
        return solution.T

    def factors(self, rank: int) -> LowRankFactors:
        """The best of this rank: A as it will be stored, and the B that is best for that."""
        a = stored_factor(self.basis(rank))
        return LowRankFactors(a, stored_factor(self.fitted(a.double())))

    def size(self, matrix: Tensor) -> float:
        """||M S|| of another M, (O, I) float64."""
        return math.sqrt(float(times(matrix, self.root).square().sum()))


def _roots(matrix: Tensor, statistics: Statistics | None, need: Need, floor: float) -> tuple[Tensor, Tensor]:
    if need == "none":
        root = torch.ones(1, matrix.shape[1], dtype=torch.float64)
        return root, root
    if statistics is None or not bool(statistics.square_sum.any()):
        raise SolveError("no input ever reached this layer")
    if need == "norm":
        root = statistics.square_sum.sqrt()[None]
        root = root.clamp(min=math.sqrt(floor) * float(root.max()))
        return root, 1 / root
    return roots(statistics, floor)


def roots(statistics: Statistics, floor: float) -> tuple[Tensor, Tensor]:
    """S and its inverse, (I, I) float64, of H = S S^T, in the eigenspace of H."""
    values, vectors = statistics.eigen
    scale = values.clamp(min=floor * float(values[-1])).sqrt()
    return vectors * scale, (vectors / scale).T


def times(matrix: Tensor, root: Tensor) -> Tensor:
    """Matrix @ root, where a root of one row is diagonal."""
    return matrix * root if len(root) == 1 else matrix @ root


def stored_factor(factor: Tensor) -> Tensor:
    """A factor in 16 bits, unless its size does not fit them."""
    largest = float(factor.abs().max())
    return factor.half() if largest == 0 or SMALLEST <= largest <= LARGEST else factor.float()
