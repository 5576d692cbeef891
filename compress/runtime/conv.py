"""A two-dimensional convolution whose weight stays packed in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.runtime.packed import PackedModule

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings import Spec


class PackedConv2d(PackedModule):
    """Replaces a `Conv2d`; one row of its packed weight is one output channel.

    Its geometry has the names it has in a `Conv2d`: some models pad by what they read there. Inputs padded with
    anything but zeros are padded beforehand, by `edges`.
    """

    like: Tensor

    def __init__(self, spec: Spec, replaced: nn.Conv2d):
        """`replaced` gives everything but the weight."""
        super().__init__(spec, bias=replaced.bias is not None, dtype=replaced.weight.dtype)
        self.in_channels, self.out_channels, self.groups = replaced.in_channels, replaced.out_channels, replaced.groups
        self.kernel_size, self.stride, self.dilation = replaced.kernel_size, replaced.stride, replaced.dilation
        self.padding, self.padding_mode = replaced.padding, replaced.padding_mode
        self.edges = list(replaced._reversed_padding_repeated_twice)
        self.register_buffer("like", torch.empty(0, dtype=replaced.weight.dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """(out, in / groups, height, width), unpacked, in the type the model has: some models ask it for that."""
        return self._weight(self.like)

    def _weight(self, like: Tensor) -> Tensor:
        return self.dequantize().to(like.dtype).view(self.out_channels, -1, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, height, width) -> (N, out, places down, places across), in the type of `x`."""
        x, weight = self.rounded(x), self._weight(x)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = nn.functional.pad(x, self.edges, mode=self.padding_mode), 0
        return nn.functional.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        geometry = f"kernel_size={self.kernel_size}, stride={self.stride}, groups={self.groups}"
        return f"{super().extra_repr()}, {geometry}"
