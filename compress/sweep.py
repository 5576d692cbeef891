"""The block-sequential driver: the only file that knows which weights are in memory.

One block at a time is brought in, its inputs are summed up, the passes of the stage run on its sites, the result is
committed, and the outputs of the *compressed* block become the inputs of the next. Peak memory is one block, its
statistics and the activations of the calibration data, whatever the number of blocks.
"""

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifact import Artifact, Packed
from compress.calibration import collect
from compress.calibration.precision import Products, products
from compress.calibration.statistics import Need, Statistics
from compress.encodings import Weight
from compress.errors import SolveError
from compress.graph import Graph, Site
from compress.ledger import MemoryLedger, Record, key_of
from compress.observe import finite, observed
from compress.passes.base import Edit, LinearPass, Target
from compress.progress import Bars

LARGEST_BUFFER = 1 << 30  # bytes of activations kept in memory; more is memory-mapped to a temporary file
MORE_DAMPING = (1.0, 10.0, 100.0)
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
    """Run the model on a batch of token ids (or, for other modules, of inputs)."""
    if graph.is_language_model:
        return graph.model(input_ids=batch, use_cache=False)
    return graph.model(batch)


# --- which weights are in memory -------------------------------------------------------------------------------------


def bring_in(context: Context, prefix: str, module: nn.Module) -> None:
    """Give every parameter of `module` its value as it stands now."""
    for name, parameter in list(module.named_parameters(prefix=prefix)):
        if parameter.is_meta:
            value = context.artifact.parameter(name)
            _set(context.graph.model, name, value.to(context.dtype) if value.is_floating_point() else value)


def evict(context: Context, prefix: str, module: nn.Module) -> None:
    """Forget the parameters of `module` again."""
    for name, parameter in list(module.named_parameters(prefix=prefix)):
        _set(context.graph.model, name, parameter.to("meta"))


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def set_in_place(context: Context, record: Record) -> None:
    """Give a site that is in memory its committed weight."""
    site = context.artifact.sites[record.site]
    weight = record.weight.load() if isinstance(record.weight, Packed) else record.weight
    _set(context.graph.model, site.parameter, site.value(weight.dequantize().to(context.dtype)))


@contextmanager
def streamed(context: Context) -> Iterator[None]:
    """While open, the model can be called: every part is brought in when it runs and evicted when it is done."""
    if context.resident:
        yield
        return
    model = context.graph.model
    parts = {name: model.get_submodule(name) for name in context.graph.blocks}
    inside = tuple(f"{name}." for name in context.graph.blocks)
    for name, module in model.named_modules():
        if module._parameters and name not in parts and not name.startswith(inside):
            parts[name] = module
    with collect.around(
        parts, lambda name: bring_in(context, name, parts[name]), lambda name: evict(context, name, parts[name])
    ):
        yield


# --- one stage -------------------------------------------------------------------------------------------------------


def run_stage(
    context: Context, stage: int, passes: Sequence[LinearPass], batches: Sequence[Tensor], key: str
) -> tuple[str, list[Record]]:
    """Run one or several fused passes over every block; returns the last key and what was done to each site."""
    graph = context.graph
    selected = {
        index: [s for s in graph.in_block(index) if any(p.selects(s.name, in_block=True) for p in passes)]
        for index in range(len(graph.blocks))
    }
    outside = [s for s in graph.outside if any(p.selects(s.name, in_block=False) for p in passes)]
    stage_run = _Stage(context, stage, passes, key)
    if all(p.needs == "none" for p in passes):
        units = [*selected.items(), *([(-1, outside)] if outside else [])]
        for index, sites in context.bars.over(units, len(units), f"{stage_run.label}: blocks"):
            stage_run.unit(f"b{index:04d}" if index >= 0 else "outside", sites, dict)
        return stage_run.key, stage_run.records
    assert not outside, "the planner refuses calibrated passes outside the blocks"
    with torch.no_grad():
        _calibrated(context, stage_run, selected, batches)
    return stage_run.key, stage_run.records


