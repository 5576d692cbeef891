"""The two entry points: `run` for a pipeline file and a model on disk, `apply` for passes and a module in memory."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress import progress
from compress.api import data as given
from compress.api.export import write_all
from compress.api.output_folder import (
    LOG,
    RESULT,
    clear,
    inputs_of,
    publish_folder,
    refuse_destination,
    work_of,
    working_for,
)
from compress.api.reloaded import logit_difference
from compress.calibration.surroundings import undisturbed
from compress.checkpoint import packed_layout
from compress.checkpoint.delta.file import DELTA, Delta
from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.finite import refuse_non_finite
from compress.checkpoint.opening import open_model
from compress.config.pipeline import GATES, Calibration, Evaluation
from compress.config.reading import load_pipeline
from compress.config.writing import dump
from compress.encodings.format import version
from compress.engine import manager
from compress.engine.devices import devices_of
from compress.engine.ledger import FolderLedger
from compress.engine.merge import checks as merges
from compress.engine.placement import Context
from compress.engine.resume import Resume
from compress.errors import CheckpointError, UsageError
from compress.export.packed import open_packed
from compress.io.atomic import copy, remove_made, write_text
from compress.io.keys import Watch, hash_of, key_of
from compress.io.manifest import verify_folder
from compress.io.safetensors_file import compare_tensors
from compress.io.source_code import code_of, plug_ins
from compress.logs import LOGGER, kept_in
from compress.models import loading
from compress.models.companions import companions
from compress.passes import MergePass
from compress.planning import plan, resources
from compress.planning.places import places
from compress.report import report
from compress.report.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from compress.checkpoint.opening import OpenedModel
    from compress.checkpoint.sources import Source
    from compress.config.pipeline import Pipeline
    from compress.engine.placement import MadeDelta
    from compress.planning.places import Places
    from compress.report.report import Row


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
    device: str | None = None,
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
        device: what computes, instead of the pipeline's choice: `auto`, `cpu`, `cuda`, `cuda:1`.
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
    steps = steps if device is None else replace(steps, device=device)
    where = places(steps.device, steps.max_memory)
    destination, bars = Path(out).absolute(), bars or progress.Bars()
    opened = open_model(model)
    refuse_destination(destination, inputs_of(steps, opened.folder, pipeline), overwrite)
    graph = opened.artifact.graph
    data = manager.Data(
        given.dataset(graph, "calibration", calibration, _dtype(steps, opened)),
        given.dataset(graph, "evaluation", evaluation, _dtype(steps, opened)),
    )
    steps = _with_given(steps, data)
    file = str(pipeline) if isinstance(pipeline, str | Path) else "pipeline"
    made = plan.make(steps, graph, opened.dtypes, file, opened.companion_bytes, where)
    merged = merges.check_models(steps, opened.artifact, file)
    resolved = dump(steps)
    with bars.shown():
        data = _data(steps, opened, data, bars)
    merges.check_data(steps, data.calibration, graph, file)
    hashes = [hash_of(each) for each in (data.calibration, data.evaluation)]
    own = plug_ins(type(pass_) for stage in steps.passes for pass_ in stage)
    sources = [opened.artifact.source, *merged]
    meant = dump(replace(steps, device="auto", max_memory={}))  # what results depend on
    identity = key_of([s.fingerprint() for s in sources], meant, hashes, where.name, *([code_of(own)] if own else []))
    with working_for(destination) as work:
        finished = None if overwrite or fresh else _finished(destination, identity, steps)
        if finished:
            clear(work)
            for row in finished.rows:
                on_row(row)
            return finished
        if destination.exists() and not overwrite:
            raise UsageError(f"{out} exists and is not the result of this run; choose another -o, or give --overwrite")
        if fresh:
            clear(work)
        resources.check_resources(made, destination, work)
        with bars.shown():
            refuse_non_finite(opened.artifact, _dtype(steps, opened), bars)
        watch = _watch(opened, sources)
        resume = Resume(["+".join(p.key for p in stage) for stage in steps.passes], len(graph.blocks))
        context = _context(steps, opened, FolderLedger(work, resume, watch.refuse_changed), bars, made)
        LOGGER.log(logging.INFO if where.apart else logging.DEBUG, "computing on %s", where.name)
        with kept_in(work / LOG), bars.shown():
            with context.devices.scope():
                measured, context = manager.execute(steps, made, context, data, str(model), on_row)
            measured.notes += opened.notes
            resume.all_done()
            _export(context, opened, steps, measured, data, destination, identity, resolved, where)
            watch.refuse_changed()
            publish_folder(work / RESULT, destination)
        clear(work)
    return measured


def row_names(pipeline: str | Path | Mapping[str, Any] | Pipeline) -> list[str]:
    """What the rows of a pipeline's report are called: the original, models to merge with, and stages."""
    stages = load_pipeline(pipeline).passes
    models = [model for stage in stages for pass_ in stage if isinstance(pass_, MergePass) for model in pass_.models]
    return ["original", *models, *("+".join(p.key for p in stage) for stage in stages)]


