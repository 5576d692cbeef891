"""The block-sequential driver.

One block at a time is brought in, its inputs are summed up, the passes of the stage run on its sites, the result is
committed, and the outputs of the *compressed* block become the inputs of the next. Peak memory is one block, its
statistics and the activations of the calibration data, whatever the number of blocks.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from compress.calibration import collect
from compress.calibration.activation_cache import Activations
from compress.calibration.precision import products
from compress.checkpoint.artifact import Packed, finite
from compress.engine.block_view import View
from compress.engine.ledger import Record
from compress.engine.placement import make_room, present, set_value, streamed, take, value_of
from compress.engine.retry import solved
from compress.engine.stacking import split_rows, stack, stacks
from compress.engine.validate import observed, observed_vector
from compress.errors import SolveError, UnsupportedModelError
from compress.io.heap import bound_heap, give_back
from compress.io.keys import key_of
from compress.models.graph import forward
from compress.passes.base import Block, BlockPass, Edit, LinearPass, Target
from compress.passes.quantize.activations import attached

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from compress.calibration.reconstruct import Weights
    from compress.calibration.statistics import Need, Statistics
    from compress.encodings import Weight
    from compress.engine.placement import Context
    from compress.models.site import Site

TOKENS_AT_ONCE = 2048


def run_stage(
    context: Context, stage: int, passes: Sequence[LinearPass | BlockPass], batches: Sequence[Tensor], key: str
) -> tuple[str, list[Record]]:
    """Run one or several fused passes over every block; returns the last key and what was done to each site."""
    if any(isinstance(p, LinearPass) and p.surveys for p in passes):
        survey = _Survey(context, stage, passes, key)
        _sweep(context, survey, batches)
        passes = survey.allocated()
    run = _Stage(context, stage, passes, key)
    _sweep(context, run, batches)
    return run.key, run.records


def _sweep(context: Context, run: _Stage, batches: Sequence[Tensor]) -> None:
    graph, passes = context.graph, run.passes
    selected = {
        index: [s for s in graph.in_block(index) if any(p.selects(s.name, in_block=True) for p in passes)]
        for index in range(len(graph.blocks))
    }
    outside = [s for s in graph.outside if any(p.selects(s.name, in_block=False) for p in passes)]
    if run.calibrated:
        assert not outside, "the planner refuses calibrated passes outside the blocks"
        with torch.no_grad():
            _calibrated(context, run, selected, batches)
        return
    units = [*selected.items(), *([(-1, outside)] if outside else [])]
    for index, sites in context.bars.over(units, len(units), f"{run.label}: blocks"):
        run.unit(f"b{index:04d}" if index >= 0 else "outside", sites, dict)


def _calibrated(context: Context, run: _Stage, selected: dict[int, list[Site]], batches: Sequence[Tensor]) -> None:
    graph, bars = context.graph, context.bars
    blocks = [graph.model.get_submodule(name) for name in graph.blocks]
    if not context.resident:
        bound_heap()
    chain = chain_of(context, blocks, batches)
    original = None  # what arrives in the original model, beside what arrives in the compressed one
    if any(isinstance(p, BlockPass) and p.runs_block for p in run.passes):
        if chain is None:
            raise UnsupportedModelError(
                f"the blocks of {type(graph.model).__name__} do not simply feed one another, so {run.label} cannot "
                "learn them one by one; use a method that does not learn by reconstruction, such as gptq"
            )
        original = _original_chain(context, blocks, batches) or chain.copy()

    def step(into: Activations, index: int, weights: Weights | None, label: str) -> None:
        # Other weights are the original's, and those have the original's inputs.
        with products(context.products), present(context, index, {} if weights is not None else None):
            forwards = into.forwards(blocks[index], weights)
            for number, made in enumerate(bars.over(forwards, len(batches), label)):
                into.keep(number, made())

    for index in bars.over(range(len(blocks)), len(blocks), f"{run.label}: blocks"):
        sites = selected[index]

        def statistics(index: int = index, sites: list[Site] = sites) -> dict[str, Statistics]:
            ranged = {s.name for s in sites if run.ranged(s)}
            needs = {s.name: need for s in sites if (need := run.need(s)) != "none" or s.name in ranged}
            if not needs:
                return {}
            modules = {name: graph.model.get_submodule(name) for name in needs}
            whole = (partial(forward, graph, batch) for batch in batches)
            forwards = chain.forwards(blocks[index]) if chain else whole
            with products(context.products), present(context, index) if chain else streamed(context):
                forwards = bars.over(forwards, len(batches), "collect: batches")
                return collect.statistics(modules, needs, forwards, ranged)

        view = None
        if chain and original:
            outputs = original.copy()
            view = View(context, index, chain, original, outputs)
            step(outputs, index, view.original_values(), "original: batches")
            original = outputs
        run.unit(f"b{index:04d}", sites, statistics, view)
        if chain and index + 1 < len(blocks):
            step(chain, index, None, "propagate: batches")


def chain_of(context: Context, blocks: list[nn.Module], batches: Sequence[Tensor]) -> Activations | None:
    """What arrives at the first block, if the blocks may be run one after the other without the model around them."""
    graph = context.graph
    if graph.blocks == ("",) and isinstance(graph.model, PreTrainedModel):  # puts out more than a tensor
        return None
    with streamed(context):
        if graph.blocks != ("",) and not collect.is_chain(lambda: forward(graph, batches[0][:1]), blocks):
            return None
        arrivals = (collect.arrival(partial(forward, graph, batch), blocks[0]) for batch in batches)
        return Activations(context.bars.over(arrivals, len(batches), "embed: batches"), trim=not context.resident)


def _original_chain(context: Context, blocks: list[nn.Module], batches: Sequence[Tensor]) -> Activations | None:
    """What arrives at the first block of the original model, where something in front of it was compressed."""
    artifact = context.artifact
    inside = tuple(f"{name}." for name in context.graph.blocks)
    changed = [s.parameter for s in context.graph.outside if s.name in artifact.committed]
    changed += [name for name in artifact.vectors if not name.startswith(inside)]
    if not changed:
        return None
    now = {name: value_of(context, name) for name in changed if context.resident}
    plain = replace(context, artifact=artifact.plain())
    try:
        for name in now:
            set_value(context.graph.model, name, value_of(plain, name))
        return chain_of(plain, blocks, batches)
    finally:
        for name, value in now.items():
            set_value(context.graph.model, name, value)


class _Stage:
    """Runs the passes of a stage on the sites of one unit after the other, committing each unit."""

    def __init__(self, context: Context, number: int, passes: Sequence[LinearPass | BlockPass], key: str):
        self.context, self.number, self.passes = context, number, passes
        self.key = key
        self.records: list[Record] = []
        self.label = "+".join(p.key for p in passes)

    @property
    def calibrated(self) -> bool:
        """Whether any pass of the stage learns from data."""
        return any(p.calibrated for p in self.passes)

    def need(self, site: Site) -> Need:
        """The most that any pass of the stage needs to know about a site's inputs."""
        needs = {self.needs_of(p) for p in self.passes if p.selects(site.name, site.block is not None)}
        return "gram" if "gram" in needs else "norm" if "norm" in needs else "none"

    def needs_of(self, pass_: LinearPass | BlockPass) -> Need:
        """What one pass needs to know."""
        return pass_.needs

    def ranged(self, site: Site) -> bool:
        """Whether a pass of the stage fixes the grid of a site's inputs."""
        chosen = (p.at(site.name).input_form() for p in self.passes if p.selects(site.name, site.block is not None))
        return any(form is not None and form.static for form in chosen)

    def unit(
        self, name: str, sites: list[Site], statistics: Callable[[], dict[str, Statistics]], view: View | None = None
    ) -> None:
        """Do, or find done, one unit of work."""
        context = self.context
        options = [(p.key, p.options()) for p in self.passes]
        self.key = key_of(self.key, self.number, name, [s.name for s in sites], options)
        file = f"s{self.number:02d}-{name}"
        done = context.ledger.load(file, self.key)
        if done is None:
            found = statistics() if sites else {}
            weights: dict[str, Weight] = {}
            vectors: dict[str, Weight] = {}
            notes: dict[str, dict[str, Any]] = {s.name: {} for s in sites}
            for position, pass_ in enumerate(self.passes):
                chosen = [s for s in sites if pass_.selects(s.name, s.block is not None)]
                if isinstance(pass_, BlockPass):
                    if chosen or (view and not pass_.include and any(pass_.trains(n) for n in view.vectors())):
                        self._learn(pass_, position, name, chosen, view, found, weights, vectors, notes)
                    continue
                for group in stacks(pass_, chosen, found, self._is_masked(weights)):
                    self._apply(pass_, position, group, found, weights, vectors, notes)
                    if pass_ is self.passes[-1]:
                        for site in group:  # the last to use them
                            found.pop(site.name, None)
            records = [Record(s.name, weights[s.name], notes[s.name]) for s in sites]
            records += [Record(name, weight, notes.get(name, {})) for name, weight in vectors.items()]
            del found, weights
            done = context.ledger.commit(file, self.key, records)
        self.records += done
        take(context, done)

    def _is_masked(self, weights: dict[str, Weight]) -> Callable[[Site], bool]:
        """Whether a site has a mask now: from this unit's earlier passes, or committed by an earlier stage."""

        def masked(site: Site) -> bool:
            now = weights.get(site.name) or self.context.artifact.committed.get(site.name)
            return (now.spec.kept if isinstance(now, Packed) else now and now.mask) is not None

        return masked

    def _apply(
        self,
        pass_: LinearPass,
        position: int,
        group: list[Site],
        found: dict[str, Statistics],
        weights: dict[str, Weight],
        vectors: dict[str, Weight],
        notes: dict[str, dict[str, Any]],
    ) -> None:
        if found:  # a data-free pass never holds enough for it to pay
            give_back()
        started = time.perf_counter()
        for site in group:  # read no earlier than needed: one stack in memory, not the whole block
            weights.setdefault(site.name, self.context.artifact.weight(site))
        before = [weights[s.name] for s in group]
        target = self._target(pass_, position, group, before, found.get(group[0].name))
        compared = target.weight if target.original is None else target.original
        dense = torch.split(compared, [s.shape[0] for s in group])
        with products(self.context.products):
            edit, fallback = solved(pass_.at(group[0].name), target)
        seconds = time.perf_counter() - started
        for site, was, old, part in zip(group, before, dense, split_rows(edit, group), strict=True):
            weights[site.name], error = observed(site, pass_, was, old, part, self.context.artifact.store_dtype(site))
            note: dict[str, Any] = {"error": error, "seconds": round(seconds / len(group), 4), **part.notes}
            weights[site.name], rounding = attached(pass_.at(site.name), weights[site.name], target.statistics)
            if part.shift is not None:
                bias = f"{site.name}.bias"
                make_room(self.context, bias)
                shifted = Edit(weight=self._vector(bias, vectors) + part.shift)
                vectors[bias] = self._observed_vector(pass_, bias, shifted, vectors)
            notes[site.name][pass_.key] = _joined(note, fallback, rounding)

    def _target(
        self, pass_: LinearPass, position: int, group: list[Site], now: list[Weight], seen: Statistics | None
    ) -> Target:
        """What a pass works on: sites stacked row upon row."""
        context, first = self.context, group[0]
        masks = [w.mask for w in now if w.mask is not None]
        return Target(
            stack([finite(s, w) for s, w in zip(group, now, strict=True)]),
            stack(masks) if masks else None,
            seen,
            generator_for(context.seed, self.number, position, first.name),
            first.kernel,
            context.graph.rows_of(first.name) if len(group) == 1 else None,
            original=stack([context.artifact.original(s).float() for s in group]) if pass_.compares else None,
            stored=now[0] if len(now) == 1 else None,
        )

    def _vector(self, name: str, vectors: dict[str, Weight]) -> Tensor:
        """A vector as it stands now, float32: from this unit's earlier passes, or committed."""
        made = vectors.get(name)
        if made is None:
            return self.context.artifact.tensor(name).float()
        assert made.values is not None
        return made.values[0].float()

    def _made(self, vectors: dict[str, Weight]) -> dict[str, Tensor]:
        """The vectors that earlier passes of the unit made."""
        return {name: self._vector(name, vectors) for name in vectors}

    def _observed_vector(
        self, pass_: LinearPass | BlockPass, name: str, edit: Edit, vectors: dict[str, Weight]
    ) -> Weight:
        before = self._vector(name, vectors)
        return observed_vector(name, pass_, before, edit, self.context.artifact.vector_dtype(name))

    def _learn(
        self,
        pass_: BlockPass,
        position: int,
        unit: str,
        chosen: list[Site],
        view: View | None,
        found: dict[str, Statistics],
        weights: dict[str, Weight],
        vectors: dict[str, Weight],
        notes: dict[str, dict[str, Any]],
    ) -> None:
        context = self.context
        started = time.perf_counter()
        learned = {s.name for s in chosen}
        if pass_.adds_biases:
            for site in chosen:
                make_room(context, f"{site.name}.bias")
        names = [n for n in view.vectors() if pass_.trains(n)] if view else []
        fixed = {n: w.dequantize() for n, w in weights.items() if n not in learned}
        before = {s.name: weights.get(s.name) or context.artifact.weight(s) for s in chosen}
        dense = {s.name: finite(s, before[s.name]) for s in chosen}

        def target(name: str) -> Target:
            generator = generator_for(context.seed, self.number, position, name)
            kernel = context.artifact.sites[name].kernel
            rows = context.graph.rows_of(name)
            now, site = before[name], context.artifact.sites[name]
            original = context.artifact.original(site).float() if pass_.compares else None
            return Target(
                dense[name], now.mask, found.get(name), generator, kernel, rows, original=original, stored=now
            )

        targets = {name: target(name) for name in before}
        generator = generator_for(context.seed, self.number, position, unit)
        fallback = None
        try:
            with products(context.products), view.ready(learned, weights) if view else nullcontext():
                given = {n: self._vector(n, vectors) for n in names}
                data = view.data({**fixed, **self._made(vectors)}) if view else None
                parts = partial(view.parts, fixed={**fixed, **self._made(vectors)}) if view else None
                edits = dict(pass_.run(Block(targets, data, generator, context.bars.over, given, parts)))
        except SolveError as error:
            edits = {name: pass_.at(name).fallback().run(target) for name, target in targets.items()}
            fallback = f"{pass_.fallback().key} instead of {pass_.key}: {error}"
        seconds = time.perf_counter() - started
        for name in [n for n in edits if n not in learned]:
            vectors[name] = self._observed_vector(pass_, name, edits[name], vectors)
            notes.setdefault(name, {})[pass_.key] = dict(edits[name].notes)
        for site in chosen:
            name, edit = site.name, edits[site.name]
            store = context.artifact.store_dtype(site)
            weights[name], lost = observed(site, pass_, before[name], dense[name], edit, store)
            note: dict[str, Any] = {"error": lost, "seconds": round(seconds / len(chosen), 4), **edit.notes}
            weights[name], rounding = attached(pass_.at(name), weights[name], found.get(name))
            notes[name][pass_.key] = _joined(note, fallback, rounding)


