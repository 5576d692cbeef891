"""The two entry points: `run` for a pipeline file and a model on disk, `apply` for passes and a module in memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress import progress
from compress.api import data as given
from compress.api.export import write_all
from compress.api.output_folder import refuse_destination
from compress.calibration.metrics import logits_in
from compress.calibration.surroundings import undisturbed
from compress.checkpoint import packed_layout
from compress.checkpoint.delta.file import DELTA, Delta
from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.opening import open_model
from compress.config.pipeline import GATES, Calibration, Evaluation
from compress.config.reading import load_pipeline
from compress.config.writing import dump
from compress.encodings.format import WEIGHTS, version
from compress.engine import manager
from compress.engine.ledger import FolderLedger
from compress.engine.merge import checks as merges
from compress.engine.placement import Context, streamed
from compress.engine.resume import Resume
from compress.errors import CompressError, NonFiniteError, UsageError
from compress.export.packed import open_packed
from compress.io.atomic import copy, publish, write_text
from compress.io.keys import hash_of, key_of
from compress.io.safetensors_file import compare_tensors
from compress.io.source_code import code_of, plug_ins
from compress.logs import kept_in
from compress.models import loading
from compress.models.graph import forward
from compress.passes import MergePass
from compress.planning import plan, resources
from compress.report import report
from compress.report.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.opening import OpenedModel
    from compress.config.pipeline import Pipeline
    from compress.engine.placement import MadeDelta
    from compress.report.report import Row

LOG = "log.txt"  # in the folder of unfinished work
LOGITS_TOLERANCE = 0.0  # packed and in-memory results multiply the same numbers in the same order


@undisturbed()
def run(
    pipeline: str | Path | Mapping[str, Any] | Pipeline,
    model: str | Path,
    out: str | Path,
    *,
    calibration: given.Given | None = None,
    evaluation: given.Given | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    bars: progress.Bars | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Run a pipeline on a model on disk and write the compressed folder.

    Killed at any moment, the same call continues and ends bit-identical. The unfinished state is kept in `OUT.work`,
    and what was logged about it in `OUT.work/log.txt`.

    Args:
        pipeline: a YAML file, or a mapping of the same shape.
        model: `demo`, a local folder or a hub id.
        out: the folder to write; must not exist unless it is this very run's result.
        calibration: (samples, length) token ids, or images, instead of the pipeline's source.
        evaluation: the same, for measuring; of an image model, (images, labels).
        overwrite: replace an existing `out`.
        fresh: forget what an interrupted run had finished.
        bars: progress; by default, bars where stderr is a terminal. Log records go to the logger `compress`.
        on_row: is given every row of the report as soon as it is measured, also where the gate then fails.

    Returns:
        The report, also written as OUT/report.json.

    Raises:
        UsageError: before any work, for everything that can be known then.
        GateError, ResourceError, CompressError: while running.

    Example:
        >>> import compress, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compress.run({"passes": [{"rtn": {"bits": 4, "group_size": 64}}]}, "demo", f"{folder}/out")
        >>> report.rows[-1].name
        'rtn'
    """
    steps = load_pipeline(pipeline)
    destination, bars = Path(out).absolute(), bars or progress.Bars()
    work = destination.parent / f"{destination.name}.work"
    opened = open_model(model)
    refuse_destination(destination, opened.folder, overwrite)
    graph = opened.artifact.graph
    data = manager.Data(
        given.dataset(graph, "calibration", calibration, _dtype(steps, opened)),
        given.dataset(graph, "evaluation", evaluation, _dtype(steps, opened)),
    )
    steps = _with_given(steps, data)
    file = str(pipeline) if isinstance(pipeline, str | Path) else "pipeline"
    made = plan.make(steps, graph, opened.dtypes, file)
    merged = merges.check_models(steps, opened.artifact, file)
    resolved = dump(steps)
    with bars.shown():
        data = _data(steps, opened, data, bars)
    merges.check_data(steps, data.calibration, graph, file)
    hashes = [hash_of(each) for each in (data.calibration, data.evaluation)]
    own = plug_ins(type(pass_) for stage in steps.passes for pass_ in stage)
    identity = key_of(opened.artifact.source.fingerprint(), resolved, hashes, *merged, *([code_of(own)] if own else []))
    finished = _finished(destination, identity, steps)
    if finished and not (overwrite or fresh):
        shutil.rmtree(work, ignore_errors=True)
        for row in finished.rows:
            on_row(row)
        return finished
    if destination.exists() and not overwrite:
        raise UsageError(f"{out} exists and is not the result of this run; choose another -o, or give --overwrite")
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    resources.check_resources(made, destination)
    _refuse_non_finite(opened.artifact)
    dtype = _dtype(steps, opened)
    names = ["+".join(p.key for p in stage) for stage in steps.passes]
    ledger = FolderLedger(work, Resume(names, len(graph.blocks)))
    context = Context(
        artifact=opened.artifact, given=opened.artifact, ledger=ledger,
        seed=steps.seed, dtype=dtype, products=steps.products, resident=False, bars=bars,
    )  # fmt: skip
    with kept_in(work / LOG), bars.shown():
        with context.devices.scope():
            measured, context = manager.execute(steps, made, context, data, str(model), on_row)
        ledger.resume.all_done()
        _export(context, opened, steps, measured, data, work / "out", destination, identity, resolved)
    shutil.rmtree(work, ignore_errors=True)
    return measured


