"""A delta from the codes of a merge, opened again and compared before it has its name."""

from __future__ import annotations

from itertools import chain, repeat
from typing import TYPE_CHECKING

from compress.checkpoint.delta.codings import CODINGS
from compress.checkpoint.delta.file import Delta, write_delta
from compress.checkpoint.delta.source import with_delta
from compress.engine.parcels import NotedTensor
from compress.errors import CompressError
from compress.io.keys import digest
from compress.passes.merge.delta_pass import DeltaPass

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from compress.engine.context import Context
    from compress.engine.merge.merger import Merger
    from compress.engine.merge.writing import Settle


def make_delta(context: Context, unit: str, key: str, merger: Merger, settle: Settle) -> Delta | None:
    """The delta of a merge, a file of the ledger; None where it keeps none.

    Args:
        context: whose ledger keeps it, and whose processes share the tensors.
        unit: what the file is called.
        key: of everything that it depends on.
        merger: of a `DeltaPass`.
        settle: decides what is merged and how.

    Raises:
        CompressError: what was written does not make the very bits that were merged.
    """
    pass_, names, bars = merger.pass_, merger.names(), merger.bars
    assert isinstance(pass_, DeltaPass)
    coding = CODINGS[pass_.coding]

    def make_file(file: Path | None) -> None:
        settled = settle()
        done = settled.merger
        found = done.found(settled.learned)
        meant: dict[str, str] = {}

        def coded(name: str) -> tuple[Tensor, str]:
            by = done.prepared(name, found)
            assert isinstance(by.pass_, DeltaPass)
            value = done.merged(name, by)
            codes = map(by.pass_.code, by.pieces(), repeat(by.facts))
            first = next(codes, None)
            packed = (code for code in chain([first], codes) if code is not None)
            return value if first is None else coding.pack(packed), digest(value)

        made_of_each = context.executor.map_to_first(coded, names, NotedTensor(), merger.size)
        if file is None:  # another process writes
            list(made_of_each)
            return

        def payload(name: str) -> Tensor:
            stored, meant[name] = next(made_of_each)
            return stored

        write_delta(
            file,
            merger.base,
            names,
            payload,
            method=pass_.key,
            coding=pass_.coding,
            chunk=merger.models.piece,
            bars=bars,
        )
        made = with_delta(merger.base, Delta.open(file))
        for name in bars.over(names, len(names), f"{pass_.key}: compare the delta"):
            if digest(made.tensor(name)) != meant[name]:
                raise CompressError(f"{name} of the compressed delta reads back differently; the disk may be failing")

    return context.ledger.open_file(unit, key, make_file, Delta.open)
