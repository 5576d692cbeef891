# mypy: disable-error-code="valid-type, operator, no-untyped-def, no-untyped-call, untyped-decorator"
"""The columns of a tile projected one after the other inside one kernel, for graphics processors.

The same algorithm as `obs.py`, which has its formulas. There every column is a handful of operations on all rows; here
a program takes a few rows through all columns of a tile without leaving its registers, and what a tile lost is applied
to the next ones by one large product. Rows do not depend on each other, so programs need not wait for each other.

Imported where Triton is installed or not; `usable` of `runtime/launch.py` says whether it runs.

Shapes: O rows, I columns, t columns in a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.precision import products
from compress.passes.solvers.projections import Rounding
from compress.runtime.triton_jit import constexpr, jit  # noqa: TC001 - read when a kernel is compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from compress.passes.solvers.projections import Keeping

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

WIDEST = 128  # columns a program holds in registers
MOST_OF = 32  # columns chosen among inside the kernel: each is compared with each
ROWS = 4  # of a program: what 255 registers hold
WARPS = 1  # then columns are exchanged without barriers
ROUND, KEEP, CHOOSE = 0, 1, 2


@jit
def project(
    now, given, inverse, lost, codes, kept, scales, zeros, group, size, rows, width, groups_row, KIND: constexpr,
    MASKED: constexpr, HIGHEST: constexpr, OWN: constexpr, KEPT: constexpr, OF: constexpr, AGAIN: constexpr,
    T: constexpr, BR: constexpr,
):  # fmt: skip
    """`now`, `given` are (O, t), `inverse` (t, t), what is written (t, O), as `kept` is.

    `OWN`: scales have rows. `AGAIN`: errors are taken of what was given, not of what a column stands at.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, T)
    inside = (r < rows)[:, None] & (c < width)[None, :]
    place = r[:, None] * width + c[None, :]
    along = c[None, :] * rows + r[:, None]
    tile = tl.load(now + place, mask=inside, other=0.0)
    chosen = tl.zeros((BR, T), dtype=tl.float32)
    if MASKED:
        keep = tl.load(kept + along, mask=inside, other=0).to(tl.float32)
    if KIND == 0:
        number = tl.zeros((BR, T), dtype=tl.float32)
        own = tl.load(group + c, mask=c < width, other=0).to(tl.int32)[None, :] * groups_row + r[:, None] * OWN
        step = tl.load(scales + own, mask=inside, other=1.0)
        middle = tl.load(zeros + own, mask=inside, other=0.0)
    if AGAIN:
        earlier = tl.load(given + place, mask=inside, other=0.0)
    if KIND == 2:
        weighed = tl.load(size + c, mask=c < width, other=0.0)[None, :]
    for j in range(width):
        here = (c == j)[None, :]
        if KIND == 2:  # noqa: SIM102 - known when compiled: `keep` is there only then
            if j % OF == 0:
                score = tile * weighed
                score = tl.where(keep != 0, score * score, float("-inf"))
                lower = tl.zeros((BR, T), dtype=tl.int32)
                for i in range(OF):
                    other = tl.sum(tl.where((c == j + i)[None, :], score, 0.0), 1)[:, None]
                    lower += ((other < score) | ((other == score) & (j + i < c)[None, :])).to(tl.int32)
                run = ((c >= j) & (c < j + OF))[None, :]
                keep = tl.where(run & (lower < OF - KEPT), 0.0, keep)
        value = tl.sum(tl.where(here, tile, 0.0), 1)
        if KIND == 0:
            s = tl.sum(tl.where(here, step, 0.0), 1)
            z = tl.sum(tl.where(here, middle, 0.0), 1)
            u = tl.minimum(tl.maximum(tl.div_rn(value, s), -2097152.0), 2097152.0)
            code = tl.minimum(tl.maximum(((u + 12582912.0) - 12582912.0) + z, 0.0), HIGHEST)  # rounded, ties to even
            if MASKED:
                code = tl.where(tl.sum(tl.where(here, keep, 0.0), 1) != 0, code, z)
            number = tl.where(here, code[:, None], number)
            projected = (code - z) * s
        else:
            projected = value * tl.sum(tl.where(here, keep, 0.0), 1)
        projected += value - value  # what is not finite stays so: a code would hide it
        chosen = tl.where(here, projected[:, None], chosen)
        if AGAIN:
            compared = tl.sum(tl.where(here, earlier, 0.0), 1)
        else:
            compared = value
        error = (compared - projected) / tl.load(inverse + j * width + j)
        tile -= error[:, None] * tl.load(inverse + j * width + c, mask=c < width, other=0.0)[None, :]
    tl.store(lost + along, tl.load(given + place, mask=inside, other=0.0) - chosen, mask=inside)
    if KIND == 0:
        tl.store(codes + along, number.to(tl.uint8), mask=inside)
    if KIND == 2:
        tl.store(kept + along, keep.to(tl.int8), mask=inside)


