"""Which rows share a table: at first those with similarly distributed weights, then those that a table serves best.

Shapes: O rows, I columns, M quantiles, G groups and tables, K entries of a table.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from compress.encodings.pieces import rows_in_piece
from compress.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

QUANTILES = 16
CHUNK = 1 << 20  # weights sorted at once


def quantiles(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Where the weights of each row lie: (O, I) -> (O, M).

    Quantiles at (m + 1/2) / M of the kept weights. The Euclidean distance of two rows of them is, as far as M quantiles
    tell, the Wasserstein distance of the distributions. A row without kept weights is all zeros.
    """
    rows = rows_in_piece(CHUNK, weight.shape[1], weight.device)
    masks = torch.split(torch.ones(1, 1, dtype=torch.bool).expand(weight.shape) if mask is None else mask, rows)
    return torch.cat([_kept_quantiles(some, kept) for some, kept in zip(torch.split(weight, rows), masks, strict=True)])


def _kept_quantiles(weight: Tensor, mask: Tensor) -> Tensor:
    kept = mask.sum(1, keepdim=True)
    ascending = weight.masked_fill(~mask, torch.inf).sort(1).values
    at = (torch.arange(QUANTILES) + 0.5) / QUANTILES * kept
    return torch.where(kept > 0, ascending.gather(1, at.long()), 0.0)


def group(features: Tensor, count: int) -> Tensor:
    """Cluster rows by k-means.

    Args:
        features: (O, M).
        count: at most this many groups, up to 256; there are fewer where fewer rows differ.

    Returns:
        (O,) uint8, the group of each row; every number below the largest is used.
    """
    count = min(count, len(torch.unique(features, dim=0)))
    if count == 1:
        return torch.zeros(len(features), dtype=torch.uint8)
    from sklearn.cluster import KMeans  # takes a second to import
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn's

    points = (features / features.abs().max()).double().cpu().numpy()
    with threadpool_limits(1), warnings.catch_warnings():  # several threads add up in the order they happen to finish
        warnings.simplefilter("ignore", ConvergenceWarning)  # rows all but equal: fewer groups, taken care of below
        labels = KMeans(count, n_init=1, random_state=0).fit(points).labels_
    _, found = torch.unique(torch.from_numpy(labels), return_inverse=True)
    numbers: Tensor = found.to(features.device, torch.uint8)
    return numbers


def table_losses(values: Tensor, importance: Tensor, table: Tensor) -> Tensor:
    """What each row loses with each table, sum(importance * error**2), less what it loses with any.

    Sorted, a row needs K look-ups in its running sums for a table, not a look at every weight.

    Args:
        values: (O, I) float32.
        importance: expands to (O, I), not negative.
        table: (G, K) float32, ascending.

    Returns:
        (O, G) float64.
    """
    tables, entries = table.shape
    borders = ((table[:, 1:] + table[:, :-1]) / 2).flatten()
    rows = rows_in_piece(CHUNK, max(values.shape[1], tables * (entries + 1)), values.device)
    found = []
    for some, weights in zip(
        torch.split(values, rows), torch.split(importance.expand(values.shape), rows), strict=True
    ):
        ascending, order = some.sort(1)
        each = weights.gather(1, order).double()
        cuts = torch.searchsorted(ascending, borders.expand(len(some), -1).contiguous(), right=True)
        cuts = functional.pad(
            functional.pad(cuts.view(-1, tables, entries - 1), (1, 0)), (0, 1), value=values.shape[1]
        ).flatten(1)
        mass, moment = (
            functional.pad(each.cumsum(1), (1, 0)),
            functional.pad((each * ascending).cumsum(1), (1, 0)),
        )
        inside, sums = (t.gather(1, cuts).view(-1, tables, entries + 1).diff() for t in (mass, moment))
        found.append((table * (table * inside - 2 * sums)).sum(2))
    return torch.cat(found)


def run_tables(losses: Tensor, period: int) -> Tensor:
    """The best tables for rows that follow one another in runs, the first run with the first table and so on.

    Args:
        losses: (O, G) of each row with each table.
        period: rows this far apart share a table; O is a multiple of it.

    Returns:
        (O,) int64, below G: not falling within a period, and the same in every one. Some tables may be left out.
    """
    at_place = losses.view(-1, period, losses.shape[1]).sum(0)
    upto = functional.pad(at_place.cumsum(0), (0, 0, 1, 0))  # (period + 1, G), of all rows before each border
    # total[p]: the least that the rows before border p can lose with the tables so far; start[g][p]: where g begins.
    total, starts = upto[:, 0], []
    for g in range(1, losses.shape[1]):
        least, start = (total - upto[:, g]).cummin(0)
        total = upto[:, g] + least
        starts.append(start)
    label = torch.zeros(period, dtype=torch.long)
    end = period
    for g in range(losses.shape[1] - 1, 0, -1):
        begin = int(starts[g - 1][end])
        label[begin:end] = g
        end = begin
    return label.repeat(len(losses) // period)


def even_runs(rows: int, period: int, count: int) -> Tensor:
    """(O,) uint8: `count` runs of nearly the same length in every period."""
    return (torch.arange(rows) % period * count // period).to(torch.uint8)
