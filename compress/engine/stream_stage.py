"""The stage that turns the residual stream: one tensor after the other, each from what it was before the stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from compress.checkpoint.artifact import finite_weight
from compress.checkpoint.remade import settled
from compress.checkpoint.sources import CopiedSource
from compress.encodings.turn import turned
from compress.engine.placement import take_records
from compress.engine.reshaping import reshaped
from compress.engine.stage import StageResult, StageRunner, generator_for, layers_changed
from compress.engine.transformed import Transformed
from compress.errors import UnsupportedModelError
from compress.io.keys import key_of
from compress.models.stream import stream_of, written_from
from compress.models.turning import with_turned
from compress.models.untie import untied
from compress.passes.transform.rotate import Rotate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.calibration.data import Dataset
    from compress.checkpoint.artifact import Artifact
    from compress.engine.context import Context
    from compress.engine.ledger import Record
    from compress.engine.stage import Stage
    from compress.models.norms import Norm
    from compress.models.site import Site
    from compress.models.stream import Stream

PIECE = 1 << 24  # numbers that are multiplied in float64 at once


class Turning(StageRunner):
    """Runs one pass over everything that touches the stream. What it makes counts as the original."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        """Do the work, or find it done.

        Raises:
            UnsupportedModelError: as `stream_of`; or a norm scales a channel by zero and then adds to it.
        """
        pass_, stream = stage.single(Rotate), stream_of(context.graph)
        context = replace(context, artifact=settled(context.artifact))
        if stream.head is not None:
            context = _with_head(context, stream.head)
            stream = stream_of(context.graph)
        online: dict[str, int] = {}
        if pass_.online:
            writers = written_from(context.graph, stream)
            context = reshaped(context, with_turned(context.graph, writers, in_place=context.resident))
            online = {name: context.graph.turned[name] for name in writers}
        artifact = context.artifact
        before = replace(artifact, committed=dict(artifact.committed), vectors=dict(artifact.vectors))
        turn = pass_.run(stream.width, stream.centred, generator_for(context.seed, stage.number, 0, "stream"))
        sizes = {value.columns.shape[1] for value in stream.values if pass_.values}
        within = {n: pass_.run(n, False, generator_for(context.seed, stage.number, 0, f"values {n}")) for n in sizes}
        work = _Work(replace(context, artifact=before), pass_, stream, turn, within, online)
        records: list[Record] = []
        for unit, names in context.bars.over(*_units(context, stream), f"{pass_.key}: block", "each"):
            key = key_of(key, stage.number, unit, pass_.key, pass_.options(), names)
            done = context.ledger.load(f"{stage.unit}-{unit}", key)
            if done is None:
                done = context.commit(f"{stage.unit}-{unit}", key, work.records(names))
            records += done
            take_records(context, done)
        section = layers_changed(context.artifact, records)
        return StageResult(key, replace(context, artifact=settled(context.artifact)), section)


def _with_head(context: Context, head: str) -> Context:
    """The model with a head of its own, as yet equal to the embedding."""
    before: Artifact = context.artifact
    kept = before.name_in_source(before.graph.tied[head])
    made = untied(before.graph, head, in_place=context.resident)
    renamed = {name: there for name, there in before.renamed.items() if name != head}
    source = CopiedSource(before.source, {head: kept})
    return reshaped(replace(context, artifact=replace(before, source=source)), made, renamed)


def _units(context: Context, stream: Stream) -> tuple[list[tuple[str, list[str]]], int]:
    """(name in the ledger, tensors): one of each block, and one for every tensor outside; and how many there are."""
    order = {name: i for i, name in enumerate((*(s.name for s in context.graph.sites), *context.graph.vectors()))}
    names = sorted((name for name in stream.tensors() if name in order), key=order.__getitem__)
    inside = {i: f"{block}." for i, block in enumerate(context.graph.blocks)}
    units = [(f"b{i:04d}", [n for n in names if n.startswith(prefix)]) for i, prefix in inside.items()]
    outside = [name for name in names if not name.startswith(tuple(inside.values()))]
    units += [(f"outside-{i:02d}", [name]) for i, name in enumerate(outside)]
    return units, len(units)


@dataclass(frozen=True)
class _Work:
    """What is done.

    Attributes:
        context: with the model before the stage.
        turn: of the stream.
        within: size of a head -> the turn of its values.
        online: layers whose inputs are turned while the model runs -> how many channels of them together.
    """

    context: Context
    pass_: Rotate
    stream: Stream
    turn: Tensor
    within: Mapping[int, Tensor]
    online: Mapping[str, int]

    def records(self, names: Sequence[str]) -> list[Record]:
        """Some tensors, turned."""
        made = Transformed(self.context, self.pass_)
        for name in names:
            site = self.context.artifact.sites.get(name)
            if site is None:
                made[name] = self._vector(name)
                continue
            weight = finite_weight(site, self.context.weight(site))
            made[name] = self._matrix(site, weight)
            made.notes[name] = {"peak_before": _peak(weight), "peak": _peak(made[name])}
        return made.records()

    def _matrix(self, site: Site, weight: Tensor) -> Tensor:
        norm = self.stream.norm_of(site.name)
        if norm is not None and norm.scaled:
            weight = weight * (self.context.tensor(norm.weight).float() + norm.offset)
        if site.name in self.stream.read:
            weight = _product(weight, self.turn)
        for values in self.stream.values if self.within else ():
            if site.name == values.reader:
                weight = _turned_within(weight.T, values.columns, self.within).T
            for place in values.makers:
                if place.tensor == site.parameter:
                    weight = _turned_within(weight, place.index, self.within)
        if site.name in self.online:
            weight = turned(weight.double(), self.online[site.name]).float()
        return _product(weight.T, self.turn).T if site.name in self.stream.written else weight

    def _vector(self, name: str) -> Tensor:
        """A norm's scale or bias, or the bias of a layer."""
        value = self.context.tensor(name).float()
        for norm in self.stream.norms:
            if name == norm.weight:
                return torch.full_like(value, 1 - norm.offset)
            if name == norm.bias:
                return torch.zeros_like(value) if self._absorbed(norm) else self._undone(norm, value)
        owner = self.context.artifact.sites[name.removesuffix(".bias")]
        read = self.stream.norm_of(owner.name)
        if read is not None and self._absorbed(read):
            value = value + finite_weight(owner, self.context.weight(owner)) @ self.context.tensor(read.bias).float()
        for values in self.stream.values if self.within else ():
            for place in values.makers:
                if place.tensor == name:
                    value = _turned_within(value[:, None], place.index, self.within)[:, 0]
        return _product(value[None], self.turn)[0] if name in self.stream.written else value

    def _absorbed(self, norm: Norm) -> bool:
        """Whether the bias of a norm goes into the biases of the layers that read it: all of them have one."""
        vectors = self.context.graph.vectors()
        return norm.shifted and all(f"{name}.bias" in vectors for name in norm.readers)

    def _undone(self, norm: Norm, bias: Tensor) -> Tensor:
        """The bias of a norm whose readers have none: it stays, turned, before the scale that is in the readers now."""
        scale = self.context.tensor(norm.weight).float() + norm.offset
        shifts = bias / scale.where(scale != 0, 1)
        if bool(((scale == 0) & (bias != 0)).any()):
            raise UnsupportedModelError(
                f"{norm.name} scales a channel by zero and then adds to it, and {norm.readers[0]} has no bias to take "
                f"that up, so {self.pass_.key} cannot move the scale"
            )
        return _product(shifts[None], self.turn)[0]


def _product(matrix: Tensor, turn: Tensor) -> Tensor:
    """(N, C) times (C, C), multiplied in float64, a few rows at a time."""
    step = max(1, PIECE // matrix.shape[1])
    return torch.cat([(part.double() @ turn).float() for part in torch.split(matrix, step)])


def _turned_within(matrix: Tensor, rows: Tensor, turns: Mapping[int, Tensor]) -> Tensor:
    """A matrix whose rows of each head, (heads, size), are turned."""
    made, turn = matrix.clone(), turns[rows.shape[1]]
    for head in rows.to(matrix.device):
        made[head] = (turn.T @ matrix[head].double()).float()
    return made


def _peak(weight: Tensor) -> float:
    """How many times its root mean square the largest weight is."""
    largest, mean = weight.abs().amax(), weight.square().mean().sqrt()
    return float(largest / mean) if mean > 0 else 0.0


__all__ = ["Turning"]
