"""The block-sequential driver: the only file that knows which weights are in memory.

One block at a time is brought in, its inputs are summed up, the passes of the stage run on its sites, the result is
committed, and the outputs of the *compressed* block become the inputs of the next. Peak memory is one block, its
statistics and the activations of the calibration data, whatever the number of blocks.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.activations import Activations, give_back
from compress.artifact import Artifact, Packed
from compress.calibration import collect
from compress.calibration.precision import Products, products
from compress.calibration.reconstruct import BlockData, Weights
from compress.calibration.statistics import Need, Statistics
from compress.encodings import Inputs, Weight
from compress.errors import SolveError, UnsupportedModelError
from compress.graph import Graph, Site
from compress.ledger import MemoryLedger, Record, key_of
from compress.observe import finite, observed
from compress.passes.base import Block, BlockPass, LinearPass, Target
from compress.passes.quantize.activations import attached
from compress.progress import Bars
from compress.solve import solved
from compress.stacks import split_rows, stack, stacks

TOKENS_AT_ONCE = 2048


@dataclass
class Context:
    """What a stage needs besides its passes.

    Attributes:
        resident: the model is in memory already; nothing is brought in or evicted, and results are set in place.
        dtype: the type that calibration and evaluation compute in.
        products: how float32 matrices are multiplied while calibrating.
    """

    artifact: Artifact
    ledger: MemoryLedger
    seed: int
    dtype: torch.dtype
    products: Products
    resident: bool
    bars: Bars

    @property
    def graph(self) -> Graph:
        """The model's structure."""
        return self.artifact.graph


def forward(graph: Graph, batch: Tensor) -> Any:
    """Run the model on a batch of token ids, of images or, for other modules, of inputs."""
    if graph.is_language_model:
        return graph.model(input_ids=batch, use_cache=False)
    batch = batch.clone()  # a first layer may work in place
    return graph.model(pixel_values=batch) if graph.is_image_model else graph.model(batch)


# --- which weights are in memory -------------------------------------------------------------------------------------


def bring_in(context: Context, prefix: str, module: nn.Module) -> None:
    """Give every parameter of `module` its value as it stands now."""
    for name, parameter in list(module.named_parameters(prefix=prefix)):
        if parameter.is_meta:
            _set(context.graph.model, name, _value(context, name))


def _value(context: Context, name: str) -> Tensor:
    value = context.artifact.tensor(name)
    return value.to(context.dtype) if value.is_floating_point() else value


def evict(context: Context, prefix: str, module: nn.Module) -> None:
    """Forget the parameters of `module` again."""
    for name, parameter in list(module.named_parameters(prefix=prefix)):
        _set(context.graph.model, name, parameter.to("meta"))


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def set_in_place(context: Context, record: Record) -> None:
    """Give a site that is in memory its committed weight."""
    site = context.artifact.sites[record.site]
    weight = record.weight.load() if isinstance(record.weight, Packed) else record.weight
    _set(context.graph.model, site.parameter, site.value(weight.dequantize().to(context.dtype)))


@contextmanager
def streamed(context: Context) -> Iterator[None]:
    """While open, the model can be called: every part is brought in when it runs and evicted when it is done."""
    with _rounded(context, _grids(context, context.graph.sites)), _streamed(context):
        yield


@contextmanager
def _streamed(context: Context) -> Iterator[None]:
    if context.resident:
        yield
        return
    model = context.graph.model
    for name in context.graph.buffers:  # small: they stay
        _set(model, name, _value(context, name))
    parts = {name: model.get_submodule(name) for name in context.graph.blocks}
    inside = tuple(f"{name}." for name in context.graph.blocks)
    for name, module in model.named_modules():
        if module._parameters and name not in parts and not name.startswith(inside):
            parts[name] = module
    with collect.around(
        parts, lambda name: bring_in(context, name, parts[name]), lambda name: evict(context, name, parts[name])
    ):
        yield


