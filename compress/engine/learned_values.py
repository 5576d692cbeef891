"""Models that run with learned values in the place of their own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compress.models.site import learned_parameter, parameter_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch import nn

    from compress.engine.context import Context
    from compress.models.graph import Graph


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
    inside, users = set[str](), _users(graph, everything)
    model, blocks = graph.model, []
    for name in graph.blocks if graph.blocks != ("",) else ():
        names = [n for n in everything if any(f"{user}.".startswith(f"{name}.") for user in users[n])]
        inside.update(names)
        blocks.append((model.get_submodule(name), names))

    def around(block: nn.Module, names: Sequence[str]) -> Callable[..., Any]:
        inner = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            # What comes in is needed again as it was, and a block may begin with a layer that works in place.
            mine = [a.clone() if again and isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            with swapped(model, _everywhere(graph, values(names))):
                return inner(*mine, **kwargs)

        return (lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)) if again else run

    try:
        for block, names in blocks:
            block.forward = around(block, names)
        with swapped(model, _everywhere(graph, values([n for n in everything if n not in inside]))):
            yield
    finally:
        for block, _ in blocks:
            block.__dict__.pop("forward", None)  # the class's own again


def _users(graph: Graph, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What is learned -> all its names: those of the modules that share a site, or of a vector."""
    sites = {site.name: site.names for site in graph.sites}
    return {name: sites.get(name) or graph.names_of(name) for name in names}


def _everywhere(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of parameters, and of those that are tied to them."""
    return {alias: value for name, value in values.items() for alias in graph.names_of(name)}


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


def parameters_of(context: Context, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of sites (out, in) and of vectors as the model takes them, by parameter; gradients reach them.

    Experts of a fused parameter that have no value among these are as they stand in the model, which is in memory.
    """
    artifact, made = context.artifact, dict[str, Tensor]()
    for name, value in values.items():
        site = artifact.sites.get(name)
        if site is None or not site.is_expert:
            made[name if site is None else site.parameter] = (value if site is None else site.value(value)).to(
                context.dtype
            )
        elif site.parameter not in made:
            now, sites = context.graph.model.get_parameter(site.parameter), artifact.sites_of(site.parameter)
            pieces = [values[s.name].to(context.dtype) if s.name in values else s.matrix(now) for s in sites]
            made[site.parameter] = learned_parameter(sites, pieces)
    return made


def original_parameter(context: Context, name: str) -> Tensor:
    """What the parameter of sites was before any pass, in its stored type."""
    sites = context.artifact.sites_of(name)
    return parameter_of(sites, (context.original(site) for site in sites))
