"""Columns of a matrix that go altogether, and what the others make up for.

Minimise E ||W x - V x - s||^2 where V is zero outside the columns K that stay, and s is a shift that only a layer with
a bias can have. With C the second moments of x, or its covariance where there is a shift,

    V_K = W_K + W_P C_PK (C_KK + damping)^-1,      s = W mean - V mean,

for P the columns that go. Damping holds the correction back, not the weight: where nothing is lost, nothing changes.
Which columns go is decided one unit after the other by what its loss costs once the others have made up for it: a unit
u costs tr(W_u (C^-1_uu)^-1 W_u^T), and after it went, W and C^-1 are those of what is left.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993; for columns
that go together Kurtic, Frantar and Alistarh, "ZipLM", 2023, arXiv 2302.04089, section 3. Differs from the paper in:
units are taken from the cheapest `BATCH` columns, exactly among these, before all others are updated at once.

Shapes: O rows, I columns, U units of w columns each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import SolveError
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.statistics import Statistics

BATCH = 256  # columns of units that are looked at between two updates of all of them
TAKEN = 4  # one in so many of these goes


@dataclass(frozen=True)
class Moments:
    """What is known of the inputs (T tokens) of a layer.

    Attributes:
        second: (I, I) float64: the mean of x x^T, less that of the means where a shift can take these up.
        mean: (I,) float64; zeros where there is no shift.
    """

    second: Tensor
    mean: Tensor

    def lost(self, difference: Tensor, shift: Tensor | None = None) -> float:
        """E ||D x - s||^2 of a difference (O, I) of two matrices."""
        spread = float(torch.linalg.vecdot(difference @ self.second, difference).sum())
        offset = difference @ self.mean
        return max(0.0, spread) + float((offset if shift is None else offset - shift).square().sum())


def moments_of(statistics: Statistics, shifted: bool) -> Moments:
    """From sums over the inputs, with a Gram matrix. `shifted`: a bias can take up the mean."""
    assert statistics.gram is not None
    second = statistics.gram.double() / max(1, statistics.tokens)
    mean = statistics.mean
    if not shifted or mean is None:
        return Moments(second, second.new_zeros(len(second)))
    second -= mean[:, None] * mean
    second.diagonal().clamp_(min=0.0)  # of a constant input, a rounding error
    return Moments(second, mean)


def repaired(weight: Tensor, moments: Moments, kept: Tensor, damping: float) -> Tensor:
    """V_K (O, K) float64 of a weight (O, I) for the columns `kept` (K,).

    Raises:
        SolveError: not positive definite, or a result that is not finite.
    """
    wide = weight.double()
    gone = torch.ones(weight.shape[1], dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
    factor = _factor(moments.second[kept][:, kept], damping)
    lost = wide[:, gone] @ moments.second[gone][:, kept]
    made = wide[:, kept] + torch.cholesky_solve(lost.T, factor).T
    if not torch.isfinite(made).all():
        raise SolveError("the solution is not finite")
    return made


def cheapest(weight: Tensor, moments: Moments, columns: Tensor, keep: int, damping: float) -> Tensor:
    """Numbers (keep,) of the units that stay, ascending, of a weight (O, I) and units of `columns` (U, w).

    Raises:
        SolveError: not positive definite.
    """
    count, width = columns.shape
    inverse = torch.cholesky_inverse(_factor(moments.second, damping))
    left, alive = weight.double().clone(), torch.arange(count)
    while len(alive) > keep:
        parts = left[:, columns[alive]].transpose(0, 1)
        cost = _costs(_blocks(inverse, columns[alive]), parts.transpose(1, 2) @ parts)
        looked_at = alive[cost.argsort(stable=True)[: max(2, BATCH // width)]]
        most = len(looked_at) if len(looked_at) == len(alive) else max(1, len(looked_at) // TAKEN)
        flat = columns[looked_at].flatten()
        taken = _one_by_one(inverse[flat][:, flat], left[:, flat], width, min(most, len(alive) - keep))
        gone = looked_at[taken]
        flat = columns[gone].flatten()
        through = torch.linalg.solve(inverse[flat][:, flat], inverse[flat])
        left -= left[:, flat] @ through
        inverse -= inverse[:, flat] @ through
        alive = alive[~torch.isin(alive, gone)]
    return alive


def _one_by_one(inverse: Tensor, weight: Tensor, width: int, take: int) -> Tensor:
    """Which `take` units of a few go, one after the other: (take,) numbers of theirs."""
    count = len(inverse) // width
    columns = torch.arange(count * width).view(count, width)
    products, left = weight.T @ weight, torch.ones(count, dtype=torch.bool)
    gone = []
    for _ in range(take):
        cost = _costs(_blocks(inverse, columns, left), _blocks(products, columns, left))
        unit = int(left.nonzero()[:, 0][cost.argmin()])
        gone.append(unit)
        left[unit] = False
        own = columns[unit]
        through = torch.linalg.solve(inverse[own][:, own], inverse[own])
        across = products[:, own] @ through
        products = products - across - across.T + through.T @ products[own][:, own] @ through
        inverse = inverse - inverse[:, own] @ through
    return torch.tensor(gone)


def _costs(inverses: Tensor, products: Tensor) -> Tensor:
    """tr(P C^-1) of blocks (U, w, w) of the inverse C and of W^T W."""
    if inverses.shape[-1] == 1:
        return products[:, 0, 0] / inverses[:, 0, 0]
    found: Tensor = torch.linalg.solve(inverses, products).diagonal(dim1=1, dim2=2).sum(1)
    return found


def _blocks(matrix: Tensor, columns: Tensor, chosen: Tensor | None = None) -> Tensor:
    """(U, w, w): the part of a matrix (I, I) that belongs to each unit."""
    own = columns if chosen is None else columns[chosen]
    return matrix[own[:, :, None], own[:, None, :]]


def _factor(second: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of damped moments. An input that is always zero constrains nothing."""
    damped = second.clone()
    diagonal = second.diagonal()
    damped.diagonal().add_(damping * diagonal.mean())
    damped.diagonal()[diagonal == 0] = 1.0
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed) or not torch.isfinite(factor.diagonal()).all():
        raise SolveError("the moments of the inputs are not positive definite at this damping")
    return factor
