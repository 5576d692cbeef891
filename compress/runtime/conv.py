"""A convolution in one, two or three dimensions whose weight stays packed in memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.models.convolutions import convolve, convolve_back
from compress.models.site import TensorRef
from compress.runtime.lazy_weight import lazy_weight
from compress.runtime.packed import PackedModule

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings import Spec
    from compress.models.convolutions import Convolution, TransposedConvolution


class PackedConvolution(PackedModule):
    """Replaces a `Conv1d`, `Conv2d` or `Conv3d`; one row of its packed weight is one output channel.

    Its geometry has the names it has there: some models pad by what they read there. Inputs padded with
    anything but zeros are padded beforehand, by `edges`.
    """

    like: Tensor

    def __init__(self, spec: Spec, replaced: Convolution):
        """`replaced` gives everything but the weight."""
        super().__init__(spec, bias=replaced.bias is not None, dtype=replaced.weight.dtype)
        self.in_channels, self.out_channels, self.groups = replaced.in_channels, replaced.out_channels, replaced.groups
        self.kernel_size, self.stride, self.dilation = replaced.kernel_size, replaced.stride, replaced.dilation
        self.padding, self.padding_mode = replaced.padding, replaced.padding_mode
        self.edges = list(replaced._reversed_padding_repeated_twice)
        self.register_buffer("like", torch.empty(0, dtype=replaced.weight.dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """(out, in / groups, *window), in the type the model has; unpacked once its numbers are asked for."""
        rows, columns = self.spec.shape
        shape = (rows, columns // math.prod(self.kernel_size), *self.kernel_size)
        return lazy_weight(shape, self.like, lambda: self._weight(self.like))

    def _weight(self, like: Tensor) -> Tensor:
        return self.dequantize().to(like.dtype).view(self.out_channels, -1, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, *positions) -> (N, out, *places), in the type of `x`."""
        x, weight = self.rounded(x), self._weight(x)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = nn.functional.pad(x, self.edges, mode=self.padding_mode), 0
        return convolve(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        geometry = f"kernel_size={self.kernel_size}, stride={self.stride}, groups={self.groups}"
        return f"{super().extra_repr()}, {geometry}"


class PackedTransposedConvolution(PackedModule):
    """Replaces a `ConvTranspose1d`, `ConvTranspose2d` or `ConvTranspose3d`.

    One row of its packed weight is one output channel; unpacked, it is in the order that torch has.
    """

    like: Tensor

    def __init__(self, spec: Spec, replaced: TransposedConvolution):
        """`replaced` gives everything but the weight."""
        super().__init__(spec, bias=replaced.bias is not None, dtype=replaced.weight.dtype)
        self.in_channels, self.out_channels, self.groups = replaced.in_channels, replaced.out_channels, replaced.groups
        self.kernel_size, self.stride, self.dilation = replaced.kernel_size, replaced.stride, replaced.dilation
        self.padding, self.output_padding = replaced.padding, replaced.output_padding
        self.ref = TensorRef("weight", transposed=True, stored=tuple(replaced.weight.shape), groups=replaced.groups)
        self.register_buffer("like", torch.empty(0, dtype=replaced.weight.dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """(in, out / groups, *window), in the type the model has; unpacked once its numbers are asked for."""
        return lazy_weight(self.ref.stored, self.like, lambda: self._weight(self.like))

    def _weight(self, like: Tensor) -> Tensor:
        return self.ref.laid(self.dequantize().to(like.dtype))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, channels, *positions) -> (N, out, *places), in the type of `x`. `output_size`: as torch takes it."""
        of_torch: Any = nn.modules.conv._ConvTransposeNd._output_padding
        axes = len(self.kernel_size)
        more = of_torch(self, x, output_size, self.stride, self.padding, self.kernel_size, axes, self.dilation)
        x = self.rounded(x)
        return convolve_back(x, self._weight(x), self.bias, self.stride, self.padding, more, self.groups, self.dilation)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        geometry = f"kernel_size={self.kernel_size}, stride={self.stride}, groups={self.groups}"
        return f"{super().extra_repr()}, {geometry}"
