"""Optimal brain surgery, column by column: what GPTQ and SparseGPT share.

Minimise ||(W - V) X||^2 where the columns of V must be projected (rounded, zeroed) one after the other; what a
projection breaks in one column is repaired in the columns still to come. With H = X X^T + damping and the upper
triangular R of H = R R^T, the columns [a, b) as the algorithm sees them when it arrives there are

    W[:, a:b] + D R[:a, a:b] R[a:b, a:b]^-1,      D = (W - V)[:, :a],

which equals the published form (U = R^-1 is the upper Cholesky factor of H^-1, errors pushed to the right after every
tile), but needs one factorisation and no inverse of H, and reads the past instead of rewriting the future.

Sources: Frantar and Alistarh, "Optimal Brain Compression", 2022, arXiv 2208.11580; Frantar, Ashkboos, Hoefler and
Alistarh, "GPTQ", 2022, arXiv 2210.17323.

Shapes: O rows, I columns, t columns in a tile.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from compress.calibration.precision import must_round, products
from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.solvers.device import has_kernels
from compress.passes.solvers.offset_rounding import OffsetRounding
from compress.passes.solvers.projections import FloatRounding, Keeping, Rounding
from compress.passes.solvers.tiles import CHUNK, project_tile

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from compress.passes.solvers.tiles import Begin, ProjectionTile

STRIP = 64  # rows put in another order at once on a processor, whose cache holds them
LARGE_STRIP = 2048  # and on other devices
REACH = 1024  # columns whose errors are applied to a tile at once
PIECE = 1 << 18  # numbers reversed at once on a processor, whose cache holds them
LARGE_PIECE = 1 << 24  # and on other devices, where every operation has to be sent

# (column, its current values (O,)) -> the values to keep (O,); or the same stated as data
Project: TypeAlias = "Callable[[int, Tensor], Tensor] | Rounding | FloatRounding | OffsetRounding | Keeping"


class Factor:
    """R of H = R R^T for a damped Gram matrix, in a given order of columns.

    It is the lower Cholesky factor of H with rows and columns reversed, read backwards.
    """

    def __init__(self, gram: Tensor, damping: float, order: Tensor | None = None):
        """Gram (I, I) is not changed; `damping` is a share of the mean of its diagonal."""
        diagonal = gram.diagonal().clone()
        dead = diagonal == 0
        order = torch.arange(len(gram)) if order is None else order
        self.order = order
        self.dead = dead[order]
        self.num_dead = int(dead.sum())
        reverse = order.flip(0)
        damped = _reordered(gram, reverse).T  # symmetric; by columns, as LAPACK works on it
        damped.diagonal().add_(damping * diagonal.mean())
        damped.diagonal()[dead[reverse]] = 1.0  # an input that is always zero constrains nothing
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(damped, out=(damped, failed))  # in place: these are the largest tensors there are
        if not bool((failed == 0) & torch.isfinite(damped.diagonal()).all()):
            raise SolveError("the Gram matrix of the inputs is not positive definite at this damping")
        _reverse(damped.T.view(-1))
        self.upper = damped

    def block(self, rows: slice, columns: slice) -> Tensor:
        """R[rows, columns], sharing memory."""
        return self.upper[rows, columns]


def _reordered(gram: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of (I, I) in an order, a few rows at a time."""
    found, at_once = torch.empty_like(gram), STRIP if gram.device.type == "cpu" else LARGE_STRIP
    for start in range(0, len(gram), at_once):
        rows = order[start : start + at_once]
        torch.gather(gram.index_select(0, rows), 1, order.expand(len(rows), -1), out=found[start : start + at_once])
    return found


def _reverse(flat: Tensor) -> None:
    """In place, a piece of either end at a time."""
    left, right = 0, len(flat)
    piece = PIECE if flat.device.type == "cpu" else LARGE_PIECE
    while right - left > 1:
        size = min(piece, (right - left) // 2)
        first, last = flat[left : left + size], flat[right - size : right]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)
        left, right = left + size, right - size


