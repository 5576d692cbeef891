"""What a stage of a plan is given, what it returns, and what all stages share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from compress.calibration.data import CALIBRATED_AT_ONCE, batches
from compress.engine.few_tokens import experts_in_short
from compress.io.keys import key_of
from compress.report.sections import LayersChanged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.calibration.data import Dataset
    from compress.checkpoint.artifact import Artifact
    from compress.engine.context import Context
    from compress.engine.ledger import Record
    from compress.models.site import Site
    from compress.passes.base import Pass, Reach
    from compress.planning.plan import PassPlan
    from compress.report.sections import Section

P = TypeVar("P", bound="Pass")


@dataclass(frozen=True)
class Stage:
    """Passes that run together.

    Attributes:
        number: from 0, in the order of the pipeline.
        plans: of the passes, in order.
    """

    number: int
    plans: tuple[PassPlan, ...]

    @property
    def passes(self) -> list[Pass]:
        """The passes in order."""
        return [plan.pass_ for plan in self.plans]

    @property
    def name(self) -> str:
        """What the report calls it."""
        return "+".join(p.key for p in self.passes)

    @property
    def unit(self) -> str:
        """What the names of its files in the ledger begin with."""
        return f"s{self.number:02d}"

    @property
    def reach(self) -> Reach:
        """What its first pass must see at once. Passes of different reach run together only where one runner fits."""
        return self.passes[0].reach

    def single(self, kind: type[P]) -> P:
        """The one pass of a stage whose passes are not fused."""
        (pass_,) = self.passes
        assert isinstance(pass_, kind)
        return pass_


@dataclass(frozen=True)
class StageResult:
    """What a stage made.

    Attributes:
        key: of everything up to here.
        context: for the next stage, with the artifact as it is now.
        section: for the report.
    """

    key: str
    context: Context
    section: Section


class StageRunner(Protocol):
    """Runs stages of one kind."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        """Do the work, or find it done.

        Args:
            context: with the artifact as it stands.
            stage: what is done.
            data: the calibration data.
            key: of everything before.
        """

    def compared(self, context: Context, stage: Stage) -> Mapping[str, Artifact]:
        """Other models that the result is compared with, by name."""
        return {}


def calibration_batches(context: Context, data: Dataset | None) -> list[Tensor]:
    """Calibration data in the portions that run through the model at once."""
    return batches(data.inputs, CALIBRATED_AT_ONCE, context.divided) if data is not None else []


def generator_for(seed: int, stage: int, position: int, name: str) -> torch.Generator:
    """Randomness of one pass on one site or block. `position`: of the pass in its stage."""
    number = int(key_of(seed, stage, position, name)[:15], 16)
    return torch.Generator().manual_seed(number)


def departed(pass_: Pass, site: Site, notes: Mapping[str, Any]) -> dict[str, str]:
    """What the report says where a pass cannot do what it was asked to; it may say more of the same layer already."""
    reason = pass_.at(site.name).departure(site.shape)
    return {"fallback": "; ".join(filter(None, (notes.get("fallback"), reason)))} if reason else {}


def layers_changed(artifact: Artifact, records: Sequence[Record]) -> LayersChanged:
    """What finished sites and vectors tell the report."""
    trained: dict[str, int] = {}
    fallbacks = list(experts_in_short(records))
    for record in records:
        for name, notes in record.notes.items():
            if "trained" in notes:
                trained[name] = trained.get(name, 0) + int(notes["trained"])
            if record.site in artifact.sites and "fallback" in notes and "fewer_than" not in notes:
                fallbacks.append(f"{record.site}: {notes['fallback']}")
            if record.site in artifact.sites and notes.get("dead_inputs"):
                fallbacks.append(f"{record.site}: {notes['dead_inputs']:.0f} inputs are always zero ({name})")
    tied = artifact.graph.tied
    parameters = sum(p.numel() for name, p in artifact.graph.model.named_parameters() if name not in tied)
    layers = {r.site: r.notes for r in records if r.site in artifact.sites}
    return LayersChanged(layers, fallbacks, trained, parameters)
