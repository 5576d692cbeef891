"""One choice for each part under a budget of bytes: the multiple-choice knapsack problem.

Every part (a layer, or layers that are bound together) has options with bytes and a loss; losses add up. Bytes are
counted in units that divide what options differ by, so that the best choice for every budget comes out of one table
(dynamic programming). Where that would be too long, units are larger and options rounded up: never above the budget,
and what is left over is then spent option by option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from compress.errors import UsageError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MOST_CELLS = 1 << 17  # different budgets in the table
MOST_CHOICES = 1 << 27  # bytes of the table: a choice for each part and budget


@dataclass(frozen=True)
class Option:
    """What a part may become.

    Attributes:
        size: bytes.
        loss: that it adds to the whole.
    """

    size: int
    loss: float


@dataclass(frozen=True)
class Knapsack:
    """Parts with their options, and the most bytes that any budget will have.

    Attributes:
        parts: the options of each part, in any order.
        most: bytes.
    """

    parts: Sequence[Sequence[Option]]
    most: int

    @cached_property
    def useful(self) -> list[list[int]]:
        """For each part the options that nothing smaller or as small is as good as, from the smallest to the best."""
        return [_useful(options) for options in self.parts]

    @property
    def least(self) -> int:
        """Bytes of the smallest choice."""
        return sum(options[kept[0]].size for options, kept in zip(self.parts, self.useful, strict=True))

    @cached_property
    def _unit(self) -> int:
        """Bytes of a cell. With the greatest common divisor of all differences nothing is rounded."""
        steps = [options[i].size - options[kept[0]].size for options, kept in self._pairs() for i in kept[1:]]
        exact, room = math.gcd(*steps) or 1, max(0, self.most - self.least)
        cells = max(1, min(MOST_CELLS, MOST_CHOICES // max(1, len(self.parts))))
        return exact if room // exact <= cells else -(-room // cells)

    @cached_property
    def _table(self) -> list[Tensor]:
        """For each part, the place among `useful` of its best option for each number of cells: (cells + 1,) uint8."""
        cells = max(0, self.most - self.least) // self._unit
        best = torch.zeros(cells + 1, dtype=torch.float64)
        found = []
        for options, kept in self._pairs():
            first = options[kept[0]]
            now, choice = best + first.loss, torch.zeros(cells + 1, dtype=torch.uint8)
            for place, number in enumerate(kept[1:], start=1):
                cost = -(-(options[number].size - first.size) // self._unit)
                if cost > cells:
                    break
                other = best[: cells + 1 - cost] + options[number].loss
                better = other < now[cost:]
                now[cost:] = torch.where(better, other, now[cost:])
                choice[cost:][better] = place
            best = now
            found.append(choice)
        return found

    def choose(self, budget: int) -> list[int]:
        """The number of the option of each part that makes the least loss within a budget.

        Args:
            budget: bytes, at most `most`.

        Raises:
            UsageError: less than the smallest choice.
        """
        if budget < self.least:
            raise UsageError(f"{budget} bytes are less than the {self.least} of the smallest choice")
        cell = (min(budget, self.most) - self.least) // self._unit
        chosen: list[int] = []
        for choice, (options, kept) in zip(reversed(self._table), reversed(self._pairs()), strict=True):
            number = kept[int(choice[cell])]
            cell -= -(-(options[number].size - options[kept[0]].size) // self._unit)
            chosen.append(number)
        chosen.reverse()
        return self._spent(chosen, budget)

    def _spent(self, chosen: list[int], budget: int) -> list[int]:
        """A choice with what is left of the budget spent where it brings most for its bytes, until nothing fits."""
        left = budget - self.size(chosen)
        while True:
            steps = [
                ((options[now].loss - options[i].loss) / (options[i].size - options[now].size), part, i)
                for part, ((options, kept), now) in enumerate(zip(self._pairs(), chosen, strict=True))
                for i in kept
                if 0 < options[i].size - options[now].size <= left
            ]
            if not steps:
                return chosen
            _, part, best = max(steps, key=lambda step: (step[0], -step[1]))
            left -= self.parts[part][best].size - self.parts[part][chosen[part]].size
            chosen[part] = best

    def size(self, chosen: Sequence[int]) -> int:
        """Bytes of a choice."""
        return sum(options[i].size for options, i in zip(self.parts, chosen, strict=True))

    def loss(self, chosen: Sequence[int]) -> float:
        """Loss of a choice."""
        return math.fsum(options[i].loss for options, i in zip(self.parts, chosen, strict=True))

    def _pairs(self) -> list[tuple[Sequence[Option], list[int]]]:
        return list(zip(self.parts, self.useful, strict=True))


def _useful(options: Sequence[Option]) -> list[int]:
    """Numbers of the options that are not larger than one as good, ordered by size: each is better than the last."""
    found: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].size, options[i].loss, i)):
        if not found or options[i].loss < options[found[-1]].loss:
            found.append(i)
    return found


__all__ = ["Knapsack", "Option"]
