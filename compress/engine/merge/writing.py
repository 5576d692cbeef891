"""What a merge makes: a checkpoint in a file of the ledger, or values in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.packed_layout import entries, stored_tensors
from compress.checkpoint.sources import ChangedSource, WrittenSource
from compress.engine.parcels import NotedTensor
from compress.io.safetensors_file import write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.delta.file import Delta
    from compress.checkpoint.sources import Source
    from compress.engine.context import Context
    from compress.engine.ledger import MemoryLedger, Write
    from compress.engine.merge.merger import Merger


@dataclass(frozen=True)
class Settled:
    """A merge as it is done.

    Attributes:
        merger: with the options that were chosen.
        learned: what its pass has learned of whole models.
    """

    merger: Merger
    learned: Any


Settle = Callable[[], Settled]  # asked only where the result is not there yet


def write_merged(context: Context, unit: str, key: str, base: Artifact, settle: Settle) -> Artifact:
    """The merged model: a file of the ledger where it keeps files, else values in memory.

    Args:
        context: whose ledger keeps it, and whose processes share the tensors.
        unit: what the file is called, in the place of an earlier one.
        key: of everything that it depends on.
        base: the model that the pipeline is run on, as it stands.
        settle: decides what is merged and how.
    """

    def write(file: Path | None) -> None:
        settled = settle()
        merger, chosen, layout = settled.merger, set(settled.merger.names()), list(entries(base))
        found = merger.found(settled.learned)
        names = [name for name, *_ in layout if name in chosen]

        def merged(name: str) -> tuple[Tensor, None]:
            return merger.merged(name, merger.prepared(name, found)), None

        made = context.executor.map_to_first(merged, names, NotedTensor(), merger.size)
        if file is None:  # another process writes
            list(made)
            return

        def read(name: str) -> dict[str, Tensor]:
            return {name: next(made)[0] if name in chosen else base.tensor(name)}

        write_tensors(layout, read, file, merger.bars, merger.pass_.key)

    made = _open_merged(context.ledger, unit, key, base, write)
    return _merged_in_memory(base, settle()) if made is None else made


def write_applied(ledger: MemoryLedger, unit: str, key: str, merger: Merger, delta: Delta) -> Artifact:
    """The merged model, which a compressed delta makes of the base: a file of the ledger, as for `write_merged`."""

    def write(file: Path | None) -> None:
        if file is None:  # another process writes
            return
        applied = with_delta(merger.base, delta)
        layout, read = list(entries(applied)), partial(stored_tensors, applied)
        write_tensors(layout, read, file, merger.bars, merger.pass_.key)

    made = _open_merged(ledger, unit, key, merger.base, write)
    assert made is not None, "a ledger that keeps the delta keeps this file too"
    return made


def _open_merged(ledger: MemoryLedger, unit: str, key: str, base: Artifact, write: Write) -> Artifact | None:
    source = ledger.open_file(unit, key, write, lambda file: WrittenSource(file.parent, file.name))
    return None if source is None else replace(base, source=source, renamed=dict(base.graph.tied))


def _merged_in_memory(base: Artifact, settled: Settled) -> Artifact:
    merger = settled.merger
    found, names = merger.found(settled.learned), merger.names()
    over = merger.bars.over(names, len(names), f"{merger.pass_.key}: tensors", "end")
    values = {base.name_in_source(name): merger.merged(name, merger.prepared(name, found)) for name in over}
    return replace(base, source=MergedSource(base.source, values))


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
