"""A merge with one fine-tune whose delta, what it adds to the base, is also kept in few bits, in a small file.

The pass says what the signs of every piece are. Other modules turn them into bytes, write the file, and read it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.passes.merge.base import MergePass

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings.signs import Signs
    from compress.passes.merge.base import Piece


@dataclass(frozen=True, kw_only=True)
class DeltaPass(MergePass):
    """The base plus what is kept of the delta. It must be a pipeline's first pass: the delta belongs to the base."""

    makes_delta: ClassVar[bool] = True
    pairwise: ClassVar[bool] = True
    coding: ClassVar[Literal["rice", "bits"]]  # of its signs in a file

    @property
    def codes_factors(self) -> bool:
        """Whether the fine-tune is an adapter, and pieces are those of its factors, added to zeros."""
        return False

    @property
    def looks(self) -> bool:
        return True

    def code(self, piece: Piece, facts: Any) -> Signs | None:
        """What is kept of a piece's delta; None for every piece of a tensor that is kept as it is in the fine-tune."""
        raise NotImplementedError

    def run(self, piece: Piece, facts: Any) -> Tensor:
        code = self.code(piece, facts)
        return piece.others[0] if code is None else code.value().add_(piece.base)
