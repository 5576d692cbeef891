"""The two entry points: `run` for a pipeline file and a model on disk, `apply` for passes and a module in memory."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress import progress
from compress.api import data as given
from compress.api.export import write_all
from compress.api.gates import refuse_idle_gate
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
from compress.api.together import device_for, refuse_differing, shared
from compress.calibration.self_written import self_written
from compress.calibration.surroundings import undisturbed
from compress.checkpoint import packed_layout
from compress.checkpoint.delta.file import DELTA, Delta
from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.finite import refuse_non_finite
from compress.checkpoint.opening import open_model
from compress.config.pipeline import GATES, OF_EXPERTS, Calibration, Evaluation
from compress.config.reading import load_pipeline
from compress.config.writing import dump
from compress.encodings.format import version
from compress.engine import manager
from compress.engine.context import Context, expert_options, products_of
from compress.engine.devices import devices_of
from compress.engine.executor import SingleProcess
from compress.engine.ledger import FolderLedger, MemoryLedger
from compress.engine.merge import checks as merges
from compress.engine.model_training import in_memory
from compress.engine.read_ahead import ReadAhead
from compress.engine.resume import Resume
from compress.errors import CheckpointError, UsageError
from compress.export.packed import open_packed
from compress.io.atomic import copy, remove_made, write_text
from compress.io.keys import Watch, hash_of, key_of
from compress.io.manifest import verify_folder
from compress.io.safetensors_file import compare_tensors
from compress.io.source_code import code_of, plug_ins
from compress.logs import LOGGER, kept_in
from compress.models.architecture import auto_class
from compress.models.tokenizers import load_tokenizer
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
    from compress.engine.context import MadeDelta
    from compress.engine.executor import Executor
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
    executor: Executor | None = None,
    bars: progress.Bars | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Run a pipeline on a model on disk and write the compressed folder.

    Killed at any moment, the same call continues and ends bit-identical. The unfinished state is kept in `OUT.work`,
    and what was logged about it in `OUT.work/log.txt`.

    Args:
        pipeline: a YAML file, or a mapping of the same shape.
        model: `demo`, a local folder, a hub id, or an adapter: its folder or hub id, or BASE+ADAPTER.
        out: the folder to write; must not exist unless it is this very run's result.
        calibration: (samples, length) token ids, or images, instead of the pipeline's source.
        evaluation: the same, for measuring; of an image model, (images, labels).
        overwrite: replace an existing `out`.
        fresh: forget what an interrupted run had finished.
        device: what computes, instead of the pipeline's choice: `auto`, `cpu`, `cuda`, `cuda:1`.
        executor: how several processes share the work, each of which calls this; one does it alone by default.
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
    work = prepare(
        pipeline, model, out, calibration=calibration, evaluation=evaluation, overwrite=overwrite, device=device,
        executor=executor, bars=bars,
    )  # fmt: skip
    refuse_differing(work.executor, work.facts())
    led = work.executor.rank == 0
    return _led(work, Path(out).absolute(), overwrite, fresh, on_row) if led else _followed(work)


def prepare(
    pipeline: str | Path | Mapping[str, Any] | Pipeline,
    model: str | Path,
    out: str | Path,
    *,
    calibration: given.Given | None = None,
    evaluation: given.Given | None = None,
    overwrite: bool = False,
    device: str | None = None,
    executor: Executor | None = None,
    bars: progress.Bars | None = None,
) -> Work:
    """Everything that a run does, known and checked before it begins, and its data read; the arguments are its own.

    Raises:
        UsageError: for everything that can be known then.
    """
    steps = load_pipeline(pipeline)
    steps = steps if device is None else replace(steps, device=device)
    executor, bars = executor or SingleProcess(), bars or progress.Bars()
    where = places(device_for(steps.device, executor), steps.max_memory)
    destination = Path(out).absolute()
    opened = open_model(model).of_towers(steps.towers)
    if executor.rank == 0:
        refuse_destination(destination, inputs_of(steps, opened.folders, pipeline), overwrite)
    graph = opened.artifact.graph
    data = manager.Data(
        given.dataset(graph, "calibration", calibration, _dtype(steps, opened)),
        given.dataset(graph, "evaluation", evaluation, _dtype(steps, opened)),
    )
    steps = _with_given(steps, data)
    file = str(pipeline) if isinstance(pipeline, str | Path) else "pipeline"
    made = plan.make(steps, graph, opened.dtypes, file, opened.companion_bytes, where, opened.carried_bytes)
    merged = merges.check_models(steps, opened.artifact, file)
    with bars.shown():
        data = _data(steps, opened, data, bars, partial(_own_text, steps, opened, made, bars))
    merges.check_data(steps, data.calibration, graph, file)
    given.refuse_by_name(steps, data.calibration)
    return Work(steps, opened, data, made, (opened.artifact.source, *merged), executor, bars, str(model))


@dataclass(frozen=True)
class Work:
    """What a run does, known before it begins.

    Attributes:
        sources: the values of the model, and of those that are merged into it.
        model: what the user calls it.
    """

    steps: Pipeline
    opened: OpenedModel
    data: manager.Data
    plan: plan.Plan
    sources: Sequence[Source]
    executor: Executor
    bars: progress.Bars
    model: str

    def facts(self) -> dict[str, Any]:
        """What the result depends on, but for the code: what it is called -> its value."""
        own = plug_ins(type(pass_) for stage in self.steps.passes for pass_ in stage)
        return {
            "model": [source.fingerprint() for source in self.sources],
            "pipeline": dump(replace(self.steps, device="auto", max_memory={})),
            "data": [hash_of(each) for each in (self.data.calibration, self.data.evaluation)],
            "device": self.plan.places.name,
            **({"plug-ins": code_of(own)} if own else {}),
        }

    @cached_property
    def identity(self) -> str:
        """A hash that the result bears."""
        calibrated = self.data.calibration is not None  # whatever is not is the same, however many processes there are
        several = [self.executor.world] if calibrated and self.executor.world > 1 else []
        return key_of(*self.facts().values(), *several)

    def watch(self) -> Watch:
        """Everything that is read of a model, and of those that are merged into it."""
        read = [file for source in self.sources for file in source.files()]
        return Watch.over([*read, *self.opened.companions])

    def context(self, ledger: MemoryLedger) -> Context:
        """What the first stage works in."""
        opened, steps, compute = self.opened, self.steps, self.plan.places.compute
        products = products_of(opened.artifact.graph, steps.products)
        return Context(
            artifact=opened.artifact, given=opened.artifact, ledger=ledger, seed=steps.seed,
            dtype=_dtype(steps, opened), products=products, resident=False, bars=self.bars,
            executor=self.executor, devices=devices_of(self.plan), experts=expert_options(steps.calibration),
            ahead=ReadAhead(compute) if compute.type == "cuda" else None,
        )  # fmt: skip

    def execute(self, context: Context, on_row: Callable[[Row], None] = lambda row: None) -> tuple[Report, Context]:
        """Run every stage."""
        with context.devices.scope():
            return manager.execute(self.steps, self.plan, context, self.data, self.model, on_row)


def _led(work: Work, destination: Path, overwrite: bool, fresh: bool, on_row: Callable[[Row], None]) -> Report:
    """What process 0 does: it alone writes."""
    opened, bars, where = work.opened, work.bars, work.plan.places
    with working_for(destination) as folder:
        finished = None if overwrite or fresh else _finished(destination, work.identity, work.steps)
        if finished:
            clear(folder)
            for row in finished.rows:
                on_row(row)
            work.executor.told(asdict(finished))
            return finished
        if destination.exists() and not overwrite:
            raise UsageError(
                f"{destination} exists and is not the result of this run; choose another -o, or give --overwrite"
            )
        if fresh:
            clear(folder)
        resources.check_resources(work.plan, destination, folder)
        with bars.shown():
            refuse_non_finite(opened.artifact, _dtype(work.steps, opened), bars)
        work.executor.told(None)
        watch = work.watch()
        resume = Resume(
            ["+".join(p.key for p in stage) for stage in work.steps.passes], len(opened.artifact.graph.blocks)
        )
        kept = FolderLedger(folder, resume, watch.refuse_changed)
        LOGGER.log(logging.INFO if where.apart else logging.DEBUG, "computing on %s", where.name)
        with kept_in(folder / LOG), bars.shown():
            measured, context = work.execute(work.context(shared(work.executor, kept, folder)), on_row)
            measured.notes += opened.notes
            resume.all_done()
            _export(work, context, measured, destination)
            watch.refuse_changed()
            publish_folder(folder / RESULT, destination)
        clear(folder)
    work.executor.told(asdict(measured))
    return measured


def _followed(work: Work) -> Report:
    """What every other process does: its share, from what process 0 has committed."""
    found = work.executor.told(None)
    if found is None:
        with tempfile.TemporaryDirectory(prefix="compress-") as copies:
            work.execute(work.context(shared(work.executor, None, Path(copies), work.watch().refuse_changed)))
        found = work.executor.told(None)
    return _report(found)


def row_names(pipeline: str | Path | Mapping[str, Any] | Pipeline) -> list[str]:
    """What the rows of a pipeline's report are called: the original, models to merge with, and stages."""
    stages = load_pipeline(pipeline).passes
    models = [model for stage in stages for pass_ in stage if isinstance(pass_, MergePass) for model in pass_.models]
    return ["original", *models, *("+".join(p.key for p in stage) for stage in stages)]


