"""Forecast of the memory that a run needs, in bytes, at the moment when it needs most. Reads no weight."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from compress.calibration.data import CALIBRATED_AT_ONCE
from compress.calibration.metrics import TOKENS_AT_ONCE
from compress.calibration.processed import takes_rows
from compress.calibration.reference import REFERENCE_NUMBERS
from compress.calibration.self_written import AT_ONCE
from compress.calibration.texts import SELF
from compress.errors import DataError
from compress.export.compared import NUMBERS as COMPARED
from compress.models.logits import PIECE, WHOLE, WHOLE_LEARNED, bodies, vocabulary
from compress.passes import MergePass
from compress.passes.merge.orders import HELD, coupled
from compress.passes.retrain.options import TrainingOptions
from compress.passes.targets import works_on
from compress.planning.experts import bytes_to_merge
from compress.planning.need import Need
from compress.planning.stream import bytes_to_turn
from compress.planning.width import bytes_to_solve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.config.pipeline import DataSection, Pipeline
    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.passes import Pass
    from compress.planning.state import PassPlan

FLOAT, FLOAT64, TOKEN = 4, 8, 8
GRAM = 5  # bytes for each number of a Gram matrix: a little more than half of it is summed up, in float64
DRIFTS = 3  # times as large are the sums where it is summed up, too, how far inputs are from the original's
INTERPRETER = 560 << 20  # Python, torch, transformers and a tokenizer, before any work
LIBRARIES = 3 << 30  # those of CUDA, once they are loaded
TRAINING = 6  # numbers per weight of a model that is trained as a whole, but for what is learned; one more per copy
LEARNED = 5  # for each number that is learned there: its value, gradient, two moments, the best so far
LEARNING = 18  # numbers per weight while it is learned: values, gradients, moments, the best so far, temporaries
ACTIVATIONS = 1 << 30  # bytes; more of them lie in files
SIDE, CHANNELS = 384, 3  # of an image, where the configuration does not say
READING = 8  # bytes for each of a file of text while it is read and tokenized
EXPORTING = 2  # a container while it is written, and loaded again
KEPT_NUMBERS = 1 << 26  # of models that are read again and again
MEASURING = 6  # logits, their log-probabilities, those of the original, and temporaries
CHECKING = 3  # logits of both models, and their difference
LEARNED_LOGITS = 6  # the same, and gradients


def moments_of(
    pipeline: Pipeline,
    stages: Sequence[Sequence[PassPlan]],
    graphs: Sequence[Graph],
    final: int,
    exported: Sequence[int],
) -> list[Need]:
    """The moments of a run: reading data, evaluating, each stage, checking the result, exporting it.

    Args:
        pipeline: parsed.
        stages: planned.
        graphs: the model before each stage, and after the last.
        final: bytes of the weights afterwards.
        exported: bytes of each container that is written.
    """
    graph, last = graphs[0], graphs[-1]
    sections = [section for section in (pipeline.calibration, pipeline.evaluate) if section]
    windows = sum(_windows(section) + _shown(section, graph) for section in sections)
    held = {"interpreter": INTERPRETER, "data": windows}
    moments = [Need("reading data", {**held, "data": windows + _reading(sections, graph)})]
    if pipeline.calibration and SELF in pipeline.calibration.sources.values():
        moments.append(joined("writing calibration text", held, _writing(graph, pipeline.calibration)))
    if pipeline.evaluate:
        held["evaluation"] = reference(graph, pipeline.evaluate)
        moments.append(joined("evaluating", held, _evaluating(graph, pipeline.evaluate)))
    for stage, now in zip(stages, graphs, strict=False):
        parts = _stage(pipeline, [part.pass_ for part in stage], now)
        parts["merging"] += sum(bytes_to_merge(part) for part in stage)
        solving = (bytes_to_solve(part) + bytes_to_turn(part) for part in stage)
        parts["statistics"] = max(parts["statistics"], *solving)
        moments.append(joined(f"running {stage[0].path}", held, parts))
    moments.append(joined("checking the result", held, _checking(pipeline, last, final)))
    for exporter, size in zip(pipeline.export, exported, strict=True):
        parts = {"weights": final, "exports": exporter.libraries + EXPORTING * size, **_comparing(pipeline, last)}
        moments.append(joined(f"exporting {exporter.key}", held, parts))
    return moments


def on_host(graph: Graph, need: Need, activations: int) -> Need:
    """What remains on the host of a moment's need where a device of its own computes.

    Args:
        graph: the model.
        need: of the moment, if the host computed.
        activations: bytes that wait on the host.
    """
    kept = {name: size for name, size in need.parts.items() if name in ("interpreter", "data", "merging", "exports")}
    read = 4 * outside(graph) * FLOAT
    return Need(need.moment, {**kept, "libraries": LIBRARIES, "weights": read, "activations": activations})


def joined(moment: str, held: Mapping[str, int], parts: Mapping[str, int]) -> Need:
    """What is held all the time, and what a moment needs beside it."""
    return Need(moment, {name: held.get(name, 0) + parts.get(name, 0) for name in dict.fromkeys((*held, *parts))})


# --- data and what they become ---------------------------------------------------------------------------------------


def _windows(section: DataSection) -> int:
    return TOKEN * _tokens(section)


def _tokens(section: DataSection) -> int:
    return section.samples * len(section.sources) * section.length


def _shown(section: DataSection, graph: Graph) -> int:
    """What the images or sounds of rows become, one of each row; a sound is about as large as an image."""
    config = getattr(graph.model, "config", None)
    side = getattr(getattr(config, "vision_config", None) or config, "image_size", None)
    side = max((n for n in (side if isinstance(side, list | tuple) else [side]) if isinstance(n, int)), default=SIDE)
    return len(_of_rows(section, graph)) * section.samples * CHANNELS * side**2 * FLOAT


def _of_rows(section: DataSection, graph: Graph) -> list[str]:
    """The sources whose rows are read one by one, with their images or sounds."""
    with suppress(DataError):  # which is said elsewhere
        return [source for source in section.sources.values() if takes_rows(graph.model, source, section.field)]
    return []


def _reading(sections: Sequence[DataSection], graph: Graph) -> int:
    """The largest file of text, while it is tokenized."""
    apart = {source for section in sections for source in _of_rows(section, graph)}
    files = [Path(source) for section in sections for source in section.sources.values() if source not in apart]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    return READING * max(sizes, default=0)


def _configured(graph: Graph, name: str, default: int) -> int:
    value = getattr(getattr(graph.model, "config", None), name, default)
    return value if isinstance(value, int) else default


def flowing(graph: Graph, tokens: int) -> int:
    """How many numbers are between the layers of a block while so many tokens run through it."""
    width = widest(graph)
    return tokens * (6 * _configured(graph, "hidden_size", width) + 3 * width)


def logits(graph: Graph, tokens: int, whole: int, copies: int) -> int:
    """Logits of a batch, or of a piece where they are computed in pieces, and what is made of them."""
    numbers = tokens * vocabulary(graph.model)
    return copies * FLOAT * (PIECE if numbers > whole and bodies(graph.model) else numbers)


def reference(graph: Graph, section: DataSection) -> int:
    """What is kept of the original's predictions, in bytes."""
    return min(REFERENCE_NUMBERS, _predictions(graph, section)) * FLOAT


