"""A whole model as a ModelPass may see it and train it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss

from compress.calibration.precision import learning
from compress.calibration.shares import ALONE
from compress.calibration.training import ModelData
from compress.engine.learned_values import original_parameter, parameters_of, with_learned
from compress.engine.loss_in_pieces import loss_in_pieces, rows_before_head
from compress.engine.placement import bring_buffers, bring_in, evict, grids_of, rounded_caches, rounded_inputs, tie
from compress.io.heap import bound_heap
from compress.models.logits import WHOLE_LEARNED, bodies, logits_in, rows_at_once, vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor

    from compress.calibration.training import Loss, Make, TrainingStore
    from compress.engine.context import Context


@contextmanager
def in_memory(context: Context) -> Iterator[None]:
    """While open, all of the model is in memory; inputs and caches are rounded, and gradients pass through that."""
    model = context.graph.model
    if not context.resident:
        bring_buffers(context)
        bring_in(context, "", model)
        tie(context.graph)
    try:
        inputs = rounded_inputs(context, grids_of(context, context.graph.sites), through=True)
        with inputs, rounded_caches(context):
            yield
    finally:
        if not context.resident:
            evict(context, "", model)
            tie(context.graph)


def model_data(context: Context, samples: Tensor, kind: Loss, checkpointing: bool, kept: TrainingStore) -> ModelData:
    """A model that is in memory, as it may be trained.

    Args:
        context: its values as they stand are what is not learned.
        samples: (N, length) token ids of a language model, else inputs (N, ...).
        kind: of the loss.
        checkpointing: activations inside blocks are computed again for gradients.
        kept: where the state of training is kept.
    """
    graph, sites = context.graph, context.artifact.sites
    original = _original(context) if kind == "distill" else {}

    def values(make: Make) -> Callable[[Collection[str]], dict[str, Tensor]]:
        def made(names: Collection[str]) -> dict[str, Tensor]:
            with torch.autocast(context.devices.compute.type, enabled=False):
                found = make(names)
            return parameters_of(context, found)

        return made

    def before(names: Collection[str]) -> dict[str, Tensor]:
        return _values_of(original, sites, names)

    def large(batch: Tensor) -> bool:
        width = vocabulary(graph.model) if graph.is_language_model and bodies(graph.model) else 0
        return rows_at_once(batch.numel(), width, WHOLE_LEARNED) < batch.numel()

    def in_pieces(make: Make, batch: Tensor, again: bool) -> Tensor:
        bound_heap()
        own = rows_before_head(context, batch, values(make), again)
        if kind == "next_token":
            return loss_in_pieces(own, batch)
        with torch.no_grad():
            theirs = rows_before_head(context, batch, before, False)
        return loss_in_pieces(own, theirs)

    def loss(make: Make, numbers: Tensor) -> Tensor:
        batch = context.devices.to_compute(samples[numbers.to(samples.device)])
        again = checkpointing and torch.is_grad_enabled()
        with learning(context.products, torch.empty(0, dtype=context.dtype)):
            if large(batch):
                return in_pieces(make, batch, again)
            with with_learned(graph, values(make), again):
                out = logits_in(context.forward(batch)).float()
            if kind == "next_token":
                return cross_entropy(out[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            with torch.no_grad(), with_learned(graph, before, False):
                wanted = logits_in(context.forward(batch)).float()
        if graph.is_language_model or graph.is_image_model:
            own, wanted = (log_softmax(x, -1).flatten(0, -2) for x in (out, wanted))
            return kl_div(own, wanted, reduction="batchmean", log_target=True)
        return mse_loss(out, wanted) / wanted.square().mean().clamp(min=1e-12)  # outputs that are no probabilities

    means = graph.is_language_model or graph.is_image_model  # of other models the loss is relative to its batch
    return ModelData(loss, len(samples), kept, context.executor.shares() if means else ALONE)


def _original(context: Context) -> dict[str, Tensor]:
    """Values of the original model, by parameter, where passes have changed them."""
    artifact = context.artifact
    plain = replace(context, artifact=artifact.plain())
    changed = dict.fromkeys(s.parameter for n, s in artifact.sites.items() if n in artifact.committed)
    found = {name: original_parameter(context, name) for name in changed}
    found |= {name: plain.tensor(name) for name in artifact.vectors}
    return {name: value.to(context.dtype) for name, value in found.items()}


def _values_of(values: Mapping[str, Tensor], sites: Mapping[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    wanted = {sites[n].parameter if n in sites else n for n in names}
    return {n: v for n, v in values.items() if n in wanted}