def _dtype(steps: Pipeline, opened: OpenedModel) -> torch.dtype:
    if steps.dtype == "auto":
        return opened.dtype
    chosen: torch.dtype = getattr(torch, steps.dtype)
    return chosen


def _with_given(steps: Pipeline, data: manager.Data) -> Pipeline:
    said = {name: getattr(steps.calibration, name) for name in OF_EXPERTS} if steps.calibration else {}
    calibration = given.given_section(Calibration, data.calibration, said)
    kept = {name: getattr(steps.evaluate, name) for name in (*GATES, "after")} if steps.evaluate else {}
    evaluation = given.given_section(Evaluation, data.evaluation, kept)
    return replace(steps, calibration=calibration or steps.calibration, evaluate=evaluation or steps.evaluate)


def _own_text(steps: Pipeline, opened: OpenedModel, made: plan.Plan, bars: progress.Bars) -> torch.Tensor:
    """Windows that the model writes itself, in memory for as long as it does."""
    assert steps.calibration is not None
    context = Context(
        artifact=opened.artifact, given=opened.artifact, ledger=MemoryLedger(), seed=steps.seed,
        dtype=_dtype(steps, opened), products="float32", resident=False, bars=bars, devices=devices_of(made),
    )  # fmt: skip
    tokenizer = load_tokenizer(opened.tokenizer, "text that the model writes")
    wanted = (steps.calibration.samples, steps.calibration.length, steps.seed)
    with context.devices.scope(), in_memory(context):
        return self_written(opened.artifact.graph.model, tokenizer, *wanted, bars.over)


