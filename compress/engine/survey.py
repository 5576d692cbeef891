"""A look at every matrix before the passes that ask for it know their options for any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.engine.few_tokens import usable
from compress.engine.parcels import Facts
from compress.engine.stage import generator_for
from compress.engine.sweep import Wanted, gradients, most_needed, sites_by_block, sweep
from compress.io.keys import key_of
from compress.passes.targets import make_target, works_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compress.calibration.statistics import Statistics
    from compress.engine.context import Context
    from compress.engine.sweep import Unit
    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.passes.base import SurveyingPass

SurveyedSites = list[dict[str, Any]]  # for each pass, site -> what it saw


def survey_stage(
    context: Context, stage: int, passes: Sequence[SurveyingPass], batches: Sequence[Tensor], key: str
) -> list[SurveyingPass]:
    """Show every matrix to passes that survey, and change nothing; the passes with their options for every matrix."""
    seen: SurveyedSites = [{} for _ in passes]
    key, options = key_of(key, "survey"), [(p.key, p.options()) for p in passes]
    wanted = _wanted_by_survey(context.graph, passes)
    with gradients(wanted):
        for unit in sweep(context, wanted, batches):
            key = key_of(key, stage, unit.name, [s.name for s in unit.sites], options)
            file = f"s{stage:02d}-survey-{unit.name}"
            row = context.ledger.load_row(file, key)
            if row is None:
                statistics = unit.statistics() if unit.sites else {}
                row = {str(i): _surveyed(context, stage, i, p, unit, statistics) for i, p in enumerate(passes)}
                context.ledger.commit_row(file, key, row)
            for i, found in enumerate(seen):
                found.update(row[str(i)])
    return [p.allocated(found) for p, found in zip(passes, seen, strict=True)]


def _wanted_by_survey(graph: Graph, passes: Sequence[SurveyingPass]) -> Wanted:
    sites = sites_by_block(graph, passes)
    needs = {
        s.name: most_needed([p.survey_needs for p in passes if works_on(p, s)]) for each in sites.values() for s in each
    }
    return Wanted(
        label=f"{'+'.join(p.key for p in passes)}: survey",
        sites=sites,
        needs={name: need for name, need in needs.items() if need != "none"},
        ranged=frozenset(),
        calibrated=any(p.survey_needs != "none" for p in passes),
        learns=False,
    )


def _surveyed(
    context: Context, stage: int, position: int, pass_: SurveyingPass, unit: Unit, statistics: dict[str, Statistics]
) -> dict[str, Any]:
    """Site -> what a pass saw of it, one matrix in memory at a time."""

    def seen(site: Site) -> Any:
        target = make_target(
            context.graph,
            [site],
            [context.weight(site)],
            statistics=usable(context, site, statistics),
            generator=generator_for(context.seed, stage, position, site.name),
            original=context.original if pass_.compares else None,
        )
        return pass_.at(site.name).survey(target)

    sites = [s for s in unit.sites if works_on(pass_, s)]
    found = context.executor.map(seen, sites, Facts(), lambda s: float(s.shape[0] * s.shape[1]))
    return {site.name: each for site, each in zip(sites, found, strict=True)}
