"""Which weights are in memory: the only file that knows.

A model too large for memory has its parameters on the meta device. They are brought in for as long as they are needed
and forgotten again; a model that a caller holds in memory stays there, and results are set in place.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from compress.calibration import collect
from compress.encodings import Weight
from compress.engine.context import piece_made, value_of
from compress.io.heap import give_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.encodings import InputGrid
    from compress.engine.context import Context
    from compress.engine.ledger import Record
    from compress.models.graph import Graph
    from compress.models.site import Site

    Hold = Callable[[], AbstractContextManager[None]]  # while open, parts of the model stay in memory


def bring_in(context: Context, prefix: str, module: nn.Module) -> None:
    """Give every parameter of `module` its value as it stands now."""
    for name, parameter in list(module.named_parameters(prefix=prefix)):
        if parameter.is_meta:
            set_value(context.graph.model, name, value_of(context, name))


def bring_buffers(context: Context) -> None:
    """Give every buffer its value, where is computed. They are small: they stay there."""
    model = context.graph.model
    for name, buffer in list(model.named_buffers()):
        if name in context.graph.buffers:
            set_value(model, name, value_of(context, name))
        else:  # of no checkpoint, but computed when the model was built
            set_value(model, name, context.devices.to_compute(buffer))


def evict(context: Context, prefix: str, module: nn.Module) -> None:
    """Forget the parameters of `module` again."""
    for name, parameter in list(module.named_parameters(prefix=prefix)):
        set_value(context.graph.model, name, parameter.to("meta"))
    give_back()


def set_value(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a value in the place of a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def tie(graph: Graph) -> None:
    """Parameters that share one tensor share the one that is there now."""
    for name, kept_under in graph.tied.items():
        owner, _, leaf = name.rpartition(".")
        graph.model.get_submodule(owner)._parameters[leaf] = graph.model.get_parameter(kept_under)


@contextmanager
def lent(context: Context, artifact: Artifact) -> Iterator[Context]:
    """While open, the model is another one of the same structure; where it is in memory, that one is instead."""
    if not context.resident:
        yield replace(context, artifact=artifact)
        return
    other, model = replace(context, artifact=replace(artifact, graph=context.graph)), context.graph.model
    before = dict(context.graph.tensors())
    try:
        for name in before.keys() & {n for n, _ in artifact.graph.tensors()}:
            set_value(model, name, value_of(other, name))
        tie(context.graph)
        yield other
    finally:
        for name, tensor in before.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            values: dict[str, Any] = module._buffers if leaf in module._buffers else module._parameters
            values[leaf] = tensor
        tie(context.graph)


def take_records(
    context: Context, records: Iterable[Record], restate: bool = False, made: Iterable[Record] = ()
) -> None:
    """Take over committed sites and vectors.

    Args:
        context: whose artifact and, where it is in memory, whose model takes them.
        records: as they are kept.
        restate: they count as the original weights from now on.
        made: the same records where they were computed: what they mean need not be moved there again.
    """
    artifact = context.artifact
    here = {record.site: record.weight for record in made}
    fused: dict[str, Tensor] = {}  # a source may hold the parameters of the model: experts go into a copy
    for record in records:
        site = artifact.sites.get(record.site)
        if site is None:
            artifact.vectors[record.site] = record.weight
            if artifact.added(record.site):
                make_room(context, record.site)
        else:
            artifact.committed[record.site] = record.weight
            if restate:
                artifact.restated[record.site] = record.weight
        if context.resident and site is not None:
            weight, model = here.get(record.site), context.graph.model
            piece = piece_made(context, site, weight if isinstance(weight, Weight) else context.weight(site))
            if not site.is_expert:
                set_value(model, site.parameter, piece)
                if site.shared:
                    tie(context.graph)
                continue
            if site.parameter not in fused:
                fused[site.parameter] = model.get_parameter(site.parameter).detach().to(context.dtype, copy=True)
            site.ref.pieces(fused[site.parameter])[site.ref.index] = piece
        elif context.resident:
            set_value(context.graph.model, record.site, value_of(context, record.site))
            tie(context.graph)
    for name, value in fused.items():
        set_value(context.graph.model, name, value)


def make_room(context: Context, name: str) -> None:
    """Give a layer a bias of zeros, if it has none."""
    module = context.graph.model.get_submodule(name.removesuffix(".bias"))
    if module._parameters.get("bias") is None:
        zeros = value_of(context, name)
        module._parameters["bias"] = nn.Parameter(zeros if context.resident else zeros.to("meta"), requires_grad=False)


@contextmanager
def streamed(context: Context) -> Iterator[Hold]:
    """While open, the model can be called: every part is brought in when it runs and evicted when it is done.

    Within what it gives, parts stay where they are until that is closed.
    """
    inputs = rounded_inputs(context, grids_of(context, context.graph.sites))
    with inputs, rounded_caches(context), _streamed(context) as hold:
        yield hold


@contextmanager
def _streamed(context: Context) -> Iterator[Hold]:
    if context.resident:
        yield nullcontext
        return
    model = context.graph.model
    bring_buffers(context)
    parts = {name: model.get_submodule(name) for name in context.graph.blocks}
    inside = tuple(f"{name}." for name in context.graph.blocks)
    for name, module in model.named_modules():
        if module._parameters and name not in parts and not name.startswith(inside):
            parts[name] = module
    held: list[str] | None = None
    kept = _read_elsewhere(context.graph, parts)
    for name in kept:
        bring_in(context, name, parts[name])

    def leave(name: str) -> None:
        if name in kept:
            return
        if held is None:
            evict(context, name, parts[name])
        else:
            held.append(name)

    @contextmanager
    def hold() -> Iterator[None]:
        nonlocal held
        held = []
        try:
            yield
        finally:
            names, held = dict.fromkeys(held), None
            for name in names:
                evict(context, name, parts[name])

    # Llama 4 asks where its embedding is before it runs that; on the meta device it would look up nothing, unnoticed.
    first = next((name for name, part in parts.items() if isinstance(part, nn.Embedding)), "")
    early = {"": model} if first and "" not in parts else {}
    with (
        collect.around(early, lambda _: bring_in(context, first, parts[first]), lambda _: leave(first)),
        collect.around(parts, lambda name: bring_in(context, name, parts[name]), leave),
    ):
        try:
            yield hold
        finally:
            for name in kept:
                evict(context, name, parts[name])


def _read_elsewhere(graph: Graph, parts: Mapping[str, nn.Module]) -> set[str]:
    """Parts that stay in memory while a model can be called, because others may read their parameters.

    Language models on their own do not, but models of several parts do: Gemma 4 looks up its padding in the table of
    its embedding, Idefics 3 asks for the device of its first parameter. What is larger than a block, and no embedding,
    is brought in when it runs all the same.
    """
    config: Any = getattr(graph.model, "config", None)
    if graph.is_language_model and config.get_text_config() is config:
        return set()
    largest = max(sum(p.numel() for p in parts[name].parameters()) for name in graph.blocks)
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if name not in graph.blocks
    }
    return {name for name, size in sizes.items() if size <= largest or isinstance(parts[name], nn.Embedding)}


def grids_of(context: Context, sites: Iterable[Site], now: Mapping[str, Weight] | None = None) -> dict[str, InputGrid]:
    """The grids of the sites' inputs, as `now` has them where it does, else as committed."""
    found = {s.name: now[s.name].inputs if now and s.name in now else context.artifact.inputs(s.name) for s in sites}
    return {name: inputs for name, inputs in found.items() if inputs is not None}


