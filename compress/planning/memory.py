"""Forecasts of the memory and the disk that a run needs, in bytes. Reads no weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.calibration.metrics import REFERENCE_NUMBERS
from compress.calibration.metrics import TOKENS_AT_ONCE as EVALUATED_AT_ONCE
from compress.passes import MergePass
from compress.passes.merge.permutation import coupled

if TYPE_CHECKING:
    from compress.config.pipeline import Pipeline
    from compress.models.graph import Graph
    from compress.passes import Pass

BASELINE = 450 << 20  # Python, torch and transformers, before any work
FLOAT = 4
TRAINING = 5  # numbers per weight of a model that is trained as a whole, adapters not counted
LEARNING = 18  # numbers per weight while it is learned: values, gradients, moments, the best so far, temporaries
ACTIVATIONS = 1 << 30  # bytes; more of them lie in files


def peak(pipeline: Pipeline, graph: Graph) -> int:
    """The interpreter, the largest of what is held by turns, and the activations.

    Args:
        pipeline: parsed.
        graph: the model after the last pass.
    """
    passes = _all_passes(pipeline)
    calibrated = any(p.calibrated for p in passes)
    return (
        BASELINE
        + (_measuring(graph) if pipeline.evaluate else 0)
        + max(_outside(graph) * 2, _solving(graph, passes), _training(pipeline, graph))
        + (_aligning(graph) if any(isinstance(p, MergePass) and p.aligns for p in passes) else 0)
        + (_activations(pipeline, graph) if calibrated else 0)
    )


def disk(pipeline: Pipeline, original: int, final: int) -> int:
    """Beside and at the destination: a state after each stage, the result, and models that are written whole.

    Args:
        pipeline: parsed.
        original: bytes of the weights before.
        final: bytes of the weights afterwards.
    """
    merges = [p for p in _all_passes(pipeline) if isinstance(p, MergePass)]
    tries = any(p.judged for p in merges)
    states = len(pipeline.passes) - len(merges) + 1
    return final * states + original * (len(pipeline.export) + len(merges) + tries)


def _all_passes(pipeline: Pipeline) -> list[Pass]:
    return [p for stage in pipeline.passes for p in stage]


def _learns_blocks(passes: list[Pass]) -> bool:
    return any(p.reach == "block" for p in passes)


def _configured(graph: Graph, name: str, default: int) -> int:
    value: int = getattr(getattr(graph.model, "config", None), name, default)
    return value


def _outside(graph: Graph) -> int:
    """The largest tensor."""
    return max((p.numel() for p in graph.model.parameters()), default=0) * FLOAT


def _widest(graph: Graph) -> int:
    return max((s.shape[1] for s in graph.sites), default=0)


def _solving(graph: Graph, passes: list[Pass]) -> int:
    """The largest block where data run through it, its statistics, and the workspace of the largest matrix."""
    in_blocks: dict[int, int] = {}
    for site in graph.sites:
        if site.block is not None:
            in_blocks[site.block] = in_blocks.get(site.block, 0) + site.shape[0] * site.shape[1]
    block = max(in_blocks.values(), default=0) * FLOAT * (LEARNING if _learns_blocks(passes) else 1)
    largest = max((s.shape[0] * s.shape[1] for s in graph.sites), default=0) * FLOAT
    statistics = 4 * _widest(graph) ** 2 * FLOAT if any(p.needs == "gram" for p in passes) else 0
    return (block if any(p.calibrated for p in passes) else 0) + statistics + 4 * largest


def _activations(pipeline: Pipeline, graph: Graph) -> int:
    """What the calibration data are at the entrance of a block.

    Learning keeps what arrives at a block, what arrives in the original model, and what comes out there.
    """
    data = pipeline.calibration
    tokens = data.samples * len(data.sources) * data.length if data else 0
    hidden = _configured(graph, "hidden_size", _widest(graph))
    return (3 if _learns_blocks(_all_passes(pipeline)) else 1) * min(tokens * hidden * FLOAT, ACTIVATIONS)


def _measuring(graph: Graph) -> int:
    """A batch's logits, their log-probabilities and temporaries, and the original's for the divergence."""
    return 5 * EVALUATED_AT_ONCE * _configured(graph, "vocab_size", 0) * FLOAT + REFERENCE_NUMBERS * FLOAT


def _training(pipeline: Pipeline, graph: Graph) -> int:
    """The model, what its matrices start as and become, and a batch's logits and their gradients."""
    training = [p for p in _all_passes(pipeline) if p.trains_whole]
    if not training:
        return 0
    length = pipeline.calibration.length if pipeline.calibration else 0
    tokens = max(getattr(p, "batch_size", 1) for p in training) * length
    weights = sum(p.numel() for p in graph.model.parameters())
    return TRAINING * weights * FLOAT + 6 * tokens * _configured(graph, "vocab_size", 0) * FLOAT


def _aligning(graph: Graph) -> int:
    """Bytes to match two models: one coupled group's tensors of both, twice while they move, and its scores."""
    sizes = {name: tensor.numel() for name, tensor in graph.tensors()}
    groups = [(set().union(*(u.tensors() for u in g)), max(u.count for u in g)) for g in coupled(graph.units())]
    return max((2 * FLOAT * (4 * sum(sizes[n] for n in names) + 3 * most**2) for names, most in groups), default=0)
