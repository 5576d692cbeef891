"""Plans a pass that leaves fewer experts in a mixture: which may go, and what is left. Reads no weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.errors import Problem, UnsupportedModelError
from compress.models.experts import READER, neurons_of_experts
from compress.models.fewer_experts import LEAST_IN_GROUP, check_fewer, fewer, mixture_of
from compress.passes.experts import ExpertsPass
from compress.planning import checks
from compress.planning.state import PassPlan, Planned

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from compress.models.fewer_experts import Fewer, Mixture
    from compress.passes import Pass
    from compress.planning.state import PlanState

FLOAT64 = 8


def plan(state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
    """The experts that may go; see `Planner`.

    What comes after it is planned as if the last of them went: those of a layer are of one make.
    """
    assert isinstance(pass_, ExpertsPass)
    graph, after = state.graph, state.entered(path, pass_)
    names = [s.name for s in graph.sites]
    problems = [*checks.unmatched_patterns(path, pass_, names, "layer"), *checks.fused_whole(path, pass_, fused)]
    try:
        mixture = mixture_of(graph)
    except UnsupportedModelError as error:
        return Planned(PassPlan(path, pass_, (), {}), after, (*problems, Problem(path, str(error))))
    keep = pass_.kept_of(mixture.count, mixture.groups, LEAST_IN_GROUP if mixture.groups > 1 else 1)
    may = {name: pass_.candidates(graph, name) for name in mixture.layers}
    sites = tuple(
        s for s in graph.sites if s.is_expert and s.ref.index[0] in may.get(s.parameter.rpartition(".")[0], ())
    )
    part = PassPlan(path, pass_, sites, {})
    refused = check_fewer(mixture, keep)
    if refused is not None:
        return Planned(part, after, (*problems, Problem(f"{path}.keep", refused)))
    problems += (*_may_go(path, pass_, mixture, keep, may), *_in_one_order(path, pass_, state, mixture))
    try:
        made = fewer(graph, {name: _example(mixture, keep, may[name]) for name in mixture.layers})
    except UnsupportedModelError as error:
        return Planned(part, after, (*problems, Problem(path, str(error))))
    problems += _worked_on(state, path, pass_, made, may)
    return Planned(part, after.with_cuts(made), tuple(problems))


def _may_go(
    path: str, pass_: ExpertsPass, mixture: Mixture, keep: int, may: Mapping[str, frozenset[int]]
) -> Iterator[Problem]:
    """Too few experts that `include` and `exclude` leave every matrix."""
    size, gone = mixture.count // mixture.groups, (mixture.count - keep) // mixture.groups
    for name, numbers in may.items():
        for first in range(0, mixture.count, size):
            there = len(numbers.intersection(range(first, first + size)))
            least = gone + pass_.merges if gone else 0
            if there < least:
                group = f" of the group from {first} on" if mixture.groups > 1 else ""
                becoming = f"become {least - gone}" if pass_.merges else "go"
                yield Problem(
                    path,
                    f"{least} experts{group} of {name} should {becoming}, and only {there} may: those of which include "
                    f"and exclude leave {pass_.key} every matrix",
                )
                return


def _in_one_order(path: str, pass_: ExpertsPass, state: PlanState, mixture: Mixture) -> Iterator[Problem]:
    """Experts of which it is not known where their neurons are, and whose neurons should be put in one order."""
    for name in mixture.layers if pass_.aligned else ():
        if neurons_of_experts(state.graph.model.get_submodule(name)) is None:
            yield Problem(
                path,
                f"it is not known which neurons the parameters of {name} belong to, so they cannot be put in one "
                "order; give align: false to merge them as they stand",
            )
            return


def _example(mixture: Mixture, keep: int, may: frozenset[int]) -> tuple[int, ...]:
    """Experts of a layer that might stay: those that must, and the first of the others."""
    size, stay = mixture.count // mixture.groups, keep // mixture.groups
    groups = (range(first, first + size) for first in range(0, mixture.count, size))
    return tuple(i for group in groups for i in sorted(sorted(group, key=lambda i: (i in may, i))[:stay]))


def _worked_on(
    state: PlanState, path: str, pass_: ExpertsPass, made: Fewer, may: Mapping[str, frozenset[int]]
) -> Iterator[Problem]:
    """What passes before it made, of which it would matter which experts go, or that cannot be cut."""
    for site in state.graph.sites:
        if site.parameter in made.cuts and not site.is_expert and site.name in state.specs:
            yield Problem(
                path, f"{site.name} was worked on before, and rows of it have to go; put {pass_.key} before that"
            )
    if pass_.merges:
        done = next((s for s in state.graph.sites if s.is_expert and s.name in state.specs), None)
        if done is not None:
            yield Problem(
                path,
                f"{done.name} was worked on before, and experts become one as they were; put {pass_.key} before that",
            )
        return
    kinds: dict[str, set[tuple[str, bool]]] = {}
    for site in state.graph.sites:
        owner = site.parameter.rpartition(".")[0]
        if site.is_expert and site.ref.index[0] in may.get(owner, ()):
            kinds.setdefault(site.parameter, set()).add((state.kinds[site.name], site.name in state.specs))
    if any(len(found) > 1 for found in kinds.values()):
        yield Problem(
            path,
            "passes before it made weights of different kinds of the experts of a layer, so what may follow would "
            f"depend on which of them go; put {pass_.key} before them",
        )


def bytes_to_merge(part: PassPlan) -> int:
    """Memory to compare what the experts of a layer put out, and to match two of them; 0 of other passes."""
    if not isinstance(part.pass_, ExpertsPass) or not part.pass_.merges or not part.sites:
        return 0
    widest, count = max(max(site.shape) for site in part.sites), part.sites[0].ref.of
    compared = FLOAT64 * count * (2 * widest + count)
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    for site in part.sites:
        whose = site.parameter.rpartition(".")[0], site.ref.index
        sizes[whose] = sizes.get(whose, 0) + math.prod(site.shape)
    neurons = max((s.shape[1] for s in part.sites if s.parameter.endswith(f".{READER}")), default=0)
    # Both experts and the other in its new order, twice while it moves; scores, and what the assignment makes of them.
    return compared + (FLOAT64 * (4 * max(sizes.values()) + 3 * neurons**2) if part.pass_.aligned else 0)