def _data(
    steps: Pipeline, opened: OpenedModel, data: manager.Data, bars: progress.Bars, own: Callable[[], torch.Tensor]
) -> manager.Data:
    """Read what the pipeline names; given data win. `own`: makes the text that the model writes."""
    calibration, evaluation = data.calibration, data.evaluation
    graph, dtype = opened.artifact.graph, _dtype(steps, opened)
    reader = given.Reader(opened.tokenizer, graph.model, opened.folder)
    needed = any(p.calibrated for stage in steps.passes for p in stage)
    if calibration is None and needed and steps.calibration:
        found = given.read_data(steps.calibration, reader, "calibration", bars.over, own)
        calibration = given.model_inputs(graph, "calibration", found, dtype)
    if evaluation is None and steps.evaluate:
        found = given.read_data(steps.evaluate, reader, "evaluation", bars.over)
        found = given.with_masks(graph.model, found, opened.tokenizer)
        evaluation = given.model_inputs(graph, "evaluation", found, dtype)
    if steps.evaluate and evaluation is not None:
        refuse_idle_gate(steps.evaluate, graph.model, evaluation)
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
        found = _report(data)
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


def _report(data: dict[str, Any]) -> Report:
    """A report from its JSON."""
    return Report(**{**data, "rows": [report.Row(**row) for row in data["rows"]]})


def _export(work: Work, context: Context, measured: Report, destination: Path) -> None:
    """Write the result into the folder of unfinished work, read it back and compare."""
    opened, steps, data, resolved = work.opened, work.steps, work.data, dump(work.steps)
    partial = work_of(destination) / RESULT
    remove_made(partial)
    config = opened.settings(context.dtype)
    where = (opened.folder, version(), context.bars, opened.tokenizer)
    packed_layout.write_packed(context.artifact, partial, config, *where)
    compared = packed_layout.verify(context.artifact, partial, context.bars)
    measured.verified = {"run": work.identity, "tensors_equal": compared}
    if data.evaluation is not None:
        few = data.evaluation.inputs[: 1 if data.evaluation.named else 2]
        measured.verified["max_logit_difference"] = logit_difference(context, partial, few, work.plan.places)
    if steps.export:
        made = open_packed(partial, context.dtype)
        written = {exporter.key: partial / exporter.key for exporter in steps.export}
        compared_on = None if data.evaluation is not None and data.evaluation.named else data.evaluation
        measured.verified |= write_all(made, steps.export, written, destination, compared_on, context.bars)
    if context.delta is not None:
        measured.verified["delta"] = {"tensors_equal": _put_delta(context.delta, partial / "delta", context)}
    write_text(partial / "pipeline.yaml", resolved)
    write_text(partial / "report.json", measured.to_json())
    write_text(partial / "README.md", report.card(measured, resolved, auto_class(opened.config)))


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
