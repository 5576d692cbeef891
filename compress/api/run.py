"""The two entry points: `run` for a pipeline file and a model on disk, `apply` for passes and a module in memory."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.api.cards import top_of, write_cards
from compress.api.export import write_all
from compress.api.output_folder import (
    LOG,
    RESULT,
    clear,
    publish_folder,
    work_of,
    working_for,
)
from compress.api.reloaded import logit_difference
from compress.api.together import refuse_differing, shared
from compress.api.work import dtype_of, prepare
from compress.calibration.surroundings import undisturbed
from compress.checkpoint import packed_layout
from compress.checkpoint.delta.file import DELTA, Delta
from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.finite import refuse_non_finite
from compress.config.reading import load_pipeline
from compress.config.writing import dump
from compress.encodings.format import version
from compress.engine.ledger import FolderLedger
from compress.engine.resume import Resume
from compress.errors import CheckpointError, UsageError
from compress.export.packed import open_packed
from compress.io.atomic import copy, remove_made, write_text
from compress.io.manifest import verify_folder
from compress.io.safetensors_file import compare_tensors
from compress.logs import LOGGER, kept_in
from compress.passes import MergePass
from compress.planning import resources
from compress.report import report
from compress.report.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from compress import progress
    from compress.api import data as given
    from compress.api.work import Work
    from compress.config.pipeline import Pipeline
    from compress.engine.context import Context, MadeDelta
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
        calibration: (samples, length) token ids, or images, instead of the pipeline's source; or a list of texts, of
            which the model's tokenizer makes windows as the pipeline's `calibration:` says, without one of 512 tokens.
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
    return carry_out(work, Path(out).absolute(), overwrite, fresh, on_row) if led else _followed(work)


def carry_out(
    work: Work,
    destination: Path,
    overwrite: bool = False,
    fresh: bool = False,
    on_row: Callable[[Row], None] = lambda row: None,
    make_ledger: Callable[..., FolderLedger] = FolderLedger,
) -> Report:
    """Do what process 0 does: it alone writes. `make_ledger` is given what `FolderLedger` is; see `run`."""
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
            refuse_non_finite(opened.artifact, dtype_of(work.steps, opened), bars)
        work.executor.told(None)
        watch = work.watch()
        resume = Resume(
            ["+".join(p.key for p in stage) for stage in work.steps.passes], len(opened.artifact.graph.blocks)
        )
        kept = make_ledger(folder, resume, watch.refuse_changed)
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
    write_cards(partial, measured, resolved, top_of(steps, context.artifact, work.model, work.sources), opened.config)


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
