"""What the manager checks about every edit before it counts. It observes; it does not ask the pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compress.encodings import Encoding, LowRankFactors, Weight
from compress.encodings.pieces import rows_in_piece
from compress.encodings.uniform import CHUNK
from compress.errors import CompressError, NonFiniteError
from compress.io.source_code import place_of, plug_ins
from compress.passes.interface import Edit
from compress.passes.prune.selection import pattern

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.site import Site
    from compress.passes.base import Pass

Refuse = Callable[[str], CompressError]
HUGE = 1e19  # the square of a larger number overflows float32


def observed(
    site: Site, pass_: Pass, before: Weight, old: Tensor, edit: Edit, store: torch.dtype
) -> tuple[Weight, float]:
    """The weight an edit makes, in its stored type, and its relative error ||new - old|| / ||old||.

    `old` is what to compare with, (out, in) float32: `before`, or the original for a pass that compares with that.

    Raises:
        CompressError: the edit has the wrong shape, is not finite, has codes out of range, revives a zero, or breaks
            the pattern it promised. This is a defect of the pass, never of the user's input.
        NonFiniteError: the same, of weights that are too large to compute with.
    """

    def refuse(what: str) -> CompressError:
        largest = float(old.abs().max())
        if largest > HUGE:
            return NonFiniteError(
                f"{site.name} holds weights as large as {largest:.3g}, with which {pass_.key} overflows ({what}); "
                "get a clean checkpoint, or exclude it"
            )
        return CompressError(f"{pass_.key} on {site.name}: {what}; {_blamed(pass_)}")

    refuse_wrong_types(pass_, site.name, edit)
    if edit.keeps:
        return before, 0.0
    if edit.mask is not None and tuple(edit.mask.shape) != site.shape:
        raise refuse(f"a mask of shape {tuple(edit.mask.shape)}, not {site.shape}")
    if before.mask is not None and (edit.mask is None or bool((edit.mask & ~before.mask).any())):
        raise refuse("zeros that were already there have come back")
    low_rank = edit.low_rank or before.low_rank
    if edit.low_rank is not None:
        defect = edit.low_rank.defect(site.shape)
        if defect:
            raise refuse(defect)
        if edit.weight is None and edit.encoding is None:
            kept = Weight(inputs=before.inputs) if edit.replaces else before
            corrected = replace(kept, low_rank=low_rank)
            return corrected, _relative_error(corrected, old)
    weight = _from_codes(edit, refuse, site) if edit.encoding else _from_values(edit, refuse, site, store)
    wanted = pattern(getattr(pass_.at(site.name), "sparsity", 0.0))
    if wanted and edit.mask is not None and int(edit.mask.view(-1, wanted[1]).sum(1).max()) > wanted[0]:
        raise refuse(f"more than {wanted[0]} of {wanted[1]} neighbouring weights kept")
    weight = replace(weight, inputs=before.inputs, low_rank=low_rank)
    return weight, _relative_error(weight, old)


def refuse_wrong_types(pass_: Pass, name: str, edit: object) -> None:
    """Refuse what is no edit, or one whose parts are not what they are called.

    Raises:
        CompressError: says which part, and what it should be.
    """
    if not isinstance(edit, Edit):
        raise CompressError(
            f"{pass_.key} on {name}: it returned a {type(edit).__name__}, and should an Edit; {_blamed(pass_)}"
        )
    kinds = (("encoding", Encoding), ("low_rank", LowRankFactors), ("weight", torch.Tensor), ("mask", torch.Tensor))
    for part, kind in kinds:
        value = getattr(edit, part)
        if value is not None and not isinstance(value, kind):
            said = f"`{part}` of its edit is a {type(value).__name__}, and should be of {kind.__name__}"
            raise CompressError(f"{pass_.key} on {name}: {said}; {_blamed(pass_)}")
    for part, fine in (("weight", torch.is_floating_point), ("mask", lambda value: value.dtype == torch.bool)):
        value = getattr(edit, part)
        if value is not None and not fine(value):
            said = f"`{part}` of its edit holds {value.dtype}, and should {'bool' if part == 'mask' else 'float32'}"
            raise CompressError(f"{pass_.key} on {name}: {said}; {_blamed(pass_)}")


def _relative_error(weight: Weight, old: Tensor) -> float:
    """||new - old|| / ||old||, a few rows at a time: temporaries stay in the cache."""
    lost, size = torch.zeros(2, dtype=torch.float64, device=old.device)
    step = rows_in_piece(CHUNK, old.shape[1], old.device)
    for start in range(0, len(old), step):
        rows = slice(start, start + step)
        was = old[rows]
        lost += (weight.rows(rows).dequantize() - was).square_().sum()
        size += was.square().sum()
    return math.sqrt(lost / size) if size else math.sqrt(lost)


def observed_vector(name: str, pass_: Pass, before: Tensor, edit: Edit, store: torch.dtype) -> Weight:
    """A vector as a pass made it, (1, N) in its stored type.

    Raises:
        CompressError: as `observed`.
    """
    refuse_wrong_types(pass_, name, edit)
    values = edit.weight
    if values is None or values.shape != before.shape:
        raise CompressError(f"{pass_.key} on {name}: not {before.numel()} values; {_blamed(pass_)}")
    stored = values.detach().to(store).view(1, -1)
    if not torch.isfinite(stored).all():
        raise CompressError(f"{pass_.key} on {name}: not finite in {store}; {_blamed(pass_)}")
    return Weight(stored)


def _blamed(pass_: Pass) -> str:
    """Whose defect an impossible edit is."""
    kind = type(pass_)
    return f"this is a defect of {place_of(kind)}" if plug_ins([kind]) else "this is a defect, please report it"


def _from_values(edit: Edit, refuse: Refuse, site: Site, store: torch.dtype) -> Weight:
    values = edit.weight
    if values is None or tuple(values.shape) != site.shape:
        raise refuse(f"new values of shape {None if values is None else tuple(values.shape)}, not {site.shape}")
    stored: Tensor = values.to(store)
    if edit.mask is not None:
        stored = stored.masked_fill(~edit.mask, 0)
    if not torch.isfinite(stored).all():
        raise refuse(f"values that are not finite in {store}")
    return Weight(stored, edit.mask)


def _from_codes(edit: Edit, refuse: Refuse, site: Site) -> Weight:
    e = edit.encoding
    assert e is not None
    if tuple(e.codes.shape) != site.shape:
        raise refuse(f"codes of shape {tuple(e.codes.shape)}, not {site.shape}")
    defect = e.defect()
    if defect:
        raise refuse(defect)
    return Weight(mask=edit.mask, encoding=e)
