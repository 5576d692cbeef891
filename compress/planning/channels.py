"""Plans a pass that scales channels between layers. Reads no weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import Problem
from compress.models.channels import channels_of, unknown
from compress.passes.transform.scaling import ScalingPass
from compress.planning import checks
from compress.planning.state import PassPlan, Planned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compress.models.channels import Channels
    from compress.models.site import Site
    from compress.passes import Pass
    from compress.planning.state import PlanState


def plan(state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
    """The layers that change; see `Planner`. Nothing becomes larger or smaller."""
    assert isinstance(pass_, ScalingPass)
    graph = state.graph
    every, chosen = channels_of(graph), pass_.chosen(graph)
    names = {name for channels in chosen for name in channels.readers}
    names |= {s.name for s in graph.sites for c in chosen for place in c.makers if place.tensor == s.parameter}
    sites = tuple(site for site in graph.sites if site.name in names)
    problems = [
        *checks.fused_whole(path, pass_, fused),
        *_nothing(state, path, pass_, every, chosen),
        *dense_only(state, path, pass_, sites),
    ]
    part = PassPlan(path, pass_, sites, {}, f"{len(chosen)} groups of channels scaled", kept(state, sites))
    return Planned(part, state.entered(path, pass_).settled(), tuple(problems))


def kept(state: PlanState, sites: Sequence[Site]) -> int:
    """Bytes of layers, as a stage keeps them that writes them anew."""
    return sum(site.shape[0] * site.shape[1] * state.dtypes[site.parameter].itemsize for site in sites)


def dense_only(state: PlanState, path: str, pass_: Pass, sites: Sequence[Site]) -> Iterator[Problem]:
    """Layers that were made something that is not written anew."""
    changed = [site for site in sites if state.kinds[site.name] not in pass_.accepts]
    if changed:
        kind, which = state.kinds[changed[0].name], checks.listed(site.name for site in changed)
        yield Problem(path, f"{pass_.key} cannot work on {kind} weights ({which}); put it before what made them so")
    rounded = [s.name for s in sites if s.name in state.specs and state.specs[s.name].inputs is not None]
    if rounded:
        which = checks.listed(rounded)
        yield Problem(path, f"{pass_.key} would change inputs that are rounded already ({which}); put it before that")


def _nothing(
    state: PlanState, path: str, pass_: ScalingPass, every: Sequence[Channels], chosen: Sequence[Channels]
) -> Iterator[Problem]:
    """A model or patterns that leave nothing to scale."""
    graph = state.graph
    if not every:
        yield Problem(path, unknown(graph))
        return
    names = [name for channels in every for name in channels.readers]
    yield from checks.unmatched_patterns(path, pass_, names, "layer")
    if not chosen:
        together = checks.listed(every[0].readers)
        said = f"include and exclude leave no channels to scale: layers that share an input go together, as {together}"
        yield Problem(path, said)


__all__ = ["dense_only", "kept", "plan"]
