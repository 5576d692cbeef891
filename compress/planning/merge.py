"""Plans a merge: which tensors it merges, and where in a pipeline it may stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import Problem
from compress.passes import MergePass
from compress.planning import checks
from compress.planning.state import PassPlan, Planned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.models.graph import Graph
    from compress.passes import Pass
    from compress.planning.state import PlanState


def plan(state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
    """The weights it merges; see `Planner`."""
    assert isinstance(pass_, MergePass)
    names = [name for name, _ in state.graph.tensors()]
    problems = (
        *checks.unmatched_patterns(path, pass_, names, "tensor"),
        *checks.idle_patterns(path, pass_, names, [n for n in names if pass_.selects(n, True)], "tensor"),
        *checks.fused_whole(path, pass_, fused),
        *_late(state, path, pass_),
        *_no_tensor(state.graph, path, pass_),
    )
    sites = tuple(s for s in state.graph.sites if pass_.selects(s.parameter, True))
    return Planned(PassPlan(path, pass_, sites, {}), state.entered(path, pass_), problems)


def _late(state: PlanState, path: str, pass_: MergePass) -> Iterator[Problem]:
    """A merge behind other passes, and a delta to a model that is not the base any more."""
    if state.first_change:
        before = state.first_change.rpartition(".")[2]
        yield Problem(path, f"{pass_.key} merges whole checkpoints, before anything else; put it before {before}")
    if pass_.makes_delta and state.merges:
        yield Problem(
            path,
            f"{pass_.key} makes a delta to the model that the pipeline is run on; put it first. "
            "What such a run leaves in OUT/delta may be named in `models` of any merge",
        )


def _no_tensor(graph: Graph, path: str, pass_: MergePass) -> Iterator[Problem]:
    """Nothing to merge, or nothing whose order could be matched."""
    if not any(pass_.selects(name, in_block=True) for name, _ in graph.tensors()):
        yield Problem(path, f"merges no tensor at all; tensors are named like {checks.examples(graph)}")
    elif pass_.aligns and not any(
        pass_.selects(name, in_block=True) for units in graph.units(pass_.aligns_residual) for name in units.tensors()
    ):
        yield Problem(
            path,
            f"{pass_.key} knows nothing of a {type(graph.model).__name__} whose order is free, or it merges none of "
            "it; use average or slerp. It knows the MLPs and heads of Llama and its like, GPT-2, GPT-NeoX, OPT, BERT "
            "and ViT, ResNet, and plain networks of convolutions and linear layers that can be traced",
        )
