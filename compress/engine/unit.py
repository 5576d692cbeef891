"""One unit of work, a block or what lies outside the blocks: its state, and the matrices that passes solve in it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.precision import products
from compress.checkpoint.artifact import Packed
from compress.encodings import Weight
from compress.engine.by_group import solved_by_group
from compress.engine.few_tokens import notes_on_tokens, usable
from compress.engine.ledger import Record
from compress.engine.parcels import Records
from compress.engine.placement import make_room
from compress.engine.stacking import split_rows, stacks
from compress.engine.stage import departed, generator_for
from compress.engine.validate import observed, observed_vector
from compress.io.heap import give_back
from compress.passes.base import Edit
from compress.passes.quantize.activations import attached
from compress.passes.targets import make_target, works_on

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.statistics import Statistics
    from compress.calibration.training import TrainingStore
    from compress.engine.context import Context
    from compress.engine.sweep import Unit
    from compress.models.site import Site
    from compress.passes.base import LinearPass, Pass, Target


@dataclass(frozen=True)
class UnitState:
    """What is known of a unit while the passes of a stage work on it, one after the other.

    Attributes:
        statistics: site -> sums over its inputs, until the last pass has used them.
        weights: site -> what the passes so far made of it.
        vectors: parameter name -> what they made of a bias or a scale of a norm, (1, N).
        notes: site or vector -> pass -> what the report says.
    """

    statistics: dict[str, Statistics]
    weights: dict[str, Weight] = field(default_factory=dict)
    vectors: dict[str, Weight] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def records(self, sites: list[Site]) -> list[Record]:
        """The records for the ledger: of sites, then of vectors."""
        made = {**{site.name: self.weights[site.name] for site in sites}, **self.vectors}
        return [Record(name, weight, self.notes.get(name, {})) for name, weight in made.items()]


@dataclass(frozen=True)
class SolvedSite:
    """What a pass made of one site.

    Attributes:
        before: what the site was.
        compared: what the error is taken of, (out, in) float32.
        fallback: what was done instead of the pass, in words.
        seconds: that it took.
    """

    before: Weight
    compared: Tensor
    edit: Edit
    fallback: str | None
    seconds: float


@dataclass(frozen=True)
class Turn:
    """One pass at its turn to work on a unit.

    Attributes:
        stage: the number of the stage.
        position: of the pass in it.
        last: whether no pass comes after it.
        kept: where the state of an unfinished learning is kept.
    """

    context: Context
    stage: int
    position: int
    last: bool
    unit: Unit
    state: UnitState
    kept: TrainingStore

    def generator(self, name: str) -> torch.Generator:
        """Randomness of the pass on a site, or on the unit."""
        return generator_for(self.context.seed, self.stage, self.position, name)

    def target(self, pass_: Pass, sites: list[Site], weights: list[Weight]) -> Target:
        """What the pass is given of sites with the same inputs."""
        seen = usable(self.context, sites[0], self.state.statistics)
        return make_target(
            self.context.graph,
            sites,
            weights,
            # Those of groups are for a pass that is given the groups one by one.
            statistics=None if seen is not None and seen.groups > 1 and pass_.needs == "none" else seen,
            generator=self.generator(sites[0].name),
            original=self.context.original if pass_.compares else None,
        )

    def chosen(self, pass_: Pass) -> list[Site]:
        """The sites that the pass works on."""
        return [s for s in self.unit.sites if works_on(pass_, s)]

    def weight(self, site: Site) -> Weight:
        """A site as it stands now: from this unit's earlier passes, or committed."""
        made = self.state.weights.get(site.name)
        return self.context.weight(site) if made is None else made

    def vector(self, name: str) -> Tensor:
        """A vector as it stands now, float32: from this unit's earlier passes, or committed."""
        made = self.state.vectors.get(name)
        if made is None:
            return self.context.tensor(name).float()
        assert made.values is not None
        return made.values[0].float()

    def masked(self, site: Site) -> bool:
        """Whether a site has a mask now."""
        now = self.state.weights.get(site.name) or self.context.artifact.committed.get(site.name)
        return (now.spec.kept if isinstance(now, Packed) else now and now.mask) is not None

    def vector_made(self, pass_: Pass, name: str, edit: Edit) -> Record:
        """What the pass made of a vector, once it is seen to be sound; without notes."""
        store = self.context.artifact.vector_dtype(name)
        return Record(name, observed_vector(name, pass_, self.vector(name), edit, store), {})

    def record(self, pass_: Pass, site: Site, made: SolvedSite) -> Record:
        """What the pass made of a site, once it is seen to be sound; the notes are those of this pass."""
        edit, store = made.edit, self.context.artifact.store_dtype(site)
        weight, error = observed(site, pass_, made.before, made.compared, edit, store)
        weight, rounding = attached(pass_.at(site.name), weight, edit, self.state.statistics.get(site.name))
        reasons = [reason for reason in (made.fallback, rounding.get("fallback")) if reason]
        if made.fallback and site.read_by is not None and site.name not in self.state.statistics:
            reasons.append("its queries, keys and values were not one tensor")
        fallback: dict[str, Any] = {"fallback": "; ".join(reasons)} if reasons else {}
        if pass_.needs != "none":
            fallback |= notes_on_tokens(self.context, site, self.state.statistics, made.fallback)
        fallback |= departed(pass_, site, fallback)
        note = {"error": error, "seconds": made.seconds, **edit.notes, **rounding, **fallback}
        return Record(site.name, weight, note)

    def take(self, pass_: Pass, record: Record) -> None:
        """Replace a site, or a vector, by what the pass made of it."""
        name, weight = record.site, record.weight
        assert isinstance(weight, Weight)
        if name in self.context.artifact.sites:
            self.state.weights[name] = weight
            self.state.notes.setdefault(name, {})[pass_.key] = record.notes
            return
        if self.context.artifact.added(name):
            make_room(self.context, name)
        self.state.vectors[name] = weight


