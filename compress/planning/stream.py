"""Plans a pass that turns the residual stream. Reads no weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.errors import Problem, UnsupportedModelError
from compress.models.stream import stream_of, written_from
from compress.models.turning import with_turned
from compress.models.untie import untied
from compress.passes.transform.rotate import Rotate
from compress.planning import checks
from compress.planning.channels import dense_only, kept
from compress.planning.state import PassPlan, Planned

if TYPE_CHECKING:
    from compress.passes import Pass
    from compress.planning.state import PlanState

FLOAT64 = 8
SCRATCH = 6  # numbers as large as a turn: while it is made, and pieces that are multiplied with it


def plan(state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
    """Everything that touches the stream; see `Planner`. A head that was tied takes room of its own afterwards."""
    assert isinstance(pass_, Rotate)
    after, problems = state.entered(path, pass_), list(checks.fused_whole(path, pass_, fused))
    try:
        stream = stream_of(state.graph)
        if stream.head is not None:
            after = _with_head(after, stream.head)
            stream = stream_of(after.graph)
        if pass_.online:
            after = replace(after, graph=with_turned(after.graph, written_from(after.graph, stream)).graph)
    except UnsupportedModelError as error:
        return Planned(PassPlan(path, pass_, (), {}), after, (*problems, Problem(path, str(error))))
    names = {*stream.tensors()}
    sites = tuple(site for site in after.graph.sites if site.name in names)
    problems += dense_only(after, path, pass_, sites)
    part = PassPlan(path, pass_, sites, {}, f"residual stream of {stream.width} channels turned", kept(after, sites))
    return Planned(part, after.settled(), tuple(problems))


def _with_head(state: PlanState, head: str) -> PlanState:
    embedding = state.graph.tied[head]
    graph = untied(state.graph, head).graph
    site = next(site.name for site in graph.sites if site.parameter == head)
    return replace(
        state,
        graph=graph,
        dtypes={**state.dtypes, head: state.dtypes[embedding]},
        sizes={**state.sizes, head: state.sizes[embedding]},
        kinds={**state.kinds, site: "dense"},
    )


def bytes_to_turn(part: PassPlan) -> int:
    """Memory for an orthogonal matrix as wide as the stream, and to multiply with it."""
    if not isinstance(part.pass_, Rotate):
        return 0
    width = max((site.shape[1] for site in part.sites if site.looked_up), default=0)
    return SCRATCH * FLOAT64 * width**2


__all__ = ["bytes_to_turn", "plan"]
