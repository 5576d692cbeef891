"""What reaches the layers outside the blocks once the blocks are compressed: the head above all.

The chain of the sweep ends with what the last block makes. The model is then called once more with blocks that pass on
what arrives, the last of which answers with that: what lies around the blocks is run, and nothing inside them.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration import collect
from compress.calibration.precision import calibrating
from compress.calibration.statistics import Statistics
from compress.calibration.wiring import answering
from compress.engine.placement import present, streamed
from compress.models.tables import multiplies

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.activation_cache import Activations
    from compress.calibration.statistics import Need
    from compress.engine.context import Context
    from compress.models.site import Site


def outside_statistics(
    context: Context,
    wanted: Mapping[str, Need],
    ranged: Collection[str],
    sites: Sequence[Site],
    chain: Activations | None,
    batches: Sequence[Tensor],
) -> dict[str, Statistics]:
    """What is wanted of the inputs of sites outside the blocks.

    Args:
        context: with every block committed.
        wanted: site -> what must be known of its inputs, where anything must.
        ranged: the sites of which the range of the inputs must be known.
        sites: outside the blocks.
        chain: what arrives at the last block; None where blocks do not simply feed one another.
        batches: of calibration data.
    """
    model = context.graph.model
    needs = {s.name: wanted[s.name] for s in sites if s.name in wanted}
    heads = {s.name: head for s in sites if s.name in needs for head in multiplies(model, s)}
    found = {s.name: _of_rows(context, s, needs[s.name]) for s in sites if s.name in needs and s.name not in heads}
    if not heads:
        return found
    answers = None if chain is None else _answers(context, chain)
    modules = {name: model.get_submodule(head) for name, head in heads.items()}
    computed = calibrating(context.products, context.dtype, context.devices.compute)
    with computed, streamed(context):
        once = _visits(context, modules, answers, batches)
        reached = {name: module for name, module in modules.items() if once[name]}
        forwards = (partial(_run, context, batch, answers, i) for i, batch in enumerate(batches))
        before = context.executor.shares(sum(map(len, batches))).first if ranged else 0
        seen = collect.statistics(
            reached,
            needs,
            context.bars.over(forwards, len(batches), "collect: batches"),
            ranged,
            before,
            once=all(once[name] == 1 for name in reached),
        )
    context.executor.reduce(seen)
    return {**found, **seen}


def _of_rows(context: Context, site: Site, need: Need) -> Statistics:
    """What stands for the inputs of a table that is only looked up: each column alone, once."""
    width, device = site.shape[1], context.devices.compute
    made = Statistics(width, need, device)  # an error counts the same in whatever column it is
    made.update(torch.eye(width, device=device), site.name)
    return made


Answers = tuple["Activations", "Callable[[Tensor], Any]"]


def _answers(context: Context, chain: Activations) -> Answers | None:
    """What the last block makes of the calibration data, and the form that blocks answer in.

    None where that holds more tensors than the hidden states: the whole model is run then.
    """
    last = len(context.graph.blocks) - 1
    block = context.graph.model.get_submodule(context.graph.blocks[last])
    made = chain.copy()
    form: Callable[[Tensor], Any] | None = None
    computed = calibrating(context.products, context.dtype, context.devices.compute)
    with computed, present(context, last):
        answered = made.whole(block, last)
        for number, run in enumerate(context.bars.over(answered, len(made.hidden), "propagate: batches")):
            output = run()
            form = form or _form(output)
            if form is None:
                return None
            made.keep(number, made.call(number, last).samples_first(output).to(context.dtype))
    return None if form is None else (made, form)


def _form(output: Any) -> Callable[[Tensor], Any] | None:
    if isinstance(output, torch.Tensor):
        return lambda hidden: hidden
    rest = list(output[1:])
    if any(isinstance(part, torch.Tensor | tuple | list) for part in rest):
        return None
    kind = type(output)
    return lambda hidden: kind([hidden, *rest])


def _run(context: Context, batch: Tensor, answers: Answers | None, number: int) -> Any:
    """Call the model on a batch, or on its first samples."""
    if answers is None:
        return context.forward(batch)
    made, form = answers
    call = made.call(number, len(context.graph.blocks) - 1)
    hidden = call.as_called(made.hidden[number][: len(batch)].to(context.devices.compute))
    with answering(context.graph.model, context.graph.blocks, form, hidden):
        return context.forward(batch)


def _visits(
    context: Context, modules: dict[str, torch.nn.Module], answers: Answers | None, batches: Sequence[Tensor]
) -> Counter[str]:
    """How often each module is reached with one sample."""
    names = list(modules)
    run = partial(_run, context, batches[0][:1], answers, 0)
    return Counter(names[i] for i in collect.reached(run, [modules[name] for name in names]))


__all__ = ["outside_statistics"]
