"""Pipeline and model structure to stages: what each pass will touch, what it will cost. Reads no weight."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from compress.config.lines import line_of
from compress.config.pipeline import walk
from compress.errors import ConfigError
from compress.planning import (
    cache,
    channels,
    depth,
    device_memory,
    disk,
    experts,
    memory,
    merge,
    norms,
    sites,
    stream,
    whole,
    width,
)
from compress.planning.dense import Dense, left_dense
from compress.planning.disk import computed
from compress.planning.need import most
from compress.planning.places import on_processor
from compress.planning.state import PassPlan, initial

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from compress.config.pipeline import Pipeline
    from compress.errors import Problem
    from compress.export import Exporter
    from compress.models.graph import Graph
    from compress.passes.base import Reach
    from compress.planning.need import Need
    from compress.planning.places import Places
    from compress.planning.state import Planner, PlanState

PLANNERS: dict[Reach, Planner] = {
    "matrix": sites.plan,
    "block": sites.plan,
    "model": sites.plan,
    "merge": merge.plan,
    "depth": depth.plan,
    "experts": experts.plan,
    "width": width.plan,
    "norms": norms.plan,
    "channels": channels.plan,
    "stream": stream.plan,
    "cache": cache.plan,
}


@dataclass(frozen=True)
class Plan:
    """All stages, and what they need.

    Attributes:
        stages: passes that run together, in order.
        final_bytes: expected size of the weights afterwards.
        memory: of the host, when most is needed, and what for; the interpreter is included.
        disk: beside and at the destination, the same.
        places: where the run computes.
        device: of a device with memory of its own, the same.
        activations_on_device: whether they fit there, and so wait there.
        dense: what no pass makes smaller.
        exports: every container, and the bytes that it is expected to take.
        results_bytes: of all matrices that passes work on, as codes and masks of a byte per weight.
    """

    stages: tuple[tuple[PassPlan, ...], ...]
    original_bytes: int
    final_bytes: int
    memory: Need
    disk: Need
    places: Places = field(default_factory=on_processor)
    device: Need | None = None
    activations_on_device: bool = False
    results_bytes: int = 0
    dense: Dense = field(default_factory=Dense)
    exports: tuple[tuple[Exporter, int], ...] = ()

    @property
    def activations_on_host(self) -> int:
        """Bytes of activations that the host's memory is to hold for a device."""
        return 0 if self.device is None else self.memory.parts.get("activations", 0)


def make(
    pipeline: Pipeline,
    graph: Graph,
    dtypes: Mapping[str, torch.dtype],
    file: str = "pipeline",
    companions: int = 0,
    where: Places | None = None,
    carried: int = 0,
) -> Plan:
    """Plan a pipeline on a model.

    Args:
        pipeline: parsed.
        graph: the model, parameters possibly on the meta device.
        dtypes: parameter name -> type it is stored in.
        file: for messages.
        companions: bytes of what travels along with the weights, such as a tokenizer.
        where: it computes; by default on the processor.
        carried: bytes of tensors that the model has no place for.

    Raises:
        ConfigError: every impossible thing at once.
    """
    state = initial(graph, dtypes, carried)
    original = sum(state.sizes.values())
    stages: list[list[PassPlan]] = [[] for _ in pipeline.passes]
    problems: list[Problem] = []
    graphs: list[Graph] = []  # before each stage, and behind the last
    for path, number, pass_ in walk(pipeline):
        stage, plan = stages[number], PLANNERS[pass_.reach]
        graphs += [] if stage else [state.graph]
        planned = plan(state, path, pass_, fused=len(pipeline.passes[number]) > 1, first=not stage)
        stage.append(planned.part)
        problems += planned.problems
        state = planned.state
    graphs.append(state.graph)
    dense = left_dense(state.graph, state.dtypes, state.specs.keys(), carried) if state.specs else Dense()
    problems += whole.whole_pipeline(pipeline, state, dense)
    if problems:
        raise ConfigError([replace(p, line=line_of(pipeline.lines, p.path)) for p in problems], file)
    final = state.final_bytes()
    exported = [disk.exported(exporter, pipeline, state) for exporter in pipeline.export]
    where = where or on_processor()
    made = Plan(
        tuple(map(tuple, stages)),
        original,
        final,
        most(memory.moments_of(pipeline, stages, graphs, final, exported)),
        disk.peak(stages, state, original, companions, exported),
        where,
        dense=dense,
        exports=tuple(zip(pipeline.export, exported, strict=True)),
    )
    return _on_device(made, pipeline, state, exported, graphs) if where.apart else made


def _on_device(
    made: Plan, pipeline: Pipeline, state: PlanState, exported: Sequence[int], graphs: Sequence[Graph]
) -> Plan:
    """The plan of a run on a device with memory of its own: activations wait there if they fit, else on the host."""
    itemsize, stages = computed(pipeline, state).itemsize, made.stages
    waiting = [memory.waiting(pipeline, [part.pass_ for part in stage], state.graph, itemsize) for stage in stages]
    there = device_memory.peak(pipeline, stages, graphs, itemsize, waiting=True)
    fits = made.places.device_limit is None or there.total <= made.places.device_limit
    if not fits:
        there = device_memory.peak(pipeline, stages, graphs, itemsize, waiting=False)
    kept = 0 if fits else max(waiting, default=0)
    moments = memory.moments_of(pipeline, stages, graphs, made.final_bytes, exported)
    host = most([memory.on_host(graphs[0], need, kept) for need in moments])
    results = 2 * sum(site.shape[0] * site.shape[1] for site in state.graph.sites if site.block is not None)
    return replace(made, memory=host, device=there, activations_on_device=fits, results_bytes=results)


__all__ = ["PLANNERS", "PassPlan", "Plan", "make"]