def evaluated_at_once(section: DataSection) -> int:
    """Tokens of a batch that is measured on."""
    return min(max(TOKENS_AT_ONCE, section.length), _tokens(section))


def run_at_once(pipeline: Pipeline) -> int:
    """Tokens of a batch of calibration data."""
    data = pipeline.calibration
    return min(max(CALIBRATED_AT_ONCE, data.length), _tokens(data)) if data else 0


def _predictions(graph: Graph, section: DataSection) -> int:
    return _tokens(section) * vocabulary(graph.model)


# --- moments ---------------------------------------------------------------------------------------------------------


def _evaluating(graph: Graph, section: DataSection) -> dict[str, int]:
    tokens = evaluated_at_once(section)
    return {
        "weights": 2 * max(block(graph), outside(graph)) * FLOAT,
        "activations": flowing(graph, tokens) * FLOAT,
        "evaluation": logits(graph, tokens, WHOLE, MEASURING),
    }


def _writing(graph: Graph, section: DataSection) -> dict[str, int]:
    """The whole model, what its layers keep of every token, and the logits of one token for each text."""
    texts, width = min(AT_ONCE, section.samples), _configured(graph, "hidden_size", widest(graph))
    return {
        "weights": sum(p.numel() for p in graph.model.parameters()) * FLOAT,
        "activations": 2 * len(graph.blocks) * texts * section.length * width * FLOAT,
        "evaluation": MEASURING * texts * vocabulary(graph.model) * FLOAT,
    }


def _stage(pipeline: Pipeline, passes: Sequence[Pass], graph: Graph) -> dict[str, int]:
    """The largest part of the model that is there at a time, and what a pass needs beside it."""
    calibrated = any(p.calibrated for p in passes)
    learns = any(p.reach == "block" for p in passes)
    follows = any(p.propagates for p in passes)
    grams = 4 * max((in_grams(s) for s in graph.sites), default=0) * FLOAT * (DRIFTS if follows else 1)
    grams += of_experts(graph)
    in_block = block(graph) * (2 if follows else 1)  # and the original's
    return {
        "weights": max(2 * outside(graph), (in_block if calibrated else 0) + 4 * largest(graph)) * FLOAT,
        "statistics": grams if any(p.needs == "gram" for p in passes) else 0,
        "activations": min(waiting(pipeline, passes, graph, FLOAT), _copies(passes) * ACTIVATIONS),
        "training": (block(graph) * LEARNING * FLOAT if learns else 0)
        + sum(training(p, pipeline.calibration, graph) for p in passes),
        "merging": sum(_merging(p, graph) for p in passes if isinstance(p, MergePass)),
    }


def waiting(pipeline: Pipeline, passes: Sequence[Pass], graph: Graph, itemsize: int) -> int:
    """What waits between two blocks, in bytes."""
    data = pipeline.calibration
    tokens = _tokens(data) if data and any(p.calibrated for p in passes) else 0
    return _copies(passes) * tokens * _configured(graph, "hidden_size", widest(graph)) * itemsize


