"""EoRA: what compression lost, put back by two thin matrices, where the inputs make it matter most.

Shapes: O rows, I columns, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le, Lt

from compress.encodings import LowRankFactors, LowRankForm, Uniform
from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.base import Edit, LinearPass, OptionError, Override
from compress.passes.compensate.ranks import by_budget, by_energy, too_little
from compress.passes.quantize.gptq import Gptq
from compress.passes.quantize.gptq import solve as gptq
from compress.passes.solvers.whitening import WhitenedMatrix

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.passes.base import Target

A_GROUP = 64  # columns of a quantized A that share a scale, where that divides
VALUE_BITS = 16
SEEN: dict[str, Need] = {"eora": "gram", "activation": "norm", "svd": "none"}  # what a method looks at


@dataclass(frozen=True, kw_only=True)
class Eora(LinearPass):
    """Add B A to every compressed weight: the best correction of that rank for the outputs on calibration data.

    The correction makes up for everything that was lost since the original, pruning and quantization together. It is
    kept beside the weight, which stays masked and packed.

    Source: Liu et al., "EoRA", 2024, arXiv 2410.21271. Differs from the paper in: the Gram matrix is a plain sum over
    all tokens with a floor under its eigenvalues; B is fitted again to the A that is stored; ranks by energy or by a
    budget over all layers are ours.

    Args:
        rank: of every correction, or None where `energy` or `budget` decides.
        energy: the smallest rank that keeps this share of the lost output energy, instead of `rank`.
        budget: bits per weight over all layers of the pass, spent where they bring most, instead of `rank`.
        method: `eora`; or what it is compared with: `activation` scales columns by the norms of their inputs, `svd`
            ignores inputs.
        adapter_bits: 4 or 8 store codes of the factors; None their values in 16 bits.
        floor: under the eigenvalues of the Gram matrix, as a share of the largest.
        bias: also make up for what is lost on the mean input, in the bias of the layer; one without gets one.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> passes = [compress.Rtn(bits=2), compress.Eora(rank=4)]
        >>> result = compress.apply(model, passes, calibration=torch.randn(128, 64))
        >>> result.weights["0"].low_rank.rank
        4
    """

    rank: Annotated[int, Ge(1)] | None = 16
    energy: Annotated[float, Gt(0), Le(1)] | None = None
    budget: Annotated[float, Gt(0)] | None = None
    method: Literal["eora", "activation", "svd"] = "eora"
    adapter_bits: Literal[4, 8] | None = None
    floor: Annotated[float, Gt(0), Lt(1)] = 1e-6
    bias: bool = False

    key: ClassVar[str] = "eora"
    accepts: ClassVar[frozenset[str]] = frozenset({"sparse", "quantized", "sparse-quantized"})
    compares: ClassVar[bool] = True

    @property
    def needs(self) -> Need:
        every = (self, *(replace(self, overrides=(), **o.options) for o in self.overrides))
        return "none" if all(p.method == "svd" and not p.bias for p in every) else "gram"

    @property
    def adds_biases(self) -> bool:
        return self.bias

    @property
    def surveys(self) -> bool:
        return self.budget is not None

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        ways = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(ways) != 1:
            named = " and ".join(ways) or "none"
            yield OptionError(ways[-1] if ways else "rank", f"set one of rank, energy, budget, not {named}")

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        for i, override in enumerate(self.overrides):
            if "budget" in override.options:
                yield OptionError(f"overrides[{i}].budget", "is spent over all layers and cannot differ between them")

    def refusal(self, kind: str) -> str | None:
        if kind.endswith("-compensated"):
            return "they have a correction. Raise its rank instead"
        return super().refusal(kind)

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        if self.rank is not None and self.rank > min(shape):
            return f"rank {self.rank} is more than the {min(shape)} that a {shape[0]} x {shape[1]} matrix has"
        return None

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> OptionError | None:
        costs = {name: self.at(name)._cost(shape) for name, shape in shapes.items()}
        weights = sum(math.prod(shape) for shape in shapes.values())
        reason = None if self.budget is None else too_little(costs, weights, self.budget)
        return OptionError("budget", reason) if reason else None

    def produces(self, kind: str) -> str:
        return f"{kind}-compensated"

    def low_rank_form(self, shape: tuple[int, int]) -> LowRankForm:
        rank = self.rank
        if rank is None:  # decided by data; what a budget comes to on average
            cost = self._cost(shape)
            rank = max(1, min(shape) // 8 if self.budget is None else int(self.budget * math.prod(shape) / cost))
        groups = shape[1] // A_GROUP if self.adapter_bits and shape[1] % A_GROUP == 0 else 1
        return LowRankForm(rank=min(rank, *shape), bits=self.adapter_bits, a_groups=groups)

    def survey(self, target: Target) -> dict[str, Any]:
        try:
            energies = self._lost(target).energies.tolist()
        except SolveError:
            energies = []  # no input ever reached it: nothing to correct
        return {"energies": energies, "shape": list(target.weight.shape)}

    def allocated(self, found: Mapping[str, Any]) -> Self:
        weights = sum(math.prod(f["shape"]) for f in found.values())
        costs = {name: self.at(name)._cost(f["shape"]) for name, f in found.items()}
        assert self.budget is not None
        ranks = by_budget({n: f["energies"] for n, f in found.items()}, costs, self.budget * weights)
        own = (Override(n, {**self.options_at(n), "rank": r, "budget": None}) for n, r in ranks.items() if r)
        without = (name for name, rank in ranks.items() if not rank)
        return replace(self, exclude=(*self.exclude, *without), overrides=(*self.overrides, *own))

    def _cost(self, shape: Sequence[int]) -> int:
        """Stored bits of one more rank, scales not counted."""
        return (self.adapter_bits or VALUE_BITS) * sum(shape)

    def _lost(self, target: Target) -> WhitenedMatrix:
        """Original less compressed weight, seen through the inputs."""
        assert target.original is not None
        lost = target.original.double() - target.weight.double()
        return WhitenedMatrix.through(lost, target.statistics, SEEN[self.method], self.floor)

    def run(self, target: Target) -> Edit:
        lost = self._lost(target)
        rank = self.rank if self.energy is None else by_energy(lost.energies.tolist(), self.energy)
        assert rank is not None
        assert target.original is not None
        rank = min(rank, *target.weight.shape)
        if self.adapter_bits is None:
            made = lost.factors(rank)
        else:
            gram = None if target.statistics is None else target.statistics.gram
            made = _coded(lost, torch.eye(target.weight.shape[1]) if gram is None else gram, rank, self.adapter_bits)
        left = lost.matrix - made.product().double()
        shift = self._shift(left, target) if self.bias else None
        whole = lost.size(target.original.double()) or 1.0
        notes = {"output_error_start": lost.size(lost.matrix) / whole, "output_error": lost.size(left) / whole}
        return Edit(low_rank=made, mask=target.mask, shift=shift, notes=notes)

    def _shift(self, left: Tensor, target: Target) -> Tensor | None:
        """(O,) what is still lost on the mean input; None where none was seen."""
        mean = None if target.statistics is None else target.statistics.mean
        return None if mean is None else (left @ mean).float()

    def stand_in(self) -> Eora:
        return replace(self, method="svd", bias=False, overrides=())


def _coded(lost: WhitenedMatrix, gram: Tensor, rank: int, bits: int) -> LowRankFactors:
    """The best correction of this rank in codes: A rounded, and the B that is best for that rounded too."""
    a = lost.basis(rank).float()
    coded = _gptq(a, gram, bits, A_GROUP if a.shape[1] % A_GROUP == 0 else None)
    made = coded.dequantize()
    return LowRankFactors(coded, _gptq(lost.fitted(made.double()).float(), made @ gram @ made.T, bits, None))


def _gptq(weight: Tensor, gram: Tensor, bits: int, group_size: int | None) -> Uniform:
    grid = Gptq(bits=bits, group_size=group_size, symmetric=True, scale_search="mse")
    codes, scale, zero, _ = gptq(
        weight, gram, bits=bits, group_size=group_size, damping=0.01, act_order=True, tile=128, grid=grid
    )
    return Uniform(codes, scale, zero, bits, symmetric=True)
