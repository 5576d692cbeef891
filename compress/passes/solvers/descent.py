"""Codes on a uniform grid, improved one column after the other, and scales refitted to them.

Minimise tr((W - V) H (W - V)^T) where V = scale * (code - zero), from codes that are there. For one column with all
others fixed this is a parabola in each row, with its lowest point at

    V_j + [(W - V) H]_j / H_jj,

so the nearest point of the grid is the best; for the scale s of a group with integers U = code - zero in it, it is a
parabola with its lowest point at

    s + sum_j U_j [(W - V) H]_j / (U H_gg U^T).

No step makes the sum larger. One round refits the scale of every group and then visits its columns. Scales of floats
and of super-blocks stay as they are.

Source: cyclic coordinate descent for layer-wise quantization: Behdin, Acharya, Gupta, Song, Zhu, Keerthi and Mazumder,
"QuantEase: Optimization-based Quantization for Language Models", 2023, arXiv 2309.01885, section 3. Differs from the
paper in: scales are refitted in closed form, and the codes begin as GPTQ leaves them.

Shapes: O rows, I columns, t columns in a tile; R = O, or 1 for one scale per matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from compress.calibration.precision import products
from compress.encodings.uniform import stored_scale
from compress.lazy import torch
from compress.passes.solvers.device import has_kernels
from compress.passes.solvers.projections import Rounding
from compress.passes.solvers.tiles import project_tile

if TYPE_CHECKING:
    from torch import Tensor

    from compress.passes.solvers.offset_rounding import OffsetRounding
    from compress.passes.solvers.projections import FloatRounding

Grid: TypeAlias = "Rounding | FloatRounding | OffsetRounding"
TILE = 128  # columns visited at once: speed only


def descend(weight: Tensor, gram: Tensor, damping: float, rounding: Grid, rounds: int) -> None:
    """Visit every column `rounds` times; codes and scales of `rounding` are changed in place.

    Args:
        weight: (O, I) float32.
        gram: (I, I) float32, sum of x x^T.
        damping: what is added to its diagonal, as a share of its mean.
        rounding: the grid, in the order in which columns lie; each group is of neighbouring columns.
        rounds: how often.
    """
    added = damping * gram.diagonal().mean()
    groups, width = len(rounding.scales), weight.shape[1] // len(rounding.scales)
    lost = weight.T - rounding.values(slice(None))
    with products("float32"):  # what is left of large sums that cancel
        for _ in range(rounds):
            for group in range(groups):
                part = slice(group * width, (group + 1) * width)
                _visit_group(gram, added, lost, rounding, group, part)


def _visit_group(gram: Tensor, added: Tensor, lost: Tensor, rounding: Grid, group: int, part: slice) -> None:
    """Refit the scale of a group, then round each of its columns again. `lost` is W - V, (I, O)."""
    own = gram[part, part].clone()
    own.diagonal().add_(added)
    own.diagonal()[own.diagonal() == 0] = 1.0  # an input that is always zero constrains nothing
    pull = torch.addmm(lost[part] * added, gram[part], lost)  # (W - V) H
    if isinstance(rounding, Rounding):
        _refit(own, pull, lost[part], rounding, group, part)
    for start in range(0, len(own), TILE):
        tile = slice(start, min(start + TILE, len(own)))
        columns = slice(part.start + tile.start, part.start + tile.stop)
        gained = _visit_tile(own[tile, tile], pull[tile], rounding, columns)
        lost[columns] += gained
        pull[tile.stop :].addmm_(own[tile.stop :, tile], gained)


def _visit_tile(own: Tensor, pull: Tensor, rounding: Grid, columns: slice) -> Tensor:
    """Round columns again that have H (t, t) and (W - V) H (t, O); what they were less what they become, (t, O)."""
    diagonal, before = own.diagonal()[:, None], rounding.values(columns)
    now, gained = before + pull / diagonal, torch.empty_like(before)
    if has_kernels(now) and isinstance(rounding, Rounding):
        from compress.passes.solvers.column_kernel import visited  # imports Triton

        weights = (own / -diagonal.T).fill_diagonal_(1.0)
        visited(weights, now.T.contiguous(), before.T.contiguous(), rounding, columns, gained)
        return gained
    chosen = torch.empty_like(before)
    projection = rounding.tile(columns, chosen)
    project_tile(own / -diagonal, now, gained, chosen, projection, before=before)
    projection.finish()
    return gained


def _refit(own: Tensor, pull: Tensor, lost: Tensor, rounding: Rounding, group: int, part: slice) -> None:
    """The scale at the lowest point of its parabola, as it will be stored; the old one where that is no better."""
    units = rounding.units(part)
    if rounding.kept is not None:
        units *= rounding.kept[part]
    through = own @ units
    slope, curve = (units * pull).sum(0), (units * through).sum(0)
    old = rounding.scales[group]
    if len(old) == 1:
        slope, curve = slope.sum(0, keepdim=True), curve.sum(0, keepdim=True)
    new = stored_scale(old + slope / curve)
    step = new - old
    better = (new > 0) & torch.isfinite(new) & (step * (curve * step - 2 * slope) < 0)
    step = torch.where(better, step, 0.0)
    rounding.put(group, old + step, rounding.zeros[group])
    lost -= units * step
    pull -= through * step
