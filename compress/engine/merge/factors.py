"""A delta of an adapter's factors: coded, written, opened again and compared before it has its name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint.delta.codings import CODINGS
from compress.checkpoint.delta.factors import Factors, adapter_file, coded_names, described, settings_of, with_factors
from compress.checkpoint.delta.file import Delta, write_delta
from compress.checkpoint.delta.source import with_delta
from compress.engine.merge.pieces import PIECE
from compress.errors import CompressError, NonFiniteError
from compress.passes.merge.base import Piece

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.sources import FolderSource
    from compress.encodings.signs import Signs
    from compress.engine.context import Context
    from compress.passes.merge.delta_pass import DeltaPass


@dataclass(frozen=True)
class FactorCoder:
    """Codes the factors of an adapter.

    Attributes:
        pass_: says what the signs of a piece are.
        base: the model that they are added to.
        adapter: its folder.
    """

    pass_: DeltaPass
    base: Artifact
    adapter: Path

    def codes(self) -> dict[str, list[Signs]]:
        """Name of a factor -> the signs of its pieces; all of them in memory, as adapters are small.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        stored, names = adapter_file(self.adapter), coded_names(self.base, self.adapter)
        for name in names:
            if not torch.isfinite(stored.read(name)).all():
                raise NonFiniteError(f"{name} of {self.adapter} holds NaN or infinity; get a clean adapter")
        made: dict[str, list[Signs]] = {}
        for name in names:
            facts = self.pass_.look(partial(pieces, stored, name), None)
            made[name] = [self._code(piece, facts) for piece in pieces(stored, name)]
        return made

    def _code(self, piece: Piece, facts: Any) -> Signs:
        code = self.pass_.code(piece, facts)
        assert code is not None, "no pass that codes factors keeps one as it is"
        return code

    def model(self, codes: Mapping[str, list[Signs]]) -> Artifact:
        """The model that the base and the coded factors make, without a file."""
        stored = adapter_file(self.adapter)
        shapes = {name: stored.shape(name) for name in codes}
        values = {n: torch.cat([code.value() for code in each]).view(shapes[n]) for n, each in codes.items()}
        factors = Factors(stored.files()[0], stored, shapes, lambda name: values[name].clone())
        return with_factors(self.base, factors, settings_of(self.adapter), "in memory")


def pieces(stored: FolderSource, name: str) -> Iterator[Piece]:
    """A factor, piece by piece, as what an adapter adds to nothing."""
    shape = stored.shape(name)
    total = torch.Size(shape).numel()
    for start in range(0, total, PIECE):
        value = stored.piece(name, start, min(start + PIECE, total)).float()
        yield Piece(name, torch.zeros_like(value), (value,), start=start, total=total, shape=shape)


def make_factored(context: Context, unit: str, key: str, coder: FactorCoder) -> Delta | None:
    """The delta of an adapter's factors, a file of the ledger; None where it keeps none.

    Raises:
        CompressError: what was written does not make the very bits that were coded.
    """
    pass_, bars = coder.pass_, context.bars
    coding = CODINGS[pass_.coding]

    def make_file(file: Path | None) -> None:
        if file is None:  # another process writes
            return
        stored, codes = adapter_file(coder.adapter), coder.codes()

        def payload(name: str) -> Tensor:
            return coding.pack(codes[name]) if name in codes else stored.read(name)

        about = described(settings_of(coder.adapter), {name: stored.shape(name) for name in codes})
        names = sorted(stored.names())
        options = {"method": pass_.key, "coding": pass_.coding}
        write_delta(file, coder.base, names, payload, **options, chunk=PIECE, bars=bars, adapter=about)
        meant, made = coder.model(codes), with_delta(coder.base, Delta.open(file))
        for name, _ in coder.base.graph.tensors():
            if not torch.equal(made.tensor(name).view(-1), meant.tensor(name).view(-1)):
                raise CompressError(f"{name} of the compressed delta reads back differently; the disk may be failing")

    return context.ledger.open_file(unit, key, make_file, Delta.open)


__all__ = ["FactorCoder", "make_factored"]