def _copies(passes: Sequence[Pass]) -> int:
    """How many hidden states are kept of each token: beside the original model, also its own, and what comes out."""
    return 3 if any(p.reach == "block" or p.propagates for p in passes) else 1


def training(pass_: Pass, data: DataSection | None, graph: Graph) -> int:
    """The model, what its matrices start as and become, what is learned, and a batch's logits and their gradients."""
    if not pass_.trains_whole:
        return 0
    tokens = getattr(pass_, "batch_size", 1) * (data.length if data else 0)
    weights = sum(p.numel() for p in graph.model.parameters())
    whole = WHOLE_LEARNED if pass_.reach == "model" else sys.maxsize  # merges hold all of a batch
    copies = pass_.trainings if isinstance(pass_, TrainingOptions) else 1
    numbers = (TRAINING - 1 + copies) * weights + LEARNED * _learned(pass_, graph) + flowing(graph, tokens)
    return numbers * FLOAT + logits(graph, tokens, whole, LEARNED_LOGITS)


def _learned(pass_: Pass, graph: Graph) -> int:
    """About how many numbers are learned of all matrices."""
    if not isinstance(pass_, TrainingOptions):
        return 0
    return sum(pass_.at(s.name).learned_of(s.name, s.shape) for s in graph.sites if works_on(pass_, s))


def _merging(pass_: MergePass, graph: Graph) -> int:
    """What is kept of the models where they are read again and again, and what matching two of them takes."""
    weights = sum(p.numel() for p in graph.model.parameters())
    read_again = pass_.judged or pass_.learns
    every = weights * (1 + len(pass_.models))
    kept = min(KEPT_NUMBERS, every) * FLOAT if read_again else 0
    kept += every * FLOAT if pass_.learns_once else 0  # of every number of every model how much it matters
    return kept + (_aligning(graph, pass_.aligns_residual) if pass_.aligns else 0)


def _checking(pipeline: Pipeline, graph: Graph, final: int) -> dict[str, int]:
    """The written model is loaded, and both are run on two samples."""
    section = pipeline.evaluate
    tokens = 2 * section.length if section else 0
    return {
        "weights": (final if section else 0) + 2 * max(block(graph), outside(graph)) * FLOAT,
        "activations": flowing(graph, tokens) * FLOAT,
        "evaluation": logits(graph, tokens, WHOLE, CHECKING),
    }


def _comparing(pipeline: Pipeline, graph: Graph) -> dict[str, int]:
    """What an exported model is compared on, logits of both and what is made of them."""
    if not pipeline.evaluate:
        return {}
    numbers = min(COMPARED, _predictions(graph, pipeline.evaluate))
    tokens = min(_tokens(pipeline.evaluate), numbers // max(1, vocabulary(graph.model)))
    return {"activations": flowing(graph, tokens) * FLOAT, "evaluation": MEASURING * numbers * FLOAT}


# --- sizes -----------------------------------------------------------------------------------------------------------


def outside(graph: Graph) -> int:
    """How many numbers the largest tensor has."""
    return max((p.numel() for p in graph.model.parameters()), default=0)


def largest(graph: Graph) -> int:
    """How many numbers the largest matrix has that passes work on."""
    return max((s.shape[0] * s.shape[1] for s in graph.sites), default=0)


def widest(graph: Graph) -> int:
    """How many numbers the largest input of a matrix has."""
    return max((s.shape[1] for s in graph.sites), default=0)


def in_grams(site: Site) -> int:
    """How many numbers the Gram matrix of a site has, or those of all groups of a convolution."""
    return site.groups * site.shape[1] ** 2


def of_experts(graph: Graph) -> int:
    """Bytes of the sums over the inputs of a block's experts: each has its own, half a matrix of float64."""
    blocks: dict[int | None, int] = {}
    for site in graph.sites:
        if site.is_expert:
            blocks[site.block] = blocks.get(site.block, 0) + site.shape[1] ** 2
    return GRAM * max(blocks.values(), default=0)


def block(graph: Graph) -> int:
    """How many numbers the matrices of the largest block have."""
    in_blocks: dict[int, int] = {}
    for site in graph.sites:
        if site.block is not None:
            in_blocks[site.block] = in_blocks.get(site.block, 0) + site.shape[0] * site.shape[1]
    return max(in_blocks.values(), default=0)


def _aligning(graph: Graph, residual: bool) -> int:
    """Bytes to match two models: of a coupled group what is kept, the tensors that are being moved, and scores."""
    sizes = {name: tensor.numel() for name, tensor in graph.tensors()}
    found = 0
    for group in coupled(graph.units(residual)):
        kept = 2 * min(HELD, FLOAT64 * sum(sizes[name] for name in set().union(*(each.tensors() for each in group))))
        for each in group:
            own = [sizes[name] for name in each.tensors()]
            moving = 4 * sum(own) if each.inner else 6 * max(own)  # heads are looked at one by one, a copy of each
            found = max(found, kept + FLOAT64 * (moving + 3 * each.count**2))
    return found
