"""Plans a pass that counts the statistics of batch norms again. Reads no weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import Problem
from compress.models.batch_norms import batch_norms
from compress.passes.retrain.recalibrate_norms import RecalibrateNorms
from compress.planning import checks
from compress.planning.state import PassPlan, Planned

if TYPE_CHECKING:
    from compress.passes import Pass
    from compress.planning.state import PlanState


def plan(state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
    """The norms that count again; see `Planner`. No weight changes, and nothing becomes larger or smaller."""
    assert isinstance(pass_, RecalibrateNorms)
    graph = state.graph
    names, chosen = list(batch_norms(graph.model)), pass_.chosen(graph)
    problems = list(checks.fused_whole(path, pass_, fused))
    if not names:
        kind = type(graph.model).__name__
        said = f"a {kind} has no batch norm with running statistics, so there is nothing to count again; leave it out"
        problems.append(Problem(path, said))
    else:
        problems += checks.unmatched_patterns(path, pass_, names, "batch norm")
        if not chosen:
            problems.append(Problem(path, "include and exclude leave no batch norm to count again"))
    words = f"statistics of {len(chosen)} batch norms"
    return Planned(PassPlan(path, pass_, (), {}, words), state.entered(path, pass_), tuple(problems))
