"""Every number of a source is seen finite, and in range for what computes with it, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import NonFiniteError
from compress.io.safetensors_file import in_range
from compress.lazy import torch

if TYPE_CHECKING:
    from compress.checkpoint.artifact import Artifact
    from compress.progress import Bars

PIECE = 1 << 22  # numbers in memory at once


def refuse_non_finite(artifact: Artifact, dtype: torch.dtype, bars: Bars) -> None:
    """Read every tensor of the source once, whether or not a pass will look at it.

    Args:
        artifact: the model as it was before any pass.
        dtype: that the pipeline computes in.
        bars: progress.

    Raises:
        NonFiniteError: names the first tensor with NaN, infinity, or a number that `dtype` cannot hold.
    """
    names = [name for name, _ in artifact.graph.tensors()]
    for name in bars.over(names, len(names), "read: weights"):
        source, stored = artifact.source, artifact.name_in_source(name)
        own = source.dtype(stored)
        if not own.is_floating_point:
            continue
        count, bad, large = torch.Size(source.shape(stored)).numel(), 0, 0
        most = min(torch.finfo(own).max, torch.finfo(dtype).max)
        for start in range(0, count, PIECE):
            piece = source.piece(stored, start, min(start + PIECE, count))
            if not in_range(piece, most):
                finite = torch.isfinite(piece)
                bad += int((~finite).sum())
                large += int((finite & (piece.abs() > most)).sum())
        if bad:
            raise NonFiniteError(
                f"{name}: {bad} of {count} weights are NaN or infinite in the source; the checkpoint is damaged or "
                "overflowed its type: get a clean one"
            )
        if large:
            raise NonFiniteError(
                f"{name}: {large} of {count} weights are too large for {dtype}, which the pipeline computes in "
                f"(at most {most:.6g}); set `dtype: bfloat16` or `dtype: float32`".replace("torch.", "")
            )
