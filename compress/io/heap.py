"""Memory of this process: given back to the system, and aligned."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import nn

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 16 << 20  # bytes; smaller pieces are worth keeping, as new pages cost time
ALIGNMENT = 64  # bytes, of every tensor that torch allocates


def bound_heap() -> None:
    """From now on, in the whole process, what is large goes back to the system as soon as it is freed.

    Otherwise glibc learns from the sizes it sees to keep pieces of up to 32 MB, and how many depends on chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Freed memory goes back to the system: glibc keeps pieces of up to 32 MB, which add up to more than a block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def align(model: nn.Module, convolutions: bool) -> None:
    """Weights lie as the file has them; convolutions, and products with a single row, then sum up in another order.

    Args:
        model: in memory.
        convolutions: only theirs are moved: products of a language model have many rows, and its embedding may stay in
            the mapped file.
    """
    for module in model.modules():
        if convolutions and not isinstance(module, torch.nn.modules.conv._ConvNd):
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
                tensor.data = tensor.data.clone()
