"""How many rows of a matrix are worked on at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ON_DEVICE = 1 << 25  # numbers: every call on a device costs time, and it has no cache that this could spill out of


def rows_in_piece(most: int, columns: int, device: torch.device) -> int:
    """At least one row.

    Args:
        most: numbers that a processor works on at once.
        columns: of the matrix.
        device: where the matrix is.
    """
    return max(1, (most if device.type == "cpu" else max(most, ON_DEVICE)) // max(1, columns))
