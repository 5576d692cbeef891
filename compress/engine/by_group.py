"""A convolution in groups, solved group by group: the rows of each have inputs of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compress.calibration.grouped import GroupedStatistics
from compress.engine.retry import solved
from compress.passes.base import Edit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compress.passes.base import LinearPass, Target


def solved_by_group(pass_: LinearPass, target: Target) -> tuple[Edit, str | None]:
    """What `solved` gives, where each group of rows may have statistics of its own.

    Args:
        pass_: one to which rows are independent, given the statistics, where there are several groups.
        target: a matrix.
    """
    statistics = target.statistics
    if not isinstance(statistics, GroupedStatistics):
        return solved(pass_, target)
    rows = len(target.weight) // statistics.groups
    edits, reasons = [], Counter[str]()
    for number in range(statistics.groups):
        part = slice(number * rows, (number + 1) * rows)
        edit, reason = solved(pass_, _rows(target, part, statistics, number))
        edits.append(edit)
        if reason is not None:
            reasons[reason] += 1
    said = [f"{reason} (in {count} of {statistics.groups} groups)" for reason, count in reasons.items()]
    return _joined(edits), "; ".join(said) or None


def _rows(target: Target, part: slice, statistics: GroupedStatistics, number: int) -> Target:
    mask, original = target.mask, target.original
    return replace(
        target,
        weight=target.weight[part],
        mask=None if mask is None else mask[part],
        statistics=statistics.of_group(number),
        rows=None,
        columns=None,
        original=None if original is None else original[part],
        stored=None,
    )


def _joined(edits: Sequence[Edit]) -> Edit:
    """Edits of rows upon rows as one: the inverse of what `split_rows` does with encodings, values and masks."""
    encodings = [edit.encoding for edit in edits if edit.encoding is not None]
    notes = Counter[str]()
    for edit in edits:
        notes.update(edit.notes)
    return Edit(
        weight=_stacked([edit.weight for edit in edits]),
        mask=_stacked([edit.mask for edit in edits]),
        encoding=encodings[0].above(encodings[1:]) if encodings else None,
        shift=_stacked([edit.shift for edit in edits]),
        notes=dict(notes),
    )


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None
