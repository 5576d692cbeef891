"""Groups of channels that share an order, and the places in tensors where they lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.lazy import torch
from compress.models.symmetry import Place, Units

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor


@dataclass
class ChannelOrders:
    """Groups of channels, by number.

    Attributes:
        tensors: parameters and buffers by name.
        sizes: of each group.
        joined: group -> the one whose order it shares.
        fixed: groups that keep their order.
        places: (tensor, axis) -> the group that lies along it.
        names: of each tensor, by its identity, the first of its names.
        alone: identities of tensors that are used without their layer.
        both_axes: whether an order may lie along both axes of a matrix; otherwise such groups keep theirs.
    """

    tensors: Mapping[str, Tensor]
    sizes: list[int] = field(default_factory=list)
    joined: dict[int, int] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    places: dict[tuple[str, int], int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    both_axes: bool = False

    def place(self, tensor: str, axis: int, group: int) -> None:
        """A group is what an axis of a tensor counts."""
        if tensor not in self.tensors:  # computed from others, as under a parametrization
            self.fixed.add(group)
            return
        # Layers that share a parameter share the order of its axes.
        tensor = self.names.setdefault(id(self.tensors[tensor]), tensor)
        if (tensor, axis) in self.places:
            self.join(self.places[tensor, axis], group)
        else:
            self.places[tensor, axis] = group

    def new(self, size: int) -> int:
        """A group of so many channels."""
        self.sizes.append(size)
        return len(self.sizes) - 1

    def root(self, group: int) -> int:
        """The group that stands for all that were joined with one."""
        while group in self.joined:
            group = self.joined[group]
        return group

    def join(self, first: int, second: int) -> None:
        """From now on two groups share an order; groups of different sizes keep theirs."""
        a, b = self.root(first), self.root(second)
        if self.sizes[a] != self.sizes[b]:
            self.fixed |= {a, b}
        elif a != b:
            self.joined[b] = a

    def free(self) -> Iterator[Units]:
        """Every group whose order is free, with the places where it lies."""
        fixed = {self.root(group) for group in self.fixed}
        groups: dict[int, list[tuple[str, int]]] = {}
        for place, group in self.places.items():
            groups.setdefault(self.root(group), []).append(place)
        for group, places in groups.items():
            size, names = self.sizes[group], [tensor for tensor, _ in places]
            lengths = [self.tensors[tensor].shape[axis] for tensor, axis in places]
            if group in fixed or size < 2 or any(n % size for n in lengths):
                continue
            if self.alone & {id(self.tensors[name]) for name in names}:
                continue
            if len(set(names)) < len(names) and not self.both_axes:
                continue
            yield Units(
                tuple(
                    Place(tensor, axis, torch.arange(n).view(size, -1), "running_" not in tensor)
                    for (tensor, axis), n in zip(places, lengths, strict=True)
                )
            )
