"""Tensors of models with their units in another order, and which units must be put in order together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from compress.models.symmetry import Units

Values: TypeAlias = "Mapping[str, Tensor]"
Moves: TypeAlias = (
    "Mapping[str, Sequence[tuple[int, Tensor]]]"  # tensor -> (axis, which entry comes where), one after the other
)
ReadTensor: TypeAlias = "Callable[[str], Tensor]"  # a whole tensor of a model
HELD = 2**29  # bytes of each model that are kept while its orders are found; what is beyond is read again


@dataclass(frozen=True)
class Order:
    """A permutation.

    Attributes:
        units: (U,) int64: which unit of the other model stands where ours stands.
        inner: for each place the orders within the unit that stands there.
    """

    units: Tensor
    inner: tuple[tuple[Order, ...], ...] = ()


def unchanged(units: Units) -> Order:
    """The order as it is."""
    inner = tuple(unchanged(within) for within in units.inner)
    return Order(torch.arange(units.count), (inner,) * units.count if inner else ())


class Arranged(Mapping[str, "Tensor"]):
    """The tensors of a model with some units in another order, made when they are asked for."""

    def __init__(self, values: Values, ordered: Sequence[tuple[Units, Order]]):
        self._values, self._ordered = values, ordered

    def __getitem__(self, name: str) -> Tensor:
        value = self._values[name]
        return arranged(value, moves(name, value.shape, self._ordered))

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Read(Mapping[str, "Tensor"]):
    """Tensors of a model in float64, read when they are asked for; the first are kept, as far as there is room."""

    def __init__(self, read: ReadTensor, names: Sequence[str]):
        self._read, self._names, self._room = read, names, HELD
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        value = self._read(name).double()
        if value.nbytes <= self._room:
            self._kept[name] = value
            self._room -= value.nbytes
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def arranged(value: Tensor, moved: Iterable[tuple[int, Tensor]]) -> Tensor:
    """A tensor with its entries in another order."""
    for axis, order in moved:
        value = value.index_select(axis, order.to(value.device))
    return value


def moves(tensor: str, shape: Sequence[int], ordered: Iterable[tuple[Units, Order]]) -> list[tuple[int, Tensor]]:
    """What the orders of some units do to one tensor."""
    found = []
    for units, order in ordered:
        for axis in sorted({place.axis for place in units.places if place.tensor == tensor}):
            found.append((axis, along(tensor, axis, shape[axis], [(units, order)])))
    return found


def along(tensor: str, axis: int, length: int, ordered: Iterable[tuple[Units, Order]]) -> Tensor:
    """(length,) which entry of an axis comes where."""
    entries = torch.arange(length)
    for units, order in ordered:
        for place in units.places:
            if (place.tensor, place.axis) != (tensor, axis):
                continue
            taken = place.index[order.units]
            if order.inner:
                taken = torch.stack(
                    [
                        entry[along(tensor, axis, len(entry), zip(units.inner, within, strict=True))]
                        for entry, within in zip(taken, order.inner, strict=True)
                    ]
                )
            moved = entries.clone()
            moved[place.index] = entries[taken]
            entries = moved
    return entries


def coupled(units: Sequence[Units]) -> list[list[Units]]:
    """Groups of units that share tensors, so that each group can be matched without the others."""
    groups: list[tuple[set[str], list[Units]]] = []
    for each in units:
        names, members = each.tensors(), [each]
        apart = []
        for others, there in groups:
            if others & names:
                names, members = names | others, there + members
            else:
                apart.append((others, there))
        groups = [*apart, (names, members)]
    return [members for _, members in groups]