def rounded_inputs(
    context: Context, grids: Mapping[str, InputGrid], through: bool = False
) -> AbstractContextManager[None]:
    """While open, inputs of these sites are rounded. `through`: gradients pass as if they were not."""
    applied = {n: passed_through(i.apply) if through else i.apply for n, i in grids.items()}
    names = {n: context.artifact.sites[n].names for n in applied}  # layers that blocks share have several
    model = context.graph.model
    return collect.quantized_inputs({model.get_submodule(u): a for n, a in applied.items() for u in names[n]})


def rounded_caches(context: Context, within: str = "") -> AbstractContextManager[None]:
    """While open, attention layers round the keys and values that they keep. `within`: those of one block."""
    model, inside = context.graph.model, f"{within}." if within else ""
    caches = {name: grid for name, grid in context.artifact.caches.items() if f"{name}.".startswith(inside)}
    return collect.changed_caches({model.get_submodule(name): grid.apply for name, grid in caches.items()})


def passed_through(grid: collect.RoundInputs) -> collect.RoundInputs:
    """The same rounding, through which gradients pass as if it were not there."""
    return lambda x: x + (grid(x.detach()) - x.detach())


@contextmanager
def present(context: Context, index: int, grids: Mapping[str, InputGrid] | None = None) -> Iterator[None]:
    """While open, a block's parameters are in memory. They are not while its matrices are being solved.

    Inputs are rounded to `grids`, by default to those that are committed. With `grids` of its own the block is one that
    is being learned, or the original one, and keeps keys and values as they are.
    """
    name = context.graph.blocks[index]
    block = context.graph.model.get_submodule(name)
    if not context.resident:
        bring_in(context, name, block)
    try:
        inputs = grids_of(context, context.graph.used_in(index)) if grids is None else grids
        with rounded_inputs(context, inputs), rounded_caches(context, name) if grids is None else nullcontext():
            yield
    finally:
        if not context.resident:
            evict(context, name, block)
