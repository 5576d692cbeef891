"""Low rank: two thin matrices in the place of a large one, learned from the outputs of the block.

Shapes: O rows, I columns, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Lt

from compress.calibration.reconstruct import BLOCK_ERROR, Inputs, Recipe, by_block
from compress.encodings import FACTORED, LowRankForm
from compress.encodings import LowRankFactors as Factors
from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.base import BlockPass, Edit, LinearPass, OptionError, Override, Pass
from compress.passes.compensate.ranks import ratios_by_energy
from compress.passes.solvers.whitening import WhitenedMatrix, stored_factor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.passes.base import Block, Target

NEAR = 1e-3  # how far a product may be from its matrix, in the largest sum of a row, before it costs anything


@dataclass(frozen=True, kw_only=True)
class Budget(Pass):
    """How large the factors are.

    Args:
        ratio: numbers in the two factors, as a share of those in the matrix.
    """

    ratio: Annotated[float, Gt(0), Lt(1)] = 0.5

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        if self.rank(shape) >= 1:
            return None
        rows, columns = shape
        least = (rows + columns) / (rows * columns)
        if least >= 1:
            return f"factors of a {rows} x {columns} matrix are no smaller than it is"
        return f"ratio {self.ratio} of a {rows} x {columns} matrix pays for no rank; rank 1 takes {least:.3g}"

    def rank(self, shape: tuple[int, int]) -> int:
        """The largest whose factors are within the ratio."""
        rows, columns = shape
        return int(self.ratio * rows * columns / (rows + columns))

    def low_rank_form(self, shape: tuple[int, int]) -> LowRankForm:
        return LowRankForm(rank=self.rank(shape))

    def produces(self, kind: str) -> str:
        return FACTORED

    def refusal(self, kind: str) -> str | None:
        if kind in self.accepts or kind == FACTORED:
            return super().refusal(kind)
        return f"factors keep neither zeros nor codes. Put {self.key} first and `exclude` its layers later on"

    def factors(self, seen: WhitenedMatrix) -> Factors:
        """The best ones."""
        rows, columns = seen.matrix.shape
        return seen.factors(self.rank((rows, columns)))


@dataclass(frozen=True, kw_only=True)
class LowRank(Budget, BlockPass):
    """Put two thin matrices B A in the place of every matrix, then learn them from the outputs of the block.

    They start as the best ones of their rank for the layer's outputs on calibration data. All of a block are then
    learned together until the block's output is what the original's was.

    Source: Guo et al., "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", 2023, arXiv 2310.10700:
    ranks, feature distillation and the weight perturbation; Wang et al., "SVD-LLM", 2024, arXiv 2403.07378: whitening.
    Differs from the papers in: factors start from the whitened matrix, and S is taken from the eigenvectors of the Gram
    matrix with a floor under its eigenvalues; one block after the other is learned, with inputs from those before it,
    and no task loss; the best iterate on held-out samples is kept; the perturbation is relative to the matrix, and
    costs nothing while it is small.

    Args:
        method: `whitened` factors are best for the layer's outputs on calibration data; `svd` for the matrix alone.
        steps: of learning, per block; 0 keeps the factors as they start.
        batch_size: calibration samples per step.
        learning_rate: of Adam at the start, as a share of the root mean square of a factor; it falls to zero along a
            cosine.
        inputs: what the block is fed while learning: its inputs in the `compressed` model, in the `original`, or an
            element-wise random `mix` of both.
        perturbation: what a distance between product and matrix costs while learning, in the largest sum of a row.
        floor: under the eigenvalues of the Gram matrix, as a share of the largest.
        allocate: `uniform` gives every matrix the same ratio. Otherwise `ratio` is that of all together, and ranks go
            where they keep most for what they cost: of the outputs' `energy` as it is, or `relative` to all that the
            matrix puts out.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> passes = [compress.LowRank(ratio=0.5, steps=2)]
        >>> result = compress.apply(model, passes, calibration=torch.randn(16, 64))
        >>> result.weights["0"].low_rank.rank
        10
    """

    method: Literal["whitened", "svd"] = "whitened"
    steps: Annotated[int, Ge(0)] = 200
    batch_size: Annotated[int, Ge(1)] = 8
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 0.01
    inputs: Inputs = "compressed"
    perturbation: Annotated[float, Ge(0)] = 0.0
    floor: Annotated[float, Gt(0), Lt(1)] = 1e-6
    allocate: Literal["uniform", "energy", "relative"] = "uniform"

    key: ClassVar[str] = "low_rank"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})

    @property
    def needs(self) -> Need:
        methods = {self.method, *(o.options.get("method", self.method) for o in self.overrides)}
        return "gram" if "whitened" in methods else "none"

    @property
    def runs_block(self) -> bool:
        return self.steps > 0

    @property
    def calibrated(self) -> bool:
        return self.runs_block or self.needs != "none"

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        for i, override in enumerate(self.overrides):
            for option in ("steps", "batch_size", "inputs"):
                if option in override.options:
                    yield OptionError(f"overrides[{i}].{option}", "is the same for all layers, which learn together")
            for option in ("allocate", *(("ratio",) if self.surveys else ())):
                if option in override.options:
                    yield OptionError(f"overrides[{i}].{option}", "allocated over all layers of the pass; use two")

    @property
    def surveys(self) -> bool:
        return self.allocate != "uniform"

    def survey(self, target: Target) -> dict[str, Any]:
        seen, notes = self._seen(target)
        energies = seen.energies / (seen.energies.sum() if self.allocate == "relative" else 1.0)
        found = [] if notes else energies.nan_to_num().tolist()  # where nothing arrives, nothing is lost
        return {"energies": found, "shape": list(target.weight.shape)}

    def allocated(self, found: Mapping[str, Any]) -> Self:
        ratios = ratios_by_energy(found, self.ratio)
        own = (Override(name, {**self.options_at(name), "ratio": ratio}) for name, ratio in ratios.items())
        return replace(self, allocate="uniform", overrides=(*self.overrides, *own))

    def run(self, block: Block) -> Iterator[tuple[str, Edit]]:
        learned = _FactoredBlock({name: self.at(name).start(target) for name, target in block.targets.items()})
        notes: dict[str, float] = {}
        if block.data is not None:
            recipe = Recipe(self.steps, self.batch_size, self.inputs)
            notes = by_block(learned, block.data, recipe, block.generator, block.over, block.kept).notes(BLOCK_ERROR)
        for name, matrix in learned.matrices.items():
            yield name, Edit(low_rank=matrix.factors(), replaces=True, notes={**matrix.notes, **notes})

    def start(self, target: Target) -> _FactoredMatrix:
        """One matrix as it is before anything is learned."""
        seen, notes = self._seen(target)
        made = self.factors(seen)
        notes["output_error_start"] = seen.size(seen.matrix - made.product().double()) / (seen.size(seen.matrix) or 1.0)
        return _FactoredMatrix(target.weight, made, self.learning_rate, self.perturbation, notes)

    def _seen(self, target: Target) -> tuple[WhitenedMatrix, dict[str, float]]:
        """The matrix, seen as `method` does, and what the report says of that."""
        need: Need = "gram" if self.method == "whitened" else "none"
        weight = target.weight.double()
        try:
            return WhitenedMatrix.through(weight, target.statistics, need, self.floor), {}
        except SolveError:  # nothing ever reached it, so there is nothing to be best for
            return WhitenedMatrix.through(weight, None, "none", self.floor), {"dead_inputs": float(weight.shape[1])}

    def stand_in(self) -> Svd:
        return Svd(ratio=self.ratio)


@dataclass(frozen=True, kw_only=True)
class Svd(Budget, LinearPass):
    """The factors that are nearest to the matrix itself, which need no data."""

    key: ClassVar[str] = "svd"
    accepts: ClassVar[frozenset[str]] = LowRank.accepts

    def run(self, target: Target) -> Edit:
        return Edit(
            low_rank=self.factors(WhitenedMatrix.through(target.weight.double(), None, "none", 0.0)), replaces=True
        )


class _FactoredMatrix:
    """One matrix being learned."""

    def __init__(self, weight: Tensor, start: Factors, rate: float, perturbation: float, notes: Mapping[str, float]):
        self.weight, self.rate, self.perturbation, self.notes = weight, rate, perturbation, notes
        self.tensors = [f.clone().requires_grad_() for f in start.factors()]

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Either factor, with a learning rate of its own size."""
        return [([t], self.rate * float(t.detach().square().mean().sqrt())) for t in self.tensors]

    def product(self) -> Tensor:
        """(O, I), differentiable."""
        a, b = self.tensors
        return b @ a

    def factors(self) -> Factors:
        """The factors as they would be stored now."""
        a, b = (stored_factor(t.detach()) for t in self.tensors)
        return Factors(a, b)

    def strayed(self) -> Tensor:
        """What its distance from the matrix costs. A gradient reaches the one row that is farthest."""
        largest = (self.product() - self.weight).abs().sum(1).max() / self.weight.abs().sum(1).max().clamp(min=1e-30)
        return self.perturbation * (largest - NEAR).clamp(min=0).square()


@dataclass(frozen=True)
class _FactoredBlock:
    """The matrices of a block as one thing to learn."""

    matrices: Mapping[str, _FactoredMatrix]

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [group for m in self.matrices.values() for group in m.groups()]

    def soft(self, progress: float) -> dict[str, Tensor]:
        return {name: m.product() for name, m in self.matrices.items()}

    def hard(self) -> dict[str, Tensor]:
        return {name: m.factors().product() for name, m in self.matrices.items()}

    def penalty(self, progress: float) -> Tensor | None:
        found = [m.strayed() for m in self.matrices.values() if m.perturbation]
        return torch.stack(found).sum() / len(self.matrices) if found else None

    def after(self) -> None:
        """Nothing follows a step."""
