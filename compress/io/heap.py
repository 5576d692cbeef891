"""Memory of this process: given back to the system, and aligned."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

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


def align(model: nn.Module) -> None:
    """Weights of an image model lie as the file has them; convolutions then sum up in another order.

    A language model's products do not, and its embedding may stay in the mapped file.
    """
    if getattr(model, "main_input_name", "") == "pixel_values":
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
                tensor.data = tensor.data.clone()
