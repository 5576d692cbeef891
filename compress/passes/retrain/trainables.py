"""Matrices and vectors that are trained together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from compress.passes.interface import Edit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor


class TrainedMatrix(Protocol):
    """A matrix being trained."""

    def tensors(self) -> list[Tensor]:
        """What is learned."""

    def groups(self, rate: float) -> list[tuple[list[Tensor], float]]:
        """The same with learning rates, where that of everything is `rate`."""

    def soft(self) -> Tensor:
        """(O, I), as it is used in training."""

    def merged(self) -> Tensor:
        """(O, I), as it will be stored."""

    def stepped(self, step: int) -> None:
        """Called when the optimizer has made step 1, 2, ..."""

    def state(self) -> list[Tensor]:
        """What else belongs to an iterate and is changed in place."""

    def edit(self, notes: Mapping[str, float]) -> Edit:
        """What is stored now."""


@dataclass(frozen=True)
class Trainables:
    """Matrices and vectors that are trained together.

    Attributes:
        matrices: by site.
        vectors: by parameter name; changed in place.
        learning_rate: of all that have none of their own.
    """

    matrices: Mapping[str, TrainedMatrix]
    vectors: Mapping[str, Tensor]
    learning_rate: float

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Learned tensors with their learning rates."""
        found: dict[float, list[Tensor]] = {self.learning_rate: []}
        for matrix in self.matrices.values():
            for tensors, rate in matrix.groups(self.learning_rate):
                found.setdefault(rate, []).extend(tensors)
        found[self.learning_rate] += self.vectors.values()
        return [(tensors, rate) for rate, tensors in found.items()]

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(t.numel() for ts, _ in self.groups() for t in ts)

    def part(self, names: Collection[str]) -> Trainables:
        """Some of them."""
        matrices = {n: m for n, m in self.matrices.items() if n in names}
        return Trainables(matrices, {n: v for n, v in self.vectors.items() if n in names}, self.learning_rate)

    def names(self) -> list[str]:
        """The names of everything that is trained."""
        return [*self.matrices, *self.vectors]

    def make(self, names: Collection[str]) -> dict[str, Tensor]:
        """Values as they are used in training, of those of these names that are trained."""
        return {n: self.matrices[n].soft() if n in self.matrices else self.vectors[n] for n in self._known(names)}

    def merged(self, names: Collection[str]) -> dict[str, Tensor]:
        """Values as they will be stored."""
        return {n: self.matrices[n].merged() if n in self.matrices else self.vectors[n] for n in self._known(names)}

    def _known(self, names: Collection[str]) -> list[str]:
        return [n for n in names if n in self.matrices or n in self.vectors]

    def soft(self, progress: float) -> dict[str, Tensor]:
        """All of them, as `make`."""
        return self.make(self.names())

    def hard(self) -> dict[str, Tensor]:
        """All of them, as `merged`."""
        return self.merged(self.names())

    def penalty(self, progress: float) -> Tensor | None:
        """Nothing is added to the loss."""
        return None

    def after(self) -> None:
        """Nothing follows a step of reconstruction."""

    def stepped(self, step: int) -> None:
        """What follows a step of end-to-end training."""
        for matrix in self.matrices.values():
            matrix.stepped(step)

    def state(self) -> list[Tensor]:
        """What else belongs to an iterate and is changed in place."""
        return [t for matrix in self.matrices.values() for t in matrix.state()]

    def edits(self, notes: Mapping[str, float]) -> Iterator[tuple[str, Edit]]:
        """What is stored of all of them now, and in the notes how many numbers of each were trained."""
        for name, matrix in self.matrices.items():
            yield name, matrix.edit({**notes, "trained": sum(t.numel() for t in matrix.tensors())})
        for name, vector in self.vectors.items():
            yield name, Edit(weight=vector.detach().clone(), notes={**notes, "trained": vector.numel()})
