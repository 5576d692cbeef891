"""Magnitude pruning, one matrix at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from compress.passes.base import Edit, LinearPass, OptionError, Target
from compress.passes.prune.selection import (
    Sparsity,
    check_sparsity,
    keep_pattern,
    keep_rows,
    masked_out,
    pattern,
    pattern_misfit,
)


@dataclass(frozen=True, kw_only=True)
class Pruner(LinearPass):
    """A pass that zeroes weights of one matrix.

    Args:
        sparsity: share of zeros in every row, or "keep:of" such as "2:4" (keep 2 of every 4 neighbouring columns).
    """

    sparsity: Sparsity = 0.5

    def check(self) -> Iterator[OptionError]:
        yield from check_sparsity(self.sparsity)

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        return pattern_misfit(self.sparsity, shape)

    def produces(self, kind: str) -> str:
        return "sparse"

    def fallback(self) -> "LinearPass":
        return Magnitude(sparsity=self.sparsity)


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner):
    """Zero the smallest weights of every row, or of every run of M columns.

    The baseline pruner: no data, kept weights untouched.

    Source: Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015,
    arXiv 1506.02626. Differs from the paper in: the budget is per row, as in Wanda's comparison, and nothing is
    retrained.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.Magnitude(sparsity="2:4")])
        >>> float((result.model[0].weight == 0).float().mean())
        0.5
    """

    key: ClassVar[str] = "magnitude"

    def run(self, target: Target) -> Edit:
        scores = masked_out(target.weight.abs(), target.mask)
        n_of_m = pattern(self.sparsity)
        mask = keep_pattern(scores, *n_of_m) if n_of_m else keep_rows(scores, float(self.sparsity))
        if target.mask is not None:
            mask &= target.mask
        return Edit(weight=target.weight * mask, mask=mask)

    def fallback(self) -> Self:
        return self
