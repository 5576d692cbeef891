"""The stage that takes blocks out: how similar hidden states are before and behind them, and the model without them."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.calibration import collect
from compress.calibration.precision import products
from compress.engine.chains import chain_of
from compress.engine.placement import present, streamed
from compress.engine.reshaping import reshaped
from compress.engine.stage import StageResult, StageRunner, calibration_batches
from compress.errors import NonFiniteError, UnsupportedModelError
from compress.io.keys import key_of
from compress.models.shorten import without
from compress.passes.depth import DepthPass
from compress.passes.interface import Depth
from compress.report.sections import BlocksDropped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.calibration.data import Dataset
    from compress.engine.context import Context
    from compress.engine.executor import Executor
    from compress.engine.stage import Stage
    from compress.models.shorten import Shorter
    from compress.passes.interface import Distance


class Shortening(StageRunner):
    """Runs one pass that takes blocks out of the model."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        """Do the work, or find it done.

        Raises:
            UnsupportedModelError: too few blocks have outputs of the shape of their inputs; or as `shorten.without`.
        """
        pass_, graph = stage.single(DepthPass), context.graph
        may = frozenset(pass_.candidates(graph))
        key = key_of(key, stage.number, pass_.key, pass_.options(), sorted(may))
        batches = context.executor.shard(calibration_batches(context, data))
        work = _DepthWork(pass_, stage.unit, key, batches, may, graph.blocks)
        state = _State(context, list(range(len(graph.blocks))))
        for chosen in pass_.run(Depth(partial(_asked, work, state))):
            _take_out(state, chosen)
        if len(state.gone) < pass_.blocks:
            raise UnsupportedModelError(
                f"only {len(state.gone)} blocks of {type(graph.model).__name__} output hidden states of the shape "
                f"of their inputs, and {pass_.key} should take out {pass_.blocks}"
            )
        section = BlocksDropped(pass_.key, sorted(state.gone), len(graph.blocks), state.distances, state.renamed)
        return StageResult(key_of(key, state.gone), state.context, section)


@dataclass(frozen=True)
class _DepthWork:
    """What is done.

    Attributes:
        unit: what the names of its files in the ledger begin with.
        key: of the stage.
        batches: of the calibration data.
        may: the blocks that may go, as all are numbered before the stage.
        blocks: names of all, before the stage.
    """

    pass_: DepthPass
    unit: str
    key: str
    batches: Sequence[Tensor]
    may: frozenset[int]
    blocks: tuple[str, ...]


@dataclass
class _State:
    """The model on its way.

    Attributes:
        context: with the model as it is by now.
        places: of the blocks that are left, as they were numbered before the stage.
        gone: the others, in the order they went.
        steps: the models so far.
        distances: by the name of the first block, one mapping per time they were asked for.
    """

    context: Context
    places: list[int]
    gone: list[int] = field(default_factory=list)
    steps: list[Shorter] = field(default_factory=list)
    distances: list[dict[str, float]] = field(default_factory=list)

    def renamed(self, old: str) -> str | None:
        """What a module is called now; None when it is gone."""
        now: str | None = old
        for step in self.steps:
            now = step.name(now) if now is not None else None
        return now


def _asked(work: _DepthWork, state: _State, count: int, distance: Distance, last: bool) -> dict[int, float]:
    """Distances by the first block of each run of `count` that may go, numbered as blocks are now."""
    context, places = state.context, state.places
    unit, key = f"{work.unit}-distances-{len(state.distances)}", key_of(work.key, places)
    row = context.ledger.load_row(unit, key)
    if row is None:
        measured = _distances(context, work.batches, count, distance, last)
        row = {str(i): d for i, d in measured.items() if work.may.issuperset(places[i : i + count])}
        context.ledger.commit_row(unit, key, row)
    if not row:
        raise UnsupportedModelError(
            f"no {count} block(s) of {type(context.graph.model).__name__} output hidden states of the shape of "
            f"their inputs, so {work.pass_.key} cannot take any out"
        )
    asked = {int(i): d for i, d in row.items()}
    state.distances.append({work.blocks[places[i]]: d for i, d in asked.items()})
    return asked


def _take_out(state: _State, chosen: Sequence[int]) -> None:
    """Take these blocks out of the model; what was done to the others is kept under their new names."""
    context, artifact = state.context, state.context.artifact
    old = [name for name, _ in artifact.graph.model.named_parameters(remove_duplicate=False)]
    made = without(artifact.graph, chosen, in_place=context.resident)
    names = made.moved({name: artifact.name_in_source(name) for name in (*old, *artifact.graph.buffers)})
    state.context = reshaped(context, made, {name: stored for name, stored in names.items() if name != stored})
    state.steps.append(made)
    state.gone += [state.places[i] for i in chosen]
    state.places = [place for i, place in enumerate(state.places) if i not in chosen]


def _distances(
    context: Context, batches: Sequence[Tensor], count: int, distance: Distance, last: bool
) -> dict[int, float]:
    """Mean distance by the first block of each run of `count`; runs whose output has another shape are left out."""
    graph, bars = context.graph, context.bars
    blocks = [graph.model.get_submodule(name) for name in graph.blocks]
    columns = any(s.is_convolution for s in graph.sites if s.block is not None)
    last = last and graph.is_language_model
    means = _Means(count, distance)

    def states(hidden: Tensor) -> Tensor:
        """(samples, positions, width), as they are now: a block may work in place."""
        wide = hidden.movedim(1, -1) if columns and hidden.dim() == 4 else hidden
        wide = wide.reshape(len(wide), -1, wide.shape[-1])
        return (wide[:, -1:] if last else wide).double()

    with torch.no_grad():
        chain = chain_of(context, graph.towers[0], batches)
        if chain is None:
            with streamed(context), products(context.products):
                for number, batch in enumerate(bars.over(batches, len(batches), "distances: batches")):
                    run = partial(context.forward, batch)
                    enter = partial(means.enter, number, states)
                    ran = collect.visits(run, blocks, enter, partial(means.leave, number, states))
                    if ran != list(range(len(blocks))):
                        raise UnsupportedModelError(
                            f"the blocks of {type(graph.model).__name__} do not run once each and in order, so none "
                            "can be taken out"
                        )
            return means.found(context.executor)
        for index in bars.over(range(len(blocks)), len(blocks), "distances: block", "each"):
            with products(context.products), present(context, index):
                forwards = bars.over(chain.forwards(blocks[index], index=index), len(batches), "distances: batches")
                for number, made in enumerate(forwards):
                    means.enter(number, states, index, context.devices.to_compute(chain.hidden[number]))
                    output = made()
                    means.leave(number, states, index, output)
                    chain.keep(number, output)
    return means.found(context.executor)


States = Callable[[Tensor], Tensor]


class _Means:
    """Sums up distances; holds what the last `count - 1` blocks were given, of each batch."""

    def __init__(self, count: int, distance: Distance):
        self.count, self.distance = count, distance
        self.sums: dict[int, float] = {}
        self.positions: dict[int, int] = {}
        self.given: dict[int, deque[Tensor]] = defaultdict(deque)

    def enter(self, batch: int, states: States, index: int, hidden: Tensor) -> None:
        """A block is given hidden states."""
        self.given[batch].append(states(hidden))

    def leave(self, batch: int, states: States, index: int, hidden: Tensor) -> None:
        """Take the hidden states that a block outputs."""
        first = index + 1 - self.count
        if first < 0:
            return
        before, after = self.given[batch].popleft(), states(hidden)
        if before.shape != after.shape:
            return
        found = self.distance(before, after)
        self.sums[first] = self.sums.get(first, 0.0) + float(found.sum())
        self.positions[first] = self.positions.get(first, 0) + found.numel()

    def found(self, executor: Executor) -> dict[int, float]:
        """The means, over what all processes have seen.

        Raises:
            NonFiniteError: hidden states are NaN or infinite.
        """
        seen = executor.gathered([list(self.sums.items()), list(self.positions.items())])
        self.sums, self.positions = {}, {}
        for sums, positions in seen:
            for first, total in sums:
                self.sums[first] = self.sums.get(first, 0.0) + total
            for first, count in positions:
                self.positions[first] = self.positions.get(first, 0) + count
        bad = [first for first, total in self.sums.items() if not math.isfinite(total)]
        if bad:
            raise NonFiniteError(
                f"the hidden states around block {bad[0]} are not finite on the calibration data; look for NaN "
                "weights before it, or run with dtype: float32"
            )
        return {first: total / self.positions[first] for first, total in sorted(self.sums.items())}
