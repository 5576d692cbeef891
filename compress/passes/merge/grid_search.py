"""Options of a merge, chosen by trying values on data."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.passes.merge.base import MergePass
    from compress.passes.merge.models import Models, Tried


def chosen(pass_: MergePass, models: Models) -> MergePass:
    """A merge with the options of `choose` set to the best of the values that were named.

    Of equals the first wins. Everything that was tried is noted.
    """
    assert pass_.choose
    plain, names = replace(pass_, choose=None, by="score"), list(pass_.choose)
    grid: list[dict[str, Any]] = [dict(zip(names, values, strict=True)) for values in product(*pass_.choose.values())]
    found = plain.learn(models) if plain.learns_once else None
    every = models.over(grid, len(grid), "choose")
    tries = [(options, models.tried(replace(plain, **options), found)) for options in every]
    if pass_.by == "negative_flips":
        end: dict[str, Any] = {plain.other_end: 1.0} if plain.other_end else {}
        several = len(plain.models) > 1
        other = score(models.tried(replace(plain, **end), found) if several else models.tried_alone(1))
        as_good = [each for each in tries if score(each[1]) >= other] or tries
        options, _ = min(as_good, key=lambda each: flips(each[1]))
    else:
        options, _ = max(tries, key=lambda each: score(each[1]))
    models.notes |= {"tried": [{**each, "found": noted(result)} for each, result in tries], "chosen": options}
    return replace(plain, **options)


def score(found: Mapping[str, Tried]) -> float:
    """The mean over the sources; more is better."""
    return sum(each.score for each in found.values()) / len(found)


def flips(found: Mapping[str, Tried]) -> float:
    """The mean share over the sources."""
    return sum(each.negative_flips or 0.0 for each in found.values()) / len(found)


def noted(found: Mapping[str, Tried]) -> dict[str, dict[str, Any]]:
    """The results per source, for the report."""
    return {name: vars(each) for name, each in found.items()}
