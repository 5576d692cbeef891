"""SparseGPT: pruning with the loss of every column repaired in the columns after it.

Shapes: O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt

from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.base import Edit
from compress.passes.prune.magnitude import Pruner
from compress.passes.prune.selection import keep_pattern, keep_share, masked_out, pattern
from compress.passes.solvers.obs import Factor, compensate
from compress.passes.solvers.projections import Choice, Keeping

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.passes.base import Target
    from compress.passes.prune.selection import Sparsity


@dataclass(frozen=True, kw_only=True)
class SparseGpt(Pruner):
    """Prune tile by tile by w**2 / U_jj**2 and let the remaining columns make up for the loss.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, arXiv
    2301.00774. Differs from the paper in: one Cholesky factor of H instead of its inverse (the same numbers, see
    `passes/solvers/obs.py`); exactly the asked number of weights goes, ties broken by position.

    Args:
        sparsity: share of zeros in every tile of columns (rows may differ), or "keep:of".
        damping: added to the diagonal of the Gram matrix, as a share of its mean.
        tile: columns whose mask is chosen together.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.SparseGpt(sparsity=0.5)], calibration=torch.randn(256, 64))
        >>> result.weights["0"].kind
        'sparse'
    """

    damping: Annotated[float, Gt(0)] = 0.01
    tile: Annotated[int, Ge(1)] = 128

    key: ClassVar[str] = "sparsegpt"

    @property
    def needs(self) -> Need:
        return "gram"

    @property
    def rowwise(self) -> bool:
        return isinstance(self.sparsity, str)  # otherwise rows compete for one budget

    def run(self, target: Target) -> Edit:
        if target.statistics is None or target.statistics.gram is None:
            raise SolveError("no input ever reached this layer")
        weight, mask, dead = solve(
            target.weight,
            target.statistics.gram,
            target.mask,
            sparsity=self.sparsity,
            damping=self.damping,
            tile=self.tile,
        )
        return Edit(weight=weight, mask=mask, notes={"dead_inputs": dead} if dead else {})


def solve(
    weight: Tensor, gram: Tensor, mask: Tensor | None = None, *, sparsity: Sparsity, damping: float, tile: int
) -> tuple[Tensor, Tensor, int]:
    """The algorithm on plain tensors.

    Args:
        weight: (O, I) float32.
        gram: (I, I) float32, sum of x x^T.
        mask: (O, I) bool, True = kept: what is gone stays gone and counts.

    Returns:
        New weight (O, I), mask (O, I) bool, number of dead inputs.

    Raises:
        SolveError: not positive definite, or a result that is not finite.
    """
    rows, columns = weight.shape
    factor = Factor(gram, damping)
    diagonal = factor.upper.diagonal()  # R_jj = 1 / U_jj
    diagonal = diagonal.masked_fill(factor.dead, 0.0)  # weights of inputs that are always zero cost nothing
    n_of_m = pattern(sparsity)
    every = n_of_m[1] if n_of_m else min(tile, columns)
    chosen = torch.ones(columns, rows, dtype=torch.bool)
    if mask is not None:
        chosen.copy_(mask.T)

    def begin(start: int, current: Tensor) -> None:
        stop = start + current.shape[1]
        scores = (current * diagonal[start:stop]).square()
        scores = masked_out(scores, None if mask is None else mask[:, start:stop])
        keep = keep_pattern(scores, *n_of_m) if n_of_m else keep_share(scores, float(sparsity))
        if mask is not None:
            keep &= mask[:, start:stop]
        chosen[start:stop] = keep.T

    keeping = Keeping(chosen, Choice(*n_of_m, diagonal) if n_of_m else None)
    result = weight - compensate(weight, factor, tile=tile, every=every, begin=begin, project=keeping)
    if not torch.isfinite(result).all():
        raise SolveError("the solution is not finite")
    return result, chosen.T.contiguous(), factor.num_dead
