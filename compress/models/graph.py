"""A model as blocks and sites.

A block is one of the model's repeated modules (decoder layers, residual blocks; the children of a plain
`nn.Sequential`). A site is a matrix to compress: the weight of a `Linear`, of a convolution (a row per output channel),
of a transformers `Conv1D` (stored transposed), or one expert of a fused parameter; and the table of an `Embedding`
(`tables.py`). Nothing is traced: which block feeds which is observed while running (`calibration/collect.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compress.errors import UnsupportedModelError
from compress.lazy import transformers
from compress.models.architecture import predicts_masked, predicts_next
from compress.models.families import family_of
from compress.models.families.transformers_model import TOKENS, called_with, called_with_images
from compress.models.shared import with_shared
from compress.models.tables import with_tables
from compress.models.towers import APART, LANGUAGE, named, numbered
from compress.models.turned_inputs import turned_inputs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch import Tensor, nn

    from compress.models.families.base import Family
    from compress.models.site import Site
    from compress.models.symmetry import Axis, Place, Units
    from compress.models.towers import Tower


@dataclass(frozen=True)
class Graph:
    """A model (its parameters possibly on the meta device) with its blocks and sites found.

    Attributes:
        blocks: full names of its repeated modules, those of one tower after the other.
        family: what is known of its kind.
        buffers: names of the buffers that checkpoints hold, such as the running means of a batch normalisation.
        tied: parameter name -> the name its value is kept under, for parameters that share one tensor.
        axes: channels between sites whose order is free.
        towers: the lists that the blocks are of.
        left_out: further towers, that stay as they are.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    family: Family
    tied: dict[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    axes: tuple[Axis, ...] = ()
    towers: tuple[Tower, ...] = ()
    left_out: tuple[Tower, ...] = ()

    def rows_of(self, site: str) -> Axis | None:
        """The channels that a site's rows are, where their order is free."""
        return next((a for a in self.axes if site in a.makers), None)

    def columns_of(self, site: str) -> Axis | None:
        """The channels that a site's columns are, where their order is free."""
        return next((a for a in self.axes if site in a.readers), None)

    def units(self, residual: bool = False) -> tuple[Units, ...]:
        """What of the model may be put in another order; nothing where its wiring is neither known nor traced.

        Args:
            residual: the channels of the residual stream too, which couple everything else, after all others.
        """
        stream = self.family.residual(self.model, self.tied) if residual else ()
        free = self.family.symmetry(self.model, self.tied)
        return (*(u for u in free if u.part is None or not self._is_turned(u.places[-1])), *stream)

    def _is_turned(self, reader: Place) -> bool:
        """Whether a layer reads units that were turned into others before: their order is then its business."""
        return reader.tensor.removesuffix(".weight") in self.turned

    @cached_property
    def turned(self) -> dict[str, int]:
        """Layers whose inputs are turned while the model runs -> how many neighbouring channels together."""
        return turned_inputs(self.model)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything a checkpoint holds by name: parameters, tied ones once, then buffers."""
        # A model that was brought in piece by piece no longer shares the tensors it ties.
        yield from ((name, p) for name, p in self.model.named_parameters() if name not in self.tied)
        yield from ((name, self.model.get_buffer(name)) for name in self.buffers)

    def vectors(self) -> tuple[str, ...]:
        """Names of the parameters with one dimension: biases, scales of norms. Tied ones once."""
        return tuple(name for name, p in self.model.named_parameters() if p.dim() == 1 and name not in self.tied)

    def names_of(self, parameter: str) -> tuple[str, ...]:
        """All names of a parameter: that its value is kept under, and those that are tied to it."""
        return (parameter, *(name for name, kept in self.tied.items() if kept == parameter))

    def in_block(self, index: int) -> tuple[Site, ...]:
        """The sites of one block, in the model's order. One that several blocks share is of the first."""
        return tuple(s for s in self.sites if s.block == index)

    def used_in(self, index: int) -> tuple[Site, ...]:
        """The sites that a block multiplies with: its own, and those that it shares with a block before it."""
        inside = f"{self.blocks[index]}."
        shared = (s for s in self.sites if s.block not in (None, index) and any(n.startswith(inside) for n in s.shared))
        return (*self.in_block(index), *shared)

    def users_of(self, sites: Iterable[Site]) -> tuple[int, ...]:
        """The other blocks that share any of a block's sites."""
        index = {name: i for i, name in enumerate(self.blocks)}
        found = {_owner(name, index) for site in sites if site.block is not None for name in site.shared}
        return tuple(sorted(i for i in found - {site.block for site in sites} if i is not None))

    @property
    def outside(self) -> tuple[Site, ...]:
        """Sites of no block."""
        return tuple(s for s in self.sites if s.block is None)

    @property
    def takes_tokens(self) -> bool:
        """Whether it is a transformers model called with token ids."""
        return isinstance(self.model, transformers.PreTrainedModel) and called_with(self.model) == TOKENS

    @property
    def is_language_model(self) -> bool:
        """Whether it is called with token ids, and has logits for the token after each."""
        return self.takes_tokens and predicts_next(self.model)

    @property
    def predicts_masked(self) -> bool:
        """Whether it is called with token ids, and has logits for those that were masked."""
        return self.takes_tokens and predicts_masked(self.model)

    @property
    def is_image_model(self) -> bool:
        """Whether it is a transformers model called with images."""
        return isinstance(self.model, transformers.PreTrainedModel) and called_with_images(self.model)


def find(model: nn.Module) -> Graph:
    """Blocks and sites of a model.

    Raises:
        UnsupportedModelError: there is nothing to compress.
    """
    family = family_of(model)
    towers = family.towers(model)
    blocks = tuple(name for tower in towers for name in tower.blocks)
    index = {name: i for i, name in enumerate(blocks)}
    sites = tuple(replace(site, block=_owner(site.name, index)) for site in family.sites(model))
    tied = _tied(model)
    sites = with_shared(model, sites, tied)
    linear, sites = sites, with_tables(model, sites, tied)
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Linear, convolution, Conv1D or Embedding layer: nothing to compress"
        )
    _refuse_shared(model, linear, tied)
    kept = model.state_dict().keys()
    buffers = tuple(name for name, _ in model.named_buffers() if name in kept)
    return Graph(model, blocks, sites, family, tied, buffers, free_axes(family, model, linear), towers)


