"""What a convolution multiplies its weight with: its input cut into windows, one row for each place of the output.

Shapes: N samples, C channels, L, H x W or D x H x W positions, K places of a window, T places of the output in all
samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.lazy import nn, torch
from compress.models.convolutions import is_convolution, is_transposed_convolution

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.models.convolutions import Convolution, TransposedConvolution

NUMBERS_AT_ONCE = 1 << 23  # of unfolded inputs: every input is repeated up to K times


@dataclass(frozen=True)
class Windows:
    """Where a convolution looks.

    Attributes:
        kernel, stride, dilation: one number for each dimension: (length,), (height, width) or (depth, height, width).
        padding: (left, right, top, bottom), or as many as there are dimensions.
        mode: what the padding is filled with, as `functional.pad` calls it.
        groups: of channels, which different rows of the weight multiply.
        spread: how far apart the inputs of a transposed convolution are put, with zeros between them; its window moves
            over these one by one, and meets the weight back to front. None of others.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str
    groups: int
    spread: tuple[int, ...] | None = None

    @classmethod
    def of(cls, module: Convolution | TransposedConvolution) -> Windows:
        """The windows of a module, whose padding may be a word."""
        if is_transposed_convolution(module):
            return cls._transposed(module)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = tuple(module._reversed_padding_repeated_twice)
        return cls(module.kernel_size, module.stride, module.dilation, padding, mode, module.groups)

    @classmethod
    def _transposed(cls, module: TransposedConvolution) -> Windows:
        """For the size of output that a module has unless it is asked for another."""
        padding: list[int] = []
        for axis in reversed(range(len(module.kernel_size))):
            assert not isinstance(module.padding, str)
            edge = module.dilation[axis] * (module.kernel_size[axis] - 1) - module.padding[axis]
            padding += [edge, edge + module.output_padding[axis]]
        once = (1,) * len(module.kernel_size)
        return cls(
            module.kernel_size, once, module.dilation, tuple(padding), "constant", module.groups, tuple(module.stride)
        )

    def columns(self, inputs: Tensor) -> int:
        """C * K."""
        return inputs.shape[-1 - len(self.kernel)] * math.prod(self.kernel)

    def rows(self, inputs: Tensor) -> Iterator[Tensor]:
        """(N, C, *positions) or without N -> (T, C * K), some samples at a time, columns as those of a weight."""
        inputs, axes = inputs.detach(), range(len(self.kernel))
        batched = inputs.dim() == 2 + len(axes)
        for sample in torch.split(inputs if batched else inputs[None], self._samples(inputs)):
            seen = sample if self.spread is None else _spread(sample, self.spread)
            seen = nn.functional.pad(seen, self.padding, mode=self.mode)
            for axis in axes:
                span = (self.kernel[axis] - 1) * self.dilation[axis] + 1
                seen = seen.unfold(2 + axis, span, self.stride[axis])[..., :: self.dilation[axis]]
            # (N, C, places down, places across, kernel height, kernel width)
            places, window = (2 + axis for axis in axes), (2 + len(axes) + axis for axis in axes)
            seen = seen if self.spread is None else seen.flip([2 + len(axes) + axis for axis in axes])
            yield seen.permute(0, *places, 1, *window).reshape(-1, self.columns(inputs))

    def _samples(self, inputs: Tensor) -> int:
        places = math.prod(inputs.shape[-len(self.kernel) :]) // math.prod(self.stride) * math.prod(self.spread or (1,))
        return max(1, NUMBERS_AT_ONCE // max(1, places * self.columns(inputs)))


def windows_of(module: nn.Module) -> Windows | None:
    """The windows of a convolution; None of any other module."""
    return Windows.of(module) if is_convolution(module) or is_transposed_convolution(module) else None


def _spread(inputs: Tensor, apart: tuple[int, ...]) -> Tensor:
    """(N, C, *positions) with zeros between the positions."""
    made = inputs.new_zeros(*inputs.shape[:2], *((n - 1) * s + 1 for n, s in zip(inputs.shape[2:], apart, strict=True)))
    made[(slice(None), slice(None), *(slice(None, None, step) for step in apart))] = inputs
    return made
