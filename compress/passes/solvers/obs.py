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

from typing import TYPE_CHECKING, TypeAlias

from compress.calibration.precision import products
from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.solvers.device import has_kernels
from compress.passes.solvers.projections import Keeping, Rounding

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

GATHERED = 4  # tiles read at once: every reading touches the whole matrix
REACH = 1024  # columns whose errors are applied to a tile at once
PIECE = 1 << 18  # numbers reversed at once on a processor, whose cache holds them
LARGE_PIECE = 1 << 24  # and on other devices, where every operation has to be sent
CHUNK = 16  # columns whose errors are applied one by one; those before it in the tile are applied together

Begin: TypeAlias = "Callable[[int, Tensor], None]"  # (first column, current columns (O, width)): decide scales or masks
Project: TypeAlias = "Callable[[int, Tensor], Tensor]"  # (column, its current values (O,)) -> the values to keep (O,)


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
        damped = gram[reverse[:, None], reverse].T  # symmetric; by columns, as LAPACK works on it
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
    tile = _aligned(tile, every)
    chunk = _aligned(CHUNK, every)
    lost = torch.empty(columns, weight.shape[0])  # D, transposed: a column is contiguous
    ahead = torch.empty(0)  # columns already gathered, from `a` on
    room = torch.empty(2, tile, weight.shape[0])  # the same for every tile: what is freed and asked for again adds up
    for a in range(0, columns, tile):
        b = min(a + tile, columns)
        if begin and every > tile and a % every == 0:
            wide = slice(a, min(a + every, columns))
            given = _columns(weight, factor, wide)
            begin(a, _current(given, lost, factor, wide, torch.empty_like(given)).T)
        if not len(ahead):
            ahead = _columns(weight, factor, slice(a, a + GATHERED * tile))
        given, ahead = ahead[: b - a], ahead[b - a :]
        now = _current(given, lost, factor, slice(a, b), room[1, : b - a])
        inverse = _triangular_inverse(factor.block(slice(a, b), slice(a, b)))
        pivots = inverse.diagonal().tolist()
        errors = room[0, : b - a]
        first = 0  # `now` holds the effect of all errors before this column, up to the end of its chunk
        with products("float32"):  # rounding the factors of these small products would take longer than it saves
            for j in range(b - a):
                if begin and every <= tile and j % every == 0:
                    known = first if j % chunk else 0
                    group = slice(j, min(j + every, b - a))
                    push = inverse[known:j, group].T @ errors[known:j]
                    begin(a + j, (now[group] - push).T)
                if j % chunk == 0:
                    now[j : j + chunk] -= inverse[:j, j : j + chunk].T @ errors[:j]
                    first = j
                value = now[j] - inverse[first:j, j] @ errors[first:j] if j > first else now[j]
                chosen = project(a + j, value)
                torch.sub(given[j], chosen, out=lost[a + j])
                torch.sub(value, chosen, out=errors[j]).div_(pivots[j])
    return lost.T


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


def _columns(weight: Tensor, factor: Factor, part: slice) -> Tensor:
    """Some columns in the factor's order, transposed: a column is contiguous."""
    return weight.index_select(1, factor.order[part]).T.contiguous()


def _current(given: Tensor, lost: Tensor, factor: Factor, part: slice, push: Tensor) -> Tensor:
    """Columns as they stand after everything before them has been compensated; `push` is room as large as `given`."""
    push.zero_()
    if not part.start:
        return push.copy_(given)
    for start in range(0, part.start, REACH):  # of few different shapes: matrix libraries keep something for each
        rows = slice(start, min(start + REACH, part.start))
        push.addmm_(factor.block(rows, part).T, lost[rows])
    return push.copy_(torch.linalg.solve_triangular(factor.block(part, part).T, push, upper=False)).add_(given)


def _triangular_inverse(upper: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True)
    return inverse


def _aligned(width: int, every: int) -> int:
    """About `width`, such that its multiples and those of `every` meet as often as possible."""
    if every <= width:
        return width // every * every
    return next(d for d in range(width, 0, -1) if every % d == 0)
