"""The work of a stage done by several processes, as `torchrun` starts them. See docs/distributed.md."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from compress.calibration.grouped import statistics_for
from compress.calibration.ranges import Range
from compress.calibration.shares import Shares
from compress.engine.executor import Executor
from compress.errors import CompressError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from compress.calibration.statistics import Statistics
    from compress.engine.exchange import Exchange
    from compress.engine.executor import Done, Work
    from compress.engine.ledger import MemoryLedger, Record
    from compress.engine.parcels import Carrier, Parcel

AT_ONCE = 4  # pieces of work for each process, of which the results wait for one another

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class SeveralProcesses(Executor):
    """This process does its share.

    Attributes:
        exchange: with the others.
        local: the number of this process on its machine, from 0.
    """

    exchange: Exchange
    local: int = 0

    @property
    def rank(self) -> int:
        return self.exchange.rank

    @property
    def world(self) -> int:
        return self.exchange.world

    def shard(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of as many batches for each, give or take one, that stand one behind the other.

        A batch is run by one process, as if it were the only one: only where there are fewer than processes are they
        divided, and what comes out of a part may differ in its last digit from what comes out of a whole one.
        """
        samples = sum(map(len, batches))
        if 0 < samples < self.world:
            raise DataError(
                f"{samples} calibration samples cannot be shared by {self.world} processes; give more samples, or "
                "start fewer processes"
            )
        if len(batches) < self.world:
            batches = [sample[None] for batch in batches for sample in batch]
            start, stop = self._own(len(batches))
            return [torch.cat(batches[start:stop])] if batches else []
        start, stop = self._own(len(batches))
        return batches[start:stop]

    def _own(self, count: int) -> tuple[int, int]:
        """The first of so many things that this process takes, and the first that the next one does."""
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def shares(self, held: int | None = None) -> Shares:
        counts = () if held is None else tuple(self.gathered(held))
        return Shares(self.rank, self.world, self.add, counts)

    def add(self, tensors: Sequence[Tensor]) -> None:
        self.exchange.add(tensors)

    def reduce(self, seen: dict[str, Statistics]) -> None:
        """Make the statistics of every site those of all processes' batches, in place, summed up in rank order.

        Raises:
            CompressError: sites share their inputs here, and not there.
        """
        own: dict[int, list[str]] = {}
        for name, found in seen.items():
            own.setdefault(id(found), []).append(name)
        facts = ((names, seen[names[0]]) for names in own.values())
        said = [[names, each.width, each.need, each.groups, each.drifts] for names, each in facts]
        for names, width, need, groups, drifts in _fed_alike(self.gathered(said)):
            mine = next((seen[name] for name in names if name in seen), None)
            mine = mine or statistics_for(width, need, groups=groups, drifts=drifts)
            self.add(list(mine.sums()))
            self._add_facts(mine)
            for name in names:
                seen[name] = mine

    def _add_facts(self, found: Statistics) -> None:
        """What of statistics is no sum of tensors."""
        if found.peak is not None:
            every = self.gathered(found.peak.tolist())
            found.peak = torch.tensor(every, device=found.peak.device).amax(0)
        ranges = [None if found.range is None else found.range.facts()]
        said = self.gathered([found.tokens, *ranges])
        found.tokens = sum(tokens for tokens, _ in said)
        parts = []
        for rank, (_, facts) in enumerate(said):
            if facts is not None:
                mine = found.range.sample if rank == self.rank and found.range else None
                _, sample = self.exchange.carried(None if mine is None else (None, {"": mine}), rank)
                parts.append((facts, sample[""].to(found.square_sum.device)))
        if parts:
            found.range = Range.joined(parts)

    def map(
        self,
        solve: Callable[[Work], Done],
        work: Iterable[Work],
        carrier: Carrier[Done],
        cost: Callable[[Work], float] = lambda _: 1.0,
    ) -> Iterator[Done]:
        for parcel, owner in self._made(solve, work, carrier, cost):
            yield carrier.unpacked(*self.exchange.carried(parcel, owner))

    def map_to_first(
        self,
        solve: Callable[[Work], Done],
        work: Iterable[Work],
        carrier: Carrier[Done],
        cost: Callable[[Work], float] = lambda _: 1.0,
    ) -> Iterator[Done]:
        for parcel, owner in self._made(solve, work, carrier, cost):
            sent = self.exchange.sent_to_first(parcel, owner)
            if sent is not None:
                yield carrier.unpacked(*sent)

    def _made(
        self,
        solve: Callable[[Work], Done],
        work: Iterable[Work],
        carrier: Carrier[Done],
        cost: Callable[[Work], float],
    ) -> Iterator[tuple[Parcel | None, int]]:
        """What this process has made of each piece of work, if it has, and which process has."""
        waiting = iter(work)
        while pieces := list(islice(waiting, AT_ONCE * self.world)):
            owners = dealt([cost(piece) for piece in pieces], self.world)
            mine = {
                i: carrier.packed(solve(piece))
                for i, (piece, owner) in enumerate(zip(pieces, owners, strict=True))
                if owner == self.rank
            }
            for i, owner in enumerate(owners):
                yield mine.pop(i, None), owner

    def gathered(self, value: Any) -> list[Any]:
        return self.exchange.gathered(value)

    def told(self, value: Any) -> Any:
        return self.exchange.told(value)

    def commit(self, ledger: MemoryLedger, unit: str, key: str, records: list[Record]) -> list[Record]:
        return ledger.commit(unit, key, records)


def dealt(costs: Sequence[float], world: int) -> list[int]:
    """Who does each piece of work: the dearest first, each to who has the least to do by then."""
    owners, loads = [0] * len(costs), [0.0] * world
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


Fed = tuple[list[str], int, str, int]


def _fed_alike(said: Sequence[Sequence[Fed]]) -> list[Any]:
    """Sites that share statistics in some process, with their width, need and groups, in an order that all agree on.

    An expert may have seen nothing in one of them.
    """
    groups: list[Any] = []
    of: dict[str, Any] = {}
    for names, *facts in (fed for each in said for fed in each):
        known = {id(of[name]) for name in names if name in of}
        if len(known) > 1:
            raise CompressError(
                f"{' and '.join(names)} were fed by one tensor in one process and by different ones in another: "
                "statistics would be wrong. Models whose wiring changes from batch to batch are not supported"
            )
        if not known:
            groups.append([[], *facts])
        group = next((of[name] for name in names if name in of), groups[-1])
        for name in names:
            if name not in of:
                of[name] = group
                group[0].append(name)
    return groups


__all__ = ["SeveralProcesses", "dealt"]
