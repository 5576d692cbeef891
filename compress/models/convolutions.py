"""Convolutions as matrices: a row for each output channel, a column for each place of the window over its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from compress.lazy import functional, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Convolution: TypeAlias = "nn.Conv1d | nn.Conv2d | nn.Conv3d"
TransposedConvolution: TypeAlias = "nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d"


def is_convolution(module: object) -> TypeGuard[Convolution]:
    """Whether a module is a convolution of torch, in one, two or three dimensions; or a class made of one."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_transposed_convolution(module: object) -> TypeGuard[TransposedConvolution]:
    """Whether it is one that spreads each input over several outputs; or a class made of one."""
    return isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)


def is_plain(module: Convolution | TransposedConvolution) -> bool:
    """Whether it multiplies its weight as it is. A class with a forward of its own does something else with it."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return type(module).forward in [kind.forward for kind in kinds]


def is_filter(module: Convolution) -> bool:
    """Whether it is a short filter over time for each channel by itself, as state-space models have.

    A few weights a channel, on which what comes after depends: passes leave them alone unless a pattern names them.
    """
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], *geometry: Any) -> Tensor:
    """The convolution of torch for as many dimensions as there are strides.

    `geometry`: padding, dilation and groups, as torch takes them.
    """
    made = (functional.conv1d, functional.conv2d, functional.conv3d)[len(stride) - 1]
    return made(x, weight, bias, stride, *geometry)


def convolve_back(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], *geometry: Any) -> Tensor:
    """The transposed convolution of torch for as many dimensions as there are strides.

    `geometry`: padding, output padding, groups and dilation, as torch takes them.
    """
    made = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[len(stride) - 1]
    return made(x, weight, bias, stride, *geometry)
