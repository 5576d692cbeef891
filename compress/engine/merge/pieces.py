"""Several models, read side by side: the same piece of the same tensor of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from compress.engine.stage import generator_for
from compress.passes.merge.base import Piece

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compress.checkpoint.artifact import Artifact
    from compress.engine.devices import Devices
    from compress.models.graph import Graph
    from compress.passes.merge.base import Pieces

PIECE = 1 << 20  # elements merged at a time: they stay in the processor's cache
KEPT_ELEMENTS = 64 * PIECE  # elements of all models together that are kept from one look at a tensor to the next


def depth_of(block: int | None, count: int) -> float:
    """From 0 at the first block to 1 at the last; outside the blocks 0, and 1 where one is all: as mergekit has it."""
    if block is None:
        return 0.0
    return block / (count - 1) if count > 1 else 1.0


def layers_of(graph: Graph) -> dict[str, int]:
    """Tensor -> how many layers (no embeddings) stand before its own, or before what it comes behind; 0 at first."""
    sites, found, number = {site.name for site in graph.sites if not site.looked_up}, {}, -1
    for owner, module in graph.model.named_modules():
        number += owner in sites
        for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[f"{owner}.{leaf}" if owner else leaf] = max(0, number)
    return found


@dataclass(frozen=True)
class ModelReader:
    """Reads the models of a merge.

    Attributes:
        base: the model that the pipeline is run on, as it stands.
        parents: the others, in order.
        devices: where pieces are merged, and where what was merged waits.
        seed, stage: of the pipeline, and the number of the stage: what randomness begins with.
        whole_rows: no row is divided between pieces; a vector is one row.
    """

    base: Artifact
    parents: Sequence[Artifact]
    seed: int
    stage: int
    devices: Devices
    whole_rows: bool = False

    @property
    def piece(self) -> int:
        """Elements that are read at a time."""
        return PIECE

    @cached_property
    def places(self) -> Mapping[str, tuple[int | None, float, int]]:
        """Tensor -> (its block, its depth from 0 to 1, how many layers stand before its own)."""
        graph, found = self.base.graph, {}
        layers = layers_of(graph)
        for name, _ in graph.tensors():
            block = next((i for i, b in enumerate(graph.blocks) if not b or name.startswith(f"{b}.")), None)
            found[name] = (block, depth_of(block, len(graph.blocks)), layers[name])
        return found

    def length(self, name: str) -> int:
        """How many elements are merged: all, or those of the rows that every model has."""
        shapes = [a.source.shape(a.name_in_source(name)) for a in (self.base, *self.parents)]
        whole = torch.Size(shapes[0]).numel()
        return whole // shapes[0][0] * min(s[0] for s in shapes) if whole and shapes[0] else whole

    def pieces(self, name: str) -> Iterator[Piece]:
        """A tensor of all models, piece by piece."""
        total, (block, depth, layer) = self.length(name), self.places[name]
        shape = self.base.source.shape(self.base.name_in_source(name))
        models = (self.base, *self.parents)
        generators = self._generators(name)
        width = (torch.Size(shape[1:]).numel() if len(shape) > 1 else total) or 1
        step = max(1, PIECE // width) * width if self.whole_rows else PIECE
        for start in range(0, total, step):
            stop = min(start + step, total)
            read = (m.source.piece(m.name_in_source(name), start, stop) for m in models)
            base, *others = (self.devices.to_compute(value).float() for value in read)
            yield Piece(name, base, tuple(others), generators, start, total, block, depth, layer, shape)

    def kept(self, name: str) -> Pieces:
        """The pieces of a tensor, to be iterated several times; read only once if the tensor is not large."""
        if self.length(name) * (1 + len(self.parents)) > KEPT_ELEMENTS:
            return lambda: self.pieces(name)
        read = list(self.pieces(name))

        def again() -> Iterator[Piece]:
            fresh = self._generators(name)
            return (replace(piece, generators=fresh) for piece in read)

        return again

    def _generators(self, name: str) -> tuple[torch.Generator, ...]:
        """Randomness of each of the other models in a tensor."""
        return tuple(generator_for(self.seed, self.stage, k, name) for k in range(len(self.parents)))