def _grids(context: Context, sites: Iterable[Site], now: Mapping[str, Weight] | None = None) -> dict[str, Inputs]:
    """The grids of the sites' inputs, as `now` has them where it does, else as committed."""
    found = {s.name: now[s.name].inputs if now and s.name in now else context.artifact.inputs(s.name) for s in sites}
    return {name: inputs for name, inputs in found.items() if inputs is not None}


def _rounded(context: Context, grids: Mapping[str, Inputs]) -> AbstractContextManager[None]:
    """While open, inputs of these sites are rounded."""
    return collect.quantized_inputs({context.graph.model.get_submodule(n): i.apply for n, i in grids.items()})


# --- one stage -------------------------------------------------------------------------------------------------------


def run_stage(
    context: Context, stage: int, passes: Sequence[LinearPass | BlockPass], batches: Sequence[Tensor], key: str
) -> tuple[str, list[Record]]:
    """Run one or several fused passes over every block; returns the last key and what was done to each site."""
    graph = context.graph
    selected = {
        index: [s for s in graph.in_block(index) if any(p.selects(s.name, in_block=True) for p in passes)]
        for index in range(len(graph.blocks))
    }
    outside = [s for s in graph.outside if any(p.selects(s.name, in_block=False) for p in passes)]
    stage_run = _Stage(context, stage, passes, key)
    if not any(p.calibrated for p in passes):
        units = [*selected.items(), *([(-1, outside)] if outside else [])]
        for index, sites in context.bars.over(units, len(units), f"{stage_run.label}: blocks"):
            stage_run.unit(f"b{index:04d}" if index >= 0 else "outside", sites, dict)
        return stage_run.key, stage_run.records
    assert not outside, "the planner refuses calibrated passes outside the blocks"
    with torch.no_grad():
        _calibrated(context, stage_run, selected, batches)
    return stage_run.key, stage_run.records


def _calibrated(context: Context, run: "_Stage", selected: dict[int, list[Site]], batches: Sequence[Tensor]) -> None:
    graph, bars = context.graph, context.bars
    blocks = [graph.model.get_submodule(name) for name in graph.blocks]
    chain = _chain(context, blocks, batches)
    original = None  # what arrives in the original model, beside what arrives in the compressed one
    if any(isinstance(p, BlockPass) for p in run.passes):
        if chain is None:
            raise UnsupportedModelError(
                f"the blocks of {type(graph.model).__name__} do not simply feed one another, so {run.label} cannot "
                "learn them one by one; use a method that does not learn by reconstruction, such as gptq"
            )
        original = _original_chain(context, blocks, batches) or chain.copy()

    def step(into: Activations, index: int, weights: Weights | None, label: str) -> None:
        # Other weights are the original's, and those have the original's inputs.
        with products(context.products), _present(context, index, {} if weights is not None else None):
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
            with products(context.products), _present(context, index) if chain else streamed(context):
                forwards = bars.over(forwards, len(batches), "collect: batches")
                return collect.statistics(modules, needs, forwards, ranged)

        view = None
        if chain and original:
            outputs = original.copy()
            read = context.artifact.original
            values = {s.parameter: s.value(read(s)).to(context.dtype) for s in graph.in_block(index)}
            step(outputs, index, _inside(context, index, values), "original: batches")
            view = _View(context, index, chain, original, outputs)
            original = outputs
        run.unit(f"b{index:04d}", sites, statistics, view)
        if chain and index + 1 < len(blocks):
            step(chain, index, None, "propagate: batches")


def _chain(context: Context, blocks: list[nn.Module], batches: Sequence[Tensor]) -> Activations | None:
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
    changed = [s for s in context.graph.outside if s.name in artifact.committed]
    if not changed:
        return None
    now = {s.parameter: _value(context, s.parameter) for s in changed if context.resident}
    plain = replace(context, artifact=replace(artifact, committed={}))
    try:
        for name in now:
            _set(context.graph.model, name, _value(plain, name))
        return _chain(plain, blocks, batches)
    finally:
        for name, value in now.items():
            _set(context.graph.model, name, value)


