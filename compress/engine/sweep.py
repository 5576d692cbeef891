"""The block-sequential driver.

One block at a time is brought in, its inputs are summed up, and it is handed out to whoever works on it; the outputs of
the *compressed* block then become the inputs of the next. Peak memory is one block, its statistics and the activations
of the calibration data, whatever the number of blocks.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from compress.calibration import collect
from compress.calibration.experts import FusedParameter
from compress.calibration.precision import calibrating
from compress.engine.block_view import View
from compress.engine.chains import INSTEAD, chain_of, original_chain, refuse_unlearned, samples_of, visits_to
from compress.engine.placement import present, streamed
from compress.engine.tail import outside_statistics
from compress.errors import UnsupportedModelError
from compress.io.heap import bound_heap
from compress.models.tables import multiplies
from compress.passes.targets import works_on

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from compress.calibration.activation_cache import Activations
    from compress.calibration.reconstruct import Weights
    from compress.calibration.statistics import Need, Statistics
    from compress.engine.context import Context
    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.models.towers import Tower
    from compress.passes.base import Pass

LARGEST_UNIT = 1 << 26  # weights; a block with more of them in its experts is worked on part by part where it may be
OUTSIDE_BLOCKS = -1  # stands for a block where sites lie outside of all blocks


@dataclass(frozen=True)
class Wanted:
    """What passes want of a sweep.

    Attributes:
        label: what progress bars call it.
        sites: number of each block -> the sites in it that some pass works on; `OUTSIDE_BLOCKS` only if there are any.
        needs: site -> what must be known of its inputs, where anything must.
        ranged: the sites of which the range of the inputs must be known.
        calibrated: whether any pass learns from data. Otherwise the model is not run.
        learns: whether any pass runs the blocks, and compares with what comes out in the original model.
        whole: whether any pass must see all of a block at once.
        drifting: the sites of which it must be known how far their inputs are from the original model's.
    """

    label: str
    sites: Mapping[int, list[Site]]
    needs: Mapping[str, Need]
    ranged: frozenset[str]
    calibrated: bool
    learns: bool
    whole: bool = False
    drifting: frozenset[str] = frozenset()

    @property
    def follows(self) -> bool:
        """Whether the original model is run beside the compressed one."""
        return self.learns or bool(self.drifting)


@dataclass(frozen=True)
class Unit:
    """A block, or all that lies outside the blocks, as it is handed out.

    Attributes:
        name: in the ledger.
        sites: that some pass works on.
        statistics: runs the calibration data up to the block, and returns what was asked for of each site's inputs.
        view: how the block may be run; None where no pass does.
    """

    name: str
    sites: list[Site]
    statistics: Callable[[], dict[str, Statistics]]
    view: View | None = None


def sites_by_block(graph: Graph, passes: Sequence[Pass]) -> dict[int, list[Site]]:
    """Number of each block -> the sites in it that some pass works on; `OUTSIDE_BLOCKS` only if there are any."""
    found = {
        index: [s for s in graph.in_block(index) if any(works_on(p, s) for p in passes)]
        for index in range(len(graph.blocks))
    }
    outside = [s for s in graph.outside if any(works_on(p, s) for p in passes)]
    return {**found, OUTSIDE_BLOCKS: outside} if outside else found


def most_needed(needs: Sequence[Need]) -> Need:
    """The one that includes all others."""
    return "gram" if "gram" in needs else "norm" if "norm" in needs else "none"


def gradients(wanted: Wanted) -> AbstractContextManager[None]:
    """While open, nothing that runs the model keeps what gradients would need."""
    return torch.no_grad() if wanted.calibrated else nullcontext()


def sweep(context: Context, wanted: Wanted, batches: Sequence[Tensor]) -> Iterator[Unit]:
    """Hand out one unit after the other. A block must be committed before the next is asked for."""
    if wanted.calibrated:
        try:
            yield from _calibrated(context, wanted, batches)
        finally:
            if context.ahead is not None:
                context.ahead.forget()
        return
    for index, sites in context.bars.over(wanted.sites.items(), len(wanted.sites), f"{wanted.label}: block", "each"):
        parts = [sites] if wanted.whole else parts_of(sites)
        for number, part in enumerate(parts):
            yield Unit(_unit(index) if len(parts) == 1 else f"{_unit(index)}-{number:02d}", part, dict)


def parts_of(sites: list[Site]) -> list[list[Site]]:
    """The sites of a block in parts of at most `LARGEST_UNIT` weights, where they are many experts; else in one.

    What is made of a unit is in memory until all of it is finished.
    """
    parts: list[list[Site]] = [[]]
    size = 0
    for site in sites:
        weights = site.shape[0] * site.shape[1]
        if site.is_expert and parts[-1] and size + weights > LARGEST_UNIT:
            parts.append([])
            size = 0
        parts[-1].append(site)
        size += weights
    return parts


def _calibrated(context: Context, wanted: Wanted, batches: Sequence[Tensor]) -> Iterator[Unit]:
    if not context.resident:
        bound_heap()
    count, towers = len(context.graph.blocks), context.graph.towers
    shown = context.bars.over(range(count), count, f"{wanted.label}: block", "each")
    chain: Activations | None = None
    for tower in towers:
        if any(wanted.sites[index] for index in tower.numbers) or len(towers) == 1:
            chain = yield from _tower(context, wanted, batches, tower, shown)
            continue
        for index in itertools.islice(shown, len(tower.blocks)):  # nothing changes there, so nothing has to run
            yield Unit(_unit(index), [], dict)
    next(shown, None)  # the last block is done
    if OUTSIDE_BLOCKS in wanted.sites:  # last: a head learns from what the compressed blocks make
        sites = wanted.sites[OUTSIDE_BLOCKS]
        chain = chain if len(towers) == 1 else None
        seen = partial(outside_statistics, context, wanted.needs, wanted.ranged, sites, chain, batches)
        yield Unit(_unit(OUTSIDE_BLOCKS), sites, seen)


def _tower(
    context: Context, wanted: Wanted, batches: Sequence[Tensor], tower: Tower, shown: Iterator[int]
) -> Generator[Unit, None, Activations | None]:
    """The blocks of a tower, one after the other; then what arrives at the last of them.

    `shown` gives the numbers of blocks, and draws progress.
    """
    chain = chain_of(context, tower, batches)
    original = None  # what arrives in the original model, beside what arrives in the compressed one
    if wanted.learns and chain is None and tower.blocks == ("",):
        raise UnsupportedModelError(
            f"{type(context.graph.model).__name__} has no list of repeated blocks, and as a whole it puts out more "
            f"than one tensor, so there is nothing that {wanted.label} could learn block by block; {INSTEAD}"
        )
    if wanted.learns and chain:
        samples_of(context, tower, batches, wanted.label)
    if wanted.follows and chain:
        original = original_chain(context, tower, batches) or chain.copy()
    met = {i: s for i in tower.numbers if (s := wanted.sites[i]) and (chain is None or context.graph.users_of(s))}
    if wanted.learns and met:
        refuse_unlearned(context, met, batches, wanted.label)
    for index in itertools.islice(shown, len(tower.blocks)):
        _read_ahead(context, index + 1)
        view, beside, sites = None, None, wanted.sites[index]
        if chain and original:
            outputs = original.copy()
            view = beside = View(context, index, chain, original, outputs)
            _step(context, outputs, index, view.original_values(), "original: batches")
            original = outputs
        if wanted.learns and index in met:
            visits = visits_to(context, index, batches, wanted.label, sites)
            view = View(context, index, visits.chain, visits.original, visits.outputs, visits.users)
        statistics = partial(_block_statistics, context, wanted, index, chain, batches, beside)
        yield Unit(_unit(index), sites, statistics, view)
        if chain and index + 1 in tower.numbers:
            _step(context, chain, index, None, "propagate: batches")
    return chain


def _unit(index: int) -> str:
    """What a block is called in the ledger."""
    return "outside" if index == OUTSIDE_BLOCKS else f"b{index:04d}"


def _read_ahead(context: Context, index: int) -> None:
    """Begin to read what a block has in the source, as far as no pass has changed it."""
    if context.ahead is None:
        return
    names: list[str] = []
    if index < len(context.graph.blocks):
        block = context.graph.model.get_submodule(context.graph.blocks[index])
        names += (name for name, _ in block.named_parameters(prefix=context.graph.blocks[index]))
    artifact = context.artifact
    plain = (n for n in names if not artifact.made_sites(n) and n not in artifact.vectors and not artifact.added(n))
    context.ahead.begin(plain, lambda name: artifact.source.read(artifact.name_in_source(name)))


def _step(context: Context, into: Activations, index: int, weights: Weights | None, label: str) -> None:
    """Run a block on what arrives at it, and keep what comes out. `weights`: instead of the block's own."""
    block = context.graph.model.get_submodule(context.graph.blocks[index])
    # Other weights are the original's, and those have the original's inputs.
    computed = calibrating(context.products, context.dtype, context.devices.compute)
    with computed, present(context, index, {} if weights is not None else None):
        forwards = into.forwards(block, weights, index)
        for number, made in enumerate(context.bars.over(forwards, len(into.hidden), label)):
            into.keep(number, made().to(context.dtype))


