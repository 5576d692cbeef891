"""A model as blocks and sites.

A block is one of the model's repeated modules (decoder layers, residual blocks; the children of a plain
`nn.Sequential`). A site is a matrix to compress: the weight of a `Linear`, of a `Conv2d` (a row an output channel),
or of a transformers `Conv1D` (stored transposed). Nothing is traced: which block feeds which is observed while
running (`calibration/collect.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.errors import UnsupportedModelError
from compress.lazy import nn, torch, transformers
from compress.models.symmetry import find_axes, is_transposed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.models.symmetry import Axis

# Above this share of block weights out of every pass's reach, running would be pretending.
MOST_UNREACHABLE = 0.01


@dataclass(frozen=True)
class Site:
    """One matrix to compress.

    Attributes:
        name: the module's full name, as patterns match it.
        shape: (out, in); (out, in / groups * kernel height * kernel width) of a convolution.
        transposed: the module keeps it as (in, out).
        block: index into `Graph.blocks`, or None for a site outside every block, such as an output head.
        stored: the parameter's own shape where it is a convolution's, (out, in / groups, kernel height, kernel width).
        groups: of a convolution; with more than one, each row multiplies only its own group's inputs.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    block: int | None
    stored: tuple[int, ...] = ()
    groups: int = 1

    @property
    def kernel(self) -> int:
        """Neighbouring columns that belong to one input channel."""
        return math.prod(self.stored[2:])

    @property
    def parameter(self) -> str:
        """The parameter's full name."""
        return f"{self.name}.weight" if self.name else "weight"

    def matrix(self, value: Tensor) -> Tensor:
        """The parameter's value as (out, in)."""
        if self.stored:
            return value.reshape(self.shape)
        return value.T.contiguous() if self.transposed else value

    def value(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if self.stored:
            return matrix.reshape(self.stored)
        return matrix.T.contiguous() if self.transposed else matrix


@dataclass(frozen=True)
class Graph:
    """A model (its parameters possibly on the meta device) with its blocks and sites found.

    Attributes:
        buffers: names of the buffers that checkpoints hold, such as the running means of a batch normalisation.
        tied: parameter name -> the name its value is kept under, for parameters that share one tensor.
        axes: channels between sites whose order is free.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    tied: dict[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    axes: tuple[Axis, ...] = ()

    def rows_of(self, site: str) -> Axis | None:
        """The channels that a site's rows are, where their order is free."""
        return next((a for a in self.axes if site in a.makers), None)

    def columns_of(self, site: str) -> Axis | None:
        """The channels that a site's columns are, where their order is free."""
        return next((a for a in self.axes if site in a.readers), None)

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
    def is_language_model(self) -> bool:
        """Whether it is called with token ids."""
        return isinstance(self.model, transformers.PreTrainedModel) and not self.is_image_model

    @property
    def is_image_model(self) -> bool:
        """Whether it is a transformers model called with images."""
        return isinstance(self.model, transformers.PreTrainedModel) and self.model.main_input_name == "pixel_values"


def find(model: nn.Module) -> Graph:
    """Blocks and sites of a model.

    Raises:
        UnsupportedModelError: there is nothing to compress, or a block keeps weights where no pass can reach them
            (experts stored as one three-dimensional parameter, convolutions other than Conv2d).
    """
    blocks = _blocks(model)
    index = {name: i for i, name in enumerate(blocks)}
    found = (_site(name, module, _owner(name, index)) for name, module in model.named_modules())
    sites = tuple(site for site in found if site)
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Linear, Conv2d or Conv1D layer: nothing to compress"
        )
    _refuse_unreachable(model, blocks, {s.parameter for s in sites})
    kept = model.state_dict().keys()
    buffers = tuple(name for name, _ in model.named_buffers() if name in kept)
    return Graph(model, blocks, sites, _tied(model), buffers, find_axes(model, [s.name for s in sites]))


def _site(name: str, module: nn.Module, block: int | None) -> Site | None:
    transposed = is_transposed(module)
    if transposed or isinstance(module, nn.Linear):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.shape
        return Site(name, (columns, rows) if transposed else (rows, columns), transposed, block)
    # A subclass with a forward of its own does something else with its weight.
    if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
        stored = tuple(module.weight.shape)
        return Site(name, (stored[0], math.prod(stored[1:])), False, block, stored, module.groups)
    return None


def _blocks(model: nn.Module) -> tuple[str, ...]:
    if type(model) is nn.Sequential:
        return tuple(name for name, _ in model.named_children())
    best: tuple[str, ...] = ()
    most = 0
    for name, module in model.named_modules():
        children = list(module.named_children())
        if isinstance(module, nn.ModuleList) and children and len({type(c) for _, c in children}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if size > most:
                best, most = tuple(f"{name}.{child}" for child, _ in children), size
    return _opened(model, best) or ("",)  # no repeated modules: the whole model is the one block


def _opened(model: nn.Module, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """Blocks that only hold a list of modules (the stages of a ResNet) give way to what is on the list."""
    found: list[str] = []
    for name in blocks:
        children = list(model.get_submodule(name).named_children())
        if len(children) != 1 or not isinstance(children[0][1], nn.Sequential | nn.ModuleList):
            return blocks
        found += [f"{name}.{children[0][0]}.{inner}" for inner, _ in children[0][1].named_children()]
    return tuple(found)


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
    if graph.is_language_model:
        return graph.model(input_ids=batch, use_cache=False)
    batch = batch.clone()  # a first layer may work in place
    return graph.model(pixel_values=batch) if graph.is_image_model else graph.model(batch)
