"""A layer that shares the packed weight of another one, as blocks of Zamba share their attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from compress.runtime.linear import PackedLinear


class TiedLinear(nn.Module):
    """Multiplies with the weight of a packed layer; it has no tensors of its own but a bias.

    Attributes:
        bias: its own, or one that is tied to that of the other layer.
    """

    bias: nn.Parameter | None

    def __init__(self, owner: PackedLinear, *, bias: bool, dtype: torch.dtype = torch.float32):
        """`owner` holds the tensors, and is no part of this module; `dtype` is the type of the bias."""
        super().__init__()
        self.__dict__["owner"] = owner
        rows = owner.out_features
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype), requires_grad=False) if bias else None

    @property
    def owner(self) -> PackedLinear:
        """What holds the tensors."""
        found: PackedLinear = self.__dict__["owner"]
        return found

    @property
    def weight(self) -> Tensor:
        """That of the owner."""
        return self.owner.weight

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.owner.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.owner.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of `x`."""
        return self.owner.product(x, self.bias)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, shared, bias={self.bias is not None}"


__all__ = ["TiedLinear"]
