"""How processes that learn the same thing share the samples of every step.

Every process draws the same numbers of samples and takes its own of them; what they lose and the gradients of that are
summed up in the order of the processes, so that all of them take the same step.

Shapes: B samples of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def _nothing(tensors: Sequence[Tensor]) -> None:
    """One process has every sum already."""


@dataclass(frozen=True)
class Shares:
    """What one of several processes does of a step.

    Attributes:
        rank: the number of this process, from 0.
        world: how many processes there are.
        add: makes tensors the sums of those of all processes, in place, added in the order of the processes.
        counts: how many samples each process holds, where each holds other ones: those of the first come first. Empty
            where all hold all of them.
    """

    rank: int = 0
    world: int = 1
    add: Callable[[Sequence[Tensor]], None] = _nothing
    counts: tuple[int, ...] = ()

    @property
    def leads(self) -> bool:
        """Whether this process adds what depends on no sample, and counts once."""
        return self.rank == 0

    @property
    def first(self) -> int:
        """The number of the first sample that this process holds."""
        return sum(self.counts[: self.rank])

    def own(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some samples this process takes.

        Args:
            numbers: (B,) of samples, as all processes together count them.

        Returns:
            Their numbers as this process counts those that it holds, and their places in `numbers`.
        """
        if not self.counts:
            places = torch.arange(self.rank, len(numbers), self.world, device=numbers.device)
            return numbers[places], places
        start, stop = [0, *accumulate(self.counts)][self.rank : self.rank + 2]
        places = ((numbers >= start) & (numbers < stop)).nonzero()[:, 0]
        return numbers[places] - start, places

    def backward(self, value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Set the gradients of a sum over all processes.

        Args:
            value: the part of this process, a scalar; one that depends on nothing learned where it takes no sample.
            tensors: what is learned.

        Returns:
            The sum, detached.
        """
        if value.requires_grad:
            torch.autograd.backward(value, inputs=list(tensors))
        total = value.detach()
        if self.world > 1:
            total = total.clone()
            for tensor in tensors:
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
            self.add([*(t.grad for t in tensors if t.grad is not None), total])
        return total

    def total(self, value: float) -> float:
        """The sum over all processes of a number that each has found of its samples."""
        if self.world == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64, device="cpu")
        self.add([found])
        return float(found)


ALONE = Shares()


class Together(Protocol):
    """Processes that measure something together.

    Attributes:
        rank: the number of this process, from 0.
        world: how many processes there are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gathered(self, value: Any) -> list[Any]:
        """What every process says, in the order of the processes; something that JSON holds."""


class _Lone(Together):
    """One process, which measures everything."""

    rank: int = 0
    world: int = 1

    def gathered(self, value: Any) -> list[Any]:
        return [value]


LONE = _Lone()

__all__ = ["ALONE", "LONE", "Shares", "Together"]
