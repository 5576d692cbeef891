"""Which weights of a matrix are worth training: a score for each.

`principal`: a weight counts as much as it does in the nearest matrix of a low rank, |W_r|. Source: Liu et al., "LIFT
the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused Supervised Fine-Tuning",
2025, arXiv 2506.00772. Differs from the paper in: the weights are chosen once, at the start, and not again every few
steps; zeros of a mask are never chosen.

`sensitive`: a weight counts as much as the loss would change without it, |W * dl/dW|, and what a few samples say of
single weights is noise, so that this is first replaced with what it has in common along rows and columns, and the
nearest matrix of a low rank of the rest. Source: Li et al., "Parameter-Efficient Sparsity for Large Language Models
Fine-Tuning" (PST), IJCAI 2022, arXiv 2205.11005: importance that is driven by data has structure and low rank. A
reconstruction, as only the abstract could be read: there, importance is learned during training in small matrices and
decides which weights go, here it is taken from gradients at the start and decides which kept weights are trained.

Shapes: O rows, I columns, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.calibration.samples import batch, held_out_split
from compress.lazy import torch
from compress.passes.solvers.truncated import truncated

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from compress.calibration.training import ModelData

BATCHES = 8  # that the gradients are taken on


def principal(weight: Tensor, rank: int) -> Tensor:
    """(O, I) -> (O, I), the magnitudes of its nearest matrix of rank r."""
    return _of_rank(weight, rank).abs()


def sensitive(weight: Tensor, slope: Tensor | None, rank: int) -> Tensor:
    """(O, I) weights and their gradient -> (O, I) scores. No gradient: it never took part, and all count alike."""
    if slope is None:
        return torch.zeros_like(weight)
    importance = (weight * slope).abs()
    along_rows, along_columns = importance.mean(1, keepdim=True), importance.mean(0, keepdim=True)
    structure = along_rows + along_columns - importance.mean()
    return structure + _of_rank(importance - structure, rank)


def _of_rank(matrix: Tensor, rank: int) -> Tensor:
    if not bool(matrix.any()):
        return torch.zeros_like(matrix)
    found = truncated(matrix, rank, None)
    return found.b @ found.a


def slopes(weights: Mapping[str, Tensor], data: ModelData, batch_size: int, order: int) -> dict[str, Tensor]:
    """Gradients of the loss by matrices, summed over a few batches of the samples that are trained on."""
    _, samples = held_out_split(data.count)
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for number in range(1, BATCHES + 1):
        made = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}

        def make(wanted: Collection[str], made: Mapping[str, Tensor] = made) -> dict[str, Tensor]:
            return {name: made[name] for name in wanted if name in made}

        with torch.enable_grad():
            data.backward(make, batch(samples, number, batch_size, order), list(made.values()))
        for name, tensor in made.items():
            if tensor.grad is not None:
                found[name] += tensor.grad
    return found