def compensate(
    weight: Tensor, factor: Factor, *, tile: int, every: int, begin: Begin | None, project: Project
) -> Tensor:
    """Project the columns of `weight` (O, I) in the factor's order; returns what is lost, W - V (O, I), in that order.

    `begin` is called before the columns 0, every, 2*every, ... with the next `every` columns as they stand then; it is
    None where nothing is to be decided. `project` is called once per column, in order; one that is stated as data, a
    `Rounding` or `Keeping`, is carried out by a kernel where the device has one. `tile` is how many columns are worked
    on at once: it changes the speed and the rounding of the last bit, nothing else.
    """
    if isinstance(project, Rounding | Keeping) and has_kernels(weight):
        return _by_kernel(weight, factor, tile, every, begin, project)
    columns = weight.shape[1]
    tile, chunk = _aligned(tile, every), _aligned(CHUNK, every)
    lost = _in_order(weight, factor.order)  # columns that are not projected yet are here as they were given
    rounded = torch.empty(lost.shape, dtype=torch.bfloat16) if must_round(lost) else None  # what is lost, once more
    room = torch.empty(3, tile, weight.shape[0])  # the same for every tile: what is freed and asked for again adds up
    for a in range(0, columns, tile):
        part = slice(a, min(a + tile, columns))
        if begin and every > tile and a % every == 0:
            wide = slice(a, min(a + every, columns))
            begin(a, _current(lost, rounded, factor, wide, _inverse(factor, wide), torch.empty_like(lost[wide])).T)
        now, errors, chosen = room[:, : part.stop - a]
        inverse = _inverse(factor, part)
        _current(lost, rounded, factor, part, inverse, now)
        inner = begin if begin and every <= tile else None
        if isinstance(project, Rounding | FloatRounding | OffsetRounding | Keeping):
            tile_of: ProjectionTile = project.tile(part, chosen)
        else:
            tile_of = _Called(project, a, chosen)
        weights = (inverse / inverse.diagonal()[:, None]).T.contiguous()
        with products("float32"):  # rounding the factors of these small products would take longer than it saves
            project_tile(weights, now, errors, chosen, tile_of, chunk, every, inner and partial(_shifted, inner, a))
        tile_of.finish()
        lost[part] -= chosen
        if rounded is not None:
            rounded[part] = lost[part]
    return lost.T


class _Called:
    """A projection that is a function, column by column of a tile that begins at `start`."""

    def __init__(self, project: Callable[[int, Tensor], Tensor], start: int, chosen: Tensor):
        self.project, self.start, self.chosen = project, start, chosen

    def __call__(self, j: int, value: Tensor) -> None:
        self.chosen[j] = self.project(self.start + j, value)

    def finish(self) -> None:
        """Nothing is left to do."""


def _shifted(begin: Begin, start: int, j: int, current: Tensor) -> None:
    begin(start + j, current)


def _by_kernel(
    weight: Tensor, factor: Factor, tile: int, every: int, begin: Begin | None, projection: Rounding | Keeping
) -> Tensor:
    from compress.passes.solvers import column_kernel as kernel

    choice = projection.choice if isinstance(projection, Keeping) else None
    tile = min(tile, kernel.WIDEST)
    if choice and choice.of <= min(kernel.MOST_OF, tile):
        tile, begin = _aligned(tile, choice.of), None  # chosen where it is projected
    elif isinstance(projection, Keeping):
        projection = Keeping(projection.kept)
    if begin:
        tile = every if every <= kernel.WIDEST else _aligned(tile, every)
    return kernel.compensated(
        weight, factor.upper, factor.order, tile=tile, every=every, begin=begin, projection=projection
    )


def _in_order(weight: Tensor, order: Tensor) -> Tensor:
    """(O, I) -> (I, O), columns in an order: a column is contiguous."""
    found = torch.empty(weight.shape[1], weight.shape[0])
    for start in range(0, len(weight), STRIP):
        rows = slice(start, start + STRIP)
        found[:, rows] = weight[rows].index_select(1, order).T
    return found


def _current(
    given: Tensor, rounded: Tensor | None, factor: Factor, part: slice, inverse: Tensor, now: Tensor
) -> Tensor:
    """Into `now` (t, O), columns as they stand after everything before them has been compensated.

    `given` (I, O) is what was lost in the columns before, and the columns as they were from there on; `rounded` the
    same as bfloat16, where products are to be of that.
    """
    now.copy_(given[part])
    for start in range(0, part.start, REACH):  # of few different shapes: matrix libraries keep something for each
        rows = slice(start, min(start + REACH, part.start))
        with products("float32"):
            spread = factor.block(rows, part) @ inverse
        if rounded is None:
            now.addmm_(spread.T, given[rows])
        else:
            now += spread.bfloat16().T @ rounded[rows]
    return now


def _inverse(factor: Factor, part: slice) -> Tensor:
    upper = factor.block(part, part)
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True)
    return inverse


def _aligned(width: int, every: int) -> int:
    """About `width`, such that its multiples and those of `every` meet as often as possible."""
    if every <= width:
        return width // every * every
    return next(d for d in range(width, 0, -1) if every % d == 0)
