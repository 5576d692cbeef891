"""Sources of whose tensors some entries are gone, sums of several, or made anew by a pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.checkpoint.sources import ChangedSource
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
        if cut.dim or size < WHOLE:
            return self.read(name).flatten()[start:stop].clone()
        first, last = start // size, (stop - 1) // size
        entries = [self._entry(name, cut, place).flatten() for place in range(first, last + 1)]
        whole = entries[0] if len(entries) == 1 else torch.cat(entries)
        return whole[start - first * size : stop - first * size].clone()

    def _entry(self, name: str, cut: Cut, place: int) -> Tensor:
        """An entry of what is left along the first dimension; nothing is read but what it is made of."""
        shape, size = cut.shape[1:], self._size(name)
        return cut.entry(place, lambda old: self.before.piece(name, old * size, (old + 1) * size).view(shape))

    def _size(self, name: str) -> int:
        """Elements of an entry along the first dimension."""
        return math.prod(self.cuts[name].shape[1:])


class RemadeSource(ChangedSource):
    """A source in which some tensors are what a pass made of them, read when asked for.

    They have the type that the source has, and any shape.
    """

    def __init__(self, before: Source, made: Mapping[str, Callable[[], Tensor]], shapes: Mapping[str, tuple[int, ...]]):
        super().__init__(before)
        self._made, self._shapes = dict(made), dict(shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._made else self.before.shape(name)

    def read(self, name: str) -> Tensor:
        if name not in self._made:
            return self.before.read(name)
        return self._made[name]().to(self.dtype(name), copy=True)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._made:
            return self.before.piece(name, start, stop)
        return self.read(name).flatten()[start:stop].clone()
