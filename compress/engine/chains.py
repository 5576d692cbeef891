"""What arrives at blocks: along a chain of blocks that feed one another, or, where they do not, call by call.

Blocks that feed one another are run one after the other, each once, whatever their number. Others are met in passes of
the whole model, one for each block and batch: blocks between which the model adds something (YOLOS), that are used
again and again (ALBERT), or that take turns with those of another list (attention and MLP of XLM). What a later call of
a block is given is what its weights made before they are changed.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from compress.calibration import collect
from compress.calibration.calls import Place, hidden_of
from compress.calibration.wiring import Kinds, arrivals_by_kind, kinds_of_calls
from compress.engine.context import value_of
from compress.engine.placement import set_value, streamed
from compress.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from compress.calibration.activation_cache import Activations
    from compress.calibration.calls import Call
    from compress.engine.context import Context
    from compress.models.site import Site
    from compress.models.towers import Tower

INSTEAD = "use a method that does not learn by reconstruction, such as gptq"


def chain_of(context: Context, tower: Tower, batches: Sequence[Tensor]) -> Activations | None:
    """What arrives at the first block, if the blocks may be run one after the other without the model around them."""
    graph = context.graph
    if tower.blocks == ("",) and isinstance(graph.model, PreTrainedModel):  # outputs more than a tensor
        return None
    with streamed(context):
        kinds: Kinds | None = Kinds((0,))
        if tower.blocks != ("",):
            kinds = kinds_of_calls(lambda: context.forward(batches[0][:1]), graph.model, tower.blocks)
        if kinds is None:
            return None
        dim = _dimension(context, tower.blocks[0], batches) if tower.blocks != ("",) else 0
        arrivals = (_arrival(context, batch, tower, kinds, dim or 0) for batch in batches)
        arrived = context.bars.over(arrivals, len(batches), "embed: batches")
        return context.waiting(arrived, dict(zip(tower.numbers, kinds.of, strict=True)))


def _arrival(
    context: Context, batch: Tensor, tower: Tower, kinds: Kinds, dim: int
) -> tuple[Tensor, Mapping[int, Call]]:
    """What arrives at the first block, samples first, and how each kind of block is called."""
    run = partial(context.forward, batch)
    if len(set(kinds.of)) > 1:
        hidden, calls = arrivals_by_kind(run, context.graph.model, tower.blocks, kinds)
    else:
        hidden, call = collect.arrival(run, context.graph.model.get_submodule(tower.blocks[0]))
        calls = {kinds.of[0]: call}
    if dim == 0:
        return hidden, calls
    return hidden.movedim(dim, 0).contiguous(), {kind: replace(call, dim=dim) for kind, call in calls.items()}


def samples_of(context: Context, tower: Tower, batches: Sequence[Tensor], label: str) -> None:
    """Look whether hidden states can be told apart by the samples that they are of.

    Raises:
        UnsupportedModelError: they cannot; `label` says who wanted to learn.
    """
    if tower.blocks == ("",):
        return
    with streamed(context):
        dim = _dimension(context, tower.blocks[0], batches)
    if dim is None:
        raise UnsupportedModelError(
            f"the hidden states of {type(context.graph.model).__name__} have no dimension that counts samples, so "
            f"{label} cannot learn its blocks one by one; {INSTEAD}"
        )


def _dimension(context: Context, block: str, batches: Sequence[Tensor]) -> int | None:
    """Which dimension of a block's hidden states counts samples: Gemma 3n has four streams in front of it."""
    module, first = context.graph.model.get_submodule(block), batches[0]
    shapes = [_shape(context, module, first[:count]) for count in ((1, 2) if len(first) > 1 else (1,))]
    if any(shape is None or len(shape) != len(shapes[0] or ()) for shape in shapes):
        return None
    counted = range(len(shapes[0] or ()))
    if len(shapes) > 1:
        return next((dim for dim in counted if [(s or ())[dim] for s in shapes] == [1, 2]), None)
    return next((dim for dim in counted if (shapes[0] or ())[dim] == 1), None)


def _shape(context: Context, module: torch.nn.Module, batch: Tensor) -> tuple[int, ...] | None:
    """The shape of the hidden states of a module's first call."""
    seen = collect.calls_of(partial(context.forward, batch), [module], once=True)
    hidden = seen[0].hidden if seen else None
    return tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else None


@contextmanager
def as_it_was(context: Context, names: Collection[str]) -> Iterator[Context]:
    """While open, the model has its original values. `names`: the parameters and vectors that passes have changed."""
    now = {name: value_of(context, name) for name in names if context.resident}
    plain = replace(context, artifact=context.artifact.plain())
    try:
        for name in now:
            set_value(context.graph.model, name, value_of(plain, name))
        yield plain
    finally:
        for name, value in now.items():
            set_value(context.graph.model, name, value)


def original_chain(context: Context, tower: Tower, batches: Sequence[Tensor]) -> Activations | None:
    """What arrives at the first block of the original model, where something in front of it was compressed."""
    inside = tuple(f"{name}." if name else "" for name in tower.blocks)
    changed = _changed(context, lambda name, block: block not in tower.numbers and not name.startswith(inside))
    if not changed:
        return None
    with as_it_was(context, changed) as plain:
        return chain_of(plain, tower, batches)


def _changed(context: Context, counts: Callable[[str, int | None], bool]) -> list[str]:
    """Parameters and vectors that passes have changed. `counts`: of which name and block."""
    artifact = context.artifact
    sites = (s for s in context.graph.sites if s.name in artifact.committed and counts("", s.block))
    changed = [*dict.fromkeys(s.parameter for s in sites), *(n for n in artifact.vectors if counts(n, None))]
    return [alias for name in changed for alias in context.graph.names_of(name)]


