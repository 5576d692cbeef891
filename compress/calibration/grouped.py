"""Running sums over the inputs of a convolution in groups: each group of its rows multiplies inputs of its own.

Shapes: T places, I columns of the matrix, G groups; windows over all channels have G * I columns, group after group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.calibration.precision import products
from compress.calibration.statistics import Statistics
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.calibration.statistics import Need


class GroupedStatistics(Statistics):
    """Sums over the inputs of every group, with one Gram matrix for each.

    Attributes:
        groups: G.
    """

    def __init__(self, width: int, need: Need, device: torch.device | None, groups: int):
        """`width`: G * I."""
        super().__init__(width, need, device)
        self.groups, size = groups, width // groups
        self._grams: Tensor | None = None
        if need == "gram":
            self._grams = torch.zeros(groups, size, size, dtype=torch.float64, device=device)

    def _add_gram(self, x: Tensor) -> None:
        assert self._sum is not None
        assert self._grams is not None
        by_group = x.float().view(len(x), self.groups, -1).permute(1, 2, 0)  # (G, I, T)
        with products("bfloat16" if x.dtype == torch.bfloat16 else None):
            self._grams += by_group @ by_group.transpose(1, 2)
        self._sum += x.sum(0, dtype=torch.float32)

    def sums(self) -> Iterator[Tensor]:
        yield from (each for each in (self._grams, self._sum) if each is not None)
        if self._sum is None:
            yield self._squares

    @property
    def gram(self) -> Tensor | None:
        raise TypeError("there is one Gram matrix for each group of a convolution: ask `of_group` for its statistics")

    @property
    def square_sum(self) -> Tensor:
        """(G * I,) float64."""
        return self._squares if self._grams is None else self._grams.diagonal(dim1=1, dim2=2).flatten()

    def of_group(self, number: int) -> Statistics:
        """What is known of the inputs of one group, as of a layer of its own."""
        size = self.width // self.groups
        columns = slice(number * size, (number + 1) * size)
        made = Statistics(size, self.need, self._squares.device)
        made.tokens = self.tokens
        if self._grams is None or self._sum is None:
            made._squares = self._squares[columns]
            return made
        lower = self._grams[number].float().tril()
        made._gram, made._sum = lower + lower.tril(-1).T, self._sum[columns]
        return made


def statistics_for(
    width: int, need: Need, device: torch.device | None = None, groups: int = 1, drifts: bool = False
) -> Statistics:
    """Sums that are zero yet; see the classes."""
    return Statistics(width, need, device, drifts) if groups == 1 else GroupedStatistics(width, need, device, groups)


__all__ = ["GroupedStatistics", "statistics_for"]
