"""The stage that leaves fewer experts: what routers send them, what they make of it, and the model with the rest."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.precision import products
from compress.calibration.routing import Routing
from compress.engine.chains import chain_of
from compress.engine.placement import present, streamed
from compress.engine.reshaping import reshaped
from compress.engine.stage import StageResult, StageRunner, calibration_batches
from compress.errors import UnsupportedModelError
from compress.io.keys import key_of
from compress.models.cuts import Part
from compress.models.experts import neurons_of_experts
from compress.models.fewer_experts import LEAST_IN_GROUP, Blends, fewer, mixture_of
from compress.passes.experts import ExpertsPass
from compress.passes.interface import ExpertsSeen
from compress.report.sections import ExpertsGone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.activation_cache import Activations
    from compress.calibration.data import Dataset
    from compress.engine.context import Context
    from compress.engine.stage import Stage
    from compress.models.fewer_experts import Mixture
    from compress.models.symmetry import Units
    from compress.passes.interface import ExpertsLeft
    from compress.passes.merge.orders import Moves

Seen = dict[str, dict[str, Any]]  # layer -> `tokens`, `weights` and `weighted` of every expert, and their `distances`


class FewerExperts(StageRunner):
    """Runs one pass that leaves fewer experts in the layers of a mixture."""

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
            seen = _seen(context, mixture, batches, pass_)
            context.ledger.commit_row(unit, key, seen)
        left, layers = {}, {}
        for name in mixture.layers:
            layer = _shown(seen[name], keep, mixture.groups, may[name])
            left[name] = pass_.run(layer)
            layers[name] = _facts(left[name], layer, pass_.scores(layer).tolist())
        kept = {name: each.numbers for name, each in left.items()}
        blends = _blends(context, pass_, left) if pass_.merges else None
        made = fewer(graph, kept, in_place=context.resident, blends=blends)
        section = ExpertsGone(pass_.key, keep, mixture.count, layers, made.name)
        made_of = {
            name: sorted((n, sorted(of.items())) for n, of in each.made_of.items()) for name, each in left.items()
        }
        return StageResult(key_of(key, kept, made_of), reshaped(context, made), section)


def _shown(facts: Mapping[str, Any], keep: int, groups: int, may: frozenset[int]) -> ExpertsSeen:
    """What a pass works on, of what was seen of a layer."""
    tokens, weighted, weights = (torch.tensor(facts[part]) for part in ("tokens", "weighted", "weights"))
    distances = torch.tensor(facts["distances"]).double() if "distances" in facts else None
    return ExpertsSeen(tokens.long(), weighted.double(), weights.double(), keep, groups, may, distances)


def _facts(left: ExpertsLeft, layer: ExpertsSeen, scores: list[float]) -> dict[str, Any]:
    """What the report has of a layer."""
    tokens: list[int] = layer.tokens.tolist()
    gone = [number for number in range(len(tokens)) if number not in left.numbers]
    merged = {str(number): sorted(left.made_of[number]) for number in sorted(left.made_of)}
    return {"gone": gone, "scores": scores, "tokens": tokens} | ({"merged": merged} if merged else {})


def _blends(context: Context, pass_: ExpertsPass, left: Mapping[str, ExpertsLeft]) -> Blends:
    """Experts that are made of several, with neurons in one order where the pass wants that."""
    layers: dict[str, dict[int, tuple[Part, ...]]] = {}
    bars = context.bars
    for name in bars.over(list(left), len(left), f"{pass_.key}: layer", "each"):
        module = context.graph.model.get_submodule(name)
        neurons = neurons_of_experts(module) if pass_.aligned else None
        layers[name] = {}
        for number, shares in left[name].made_of.items():
            layers[name][number] = tuple(_parts(context, pass_, (name, number), shares, neurons))
    return Blends(layers, pass_.mixes_routers)


def _parts(
    context: Context, pass_: ExpertsPass, first: tuple[str, int], shares: Mapping[int, float], neurons: Units | None
) -> Iterator[Part]:
    """What an expert is made of. `first`: its layer and number, in whose order the neurons of the others are put."""
    layer, number = first
    ours = partial(_entry, context, layer, number)
    for other, share in shares.items():
        moves: Moves = {}
        if neurons is not None and other != number and share:
            moves = pass_.order(neurons, ours, partial(_entry, context, layer, other))
        yield Part(other, share, 1 / len(shares), moves)


def _entry(context: Context, layer: str, number: int, leaf: str) -> Tensor:
    """What a parameter of a module of experts has for one of them; nothing else is read."""
    artifact = context.artifact
    name = artifact.name_in_source(f"{layer}.{leaf}")
    shape = artifact.source.shape(name)[1:]
    size = math.prod(shape)
    return artifact.source.piece(name, number * size, (number + 1) * size).view(shape)


def _seen(context: Context, mixture: Mixture, batches: Sequence[Tensor], pass_: ExpertsPass) -> Seen:
    """What every layer is sent, and what its experts make of it; a block in memory at a time where that is possible."""
    graph, bars = context.graph, context.bars
    modules = {name: graph.model.get_submodule(name) for name in mixture.layers}
    routing, gathered = (
        Routing(modules, mixture.count, pass_.sees_outputs, pass_.sees_distances),
        context.executor.gathered,
    )
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
            routing.compare(modules, gathered)
        else:
            for index in bars.over(range(len(graph.blocks)), len(graph.blocks), "experts: block", "each"):
                block = graph.model.get_submodule(graph.blocks[index])
                with products(context.products), present(context, index):
                    forwards = bars.over(chain.forwards(block, index=index), len(batches), "experts: batches")
                    routing.see((partial(_stepped, chain, *each) for each in enumerate(forwards)), inside[index])
                routing.compare(inside[index], gathered)
    found = routing.found(gathered)
    never = next((name for name in mixture.layers if name not in found), None)
    if never is not None:
        raise UnsupportedModelError(f"the calibration data never reach {never}, so nothing is known of its experts")
    return found


def _stepped(chain: Activations, number: int, made: Callable[[], Tensor]) -> None:
    """Run a block on a batch, and keep what comes out for the next."""
    chain.keep(number, made())


__all__ = ["FewerExperts"]