def free_axes(family: Family, model: nn.Module, sites: Iterable[Site]) -> tuple[Axis, ...]:
    """Channels between sites whose order is free: those that no layer reads turned into others."""
    turned = turned_inputs(model).keys()
    return tuple(a for a in family.axes(model, [site.name for site in sites]) if turned.isdisjoint(a.readers))


def chosen(graph: Graph, names: Collection[str] | None = None) -> Graph:
    """The same model, of which only some towers are worked on.

    Args:
        graph: of all towers.
        names: of those towers; by default that of the language where a causal language model has others beside it,
            else all. All towers of a model that takes text alone are of the `language`.

    Raises:
        UnsupportedModelError: there is no such tower.
    """
    there = list(dict.fromkeys(tower.name for tower in graph.towers))
    if names and graph.takes_tokens and not {LANGUAGE, *APART} & {*there}:
        unknown = [name for name in names if name not in (LANGUAGE, *there)]
        there = [LANGUAGE] if unknown and len(there) == 1 else there
        names = unknown or [name for each in names for name in (there if each == LANGUAGE else [each])]
    if names is None:
        beside = graph.is_language_model and LANGUAGE in there
        names = [LANGUAGE] if beside else there
    unknown = [name for name in names if name not in there]
    if unknown:
        raise UnsupportedModelError(
            f"towers: {type(graph.model).__name__} has no tower {unknown[0]!r}; it has {', '.join(map(repr, there))}"
        )
    kept = [tower for tower in graph.towers if tower.name in names]
    if len(kept) == len(graph.towers):
        return graph
    towers = numbered(kept)
    blocks = tuple(name for tower in towers for name in tower.blocks)
    index = {name: i for i, name in enumerate(blocks)}
    left = tuple(tower for tower in graph.towers if tower.name not in names)
    apart = {tower.name for tower in left}
    inside = {site.name for site in graph.sites if _owner(site.name, index) is not None}
    inside |= {site.name for site in graph.outside if named(site.name) not in apart}
    sites = (site for site in graph.sites if site.name in inside)
    return replace(
        graph,
        blocks=blocks,
        sites=tuple(replace(s, block=None if s.looked_up else _owner(s.name, index)) for s in sites),
        towers=towers,
        left_out=left,
    )


def _tied(model: nn.Module) -> dict[str, str]:
    kept_under = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: kept_under[id(p)] for name, p in every if kept_under[id(p)] != name}


def _owner(name: str, blocks: dict[str, int]) -> int | None:
    if "" in blocks:
        return blocks[""]
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        owner = blocks.get(".".join(parts[:end]))
        if owner is not None:
            return owner
    return None


def _refuse_shared(model: nn.Module, sites: tuple[Site, ...], tied: dict[str, str]) -> None:
    """Blocks of a model of transformers that share what is no plain layer, such as experts or convolutions."""
    owners = {site.parameter: site for site in sites if site.block is not None}
    shared = [(s, owners[tied[s.parameter]]) for s in owners.values() if tied.get(s.parameter) in owners]
    if shared and isinstance(model, transformers.PreTrainedModel):
        one, other = shared[0]
        raise UnsupportedModelError(
            f"blocks of {type(model).__name__} share matrices, such as {one.name} and {other.name} ({len(shared)} in "
            "all), which are no plain linear layers: use a model whose blocks have their own"
        )


def forward(graph: Graph, batch: Tensor) -> Any:
    """Run the model on a batch of token ids, of images or, for other modules, of inputs."""
    return graph.family.forward(graph.model, batch)
