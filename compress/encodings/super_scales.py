"""The scales of super-blocks: found for every block alone, then rounded to whole numbers of a scale that they share.

For one block with values x, weights v and codes q that are fixed, sum v (s q - m - x)**2 is a parabola in the scale s
and the offset m: its lowest point is in closed form. Several scales are tried, each rounds x to codes, whose best s and
m are taken; the least loss wins. Then s and m become whole numbers of what the super-block shares, the numbers next to
them are tried too, and what is shared is fitted in the same way to the codes that all its blocks have then.

Source: the search of llama.cpp's k-quants (Kawrakow, 2023, pull request 1684: tried scales, each followed by least
squares). Differs from it in: weights are the importance of columns alone, not also the size of a weight; neighbouring
whole numbers are tried, and shared scales refitted.

Shapes: O = out features, I = in features, N super-blocks, B blocks of each, C columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.encodings.lookup import BlockScale
from compress.encodings.pieces import rows_in_piece
from compress.encodings.super_blocks import KINDS, WIDTH, nearest_units
from compress.encodings.uniform import CHUNK
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.encodings.super_blocks import SuperBlock, SuperBlockKind
    from compress.encodings.uniform import Search

SHIFTS = tuple(k / 5 for k in range(-5, 6))  # of the number of steps that a block spans: scales that are tried
NEIGHBOURS = (0, -1, 1)  # whole numbers tried around the nearest
REFITS = 2  # of what a super-block shares
LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class _Shared:
    """Scales, or offsets, of some super-blocks: `whole` (N, B) numbers of `outer` (N,), which float16 holds."""

    whole: Tensor
    outer: Tensor

    def of(self) -> Tensor:
        """(N, B)."""
        return self.whole * self.outer[:, None]


def fit(
    weight: Tensor, name: SuperBlockKind, *, search: Search = "minmax", importance: Tensor | None = None
) -> tuple[BlockScale, BlockScale | None]:
    """The scales of a weight, and the offsets where the kind has some.

    Args:
        weight: (O, I) float32, I a multiple of 256.
        name: of the kind.
        search: `minmax` spans the range of every block; `mse` searches for the least sum of squares, `weighted` for
            that of importance * error**2.
        importance: (I,) of every column, for a weighted search.
    """
    if search == "weighted" and importance is None:
        raise ValueError("a weighted search needs the importance of every column")
    (rows, columns), kind = weight.shape, KINDS[name]
    blocks = (columns // WIDTH, WIDTH // kind.columns, kind.columns)
    # A column in which nothing is ever read counts a little: a block may have no other.
    weighed = torch.ones(columns) if search != "weighted" or importance is None else _counted(importance)
    weighed = weighed.view(blocks)
    scale, offset = torch.empty(rows, *blocks[:2]), torch.empty(rows, *blocks[:2])
    outer, outer_offset = torch.empty(rows, blocks[0]), torch.empty(rows, blocks[0])
    step = rows_in_piece(CHUNK, columns, weight.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values = weight[part].reshape(-1, *blocks[1:])
        own = weighed.expand(part.stop - start, *blocks).reshape(values.shape)
        found, shift = _fitted(values, own, kind, search)
        scale[part], outer[part] = found.whole.view(scale[part].shape), found.outer.view(outer[part].shape)
        if shift is not None:
            offset[part], outer_offset[part] = (
                shift.whole.view(offset[part].shape), shift.outer.view(outer[part].shape)
            )  # fmt: skip
    inner = torch.uint8 if kind.offset else torch.int8
    stored = BlockScale(scale.flatten(1).to(inner), 1, kind.columns, outer.half())
    if not kind.offset:
        return stored, None
    return stored, BlockScale(offset.flatten(1).to(inner), 1, kind.columns, outer_offset.half())


def _counted(importance: Tensor) -> Tensor:
    least = importance.mean() * 1e-6
    return torch.where(least > 0, importance.clamp(min=least), 1.0)


def _fitted(values: Tensor, own: Tensor, kind: SuperBlock, search: Search) -> tuple[_Shared, _Shared | None]:
    """The scales and offsets of super-blocks (N, B, C), whose weights are weighed by `own`."""
    scale, offset = _spanning(values, kind, 0.0)
    if search != "minmax":
        scale, offset = _searched(values, own, kind)
    shared, shift = _rounded(scale, kind), None if offset is None else _rounded(offset, kind)
    if search == "minmax":
        return shared, shift
    least = _loss(values, own, shared, shift, kind).sum(1)
    for _ in range(REFITS):
        shared, shift = _neighbours(values, own, shared, shift, kind)
        tried, moved = _refitted(values, own, shared, shift, kind)
        before, after = (_loss(values, own, *each, kind).sum(1) for each in ((shared, shift), (tried, moved)))
        better = after < before
        shared = _Shared(shared.whole, torch.where(better, tried.outer, shared.outer))
        if shift is not None and moved is not None:
            shift = _Shared(shift.whole, torch.where(better, moved.outer, shift.outer))
        now = torch.where(better, after, before)
        if not bool((now < least).any()):
            break
        least = now
    return shared, shift


def _spanning(values: Tensor, kind: SuperBlock, more: float) -> tuple[Tensor, Tensor | None]:
    """(N, B): the scales, and offsets, with which a block spans all its steps and some more."""
    if kind.offset:
        low, high = values.amin(-1).clamp(max=0), values.amax(-1)
        return (high - low).clamp(min=0) / (kind.highest + more), -low
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))[..., 0]
    return largest / (kind.lowest - more), None  # there is one step more below zero than above: the largest gets it


def _searched(values: Tensor, own: Tensor, kind: SuperBlock) -> tuple[Tensor, Tensor | None]:
    """The scales, and offsets, with the least loss of every block alone."""
    best, best_offset = _spanning(values, kind, 0.0)
    least = _lost(values, own, best, best_offset, kind)
    for more in SHIFTS:
        scale, offset = _spanning(values, kind, more)
        units = nearest_units(values, scale, offset, kind)
        scale, offset = _least_squares(values, own, units, scale, offset)
        lost = _lost(values, own, scale, offset, kind)
        better = lost < least
        least, best = torch.where(better, lost, least), torch.where(better, scale, best)
        if offset is not None and best_offset is not None:
            best_offset = torch.where(better, offset, best_offset)
    return best, best_offset


def _least_squares(
    values: Tensor, own: Tensor, units: Tensor, scale: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(N, B): the best scales, and offsets, for codes in units; those given where nothing is better."""
    weighed = own * units
    squares, products = (weighed * units).sum(-1), (weighed * values).sum(-1)
    alone = torch.where(squares > 0, products / squares, scale)
    if offset is None:
        return alone, None
    total, units_sum, values_sum = own.sum(-1), weighed.sum(-1), (own * values).sum(-1)
    spread = total * squares - units_sum**2
    found = (total * products - values_sum * units_sum) / spread
    shift = (units_sum * products - squares * values_sum) / spread
    fine = (spread > 0) & (found > 0)
    kept, moved = torch.where(fine, found, scale), torch.where(fine, shift, offset)
    negative = moved < 0  # which offsets cannot be
    return torch.where(negative, alone.clamp(min=0), kept), moved.clamp(min=0)


