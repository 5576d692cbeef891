"""Residual stream and values of attention turned into a basis without outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.calibration.draws import draw
from compress.lazy import torch
from compress.passes.base import OptionError, Pass, Reach
from compress.passes.solvers.hadamard import hadamard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

Matrix = Literal["hadamard", "orthogonal"]


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Turn the residual stream by an orthogonal matrix, and the values of attention within each head by another.

    What is an outlier in one channel is spread over all. The turns are folded into the layers that write to the stream
    and into those that read it, after the scales of norms were, so the model computes what it did and nothing is
    multiplied at run time unless `online` asks for it. A head that is tied to the embedding gets a matrix of its own.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024, arXiv 2404.00456,
    stages 1a, 1b and 1c; scales of norms as in Ashkboos et al., "SliceGPT", 2024, arXiv 2401.15024. Differs from the
    papers in: queries, keys and the cache are not turned; `online` turns the inputs of output projections block by
    block, and not across heads alone, and blocks are as large as the power of two in a width; LayerNorm stays as it is,
    because the matrix is chosen such that it leaves the mean over channels alone.

    Args:
        matrix: `hadamard` with random signs, which spreads every outlier evenly, or where the size has none known, and
            with `orthogonal`, one drawn at random.
        values: also turn the values of attention.
        online: also turn, while the model runs, the inputs of the layers that write to the stream, which no norm comes
            before: `down_proj` and `o_proj`. What loads the result has to know how; most containers have no place for
            it.

    Example:
        >>> import compress
        >>> model, _ = compress.demo.load()
        >>> notes = compress.apply(model, [compress.Rotate()]).report.layers["model.layers.0.mlp.up_proj"]["rotate"]
        >>> sorted(notes)
        ['peak', 'peak_before']
    """

    matrix: Matrix = "hadamard"
    values: bool = True
    online: bool = False

    key: ClassVar[str] = "rotate"
    reach: ClassVar[Reach] = "stream"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})

    def produces(self, kind: str) -> str:
        return kind

    def check(self) -> Iterator[OptionError]:
        for option in ("include", "exclude", "overrides"):
            if getattr(self, option):
                yield OptionError(option, "everything that touches the residual stream is turned with it")

    def run(self, width: int, keeps_mean: bool, generator: torch.Generator) -> Tensor:
        """(width, width) float64, orthogonal. `keeps_mean`: the vector of ones is turned into itself."""
        like = torch.empty(0)
        known = hadamard(width) if self.matrix == "hadamard" else None
        if known is None:
            turn, upper = torch.linalg.qr(draw(generator, (width, width), "normal", like).double())
            turn = turn * upper.diagonal().sign()
        else:
            signs = torch.where(draw(generator, (width,), "uniform", like) < 0.5, -1.0, 1.0).double()  # never 0
            turn = known.to(like.device) * signs[:, None] / width**0.5
        return _keeping_mean(turn) if keeps_mean else turn


def _keeping_mean(turn: Tensor) -> Tensor:
    """An orthogonal matrix followed by the reflection that takes what it makes of the vector of ones back to that."""
    ones = torch.full((len(turn),), len(turn) ** -0.5, dtype=turn.dtype, device=turn.device)
    away = ones @ turn - ones
    length = away.square().sum()
    return turn if length < 1e-24 else turn - torch.outer(turn @ away, away) * (2 / length)


__all__ = ["Rotate"]
