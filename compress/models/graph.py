"""A model as blocks and sites.

A block is one of the model's repeated modules (decoder layers, residual blocks; the children of a plain
`nn.Sequential`). A site is a matrix to compress: the weight of a `Linear`, of a `Conv2d` (a row per output channel),
or of a transformers `Conv1D` (stored transposed); and the table of an `Embedding` (`tables.py`). Nothing is traced:
which block feeds which is observed while running (`calibration/collect.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.errors import UnsupportedModelError
from compress.lazy import transformers
from compress.models.architecture import predicts_masked, predicts_next
from compress.models.families import family_of
from compress.models.families.transformers_model import TOKENS, called_with, called_with_images
from compress.models.tables import with_tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from compress.models.families.base import Family
    from compress.models.site import Site
    from compress.models.symmetry import Axis, Units
    from compress.models.towers import Tower

# Above this share of block weights out of every pass's reach, running would be pretending.
MOST_UNREACHABLE = 0.01


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
    """

    model: nn.Module
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    family: Family
    tied: dict[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    axes: tuple[Axis, ...] = ()
    towers: tuple[Tower, ...] = ()

    def rows_of(self, site: str) -> Axis | None:
        """The channels that a site's rows are, where their order is free."""
        return next((a for a in self.axes if site in a.makers), None)

    def columns_of(self, site: str) -> Axis | None:
        """The channels that a site's columns are, where their order is free."""
        return next((a for a in self.axes if site in a.readers), None)

    def units(self) -> tuple[Units, ...]:
        """What of the model may be put in another order; nothing where its wiring is neither known nor traced."""
        return tuple(self.family.symmetry(self.model, self.tied))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything a checkpoint holds by name: parameters, tied ones once, then buffers."""
        # A model that was brought in piece by piece no longer shares the tensors it ties.
        yield from ((name, p) for name, p in self.model.named_parameters() if name not in self.tied)
        yield from ((name, self.model.get_buffer(name)) for name in self.buffers)

    def vectors(self) -> tuple[str, ...]:
        """Names of the parameters with one dimension: biases, scales of norms. Tied ones once."""
        return tuple(name for name, p in self.model.named_parameters() if p.dim() == 1)

    def in_block(self, index: int) -> tuple[Site, ...]:
        """The sites of one block, in the model's order."""
        return tuple(s for s in self.sites if s.block == index)

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
        UnsupportedModelError: there is nothing to compress, or a block keeps weights where no pass can reach them
            (experts stored as one three-dimensional parameter, convolutions other than Conv2d).
    """
    family = family_of(model)
    towers = family.towers(model)
    blocks = tuple(name for tower in towers for name in tower.blocks)
    index = {name: i for i, name in enumerate(blocks)}
    sites = tuple(replace(site, block=_owner(site.name, index)) for site in family.sites(model))
    tied = _tied(model)
    linear, sites = sites, with_tables(model, sites, tied)
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Linear, Conv2d, Conv1D or Embedding layer: nothing to compress"
        )
    _refuse_unreachable(model, blocks, {s.parameter for s in sites})
    kept = model.state_dict().keys()
    buffers = tuple(name for name, _ in model.named_buffers() if name in kept)
    axes = family.axes(model, [s.name for s in linear])
    return Graph(model, blocks, sites, family, tied, buffers, axes, towers)


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


def _refuse_unreachable(model: nn.Module, blocks: tuple[str, ...], reached: set[str]) -> None:
    total = unreachable = 0
    examples = []
    for block in blocks:
        for name, parameter in model.get_submodule(block).named_parameters(prefix=block):
            total += parameter.numel()
            if parameter.dim() > 2 and name not in reached:
                unreachable += parameter.numel()
                examples.append(f"{name} {tuple(parameter.shape)}")
    if total and unreachable / total > MOST_UNREACHABLE:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps {unreachable / total:.0%} of its block weights in tensors that no pass can "
            f"reach, such as {examples[0]} ({len(examples)} in all). Mixtures of experts fused into one tensor, and "
            "convolutions other than a plain Conv2d, are not supported; use a dense model, or one whose experts are "
            "separate Linear layers."
        )


def forward(graph: Graph, batch: Tensor) -> Any:
    """Run the model on a batch of token ids, of images or, for other modules, of inputs."""
    return graph.family.forward(graph.model, batch)
