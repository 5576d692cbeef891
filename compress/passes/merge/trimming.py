"""Order statistics of vectors too long for memory, exactly, a piece at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from compress.lazy import functional, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """The k-th largest element of a vector.

    Attributes:
        value: of it.
        above: how many elements are larger.
        equal: how many are the same.
    """

    value: float
    above: int
    equal: int


@dataclass(frozen=True)
class Limit:
    """Which magnitudes of a tensor are kept: all above a value, and those equal to it that stand before a place."""

    value: float
    before: int

    def trimmed(self, values: Tensor, start: int) -> Tensor:
        """A piece (n,) that begins at `start`, zero where its magnitudes are not kept."""
        if start < self.before < start + len(values):
            cut = self.before - start
            return torch.cat([self.trimmed(values[:cut], start), self.trimmed(values[cut:], self.before)])
        if self.value <= 0:
            return values
        least = torch.nextafter(torch.tensor(self.value), torch.tensor(0.0))
        return functional.hardshrink(values, float(least) if self.before > start else self.value)


@dataclass(frozen=True)
class Surveyed:
    """Limits of whole models, whose tensors stand one behind the other.

    Attributes:
        limits: one for each model.
        sizes: elements of every tensor, in order.
    """

    limits: list[Limit]
    sizes: Mapping[str, int]

    def of(self, name: str) -> list[Limit]:
        """The same limits for one tensor by itself."""
        names = list(self.sizes)
        before = sum(self.sizes[n] for n in names[: names.index(name)])
        return [Limit(limit.value, limit.before - before) for limit in self.limits]


Scope = Literal["tensor", "model"]  # what is ranked together
ReadVectorParts: TypeAlias = "Callable[[], Iterator[Sequence[Tensor]]]"  # a piece of every vector at a time, in order


def kept_of(share: float, total: int) -> int:
    """How many elements a share of them is: at least one, unless the share is zero."""
    return min(total, max(1, int(share * total))) if share > 0 else 0


def limits(parts: ReadVectorParts, total: int, counts: Sequence[int]) -> list[Limit]:
    """Which elements of each of several vectors are its `counts[i]` largest; of equal ones the first.

    Arguments as of `kth_largest`.
    """
    searched = [i for i, k in enumerate(counts) if 0 < k < total]
    found = {i: Limit(-math.inf, total) if k else Limit(math.inf, 0) for i, k in enumerate(counts)}
    if searched:
        chosen: ReadVectorParts = lambda: ([pieces[i] for i in searched] for pieces in parts())  # noqa: E731
        ranks = kth_largest(chosen, total, [counts[i] for i in searched])
        left = {i: counts[i] - rank.above for i, rank in zip(searched, ranks, strict=True)}
        places = _tie_places(
            parts, {i: (r.value, left[i]) for i, r in zip(searched, ranks, strict=True) if r.equal > left[i]}
        )
        found |= {i: Limit(rank.value, places.get(i, total)) for i, rank in zip(searched, ranks, strict=True)}
    return [found[i] for i in range(len(counts))]


def _tie_places(parts: ReadVectorParts, wanted: Mapping[int, tuple[float, int]]) -> dict[int, int]:
    """Number of a vector, (value, n) -> where the n-th element that equals the value stands, counted from 1."""
    begin, left = 0, {i: n for i, (_, n) in wanted.items()}
    found: dict[int, int] = {}
    for pieces in parts() if wanted else ():
        for i in left.keys() - found.keys():
            equal = pieces[i] == wanted[i][0]
            count = int(torch.count_nonzero(equal))
            if count >= left[i]:
                found[i] = begin + int(equal.nonzero()[left[i] - 1]) + 1
            left[i] -= count
        begin += len(pieces[0])
        if len(found) == len(wanted):
            break
    return found


def kth_largest(parts: ReadVectorParts, total: int, wanted: Sequence[int], signed: bool = False) -> list[Rank]:
    """For several vectors at once, the `wanted[i]`-th largest element, counted from 1.

    The bits of a non-negative float32 order as integers do: a histogram of the upper 16 bits finds the bin, one of the
    lower 16 bits in that bin the element.

    Args:
        parts: gives a piece of every vector; it is called twice.
        total: elements of every vector.
        wanted: one for each.
        signed: there may be negative elements.
    """
    upper = torch.zeros(len(wanted), 1 << 16, dtype=torch.int64)
    for pieces in parts():
        for counts, values in zip(upper, pieces, strict=True):
            counts += torch.bincount((_ordered(values, signed) >> 16) + HALF, minlength=1 << 16)
    smaller = [total - k for k in wanted]  # the element has at most so many below it
    highs = [int(torch.searchsorted(u.cumsum(0), n, right=True)) for u, n in zip(upper, smaller, strict=True)]
    lower = torch.zeros(len(wanted), (1 << 16) + 2, dtype=torch.int64)  # with those below and above the bin
    for pieces in parts():
        for counts, values, high in zip(lower, pieces, highs, strict=True):
            order = _ordered(values, signed)
            inside = (order.long() if signed else order) - ((high - HALF) << 16)  # which for int32 may be too far
            inside = inside.clamp_(-1, 1 << 16).add_(1)
            counts += torch.bincount(inside, minlength=(1 << 16) + 2)
    found = []
    for counts, high, n in zip(lower, highs, smaller, strict=True):
        low = int(torch.searchsorted(counts.cumsum(0), n, right=True))
        found.append(Rank(_value(((high - HALF) << 16) + low - 1), int(counts[low + 1 :].sum()), int(counts[low])))
    return found


HALF = 1 << 15


def _ordered(values: Tensor, signed: bool) -> Tensor:
    """float32 as int32 of the same order."""
    bits = values.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF) if signed else bits


def _value(order: int) -> float:
    """The float32 of a place in that order."""
    return float(torch.tensor(order if order >= 0 else order ^ 0x7FFFFFFF, dtype=torch.int32).view(torch.float32))
