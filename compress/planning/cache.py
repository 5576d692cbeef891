"""Plans a pass that rounds key-value caches. Reads no weight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.config.pipeline import walk
from compress.encodings.cache import CacheForm
from compress.errors import Problem
from compress.passes.quantize.kv_cache import KvCache
from compress.planning import checks
from compress.planning.state import PassPlan, Planned
from compress.runtime.cache import cached_layers, cannot_round

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from compress.config.pipeline import Pipeline
    from compress.passes import Pass
    from compress.passes.base import Reach
    from compress.planning.state import PlanState

MOVES: tuple[Reach, ...] = ("merge", "depth", "experts", "width", "channels", "stream")  # keys, values or their layers


def plan(state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
    """The attention layers whose cache is rounded; see `Planner`. No weight changes."""
    assert isinstance(pass_, KvCache)
    graph = state.graph
    every, problems = cached_layers(graph.model), list(checks.fused_whole(path, pass_, fused))
    chosen = pass_.chosen(every)
    reason = cannot_round(graph.model)
    if reason:
        problems.append(Problem(path, f"{reason}; leave kv_cache out"))
    else:
        problems += checks.unmatched_patterns(path, pass_, list(every), "attention layer")
        if not chosen:
            problems.append(Problem(path, "include and exclude leave no attention layer whose cache could be rounded"))
        again = [name for name in chosen if name in state.caches]
        if again:
            said = f"the cache of {checks.listed(again)} is rounded already; round that of each layer once"
            problems.append(Problem(path, said))
    heads = {name: 1 if pass_.per == "tensor" else _heads(every[name]) for name in chosen}
    forms = {name: CacheForm(heads=heads[name], bits=pass_.bits, grid=pass_.grid) for name in chosen}
    words = f"keys and values of {len(chosen)} layers in {pass_.words}"
    state = replace(state.entered(path, pass_), caches={**state.caches, **forms})
    return Planned(PassPlan(path, pass_, (), {}, words), state, tuple(problems))


def _heads(layer: nn.Module) -> int:
    """How many heads of keys and values a layer has, as its configuration says."""
    config: Any = getattr(layer, "config", None)
    found = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    return found if isinstance(found, int) else 1


def moved_later(pipeline: Pipeline) -> Iterator[Problem]:
    """Passes that change keys, values or the layers that keep them after their range was measured."""
    measured = ""
    for path, _, pass_ in walk(pipeline):
        if measured and pass_.reach in MOVES:
            said = f"{pass_.key} changes keys and values, or which layers keep them, and {measured} has measured them"
            yield Problem(path, f"{said}; put {measured} behind it")
        if pass_.reach == "cache":
            measured = pass_.key


__all__ = ["moved_later", "plan"]
