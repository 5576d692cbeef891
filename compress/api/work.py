"""What a run does, known and checked before it begins, and its data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress import progress
from compress.api import data as given
from compress.api.gates import refuse_idle_gate
from compress.api.output_folder import inputs_of, refuse_destination
from compress.api.together import device_for
from compress.calibration.self_written import self_written
from compress.checkpoint.opening import open_model
from compress.config.pipeline import GATES, OF_EXPERTS, Calibration, Evaluation
from compress.config.reading import load_pipeline
from compress.config.writing import dump
from compress.engine import manager
from compress.engine.context import Context, expert_options, products_of
from compress.engine.devices import devices_of
from compress.engine.executor import SingleProcess
from compress.engine.ledger import MemoryLedger
from compress.engine.merge import checks as merges
from compress.engine.model_training import in_memory
from compress.engine.read_ahead import ReadAhead
from compress.io.keys import Watch, hash_of, key_of
from compress.io.source_code import code_of, plug_ins
from compress.models.tokenizers import load_tokenizer
from compress.planning import plan
from compress.planning.places import places
from compress.planning.resources import check_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from compress.checkpoint.opening import OpenedModel
    from compress.checkpoint.sources import Source
    from compress.config.pipeline import Pipeline
    from compress.engine.executor import Executor
    from compress.report.report import Report, Row


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
            dtype=dtype_of(steps, opened), products=products, resident=False, bars=self.bars,
            executor=self.executor, devices=devices_of(self.plan), experts=expert_options(steps.calibration),
            ahead=ReadAhead(compute) if compute.type == "cuda" else None,
        )  # fmt: skip

    def execute(self, context: Context, on_row: Callable[[Row], None] = lambda row: None) -> tuple[Report, Context]:
        """Run every stage."""
        with context.devices.scope():
            return manager.execute(self.steps, self.plan, context, self.data, self.model, on_row)


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
    calibrated: bool = False,
) -> Work:
    """Everything that a run does, known and checked before it begins, and its data read; the arguments are its own.

    `calibrated`: calibration data are read even if no pass learns from them.

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
    calibration = given.tokenized("calibration", calibration, steps.calibration, opened.tokenizer)
    evaluation = given.tokenized("evaluation", evaluation, steps.evaluate, opened.tokenizer)
    data = manager.Data(
        given.dataset(graph, "calibration", calibration, dtype_of(steps, opened)),
        given.dataset(graph, "evaluation", evaluation, dtype_of(steps, opened)),
    )
    steps = _with_given(steps, data)
    file = str(pipeline) if isinstance(pipeline, str | Path) else "pipeline"
    made = plan.make(steps, graph, opened.dtypes, file, opened.companion_bytes, where, opened.carried_bytes)
    merged = merges.check_models(steps, opened.artifact, file)
    with bars.shown():
        learns = calibrated or any(p.calibrated for stage in steps.passes for p in stage)
        data = _data(steps, opened, data, bars, partial(_own_text, steps, opened, made, bars), learns)
    merges.check_data(steps, data.calibration, graph, file)
    given.refuse_by_name(steps, data.calibration)
    return Work(steps, opened, data, made, (opened.artifact.source, *merged), executor, bars, str(model))


def dtype_of(steps: Pipeline, opened: OpenedModel) -> torch.dtype:
    """What calibration and evaluation compute in."""
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
    """Windows that the model writes itself, in memory for as long as it does.

    Raises:
        ResourceError: the memory does not hold it.
    """
    assert steps.calibration is not None
    check_memory(made)
    context = Context(
        artifact=opened.artifact, given=opened.artifact, ledger=MemoryLedger(), seed=steps.seed,
        dtype=dtype_of(steps, opened), products="float32", resident=False, bars=bars, devices=devices_of(made),
    )  # fmt: skip
    tokenizer = load_tokenizer(opened.tokenizer, "text that the model writes")
    wanted = (steps.calibration.samples, steps.calibration.length, steps.seed)
    with context.devices.scope(), in_memory(context):
        return self_written(opened.artifact.graph.model, tokenizer, *wanted, bars.over)


def _data(
    steps: Pipeline,
    opened: OpenedModel,
    data: manager.Data,
    bars: progress.Bars,
    own: Callable[[], torch.Tensor],
    needed: bool,
) -> manager.Data:
    """Read what the pipeline names; given data win.

    `own` makes the text that the model writes; calibration data are only read where they are `needed`.
    """
    calibration, evaluation = data.calibration, data.evaluation
    graph, dtype = opened.artifact.graph, dtype_of(steps, opened)
    reader = given.Reader(opened.tokenizer, graph.model, opened.folder)
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
