"""Whether kernels can compute with a tensor where it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def has_kernels(tensor: Tensor) -> bool:
    """Whether a float32 tensor lies on a device for which kernels can be made here; never true of a processor."""
    if tensor.device.type == "cpu" or tensor.dtype != torch.float32:
        return False
    from compress.runtime.launch import usable  # imports Triton

    return usable(tensor.device)


__all__ = ["has_kernels"]