def _rounded(wanted: Tensor, kind: SuperBlock) -> _Shared:
    """Scales (N, B) as whole numbers of one that they share: the largest is the largest number, or the lowest."""
    top = 2**kind.scale_bits - 1 if kind.offset else -kind.middle_scale
    largest = wanted.gather(1, wanted.abs().argmax(1, keepdim=True))[:, 0]
    outer = _half(largest / top)
    whole = (wanted / torch.where(outer == 0, torch.inf, outer)[:, None]).round_()
    return _Shared(_clamped(whole, kind), outer)


def _clamped(whole: Tensor, kind: SuperBlock) -> Tensor:
    return whole.clamp(-kind.middle_scale, 2**kind.scale_bits - 1 - kind.middle_scale)


def _half(values: Tensor) -> Tensor:
    """What float16 makes of them, and never infinite."""
    return values.clamp(-LARGEST, LARGEST).half().float()


def _neighbours(
    values: Tensor, own: Tensor, shared: _Shared, shift: _Shared | None, kind: SuperBlock
) -> tuple[_Shared, _Shared | None]:
    """For every block the best whole numbers of those next to its own."""
    least = _loss(values, own, shared, shift, kind)
    best, best_shift = shared, shift
    for tried, moved in _around(shared, shift, kind):
        lost = _loss(values, own, tried, moved, kind)
        better = lost < least
        least = torch.where(better, lost, least)
        best = _Shared(torch.where(better, tried.whole, best.whole), shared.outer)
        if moved is not None and best_shift is not None:
            best_shift = _Shared(torch.where(better, moved.whole, best_shift.whole), moved.outer)
    return best, best_shift


def _around(shared: _Shared, shift: _Shared | None, kind: SuperBlock) -> Iterator[tuple[_Shared, _Shared | None]]:
    for step in NEIGHBOURS:
        tried = _Shared(_clamped(shared.whole + step, kind), shared.outer)
        if shift is None:
            yield tried, None
            continue
        for also in NEIGHBOURS:
            yield tried, _Shared(_clamped(shift.whole + also, kind), shift.outer)


def _refitted(
    values: Tensor, own: Tensor, shared: _Shared, shift: _Shared | None, kind: SuperBlock
) -> tuple[_Shared, _Shared | None]:
    """What super-blocks share, by least squares for the codes that their blocks have."""
    units = nearest_units(values, shared.of(), None if shift is None else shift.of(), kind)
    steps = units * shared.whole[..., None]
    weighed = own * steps
    squares, products = (weighed * steps).sum((1, 2)), (weighed * values).sum((1, 2))
    if shift is None:
        return _Shared(shared.whole, _half(torch.where(squares > 0, products / squares, shared.outer))), None
    below = shift.whole[..., None].expand_as(own)
    other, mixed, against = (
        (own * below * below).sum((1, 2)), (weighed * below).sum((1, 2)), (own * below * values).sum((1, 2)),
    )  # fmt: skip
    spread = squares * other - mixed**2
    outer, moved = (
        (products * other - against * mixed) / spread,
        (products * mixed - against * squares) / spread,
    )
    fine = (spread > 0) & (outer > 0) & (moved >= 0)
    return (
        _Shared(shared.whole, _half(torch.where(fine, outer, shared.outer))),
        _Shared(shift.whole, _half(torch.where(fine, moved, shift.outer))),
    )


def _loss(values: Tensor, own: Tensor, shared: _Shared, shift: _Shared | None, kind: SuperBlock) -> Tensor:
    return _lost(values, own, shared.of(), None if shift is None else shift.of(), kind)


def _lost(values: Tensor, own: Tensor, scale: Tensor, offset: Tensor | None, kind: SuperBlock) -> Tensor:
    """(N, B): what rounding loses in every block."""
    found = nearest_units(values, scale, offset, kind).mul_(scale[..., None])
    if offset is not None:
        found.sub_(offset[..., None])
    lost: Tensor = torch.linalg.vecdot(found.sub_(values).square_(), own)
    return lost


__all__ = ["fit"]