def _calibrated(context: Context, run: "_Stage", selected: dict[int, list[Site]], batches: Sequence[Tensor]) -> None:
    graph = context.graph
    blocks = [graph.model.get_submodule(name) for name in graph.blocks]
    if graph.blocks == ("",):
        chain = None
    else:
        with streamed(context):
            whole = collect.is_chain(lambda: forward(graph, batches[0][:1]), blocks)
        chain = _Activations(context, batches, blocks[0]) if whole else None
    bars = context.bars
    for index in bars.over(range(len(blocks)), len(blocks), f"{run.label}: blocks"):
        sites = selected[index]

        def statistics(index: int = index, sites: list[Site] = sites) -> dict[str, Statistics]:
            modules = {s.name: graph.model.get_submodule(s.name) for s in sites}
            needs = {s.name: run.need(s) for s in sites}
            whole = (partial(forward, graph, batch) for batch in batches)
            forwards = chain.forwards(blocks[index]) if chain else whole
            with products(context.products), _present(context, index) if chain else streamed(context):
                return collect.statistics(modules, needs, bars.over(forwards, len(batches), "collect: batches"))

        run.unit(f"b{index:04d}", sites, statistics)
        if chain and index + 1 < len(blocks):
            with products(context.products), _present(context, index):
                forwards = chain.forwards(blocks[index])
                for number, step in enumerate(bars.over(forwards, len(batches), "propagate: batches")):
                    chain.keep(number, step())


@contextmanager
def _present(context: Context, index: int) -> Iterator[None]:
    """While open, a block's parameters are in memory. They are not while its matrices are being solved."""
    name = context.graph.blocks[index]
    block = context.graph.model.get_submodule(name)
    if not context.resident:
        bring_in(context, name, block)
    yield
    if not context.resident:
        evict(context, name, block)


class _Activations:
    """The hidden states every calibration batch arrives with at the block that comes next."""

    def __init__(self, context: Context, batches: Sequence[Tensor], first: nn.Module):
        self.resident = context.resident
        self.calls: list[collect.Call] = []
        self.hidden: list[Tensor] = []
        self.buffers: dict[int, Tensor] = {}
        size = 0
        with streamed(context):
            for batch in context.bars.over(batches, len(batches), "embed: batches"):
                hidden, call = collect.arrival(partial(forward, context.graph, batch), first)
                size += hidden.nbytes
                self.calls.append(call)
                if size > LARGEST_BUFFER:
                    hidden = self.buffers[len(self.hidden)] = _mapped(hidden)
                self.hidden.append(hidden)

    def forwards(self, block: nn.Module) -> Iterator[Callable[[], Tensor]]:
        for number, call in enumerate(self.calls):
            yield partial(call.run, block, self.hidden[number])
            if not self.resident:
                _give_back()

    def keep(self, number: int, output: Tensor) -> None:
        # Only memory of our own is written to: what arrived may be the caller's tensor, or another block's argument.
        buffer = self.buffers.get(number)
        if buffer is not None and buffer.shape == output.shape and buffer.dtype == output.dtype:
            buffer.copy_(output)
        else:
            self.hidden[number] = output


def _mapped(hidden: Tensor) -> Tensor:
    """The same values in an unnamed temporary file that the system may page out."""
    with tempfile.NamedTemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a fault later
            os.posix_fallocate(file.fileno(), 0, hidden.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype)
    return mapped.view(hidden.shape).copy_(hidden)


