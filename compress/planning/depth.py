"""Plans a pass that takes blocks out of the model: which may go, and what is left. Reads no weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import Problem, UnsupportedModelError
from compress.lazy import nn, transformers
from compress.models.shorten import count_name, list_of, without
from compress.passes.depth import DepthPass
from compress.planning import checks
from compress.planning.state import PassPlan, Planned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compress.models.graph import Graph
    from compress.passes import Pass
    from compress.planning.state import PlanState


def plan(state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
    """The blocks that may go; see `Planner`.

    What comes after it is planned as if the first of them went: those that may go are of one make.
    """
    assert isinstance(pass_, DepthPass)
    graph, after = state.graph, state.entered(path, pass_)
    may = pass_.candidates(graph) if pass_.blocks else ()
    part = PassPlan(path, pass_, tuple(s for s in graph.sites if s.block in may), {})
    problems = [
        *checks.unmatched_patterns(path, pass_, [s.name for s in graph.sites], "layer"),
        *checks.fused_whole(path, pass_, fused),
    ]
    if not pass_.blocks:
        return Planned(part, after, tuple(problems))
    try:
        check_depth(graph, pass_)
        shorter = without(graph, range(may[0], may[0] + pass_.blocks))
    except UnsupportedModelError as error:
        return Planned(part, after, (*problems, Problem(path, str(error))))
    problems += _different_kinds(state, path, pass_, range(may[0], may[-1] + 1))
    return Planned(part, after.without_blocks(shorter), tuple(problems))


def _different_kinds(state: PlanState, path: str, pass_: DepthPass, between: range) -> Iterator[Problem]:
    """Blocks of which it would matter which go: passes before made something else of each."""
    if len({tuple(state.kinds[s.name] for s in state.graph.in_block(i)) for i in between}) > 1:
        yield Problem(
            path,
            "passes before it made weights of different kinds in different blocks, so what may follow would depend on "
            f"which block goes; put {pass_.key} before them",
        )


def check_depth(graph: Graph, pass_: DepthPass) -> None:
    """Refuse a model that a pass cannot take blocks out of.

    Raises:
        UnsupportedModelError: says why, and what to do.
    """
    kind, count, model = type(graph.model).__name__, len(graph.blocks), graph.model
    if graph.blocks == ("",) or not isinstance(list_of(graph), nn.ModuleList | nn.Sequential):
        raise UnsupportedModelError(f"the blocks of a {kind} are not the entries of one numbered list: none can go")
    may = pass_.candidates(graph)
    if pass_.blocks >= count:
        raise UnsupportedModelError(f"{pass_.blocks} of {count} blocks cannot go: at least one must stay")
    if pass_.blocks > (_longest_run(may) if pass_.neighbours else len(may)):
        together = " in a row" if pass_.neighbours else ""
        raise UnsupportedModelError(
            f"{pass_.blocks} blocks{together} should go, and of {count} only {len(may)} may: those of which include "
            "and exclude leave every layer"
        )
    first, *others = (_structure(model.get_submodule(graph.blocks[i])) for i in range(may[0], may[-1] + 1))
    odd = next((i for i, other in enumerate(others, may[0] + 1) if other != first), None)
    if odd is not None:
        raise UnsupportedModelError(
            f"{graph.blocks[odd]} is built differently from {graph.blocks[may[0]]}, so what is left would depend on "
            "which one goes; `exclude` the layers of other blocks at the beginning and the end"
        )
    inside = tuple(f"{name}." for name in graph.blocks)
    shared = next((name for pair in graph.tied.items() for name in pair if name.startswith(inside)), None)
    if shared:
        raise UnsupportedModelError(f"{shared} is shared with another part of the model, so its block cannot go alone")
    if isinstance(model, transformers.PreTrainedModel):
        counter = count_name(model.config)
        if getattr(model.config, counter, None) != count:
            raise UnsupportedModelError(f"the configuration of a {kind} has no {counter} that counts its blocks")


def _longest_run(places: Sequence[int]) -> int:
    starts = [i for i in places if i - 1 not in places]
    return max((next(n for n in range(1, len(places) + 1) if i + n not in places) for i in starts), default=0)


def _structure(block: nn.Module) -> list[Any]:
    """Equal for two blocks that take each other's parameters."""
    modules = [(name, type(module)) for name, module in block.named_modules()]
    values = [*block.named_parameters(remove_duplicate=False), *block.named_buffers()]
    return [*modules, *((name, tuple(value.shape)) for name, value in values)]
