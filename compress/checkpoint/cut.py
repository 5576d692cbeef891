"""A source of whose tensors some entries are gone or sums of several, such as experts that were pruned or merged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.checkpoint.sources import ChangedSource
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.checkpoint.sources import Source
    from compress.models.cuts import Cut


class CutSource(ChangedSource):
    """A source in which some tensors have fewer entries along one dimension."""

    def __init__(self, before: Source, cuts: Mapping[str, Cut]):
        super().__init__(before)
        self.cuts = dict(cuts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.cuts[name].shape if name in self.cuts else self.before.shape(name)

    def read(self, name: str) -> Tensor:
        cut = self.cuts.get(name)
        if cut is None:
            return self.before.read(name)
        if cut.dim:
            return cut.of(self.before.read(name))
        whole = torch.empty(cut.shape, dtype=self.dtype(name))
        for place in range(len(cut.kept)):  # no more than is needed is read
            whole[place] = self._entry(name, cut, place)
        return whole

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        cut = self.cuts.get(name)
        if cut is None:
            return self.before.piece(name, start, stop)
        if cut.dim:
            return self.read(name).flatten()[start:stop].clone()
        size = math.prod(cut.shape[1:])
        first, last = start // size, (stop - 1) // size
        entries = [self._entry(name, cut, place).flatten() for place in range(first, last + 1)]
        whole = entries[0] if len(entries) == 1 else torch.cat(entries)
        return whole[start - first * size : stop - first * size].clone()

    def _entry(self, name: str, cut: Cut, place: int) -> Tensor:
        """An entry of what is left along the first dimension; nothing is read but what it is made of."""
        shape = cut.shape[1:]
        size = math.prod(shape)
        return cut.entry(place, lambda old: self.before.piece(name, old * size, (old + 1) * size).view(shape))
