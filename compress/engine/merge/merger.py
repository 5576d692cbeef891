"""One merge of one model with others: every tensor, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compress.engine.merge.aligning import merged_names
from compress.errors import MergeError, NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.engine.merge.pieces import ModelReader
    from compress.passes.merge.base import MergePass, Pieces
    from compress.progress import Bars


@dataclass(frozen=True)
class Merger:
    """One merge of one model with others.

    Attributes:
        pass_: what is done.
        models: the base and the others.
        bars: progress.
    """

    pass_: MergePass
    models: ModelReader
    bars: Bars

    @property
    def base(self) -> Artifact:
        """The model that the pipeline is run on, as it stands."""
        return self.models.base

    def names(self) -> list[str]:
        """The tensors that are merged; all others are the base's."""
        return merged_names(self.pass_, self.base)

    def size(self, name: str) -> float:
        """Elements of a tensor that is merged: about how long it takes."""
        return float(self.models.length(name))

    def survey(self) -> Any:
        """What the pass wants to know of the whole models."""
        if not self.pass_.surveys:
            return None
        names, models, bars = self.names(), self.models, self.bars
        return self.pass_.survey(
            lambda: (p for n in bars.over(names, len(names), f"{self.pass_.key}: survey") for p in models.pieces(n)),
            {name: models.length(name) for name in names},
        )

    def found(self, learnt: Any) -> Any:
        """What the pass knows before it looks at any tensor; `learnt` is what `MergePass.learn` returned."""
        return learnt if self.pass_.learns else self.survey()

    def prepared(self, name: str, found: Any) -> Prepared:
        """What merges a tensor, having seen what it must of it."""
        pass_, models = self.pass_.at(name), self.models
        pieces: Pieces = models.kept(name) if pass_.looks else lambda: models.pieces(name)
        return Prepared(pass_, pieces, pass_.look(pieces, found) if pass_.looks and models.length(name) else found)

    def merged(self, name: str, by: Prepared) -> Tensor:
        """One tensor, in the type of the base.

        Raises:
            NonFiniteError: NaN or infinity came out.
            MergeError: a negative variance came out.
        """
        source, stored = self.base.source, self.base.name_in_source(name)
        shape, dtype = source.shape(stored), source.dtype(stored)
        whole = self.models.length(name) == torch.Size(shape).numel()
        store = self.models.devices.store
        value = torch.empty(shape, dtype=dtype, device=store) if whole else source.read(stored).to(store)
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
            flat[piece.start : piece.start + len(made)] = made.to(store)
        return value

    def _cause(self, name: str, dtype: torch.dtype) -> str:
        for artifact, label in zip((self.base, *self.models.parents), ("the base", *self.pass_.models), strict=True):
            if not torch.isfinite(artifact.source.read(artifact.name_in_source(name))).all():
                return f", as it does in {label}; get a clean checkpoint"
        return f"; the weights or scales are too large for {str(dtype).removeprefix('torch.')}"


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
