"""The pass manager: runs a plan stage by stage, measures after each, and holds the gate."""

import hashlib
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.artifact import Artifact
from compress.calibration.data import batches
from compress.dropping import drop
from compress.encodings import Spec
from compress.errors import GateError
from compress.evaluate import Quality, Reference, logits_in, measure
from compress.export.safetensors import spec_at, stored_bytes
from compress.graph import forward
from compress.ledger import Record, code_fingerprint, key_of
from compress.merging import merge
from compress.observe import finite, observed, observed_vector
from compress.passes.base import BlockPass, Edit, LinearPass, ModelPass, Target, Whole
from compress.passes.depth import DepthPass
from compress.passes.merge.base import MergePass
from compress.passes.quantize.activations import attached
from compress.passes.retrain.options import EndToEnd
from compress.pipeline import Evaluation, Pipeline
from compress.plan import PassPlan, Plan
from compress.report import Report, Row
from compress.residence import Context, make_room, streamed, take
from compress.sweep import TOKENS_AT_ONCE, generator_for, run_stage
from compress.whole import KeptInLedger, in_memory, model_data

ROUNDING = 1e-9  # a fall of exactly one point is within a gate of one point


@dataclass(frozen=True)
class Data:
    """Tokens; or inputs of another module, and what it should say to those it is evaluated on."""

    calibration: Tensor | None = None
    evaluation: Tensor | None = None
    labels: Tensor | None = None


def execute(pipeline: Pipeline, plan: Plan, context: Context, data: Data, model_name: str) -> Report:
    """Run every stage; the artifact of `context` then holds the result.

    Raises:
        GateError: perplexity rose above the gate, or accuracy fell below it; what is finished stays in the ledger.
    """
    report = Report(model_name)
    meter = _Meter(context, data.evaluation, data.labels)
    key = key_of(
        context.artifact.source.fingerprint(),
        code_fingerprint(),
        pipeline.seed,
        str(context.dtype),
        context.products,
        hash_of(data.calibration),
    )
    start = _row(context, meter, "original", "original", key, None, 0.0)
    report.rows.append(start)
    for number, stage in enumerate(plan.stages):
        started = time.perf_counter()
        key, records = _stage(context, number, stage, data.calibration, key, report)
        seconds = time.perf_counter() - started
        name = "+".join(p.pass_.key for p in stage)
        last = number + 1 == len(plan.stages)
        due = last or pipeline.evaluate is None or pipeline.evaluate.after == "each"
        row = _row(context, meter if due else None, f"s{number:02d}", name, key, start, seconds)
        report.rows.append(row)
        _note(report, context.artifact, records)
        if pipeline.evaluate:
            _gate(pipeline.evaluate, start, row)
    if pipeline.evaluate and data.evaluation is not None:
        report.data = {"source": pipeline.evaluate.source, **meter.described()}
    return report


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
    context: Context, number: int, stage: Sequence[PassPlan], samples: Tensor | None, key: str, report: Report
) -> tuple[str, list[Record]]:
    first = stage[0].pass_
    if isinstance(first, MergePass):
        key, merged = merge(context, number, first, key)
        report.merged.append(merged)
        return key, []
    if isinstance(first, DepthPass):
        return _depth_stage(context, number, first, samples, key, report), []
    if isinstance(first, ModelPass):
        return _model_stage(context, number, stage[0], samples, key)
    passes = [p.pass_ for p in stage if isinstance(p.pass_, LinearPass | BlockPass)]
    groups = batches(samples, TOKENS_AT_ONCE) if samples is not None else []
    return run_stage(context, number, passes, groups, key)


def _depth_stage(
    context: Context, number: int, pass_: DepthPass, samples: Tensor | None, key: str, report: Report
) -> str:
    """A pass that takes blocks out; what is reported of other blocks goes by their new names."""
    groups = batches(samples, TOKENS_AT_ONCE) if samples is not None else []
    dropped = drop(context, number, pass_, groups, key)
    report.layers = {new: n for name, n in report.layers.items() if (new := dropped.name(name)) is not None}
    report.dropped.append(
        {"pass": pass_.key, "blocks": dropped.blocks, "of": dropped.of, "distances": dropped.distances}
    )
    return dropped.key