def solve_matrices(turn: Turn, pass_: LinearPass) -> None:
    """Let a pass solve its sites of a unit, those that fit together as one."""
    context, statistics = turn.context, turn.state.statistics
    groups = stacks(pass_, turn.chosen(pass_), statistics, turn.masked)
    solved_groups = context.executor.map(partial(_solve, turn, pass_), groups, Records(context.devices), _cost)
    for sites, records in zip(groups, solved_groups, strict=True):
        for record in records:
            turn.take(pass_, record)
        if turn.last:
            for site in sites:
                statistics.pop(site.name, None)
        del records  # out of memory before the next is read


def _cost(sites: list[Site]) -> float:
    """About how long a stack takes, in any unit: as long as an update of every row by every column."""
    return float(sum(s.shape[0] * s.shape[1] ** 2 for s in sites))


def _solve(turn: Turn, pass_: LinearPass, sites: list[Site]) -> list[Record]:
    """What a pass made of a stack of sites, row upon row, and of their biases."""
    if turn.state.statistics:  # a data-free pass never holds enough for it to pay
        give_back()
    started = time.perf_counter()
    before = [turn.weight(site) for site in sites]  # read no earlier than needed: one stack in memory, not the block
    target = turn.target(pass_, sites, before)
    with products(turn.context.products):
        stacked, fallback = solved_by_group(pass_.at(sites[0].name), target)
    seconds = round((time.perf_counter() - started) / len(sites), 4)
    compared = target.weight if target.original is None else target.original
    rows = torch.split(compared, [s.shape[0] for s in sites])
    made = []
    for site, was, old, edit in zip(sites, before, rows, split_rows(stacked, sites), strict=True):
        made.append(turn.record(pass_, site, SolvedSite(was, old, edit, fallback, seconds)))
        if edit.shift is not None:
            bias = f"{site.name}.bias"
            make_room(turn.context, bias)
            made.append(turn.vector_made(pass_, bias, Edit(weight=turn.vector(bias) + edit.shift)))
    return made
