"""Channels between layers that may be scaled without changing what the model computes. Reads no weight.

A factor in the columns of all layers that read a channel is undone in what makes it: the scale of a norm, the rows of a
value projection, those of the layer that a gate multiplies. Attention only mixes values of tokens, so a factor of a
value arrives as it is at the layer that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.lazy import torch
from compress.models.symmetry import Place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.models.graph import Graph
    from compress.models.norms import Norm
    from compress.models.site import Site
    from compress.models.symmetry import Units


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels that some layers read.

    Attributes:
        readers: sites of one block, all that read them.
        columns: (channels, width) int64: which columns of the readers each is; several where heads share it.
        makers: where they lie in the tensors that make them, one entry along an axis for each.
        norm: that makes them, if one does.
    """

    readers: tuple[str, ...]
    columns: Tensor
    makers: tuple[Place, ...]
    norm: Norm | None = None


def channels_of(graph: Graph) -> tuple[Channels, ...]:
    """Every group of channels inside the blocks of a model that may be scaled, in the order of the blocks."""
    sites = {site.name: site for site in graph.sites if site.block is not None and not site.shared}
    found = [*_normed(graph, sites), *_made(graph, sites)]
    blocks = {name: site.block or 0 for name, site in sites.items()}
    order = {name: number for number, name in enumerate(sites)}
    return tuple(sorted(found, key=lambda c: (blocks[c.readers[0]], order[c.readers[0]])))


def _normed(graph: Graph, sites: dict[str, Site]) -> Iterator[Channels]:
    for norm in graph.family.norms(graph.model):
        if norm.scaled and all(name in sites for name in norm.readers):
            index = torch.arange(sites[norm.readers[0]].shape[1])[:, None]
            names = (norm.weight, norm.bias) if norm.shifted else (norm.weight,)
            yield Channels(norm.readers, index, tuple(Place(name, 0, index) for name in names), norm)


def _made(graph: Graph, sites: dict[str, Site]) -> Iterator[Channels]:
    """Values of attention, and neurons that a gate multiplies."""
    readers = {site.parameter: name for name, site in sites.items()}
    wiring: Any = getattr(graph.family, "wiring", None)
    for units in graph.units():
        reader = readers.get(units.places[-1].tensor)
        if units.part == "heads" and reader is not None and not clipped(graph):
            yield _values(units, reader)
        if units.part == "mlp" and reader is not None and wiring.linear is not None:
            *made, read = units.places
            linear = [p for p in made if p.tensor.rpartition(".")[0].endswith(f".{wiring.linear}")]
            yield Channels((reader,), read.index, tuple(linear))


def clipped(graph: Graph) -> bool:
    """Whether values of attention are cut to a range, so that what makes them is not linear."""
    return getattr(getattr(graph.model, "config", None), "clip_qkv", None) is not None


def _values(units: Units, reader: str) -> Channels:
    read, made = values_of(units)
    return Channels(
        (reader,),
        read.flatten(0, 1),
        tuple(replace(place, index=place.index.flatten()[:, None]) for place in made),
    )


def values_of(units: Units) -> tuple[Tensor, tuple[Place, ...]]:
    """The values within heads, which are the last that is free there.

    Returns:
        (groups, size, repeats): the columns of the layer that reads them, of all heads of a group; and the places that
        make them, (groups, size) each.
    """
    outer = {(place.tensor, place.axis): place.index for place in units.places}
    *made, read = units.inner[-1].places
    rows = (replace(p, index=outer[p.tensor, p.axis][:, p.index[:, 0]]) for p in made)
    return outer[read.tensor, read.axis][:, read.index], tuple(rows)


def unknown(graph: Graph) -> str:
    """Why there is nothing to scale in a model."""
    kind = type(graph.model).__name__
    return (
        f"which channels of a {kind} may be scaled is not known (known: Llama and its like, GPT-2, GPT-NeoX, OPT, "
        "BERT and ViT), so nothing can be"
    )


__all__ = ["Channels", "channels_of", "clipped", "unknown", "values_of"]
