"""Convolutions as matrices: a row for each output channel, a column for each place of the window over its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from compress.lazy import functional, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Convolution: TypeAlias = "nn.Conv1d | nn.Conv2d | nn.Conv3d"


def is_convolution(module: object) -> TypeGuard[Convolution]:
    """Whether a module is a convolution of torch, in one, two or three dimensions; or a class made of one."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_plain(module: Convolution) -> bool:
    """Whether it multiplies its weight as it is. A class with a forward of its own does something else with it."""
    forward = type(module).forward
    return forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


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
