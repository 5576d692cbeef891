"""What every row of a report says: quality on every source, size, memory."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from compress.calibration.metrics import judge_of, measure, pooled
from compress.calibration.reference import REFERENCE_NUMBERS, Reference
from compress.checkpoint.packed_layout import spec_at, stored_bytes
from compress.engine.placement import streamed
from compress.io.keys import hash_of, key_of
from compress.models.families.transformers_model import TOKENS
from compress.models.logits import logits_in, logits_of
from compress.report.report import Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.data import Dataset
    from compress.calibration.metrics import Quality
    from compress.checkpoint.artifact import Artifact
    from compress.encodings import Spec
    from compress.engine.context import Context
    from compress.engine.placement import Hold


class Meter:
    """Measures a model on every source of the evaluation data; knows the original for comparison."""

    def __init__(self, context: Context, data: Dataset | None):
        self.data = data
        self.parts = data.split() if data else {}
        self.plain = replace(context, artifact=context.artifact.plain())  # before any block is taken out
        self.judge = judge_of(context.graph.model, data.labels if data else None)
        self.references: dict[str, Reference] = {}
        self.kl_tokens = 0

    def described(self, data: Dataset) -> dict[str, Any]:
        """What is measured on."""
        if self.judge != "next token":
            return {"samples": len(data), "kl_tokens": self.kl_tokens, "judged_by": self.judge}
        if data.named:
            lengths = [sample[TOKENS].shape[1] for sample in data.named]
            tokens = sum(length - 1 for length in lengths)
            said = {"windows": len(data), "length": max(lengths), "tokens": tokens}
            return {**said, "kl_tokens": self.kl_tokens}
        windows, length = data.inputs.shape
        return {"windows": windows, "length": length, "tokens": windows * (length - 1), "kl_tokens": self.kl_tokens}

    def original(self, context: Context) -> dict[str, Quality]:
        """The original's quality on every source; remembers its predictions."""
        self.references = {name: Reference(REFERENCE_NUMBERS // len(self.parts)) for name in self.parts}
        plain = replace(self.plain, divided=context.divided)
        return self._measure(plain, "evaluate original: batches", keep=True)

    def of(self, context: Context) -> dict[str, Quality]:
        """A model as it stands now, on every source."""
        if not self.references:
            self.original(context)
        return self._measure(context, "evaluate: batches", keep=False)

    def _measure(self, context: Context, label: str, keep: bool) -> dict[str, Quality]:
        with streamed(context) as hold:
            return {
                name: measure(
                    lambda batch: logits(context, batch, hold),
                    part.inputs,
                    labels=part.labels,
                    judge=self.judge,
                    tokens_of=context.tokens_of,
                    reference=self.references[name],
                    keep=keep,
                    progress=lambda items, total: context.bars.over(items, total, label, "end"),
                    divided=context.divided,
                    together=context.executor,
                )
                for name, part in self.parts.items()
            }


def logits(context: Context, batch: Tensor, hold: Hold = nullcontext) -> Tensor | Iterator[Tensor]:
    """What a model that can be called makes of a batch: whole, or in pieces where a vocabulary is large."""
    if not context.graph.is_language_model:
        return logits_in(context.forward(batch))
    return logits_of(context.graph.model, lambda: context.forward(batch), context.tokens_of(batch), hold=hold)


def measured_row(
    context: Context, meter: Meter | None, unit: str, name: str, key: str, start: Row | None, seconds: float
) -> Row:
    """A row of the report: measured now, or found measured. Without `meter`, of its size only."""
    key = key_of(key, "row", context.ledger.code_of((), [__name__]), hash_of(meter.data) if meter else None)
    found = context.ledger.load_row(unit, key)
    if found is not None:
        if meter:
            meter.kl_tokens = found.pop("kl_tokens")
        return Row(**found)
    parts: Mapping[str, Quality] = {}
    if meter and meter.parts:
        parts = meter.original(context) if unit == "original" else meter.of(context)
    whole = pooled(list(parts.values())) if parts else None
    if meter:
        meter.kl_tokens = whole.kl_tokens if whole else 0
    bits, sparsity = density(context.artifact)
    stored = stored_bytes(context.artifact)
    parameters = sum(p.numel() for n, p in context.graph.model.named_parameters() if n not in context.graph.tied)
    row = Row(
        name=name,
        **_measured_values(whole, asdict(start) if start else None),
        bytes=stored, bits_per_weight=bits, sparsity=sparsity, bits_per_parameter=round(8 * stored / parameters, 6),
        seconds=round(seconds, 2), peak_mb=round(peak_memory() / 1e6, 1),
        sources={n: _measured_values(q, start.sources[n] if start else None) for n, q in parts.items() if n},
    )  # fmt: skip
    context.ledger.commit_row(unit, key, {**asdict(row), "kl_tokens": whole.kl_tokens if whole else 0})
    return row


def _measured_values(quality: Quality | None, start: Mapping[str, Any] | None) -> dict[str, float | None]:
    names = ("perplexity", "accuracy", "kl", "negative_flips", "relative_error", "cosine")
    found = {name: getattr(quality, name) if quality else None for name in names}
    return {**found, "change": change(start, found)}


def change(start: Mapping[str, Any] | None, now: Mapping[str, Any]) -> float | None:
    """The change against another row: the difference in accuracy, the relative difference in perplexity."""
    if start is None:
        return None
    if start["accuracy"] is not None and now["accuracy"] is not None:
        return float(now["accuracy"] - start["accuracy"])
    return float(now["perplexity"] / start["perplexity"] - 1) if start["perplexity"] and now["perplexity"] else None


def against(row: Row, parents: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Parent -> source -> change of a row from it; the source "" is all of them together."""

    def of(each: Row) -> dict[str, Mapping[str, Any]]:
        return {"": asdict(each), **each.sources}

    now = of(row)
    return {parent.name: {n: change(before, now[n]) for n, before in of(parent).items()} for parent in parents}


def density(artifact: Artifact) -> tuple[float, float]:
    """(stored bits per weight, share of zeros) over the matrices inside the blocks."""
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


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
