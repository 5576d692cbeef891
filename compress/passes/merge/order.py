"""Order statistics of vectors too long for memory, exactly, a piece at a time.

A sample brackets the wanted element; one more sweep counts what lies above the bracket and keeps what lies in it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LEAST_SAMPLE, MOST_SAMPLE = 1 << 16, 1 << 20
DEVIATIONS = 6.0  # of a rank in a sample, on either side


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
    """Which elements of a tensor are kept: all above a value, and those equal to it that stand before a place."""

    value: float
    before: int

    def keeps(self, values: Tensor, start: int) -> Tensor:
        """(n,) bool for a piece (n,) that begins at `start`."""
        if self.before >= start + len(values):
            return values >= self.value
        kept = values > self.value
        if self.before > start:
            head = self.before - start
            kept[:head] |= values[:head] == self.value
        return kept


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
Parts = Callable[[], Iterator[Sequence[Tensor]]]  # a piece of every vector at a time, in order


def kept_of(share: float, total: int) -> int:
    """How many elements a share of them is: at least one, unless it is none."""
    return min(total, max(1, int(share * total))) if share > 0 else 0


def limits(parts: Parts, total: int, counts: Sequence[int]) -> list[Limit]:
    """Which elements of each of several vectors are its `counts[i]` largest; of equal ones the first.

    Arguments as of `kth_largest`.
    """
    searched = [i for i, k in enumerate(counts) if 0 < k < total]
    found = {i: Limit(-math.inf, total) if k else Limit(math.inf, 0) for i, k in enumerate(counts)}
    if searched:
        chosen: Parts = lambda: ([pieces[i] for i in searched] for pieces in parts())  # noqa: E731
        for i, rank in zip(searched, kth_largest(chosen, total, [counts[i] for i in searched]), strict=True):
            found[i] = Limit(rank.value, total)
            if rank.above + rank.equal > counts[i]:
                found[i] = Limit(rank.value, _place(parts, i, rank.value, counts[i] - rank.above))
    return [found[i] for i in range(len(counts))]


def _place(parts: Parts, number: int, value: float, count: int) -> int:
    """Where the `count`-th element that equals a value stands, counted from 1."""
    begin = 0
    for pieces in parts():
        places = (pieces[number] == value).nonzero()
        if len(places) >= count:
            return begin + int(places[count - 1]) + 1
        count -= len(places)
        begin += len(pieces[number])
    return begin


def kth_largest(parts: Parts, total: int, wanted: Sequence[int]) -> list[Rank]:
    """Of several vectors at once, each its `wanted[i]`-th largest element, counted from 1.

    Args:
        parts: gives a piece of every vector; it is called two times, more often where a sample misleads.
        total: elements of every vector.
        wanted: one for each.
    """
    size = min(max(total // 64, LEAST_SAMPLE), MOST_SAMPLE)
    searches = [_Search(total, k) for k in wanted]
    for search, sample in zip(searches, _samples(parts, -(-total // size), len(wanted)), strict=True):
        search.bracket(sample)
    while any(search.found is None for search in searches):
        for pieces in parts():
            for search, values in zip(searches, pieces, strict=True):
                search.see(values)
        for search in searches:
            search.conclude()
    return [search.found for search in searches if search.found is not None]


def _samples(parts: Parts, step: int, count: int) -> list[Tensor]:
    """Every `step`-th element of every vector, sorted."""
    taken: list[list[Tensor]] = [[] for _ in range(count)]
    begin = 0
    for pieces in parts():
        for values, kept in zip(pieces, taken, strict=True):
            kept.append(values[-begin % step :: step].clone())
        begin += len(pieces[0]) if pieces else 0
    return [torch.cat(kept).sort().values for kept in taken]


class _Search:
    """For one element: between which values it lies, and what was seen there."""

    def __init__(self, total: int, k: int):
        self.total, self.k = total, k
        self.low, self.high = -math.inf, math.inf
        self.found: Rank | None = None
        self._forget()

    def _forget(self) -> None:
        self.above = self.at_low = self.at_high = 0
        self.inside: list[Tensor] = []

    def bracket(self, sample: Tensor) -> None:
        """Guess between which values it is."""
        share = 1 - (self.k - 0.5) / self.total
        place, count = share * len(sample), len(sample)
        margin = 1 if count == self.total else 2 + DEVIATIONS * math.sqrt(count * share * (1 - share))
        first, last = math.floor(place - margin), math.ceil(place + margin)
        self.low = float(sample[first]) if first >= 0 else -math.inf
        self.high = float(sample[last]) if last < count else math.inf

    def see(self, values: Tensor) -> None:
        """Count a piece."""
        if self.found is not None:
            return
        over, under = values >= self.high, values <= self.low
        larger = int((values > self.high).sum())
        self.above += larger
        self.at_high += int(over.sum()) - larger
        self.at_low += int((values == self.low).sum())
        self.inside.append(values[~(over | under)])

    def conclude(self) -> None:
        """The element, if it was between the values; else where to look next."""
        if self.found is not None:
            return
        inside, k = torch.cat(self.inside), self.k
        to_high = self.above + self.at_high
        to_low = to_high + len(inside)
        if k <= self.above:
            self.low, self.high = self.high, math.inf
        elif k <= to_high:
            self.found = Rank(self.high, self.above, self.at_high)
        elif k <= to_low:
            value = inside.kthvalue(len(inside) - (k - to_high) + 1).values
            self.found = Rank(float(value), to_high + int((inside > value).sum()), int((inside == value).sum()))
        elif k <= to_low + self.at_low:
            self.found = Rank(self.low, to_low, self.at_low)
        else:
            self.low, self.high = -math.inf, self.low
        self._forget()