@dataclass(frozen=True)
class Visits:
    """Every call of a block in passes of the whole model, and of the blocks that share its matrices.

    Attributes:
        chain: what arrives in the compressed model.
        original: what arrives in the original one.
        outputs: what is made of that there.
        users: numbers of the other blocks.
    """

    chain: Activations
    original: Activations
    outputs: Activations
    users: tuple[int, ...]


def visits_to(context: Context, index: int, batches: Sequence[Tensor], label: str, sites: Sequence[Site]) -> Visits:
    """What arrives at a block whenever it is called, or another block that shares any of these sites.

    Raises:
        UnsupportedModelError: the block cannot be learned from that; `label` says who wanted to.
    """
    met = _Met(context, index, label, context.graph.users_of(sites))
    chain, outputs = met.calls(batches, context)
    changed = _changed(context, lambda *_: True)
    if not changed and not context.artifact.caches:
        return Visits(chain, chain.copy(), outputs, met.users)
    with as_it_was(context, changed) as plain:
        original, outputs = met.calls(batches, plain)
    if [h.shape for h in chain.hidden] != [h.shape for h in original.hidden]:
        raise met.refused("is called in another way once blocks before it are compressed")
    return Visits(chain, original, outputs, met.users)


def refuse_unlearned(
    context: Context, asked: Mapping[int, Sequence[Site]], batches: Sequence[Tensor], label: str
) -> None:
    """Refuse, before any block is learned, those of which one sample shows that they cannot be.

    Args:
        context: the model.
        asked: number of a block -> its sites that are to be learned.
        batches: calibration data.
        label: of who wants to learn.

    Raises:
        UnsupportedModelError: names the first.
    """
    graph = context.graph
    met = [_Met(context, index, label, graph.users_of(sites)) for index, sites in asked.items()]
    numbers = [index for each in met for index in (each.index, *each.users)]
    modules = [graph.model.get_submodule(graph.blocks[index]) for index in numbers]
    with streamed(context):
        seen = collect.calls_of(partial(context.forward, batches[0][:1]), modules)
    for each in met:
        visits = [visit for visit in seen if numbers[visit.number] in (each.index, *each.users)]
        each.refuse_calls([(visit.hidden, visit.output) for visit in visits])


@dataclass(frozen=True)
class _Met:
    """A block that is to be met wherever it is called.

    Attributes:
        index: of the block.
        label: of who wants to learn it.
        users: numbers of other blocks that share its matrices.
    """

    context: Context
    index: int
    label: str
    users: tuple[int, ...]

    def calls(self, batches: Sequence[Tensor], context: Context) -> tuple[Activations, Activations]:
        """What arrives and what comes out, each call as a batch of its own, in the model as `context` has it."""
        names = [context.graph.blocks[i] for i in (self.index, *self.users)]
        modules = [context.graph.model.get_submodule(name) for name in names]
        places = [None, *(_place(context, names[0], name) for name in names[1:])]
        outputs: list[tuple[Tensor, Mapping[int, Call]]] = []
        with streamed(context):
            often = len(collect.calls_of(partial(context.forward, batches[0]), modules))
            if not often:
                raise self.refused("is never reached by the calibration data")
            dim = _dimension(context, names[0], batches)
            if dim is None:
                raise self.refused("is given nothing that has a dimension for samples")

            def arrivals() -> Iterator[tuple[Tensor, Mapping[int, Call]]]:
                for batch in context.bars.over(batches, len(batches), "arrive: batches"):
                    seen = collect.calls_of(partial(context.forward, batch), modules, once=often == 1)
                    for number, visit in enumerate(seen):
                        call = replace(visit.call, dim=dim, visit=number, place=places[visit.number])
                        outputs.append((call.samples_first(visit.output).to(context.dtype).contiguous(), {0: call}))
                        yield visit.hidden.movedim(dim, 0).contiguous(), {0: call}

            made = context.waiting(arrivals(), {self.index: 0})
        if len({hidden.shape[1:] for hidden in made.hidden}) > 1:
            raise self.refused("is called with hidden states of several shapes")
        return made, context.waiting(iter(outputs), {self.index: 0})

    def refuse_calls(self, calls: Sequence[tuple[Any, Any]]) -> None:
        """Refuse what cannot be learned from. `calls`: hidden states and output of each."""
        if not calls:
            raise self.refused("is never reached by the calibration data")
        if not all(isinstance(hidden, torch.Tensor) for hidden, _ in calls):
            raise self.refused("is given nothing that has a dimension for samples")
        for _, output in calls:
            hidden_of(output)
        if len({hidden.shape for hidden, _ in calls}) > 1:
            raise self.refused("is called with hidden states of several shapes")

    def refused(self, why: str) -> UnsupportedModelError:
        """What to say of a block that cannot be learned."""
        graph = self.context.graph
        kind: Any = type(graph.model).__name__
        return UnsupportedModelError(
            f"{graph.blocks[self.index]} of {kind} {why}, so {self.label} cannot learn it; {INSTEAD}"
        )


def _place(context: Context, block: str, other: str) -> Place:
    """Another block, with what it calls the parameters that it shares with a block."""
    graph = context.graph
    module = graph.model.get_submodule(other)
    theirs = {graph.tied.get(f"{other}.{name}", f"{other}.{name}"): name for name, _ in module.named_parameters()}
    own = (name for name, _ in graph.model.get_submodule(block).named_parameters())
    kept = {name: graph.tied.get(f"{block}.{name}", f"{block}.{name}") for name in own}
    return Place(module, {name: theirs[full] for name, full in kept.items() if full in theirs})


__all__ = [
    "INSTEAD",
    "Visits",
    "as_it_was",
    "chain_of",
    "original_chain",
    "refuse_unlearned",
    "samples_of",
    "visits_to",
]