def _inside(context: Context, index: int, values: Weights) -> dict[str, Tensor]:
    """Parameter names as the block itself knows them."""
    prefix = f"{context.graph.blocks[index]}."
    return {name.removeprefix(prefix): value for name, value in values.items()}


@dataclass(frozen=True)
class _View:
    """A block as a BlockPass may run it."""

    context: Context
    index: int
    chain: Activations
    original: Activations
    outputs: Activations

    def data(self, fixed: Weights) -> BlockData:
        """`fixed`: (out, in) weights of sites that other passes of the stage have changed already."""
        context = self.context
        block = context.graph.model.get_submodule(context.graph.blocks[self.index])

        def call(weights: Weights, hidden: Tensor, numbers: Tensor) -> Tensor:
            sites = context.artifact.sites
            now = {**fixed, **weights}
            values = {sites[n].parameter: sites[n].value(w).to(context.dtype) for n, w in now.items()}
            return self.chain.call_for(len(numbers)).run(block, hidden, _inside(context, self.index, values))

        return BlockData(call, self.chain.samples(), self.original.samples(), self.outputs.samples())


@contextmanager
def _present(context: Context, index: int, grids: Mapping[str, Inputs] | None = None) -> Iterator[None]:
    """While open, a block's parameters are in memory. They are not while its matrices are being solved.

    Inputs are rounded to `grids`, by default to those that are committed.
    """
    name = context.graph.blocks[index]
    block = context.graph.model.get_submodule(name)
    if not context.resident:
        bring_in(context, name, block)
    try:
        with _rounded(context, _grids(context, context.graph.in_block(index)) if grids is None else grids):
            yield
    finally:
        if not context.resident:
            evict(context, name, block)


