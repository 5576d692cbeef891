"""Plans a pass that takes neurons and heads out of every block: how many, and what is left. Reads no weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import Problem, UnsupportedModelError
from compress.models.narrow import IN_WORDS, narrower
from compress.passes.kinds import why_refused
from compress.passes.width import WidthPass
from compress.planning import checks
from compress.planning.state import PassPlan, Planned

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compress.encodings import Spec
    from compress.models.graph import Graph
    from compress.models.narrow import Narrower, Width
    from compress.passes import Pass
    from compress.planning.state import PlanState

FLOAT, FLOAT64 = 4, 8
SCRATCH = 32 << 20  # of linear algebra
NUMBER = 8  # bytes for the number of a unit, as it is written in words


def plan(state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
    """The units that may go; see `Planner`.

    What comes after it is planned as if the last of them went: those of a part are of one make.
    """
    assert isinstance(pass_, WidthPass)
    graph, after = state.graph, state.entered(path, pass_)
    problems = list(checks.fused_whole(path, pass_, fused))
    try:
        keep = pass_.kept_of(graph)
        kept = {w: {c.reader: range(n) for c in w.coupled} for w, n in keep.items() if n < w.count}
        made = narrower(graph, kept)
    except UnsupportedModelError as error:
        return Planned(PassPlan(path, pass_, (), {}), after, (*problems, Problem(path, str(error))))
    sites = tuple(site for site in graph.sites if site.parameter in made.cuts)
    problems += _nothing_to_do(path, pass_, keep)
    problems += _biases(path, pass_, state, keep)
    problems += _slopes(path, pass_, graph)
    changed = [site for site in sites if state.kinds[site.name] not in pass_.accepts]
    if changed:
        kind, names = state.kinds[changed[0].name], checks.listed(site.name for site in changed)
        reason = "their zeros would not stay" if kind == "sparse" else why_refused(pass_.key, kind)
        said = f"{pass_.key} cannot take rows and columns out of {kind} weights ({names}): {reason}"
        problems.append(Problem(path, said if kind != "sparse" else f"{said}; put {pass_.key} before the pruner"))
    skipping = [site.name for site in sites if site.name in state.specs and _per_column(state.specs[site.name])]
    if skipping:
        problems.append(
            Problem(
                path,
                f"{pass_.key} cannot take columns out of layers that skip inputs ({checks.listed(skipping)}): each has "
                "a threshold; put it before activation_sparsity",
            )
        )
    left = " and ".join(f"{n} of {w.count} {IN_WORDS[w.part]}" for w, n in keep.items())
    part = PassPlan(path, pass_, sites, {}, f"{left} left in every block", _results(state, made, kept))
    return Planned(part, after.with_cuts(made).settled(), tuple(problems))


def _per_column(spec: Spec) -> bool:
    return spec.inputs is not None and spec.inputs.kind.per_column


def _results(state: PlanState, made: Narrower, kept: Mapping[Width, Mapping[str, Sequence[int]]]) -> int:
    """Bytes of the layers that read units, as they are kept until the result is written, and of which units stay."""
    left = {site.name: site for site in made.graph.sites}
    solved = [(left[name], len(units)) for readers in kept.values() for name, units in readers.items()]
    dtypes = state.dtypes
    return sum(s.shape[0] * s.shape[1] * dtypes[s.parameter].itemsize + NUMBER * count for s, count in solved)


def bytes_to_solve(part: PassPlan) -> int:
    """Memory to solve the layers that read units: sums over inputs, their moments, a factor and an inverse of these."""
    if not isinstance(part.pass_, WidthPass) or part.pass_.needs != "gram":
        return 0
    widest = max((site.shape[1] for site in part.sites), default=0)
    return (FLOAT + 3 * FLOAT64) * widest**2 + SCRATCH


def _nothing_to_do(path: str, pass_: WidthPass, keep: Mapping[Width, int]) -> Iterator[Problem]:
    """A share that is rounded to nothing everywhere."""
    if all(count == width.count for width, count in keep.items()):
        there = " and ".join(f"{width.count} {IN_WORDS[width.part]}" for width in keep)
        yield Problem(
            f"{path}.sparsity",
            f"{pass_.sparsity:g} of {there} in a block is nothing, rounded to a number that the configuration allows; "
            "take out more",
        )


def _biases(path: str, pass_: WidthPass, state: PlanState, keep: Mapping[Width, int]) -> Iterator[Problem]:
    """A repair by biases where a layer has none, and no pass before gives it one."""
    readers = {coupled.reader for width in keep for coupled in width.coupled} - state.new_biases.keys()
    model = state.graph.model
    bare = [s.name for s in state.graph.sites if s.name in readers and f"{s.name}.bias" not in state.parameters]
    if pass_.needs_biases and bare:
        yield Problem(
            f"{path}.repair",
            f"{checks.listed(bare)} have no bias, and a {type(model).__name__} has no place for one; use least_squares",
        )


def _slopes(path: str, pass_: WidthPass, graph: Graph) -> Iterator[Problem]:
    """Gradients of a loss that the model has none of."""
    if pass_.sees_slopes and not graph.is_language_model:
        yield Problem(
            f"{path}.score",
            f"a {type(graph.model).__name__} predicts no next token, whose loss taylor follows; use another score",
        )