class _Stage:
    """Runs the passes of a stage on the sites of one unit after the other, committing each unit."""

    def __init__(self, context: Context, number: int, passes: Sequence[LinearPass], key: str):
        self.context, self.number, self.passes = context, number, passes
        self.key = key
        self.records: list[Record] = []
        self.label = "+".join(p.key for p in passes)

    def need(self, site: Site) -> Need:
        """The most that any pass of the stage needs to know about a site's inputs."""
        needs = {p.needs for p in self.passes if p.selects(site.name, site.block is not None)}
        return "gram" if "gram" in needs else "norm" if "norm" in needs else "none"

    def unit(self, name: str, sites: list[Site], statistics: Callable[[], dict[str, Statistics]]) -> None:
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
                for group in _stacks(pass_, chosen, found, self._is_masked(weights)):
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
            _give_back()
        started = time.perf_counter()
        for site in group:  # read no earlier than needed: one stack in memory, not the whole block
            weights.setdefault(site.name, self.context.artifact.weight(site))
        before = [weights[s.name] for s in group]
        stacked = _stack([finite(s, w) for s, w in zip(group, before, strict=True)])
        dense = torch.split(stacked, [s.shape[0] for s in group])
        masks = [w.mask for w in before if w.mask is not None]
        target = Target(
            stacked,
            _stack(masks) if masks else None,
            found.get(group[0].name),
            _generator(self.context.seed, self.number, position, group[0].name),
        )
        edit, fallback = solved(pass_.at(group[0].name), target)
        seconds = time.perf_counter() - started
        for site, was, old, part in zip(group, before, dense, _split_rows(edit, group), strict=True):
            weights[site.name], error = observed(site, pass_, was, old, part, self.context.artifact.store_dtype(site))
            note: dict[str, Any] = {"error": error, "seconds": round(seconds / len(group), 4), **part.notes}
            if fallback:
                note["fallback"] = fallback
            notes[site.name][pass_.key] = note


def solved(pass_: LinearPass, target: Target) -> tuple[Edit, str | None]:
    """Run a pass; on failure with more damping, then its fallback. Says in words what was done instead, or None."""
    reason = ""
    damping = getattr(pass_, "damping", None)
    helps = isinstance(damping, int | float) and target.statistics is not None
    for factor in MORE_DAMPING if helps else MORE_DAMPING[:1]:
        options: dict[str, Any] = {"damping": float(damping or 0) * factor} if helps else {}
        try:
            return replace(pass_, **options).run(target), f"damping x{factor:g}: {reason}" if reason else None
        except SolveError as error:
            reason = str(error)
    other = pass_.fallback()
    return other.run(target), f"{other.key} instead of {pass_.key}: {reason}"


# --- stacking: rows are independent, so matrices fed by the same input are solved as one ------------------------------


def _stacks(
    pass_: LinearPass, sites: list[Site], found: dict[str, Statistics], masked: Callable[[Site], bool]
) -> list[list[Site]]:
    def fits(a: Site, b: Site) -> bool:
        fed_alike = found.get(a.name) is not None and found.get(a.name) is found.get(b.name)
        return (
            fed_alike and masked(a) == masked(b) and pass_.at(a.name).rowwise and pass_.at(a.name) == pass_.at(b.name)
        )

    stacks: list[list[Site]] = []
    for site in sites:
        for stack in stacks:
            if fits(stack[0], site):
                stack.append(site)
                break
        else:
            stacks.append([site])
    return stacks


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split_rows(edit: Edit, group: list[Site]) -> list[Edit]:
    if len(group) == 1:
        return [edit]
    parts, start = [], 0
    for site in group:
        rows = slice(start, start + site.shape[0])
        start = rows.stop
        e = None if edit.encoding is None else edit.encoding.rows(rows)
        weight = None if edit.weight is None else edit.weight[rows]
        parts.append(replace(edit, weight=weight, mask=None if edit.mask is None else edit.mask[rows], encoding=e))
    return parts


def _give_back() -> None:
    """Freed memory goes back to the system: glibc keeps pieces of up to 32 MB, which add up to more than a block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _generator(seed: int, stage: int, position: int, name: str) -> torch.Generator:
    number = int(key_of(seed, stage, position, name)[:15], 16)
    return torch.Generator().manual_seed(number)


__all__ = ["Context", "bring_in", "evict", "forward", "run_stage", "set_in_place", "solved", "streamed"]
