"""Forecast of the disk that a run fills, beside its result and with it. Reads no weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import torch
from compress.models.loading import computes_in
from compress.models.site import bytes_by_tensor
from compress.passes.merge.base import MergePass
from compress.passes.retrain.options import TrainingOptions
from compress.planning.need import Need, most

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.config.pipeline import Pipeline
    from compress.encodings import Spec
    from compress.export import Exporter
    from compress.models.site import Site
    from compress.passes import Pass
    from compress.planning.state import PassPlan, PlanState

FLOAT = 4
ITERATE = 4  # numbers that are kept for each that is learned: its value, its best, two moments
FILE = 8 << 10  # a file's header and what its last block leaves free
NOTES = 3 << 10  # what headers, configuration and report say of a layer after a pass
DELTA = 3  # a compressed delta takes at most about such a part of the model: what it does not code is kept whole
FIXED = 256 << 10  # log, report, card, pipeline


def peak(
    stages: Sequence[Sequence[PassPlan]],
    state: PlanState,
    original: int,
    companions: int,
    exported: Sequence[int],
) -> Need:
    """The moment at which most is on the disk: a stage with what it keeps for a time, or the end.

    Args:
        stages: planned.
        state: the model after the last pass.
        original: bytes of the weights before the first.
        companions: bytes of what is copied beside weights, such as a tokenizer.
        exported: bytes of each container that is written.
    """
    moments, merged, deltas, kept = [], 0, 0, FIXED
    for stage in stages:
        merges = [part.pass_ for part in stage if isinstance(part.pass_, MergePass)]
        # A merge that is tried out is a file for a time, before what is merged in the end is written.
        merged += original * len(merges)
        deltas += sum(original // DELTA for p in merges if p.makes_delta)
        kept += _results(stage)
        now = {"finished layers": kept, "merged models": merged + deltas, "training": _training(stage, state)}
        moments.append(Need(f"running {stage[0].path}", now))
    end = {
        "finished layers": kept,
        "merged models": merged + deltas,
        "result": state.final_bytes() + deltas + companions,
        "exports": sum(size + companions for size in exported),
    }
    return most([*moments, Need("writing the result", end)])


def _results(stage: Sequence[PassPlan]) -> int:
    """What the finished units of a stage take: every layer as the last pass of the stage leaves it."""
    specs: dict[str, Spec] = {}
    for part in stage:
        specs |= part.specs
    files = len(specs) if stage[0].pass_.reach == "model" else len({s.block for part in stage for s in part.sites})
    own = sum(spec.num_bytes for spec in specs.values()) + sum(part.results for part in stage)
    return own + NOTES * len(specs) + FILE * files


def _training(stage: Sequence[PassPlan], state: PlanState) -> int:
    """States of training: those that are kept, and one that is written beside the one it replaces."""
    return max((_learned(part, state) * (_trainings(part.pass_) + 1) for part in stage), default=0)


def _trainings(pass_: Pass) -> int:
    return pass_.trainings if isinstance(pass_, TrainingOptions) else 1


def _learned(part: PassPlan, state: PlanState) -> int:
    """Bytes of a state of training."""
    pass_ = part.pass_
    if pass_.reach == "block":  # one block after the other
        in_blocks: dict[int | None, int] = {}
        for site in part.sites:
            in_blocks[site.block] = in_blocks.get(site.block, 0) + _numbers(pass_.at(site.name), site)
        return ITERATE * FLOAT * max(in_blocks.values(), default=0)
    if not isinstance(pass_, TrainingOptions):
        return 0
    vectors = sum(state.graph.model.get_parameter(n).numel() for n in state.graph.vectors() if pass_.trains(n))
    return ITERATE * FLOAT * (vectors + sum(_numbers(pass_.at(site.name), site) for site in part.sites))


def _numbers(pass_: Pass, site: Site) -> int:
    """How many numbers are learned of a matrix."""
    return pass_.learned_of(site.name, site.shape) if isinstance(pass_, TrainingOptions) else _size(site)


def _size(site: Site) -> int:
    return site.shape[0] * site.shape[1]


def exported(exporter: Exporter, pipeline: Pipeline, state: PlanState) -> int:
    """Bytes of a container."""
    dtype = computed(pipeline, state)
    made = {name: exporter.expected_bytes(spec, dtype) for name, spec in state.specs.items()}
    return sum(bytes_by_tensor(state.graph.sites, state.sizes, made).values()) + FIXED


def computed(pipeline: Pipeline, state: PlanState) -> torch.dtype:
    """The type that a run computes in."""
    if pipeline.dtype != "auto":
        chosen: torch.dtype = getattr(torch, pipeline.dtype)
        return chosen
    return computes_in(getattr(state.graph.model, "config", None), state.dtypes.values())
