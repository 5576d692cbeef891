"""Kept weights make up for those that are gone, at a fixed mask.

Minimise ||(W - V) X||^2 where V is zero outside the mask. For row i, with kept columns K and the others P,

    v_K = w_K + H_KK^-1 H_KP w_P,      H = X X^T + damping.

Shapes: O rows, I columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.calibration.precision import products
from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.solvers.obs import Factor, compensate
from compress.passes.solvers.projections import Keeping

if TYPE_CHECKING:
    from torch import Tensor

Update = Literal["none", "obs", "exact"]
TILE = 128  # columns swept at once
ROWS = 1024  # solved at once: bounds the memory
TOLERANCE = 1e-4  # of the size of the residual to that before the first step
STEPS = 300  # at most; what is reached by then is no worse than where it began


def refit(weight: Tensor, gram: Tensor, mask: Tensor, *, update: Literal["obs", "exact"], damping: float) -> Tensor:
    """The weight (O, I) to keep at a mask (O, I), True = kept; `gram` (I, I) is the sum of x x^T.

    Raises:
        SolveError: not positive definite, or a result that is not finite.
    """
    solve = swept if update == "obs" else least_error
    result = solve(weight, gram, mask, damping)
    if not torch.isfinite(result).all():
        raise SolveError("the solution is not finite")
    return result


def swept(weight: Tensor, gram: Tensor, mask: Tensor, damping: float) -> Tensor:
    """Column by column, each loss repaired in the columns after it: SparseGPT with its mask given.

    Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993; Frantar
    and Alistarh, "SparseGPT", 2023, arXiv 2301.00774.
    """
    keeping = Keeping(mask.T.contiguous())
    return weight - compensate(weight, Factor(gram, damping), tile=TILE, every=TILE, begin=None, project=keeping)


def least_error(weight: Tensor, gram: Tensor, mask: Tensor, damping: float) -> Tensor:
    """The least error that the mask allows, by conjugate gradients on all rows at once.

    Every row has a matrix H_KK of its own; a factor of each would cost O(O I^3), while one step is one product with H.

    Source: Meng, Behdin, Wang and Mazumder, "ALPS", NeurIPS 2024, arXiv 2406.07831, algorithm 2. Differs from the paper
    in: a row stops by itself when its residual is small.
    """
    parts = zip(torch.split(weight, ROWS), torch.split(mask, ROWS), strict=True)
    with products("float32"):  # rounded factors would not leave the directions conjugate
        return torch.cat([_descended(w, gram, m, damping) for w, m in parts])


def _descended(weight: Tensor, gram: Tensor, mask: Tensor, damping: float) -> Tensor:
    diagonal = gram.diagonal()
    extra = damping * diagonal.mean()
    scale = (diagonal + extra).masked_fill(diagonal == 0, 1.0).reciprocal()  # the preconditioner

    def apply(v: Tensor) -> Tensor:
        return (v @ gram).add_(v * extra).mul_(mask)

    result = weight * mask
    residual = apply(weight - result)
    step = residual * scale
    size = torch.linalg.vecdot(residual, step)
    enough = size * TOLERANCE**2
    for _ in range(STEPS):
        active = size > enough
        if not active.any():
            break
        pushed = apply(step)
        curvature = torch.linalg.vecdot(step, pushed)
        if (curvature[active] <= 0).any():
            raise SolveError("the Gram matrix of the inputs is not positive definite at this damping")
        length = (size / curvature).where(active, 0.0)[:, None]
        result += length * step
        residual -= length * pushed
        ahead = residual * scale
        now = torch.linalg.vecdot(residual, ahead)
        step.mul_((now / size).where(active, 0.0)[:, None]).add_(ahead)
        size = now.where(active, size)
    return result