def _watch(opened: OpenedModel, sources: Sequence[Source]) -> Watch:
    """Everything that is read of a model, and of those that are merged into it."""
    read = [file for source in sources for file in source.files()]
    return Watch.over([*read, opened.folder / "config.json", *companions(opened.folder)])


def _context(
    steps: Pipeline, opened: OpenedModel, ledger: FolderLedger, bars: progress.Bars, made: plan.Plan
) -> Context:
    """What the first stage works in."""
    return Context(
        artifact=opened.artifact, given=opened.artifact, ledger=ledger, seed=steps.seed, dtype=_dtype(steps, opened),
        products=steps.products, resident=False, bars=bars, devices=devices_of(made),
    )  # fmt: skip


def _dtype(steps: Pipeline, opened: OpenedModel) -> torch.dtype:
    if steps.dtype == "auto":
        return opened.dtype
    chosen: torch.dtype = getattr(torch, steps.dtype)
    return chosen


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
    """The report of a whole folder that this very run wrote earlier.

    Raises:
        UsageError: it wrote the folder, which was damaged since.
    """
    try:
        data = json.loads((destination / "report.json").read_text(encoding="utf-8"))
        if data["verified"]["run"] != identity:
            return None
        rows = [report.Row(**row) for row in data.pop("rows")]
        found = Report(rows=rows, **data)
        needed = [f"{exporter.key}/{file}" for exporter in steps.export for file in exporter.files]
        needed += [f"delta/{DELTA}" for merge in data["merged"] if "delta" in merge]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    try:
        marked = verify_folder(destination, everything=True) is not None
        lost = [name for name in needed if not (destination / name).is_file()]
        said = "" if marked and not lost else f"it lacks {lost[0]}" if lost else "it has no manifest.json"
    except CheckpointError as error:
        said = str(error)
    if said:
        raise UsageError(f"{destination} is the result of this run, but {said}; --overwrite writes it again")
    return found


def _export(
    context: Context,
    opened: OpenedModel,
    steps: Pipeline,
    measured: Report,
    data: manager.Data,
    destination: Path,
    identity: str,
    resolved: str,
    where: Places,
) -> None:
    """Write the result into the folder of unfinished work, read it back and compare."""
    partial = work_of(destination) / RESULT
    remove_made(partial)
    config = opened.settings(context.dtype)
    packed_layout.write_packed(context.artifact, partial, config, opened.folder, version(), context.bars)
    compared = packed_layout.verify(context.artifact, partial, context.bars)
    measured.verified = {"run": identity, "tensors_equal": compared}
    if data.evaluation is not None:
        few = data.evaluation.inputs[:2]
        measured.verified["max_logit_difference"] = logit_difference(context, partial, few, where)
    if steps.export:
        made = open_packed(partial, context.dtype)
        written = {exporter.key: partial / exporter.key for exporter in steps.export}
        measured.verified |= write_all(made, steps.export, written, destination, data.evaluation, context.bars)
    if context.delta is not None:
        measured.verified["delta"] = {"tensors_equal": _put_delta(context.delta, partial / "delta", context)}
    write_text(partial / "pipeline.yaml", resolved)
    write_text(partial / "report.json", measured.to_json())
    write_text(partial / "README.md", report.card(measured, resolved, loading.loader(opened.config).__name__))


def _put_delta(made: MadeDelta, folder: Path, context: Context) -> int:
    """Copy the delta into the result, open it there, and compare what it makes of the base with the merged checkpoint.

    Returns:
        How many tensors were compared.
    """
    folder.mkdir()
    copy(made.file, folder / DELTA)
    model = with_delta(context.given, Delta.open(folder / DELTA))
    layout, read = list(packed_layout.entries(model)), partial(packed_layout.stored_tensors, model)
    return compare_tensors(layout, read, made.merged, context.bars, "delta")
