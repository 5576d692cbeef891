"""Plans a pass that works on layers: one matrix at a time, a block's together, or the whole model's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.encodings import FACTORED, Spec
from compress.encodings.pattern import promised
from compress.lazy import torch
from compress.passes.prune.selection import pattern
from compress.passes.retrain.options import TrainingOptions
from compress.passes.targets import works_on
from compress.planning import checks
from compress.planning.checks import Case
from compress.planning.named import on_model
from compress.planning.state import PassPlan, Planned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compress.encodings.pattern import Pattern
    from compress.errors import Problem
    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.passes import Pass
    from compress.planning.state import PlanState


def plan(state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
    """What becomes of each layer; see `Planner`."""
    graph, written = state.graph, pass_
    pass_ = _with_free_head(state, on_model(graph, written))
    chosen = tuple(s for s in graph.sites if works_on(pass_, s))
    sites = _in_free_order(graph, chosen) if pass_.preserves else chosen
    problems = tuple(_problems(Case(state, path, pass_, sites), written, chosen, fused, first))
    kinds, specs, biases = dict(state.kinds), dict[str, Spec](), dict(state.new_biases)
    for site in sites:
        own = pass_.at(site.name)
        if pass_.refusal(kinds[site.name]) is None:
            kinds[site.name] = pass_.produces(kinds[site.name])
            dtype = str(state.dtypes.get(site.parameter, torch.float32)).removeprefix("torch.")
            specs[site.name] = _kind_stored(own, site, kinds[site.name], state.specs.get(site.name), dtype)
        if own.adds_biases and f"{site.name}.bias" not in state.parameters:
            biases[site.name] = site.shape[0] * state.dtypes[site.parameter].itemsize
    after = replace(state.entered(path, pass_), kinds=kinds, specs={**state.specs, **specs}, new_biases=biases)
    return Planned(PassPlan(path, pass_, sites, specs), after, problems)


def _with_free_head(state: PlanState, pass_: Pass) -> Pass:
    """A pass that trains the head by default, without it where it is tied, shared or no longer dense."""
    if not isinstance(pass_, TrainingOptions) or not pass_.head_by_default:
        return pass_
    tied = {*state.graph.tied, *state.graph.tied.values()}
    for site in state.graph.sites:
        free = site.parameter not in tied and not site.shared and state.kinds[site.name] == "dense"
        if site.block is None and not free and any(pass_.is_head(name) for name in site.names):
            return replace(pass_, train=tuple(name for name in pass_.train if name != "head"))
    return pass_


def _in_free_order(graph: Graph, chosen: Sequence[Site]) -> tuple[Site, ...]:
    """The sites whose channels may be put in another order: all that share them are chosen."""
    names = {s.name for s in chosen}
    axes = [{*axis.makers, *axis.readers} for axis in graph.axes]
    free = set[str]().union(*(both for both in axes if both <= names))
    return tuple(s for s in chosen if s.name in free)


def _problems(case: Case, written: Pass, chosen: tuple[Site, ...], fused: bool, first: bool) -> Iterator[Problem]:
    """Every impossible thing.

    Args:
        case: with the pass as it is on the model.
        written: the pass as the pipeline has it.
        chosen: the sites that the patterns select, more than the pass works on.
        fused, first: as of `plan`.
    """
    path, pass_ = case.path, case.pass_
    names = [name for s in case.state.graph.sites for name in s.names]
    yield from checks.unmatched_patterns(path, written, names, "layer")
    yield from checks.idle_patterns(path, written, names, [name for s in chosen for name in s.names], "layer")
    yield from checks.fused_whole(path, pass_, fused)
    if pass_.preserves:
        yield from checks.channel_order(replace(case, sites=chosen), free=case.sites)
    else:
        yield from checks.no_layer(case)
    yield from checks.survey_behind_others(case, first)
    yield from checks.kinds(case)
    yield from checks.forms(case)
    yield from checks.shapes(case)
    yield from checks.inputs_changed_twice(case)
    yield from checks.grouped_convolutions(case)
    yield from checks.experts(case)
    yield from checks.members(case)
    yield from checks.tied_or_outside(case)
    yield from checks.tables(case, written)
    yield from checks.training_objective(case)
    yield from checks.shapes_together(case)


def _kind_stored(pass_: Pass, site: Site, kind: str, before: Spec | None, dtype: str) -> Spec:
    """How a weight is stored after a pass.

    Args:
        pass_: with the options of this site.
        site: whose weight it is.
        kind: of the weight that the pass makes.
        before: how it was stored; None when no pass worked on it.
        dtype: name of the type of the source's values.
    """
    rows, columns = site.shape
    kept, laid = (before.kept, before.pattern) if before else (None, None)
    sparsity = getattr(pass_, "sparsity", None)
    if sparsity is not None:
        n_of_m = pattern(sparsity)
        share = 1 - n_of_m[0] / n_of_m[1] if n_of_m else sparsity
        kept = min(int(rows * columns * (1 - share)), kept if kept is not None else rows * columns)
        laid = _laid(before, n_of_m, kept, columns)
    form, inputs = pass_.form(site.shape), pass_.input_form() or (before.inputs if before else None)
    if kind == FACTORED and (before is None or before.kind != kind):
        return Spec(site.shape, value_dtype=None, inputs=inputs, low_rank=pass_.low_rank_form(site.shape))
    low_rank = pass_.low_rank_form(site.shape) if kind.endswith("-compensated") else None
    if low_rank:
        if before is None or sparsity is not None:
            before = Spec(site.shape, kept=kept, value_dtype=dtype, inputs=inputs, pattern=laid)
        return replace(before, low_rank=low_rank)
    if form:
        return Spec(site.shape, form, kept, inputs=inputs, pattern=laid)
    if before and sparsity is None:
        return replace(before, inputs=inputs)
    return Spec(site.shape, kept=kept, value_dtype=dtype, inputs=inputs, pattern=laid)


def _laid(before: Spec | None, n_of_m: tuple[int, int] | None, kept: int, columns: int) -> Pattern | None:
    """The pattern that a mask is stored with after a pruner that leaves `kept` weights by its pattern or by a share."""
    old = before.pattern if before else None
    pruned = before is not None and before.kept is not None
    more = before is None or before.kept != kept
    if n_of_m is None:
        return None if more else old
    if pruned and (old is None or n_of_m[1] % old.of):
        return None  # zeros that follow different rules: not all runs keep as many
    return promised(*n_of_m, columns) if more else old
