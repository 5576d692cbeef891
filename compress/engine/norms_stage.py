"""The stage that counts the statistics of batch norms again, in one run of the network over all samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.calibration.batch_moments import moments_of
from compress.calibration.precision import products
from compress.encodings import Weight
from compress.engine.ledger import Record
from compress.engine.placement import streamed, take_records
from compress.engine.stage import StageResult, StageRunner
from compress.errors import DataError, NonFiniteError
from compress.io.keys import key_of
from compress.models.batch_norms import MEAN, VARIANCE, batch_norms
from compress.passes.retrain.recalibrate_norms import RecalibrateNorms
from compress.report.sections import NormsRecounted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compress.calibration.batch_moments import Moments
    from compress.calibration.data import Dataset
    from compress.engine.context import Context
    from compress.engine.stage import Stage


class Recounting(StageRunner):
    """Runs one pass over the batch norms of the model."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        """Do the work, or find it done.

        Raises:
            DataError: a batch has one value of a channel, which has no variance.
            NonFiniteError: a norm is sent NaN or infinity.
        """
        pass_ = stage.single(RecalibrateNorms)
        names = pass_.chosen(context.graph)
        key = key_of(key, stage.number, pass_.key, pass_.options(), names)
        records = context.ledger.load(stage.unit, key)
        if records is None:
            assert data is not None
            seen = _moments(context, pass_, names, pass_.batches(data.inputs))
            found = [r for name in names if any(name in s for s in seen) for r in _records(context, pass_, name, seen)]
            records = context.commit(stage.unit, key, found)
        take_records(context, records)
        facts = {r.site.removesuffix(f".{MEAN}"): r.notes for r in records if r.notes}
        return StageResult(key, context, NormsRecounted(pass_.key, facts, [n for n in names if n not in facts]))


def _moments(
    context: Context, pass_: RecalibrateNorms, names: Sequence[str], batches: Sequence[Tensor]
) -> list[Moments]:
    """What every norm saw of every batch."""
    norms, found = batch_norms(context.graph.model), []
    chosen = {name: norms[name] for name in names}
    with torch.no_grad(), products(context.products), streamed(context), moments_of(chosen) as seen:
        for batch in context.bars.over(batches, len(batches), f"{pass_.key}: batches"):
            try:
                context.forward(batch)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise DataError(
                    f"{pass_.key}: a batch of {len(batch)} samples has one value of a channel, which has no "
                    "variance; give more samples"
                ) from error
            found.append(seen())
    return found


def _records(context: Context, pass_: RecalibrateNorms, name: str, seen: Sequence[Moments]) -> list[Record]:
    """The statistics of a norm as they are kept; what the report says of it stands with its mean."""
    moments = [batch[name] for batch in seen if name in batch]
    mean, variance = pass_.run(*(torch.stack(each) for each in zip(*moments, strict=True)))
    if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
        raise NonFiniteError(f"{name}: what arrives at it is NaN or infinite, so it has no mean and no variance")
    before, spread = (context.tensor(f"{name}.{leaf}").double() for leaf in (MEAN, VARIANCE))
    least = torch.finfo(torch.float32).tiny
    moved = ((mean.double() - before).square() / spread.clamp(min=least)).mean().sqrt()
    ratio = (variance.double().clamp(min=least) / spread.clamp(min=least)).log().mean().exp()
    notes = {"moved": float(moved), "variance_ratio": float(ratio), "batches": len(moments)}

    def record(leaf: str, value: Tensor, notes: dict[str, float]) -> Record:
        stored = f"{name}.{leaf}"
        return Record(stored, Weight(value.to(context.artifact.vector_dtype(stored))[None]), notes)

    return [record(MEAN, mean, notes), record(VARIANCE, variance, {})]


__all__ = ["Recounting"]
