"""One unit of work, a block or what lies outside the blocks: its state, and the matrices that passes solve in it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.precision import products
from compress.checkpoint.artifact import Packed
from compress.engine.ledger import Record
from compress.engine.placement import make_room
from compress.engine.retry import solved
from compress.engine.stacking import split_rows, stacks
from compress.engine.stage import generator_for
from compress.engine.validate import observed, observed_vector
from compress.io.heap import give_back
from compress.passes.base import Edit
from compress.passes.quantize.activations import attached
from compress.passes.targets import make_target

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.statistics import Statistics
    from compress.calibration.training import TrainingStore
    from compress.encodings import Weight
    from compress.engine.placement import Context
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
        artifact, first = self.context.artifact, sites[0].name
        return make_target(
            artifact.graph,
            sites,
            weights,
            statistics=self.state.statistics.get(first),
            generator=self.generator(first),
            original=self.context.original if pass_.compares else None,
        )

    def chosen(self, pass_: Pass) -> list[Site]:
        """The sites that the pass works on."""
        return [s for s in self.unit.sites if pass_.selects(s.name, s.block is not None)]

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

    def take_vector(self, pass_: Pass, name: str, edit: Edit) -> None:
        """Replace a vector by what the pass made of it."""
        store = self.context.artifact.vector_dtype(name)
        self.state.vectors[name] = observed_vector(name, pass_, self.vector(name), edit, store)

    def take(self, pass_: Pass, site: Site, made: SolvedSite) -> None:
        """Replace a site by what the pass made of it."""
        edit, store = made.edit, self.context.artifact.store_dtype(site)
        weight, error = observed(site, pass_, made.before, made.compared, edit, store)
        weight, rounding = attached(pass_.at(site.name), weight, self.state.statistics.get(site.name))
        self.state.weights[site.name] = weight
        reasons = [reason for reason in (made.fallback, rounding.get("fallback")) if reason]
        fallback = {"fallback": "; ".join(reasons)} if reasons else {}
        note = {"error": error, "seconds": made.seconds, **edit.notes, **rounding, **fallback}
        self.state.notes.setdefault(site.name, {})[pass_.key] = note


@dataclass(frozen=True)
class Solution:
    """What a pass made of a stack of sites.

    Attributes:
        sites: stacked row upon row.
        before: what each was.
        target: what the pass was given.
        edit: of the stack.
        fallback: what was done instead of the pass, in words.
        seconds: that it took.
    """

    sites: list[Site]
    before: list[Weight]
    target: Target
    edit: Edit
    fallback: str | None
    seconds: float


def solve_matrices(turn: Turn, pass_: LinearPass) -> None:
    """Let a pass solve its sites of a unit, those that fit together as one."""
    statistics = turn.state.statistics
    groups = stacks(pass_, turn.chosen(pass_), statistics, turn.masked)
    for solution in turn.context.executor.map(partial(_solve, turn, pass_), groups):
        _take_solution(turn, pass_, solution)
        if turn.last:
            for site in solution.sites:
                statistics.pop(site.name, None)
        del solution  # out of memory before the next is read


def _solve(turn: Turn, pass_: LinearPass, sites: list[Site]) -> Solution:
    if turn.state.statistics:  # a data-free pass never holds enough for it to pay
        give_back()
    started = time.perf_counter()
    before = [turn.weight(site) for site in sites]  # read no earlier than needed: one stack in memory, not the block
    target = turn.target(pass_, sites, before)
    with products(turn.context.products):
        edit, fallback = solved(pass_.at(sites[0].name), target)
    return Solution(sites, before, target, edit, fallback, time.perf_counter() - started)


def _take_solution(turn: Turn, pass_: LinearPass, solution: Solution) -> None:
    sites, target = solution.sites, solution.target
    compared = target.weight if target.original is None else target.original
    seconds = round(solution.seconds / len(sites), 4)
    rows = torch.split(compared, [s.shape[0] for s in sites])
    for site, before, old, edit in zip(sites, solution.before, rows, split_rows(solution.edit, sites), strict=True):
        turn.take(pass_, site, SolvedSite(before, old, edit, solution.fallback, seconds))
        if edit.shift is not None:
            bias = f"{site.name}.bias"
            make_room(turn.context, bias)
            turn.take_vector(pass_, bias, Edit(weight=turn.vector(bias) + edit.shift))
