"""Who does the work of a stage: this process alone, or as one of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.statistics import Statistics
    from compress.engine.ledger import MemoryLedger, Record

Work = TypeVar("Work")
Done = TypeVar("Done")


class Executor(Protocol):
    """Shares the work of a stage among processes.

    Attributes:
        rank: the number of this process, from 0.
        world: how many processes there are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def shard(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """The calibration batches that this process runs."""

    def reduce(self, seen: Mapping[str, Statistics]) -> None:
        """Make the statistics of every site those of all processes' batches, in place, summed up in rank order."""

    def map(self, solve: Callable[[Work], Done], work: Iterable[Work]) -> Iterator[Done]:
        """What `solve` makes of each piece of work, in order; a piece is drawn no earlier than it is needed."""

    def commit(self, ledger: MemoryLedger, unit: str, key: str, records: list[Record]) -> list[Record]:
        """Put a finished unit into the ledger, once; every process is given the records as they are kept there."""


@dataclass(frozen=True)
class SingleProcess(Executor):
    """This process does everything."""

    rank: int = 0
    world: int = 1

    def shard(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        return batches

    def reduce(self, seen: Mapping[str, Statistics]) -> None:
        """Nothing to add: all batches ran here."""

    def map(self, solve: Callable[[Work], Done], work: Iterable[Work]) -> Iterator[Done]:
        return map(solve, work)

    def commit(self, ledger: MemoryLedger, unit: str, key: str, records: list[Record]) -> list[Record]:
        return ledger.commit(unit, key, records)
