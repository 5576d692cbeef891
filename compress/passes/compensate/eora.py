"""EoRA: what compression lost, put back by two thin matrices, where the inputs make it matter most.

Shapes: O rows, I columns, r rank.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from compress.calibration.statistics import Need, Statistics
from compress.encodings import LowRank, LowRankForm, Uniform
from compress.errors import SolveError
from compress.passes.base import Edit, LinearPass, OptionError, Override, Target
from compress.passes.compensate.ranks import by_budget, by_energy, too_little
from compress.passes.quantize.gptq import Gptq
from compress.passes.quantize.gptq import solve as gptq

A_GROUP = 64  # columns of a quantized A that share a scale, where that divides
ADAPTER_BITS = (4, 8)
VALUE_BITS = 16
SMALLEST, LARGEST = 1e-3, 6e4  # largest numbers of a factor that float16 holds with all its digits


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
        budget: bits a weight over all layers of the pass, spent where they bring most, instead of `rank`.
        method: `eora`; or what it is compared with: `activation` scales columns by the mean size of their inputs, `svd`
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

    rank: int | None = 16
    energy: float | None = None
    budget: float | None = None
    method: Literal["eora", "activation", "svd"] = "eora"
    adapter_bits: int | None = None
    floor: float = 1e-6
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
        if self.rank is not None and self.rank < 1:
            yield OptionError("rank", f"{self.rank} is not a positive number")
        if self.energy is not None and not 0 < self.energy <= 1:
            yield OptionError("energy", f"{self.energy} is not a share above 0 up to 1")
        if self.budget is not None and self.budget <= 0:
            yield OptionError("budget", f"{self.budget} is not a positive number of bits a weight")
        if len(ways) != 1:
            named = " and ".join(ways) or "none"
            yield OptionError(ways[-1] if ways else "rank", f"set one of rank, energy, budget, not {named}")
        if self.adapter_bits is not None and self.adapter_bits not in ADAPTER_BITS:
            yield OptionError("adapter_bits", f"{self.adapter_bits} is not 4 or 8")
        if not 0 < self.floor < 1:
            yield OptionError("floor", f"{self.floor} is not between 0 and 1")

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
            energies = _Problem.of(target, self.method, self.floor).energies.tolist()
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

    def run(self, target: Target) -> Edit:
        problem = _Problem.of(target, self.method, self.floor)
        rank = self.rank if self.energy is None else by_energy(problem.energies.tolist(), self.energy)
        assert rank is not None
        made = problem.best(min(rank, *target.weight.shape), self.adapter_bits)
        shift = problem.shift(made) if self.bias else None
        notes = {"output_error_start": problem.error(None), "output_error": problem.error(made, shift)}
        return Edit(low_rank=made, mask=target.mask, shift=shift, notes=notes)

    def fallback(self) -> "Eora":
        return replace(self, method="svd", bias=False, overrides=())


@dataclass(frozen=True)
class _Problem:
    """Minimise ||(lost - B A) S||, S S^T = H: what was lost, seen through the inputs.

    Attributes:
        lost: (O, I) float64, original less compressed weight.
        root, inverse: (I, I) or (1, I) float64, S and S^-1; a row for diagonal ones.
        right: (I, r) float64, orthonormal right singular vectors of lost @ root, largest first.
        energies: (r,) float64, squared singular values, largest first.
        statistics: of the inputs; None where they do not matter.
        size: ||original S||^2, to compare errors with.
    """

    lost: Tensor
    root: Tensor
    inverse: Tensor
    right: Tensor
    energies: Tensor
    statistics: Statistics | None
    size: float

    @classmethod
    def of(cls, target: Target, method: str, floor: float) -> Self:
        assert target.original is not None
        statistics = target.statistics
        lost = target.original.double() - target.weight.double()
        if method == "svd":
            root = inverse = torch.ones(1, lost.shape[1], dtype=torch.float64)
        elif statistics is None or statistics.gram is None or not bool(statistics.square_sum.any()):
            raise SolveError("no input ever reached this layer")
        elif method == "activation":
            assert statistics.mean_size is not None
            root = statistics.mean_size[None]
            root = root.clamp(min=math.sqrt(floor) * float(root.max()))
            inverse = 1 / root
        else:
            root, inverse = roots(statistics, floor)
        seen = _times(lost, root)
        small = seen.T @ seen if seen.shape[1] <= seen.shape[0] else seen @ seen.T
        values, vectors = torch.linalg.eigh(small)
        energies, vectors = values.flip(0).clamp_(min=0), vectors.flip(1)
        if seen.shape[1] > seen.shape[0]:  # left singular vectors: turn them round
            vectors = seen.T @ vectors / energies.sqrt().clamp(min=1e-300)
        size = float(_times(target.original.double(), root).square().sum())
        return cls(lost, root, inverse, vectors, energies, statistics, size or 1.0)

    def best(self, rank: int, bits: int | None) -> LowRank:
        """The correction of this rank: A as it will be stored, and the B that is best for that."""
        a = _times(self.right[:, :rank].T, self.inverse)
        a = a / a.abs().amax(1, keepdim=True).clamp(min=1e-300)  # B takes the size: both fit 16 bits
        if bits is None:
            first = _stored(a)
            return LowRank(first, _stored(self._fitted(first.double())))
        seen = None if self.statistics is None else self.statistics.gram
        gram = torch.eye(a.shape[1]) if seen is None else seen
        coded = _gptq(a.float(), gram, bits, A_GROUP if a.shape[1] % A_GROUP == 0 else None)
        made = coded.dequantize()
        return LowRank(coded, _gptq(self._fitted(made.double()).float(), made @ gram @ made.T, bits, None))

    def _fitted(self, a: Tensor) -> Tensor:
        """(O, r) the B that loses least with an A (r, I)."""
        solution: Tensor = torch.linalg.lstsq(_times(a, self.root).T, _times(self.lost, self.root).T, driver="gelsd")[0]
        return solution.T

    def shift(self, made: LowRank) -> Tensor | None:
        """(O,) what is still lost on the mean input; None where none was seen."""
        if self.statistics is None or self.statistics.mean is None:
            return None
        return ((self.lost - made.product().double()) @ self.statistics.mean).float()

    def error(self, made: LowRank | None, shift: Tensor | None = None) -> float:
        """||(lost - B A) S|| / ||original S||, less what a shift of all outputs makes up for."""
        left = self.lost if made is None else self.lost - made.product().double()
        square = float(_times(left, self.root).square().sum())
        if shift is not None and self.statistics is not None:
            square -= self.statistics.tokens * float(shift.double().square().sum())
        return math.sqrt(max(0.0, square) / self.size)


def roots(statistics: Statistics, floor: float) -> tuple[Tensor, Tensor]:
    """S and its inverse, (I, I) float64, of H = S S^T, in the eigenspace of H."""
    values, vectors = statistics.eigen
    scale = values.clamp(min=floor * float(values[-1])).sqrt()
    return vectors * scale, (vectors / scale).T


def _times(matrix: Tensor, root: Tensor) -> Tensor:
    """Matrix @ root, where a root of one row is diagonal."""
    return matrix * root if len(root) == 1 else matrix @ root


def _stored(factor: Tensor) -> Tensor:
    """A factor in 16 bits, unless its size does not fit them."""
    largest = float(factor.abs().max())
    return factor.half() if largest == 0 or SMALLEST <= largest <= LARGEST else factor.float()


def _gptq(weight: Tensor, gram: Tensor, bits: int, group_size: int | None) -> Uniform:
    grid = Gptq(bits=bits, group_size=group_size, symmetric=True, scale_search="mse")
    codes, scale, zero, _ = gptq(
        weight, gram, bits=bits, group_size=group_size, damping=0.01, act_order=True, tile=128, grid=grid
    )
    return Uniform(codes, scale, zero, bits, symmetric=True)
