"""The stage that merges: the models opened, every tensor merged piece by piece, the result the new original.

From then on the artifact's source is the merged checkpoint, so passes that compare with the original compare with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.sources import WrittenSource
from compress.engine.context import MadeDelta, value_of
from compress.engine.merge.aligning import Aligner
from compress.engine.merge.delta import make_delta
from compress.engine.merge.factors import FactorCoder, make_factored
from compress.engine.merge.merger import Merger
from compress.engine.merge.parents import adapter_of, open_parent
from compress.engine.merge.pieces import ModelReader
from compress.engine.merge.trials import Trials
from compress.engine.merge.writing import Settled, write_applied, write_merged
from compress.engine.placement import set_value, tie
from compress.engine.stage import StageResult, StageRunner, generator_for
from compress.io.keys import key_of
from compress.passes.merge.base import MergePass
from compress.passes.merge.delta_pass import DeltaPass
from compress.passes.merge.grid_search import chosen
from compress.report.sections import ModelsMerged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.calibration.data import Dataset
    from compress.checkpoint.artifact import Artifact
    from compress.engine.context import Context
    from compress.engine.stage import Stage


class Merging(StageRunner):
    """Runs one merge."""

    def compared(self, context: Context, stage: Stage) -> dict[str, Artifact]:
        pass_ = stage.single(MergePass)
        return {name: open_parent(name, context.given, pass_) for name in dict.fromkeys(pass_.models)}

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        pass_, base, ledger = stage.single(MergePass), context.artifact, context.ledger
        parents = [open_parent(model, context.given, pass_) for model in pass_.models]
        key = key_of(key, stage.number, pass_.key, pass_.options(), [p.source.fingerprint() for p in parents])
        aligner = Aligner(pass_, context, parents, stage.number) if pass_.aligns else None
        others = aligner.aligned() if aligner else parents
        models = ModelReader(base, others, context.seed, stage.number, context.devices, pass_.whole_rows)
        merger = Merger(pass_, models, context.bars)
        settling = _Settling(context, stage, merger, aligner, data, key)
        coder, delta = None, None
        if isinstance(pass_, DeltaPass):
            unit = f"{stage.unit}-delta"
            if pass_.codes_factors:
                coder = FactorCoder(pass_, base, adapter_of(pass_.models[0]))
                delta = make_factored(context, unit, key, coder)
            else:
                delta = make_delta(context, unit, key, merger, settling.settled)
        if delta is not None:
            artifact = write_applied(ledger, f"{stage.unit}-merged", key, merger, delta)
        elif coder is not None:
            artifact = replace(base, source=coder.model(coder.codes()).source)
        else:
            artifact = write_merged(context, f"{stage.unit}-merged", key, base, settling.settled)
        after = replace(context, artifact=artifact)
        if context.resident:
            _set(after, merger.names())
        more = settling.facts()
        if delta is not None:
            assert isinstance(artifact.source, WrittenSource)
            after = replace(after, delta=MadeDelta(delta.file, artifact.source.file))
            more["delta"] = delta.facts()
        return StageResult(key, after, ModelsMerged(pass_.key, list(pass_.models), len(merger.names()), more))


@dataclass
class _Settling:
    """Decides what is merged and how, once, where the result is not there yet.

    Attributes:
        context: with the base as it stands.
        merger: as the pipeline says.
        aligner: that put the others in the order of the base's units.
        data: what merges are tried on.
        key: of the stage.
        notes: what the pass has to say of it.
    """

    context: Context
    stage: Stage
    merger: Merger
    aligner: Aligner | None
    data: Dataset | None
    key: str
    notes: dict[str, Any] = field(default_factory=dict)

    def settled(self) -> Settled:
        """The merge with the options that were chosen, and what its pass has learned of whole models."""
        pass_, merger, ledger, unit = self.merger.pass_, self.merger, self.context.ledger, self.stage.unit
        models = self._trials()
        if pass_.choose:
            merger = replace(merger, pass_=chosen(pass_, models))
        learned = merger.pass_.learn(models) if merger.pass_.learns else None
        if self.aligner:
            models.notes["aligned"] = self.aligner.facts()
        if models.notes and not self.facts():
            self.notes = models.notes
            # Before the merged file, whose presence says that all is done.
            ledger.commit_row(f"{unit}-facts", self.key, {"notes": self.notes})
        ledger.forget(f"{unit}-trial")
        return Settled(merger, learned)

    def facts(self) -> dict[str, Any]:
        """What the report says of it, now or when it was done before."""
        if self.notes:
            return {"notes": self.notes}
        return dict(self.context.ledger.load_row(f"{self.stage.unit}-facts", self.key) or {})

    def _trials(self) -> Trials:
        context, stage, merger = self.context, self.stage, self.merger

        def tried(variant: MergePass, found: Any, name: str) -> Artifact:
            settled = Settled(replace(merger, pass_=variant), found)
            return write_merged(context, f"{stage.unit}-trial", name, merger.base, lambda: settled)

        generator = generator_for(context.seed, stage.number, 0, "")
        blocks = {name: block for name, (block, *_) in merger.models.places.items()}
        parents = list(merger.models.parents)
        return Trials(context, parents, merger.names(), tried, self.data, stage.unit, self.key, generator, blocks)


def _set(context: Context, names: Sequence[str]) -> None:
    """Put what was merged into a model in memory; what is tied stays tied."""
    for name in names:
        set_value(context.graph.model, name, value_of(context, name))
    tie(context.graph)
