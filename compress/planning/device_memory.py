"""Forecast of the memory that a run needs on a device of its own, and whether activations may wait there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.models.logits import WHOLE
from compress.planning import memory
from compress.planning.need import Need, most

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.config.pipeline import Pipeline
    from compress.models.graph import Graph
    from compress.passes import Pass
    from compress.planning.state import PassPlan

LIBRARIES = 600 << 20  # what CUDA and its libraries take on a device before any work
SOLVED = 3  # float32 copies of the largest matrices that are solved as one: as they are, as they become, their errors
GRAMS = 3  # of the widest layer: the sums, their factor, and a temporary


def peak(pipeline: Pipeline, stages: Sequence[Sequence[PassPlan]], graph: Graph, itemsize: int, waiting: bool) -> Need:
    """The moment of a run at which its device holds most.

    Args:
        pipeline: parsed.
        stages: planned.
        graph: the model after the last pass.
        itemsize: bytes of a number that the model computes with.
        waiting: whether activations wait on the device.
    """
    held = {"libraries": LIBRARIES}
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
    for stage in stages:
        parts = _stage(pipeline, [part.pass_ for part in stage], graph, itemsize, waiting)
        moments.append(memory.joined(f"running {stage[0].path}", held, parts))
    return most(moments or [Need("starting", held)])


def _stage(pipeline: Pipeline, passes: Sequence[Pass], graph: Graph, itemsize: int, waiting: bool) -> dict[str, int]:
    calibrated, learns = any(p.calibrated for p in passes), any(p.reach == "block" for p in passes)
    tokens = memory.run_at_once(pipeline) if calibrated else 0
    grams = GRAMS * memory.widest(graph) ** 2 * memory.FLOAT if any(p.needs == "gram" for p in passes) else 0
    running = (memory.block(graph) * itemsize if calibrated else 0) + memory.flowing(graph, tokens) * itemsize
    solving = SOLVED * memory.largest(graph) * memory.FLOAT
    learning = memory.block(graph) * memory.LEARNING if learns else 0
    return {
        "weights": max(running, solving),
        "statistics": grams,
        "activations": memory.waiting(pipeline, passes, graph, itemsize) if waiting else 0,
        "training": learning + sum(memory.training(p, pipeline.calibration, graph) for p in passes),
    }
