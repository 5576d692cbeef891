"""The pass manager: runs a plan stage by stage, measures after each, and holds the gate."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.calibration.data import batches
from compress.checkpoint.artifact import finite
from compress.engine.depth_stage import drop
from compress.engine.ledger import Record
from compress.engine.measure import Meter, against, measured
from compress.engine.merge.merging import merge
from compress.engine.merge.parents import open_parent
from compress.engine.model_training import KeptInLedger, in_memory, model_data
from compress.engine.placement import lent, make_room, take
from compress.engine.sweep import TOKENS_AT_ONCE, generator_for, run_stage
from compress.engine.validate import observed, observed_vector
from compress.errors import GateError
from compress.io.keys import hash_of, key_of
from compress.io.source_code import code_of
from compress.passes.base import BlockPass, LinearPass, ModelPass, Target, Whole
from compress.passes.depth import DepthPass
from compress.passes.merge.base import MergePass
from compress.passes.quantize.activations import attached
from compress.passes.retrain.options import EndToEnd
from compress.report.report import Report, Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compress.calibration.data import Dataset
    from compress.checkpoint.artifact import Artifact
    from compress.config.pipeline import Evaluation, Pipeline
    from compress.engine.placement import Context
    from compress.passes.base import Edit, Pass
    from compress.planning.plan import PassPlan, Plan

ROUNDING = 1e-9  # a fall of exactly one point is within a gate of one point


@dataclass(frozen=True)
class Data:
    """What passes learn from, and what the model is measured on."""

    calibration: Dataset | None = None
    evaluation: Dataset | None = None


def execute(pipeline: Pipeline, plan: Plan, context: Context, data: Data, model_name: str) -> Report:
    """Run every stage; the artifact of `context` then holds the result.

    Raises:
        GateError: perplexity rose above the gate, or accuracy fell below it; what is finished stays in the ledger.
    """
    report = Report(model_name)
    meter = Meter(context, data.evaluation)
    key = key_of(
        context.artifact.source.fingerprint(),
        code_of(()),
        pipeline.seed,
        str(context.dtype),
        context.products,
        hash_of(data.calibration),
    )
    start = measured(context, meter, "original", "original", key, None, 0.0)
    report.rows.append(start)
    begin, parents = key, dict[str, Row]()
    for number, stage in enumerate(plan.stages):
        for model, row in _parents(context, meter, number, stage[0].pass_, parents, begin, start):
            parents[model] = row
            report.rows.append(row)
        started = time.perf_counter()
        key = key_of(key, code_of([type(p.pass_) for p in stage], _computed_by(stage[0].pass_)))
        key, records = _stage(context, number, stage, data.calibration, key, report)
        seconds = time.perf_counter() - started
        name = "+".join(p.pass_.key for p in stage)
        last = number + 1 == len(plan.stages)
        due = last or pipeline.evaluate is None or pipeline.evaluate.after == "each"
        row = measured(context, meter if due else None, f"s{number:02d}", name, key, start, seconds)
        report.rows.append(row)
        if isinstance(stage[0].pass_, MergePass) and meter.data is not None:
            models = dict.fromkeys(stage[0].pass_.models)
            report.merged[-1]["against"] = against(row, [parents[model] for model in models if model in parents])
        _note(report, context.artifact, records)
        if pipeline.evaluate:
            _gate(pipeline.evaluate, start, row)
    if pipeline.evaluate and data.evaluation is not None:
        report.data = {"source": pipeline.evaluate.source, **meter.described(data.evaluation)}
    return report


def _parents(
    context: Context, meter: Meter, number: int, pass_: Pass, known: Mapping[str, Row], begin: str, start: Row
) -> Iterator[tuple[str, Row]]:
    """How good those are that the model is about to be merged with, once each. `begin`: key of the original's row."""
    if not isinstance(pass_, MergePass) or meter.data is None:
        return
    for i, name in enumerate(pass_.models):
        if name in known or name in pass_.models[:i]:
            continue
        artifact = open_parent(name, context.given, pass_)
        if not artifact.fits():
            continue  # of another vocabulary: the model's tokens are not its own
        with lent(context, artifact) as parent:
            key = key_of(begin, artifact.source.fingerprint())
            yield name, measured(parent, meter, f"s{number:02d}-parent-{i}", name, key, start, 0.0)


def _gate(section: Evaluation, start: Row, row: Row) -> None:
    if row.change is None:
        return
    if row.accuracy is not None:
        limit = section.max_drop
        if limit is not None and -row.change > limit + ROUNDING:
            raise GateError(
                f"after {row.name} accuracy is {row.accuracy:.2%}, {-100 * row.change:.2f} points under the original "
                f"{start.accuracy:.2%}; the gate evaluate.max_drop allows {100 * limit:.2f}. Nothing was exported"
            )
        return
    limit = section.max_increase
    if limit is not None and row.change > limit:
        raise GateError(
            f"after {row.name} perplexity is {row.perplexity:.3f}, {row.change:+.1%} over the original "
            f"{start.perplexity:.3f}; the gate evaluate.max_increase allows {limit:+.1%}. Nothing was exported"
        )


