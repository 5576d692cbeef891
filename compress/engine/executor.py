"""Who does the work of a stage: this process alone, or as one of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from compress.calibration.shares import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.shares import Shares
    from compress.calibration.statistics import Statistics
    from compress.engine.ledger import MemoryLedger, Record
    from compress.engine.parcels import Carrier

Work = TypeVar("Work")
Done = TypeVar("Done")


class Executor(Protocol):
    """Shares the work of a stage among processes.

    All of them run the same program. Whoever calls a method here calls it in every process, in the same order.

    Attributes:
        rank: the number of this process, from 0.
        world: how many processes there are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def shard(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """The batches that this process runs, of samples that stand one behind the other.

        Raises:
            DataError: there are fewer samples than processes.
        """

    def shares(self, held: int | None = None) -> Shares:
        """How the samples of a step are shared. `held`: how many this process holds, where no other one holds them."""

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors the sums of those of all processes, in place, added in rank order: gradients, for one."""

    def reduce(self, seen: dict[str, Statistics]) -> None:
        """Make the statistics of every site those of all processes' batches, in place, summed up in rank order."""

    def map(
        self,
        solve: Callable[[Work], Done],
        work: Iterable[Work],
        carrier: Carrier[Done],
        cost: Callable[[Work], float] = lambda _: 1.0,
    ) -> Iterator[Done]:
        """What `solve` makes of each piece of work, in order.

        Args:
            solve: is called for each piece in one process, no earlier than it is needed.
            work: the pieces.
            carrier: takes what was made to the other processes.
            cost: how long a piece takes, in any unit.
        """

    def map_to_first(
        self,
        solve: Callable[[Work], Done],
        work: Iterable[Work],
        carrier: Carrier[Done],
        cost: Callable[[Work], float] = lambda _: 1.0,
    ) -> Iterator[Done]:
        """The same as `map` for process 0; others are given nothing, and run through it all the same."""

    def gathered(self, value: Any) -> list[Any]:
        """What every process says, in rank order; something that JSON holds."""

    def told(self, value: Any) -> Any:
        """What process 0 says; something that JSON holds."""

    def commit(self, ledger: MemoryLedger, unit: str, key: str, records: list[Record]) -> list[Record]:
        """Put a finished unit into the ledger, once; every process is given the records as they are kept there."""


@dataclass(frozen=True)
class SingleProcess(Executor):
    """This process does everything."""

    rank: int = 0
    world: int = 1

    def shard(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        return batches

    def shares(self, held: int | None = None) -> Shares:
        return ALONE

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to add: there is one of each."""

    def reduce(self, seen: Mapping[str, Statistics]) -> None:
        """Nothing to add: all batches ran here."""

    def map(
        self,
        solve: Callable[[Work], Done],
        work: Iterable[Work],
        carrier: Carrier[Done],
        cost: Callable[[Work], float] = lambda _: 1.0,
    ) -> Iterator[Done]:
        return map(solve, work)

    def map_to_first(
        self,
        solve: Callable[[Work], Done],
        work: Iterable[Work],
        carrier: Carrier[Done],
        cost: Callable[[Work], float] = lambda _: 1.0,
    ) -> Iterator[Done]:
        return map(solve, work)

    def gathered(self, value: Any) -> list[Any]:
        return [value]

    def told(self, value: Any) -> Any:
        return value

    def commit(self, ledger: MemoryLedger, unit: str, key: str, records: list[Record]) -> list[Record]:
        return ledger.commit(unit, key, records)
