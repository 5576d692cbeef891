"""What is left of a tensor with an entry for every expert when there are fewer: some of them, or sums of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Moves: TypeAlias = "Sequence[tuple[int, Tensor]]"  # axis of an entry, and which of it comes where; one after the other
ReadEntry: TypeAlias = "Callable[[int], Tensor]"


@dataclass(frozen=True)
class Cut:
    """What is left of a parameter or buffer.

    Attributes:
        dim: along which its entries are experts.
        kept: the entries that stay, in order.
        shape: of what is left.
    """

    dim: int
    kept: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def by_rows(self) -> bool:
        """Whether an entry along the first dimension of what is left is made of one of what there was."""
        return True

    def of(self, value: Tensor) -> Tensor:
        """What is left of a value, as a tensor of its own."""
        return value.index_select(self.dim, torch.tensor(self.kept, device=value.device))

    def entry(self, place: int, read: ReadEntry) -> Tensor:
        """One entry of what is left. `read`: an entry of what there was."""
        return read(self.kept[place])


@dataclass(frozen=True)
class Part:
    """What one expert adds to the one that several become.

    Attributes:
        number: of the expert.
        share: what its values are multiplied with.
        routed: what those are multiplied with that a router has for it.
        moves: name of a parameter in the module of experts -> how its entries are put in another order first.
    """

    number: int
    share: float
    routed: float = 0.0
    moves: Mapping[str, Moves] = field(default_factory=dict)


@dataclass(frozen=True)
class Blend(Cut):
    """What is left where some entries become sums of several; sums are in float32, or float64 where values are.

    Attributes:
        parts: number of an entry that stays -> what it becomes the sum of; others stay as they are.
        leaf: the name of the parameter in the module of experts; empty for one of a router.
    """

    parts: Mapping[int, tuple[Part, ...]] = field(default_factory=dict)
    leaf: str = ""

    @property
    def by_rows(self) -> bool:
        return bool(self.dim) and not self.leaf

    def of(self, value: Tensor) -> Tensor:
        entries = [self.entry(place, lambda n: value.select(self.dim, n)) for place in range(len(self.kept))]
        return torch.stack(entries, self.dim)

    def entry(self, place: int, read: ReadEntry) -> Tensor:
        number = self.kept[place]
        if number not in self.parts:
            return read(number)
        parts = [(part, part.share if self.leaf else part.routed) for part in self.parts[number]]
        counted = [(part, share) for part, share in parts if share]
        if len(counted) == 1:  # to the bit
            return read(counted[0][0].number)
        total: Tensor | None = None
        for part, factor in counted:
            value = read(part.number)
            dtype, wide = value.dtype, torch.promote_types(value.dtype, torch.float32)
            for axis, order in part.moves.get(self.leaf, ()):
                value = value.index_select(axis, order.to(value.device))
            share = value.to(wide) * factor
            total = share if total is None else total.add_(share)
        assert total is not None
        return total.to(dtype)


__all__ = ["Blend", "Cut", "Moves", "Part"]
