"""Columns rounded to floats or super-blocks, the error of each repaired in those after it: what gptq does with them.

Shapes: O rows, I columns, G groups of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.encodings import SuperBlocks
from compress.encodings.super_blocks import KINDS, WIDTH
from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.solvers.descent import descend
from compress.passes.solvers.obs import Factor, compensate
from compress.passes.solvers.offset_rounding import OffsetRounding
from compress.passes.solvers.projections import FloatRounding

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings import Floats
    from compress.encodings.lookup import BlockScale
    from compress.passes.quantize.grid import UniformPass
    from compress.passes.solvers.tiles import Begin


@dataclass(frozen=True)
class Way:
    """How columns are gone through: options of gptq, which describes them."""

    damping: float
    act_order: bool
    tile: int
    rounds: int


def on_floats(grid: UniformPass, way: Way, weight: Tensor, gram: Tensor, mask: Tensor | None) -> tuple[Floats, int]:
    """Floats with scales that are fitted beforehand, and how many inputs are dead.

    Args:
        grid: says which floats.
        way: to go.
        weight: (O, I) float32.
        gram: (I, I) float32, sum of x x^T.
        mask: (O, I) bool, True = kept.

    Raises:
        SolveError: not positive definite, or a result that is not finite.
    """
    form, tables = grid.float_scales(weight, gram.diagonal())
    rows, columns = weight.shape
    scale = form.lookup((rows, columns), tables).scale
    assert scale is not None
    group, kept = torch.arange(columns) // scale.columns, None if mask is None else mask.T.contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    rounding = FloatRounding(scale.of().T.contiguous(), group, form.kind, kept, codes)
    dead = _rounded(way, weight, gram, rounding)
    return form.encoding(codes.T.contiguous(), tables), dead


def on_super_blocks(
    grid: UniformPass, way: Way, weight: Tensor, gram: Tensor, mask: Tensor | None
) -> tuple[SuperBlocks, int]:
    """Super-blocks, their scales fitted as those of groups are; arguments as those of `on_floats`."""
    (rows, columns), importance = weight.shape, gram.diagonal()
    kind, scale, offset = grid.super_scales(weight, importance)
    group, kept = torch.arange(columns) // scale.columns, None if mask is None else mask.T.contiguous()
    codes, stated = torch.empty(columns, rows, dtype=torch.uint8), KINDS[kind]
    scales = torch.empty(scale.groups, rows)
    rounding = OffsetRounding(scales, scales.clone(), group, stated.lowest, stated.highest, kept, codes)
    rounding.put(slice(None), *_by_group(scale, offset))

    def begin(start: int, current: Tensor) -> None:
        """Fit the scales of the super-block that begins here to its columns as they stand."""
        _, own_scale, own_offset = grid.super_scales(current, importance[start : start + WIDTH])
        groups = slice(start // scale.columns, (start + WIDTH) // scale.columns)
        scale.put_columns(groups, own_scale)
        if offset is not None and own_offset is not None:
            offset.put_columns(groups, own_offset)
        rounding.put(groups, *_by_group(own_scale, own_offset))

    dead = _rounded(way, weight, gram, rounding, None if way.act_order else begin, WIDTH)
    return SuperBlocks(codes.T.contiguous(), scale, offset, kind), dead


def _rounded(
    way: Way,
    weight: Tensor,
    gram: Tensor,
    rounding: FloatRounding | OffsetRounding,
    begin: Begin | None = None,
    every: int | None = None,
) -> int:
    """Write the codes of a rounding that has its scales, or gets them in `begin`; how many inputs are dead."""
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if way.act_order else None
    factor = Factor(gram, way.damping, order)
    own = None if rounding.kept is None else rounding.kept[factor.order]
    codes = torch.empty_like(rounding.codes)
    ordered = replace(rounding, group=rounding.group[factor.order], kept=own, codes=codes)
    width = weight.shape[1] if begin is None or every is None else every
    refuse_infinite(compensate(weight, factor, tile=way.tile, every=width, begin=begin, project=ordered))
    rounding.codes[factor.order] = codes
    if way.rounds:
        descend(weight, gram, way.damping, rounding, way.rounds)
    return factor.num_dead


def _by_group(scale: BlockScale, offset: BlockScale | None) -> tuple[Tensor, Tensor | None]:
    """(G, O) both, of every group."""
    return scale.of().T, None if offset is None else offset.of().T


def refuse_infinite(lost: Tensor) -> None:
    """Refuse a solution that is not finite.

    Raises:
        SolveError: it is not.
    """
    if not math.isfinite(float(lost.sum())):
        raise SolveError("the solution is not finite")


__all__ = ["Way", "on_floats", "on_super_blocks", "refuse_infinite"]
