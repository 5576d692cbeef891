"""The stage that takes experts out: what routers send them and what they make of it, and the model without them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from compress.calibration.precision import products
from compress.calibration.routing import Routing
from compress.checkpoint.artifact import Packed
from compress.checkpoint.cut import CutSource
from compress.encodings import Weight
from compress.engine.chains import chain_of
from compress.engine.placement import make_room, present, streamed
from compress.engine.stage import StageResult, StageRunner, calibration_batches
from compress.errors import UnsupportedModelError
from compress.io.keys import key_of
from compress.models.changed_settings import changed
from compress.models.fewer_experts import LEAST_IN_GROUP, fewer, mixture_of
from compress.passes.experts import ExpertsPass
from compress.passes.interface import ExpertsSeen
from compress.report.sections import ExpertsGone

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from compress.calibration.activation_cache import Activations
    from compress.calibration.data import Dataset
    from compress.engine.context import Context
    from compress.engine.stage import Stage
    from compress.models.fewer_experts import Cut, Fewer, Mixture

Seen = dict[str, dict[str, list[float]]]  # layer -> `tokens` and `weighted` of every expert


class ExpertPruning(StageRunner):
    """Runs one pass that takes experts out of the layers of a mixture."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        """Do the work, or find it done.

        Raises:
            UnsupportedModelError: a layer is never reached; or as `fewer`.
        """
        pass_, graph = stage.single(ExpertsPass), context.graph
        mixture = mixture_of(graph)
        keep = pass_.kept_of(mixture.count, mixture.groups, LEAST_IN_GROUP if mixture.groups > 1 else 1)
        may = {name: pass_.candidates(graph, name) for name in mixture.layers}
        key = key_of(key, stage.number, pass_.key, pass_.options(), {name: sorted(may[name]) for name in may})
        unit = f"{stage.unit}-routing"
        seen: Seen | None = context.ledger.load_row(unit, key)
        if seen is None:
            batches = context.executor.shard(calibration_batches(context, data))
            seen = _seen(context, mixture, batches, pass_.sees_outputs)
            context.ledger.commit_row(unit, key, seen)
        kept, layers = {}, {}
        for name in mixture.layers:
            tokens, weighted = (torch.tensor(seen[name][part]) for part in ("tokens", "weighted"))
            layer = ExpertsSeen(tokens.long(), weighted.double(), keep, mixture.groups, may[name])
            kept[name] = pass_.run(layer)
            gone = [number for number in range(mixture.count) if number not in kept[name]]
            layers[name] = {"gone": gone, "scores": pass_.scores(layer).tolist(), "tokens": seen[name]["tokens"]}
        made = fewer(graph, kept, in_place=context.resident)
        section = ExpertsGone(pass_.key, keep, mixture.count, layers, made.name)
        return StageResult(key_of(key, kept), _without(context, made), section)


def _without(context: Context, made: Fewer) -> Context:
    """The model without the experts that went; what was done to the others is kept under their new names."""
    before = context.artifact
    cuts = {before.name_in_source(name): cut for name, cut in made.cuts.items()}
    artifact = replace(
        before,
        graph=made.graph,
        source=CutSource(before.source, {name: cut for name, cut in cuts.items() if name in before.stored}),
        committed=made.moved(before.committed),
        restated=made.moved(before.restated),
        vectors={n: _cut(v, made.cuts[n]) if n in made.cuts else v for n, v in before.vectors.items()},
        configured=changed(before.configured, made.configured),
    )
    after = replace(context, artifact=artifact)
    for name in artifact.vectors:
        if artifact.added(name):
            make_room(after, name)
    return after


def _cut(vector: Weight | Packed, cut: Cut) -> Weight:
    """What is left of a vector that passes made, such as the bias of a router, (1, N)."""
    weight = vector.load() if isinstance(vector, Packed) else vector
    assert weight.values is not None
    return Weight(cut.of(weight.values[0])[None])


def _seen(context: Context, mixture: Mixture, batches: Sequence[Tensor], outputs: bool) -> Seen:
    """What every layer is sent, and what its experts make of it; a block in memory at a time where that is possible."""
    graph, bars = context.graph, context.bars
    modules = {name: graph.model.get_submodule(name) for name in mixture.layers}
    routing = Routing(modules, mixture.count, outputs)
    inside = {
        index: [name for name in mixture.layers if name.startswith(f"{block}.")]
        for index, block in enumerate(graph.blocks)
    }
    whole = len(graph.towers) != 1 or sum(map(len, inside.values())) != len(mixture.layers)
    with torch.no_grad():
        chain = None if whole else chain_of(context, graph.towers[0], batches)
        if chain is None:
            with streamed(context), products(context.products):
                shown = bars.over(batches, len(batches), "experts: batches")
                routing.see((partial(context.forward, batch) for batch in shown), modules)
        else:
            for index in bars.over(range(len(graph.blocks)), len(graph.blocks), "experts: block", "each"):
                block = graph.model.get_submodule(graph.blocks[index])
                with products(context.products), present(context, index):
                    forwards = bars.over(chain.forwards(block, index=index), len(batches), "experts: batches")
                    routing.see((partial(_stepped, chain, *each) for each in enumerate(forwards)), inside[index])
    found = routing.found(context.executor.gathered)
    never = next((name for name in mixture.layers if name not in found), None)
    if never is not None:
        raise UnsupportedModelError(f"the calibration data never reach {never}, so nothing is known of its experts")
    return found


def _stepped(chain: Activations, number: int, made: Callable[[], Tensor]) -> None:
    """Run a block on a batch, and keep what comes out for the next."""
    chain.keep(number, made())


__all__ = ["ExpertPruning"]
