"""A linear layer whose weight stays packed in memory."""

import torch
from torch import Tensor, nn

from compress.encodings import Spec
from compress.runtime.packed import PackedModule


class PackedLinear(PackedModule):
    """Replaces a `Linear` or a transformers `Conv1D`."""

    def __init__(self, spec: Spec, *, bias: bool, transposed: bool, dtype: torch.dtype = torch.float32):
        """`transposed`: stands for a Conv1D, which keeps (in, out). `dtype` is the type of the bias."""
        super().__init__(spec, bias=bias, dtype=dtype)
        self.transposed = transposed
        self.out_features, self.in_features = spec.shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of `x`."""
        x, weight = self.rounded(x), self.dequantize().to(x.dtype)
        if not self.transposed:
            return nn.functional.linear(x, weight, self.bias)
        # Conv1D multiplies by an (in, out) matrix; the same call on the same layout gives the same bits.
        bias = torch.zeros(self.out_features, dtype=x.dtype) if self.bias is None else self.bias
        flat = torch.addmm(bias, x.reshape(-1, self.in_features), weight.T.contiguous())
        return flat.view(*x.shape[:-1], self.out_features)
