"""Channels turned block by block with a Hadamard matrix, quickly enough to be done while a model runs.

Source: the online transforms of Ashkboos et al., "QuaRot", NeurIPS 2024, arXiv 2404.00456. Differs from the paper in:
where a width is no power of two, blocks as large as the power of two in it are turned, and not the whole width by a
matrix from a table; so the matrix is symmetric, and its own inverse.

Shapes: C channels, the last dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def block_of(width: int) -> int:
    """The largest power of two that divides a width."""
    return width & -width


def turned(x: Tensor, size: int) -> Tensor:
    """(..., C) with each block of `size` channels, a power of two, multiplied with a Hadamard matrix / sqrt(size)."""
    return multiplied(x, *(matrix.to(x.device) for matrix in factors(size)))


def factors(size: int) -> tuple[Tensor, Tensor]:
    """Two matrices of 1 and -1, float32, whose Kronecker product is Sylvester's Hadamard matrix of a power of two."""
    left = 1 << ((size.bit_length() - 1) // 2)
    return _sylvester(left), _sylvester(size // left)


def multiplied(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(..., C) turned by the Kronecker product of two such matrices, block by block: quick even for one token.

    In float32, or float64 where that comes; given back in the type it came in.
    """
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    blocks = x.to(dtype).reshape(*x.shape[:-1], -1, len(left), len(right))
    made: Tensor = left.to(dtype) @ (blocks @ right.to(dtype)) * (len(left) * len(right)) ** -0.5
    return made.reshape(x.shape).to(x.dtype)


def _sylvester(size: int) -> Tensor:
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


__all__ = ["block_of", "factors", "multiplied", "turned"]
