"""Whole models of a merge: tried out on data, and run with learned values inside, before anything is merged."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.precision import learning
from compress.engine.learned_values import with_learned
from compress.engine.ledger import KeptInLedger
from compress.engine.measure import Meter
from compress.engine.model_training import in_memory
from compress.engine.placement import lent
from compress.io.keys import hash_of, key_of
from compress.models.logits import logits_in
from compress.passes.merge.base import MergePass
from compress.passes.merge.models import Models, Running, Tried

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from torch import Tensor

    from compress.calibration.data import Dataset
    from compress.calibration.metrics import Quality
    from compress.calibration.training import Make
    from compress.checkpoint.artifact import Artifact
    from compress.engine.context import Context
    from compress.passes.base import Pass
    from compress.passes.merge.models import T

KEPT_NUMBERS = 1 << 26  # numbers of the models that stay in memory once they were read: 256 MB


@dataclass
class Trials(Models):
    """What a merge may know of whole models. See `Models`.

    Attributes:
        context: with the base as it stands.
        parents: the others.
        made: pass and what it knows -> the merged model, until the next one is made.
        data: what merges are tried on.
        unit, key: name and key of this work in the ledger.
    """

    context: Context
    parents: list[Artifact]
    names: list[str]
    made: Callable[[MergePass, Any, str], Artifact]
    data: Dataset | None
    unit: str
    key: str
    generator: torch.Generator
    blocks: Mapping[str, int | None] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    kept: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    room: int = KEPT_NUMBERS

    def __post_init__(self) -> None:
        self.meter = Meter(self.context, self.data)

    def over(self, items: Iterable[T], total: int | None, label: str | Callable[[], str]) -> Iterator[T]:
        return self.context.bars.over(items, total, label)

    def value(self, model: int, name: str) -> Tensor:
        found = self.kept.get((model, name))
        if found is not None:
            return found
        artifact = (self.context.artifact, *self.parents)[model]
        value = self.context.devices.to_compute(artifact.source.read(artifact.name_in_source(name))).float()
        if self.room >= value.numel():  # a file is not opened a thousand times for a small model
            self.room -= value.numel()
            self.kept[model, name] = value
        return value

    def tried(self, pass_: Pass, found: Any = None) -> dict[str, Tried]:
        assert isinstance(pass_, MergePass)
        key = key_of(self.key, pass_.key, pass_.options(), repr(found), hash_of(self.data))
        return self._tried(key, lambda: self.made(pass_, found, key))

    def tried_alone(self, model: int) -> dict[str, Tried]:
        artifact = (self.context.artifact, *self.parents)[model]
        return self._tried(key_of(self.key, model, hash_of(self.data)), lambda: artifact)

    def _tried(self, key: str, make: Callable[[], Artifact]) -> dict[str, Tried]:
        self.number += 1
        unit, ledger = f"{self.unit}-try-{self.number:03d}", self.context.ledger
        row = ledger.load_row(unit, key)
        if row is None:
            with lent(self.context, make()) as merged:
                row = {name: _trial_row(quality) for name, quality in self.meter.of(merged).items()}
            ledger.commit_row(unit, key, row)
        return {name: Tried(**facts) for name, facts in row.items()}

    @contextmanager
    def running(self) -> Iterator[Running]:
        assert self.data is not None
        context, graph, inputs = self.context, self.context.graph, self.data.inputs
        aliases: dict[str, list[str]] = {}
        for alias, name in graph.tied.items():
            aliases.setdefault(name, []).append(alias)

        def values(make: Make) -> Callable[[Collection[str]], Mapping[str, Tensor]]:
            def made(names: Collection[str]) -> dict[str, Tensor]:
                with torch.autocast(context.devices.compute.type, enabled=False):
                    found = {n: v.to(context.dtype) for n, v in make(names).items()}
                return found | {alias: v for n, v in found.items() for alias in aliases.get(n, ())}

            return made

        parameters = [n for n in self.names if n not in graph.buffers]

        def logits(make: Make, numbers: Tensor) -> Tensor:
            computing = learning(context.products, torch.empty(0, dtype=context.dtype))
            with computing, with_learned(graph, values(make), False, parameters):
                out: Tensor = logits_in(context.forward(inputs[numbers.to(inputs.device)])).float()
            return out[:, :-1].flatten(0, 1) if graph.is_language_model else out

        with in_memory(context):
            kept = KeptInLedger(context.ledger, f"{self.unit}-training", self.key)
            counts = torch.tensor([len(part) for part in self.data.split().values()])
            sources = torch.arange(len(counts)).repeat_interleave(counts)
            yield Running(logits, len(inputs), kept, tuple(parameters), sources)


def _trial_row(quality: Quality) -> dict[str, float | None]:
    return {"loss": quality.loss, "accuracy": quality.accuracy, "negative_flips": quality.negative_flips}
