"""Sums of the values that share a number, in the same order every time, wherever they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

FEW = 64  # sums that are taken one after the other on a device, each over all values


def sums_by_number(numbers: Tensor, values: Tensor, count: int) -> Tensor:
    """(N,) whole numbers below `count` and (N,) values -> (count,) the sum of the values of each number.

    `torch.bincount`, whose sums of floating-point numbers differ from call to call on a CUDA device.
    """
    if values.device.type == "cpu":
        return torch.bincount(numbers, values, count)
    if count <= FEW:
        return torch.stack([torch.where(numbers == k, values, 0.0).sum() for k in range(count)])
    made = torch.zeros(count, dtype=values.dtype, device=values.device)
    return made.index_put_((numbers.long(),), values, accumulate=True)  # which sorts, and adds up in order
