"""What a convolution multiplies its weight with: its input cut into windows, one row for each place of the output.

Shapes: N samples, C channels, L, H x W or D x H x W positions, K places of a window, T places of the output in all
samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.lazy import nn, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.models.convolutions import Convolution

NUMBERS_AT_ONCE = 1 << 23  # of unfolded inputs: every input is repeated up to K times


@dataclass(frozen=True)
class Windows:
    """Where a convolution looks.

    Attributes:
        kernel, stride, dilation: one number for each dimension: (length,), (height, width) or (depth, height, width).
        padding: (left, right, top, bottom), or as many as there are dimensions.
        mode: what the padding is filled with, as `functional.pad` calls it.
        groups: of channels, which different rows of the weight multiply.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str
    groups: int

    @classmethod
    def of(cls, module: Convolution) -> Windows:
        """The windows of a module, whose padding may be a word."""
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = tuple(module._reversed_padding_repeated_twice)
        return cls(module.kernel_size, module.stride, module.dilation, padding, mode, module.groups)

    def columns(self, inputs: Tensor) -> int:
        """C * K."""
        return inputs.shape[-1 - len(self.kernel)] * math.prod(self.kernel)

    def rows(self, inputs: Tensor) -> Iterator[Tensor]:
        """(N, C, *positions) or without N -> (T, C * K), some samples at a time, columns as those of a weight."""
        inputs, axes = inputs.detach(), range(len(self.kernel))
        batched = inputs.dim() == 2 + len(axes)
        for sample in torch.split(inputs if batched else inputs[None], self._samples(inputs)):
            seen = nn.functional.pad(sample, self.padding, mode=self.mode)
            for axis in axes:
                span = (self.kernel[axis] - 1) * self.dilation[axis] + 1
                seen = seen.unfold(2 + axis, span, self.stride[axis])[..., :: self.dilation[axis]]
            # (N, C, places down, places across, kernel height, kernel width)
            places, window = (2 + axis for axis in axes), (2 + len(axes) + axis for axis in axes)
            yield seen.permute(0, *places, 1, *window).reshape(-1, self.columns(inputs))

    def _samples(self, inputs: Tensor) -> int:
        places = math.prod(inputs.shape[-len(self.kernel) :]) // math.prod(self.stride)
        return max(1, NUMBERS_AT_ONCE // max(1, places * self.columns(inputs)))