def _model_stage(
    context: Context, number: int, plan: PassPlan, samples: Tensor | None, key: str
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
                data = model_data(context, samples, pass_.loss, checkpointing, kept)
            given = {name: artifact.tensor(name).float() for name in vectors}
            generator = generator_for(context.seed, number, 0, "")
            edits = pass_.run(Whole(tuple(sites), load, given, data, generator, context.bars.over))
            for name, edit in context.bars.over(edits, len(units), f"{pass_.key}: layers"):
                if name not in done:
                    done[name] = context.ledger.commit(units[name], key, [record(name, edit)])
    records = [r for name in units if name in done for r in done[name]]
    take(context, records, restate=pass_.preserves)
    return key, records


class _Meter:
    """Measures the model as the artifact stands; knows the original for comparison."""

    def __init__(self, context: Context, tokens: Tensor | None, labels: Tensor | None):
        self.context, self.tokens, self.labels = context, tokens, labels
        self.plain = replace(context, artifact=context.artifact.plain())  # before any block is taken out
        self.reference: Reference | None = None
        self.kl_tokens = 0

    def described(self) -> dict[str, int]:
        """What is measured on."""
        assert self.tokens is not None
        if self.labels is not None:
            return {"samples": len(self.tokens), "kl_tokens": self.kl_tokens}
        windows, length = self.tokens.shape
        return {"windows": windows, "length": length, "tokens": windows * (length - 1), "kl_tokens": self.kl_tokens}

    def original(self) -> Quality | None:
        """The original's quality; remembers its predictions."""
        if self.tokens is None:
            return None
        self.reference = Reference()
        return self._measure(self.plain, "evaluate original: batches", keep=True)

    def now(self) -> Quality | None:
        """The model as it stands."""
        if self.tokens is None:
            return None
        if self.reference is None:
            self.original()
        return self._measure(self.context, "evaluate: batches", keep=False)

    def _measure(self, context: Context, label: str, keep: bool) -> Quality:
        assert self.tokens is not None

        def logits(batch: Tensor) -> Tensor:
            return logits_in(forward(context.graph, batch))

        with streamed(context):
            return measure(
                logits,
                self.tokens,
                labels=self.labels,
                reference=self.reference,
                keep=keep,
                progress=lambda items, total: context.bars.over(items, total, label),
            )


def _row(
    context: Context, meter: _Meter | None, unit: str, name: str, key: str, start: Row | None, seconds: float
) -> Row:
    """Measure, or find measured."""
    key = key_of(key, "row", hash_of(meter.tokens) if meter else None, hash_of(meter.labels) if meter else None)
    found = context.ledger.load_row(unit, key)
    if found is not None:
        if meter:
            meter.kl_tokens = found.pop("kl_tokens")
        return Row(**found)
    quality = None
    if meter:
        quality = meter.original() if unit == "original" else meter.now()
        meter.kl_tokens = quality.kl_tokens if quality else 0
    bits, sparsity = density(context.artifact)
    row = Row(
        name=name,
        perplexity=quality.perplexity if quality else None,
        accuracy=quality.accuracy if quality else None,
        change=_change(start, quality) if start and quality else None,
        kl=quality.kl if quality else None,
        bytes=stored_bytes(context.artifact), bits_per_weight=bits, sparsity=sparsity,
        seconds=round(seconds, 2), peak_mb=round(peak_memory() / 1e6, 1),
    )  # fmt: skip
    context.ledger.commit_row(unit, key, {**asdict(row), "kl_tokens": quality.kl_tokens if quality else 0})
    return row


def _change(start: Row, now: Quality) -> float | None:
    """Of accuracy the difference, of perplexity the relative one."""
    if start.accuracy is not None and now.accuracy is not None:
        return now.accuracy - start.accuracy
    return now.perplexity / start.perplexity - 1 if start.perplexity and now.perplexity else None


def density(artifact: Artifact) -> tuple[float, float]:
    """(stored bits a weight, share of zeros) over the matrices inside the blocks."""
    bits = zeros = weights = 0
    for site in artifact.graph.sites:
        if site.block is None:
            continue
        count = site.shape[0] * site.shape[1]
        spec: Spec | None = spec_at(artifact, site.name) if site.name in artifact.committed else None
        weights += count
        bits += 8 * spec.num_bytes if spec else 8 * count * artifact.store_dtype(site).itemsize
        zeros += count - spec.kept if spec and spec.kept is not None else 0
    return (bits / weights, zeros / weights) if weights else (0.0, 0.0)


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


def hash_of(tokens: Tensor | None) -> str | None:
    """SHA-256 of a tensor's shape and bytes."""
    if tokens is None:
        return None
    raw: Any = tokens.detach().contiguous().flatten().view(torch.uint8).numpy()
    return key_of(list(tokens.shape), hashlib.sha256(memoryview(raw)).hexdigest())


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
