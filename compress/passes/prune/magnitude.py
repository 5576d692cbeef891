"""Magnitude pruning, one matrix at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Lt

from compress.passes.base import Edit, LinearPass, OptionError, Override
from compress.passes.prune.allocation import SPREAD, Allocate, allocation_facts, shares
from compress.passes.prune.selection import (
    Sparsity,
    check_sparsity,
    keep_pattern,
    keep_rows,
    masked_out,
    pattern,
    pattern_misfit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from compress.calibration.statistics import Need
    from compress.passes.base import Target


@dataclass(frozen=True, kw_only=True)
class Pruner(LinearPass):
    """A pass that zeroes weights of one matrix.

    Args:
        sparsity: share of zeros in every row, or "keep:of" such as "2:4" (keep 2 of every 4 neighbouring columns).
        allocate: which layers lose more than others, for the same share over all of them. `uniform`: none; `global`:
            those whose scores are small beside the others'; `owl`: blocks with few outliers among |w| * ||x||;
            `alphapruning`: blocks whose spectra have light tails; `farms`: likewise, whatever the shapes of matrices.
        allocate_by: `block` gives all layers of a block the same share, `site` each its own.
        spread: how far apart shares are, for owl (0.08), alphapruning and farms (0.2, or half as far as exponents are
            where that is less).
    """

    sparsity: Sparsity = 0.5
    allocate: Allocate = "uniform"
    allocate_by: Literal["block", "site"] = "block"
    spread: Annotated[float, Ge(0), Lt(1)] | None = None

    by_inputs: ClassVar[bool] = True  # ranks weights by the size of their inputs too

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from check_sparsity(self.sparsity)
        if self.allocate != "uniform" and isinstance(self.sparsity, str):
            yield OptionError("allocate", f"cannot be combined with {self.sparsity}, which is the same everywhere")
        if self.spread is not None and self.allocate not in SPREAD:
            yield OptionError("spread", f"changes nothing with allocate: {self.allocate}")

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        for i, override in enumerate(self.overrides):
            for option in ("allocate", "allocate_by", "spread", *(("sparsity",) if self.surveys else ())):
                if option in override.options:
                    yield OptionError(
                        f"overrides[{i}].{option}",
                        "shares are allocated over all layers of the pass; use two passes with include and exclude",
                    )

    @property
    def surveys(self) -> bool:
        return self.allocate != "uniform"

    @property
    def survey_needs(self) -> Need:
        return "norm" if self.allocate == "owl" or (self.allocate == "global" and self.by_inputs) else "none"

    def survey(self, target: Target) -> dict[str, Any]:
        scores = target.weight.abs()
        if target.statistics is not None and self.survey_needs == "norm":
            scores = scores * target.statistics.norm
        return allocation_facts(self.allocate, target.weight, scores)

    def allocated(self, found: Mapping[str, Any]) -> Self:
        assert not isinstance(self.sparsity, str)
        decided = shares(self.allocate, found, self.sparsity, self.allocate_by, self.spread)
        own = (Override(name, {**self.options_at(name), "sparsity": share}) for name, share in decided.items())
        return replace(self, allocate="uniform", spread=None, overrides=(*self.overrides, *own))

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        return pattern_misfit(self.sparsity, shape)

    def produces(self, kind: str) -> str:
        return "sparse"

    def stand_in(self) -> LinearPass:
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
    by_inputs: ClassVar[bool] = False

    @property
    def calibrated(self) -> bool:
        return super().calibrated or self.survey_needs != "none"

    def run(self, target: Target) -> Edit:
        scores = masked_out(target.weight.abs(), target.mask)
        n_of_m = pattern(self.sparsity)
        mask = keep_pattern(scores, *n_of_m) if n_of_m else keep_rows(scores, float(self.sparsity))
        if target.mask is not None:
            mask &= target.mask
        return Edit(weight=target.weight * mask, mask=mask)

    def stand_in(self) -> Self:
        return self