class _Survey(_Stage):
    """Shows every matrix to the passes of a stage that ask for it, and changes nothing."""

    def __init__(self, context: Context, number: int, passes: Sequence[LinearPass | BlockPass], key: str):
        asking = [p for p in passes if isinstance(p, LinearPass) and p.surveys]
        super().__init__(context, number, asking, key_of(key, "survey"))
        self.asking, self.all = asking, passes
        self.label = f"{self.label}: survey"
        self.found: list[dict[str, Any]] = [{} for _ in asking]

    @property
    def calibrated(self) -> bool:
        return any(p.survey_needs != "none" for p in self.asking)

    def needs_of(self, pass_: LinearPass | BlockPass) -> Need:
        return pass_.survey_needs if isinstance(pass_, LinearPass) else pass_.needs

    def ranged(self, site: Site) -> bool:
        return False

    def allocated(self) -> list[LinearPass | BlockPass]:
        """The passes of the stage as the survey would have them."""
        now = {id(p): p.allocated(found) for p, found in zip(self.asking, self.found, strict=True)}
        return [now.get(id(p), p) for p in self.all]

    def unit(
        self, name: str, sites: list[Site], statistics: Callable[[], dict[str, Statistics]], view: View | None = None
    ) -> None:
        context = self.context
        self.key = key_of(
            self.key, self.number, name, [s.name for s in sites], [(p.key, p.options()) for p in self.asking]
        )
        file = f"s{self.number:02d}-survey-{name}"
        row = context.ledger.load_row(file, self.key)
        if row is None:
            seen = statistics() if sites else {}
            row = {str(i): {} for i in range(len(self.asking))}
            for i, pass_ in enumerate(self.asking):
                for site in (s for s in sites if pass_.selects(s.name, s.block is not None)):
                    target = self._target(pass_, i, [site], [context.artifact.weight(site)], seen.get(site.name))
                    row[str(i)][site.name] = pass_.at(site.name).survey(target)
            context.ledger.commit_row(file, self.key, row)
        for i, found in enumerate(self.found):
            found.update(row[str(i)])


def _joined(note: dict[str, Any], fallback: str | None, rounding: dict[str, str]) -> dict[str, Any]:
    """What a pass did, what was done instead of it, and how inputs are rounded."""
    reasons = [reason for reason in (fallback, rounding.get("fallback")) if reason]
    return {**note, **rounding, **({"fallback": "; ".join(reasons)} if reasons else {})}


def generator_for(seed: int, stage: int, position: int, name: str) -> torch.Generator:
    """Randomness of one pass on one site or block."""
    number = int(key_of(seed, stage, position, name)[:15], 16)
    return torch.Generator().manual_seed(number)
