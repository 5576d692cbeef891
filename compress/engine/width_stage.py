"""The stage that takes neurons and heads out: which go, block by block, and the model without them.

While it runs, the columns of units that went are zeros in the layers that read them, which computes the same, so that
the blocks behind see what the narrower model will make. Then the model is cut, and what is left counts as the original.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.precision import products
from compress.checkpoint.artifact import Packed, finite_weight
from compress.checkpoint.remade import settled
from compress.encodings import Weight
from compress.engine.ledger import Record
from compress.engine.placement import take_records
from compress.engine.reshaping import reshaped
from compress.engine.retry import with_more_damping
from compress.engine.slopes import slopes_of
from compress.engine.stage import StageResult, StageRunner, calibration_batches
from compress.engine.sweep import Wanted, gradients, sweep
from compress.errors import UnsupportedModelError
from compress.io.keys import key_of
from compress.models.narrow import narrower
from compress.passes.interface import UnitsSeen
from compress.passes.width import WidthPass
from compress.report.sections import UnitsGone

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.calibration.data import Dataset
    from compress.calibration.statistics import Statistics
    from compress.engine.context import Context
    from compress.engine.stage import Stage
    from compress.models.narrow import Coupled, Narrower, Width
    from compress.models.site import Site


class Narrowing(StageRunner):
    """Runs one pass that takes units out of every block."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        """Do the work, or find it done.

        Raises:
            UnsupportedModelError: the calibration data never reach a layer; or as `WidthPass.kept_of` and `narrower`.
        """
        pass_, graph = stage.single(WidthPass), context.graph
        context = replace(context, artifact=settled(context.artifact))
        every = pass_.kept_of(graph)
        keep = {width: count for width, count in every.items() if count < width.count}
        key = key_of(key, stage.number, pass_.key, pass_.options(), {w.part: n for w, n in keep.items()})
        slopes = slopes_of(context, stage, list(keep), data, key) if pass_.sees_slopes else {}
        batches = context.executor.shard(calibration_batches(context, data)) if pass_.calibrated else []
        work = _WidthWork(context, stage, pass_, batches, slopes)
        records: dict[str, Record] = {}  # of readers and their biases
        for width, count in keep.items():
            key = work.narrow(width, count, key, records)
        kept = {w: {c.reader: tuple(records[c.reader].notes["kept"]) for c in w.coupled} for w in keep}
        made = narrower(graph, kept, in_place=context.resident)
        counts = {width.part: (count, width.count) for width, count in every.items()}
        notes = {name: record.notes for name, record in records.items() if record.notes}
        return StageResult(key, _without(context, made, records), UnitsGone(pass_.key, counts, notes))


@dataclass(frozen=True)
class Spread(Packed):
    """A committed weight of fewer columns, as one of all columns, zero where they went.

    Attributes:
        columns: of all, that it has.
        width: how many there are.
    """

    columns: tuple[int, ...] = ()
    width: int = 0

    def load(self, device: torch.device | None = None) -> Weight:
        return _spread(super().load(device), self.columns, self.width)


@dataclass(frozen=True)
class _WidthWork:
    """What is done.

    Attributes:
        slopes: reader -> (units,) float64, for a pass that asks for them.
    """

    context: Context
    stage: Stage
    pass_: WidthPass
    batches: Sequence[Tensor]
    slopes: Mapping[str, Tensor]

    def narrow(self, width: Width, keep: int, key: str, records: dict[str, Record]) -> str:
        """Decide about one part of every block, block after block. Returns the last key."""
        context, pass_ = self.context, self.pass_
        coupled = {c.reader: c for c in width.coupled}
        sites: dict[int, list[Site]] = {
            index: [s for s in context.graph.in_block(index) if s.name in coupled]
            for index in range(len(context.graph.blocks))
        }
        needs = {} if pass_.needs == "none" else dict.fromkeys(coupled, pass_.needs)
        wanted = Wanted(f"{pass_.key}: {width.part}", sites, needs, frozenset(), bool(needs), learns=False, whole=True)
        with gradients(wanted):
            for unit in sweep(context, wanted, self.batches):
                key = key_of(key, width.part, unit.name, [s.name for s in unit.sites])
                file = f"{self.stage.unit}-{width.part}-{unit.name}"
                done = context.ledger.load(file, key)
                if done is None:
                    seen = unit.statistics() if unit.sites else {}
                    found = [r for s in unit.sites for r in self._solved(s, coupled[s.name], keep, seen)]
                    done = context.commit(file, key, found)
                for record in done:
                    records[record.site] = record
                take_records(context, [self._as_wide(record, coupled) for record in done])
        return key

    def _solved(self, site: Site, coupled: Coupled, keep: int, statistics: Mapping[str, Statistics]) -> list[Record]:
        """What the pass made of a layer that reads units, and of its bias."""
        context, pass_ = self.context, self.pass_
        if pass_.needs != "none" and site.name not in statistics:
            raise UnsupportedModelError(
                f"the calibration data never reach {site.name}, so nothing is known of its inputs"
            )
        weight = finite_weight(site, context.weight(site))
        columns, bias = coupled.columns.to(weight.device), f"{site.name}.bias"
        seen = UnitsSeen(
            weight,
            columns,
            keep,
            statistics.get(site.name),
            _made(context, coupled) if pass_.sees_makers else None,
            self.slopes[site.name].to(weight.device) if pass_.sees_slopes else None,
            context.graph.model.get_submodule(site.name)._parameters.get("bias") is not None,
        )
        with products(context.products):
            found, fallback = with_more_damping(pass_, lambda p: p.run(seen), pass_.stand_in(), seen.statistics)
        notes: dict[str, Any] = {"kept": list(found.kept), **found.notes}
        notes |= {} if fallback is None else {"fallback": fallback}
        store = context.artifact.store_dtype(site)
        made = [Record(site.name, Weight(found.weight.to(store)), notes)]
        if found.shift is not None:
            moved = (context.tensor(bias).float() + found.shift).to(context.artifact.vector_dtype(bias))
            made.append(Record(bias, Weight(moved[None]), {}))
        return made

    def _as_wide(self, record: Record, coupled: Mapping[str, Coupled]) -> Record:
        """A layer as long as the model is not cut."""
        if record.site not in coupled:
            return record
        columns = coupled[record.site].columns
        own = tuple(columns[record.notes["kept"]].flatten().sort().values.tolist())
        weight, width = record.weight, columns.numel()
        if isinstance(weight, Packed):
            return replace(
                record, weight=Spread(weight.file, weight.site, weight.spec, weight.seal, columns=own, width=width)
            )
        return replace(record, weight=_spread(weight, own, width))


def _spread(weight: Weight, columns: Sequence[int], width: int) -> Weight:
    assert weight.values is not None
    wide = weight.values.new_zeros(len(weight.values), width)
    wide[:, torch.tensor(columns, device=wide.device)] = weight.values
    return Weight(wide)


def _made(context: Context, coupled: Coupled) -> Tensor:
    """(makers, units) float64: the sum of squares of what each matrix has of each unit."""
    found = []
    for place in coupled.makers:
        value = context.tensor(place.tensor).double()
        squares = value.square().sum(1 - place.axis)
        found.append(squares[place.index.to(value.device)].sum(1))
    return torch.stack(found)


def _without(context: Context, made: Narrower, records: Mapping[str, Record]) -> Context:
    """The model without the units that went. What layers and biases were made counts as the original."""
    own = {name: record.weight for name, record in records.items() if name in context.artifact.sites}
    artifact = replace(context.artifact, committed={**context.artifact.committed, **own})
    after = reshaped(replace(context, artifact=artifact), made)
    return replace(after, artifact=settled(after.artifact))


__all__ = ["Narrowing"]
