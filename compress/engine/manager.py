"""The pass manager: runs a plan stage by stage, measures after each, and holds the gate."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.data import CALIBRATED_AT_ONCE, numbered_together
from compress.calibration.metrics import TOKENS_AT_ONCE
from compress.config.pipeline import GIVEN
from compress.engine.measure import Meter, against, measured_row
from compress.engine.placement import lent
from compress.engine.resume import Dependencies
from compress.engine.room import with_room
from compress.engine.stage import Stage
from compress.engine.stages import RUNNERS
from compress.errors import GateError
from compress.io.keys import hash_of, key_of
from compress.logs import LOGGER
from compress.planning.places import device_name
from compress.report.report import Report, in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from compress.calibration.data import Dataset
    from compress.checkpoint.artifact import Artifact
    from compress.config.pipeline import Evaluation, Pipeline
    from compress.engine.context import Context
    from compress.engine.stage import StageResult, StageRunner
    from compress.planning.plan import Plan
    from compress.report.report import Row

ROUNDING = 1e-9  # a fall of exactly one point is within a gate of one point


@dataclass(frozen=True)
class Data:
    """What passes learn from, and what the model is measured on."""

    calibration: Dataset | None = None
    evaluation: Dataset | None = None


def execute(
    pipeline: Pipeline,
    plan: Plan,
    context: Context,
    data: Data,
    model_name: str,
    on_row: Callable[[Row], None] = lambda row: None,
) -> tuple[Report, Context]:
    """Run every stage of a plan, measure after each, and hold the gate.

    Args:
        pipeline: parsed.
        plan: of the pipeline on the model.
        context: of the first stage.
        data: calibration and evaluation data.
        model_name: for the report.
        on_row: is given every row once it is measured.

    Returns:
        The report, and the context with the artifact as it is in the end.

    Raises:
        GateError: perplexity rose above the gate, or accuracy fell below it; what is finished stays in the ledger.
    """
    (calibration, evaluation), samples = numbered_together(data.calibration, data.evaluation)
    data, context = Data(calibration, evaluation), replace(context, named=samples)
    report, meter = Report(model_name, dense=dict(plan.dense.parts)), Meter(context, data.evaluation)
    depends = _dependencies(pipeline, plan, context, data)
    context.ledger.depends_on(depends)
    key = begin = key_of(depends.facts)
    start, context = with_room(context, data.evaluation, TOKENS_AT_ONCE, partial(_original, meter, begin))
    _add(report, start, on_row)
    others: dict[str, Row] = {}
    stages = list(enumerate(plan.stages))
    for number, plans in context.bars.over(stages, len(stages), "pass", "each"):
        stage = Stage(number, plans)
        runner = RUNNERS[stage.reach]
        compared = runner.compared(context, stage) if meter.data is not None else {}
        for row in _measure_others(context, meter, stage, compared, others.keys(), begin, start):
            others[row.name] = row
            _add(report, row, on_row)
        started = time.perf_counter()
        key = key_of(key, depends.stages[number]["code"])
        work = partial(_run, runner, stage, data.calibration, key)
        result, _ = with_room(context, data.calibration, CALIBRATED_AT_ONCE, work)
        seconds = time.perf_counter() - started
        context, key = result.context, result.key
        last = number + 1 == len(plan.stages)
        due = last or pipeline.evaluate is None or pipeline.evaluate.after == "each"
        measured = partial(_measured, meter if due else None, stage, key, start, seconds)
        row, context = with_room(context, data.evaluation, TOKENS_AT_ONCE, measured)
        _add(report, row, on_row)
        found = [others[name] for name in compared if name in others]
        result.section.add_to(report, against(row, found) if compared else None)
        if pipeline.evaluate:
            _gate(pipeline.evaluate, start, row)
    if pipeline.evaluate and data.evaluation is not None:
        cut = data.evaluation.labels is None and not data.evaluation.named  # into windows, from a text
        cut = cut and GIVEN not in pipeline.evaluate.sources.values()
        protocol = {"protocol": pipeline.evaluate.protocol} if cut else {}
        report.data = {"source": pipeline.evaluate.source, **meter.described(data.evaluation), **protocol}
    return report, context


def _run(runner: StageRunner, stage: Stage, data: Dataset | None, key: str, context: Context) -> StageResult:
    return runner.run(context, stage, data, key)


def _original(meter: Meter, key: str, context: Context) -> Row:
    return measured_row(context, meter, "original", "original", key, None, 0.0)


def _measured(meter: Meter | None, stage: Stage, key: str, start: Row, seconds: float, context: Context) -> Row:
    return measured_row(context, meter, stage.unit, stage.name, key, start, seconds)


def _add(report: Report, row: Row, on_row: Callable[[Row], None]) -> None:
    report.rows.append(row)
    LOGGER.debug("measured %s", in_words(report, row))
    on_row(row)


def _dependencies(pipeline: Pipeline, plan: Plan, context: Context, data: Data) -> Dependencies:
    """What the key of the original model is made of, and what the keys of all stages, which follow from it, add."""
    facts = {
        "the model": context.artifact.source.fingerprint(),
        "the calibration data": hash_of(data.calibration),
        "the number of threads": torch.get_num_threads(),  # sums are split among them, and so rounded otherwise
        "the device": device_name(context.devices.compute),
        "the seed": pipeline.seed,
        "the type of numbers": str(context.dtype),
        "the precision of products": context.products,
        # Sums over calibration data are split among them. Whatever needs none is the same, however many they are.
        "the number of processes": context.executor.world if data.calibration is not None else 1,
        **_of_experts(context),
        "the code of compress, or torch or transformers,": context.ledger.code_of(()),
    }
    stages = []
    for number, plans in enumerate(plan.stages):
        stage = Stage(number, plans)
        # A stage is of no use any longer once its passes or its runner, or what these import, are changed.
        run_by = [type(RUNNERS[stage.reach]).__module__, type(context.executor).__module__]
        code = context.ledger.code_of(map(type, stage.passes), run_by)
        options = key_of([(p.key, p.options()) for p in stage.passes])
        stages.append({"name": stage.name, "options": options, "code": code})
    return Dependencies(facts, stages)


def _of_experts(context: Context) -> dict[str, Any]:
    """What the statistics of experts depend on; nothing for a model without."""
    if not any(site.is_expert for site in context.graph.sites):
        return {}
    return {
        "min_expert_tokens": context.experts.min_tokens,
        "calibrate_all_experts": context.experts.calibrate_all,
    }


def _measure_others(
    context: Context,
    meter: Meter,
    stage: Stage,
    compared: Mapping[str, Artifact],
    known: Collection[str],
    begin: str,
    start: Row,
) -> Iterator[Row]:
    """How good those are that the result is going to be compared with, once each.

    Args:
        context: of the stage.
        meter: that measures.
        stage: that comes next.
        compared: the models by name.
        known: names of those that were measured before.
        begin: the key of the original's row.
        start: the original's row.
    """
    for i, (name, artifact) in enumerate(compared.items()):
        if name in known or not artifact.fits():  # of another vocabulary: the model's tokens are not its own
            continue
        with lent(context, artifact) as other:
            key = key_of(begin, artifact.source.fingerprint())
            yield measured_row(other, meter, f"{stage.unit}-parent-{i}", name, key, start, 0.0)


def _gate(section: Evaluation, start: Row, row: Row) -> None:
    limit, error = section.max_error, row.relative_error
    if limit is not None and error is not None and error > limit:
        raise GateError(
            f"after {row.name} outputs differ from the original's by {error:.1%} on average; the gate "
            f"evaluate.max_error allows {limit:.1%}. Nothing was exported"
        )
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
    if limit is not None and row.change is not None and row.change > limit:
        raise GateError(
            f"after {row.name} perplexity is {row.perplexity:.3f}, {row.change:+.1%} over the original "
            f"{start.perplexity:.3f}; the gate evaluate.max_increase allows {limit:+.1%}. Nothing was exported"
        )
