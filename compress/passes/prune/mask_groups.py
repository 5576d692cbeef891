"""Masks of whole rows or columns: which groups of weights go together, and which of all groups go.

Shapes: O rows, I columns, G groups of a matrix: O filters, or I / kernel channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.prune.selection import count_in_share

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from compress.passes.base import Target

Group = Literal["filter", "channel"]


def group_sums(values: Tensor, group: Group, kernel: int = 1) -> Tensor:
    """(O, I) -> (G,), the sum over each row, or over each `kernel` neighbouring columns."""
    if group == "filter":
        return values.sum(1)
    return values.sum(0).view(-1, kernel).sum(1)


def spread(kept: Tensor, shape: tuple[int, ...], group: Group, kernel: int = 1) -> Tensor:
    """(G,) -> (O, I), every weight with what its group has."""
    if group == "filter":
        return kept[:, None].expand(shape).contiguous()
    return kept.repeat_interleave(kernel)[None].expand(shape).contiguous()


def most_gone(shapes: Iterable[tuple[int, int]], group: Group | Literal["weight"]) -> float:
    """The largest share of zeros that leaves every (O, I) matrix a group; channels are taken to be single columns."""
    lost = total = 0
    for rows, columns in shapes:
        total += rows * columns
        lost += rows * columns - {"weight": 0, "filter": columns, "channel": rows}[group]
    return lost / total


def smallest_groups(
    scores: Mapping[str, Tensor], targets: Mapping[str, Target], group: Group, sparsity: float
) -> dict[str, Tensor]:
    """(G,) bool of every matrix, True = kept: from the smallest score up, each group goes that still fits the share.

    What was masked before counts as gone. The best group of every matrix that has any left stays, so none is cut off.

    Args:
        scores: (G,) of each matrix.
        targets: the matrices, and what is masked of them.
        group: what goes together.
        sparsity: share of zeros over all matrices that is not exceeded.

    Raises:
        SolveError: the share is not reached where every matrix keeps a group.
    """
    alive, may, total = [], [], 0
    for name, score in scores.items():
        weight, mask, kernel = targets[name].weight, targets[name].mask, targets[name].kernel
        total += weight.numel()
        left = torch.ones(weight.shape) if mask is None else mask.float()
        alive.append(group_sums(left, group, kernel).long())
        others = alive[-1] > 0
        others[score.masked_fill(~others, -torch.inf).argmax()] = False
        may.append(others)
    sizes, free = torch.cat(alive), torch.cat(may)
    budget = count_in_share(total, sparsity) - (total - int(sizes.sum()))
    order = torch.cat(list(scores.values())).argsort(stable=True)
    order = order[free[order]]
    if int(sizes[order].sum()) < budget:
        raise SolveError(f"sparsity {sparsity} is not reached where every matrix keeps a {group}: lower it")
    kept = sizes > 0
    kept[order[fitting(sizes[order], budget)]] = False
    return dict(zip(scores, torch.split(kept, [len(s) for s in scores.values()]), strict=True))


def fitting(sizes: Tensor, budget: int) -> Tensor:
    """(N,) positive whole numbers -> the places of those taken, where each in turn is that still fits the budget."""
    taken, left = [], torch.arange(len(sizes))
    while len(left):
        upto = sizes[left].cumsum(0)
        number = int((upto <= budget).sum())
        taken.append(left[:number])
        budget -= int(upto[number - 1]) if number else 0
        left = left[number:]
        left = left[sizes[left] <= budget]
    return torch.cat(taken) if taken else left
