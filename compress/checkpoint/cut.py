"""A source of whose tensors some entries are gone, or sums of several."""

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


WHOLE = 1 << 16  # elements; smaller entries are not read one by one


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
        if cut.dim or self._size(name) < WHOLE:
            return cut.of(self.before.read(name))
        whole = torch.empty(cut.shape, dtype=self.dtype(name))
        for place in range(len(cut.kept)):  # no more than is needed is read
            whole[place] = self._entry(name, cut, place)
        return whole

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        cut = self.cuts.get(name)
        if cut is None:
            return self.before.piece(name, start, stop)
        size = self._size(name)
        first, last = start // size, (stop - 1) // size + 1
        if not cut.dim and size >= WHOLE:
            rows = torch.stack([self._entry(name, cut, place) for place in range(first, last)])
        elif cut.by_rows:
            rows = self._rows(name, cut, first, last)
        else:
            rows = cut.of(self.before.read(name))[first:last]
        return rows.flatten()[start - first * size : stop - first * size].clone()

    def _rows(self, name: str, cut: Cut, first: int, last: int) -> Tensor:
        """Some entries of what is left along the first dimension, of all that lies between the outermost of them."""
        shape = self.before.shape(name)[1:]
        kept, width = cut.kept[first:last] if not cut.dim else range(first, last), math.prod(shape)
        low, high = min(kept), max(kept) + 1
        rows = self.before.piece(name, low * width, high * width).view(high - low, *shape)
        return cut.of(rows) if cut.dim else rows[[place - low for place in kept]]

    def _entry(self, name: str, cut: Cut, place: int) -> Tensor:
        """An entry of what is left along the first dimension; nothing is read but what it is made of."""
        shape, size = cut.shape[1:], self._size(name)
        return cut.entry(place, lambda old: self.before.piece(name, old * size, (old + 1) * size).view(shape))

    def _size(self, name: str) -> int:
        """Elements of an entry along the first dimension."""
        return math.prod(self.cuts[name].shape[1:])