def row_names(pipeline: str | Path | Mapping[str, Any] | Pipeline) -> list[str]:
    """What the rows of a pipeline's report are called: the original, models to merge with, and stages."""
    stages = load_pipeline(pipeline).passes
    models = [model for stage in stages for pass_ in stage if isinstance(pass_, MergePass) for model in pass_.models]
    return ["original", *models, *("+".join(p.key for p in stage) for stage in stages)]


def _refuse_non_finite(artifact: Artifact) -> None:
    """NaN or infinity in a tensor that no pass looks at: embeddings, norms, biases."""
    sites = {s.parameter for s in artifact.graph.sites if s.block is not None}
    for name, _ in artifact.graph.tensors():
        if name not in sites:
            value = artifact.source.read(artifact.name_in_source(name))
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteError(f"{name} holds NaN or infinity in the source; get a clean checkpoint")


def _dtype(steps: Pipeline, opened: OpenedModel) -> torch.dtype:
    if steps.dtype != "auto":
        chosen: torch.dtype = getattr(torch, steps.dtype)
        return chosen
    configured = getattr(opened.config, "dtype", None)
    return configured if isinstance(configured, torch.dtype) else torch.float32


def _with_given(steps: Pipeline, data: manager.Data) -> Pipeline:
    calibration = given.given_section(Calibration, data.calibration, {})
    kept = {name: getattr(steps.evaluate, name) for name in (*GATES, "after")} if steps.evaluate else {}
    evaluation = given.given_section(Evaluation, data.evaluation, kept)
    return replace(steps, calibration=calibration or steps.calibration, evaluate=evaluation or steps.evaluate)


def _data(steps: Pipeline, opened: OpenedModel, data: manager.Data, bars: progress.Bars) -> manager.Data:
    """Read what the pipeline names; given data win."""
    calibration, evaluation = data.calibration, data.evaluation
    graph, dtype = opened.artifact.graph, _dtype(steps, opened)
    needed = any(p.calibrated for stage in steps.passes for p in stage)
    if calibration is None and needed and steps.calibration:
        found = given.read_data(steps.calibration, opened.folder, "calibration", bars.over)
        calibration = given.model_inputs(graph, "calibration", found, dtype)
    if evaluation is None and steps.evaluate:
        found = given.read_data(steps.evaluate, opened.folder, "evaluation", bars.over)
        evaluation = given.model_inputs(graph, "evaluation", found, dtype)
    return manager.Data(calibration if needed else None, evaluation)


def _finished(destination: Path, identity: str, steps: Pipeline) -> Report | None:
    """The report of a whole folder that this very run wrote earlier."""
    try:
        data = json.loads((destination / "report.json").read_text(encoding="utf-8"))
        same = data["verified"]["run"] == identity
        rows = [report.Row(**row) for row in data.pop("rows")]
        needed = [WEIGHTS, "config.json", "pipeline.yaml"]
        needed += [f"{exporter.key}/{file}" for exporter in steps.export for file in exporter.files]
        needed += [f"delta/{DELTA}" for merge in data["merged"] if "delta" in merge]
        whole = all((destination / name).is_file() for name in needed)
        return Report(rows=rows, **data) if same and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _export(
    context: Context,
    opened: OpenedModel,
    steps: Pipeline,
    measured: Report,
    data: manager.Data,
    partial: Path,
    destination: Path,
    identity: str,
    resolved: str,
) -> None:
    """Write beside the final name, read back, compare, then rename."""
    shutil.rmtree(partial, ignore_errors=True)
    config = json.loads((opened.folder / "config.json").read_text(encoding="utf-8"))
    packed_layout.write_packed(context.artifact, partial, config, opened.folder, version(), context.bars)
    compared = packed_layout.verify(context.artifact, partial, context.bars)
    measured.verified = {"run": identity, "tensors_equal": compared}
    if data.evaluation is not None:
        measured.verified["max_logit_difference"] = _logit_difference(context, partial, data.evaluation.inputs[:2])
    if steps.export:
        made = open_packed(partial, context.dtype)
        measured.verified |= write_all(made, steps.export, destination, data.evaluation, context.bars)
    if context.delta is not None:
        measured.verified["delta"] = {"tensors_equal": _put_delta(context.delta, partial / "delta", context)}
    write_text(partial / "pipeline.yaml", resolved)
    write_text(partial / "report.json", measured.to_json())
    write_text(partial / "README.md", report.card(measured, resolved, loading.loader(opened.config).__name__))
    publish(partial / WEIGHTS, partial / WEIGHTS)
    if destination.exists():
        shutil.rmtree(destination)
    partial.rename(destination)


def _put_delta(made: MadeDelta, folder: Path, context: Context) -> int:
    """Copy the delta into the result, open it there, and compare what it makes of the base with the merged checkpoint.

    Returns:
        How many tensors were compared.
    """
    folder.mkdir()
    copy(made.file, folder / DELTA)
    model = with_delta(context.given, Delta.open(folder / DELTA))
    layout, read = list(packed_layout.entries(model)), partial(packed_layout.stored_tensors, model)
    compared = compare_tensors(layout, read, made.merged, context.bars, "delta")
    publish(folder / DELTA, folder / DELTA)
    return compared


def _logit_difference(context: Context, folder: Path, inputs: Tensor) -> float:
    """Largest difference of the packed model's logits from the in-memory result's; more than none is an error."""
    loaded = loading.load_model(folder, context.dtype)
    with torch.no_grad():
        there = logits_in(forward(replace(context.graph, model=loaded), inputs))
        with streamed(context):
            here = logits_in(forward(context.graph, inputs))
    difference = float((there - here).abs().max())
    if not difference <= LOGITS_TOLERANCE:
        raise CompressError(f"the written model's logits differ by {difference:.3g} from the in-memory result's")
    return difference
