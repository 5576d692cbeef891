"""One merge of one model with others: every tensor, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.packed_layout import entries, stored_tensors
from compress.checkpoint.sources import ChangedSource, WrittenSource
from compress.engine.merge.aligning import names_of
from compress.engine.sweep import generator_for
from compress.errors import MergeError, NonFiniteError
from compress.io.safetensors_file import write_tensors
from compress.passes.merge.base import Piece

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.delta.file import Delta
    from compress.checkpoint.sources import Source
    from compress.engine.placement import Context
    from compress.models.graph import Graph
    from compress.passes.merge.base import MergePass, Pieces

PIECE = 1 << 20  # elements merged at a time: they stay in the processor's cache
KEPT = 64 * PIECE  # elements of all models together that are kept from one look at a tensor to the next


def depth_of(block: int | None, count: int) -> float:
    """From 0 at the first block to 1 at the last; outside the blocks 0, and 1 where one is all: as mergekit has it."""
    if block is None:
        return 0.0
    return block / (count - 1) if count > 1 else 1.0


def layers_of(graph: Graph) -> dict[str, int]:
    """Tensor -> how many sites stand before the one that it belongs to, or comes behind; 0 also before the first."""
    sites, found, number = {site.name for site in graph.sites}, {}, -1
    for owner, module in graph.model.named_modules():
        number += owner in sites
        for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[f"{owner}.{leaf}" if owner else leaf] = max(0, number)
    return found


@dataclass(frozen=True)
class Merger:
    """One merge of one model with others.

    Attributes:
        pass_: what is done.
        base: the model that the pipeline is run on, as it stands.
        parents: the others, in order.
    """

    pass_: MergePass
    base: Artifact
    parents: Sequence[Artifact]
    context: Context
    number: int

    @property
    def piece(self) -> int:
        """Elements that are merged at a time."""
        return PIECE

    def names(self) -> list[str]:
        """The tensors that are merged; all others are the base's."""
        return names_of(self.pass_, self.base)

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
        seeded = enumerate(self.parents)
        generators = tuple(generator_for(self.context.seed, self.number, k, name) for k, _ in seeded)
        for start in range(0, total, PIECE):
            stop = min(start + PIECE, total)
            base, *others = (m.source.piece(m.name_in_source(name), start, stop).float() for m in models)
            yield Piece(name, base, tuple(others), generators, start, total, block, depth, layer, shape)

    def kept(self, name: str) -> Pieces:
        """The same, to be gone through several times: of a tensor that is not large, read once."""
        if self.length(name) * (1 + len(self.parents)) > KEPT:
            return lambda: self.pieces(name)
        read = list(self.pieces(name))

        def again() -> Iterator[Piece]:
            seeded = range(len(self.parents))
            fresh = tuple(generator_for(self.context.seed, self.number, k, name) for k in seeded)
            return (replace(piece, generators=fresh) for piece in read)

        return again

    def survey(self) -> Any:
        """What the pass wants to know of the whole models."""
        if not self.pass_.surveys:
            return None
        names, bars = self.names(), self.context.bars
        return self.pass_.survey(
            lambda: (p for n in bars.over(names, len(names), f"{self.pass_.key}: survey") for p in self.pieces(n)),
            {name: self.length(name) for name in names},
        )

    def found(self, learnt: Any) -> Any:
        """What the pass knows before it looks at any tensor; `learnt` is what `MergePass.learn` returned."""
        return learnt if self.pass_.learns else self.survey()

    def prepared(self, name: str, found: Any) -> Prepared:
        """What merges a tensor, having seen what it must of it."""
        pass_ = self.pass_.at(name)
        pieces: Pieces = self.kept(name) if pass_.looks else lambda: self.pieces(name)
        return Prepared(pass_, pieces, pass_.look(pieces, found) if pass_.looks and self.length(name) else found)

    def merged(self, name: str, by: Prepared) -> Tensor:
        """One tensor, in the type of the base.

        Raises:
            NonFiniteError: NaN or infinity came out.
            MergeError: a negative variance came out.
        """
        source, stored = self.base.source, self.base.name_in_source(name)
        shape, dtype = source.shape(stored), source.dtype(stored)
        whole = self.length(name) == torch.Size(shape).numel()
        value = torch.empty(shape, dtype=dtype) if whole else source.read(stored)
        flat, largest = value.view(-1), torch.finfo(dtype).max
        for piece in by.pieces():
            made = by.pass_.run(piece, by.facts)
            least, most = torch.aminmax(made)
            if not (least >= -largest and most <= largest):  # nor where they are NaN
                cause = self._cause(name, dtype)
                raise NonFiniteError(f"{name} holds NaN or infinity after {self.pass_.key}{cause}")
            if name.endswith("running_var") and least < 0:
                raise MergeError(
                    f"{name} is {float(least):.3g} after {self.pass_.key}, and there is no negative variance. "
                    "Statistics of a batch normalisation cannot be added up like weights: `exclude` *.running_* to "
                    "keep the base's, or set a smaller scale or weight for them"
                )
            flat[piece.start : piece.start + len(made)] = made
        return value

    def _cause(self, name: str, dtype: torch.dtype) -> str:
        for artifact, label in zip((self.base, *self.parents), ("the base", *self.pass_.models), strict=True):
            if not torch.isfinite(artifact.source.read(artifact.name_in_source(name))).all():
                return f", as it does in {label}; get a clean checkpoint"
        return f"; the weights or scales are too large for {str(dtype).removeprefix('torch.')}"

    def made(self, unit: str, key: str, learn: Learn, delta: Delta | None = None) -> Artifact:
        """The merged model: a file of the ledger where it keeps files, else values in memory.

        Args:
            unit: what the file is called, in the place of an earlier one.
            key: of everything that it depends on.
            learn: this merge as it is done, and what its pass has learned; only asked where the file is not there.
            delta: what it was made into, which then says all.
        """
        base = self.base

        def write(file: Path) -> None:
            if delta is not None:
                applied = with_delta(base, delta)
                read = partial(stored_tensors, applied)
                write_tensors(list(entries(applied)), read, file, self.context.bars, self.pass_.key)
                return
            merger, learned = learn()
            merger.write(file, learned)

        source = self.context.ledger.open_file(unit, key, write, lambda file: WrittenSource(file.parent, file.name))
        if source is not None:
            return replace(base, source=source, renamed=dict(base.graph.tied))
        merger, learned = learn()
        found, names = merger.found(learned), self.names()
        over = self.context.bars.over(names, len(names), self.pass_.key)
        values = {base.name_in_source(name): merger.merged(name, merger.prepared(name, found)) for name in over}
        return replace(base, source=MergedSource(base.source, values))

    def write(self, file: Path, learned: Any) -> None:
        """The merged checkpoint, one tensor in memory at a time."""
        base, chosen = self.base, set(self.names())
        found = self.found(learned)

        def read(name: str) -> dict[str, Tensor]:
            return {name: self.merged(name, self.prepared(name, found)) if name in chosen else base.tensor(name)}

        write_tensors(list(entries(base)), read, file, self.context.bars, self.pass_.key)


@dataclass(frozen=True)
class Prepared:
    """What merges one tensor.

    Attributes:
        pass_: with the options that hold for the tensor.
        pieces: of all models.
        facts: what it must know of the whole tensor.
    """

    pass_: MergePass
    pieces: Pieces
    facts: Any


Learn = Callable[[], tuple[Merger, Any]]


class MergedSource(ChangedSource):
    """A source with some of its values replaced, in memory."""

    def __init__(self, before: Source, values: Mapping[str, Tensor]):
        super().__init__(before)
        self._values = values

    def read(self, name: str) -> Tensor:
        return self._values[name].clone() if name in self._values else super().read(name)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._values:
            return self._values[name].view(-1)[start:stop].clone()
        return super().piece(name, start, stop)

    def fingerprint(self) -> str:
        return "in memory"  # and never resumed
