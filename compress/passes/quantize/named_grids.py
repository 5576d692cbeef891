"""Grids that have a name: floats, and super-blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compress.encodings.super_blocks import KINDS, WIDTH

if TYPE_CHECKING:
    from compress.encodings.minifloat import Number

WeightGrid = Literal["int", "fp8", "mxfp4", "nvfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
BLOCK = 128  # rows and columns of a block that shares a scale


@dataclass(frozen=True)
class FloatGrid:
    """A format of floats.

    Attributes:
        number: what codes are,
        bits: of each.
        group_size: columns that share a scale; None where that is a matter of granularity.
        scale_type: of the scales.
    """

    number: Number
    bits: int
    group_size: int | None
    scale_type: str


FLOAT_GRIDS: dict[str, FloatGrid] = {
    "fp8": FloatGrid("e4m3", 8, None, "float16"),
    "mxfp4": FloatGrid("e2m1", 4, 32, "e8m0"),
    "nvfp4": FloatGrid("e2m1", 4, 16, "e4m3"),
}
# What a scheme of a name is short for: bits, and columns that share a scale.
NAMED_GRIDS: dict[str, tuple[int, int | None]] = {
    **{name: (kind.bits, kind.group_size) for name, kind in FLOAT_GRIDS.items()},
    **{name: (kind.bits, kind.columns) for name, kind in KINDS.items()},
}


def unfilled(shape: tuple[int, int]) -> str:
    """Why blocks of rows and columns do not fit a matrix, in words."""
    return f"blocks of {BLOCK} x {BLOCK} do not fill its {shape[0]} rows and {shape[1]} columns"


def not_filled(grid: str, columns: int) -> str:
    """What is said of a layer whose columns are no whole super-blocks."""
    bits, _ = NAMED_GRIDS[grid]
    group = next((f"g{width}" for width in (32, 16) if columns % width == 0), "")
    return (
        f"super-blocks of {WIDTH} do not fill its {columns} columns, which {grid} needs; scheme: w{bits}{group}, with "
        "even steps, would fit, or fallback: channel for even steps with one scale per row in layers like it"
    )


__all__ = ["BLOCK", "FLOAT_GRIDS", "NAMED_GRIDS", "FloatGrid", "WeightGrid", "not_filled", "unfilled"]
