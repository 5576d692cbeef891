"""What a convolution multiplies its weight with: its input cut into windows, one row for each place of the output.

Shapes: N samples, C channels, H x W positions, K = kernel height * kernel width, T places of the output in all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.lazy import nn, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

NUMBERS_AT_ONCE = 1 << 23  # of unfolded inputs: every input is repeated up to K times


@dataclass(frozen=True)
class Windows:
    """Where a `Conv2d` looks.

    Attributes:
        kernel, stride, dilation: (height, width).
        padding: (left, right, top, bottom).
        mode: what the padding is filled with, as `functional.pad` calls it.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, module: nn.Conv2d) -> Windows:
        """The windows of a module, whose padding may be a word."""
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = tuple(module._reversed_padding_repeated_twice)
        return cls(module.kernel_size, module.stride, module.dilation, padding, mode)

    def columns(self, inputs: Tensor) -> int:
        """C * K."""
        return inputs.shape[-3] * self.kernel[0] * self.kernel[1]

    def rows(self, inputs: Tensor) -> Iterator[Tensor]:
        """(N, C, H, W) or (C, H, W) -> (T, C * K), some samples at a time, columns as a weight (O, C, ...) has them."""
        inputs = inputs.detach()
        for sample in torch.split(inputs if inputs.dim() == 4 else inputs[None], self._samples(inputs)):
            seen = nn.functional.pad(sample, self.padding, mode=self.mode)
            for axis in (0, 1):
                span = (self.kernel[axis] - 1) * self.dilation[axis] + 1
                seen = seen.unfold(2 + axis, span, self.stride[axis])[..., :: self.dilation[axis]]
            # (N, C, places down, places across, kernel height, kernel width)
            yield seen.permute(0, 2, 3, 1, 4, 5).reshape(-1, self.columns(inputs))

    def _samples(self, inputs: Tensor) -> int:
        places = inputs.shape[-2] * inputs.shape[-1] // (self.stride[0] * self.stride[1])
        return max(1, NUMBERS_AT_ONCE // max(1, places * self.columns(inputs)))
