"""Experts that calibration sent so few tokens that nothing is concluded from them.

Passes are given no statistics of such an expert, as of a layer that nothing ever reached: a quantizer rounds, a pruner
goes by magnitude, a correction does not look at the inputs. It is decided here for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from compress.calibration.statistics import Statistics
    from compress.engine.context import Context
    from compress.engine.ledger import Record
    from compress.models.site import Site


def usable(context: Context, site: Site, statistics: Mapping[str, Statistics]) -> Statistics | None:
    """What a pass is given of a site's inputs; None where nothing, or too little, is known."""
    found = statistics.get(site.name)
    few = found is not None and site.is_expert and found.tokens < context.experts.min_tokens
    return None if few else found


def notes_on_tokens(
    context: Context, site: Site, statistics: Mapping[str, Statistics], fallback: str | None
) -> dict[str, Any]:
    """What the report says of an expert that saw too few tokens; nothing of any other site.

    `fallback`: what was done instead of the pass, in words, with the reason that it gave behind a colon.
    """
    least = context.experts.min_tokens
    if not site.is_expert or usable(context, site, statistics) is not None:
        return {}
    tokens = statistics[site.name].tokens if site.name in statistics else 0
    done = f"{fallback.partition(':')[0]}: " if fallback else ""
    return {"fallback": f"{done}it saw {tokens} tokens, fewer than {least}", "tokens": tokens, "fewer_than": least}


def experts_in_short(records: Iterable[Record]) -> Iterator[str]:
    """A sentence for each pass on the experts that saw too few tokens."""
    found: dict[tuple[str, int], list[str]] = {}
    for record in records:
        for name, notes in record.notes.items():
            if "fewer_than" in notes:
                found.setdefault((name, notes["fewer_than"]), []).append(f"{record.site} ({notes['tokens']})")
    for (name, least), experts in found.items():
        what = "1 expert" if len(experts) == 1 else f"{len(experts)} experts"
        yield (
            f"{what} saw fewer than {least} tokens, such as {experts[0]}: {name} worked without statistics there; "
            "calibrate with more data, or set calibrate_all_experts"
        )