class _Stage:
    """Runs the passes of a stage on the sites of one unit after the other, committing each unit."""

    def __init__(self, context: Context, number: int, passes: Sequence[LinearPass | BlockPass], key: str):
        self.context, self.number, self.passes = context, number, passes
        self.key = key
        self.records: list[Record] = []
        self.label = "+".join(p.key for p in passes)

    def need(self, site: Site) -> Need:
        """The most that any pass of the stage needs to know about a site's inputs."""
        needs = {p.needs for p in self.passes if p.selects(site.name, site.block is not None)}
        return "gram" if "gram" in needs else "norm" if "norm" in needs else "none"

    def ranged(self, site: Site) -> bool:
        """Whether a pass of the stage fixes the grid of a site's inputs."""
        chosen = (p.at(site.name).input_form() for p in self.passes if p.selects(site.name, site.block is not None))
        return any(form is not None and form.static for form in chosen)

    def unit(
        self, name: str, sites: list[Site], statistics: Callable[[], dict[str, Statistics]], view: _View | None = None
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
            notes: dict[str, dict[str, Any]] = {s.name: {} for s in sites}
            for position, pass_ in enumerate(self.passes):
                chosen = [s for s in sites if pass_.selects(s.name, s.block is not None)]
                if isinstance(pass_, BlockPass):
                    if chosen and view:
                        self._learn(pass_, position, name, chosen, view, found, weights, notes)
                    continue
                for group in stacks(pass_, chosen, found, self._is_masked(weights)):
                    self._apply(pass_, position, group, found, weights, notes)
                    if pass_ is self.passes[-1]:
                        for site in group:  # the last to use them
                            found.pop(site.name, None)
            records = [Record(s.name, weights[s.name], notes[s.name]) for s in sites]
            del found, weights
            done = context.ledger.commit(file, self.key, records)
        self.records += done
        for record in done:
            context.artifact.committed[record.site] = record.weight
            if context.resident:
                set_in_place(context, record)

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
        notes: dict[str, dict[str, Any]],
    ) -> None:
        if found:  # a data-free pass never holds enough for it to pay
            give_back()
        started = time.perf_counter()
        for site in group:  # read no earlier than needed: one stack in memory, not the whole block
            weights.setdefault(site.name, self.context.artifact.weight(site))
        before = [weights[s.name] for s in group]
        stacked = stack([finite(s, w) for s, w in zip(group, before, strict=True)])
        dense = torch.split(stacked, [s.shape[0] for s in group])
        masks = [w.mask for w in before if w.mask is not None]
        target = Target(
            stacked,
            stack(masks) if masks else None,
            found.get(group[0].name),
            _generator(self.context.seed, self.number, position, group[0].name),
            group[0].kernel,
        )
        edit, fallback = solved(pass_.at(group[0].name), target)
        seconds = time.perf_counter() - started
        for site, was, old, part in zip(group, before, dense, split_rows(edit, group), strict=True):
            weights[site.name], error = observed(site, pass_, was, old, part, self.context.artifact.store_dtype(site))
            note: dict[str, Any] = {"error": error, "seconds": round(seconds / len(group), 4), **part.notes}
            weights[site.name], rounding = attached(pass_.at(site.name), weights[site.name], target.statistics)
            notes[site.name][pass_.key] = _joined(note, fallback, rounding)

    def _learn(
        self,
        pass_: BlockPass,
        position: int,
        unit: str,
        chosen: list[Site],
        view: _View,
        found: dict[str, Statistics],
        weights: dict[str, Weight],
        notes: dict[str, dict[str, Any]],
    ) -> None:
        context = self.context
        started = time.perf_counter()
        learned = {s.name for s in chosen}
        fixed = {n: w.dequantize() for n, w in weights.items() if n not in learned}
        # A weight is learned on inputs that are not rounded for it, and on those rounded for the layers before it.
        grids = _grids(context, (s for s in context.graph.in_block(view.index) if s.name not in learned), weights)
        before = {s.name: weights.get(s.name) or context.artifact.weight(s) for s in chosen}
        dense = {s.name: finite(s, before[s.name]) for s in chosen}

        def target(name: str) -> Target:
            generator = _generator(context.seed, self.number, position, name)
            kernel = context.artifact.sites[name].kernel
            return Target(dense[name], before[name].mask, found.get(name), generator, kernel)

        targets = {name: target(name) for name in before}
        generator = _generator(context.seed, self.number, position, unit)
        fallback = None
        try:
            with products(context.products), _present(context, view.index, grids):
                edits = dict(pass_.run(Block(targets, view.data(fixed), generator, context.bars.over)))
        except SolveError as error:
            edits = {name: pass_.at(name).fallback().run(target) for name, target in targets.items()}
            fallback = f"{pass_.fallback().key} instead of {pass_.key}: {error}"
        seconds = time.perf_counter() - started
        for site in chosen:
            name, edit = site.name, edits[site.name]
            store = context.artifact.store_dtype(site)
            weights[name], lost = observed(site, pass_, before[name], dense[name], edit, store)
            note: dict[str, Any] = {"error": lost, "seconds": round(seconds / len(chosen), 4), **edit.notes}
            weights[name], rounding = attached(pass_.at(name), weights[name], found.get(name))
            notes[name][pass_.key] = _joined(note, fallback, rounding)


def _joined(note: dict[str, Any], fallback: str | None, rounding: dict[str, str]) -> dict[str, Any]:
    """What a pass did, what was done instead of it, and how inputs are rounded."""
    reasons = [reason for reason in (fallback, rounding.get("fallback")) if reason]
    return {**note, **rounding, **({"fallback": "; ".join(reasons)} if reasons else {})}


def _generator(seed: int, stage: int, position: int, name: str) -> torch.Generator:
    number = int(key_of(seed, stage, position, name)[:15], 16)
    return torch.Generator().manual_seed(number)


__all__ = ["Context", "bring_in", "evict", "forward", "run_stage", "set_in_place", "solved", "streamed"]