def _block_statistics(
    context: Context,
    wanted: Wanted,
    index: int,
    chain: Activations | None,
    batches: Sequence[Tensor],
    beside: View | None,
) -> dict[str, Statistics]:
    """What is wanted of the inputs of a block's sites; where other blocks share one, also of theirs.

    `beside`: the block in the original model, where that is run along the chain too.
    """
    asked = [s for s in wanted.sites[index] if s.name in wanted.needs]
    alone = [s for s in asked if chain and not s.shared]
    seen = _inputs_of(context, wanted, alone, index, chain, batches, beside) if alone else {}
    others = [s for s in asked if s not in alone]
    if others:
        seen |= _inputs_of(context, wanted, others, index, None, batches)
    if seen:
        context.executor.reduce(seen)
    return seen


def _inputs_of(
    context: Context,
    wanted: Wanted,
    sites: Sequence[Site],
    index: int,
    chain: Activations | None,
    batches: Sequence[Tensor],
    beside: View | None = None,
) -> dict[str, Statistics]:
    """What is wanted of the inputs of some sites of a block: along the chain, or in passes of the whole model."""
    graph = context.graph
    needs = {s.name: wanted.needs[s.name] for s in sites}
    called = {s.name: multiplies(graph.model, s) for s in sites if not s.is_expert}
    modules = {name: list(map(graph.model.get_submodule, users)) for name, users in called.items() if users}
    experts = fused_parameters(graph.model, [s for s in sites if s.is_expert])
    whole = (partial(context.forward, batch) for batch in batches)
    block = graph.model.get_submodule(graph.blocks[index])
    forwards = chain.forwards(block, index=index) if chain else whole
    computed = calibrating(context.products, context.dtype, context.devices.compute)
    with computed, present(context, index) if chain else streamed(context):
        forwards = context.bars.over(forwards, len(batches), "collect: batches")
        before = context.executor.shares(sum(map(len, batches))).first if wanted.ranged else 0
        every = context.experts.calibrate_all
        drifting = wanted.drifting & modules.keys() if beside else frozenset()
        originals = beside.original.forwards(block, beside.original_values(), index) if beside and drifting else ()
        return collect.statistics(
            modules, needs, forwards, wanted.ranged, before, experts, every, drifting=drifting, originals=originals
        )


def fused_parameters(model: nn.Module, experts: Sequence[Site]) -> list[FusedParameter]:
    """The parameters that experts lie in, as they are watched while the model runs."""
    found: dict[str, list[Site]] = {}
    for site in experts:
        found.setdefault(site.parameter, []).append(site)
    made = []
    for parameter, sites in found.items():
        owner, _, leaf = parameter.rpartition(".")
        names = {site.ref.index[0]: site.name for site in sites}
        made.append(FusedParameter(model.get_submodule(owner), leaf, sites[0].shape[1], sites[0].ref.of, names))
    return made
