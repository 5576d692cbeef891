"""A stage with a pass over the whole model: it sees the state before the stage until the last edit is committed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.checkpoint.artifact import finite_weight
from compress.engine.ledger import KeptInLedger, Record
from compress.engine.model_training import in_memory, model_data
from compress.engine.placement import make_room, take_records
from compress.engine.stage import StageResult, StageRunner, departed, generator_for, layers_changed
from compress.engine.validate import observed, observed_vector
from compress.io.keys import key_of
from compress.passes.base import ModelPass, Whole
from compress.passes.quantize.activations import attached
from compress.passes.targets import make_target

if TYPE_CHECKING:
    from compress.calibration.data import Dataset
    from compress.calibration.training import ModelData
    from compress.engine.context import Context
    from compress.engine.stage import Stage
    from compress.models.site import Site
    from compress.passes.base import Edit, Target


class WholeModel(StageRunner):
    """Runs one pass over all its sites at once, committing each of them."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        pass_, artifact = stage.single(ModelPass), context.artifact
        sites = {s.name: s for s in stage.plans[0].sites}
        if pass_.adds_biases:
            for name in sites:
                make_room(context, f"{name}.bias")
        vectors = [name for name in artifact.graph.vectors() if pass_.trains(name)]
        key = key_of(key, stage.number, pass_.key, pass_.options(), list(sites), vectors)
        units = {name: f"{stage.unit}-{i:05d}" for i, name in enumerate((*sites, *vectors))}
        done = {name: found for name in units if (found := context.ledger.load(units[name], key)) is not None}
        if len(done) < len(units):
            work = _ModelWork(context, stage, pass_, sites, vectors, key)
            with in_memory(context) if pass_.loss else nullcontext():
                edits = pass_.run(work.whole(data))
                for name, edit in context.bars.over(edits, len(units), f"{pass_.key}: layers"):
                    if name not in done:
                        record = work.record(name, edit)
                        done[name] = context.commit(units[name], key, [record])
            context.ledger.forget_tensors(f"{stage.unit}-training")
        records = [r for name in units if name in done for r in done[name]]
        take_records(context, records, restate=pass_.preserves)
        return StageResult(key, context, layers_changed(artifact, records))


@dataclass(frozen=True)
class _ModelWork:
    """What one pass works on.

    Attributes:
        sites: by name.
        vectors: names of those that it trains.
        key: of the stage.
    """

    context: Context
    stage: Stage
    pass_: ModelPass
    sites: dict[str, Site]
    vectors: list[str]
    key: str

    def whole(self, data: Dataset | None) -> Whole:
        """The model as the pass is given it; where it trains, the model is in memory."""
        context = self.context
        given = {name: context.tensor(name).float() for name in self.vectors}
        generator = generator_for(context.seed, self.stage.number, 0, "")
        return Whole(tuple(self.sites), self._load, given, self._data(data), generator, context.bars.over)

    def _data(self, data: Dataset | None) -> ModelData | None:
        pass_, ledger = self.pass_, self.context.ledger
        if pass_.loss is None:
            return None
        assert data is not None
        kept = KeptInLedger(ledger, f"{self.stage.unit}-training", self.key)
        checkpointing = getattr(pass_, "checkpointing", True)  # of those that leave the choice
        return model_data(self.context, data.inputs, pass_.loss, checkpointing, kept)

    def _load(self, name: str) -> Target:
        artifact, site = self.context.artifact, self.sites[name]
        generator = generator_for(self.context.seed, self.stage.number, 0, name)
        original = self.context.original if self.pass_.compares else None
        weights = [self.context.weight(site)]
        return make_target(artifact.graph, [site], weights, generator=generator, original=original)

    def record(self, name: str, edit: Edit) -> Record:
        """An edit as it is committed."""
        pass_, artifact = self.pass_, self.context.artifact
        if name not in self.sites:
            vector, store = self.context.tensor(name).float(), artifact.vector_dtype(name)
            return Record(name, observed_vector(name, pass_, vector, edit, store), {pass_.key: dict(edit.notes)})
        site = self.sites[name]
        before = self.context.weight(site)
        weight, error = observed(site, pass_, before, finite_weight(site, before), edit, artifact.store_dtype(site))
        error = 0.0 if pass_.preserves else error
        weight, rounding = attached(pass_.at(name), weight, edit, None)
        notes = {"error": error, **edit.notes, **rounding}
        return Record(name, weight, {pass_.key: notes | departed(pass_, site, notes)})
