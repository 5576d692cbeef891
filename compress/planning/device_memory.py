"""Forecast of the memory that a run needs on a device of its own, and whether activations may wait there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.models.logits import WHOLE
from compress.passes.base import BlockPass
from compress.planning import memory
from compress.planning.need import Need, most
from compress.planning.width import bytes_to_solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.config.pipeline import Pipeline
    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.passes import Pass
    from compress.planning.state import PassPlan

LIBRARIES = 64 << 20  # room that libraries take for themselves once something is computed
SOLVED = 4  # float32 copies of the largest matrices that are solved as one: as they are, as they become, what is lost
BACKWARD = 2  # times what flows through a block is kept for its gradients
ROUNDED_UP = 1.1  # an allocator leaves gaps


def peak(
    pipeline: Pipeline, stages: Sequence[Sequence[PassPlan]], graphs: Sequence[Graph], itemsize: int, waiting: bool
) -> Need:
    """The moment of a run at which its device holds most.

    Args:
        pipeline: parsed.
        stages: planned.
        graphs: the model before each stage, and after the last.
        itemsize: bytes of a number that the model computes with.
        waiting: whether activations wait on the device.
    """
    held, graph = {"libraries": LIBRARIES}, graphs[0]
    moments = []
    if pipeline.evaluate:
        held["evaluation"] = memory.reference(graph, pipeline.evaluate)
        tokens = memory.evaluated_at_once(pipeline.evaluate)
        parts = {
            "weights": (memory.block(graph) + memory.outside(graph)) * itemsize,
            "activations": memory.flowing(graph, tokens) * itemsize,
            "evaluation": memory.logits(graph, tokens, WHOLE, memory.MEASURING),
        }
        moments.append(memory.joined("evaluating", held, parts))
    for stage, now in zip(stages, graphs, strict=False):
        outside = [site for part in stage if part.pass_.reach == "matrix" for site in part.sites if site.block is None]
        parts = _stage(pipeline, [part.pass_ for part in stage], now, itemsize, waiting, outside)
        solving = max(bytes_to_solve(part) for part in stage)
        parts["statistics"] = max(parts["statistics"], int(ROUNDED_UP * solving))
        moments.append(memory.joined(f"running {stage[0].path}", held, parts))
    return most(moments or [Need("starting", held)])


def _stage(
    pipeline: Pipeline,
    passes: Sequence[Pass],
    graph: Graph,
    itemsize: int,
    waiting: bool,
    outside: Sequence[Site],
) -> dict[str, int]:
    """The parts of a moment. `outside`: sites outside the blocks that are solved."""
    calibrated = any(p.calibrated for p in passes)
    tokens = memory.run_at_once(pipeline) if calibrated else 0
    running = (memory.block(graph) * itemsize if calibrated else 0) + memory.flowing(graph, tokens) * itemsize
    solving = SOLVED * memory.FLOAT * max((s.shape[0] * s.shape[1] for s in (*_inside(graph), *outside)), default=0)
    follows = any(p.propagates for p in passes)
    grams = _grams(graph, [*_inside(graph), *outside]) * (memory.DRIFTS if follows else 1)
    running += memory.block(graph) * itemsize if follows else 0  # the original's
    learning = max((_learning(p, pipeline, graph, itemsize) for p in passes if isinstance(p, BlockPass)), default=0)
    return {
        "weights": max(running, solving),
        "statistics": grams if any(p.needs == "gram" for p in passes) else 0,
        "activations": memory.waiting(pipeline, passes, graph, itemsize) if waiting else 0,
        "training": learning + sum(memory.training(p, pipeline.calibration, graph) for p in passes),
    }


def _learning(pass_: BlockPass, pipeline: Pipeline, graph: Graph, itemsize: int) -> int:
    """Numbers of every weight of a block, and what the gradients need of a batch."""
    length = pipeline.calibration.length if pipeline.calibration else 0
    kept = BACKWARD * memory.flowing(graph, getattr(pass_, "batch_size", 1) * length) * itemsize
    return memory.block(graph) * (pass_.learned_on_device or memory.LEARNING) * memory.FLOAT + kept


def _inside(graph: Graph) -> list[Site]:
    return [site for site in graph.sites if site.block is not None]


def _grams(graph: Graph, sites: Sequence[Site]) -> int:
    """The sums of a block, one for all layers of a part that take inputs of one width, and the widest's factor."""
    blocks: dict[int | None, set[tuple[str, int]]] = {}
    for site in (s for s in sites if not s.is_expert):
        blocks.setdefault(site.block, set()).add((site.name.rpartition(".")[0], memory.in_grams(site)))
    kept = max((sum(size for _, size in parts) for parts in blocks.values()), default=0)
    widest = max((site.shape[1] for site in sites), default=0)
    return int(ROUNDED_UP * ((kept + widest**2) * memory.FLOAT + memory.of_experts(graph)))
