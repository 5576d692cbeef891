"""Stacking: matrices fed by the same input are solved as one, where rows are independent or they share a scale."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.models.fused import fused_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from compress.calibration.statistics import Statistics
    from compress.models.site import Site
    from compress.passes.base import Edit, LinearPass


def stacks(
    pass_: LinearPass, sites: list[Site], found: dict[str, Statistics], masked: Callable[[Site], bool]
) -> list[list[Site]]:
    """Groups of sites that are solved as one: with the same inputs and options, all masked or none."""

    def fits(a: Site, b: Site) -> bool:
        mine, alike = pass_.at(a.name), found.get(a.name) is found.get(b.name)
        rows = mine.rowwise and found.get(a.name) is not None
        fused = mine.shares_scale and fused_name(a.name) is not None and fused_name(a.name) == fused_name(b.name)
        return alike and (rows or fused) and a.groups == 1 and masked(a) == masked(b) and mine == pass_.at(b.name)

    grouped: list[list[Site]] = []
    for site in sites:
        for group in grouped:
            if fits(group[0], site):
                group.append(site)
                break
        else:
            grouped.append([site])
    return grouped


def split_rows(edit: Edit, group: list[Site]) -> list[Edit]:
    """The edit of a stack as the edits of its sites."""
    if len(group) == 1:
        return [edit]
    parts, start = [], 0
    for site in group:
        rows = slice(start, start + site.shape[0])
        start = rows.stop
        e = None if edit.encoding is None else edit.encoding.rows(rows)
        weight = None if edit.weight is None else edit.weight[rows]
        mask = None if edit.mask is None else edit.mask[rows]
        shift = None if edit.shift is None else edit.shift[rows]
        parts.append(replace(edit, weight=weight, mask=mask, encoding=e, shift=shift))
    return parts
