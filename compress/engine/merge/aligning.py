"""Models to merge with, read in the order of the base's units: found once, when something is first read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.sources import ChangedSource
from compress.engine.stage import generator_for
from compress.passes.merge.orders import arranged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.engine.context import Context
    from compress.passes.merge.base import MergePass
    from compress.passes.merge.permutation import Alignment


@dataclass
class Aligner:
    """Puts the others in the order of the base's units.

    Attributes:
        pass_: what is done.
        context: with the base as it stands.
        parents: the others as they are.
        number: of the stage.
    """

    pass_: MergePass
    context: Context
    parents: Sequence[Artifact]
    number: int

    def __post_init__(self) -> None:
        self._found: dict[int, Alignment] = {}
        self._base = self.context.artifact

    def aligned(self) -> list[Artifact]:
        """The others, read in the order of the base's units."""
        sources = (AlignedSource(parent, self, k) for k, parent in enumerate(self.parents))
        return [replace(parent, source=source) for parent, source in zip(self.parents, sources, strict=True)]

    def of(self, k: int) -> Alignment:
        """How one of the others is put in order."""
        if k not in self._found:
            parent = self.parents[k]
            there = set(merged_names(self.pass_, self._base))
            every = self._base.graph.units(self.pass_.aligns_residual)
            units = [found for each in every if (found := each.among(there))]
            generator = generator_for(self.context.seed, self.number, k, "")

            def ours(name: str) -> Tensor:
                return self.context.devices.to_compute(_common(self._base, parent, name))

            def theirs(name: str) -> Tensor:
                return self.context.devices.to_compute(_common(parent, self._base, name))

            self._found[k] = self.pass_.align(units, ours, theirs, generator)
        return self._found[k]

    def facts(self) -> list[dict[str, Any]]:
        """What the report says of each other model: its units, how many moved, its distance before and after."""
        found = (self.of(k) for k in range(len(self.parents)))
        return [{name: getattr(each, name) for name in ("units", "moved", "before", "after")} for each in found]


class AlignedSource(ChangedSource):
    """A source in another order; of what moves, one tensor is in memory."""

    def __init__(self, parent: Artifact, aligner: Aligner, number: int):
        super().__init__(parent.source)
        self._aligner, self._number = aligner, number
        self._names = {parent.name_in_source(name): name for name, _ in parent.graph.tensors()}
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def read(self, name: str) -> Tensor:
        return arranged(super().read(name), self._moves(name))

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        if not self._moves(name):
            return super().piece(name, start, stop)
        if self._last[0] != name:
            self._last = (name, self.read(name).flatten())
        return self._last[1][start:stop].clone()

    def _moves(self, name: str) -> Sequence[tuple[int, Tensor]]:
        moves: Mapping[str, Sequence[tuple[int, Tensor]]] = self._aligner.of(self._number).moves
        return moves.get(self._names.get(name, name), ())


def _common(model: Artifact, other: Artifact, name: str) -> Tensor:
    """What of a tensor another model has too: tables of two vocabularies have rows of their own."""
    shape = other.source.shape(other.name_in_source(name))
    return model.source.read(model.name_in_source(name))[tuple(slice(length) for length in shape)]


def merged_names(pass_: MergePass, base: Artifact) -> list[str]:
    """The tensors that are merged; all others are the base's."""
    return [n for n, t in base.graph.tensors() if t.is_floating_point() and pass_.selects(n, in_block=True)]