def _stage(
    context: Context, number: int, stage: Sequence[PassPlan], samples: Dataset | None, key: str, report: Report
) -> tuple[str, list[Record]]:
    first = stage[0].pass_
    if isinstance(first, MergePass):
        key, merged = merge(context, number, first, key, samples)
        report.merged.append(merged)
        return key, []
    if isinstance(first, DepthPass):
        return _depth_stage(context, number, first, samples, key, report), []
    if isinstance(first, ModelPass):
        return _model_stage(context, number, stage[0], samples, key)
    passes = [p.pass_ for p in stage if isinstance(p.pass_, LinearPass | BlockPass)]
    groups = batches(samples.inputs, TOKENS_AT_ONCE) if samples is not None else []
    return run_stage(context, number, passes, groups, key)


def _computed_by(pass_: Pass) -> tuple[str, ...]:
    """The modules that run a stage: its results are of no use once they, or what they import, are changed."""
    if isinstance(pass_, MergePass):
        return tuple(f"compress.engine.merge.{name}" for name in ("merger", "aligning", "making", "trials"))
    if isinstance(pass_, DepthPass):
        return ("compress.engine.depth_stage",)
    return ("compress.engine.model_training", "compress.engine.sweep")


def _depth_stage(
    context: Context, number: int, pass_: DepthPass, samples: Dataset | None, key: str, report: Report
) -> str:
    """A pass that takes blocks out; what is reported of other blocks goes by their new names."""
    groups = batches(samples.inputs, TOKENS_AT_ONCE) if samples is not None else []
    dropped = drop(context, number, pass_, groups, key)
    report.layers = {new: n for name, n in report.layers.items() if (new := dropped.name(name)) is not None}
    report.dropped.append(
        {"pass": pass_.key, "blocks": dropped.blocks, "of": dropped.of, "distances": dropped.distances}
    )
    return dropped.key


def _model_stage(
    context: Context, number: int, plan: PassPlan, samples: Dataset | None, key: str
) -> tuple[str, list[Record]]:
    """A pass over the whole model: it sees the state before the stage until the last edit is committed."""
    pass_, artifact = plan.pass_, context.artifact
    assert isinstance(pass_, ModelPass)
    sites = {s.name: s for s in plan.sites}
    if pass_.adds_biases:
        for name in sites:
            make_room(context, f"{name}.bias")
    vectors = [name for name in artifact.graph.vectors() if pass_.trains(name)]
    key = key_of(key, number, pass_.key, pass_.options(), list(sites), vectors)
    units = {name: f"s{number:02d}-{i:05d}" for i, name in enumerate((*sites, *vectors))}
    done = {name: found for name in units if (found := context.ledger.load(units[name], key)) is not None}

    def load(name: str) -> Target:
        weight = artifact.weight(sites[name])
        rows, columns = artifact.graph.rows_of(name), artifact.graph.columns_of(name)
        dense, kernel = finite(sites[name], weight), sites[name].kernel
        generator = generator_for(context.seed, number, 0, name)
        return Target(dense, weight.mask, None, generator, kernel, rows, columns, stored=weight)

    def record(name: str, edit: Edit) -> Record:
        if name not in sites:
            vector, store = artifact.tensor(name).float(), artifact.vector_dtype(name)
            return Record(name, observed_vector(name, pass_, vector, edit, store), {pass_.key: dict(edit.notes)})
        site = sites[name]
        before = artifact.weight(site)
        weight, error = observed(site, pass_, before, finite(site, before), edit, artifact.store_dtype(site))
        error = 0.0 if pass_.preserves else error
        weight, rounding = attached(pass_.at(name), weight, None)
        return Record(name, weight, {pass_.key: {"error": error, **edit.notes, **rounding}})

    if len(done) < len(units):
        with in_memory(context) if pass_.loss else nullcontext():
            data = None
            if pass_.loss:
                assert samples is not None
                kept = KeptInLedger(context.ledger, f"s{number:02d}-training", key)
                checkpointing = pass_.checkpointing if isinstance(pass_, EndToEnd) else True
                data = model_data(context, samples.inputs, pass_.loss, checkpointing, kept)
            given = {name: artifact.tensor(name).float() for name in vectors}
            generator = generator_for(context.seed, number, 0, "")
            edits = pass_.run(Whole(tuple(sites), load, given, data, generator, context.bars.over))
            for name, edit in context.bars.over(edits, len(units), f"{pass_.key}: layers"):
                if name not in done:
                    done[name] = context.ledger.commit(units[name], key, [record(name, edit)])
    records = [r for name in units if name in done for r in done[name]]
    take(context, records, restate=pass_.preserves)
    return key, records


def _note(report: Report, artifact: Artifact, records: Sequence[Record]) -> None:
    trained: dict[str, int] = {}
    for record in records:
        for name, notes in record.notes.items():
            if "trained" in notes:
                trained[name] = trained.get(name, 0) + int(notes["trained"])
        if record.site not in artifact.sites:
            continue
        report.layers.setdefault(record.site, {}).update(record.notes)
        for name, notes in record.notes.items():
            if "fallback" in notes:
                report.fallbacks.append(f"{record.site}: {notes['fallback']}")
            if notes.get("dead_inputs"):
                report.fallbacks.append(f"{record.site}: {notes['dead_inputs']:.0f} inputs are always zero ({name})")
    tied = artifact.graph.tied
    total = sum(p.numel() for name, p in artifact.graph.model.named_parameters() if name not in tied)
    for name, count in trained.items():
        report.trained.append({"pass": name, "numbers": count, "parameters": total})