def compensated(
    weight: Tensor,
    upper: Tensor,
    order: Tensor,
    *,
    tile: int,
    every: int,
    begin: Callable[[int, Tensor], None] | None,
    projection: Rounding | Keeping,
) -> Tensor:
    """What `obs.compensate` returns, W - V (O, I) in the factor's order.

    Args:
        weight: (O, I) float32.
        upper: (I, I), R of the factor.
        order: (I,) int64, of the factor.
        tile: columns of a kernel.
        every: `begin` is called in front of so many columns; a multiple of `tile`.
        begin: as in `obs.compensate`; None where nothing is to be decided.
        projection: what the columns are projected onto.
    """
    rows, columns = weight.shape
    lost = torch.empty(columns, rows, dtype=weight.dtype, device=weight.device)
    inverses = _inverses(upper, tile)
    for number, a in enumerate(range(0, columns, tile)):
        part = slice(a, min(a + tile, columns))
        if begin and a % every == 0:
            wide = slice(a, min(a + every, columns))
            begin(a, _current(weight, upper, order, lost, wide, _inverses(upper[wide, wide], every)[0])[1])
        given, now = _current(weight, upper, order, lost, part, inverses[number])
        _launch(projection, now, given, inverses[number], lost[part], part)
    return lost.T


def visited(weights: Tensor, now: Tensor, before: Tensor, rounding: Rounding, part: slice, gained: Tensor) -> None:
    """What `tiles.project_tile` does to columns `part` that were rounded before.

    Args:
        weights: (t, t), in row j what the errors of column j take from all others, and 1 from itself.
        now: (O, t), the columns as they would stand best.
        before: (O, t), as they are.
        rounding: the grid.
        part: the numbers of the columns.
        gained: (t, O), written: what they were less what they become.
    """
    _launch(rounding, now, before, weights, gained, part, again=True)


def _current(
    weight: Tensor, upper: Tensor, order: Tensor, lost: Tensor, part: slice, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """(O, t) columns, and as they stand after everything before them has been compensated."""
    given = weight.index_select(1, order[part])
    if not part.start:
        return given, given
    with products("float32"):
        spread = upper[: part.start, part] @ inverse
    return given, torch.addmm(given, lost[: part.start].T, spread)


def _inverses(upper: Tensor, tile: int) -> list[Tensor]:
    """The inverses of the blocks of `tile` columns on the diagonal, all whole ones at once."""
    whole, down, right = len(upper) // tile, *upper.stride()
    found: list[Tensor] = []
    if whole:
        blocks = upper.as_strided((whole, tile, tile), (tile * (down + right), down, right), upper.storage_offset())
        found += _inverse(blocks).contiguous().unbind()
    rest = upper[whole * tile :, whole * tile :]
    return [*found, _inverse(rest).contiguous()] if len(rest) else found


def _inverse(upper: Tensor) -> Tensor:
    eye = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    made: Tensor = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    return made


def _launch(
    projection: Rounding | Keeping,
    now: Tensor,
    given: Tensor,
    inverse: Tensor,
    lost: Tensor,
    part: slice,
    again: bool = False,
) -> None:
    rows, width = given.shape
    ours: dict[str, Any] = {"T": max(16, triton.next_power_of_2(width)), "BR": ROWS, "num_warps": WARPS}
    nothing = lost  # stands for what a kind does not read
    if isinstance(projection, Rounding):
        kept = nothing if projection.kept is None else projection.kept[part].view(torch.int8)
        tensors = projection.codes[part], kept, projection.scales, projection.zeros, projection.group[part], nothing
        own = int(projection.scales.shape[1] > 1)
        flags = {"KIND": ROUND, "MASKED": projection.kept is not None, "HIGHEST": float(projection.highest), "OWN": own}
        flags |= {"KEPT": 0, "OF": 1}
        groups_row = projection.scales.shape[1]
    else:
        choice, kept = projection.choice, projection.kept[part].view(torch.int8)
        tensors = nothing, kept, nothing, nothing, nothing, nothing if choice is None else choice.size[part]
        flags = {"KIND": KEEP if choice is None else CHOOSE, "MASKED": True, "HIGHEST": 0.0, "OWN": 0}
        flags |= {"KEPT": choice.keep, "OF": choice.of} if choice else {"KEPT": 0, "OF": 1}
        groups_row = 0
    grid = (triton.cdiv(rows, ROWS),)
    flags["AGAIN"] = again
    project[grid](now, given, inverse, lost, *tensors, rows, width, groups_row, **flags, **ours)
