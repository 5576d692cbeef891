"""Pipeline and model structure to stages: what each pass will touch, what it will cost. Reads no weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.config.lines import line_of
from compress.config.pipeline import walk
from compress.errors import ConfigError
from compress.planning import checks, depth, disk, memory, merge, sites
from compress.planning.state import PassPlan, initial

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from compress.config.pipeline import Pipeline
    from compress.errors import Problem
    from compress.models.graph import Graph
    from compress.passes.base import Reach
    from compress.planning.need import Need
    from compress.planning.state import Planner

PLANNERS: dict[Reach, Planner] = {
    "matrix": sites.plan,
    "block": sites.plan,
    "model": sites.plan,
    "merge": merge.plan,
    "depth": depth.plan,
}


@dataclass(frozen=True)
class Plan:
    """All stages, and what they need.

    Attributes:
        stages: passes that run together, in order.
        final_bytes: expected size of the weights afterwards.
        memory: when most is needed, and what for; the interpreter is included.
        disk: beside and at the destination, the same.
    """

    stages: tuple[tuple[PassPlan, ...], ...]
    original_bytes: int
    final_bytes: int
    memory: Need
    disk: Need


def make(
    pipeline: Pipeline,
    graph: Graph,
    dtypes: Mapping[str, torch.dtype],
    file: str = "pipeline",
    companions: int = 0,
) -> Plan:
    """Plan a pipeline on a model.

    Args:
        pipeline: parsed.
        graph: the model, parameters possibly on the meta device.
        dtypes: parameter name -> type it is stored in.
        file: for messages.
        companions: bytes of what travels along with the weights, such as a tokenizer.

    Raises:
        ConfigError: every impossible thing at once.
    """
    state = initial(graph, dtypes)
    original = sum(state.sizes.values())
    stages: list[list[PassPlan]] = [[] for _ in pipeline.passes]
    problems: list[Problem] = []
    for path, number, pass_ in walk(pipeline):
        stage, plan = stages[number], PLANNERS[pass_.reach]
        planned = plan(state, path, pass_, fused=len(pipeline.passes[number]) > 1, first=not stage)
        stage.append(planned.part)
        problems += planned.problems
        state = planned.state
    problems += checks.whole_pipeline(pipeline, state)
    if problems:
        raise ConfigError([replace(p, line=line_of(pipeline.lines, p.path)) for p in problems], file)
    final = state.final_bytes()
    exported = [disk.exported(exporter, pipeline, state) for exporter in pipeline.export]
    return Plan(
        tuple(map(tuple, stages)),
        original,
        final,
        memory.peak(pipeline, stages, state.graph, final, exported),
        disk.peak(stages, state, original, companions, exported),
    )


__all__ = ["PLANNERS", "PassPlan", "Plan", "make"]
