"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.runtime.packed import PackedModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from compress.encodings import Spec


@dataclass(frozen=True)
class Quick:
    """How a layer computes that `speed_up` was called for.

    Attributes:
        multiply: (M, in) -> (M, out), without bias.
        device: where it keeps its tensors.
    """

    multiply: Callable[[Tensor], Tensor]
    device: torch.device


class PackedLinear(PackedModule):
    """Replaces a `Linear` or a transformers `Conv1D`.

    Attributes:
        kernel: what it computes with in the place of unpacking its weight; None as loaded.
    """

    kernel: Quick | None

    def __init__(self, spec: Spec, *, bias: bool, transposed: bool, dtype: torch.dtype = torch.float32):
        """`transposed`: stands for a Conv1D, which keeps (in, out). `dtype` is the type of the bias."""
        super().__init__(spec, bias=bias, dtype=dtype)
        self.transposed = transposed
        self.out_features, self.in_features = spec.shape
        self.kernel = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of `x`."""
        x = self.rounded(x)
        # Kernels have no gradients.
        if self.kernel is not None and not (torch.is_grad_enabled() and x.requires_grad):
            return self._quick(x, self.kernel)
        weight = self.dequantize().to(x.dtype)
        if not self.transposed:
            return nn.functional.linear(x, weight, self.bias)
        # Conv1D multiplies by an (in, out) matrix; the same call on the same layout gives the same bits.
        bias = x.new_zeros(self.out_features) if self.bias is None else self.bias
        flat = torch.addmm(bias, x.reshape(-1, self.in_features), weight.T.contiguous())
        return flat.view(*x.shape[:-1], self.out_features)

    def _quick(self, x: Tensor, kernel: Quick) -> Tensor:
        y = kernel.multiply(x.reshape(-1, self.in_features))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What a kernel keeps stays where it is: on another device the layer computes as loaded."""
        moved = super()._apply(fn, recurse)
        if self.kernel is not None and self.kernel.device != next(self.buffers()).device:
            self.kernel = None
        return moved

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.kernel = None  # it was derived from other tensors
        super()._load_from_state_dict(*args, **options)
