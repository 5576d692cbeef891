"""Wanda: prune by weight times input norm.

Shapes: O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Gt

from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.base import Edit, OptionError
from compress.passes.prune.magnitude import Pruner
from compress.passes.prune.refit import Update, refit
from compress.passes.prune.selection import keep_pattern, keep_rows, masked_out, pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.passes.base import Target

TOLERANCE = 0.001  # of the bisection, in share of zeros, as in the public code


@dataclass(frozen=True, kw_only=True)
class Wanda(Pruner):
    """Zero the weights with the least |w| * ||x||, row by row; kept weights are untouched, or updated after that.

    Source: Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv
    2306.11695. Differs from the paper in: the norm is one plain sum over all tokens; N:M is written keep:of. The update
    is its ablation of weight updates, at a mask that is chosen whole before it (see `passes/prune/refit.py`).

    Args:
        free_rows: the variant in which rows may differ in sparsity: every row loses its smallest scores up to one
            global share of its total score, found by bisection. Not for N:M.
        update: of the kept weights, once the mask is chosen. `none`; `obs`: column by column, each loss made up for in
            the columns after it, as in SparseGPT; `exact`: the least error of the outputs that the mask allows.
        damping: added to the diagonal of the Gram matrix, as a share of its mean, for the update.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.Wanda(sparsity="2:4")], calibration=torch.randn(16, 64))
        >>> result.weights["0"].kind
        'sparse'
    """

    free_rows: bool = False
    update: Update = "none"
    damping: Annotated[float, Gt(0)] = 0.01

    key: ClassVar[str] = "wanda"

    @property
    def needs(self) -> Need:
        updates = (self.update, *(o.options.get("update", "none") for o in self.overrides))
        return "gram" if any(u != "none" for u in updates) else "norm"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.free_rows and isinstance(self.sparsity, str):
            yield OptionError("free_rows", f"cannot be combined with the fixed pattern {self.sparsity}")

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        if self.needs == "norm" and "damping" in self.options():
            yield OptionError("damping", "changes nothing without update")
        for i, override in enumerate(self.overrides):
            if "damping" in override.options and override.options.get("update", self.update) == "none":
                yield OptionError(f"overrides[{i}].damping", "changes nothing without update")

    @property
    def rowwise(self) -> bool:
        return not self.free_rows

    def run(self, target: Target) -> Edit:
        if target.statistics is None:
            raise SolveError("no input ever reached this layer")
        scores = target.weight.abs() * target.statistics.norm
        n_of_m = pattern(self.sparsity)
        if n_of_m:
            mask = keep_pattern(masked_out(scores, target.mask), *n_of_m)
        elif self.free_rows:
            mask = keep_free(scores if target.mask is None else scores * target.mask, float(self.sparsity))
        else:
            mask = keep_rows(masked_out(scores, target.mask), float(self.sparsity))
        if target.mask is not None:
            mask &= target.mask
        if self.update == "none":
            return Edit(weight=target.weight * mask, mask=mask)
        gram = target.statistics.gram
        assert gram is not None
        weight = refit(target.weight, gram, mask, update=self.update, damping=self.damping)
        dead = int((gram.diagonal() == 0).sum())
        return Edit(weight=weight, mask=mask, notes={"dead_inputs": dead} if dead else {})


def keep_free(scores: Tensor, sparsity: float) -> Tensor:
    """(O, I) scores -> mask whose rows lose their smallest scores up to a common share of the row's sum.

    The share is found by bisection on [0, 1] until the overall sparsity is within 0.001 of the target.
    """
    ordered, places = torch.sort(scores, dim=1, stable=True)
    running = ordered.cumsum(1)
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        share = (low + high) / 2
        gone = running <= share * running[:, -1:]
        achieved = float(gone.float().mean())
        if abs(achieved - sparsity) <= TOLERANCE:
            break
        low, high = (share, high) if achieved < sparsity else (low, share)
    return torch.ones_like(gone).scatter_(1, places, ~gone)
