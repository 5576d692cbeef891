"""OATS: a sparse matrix and one of low rank, found together, in the place of a dense one.

Shapes: O rows, I columns, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from compress.lazy import torch
from compress.passes.base import Edit, LinearPass
from compress.passes.factorize.low_rank import Budget
from compress.passes.prune.selection import (
    Sparsity,
    check_sparsity,
    keep_pattern,
    keep_rows,
    pattern,
    pattern_misfit,
)
from compress.passes.solvers.whitening import WhitenedMatrix, times

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.passes.base import OptionError, Target


@dataclass(frozen=True, kw_only=True)
class Oats(Budget, LinearPass):
    """Put the sum of a sparse matrix S and a product B A in the place of every matrix, for the outputs of its layer.

    Each in turn is the best that it can be for what the other leaves of the matrix, its columns scaled by the norms of
    the inputs: B A the largest singular values, S the largest entries of each row.

    Source: Zhang and Papyan, "OATS: Outlier-Aware Pruning Through Sparse and Low Rank Decomposition", 2024, arXiv
    2409.13652: alternating thresholding of the scaled matrix. Differs from the paper in: the two parts have a size
    each, not a compression rate and a share of it; 20 iterations instead of 80; norms have a floor; in the end A is
    rounded to 16 bits, B is fitted to that and rounded, and S takes what both leave where it is not zero.

    Args:
        sparsity: share of zeros in every row of S, or "keep:of" such as "2:4".
        ratio: numbers in the two factors, as a share of those in the matrix.
        iterations: how often each part is found anew.
        scaling: of the columns while the parts are found: by the norms of the layer's `inputs`, or `none`.
        floor: under the squared norms, as a share of the largest.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> result = compress.apply(model, [compress.Oats(iterations=5)], calibration=torch.randn(16, 64))
        >>> result.weights["0"].kind
        'sparse-compensated'
    """

    sparsity: Sparsity = 0.7
    ratio: Annotated[float, Gt(0), Lt(1)] = 0.2
    iterations: Annotated[int, Ge(1)] = 20
    scaling: Literal["inputs", "none"] = "inputs"
    floor: Annotated[float, Gt(0), Lt(1)] = 1e-6

    key: ClassVar[str] = "oats"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})

    @property
    def needs(self) -> Need:
        ways = {self.scaling, *(o.options.get("scaling", self.scaling) for o in self.overrides)}
        return "norm" if "inputs" in ways else "none"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from check_sparsity(self.sparsity)

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        return super().check_shape(shape) or pattern_misfit(self.sparsity, shape)

    def produces(self, kind: str) -> str:
        return "sparse-compensated"

    def refusal(self, kind: str) -> str | None:
        if kind in self.accepts:
            return super().refusal(kind)
        return f"{self.key} chooses zeros and a correction together. Put it first and `exclude` its layers later on"

    def run(self, target: Target) -> Edit:
        weight, rank = target.weight.double(), self.rank((target.weight.shape[0], target.weight.shape[1]))
        need: Need = "norm" if self.scaling == "inputs" else "none"
        sparse = torch.zeros_like(weight)
        for _ in range(self.iterations):
            seen = WhitenedMatrix.through(weight - sparse, target.statistics, need, self.floor)
            left = weight - _nearest(seen, rank)
            mask = self._mask(times(left, seen.root))
            sparse = left * mask
        made = WhitenedMatrix.through(weight - sparse, target.statistics, need, self.floor).factors(rank)
        product = made.product().double()
        sparse = (weight - product) * mask
        whole = seen.size(weight) or 1.0
        notes = {"output_error": seen.size(weight - sparse - product) / whole}
        return Edit(weight=sparse.float(), mask=mask, low_rank=made, notes=notes)

    def _mask(self, scaled: Tensor) -> Tensor:
        """(O, I) True where the largest entries are."""
        n_of_m, scores = pattern(self.sparsity), scaled.abs().float()
        return keep_pattern(scores, *n_of_m) if n_of_m else keep_rows(scores, float(self.sparsity))

    def stand_in(self) -> Oats:
        return replace(self, scaling="none", overrides=())


def _nearest(seen: WhitenedMatrix, rank: int) -> Tensor:
    """(O, I) float64, what has this rank and is nearest to a matrix as it is seen."""
    directions = seen.right[:, :rank]
    return times(times(seen.matrix, seen.root) @ directions @ directions.T, seen.inverse)
