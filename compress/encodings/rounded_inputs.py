"""Rounding of inputs to even steps and to floats, and the levels of a power: what the grids of `inputs.py` share.

Shapes: C channels, the last dimension; an input is (..., C).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from compress.encodings.minifloat import MINIFLOATS
from compress.encodings.power import KEPT_TABLES, PowerGrid
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

E4M3 = MINIFLOATS["e4m3"]


@lru_cache(maxsize=KEPT_TABLES)
def power_grid(bits: int, exponent: float, device: torch.device) -> PowerGrid:
    """The levels of an exponent on a device, made once and outside of any mode."""
    with torch.inference_mode(False), device:
        made = PowerGrid(bits, exponent, "zero")
        _ = made.values, made.borders
    return made


def per_token(x: Tensor, bits: int) -> Tensor:
    """(..., C) float32 -> the same, each token on even steps over its own range."""
    scale, zero_point = affine_steps(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits)
    return on_steps(x, scale, zero_point, bits)


def affine_steps(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest values -> scale float32 and zero point uint8 of the same shape; zero is on the grid."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # nothing but zeros: any scale says zero
    return scale, (-low / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def on_steps(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """(..., C) float32 -> the nearest of the 2**bits values (code - zero_point) * scale; the inputs are not changed."""
    zero = zero_point.float()
    return (x / scale).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale)


def float_scale(largest: Tensor) -> Tensor:
    """The largest magnitudes -> the scales by which they are the largest E4M3 number, float32 of the same shape."""
    scale = largest.float() / E4M3.largest
    return torch.where(scale > 0, scale, 1.0)  # nothing but zeros: any scale says zero


def on_floats(x: Tensor, scale: Tensor) -> Tensor:
    """(..., C) float32 -> the nearest E4M3 number times its scale; the inputs are not changed."""
    return E4M3.round(x / scale).mul_(scale)
