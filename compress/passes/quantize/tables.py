"""Tables of values that rows share: fitted to their rows, and rows given to the table that serves them best.

Shapes: O rows, I columns, K entries of a table, G tables, S scales of a row, each of I / S neighbouring columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.encodings import Codebooks
from compress.encodings.codebook import dequantize, nearest, of_columns, stored_table, unscaled
from compress.encodings.uniform import narrowest, stored_scale
from compress.lazy import torch
from compress.passes.quantize.grouping import run_tables, table_losses
from compress.passes.quantize.kmeans import kmeans, points

if TYPE_CHECKING:
    from torch import Tensor


def solve(
    weight: Tensor,
    importance: Tensor,
    row_group: Tensor,
    entries: int,
    *,
    scale: Tensor | None = None,
    regroup: bool = True,
    period: int | None = None,
    iterations: int = 50,
    tolerance: float = 0.005,
) -> Codebooks:
    """The algorithm on plain tensors: tables, and scales if asked, that keep sum(importance * error**2) small.

    Each iteration fits the tables to their rows, lets every row move to the table that serves it best, and fits the
    scales; none of the three makes the error larger.

    Args:
        weight: (O, I) float32.
        importance: expands to (O, I), not negative, zero where masked.
        row_group: (O,) uint8, the table each row starts with; none of them without a row.
        entries: K.
        scale: (O, S) to start from, not negative; None for tables of the weights themselves.
        regroup: rows may change their table.
        period: rows this far apart share a table, and the tables of the rows between follow one another; None leaves
            every row free.
        iterations: at most this many.
        tolerance: an iteration that lowers the error by a smaller share is the last.

    Returns:
        Codes of the entries nearest to the weights, once tables and scales have their stored types.
    """
    table: Tensor | None = None
    before = math.inf
    for _ in range(iterations):
        values, share = weight, importance
        if scale is not None:
            values, share = unscaled(weight, scale), importance * of_columns(scale, weight.shape[1]).square()
        table = fit_tables(values, share, row_group, entries, table)
        if regroup and len(table) > 1:
            losses = table_losses(values, share, table)
            best = losses.argmin(1) if period is None else run_tables(losses, period)
            used, row_group = torch.unique(best, return_inverse=True)
            table, row_group = table[used], row_group.to(torch.uint8)
        elif scale is None:
            break
        entry = dequantize(nearest(weight, table, row_group, scale), table, row_group)
        if scale is not None:
            scale = fit_scales(weight, importance, entry, scale.shape[1])
            entry.mul_(of_columns(scale, weight.shape[1]))
        error = float((importance * (weight - entry).square_()).sum())
        if before - error <= tolerance * error:
            break
        before = error
    assert table is not None
    table = narrowest(table)
    scale = None if scale is None else narrowest(scale)
    return Codebooks(nearest(weight, table, row_group, scale), table, row_group, scale, period)


def fit_tables(
    values: Tensor, importance: Tensor, row_group: Tensor, entries: int, start: Tensor | None = None
) -> Tensor:
    """One table for each group of rows, by k-means on all its values.

    Args as in `solve`; `start` (G, K) is tables to start from.

    Returns:
        (G, K) float32, ascending, each table rounded to the type it will be stored in.
    """
    found = []
    for g in range(int(row_group.max()) + 1):
        rows = row_group == g
        places, masses = points(values[rows], importance if len(importance) == 1 else importance[rows])
        # Many small steps, each of which decides on the next: a device would wait for every one.
        begin = None if start is None else start[g].cpu()
        found.append(kmeans(places.cpu(), masses.cpu(), entries, start=begin).to(values.device))
    return stored_table(torch.stack(found).float())


def fit_scales(weight: Tensor, importance: Tensor, entry: Tensor, groups: int = 1) -> Tensor:
    """(O, S) scales, not negative, as they will be stored, that bring table entries (O, I) nearest to weights."""
    counted = entry * importance
    squares = _sums(counted * entry, groups)
    best = _sums(counted * weight, groups) / squares
    return stored_scale(torch.where(squares > 0, best, 0.0).clamp_(min=0))


def root_mean_square(weight: Tensor, mask: Tensor | None, groups: int = 1) -> Tensor:
    """(O, S) over the kept weights of each group of columns of a row, as it will be stored."""
    kept = weight.shape[1] // groups if mask is None else _sums(mask, groups).clamp_(min=1)
    return stored_scale((_sums(weight.square(), groups) / kept).sqrt_())


def _sums(values: Tensor, groups: int) -> Tensor:
    """(O, I) -> (O, S)."""
    if groups == 1:  # the same bits as ever: a sum over a view may be added up in another order
        return values.sum(1, keepdim=True)
    return values.view(len(values), groups, -1).sum(2)
