"""A fine-tune's delta as few signs and a scale.

Shapes: n elements of a piece, N of a tensor, or of the whole model with `scope: model`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.encodings.signs import Signs
from compress.errors import NonFiniteError, OptionError
from compress.lazy import torch
from compress.passes.merge.delta_pass import DeltaPass
from compress.passes.merge.schedules import PerModel, Value, values_at
from compress.passes.merge.ties import magnitudes
from compress.passes.merge.trimming import Scope, Surveyed, kept_of, limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.passes.merge.base import Piece, Pieces
    from compress.passes.merge.trimming import Limit


@dataclass(frozen=True)
class KeptDelta:
    """What is kept of one tensor's delta.

    Attributes:
        limit: which entries.
        scale: what each of them becomes, with its sign; a bfloat16.
    """

    limit: Limit
    scale: float


@dataclass(frozen=True, kw_only=True)
class Compeft(DeltaPass):
    """The base plus the signs of a fine-tune's largest changes, one scale per tensor: about one bit per parameter.

    Source: Yadav et al., "ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and
    Quantization", 2023, arXiv 2311.13171, section 2. Differs from the paper in: by default what is kept makes up for
    the length of what is not (`magnitude: std` is the paper); exactly the share that is asked for is kept; the scale
    is a bfloat16, one for each tensor.

    Args:
        density: share of entries that are kept, the largest.
        magnitude: that kept entries are given. `l2`: so large that the delta is as long as it was; `std`: the standard
            deviation of all entries before any is trimmed; `mean`: of the kept ones of each tensor, which is closest to
            what they were.
        alpha: what it is multiplied with.
        scope: what is trimmed together, and what `l2` and `std` are taken of: the whole `model`, or each `tensor` by
            itself.
        factors: the fine-tune is a LoRA adapter, and what is coded are its factors A and B instead of what their
            product adds to weights: a much smaller file. Each factor is taken by itself whatever `scope` says, as one
            may be made longer and the other shorter without a change of the product; both are multiplied with `alpha`.
            Biases, norms and whatever else was trained whole stay as they are.

    Example:
        >>> import torch
        >>> from compress import Compeft
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.zeros(4), (torch.tensor([3.0, 0.1, -1.0, 0.2]),), total=4)
        >>> compeft = Compeft(models=("tuned",), density=0.5, magnitude="mean", scope="tensor")
        >>> compeft.run(piece, compeft.look(lambda: iter([piece]), None))
        tensor([ 2.,  0., -2.,  0.])
    """

    density: PerModel = 0.3
    magnitude: Literal["l2", "std", "mean"] = "l2"
    alpha: Value = 1.0
    scope: Scope = "model"
    factors: bool = False

    key: ClassVar[str] = "compeft"
    common: ClassVar[frozenset[str]] = DeltaPass.common | {"factors"}
    coding: ClassVar[Literal["rice", "bits"]] = "rice"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        yield from self.within("density", 0, 1)
        yield from self.of_whole_models("density")
        if self.factors:
            yield from self._check_factors()

    def _check_factors(self) -> Iterator[OptionError]:
        """What says something of tensors of the model, where those of an adapter are coded."""
        for option in ("density", "alpha"):
            if not isinstance(getattr(self, option), int | float):
                yield OptionError(option, "is for all factors with factors: true; give one number")
        for option, plain in (("include", ()), ("exclude", ()), ("overrides", ()), ("vocabulary", "refuse")):
            if getattr(self, option) != plain:
                yield OptionError(option, "chooses tensors of the model, and with factors: true the adapter is coded")
        if self.choose:
            yield OptionError("choose", "tries merges of weights; with factors: true give the values")

    @property
    def codes_factors(self) -> bool:
        return self.factors

    @property
    def surveys(self) -> bool:
        return self.scope == "model" and not self.factors

    def survey(self, everything: Pieces, sizes: Mapping[str, int]) -> tuple[Surveyed, float]:
        total = sum(sizes.values())
        count = kept_of(values_at(self.density, 1, "", 0.0, 0.3)[0], total)
        limit = limits(lambda: magnitudes(everything), total, [count])
        return Surveyed(limit, sizes), self._level(everything, count)

    def look(self, tensor: Pieces, found: tuple[Surveyed, float] | None) -> KeptDelta:
        first = next(tensor())
        if found is not None:
            limit, level = found[0].of(first.name)[0], found[1]
        else:
            count = kept_of(self.of_each(self.density, first, 0.3)[0], first.total)
            limit = limits(lambda: magnitudes(tensor), first.total, [count])[0]
            level = self._level(tensor, count)
        if self.magnitude == "mean":
            level = mean_of_kept(tensor, limit)
        return KeptDelta(
            limit, float(torch.tensor(level * self.at_piece(self.alpha, first, 1.0), dtype=torch.bfloat16))
        )

    def _level(self, pieces: Pieces, kept: int) -> float:
        """What `l2` and `std` give every one of so many entries that are kept."""
        if self.magnitude == "mean":
            return 0.0
        sums = Sums.of(pieces)
        return sums.deviation if self.magnitude == "std" else math.sqrt(sums.squares / max(1, min(kept, sums.changed)))

    def code(self, piece: Piece, facts: KeptDelta) -> Signs:
        kept = facts.limit.trimmed(next(piece.deltas()), piece.start)
        return Signs(torch.tensor([facts.scale]), kept.sign().to(torch.int8)[None])


def mean_of_kept(pieces: Pieces, limit: Limit) -> float:
    """The mean magnitude of entries that are kept and not zero: the scale of their signs with the least error."""
    total, count = 0.0, 0
    for piece in pieces():
        kept = limit.trimmed(next(piece.deltas()), piece.start)
        total += float(kept.abs().sum(dtype=torch.float64))
        count += int(torch.count_nonzero(kept))
    return total / count if count else 0.0


@dataclass
class Sums:
    """Over all entries of a delta.

    Attributes:
        count: of entries.
        changed: how many are not zero.
        total: their sum.
        squares: the sum of their squares.
    """

    count: int = 0
    changed: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, pieces: Pieces) -> Sums:
        """Add everything up.

        Raises:
            NonFiniteError: an entry is NaN or infinity, which would be in every tensor then.
        """
        sums = cls()
        for piece in pieces():
            delta: Tensor = next(piece.deltas()).double()
            sums.count += len(delta)
            sums.changed += int(torch.count_nonzero(delta))
            sums.total += float(delta.sum())
            sums.squares += float(delta.square().sum())
            if not math.isfinite(sums.squares):
                raise NonFiniteError(f"the delta of {piece.name} holds NaN or infinity; get a clean checkpoint")
        return sums

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return math.sqrt(max(0.0, self.squares / self.count - (self.total / self.count) ** 2)) if self.count else 0.0
