"""A whole model as a ModelPass may see it and train it: the only file that runs a model with learned values inside."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss
from torch.utils.checkpoint import checkpoint

from compress.calibration.metrics import logits_in
from compress.calibration.precision import learning
from compress.calibration.training import ModelData
from compress.engine.placement import bring_buffers, bring_in, evict, grids_of, rounded_inputs, tie

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch import nn

    from compress.calibration.training import Loss, Make, TrainingStore
    from compress.engine.placement import Context
    from compress.models.graph import Graph


@contextmanager
def in_memory(context: Context) -> Iterator[None]:
    """While open, all of the model is in memory, and inputs are rounded where they are; gradients pass through that."""
    model = context.graph.model
    if not context.resident:
        bring_buffers(context)
        bring_in(context, "", model)
        tie(context.graph)
    try:
        with rounded_inputs(context, grids_of(context, context.graph.sites), through=True):
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
            return {
                sites[n].parameter if n in sites else n: (sites[n].value(v) if n in sites else v).to(context.dtype)
                for n, v in found.items()
            }

        return made

    def loss(make: Make, numbers: Tensor) -> Tensor:
        batch = context.devices.to_compute(samples[numbers.to(samples.device)])
        with learning(context.products, torch.empty(0, dtype=context.dtype)):
            with with_learned(graph, values(make), checkpointing and torch.is_grad_enabled()):
                out = logits_in(context.forward(batch)).float()
            if kind == "next_token":
                return cross_entropy(out[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            with torch.no_grad(), with_learned(graph, lambda names: _values_of(original, sites, names), False):
                wanted = logits_in(context.forward(batch)).float()
        if graph.is_language_model or graph.is_image_model:
            own, wanted = (log_softmax(x, -1).flatten(0, -2) for x in (out, wanted))
            return kl_div(own, wanted, reduction="batchmean", log_target=True)
        return mse_loss(out, wanted) / wanted.square().mean().clamp(min=1e-12)  # outputs that are no probabilities

    return ModelData(loss, len(samples), kept)


def _original(context: Context) -> dict[str, Tensor]:
    """Values of the original model, by parameter, where passes have changed them."""
    artifact = context.artifact
    plain = replace(context, artifact=artifact.plain())
    found = {s.parameter: s.value(context.original(s)) for n, s in artifact.sites.items() if n in artifact.committed}
    found |= {name: plain.tensor(name) for name in artifact.vectors}
    return {name: value.to(context.dtype) for name, value in found.items()}


def _values_of(values: Mapping[str, Tensor], sites: Mapping[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    wanted = {sites[n].parameter if n in sites else n for n in names}
    return {n: v for n, v in values.items() if n in wanted}


@contextmanager
def with_learned(
    graph: Graph,
    values: Callable[[Collection[str]], Mapping[str, Tensor]],
    again: bool,
    everything: Sequence[str] | None = None,
) -> Iterator[None]:
    """While open, parameters have learned values when the model runs.

    Args:
        graph: the model.
        values: names of sites and vectors -> values by parameter name, of those that are learned.
        again: recompute values and activations of a block when its gradients are needed, instead of keeping them.
        everything: the names of which some are asked for at a time; all sites and vectors by default.
    """
    everything = everything or [*(s.name for s in graph.sites), *graph.vectors()]
    inside: set[str] = set()
    model, blocks = graph.model, []
    for name in graph.blocks if graph.blocks != ("",) else ():
        names = [n for n in everything if f"{n}.".startswith(f"{name}.")]
        inside.update(names)
        blocks.append((model.get_submodule(name), names))

    def around(block: nn.Module, names: Sequence[str]) -> Callable[..., Any]:
        inner = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            # What comes in is needed again as it was, and a block may begin with a layer that works in place.
            mine = [a.clone() if again and isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            with swapped(model, values(names)):
                return inner(*mine, **kwargs)

        return (lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)) if again else run

    try:
        for block, names in blocks:
            block.forward = around(block, names)
        with swapped(model, values([n for n in everything if n not in inside])):
            yield
    finally:
        for block, _ in blocks:
            block.__dict__.pop("forward", None)  # the class's own again


@contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, parameters have other values."""
    places: list[tuple[dict[str, Any], str]] = [
        (model.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name in values
    ]
    before = [parameters[leaf] for parameters, leaf in places]
    try:
        for (parameters, leaf), value in zip(places, values.values(), strict=True):
            parameters[leaf] = value
        yield
    finally:
        for (parameters, leaf), value in zip(places, before, strict=True):
            parameters[leaf] = value


__all__ = ["in_memory", "model_data", "swapped", "with_learned"]
