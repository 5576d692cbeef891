"""What of a model no pass makes smaller, in words and bytes: embeddings, a tower for images, routers, and the like."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.lazy import nn
from compress.models.experts import router_names
from compress.models.towers import named

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import torch
    from torch import Tensor

    from compress.models.graph import Graph

LEAST_REACHED = 0.9  # of the matrices that passes are for; below that much would be left dense without a word
VECTORS = "norms and biases"
LAYERS = "other layers"
OUTSIDE = "layers outside of the blocks"
FILTERS = "depthwise convolutions over time"
# These are not what passes are for; whoever wants them compressed names them.
APART = ("embeddings", "the output head", "routers", OUTSIDE)


@dataclass(frozen=True)
class Dense:
    """What is left as it is.

    Attributes:
        parts: what it is -> bytes, the largest first.
        unreached: the same, of matrices that no pass can reach where all that it can were chosen.
        reached: share of the matrices that passes are for that some pass could reach.
    """

    parts: Mapping[str, int] = field(default_factory=dict)
    unreached: Mapping[str, int] = field(default_factory=dict)
    reached: float = 1.0


def left_dense(graph: Graph, dtypes: Mapping[str, torch.dtype], worked_on: Collection[str], carried: int = 0) -> Dense:
    """What is left of a model as it is.

    Args:
        graph: of the model.
        dtypes: parameter name -> type it is stored in.
        worked_on: sites of which some pass makes something.
        carried: bytes of tensors that the model has no place for.
    """
    parts: Counter[str] = Counter()
    unreached: Counter[str] = Counter()
    apart = {*APART, VECTORS, *(_tower(tower.name) for tower in graph.left_out)}
    reached = considered = 0
    for name, what, tensor, reachable, smaller in _parameters(graph, dtypes, worked_on):
        size = tensor.numel() * dtypes[name].itemsize
        if smaller < 1:
            parts[what] += round((1 - smaller) * size)
        if what in apart:
            continue
        considered += tensor.numel()
        reached += round(reachable * tensor.numel())
        if reachable < 1:
            unreached[what] += round((1 - reachable) * size)
    if carried:
        parts["tensors that transformers makes no use of"] += carried
    return Dense(dict(parts.most_common()), dict(unreached.most_common()), reached / considered if considered else 1.0)


def _tower(name: str) -> str:
    return f"the {name} tower"


def _parameters(
    graph: Graph, dtypes: Collection[str], worked_on: Collection[str]
) -> Iterator[tuple[str, str, Tensor, float, float]]:
    """(name, what it is, value, share that passes can reach, share that they make smaller) of all but tied ones."""
    model = graph.model
    pieces: dict[str, list[str]] = {}
    for site in graph.sites:
        pieces.setdefault(site.parameter, []).append(site.name)
    inside = {site.parameter for site in graph.sites if site.block is not None}
    routers = tuple(f"{name}." for name in router_names(model))
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    filters = {site.parameter for site in graph.sites if site.filter}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    apart = {tower.name for tower in graph.left_out}
    for name, tensor in model.named_parameters():
        if name in graph.tied or name not in dtypes:  # a module of its own class keeps blocks that are gone
            continue
        sites = pieces.get(name, [])
        smaller = sum(site in worked_on for site in sites) / len(sites) if sites else 0.0
        if tensor.dim() < 2:
            what = VECTORS
        elif name in tables:
            what = "embeddings"
        elif name in heads:
            what = "the output head"
        elif named(name) in apart:
            what = _tower(named(name))
        elif name.startswith(routers):
            what = "routers"
        elif name in filters:
            what = FILTERS
        elif name in inside:
            what = LAYERS
        elif sites:
            what = OUTSIDE
        else:
            what = _kind_of(model, name)
        yield name, what, tensor, float(bool(sites)), smaller


def _kind_of(model: nn.Module, name: str) -> str:
    """What a matrix is that no pass reaches, by the class of its module."""
    owner, _, leaf = name.rpartition(".")
    if ".parametrizations." in f".{owner}.":  # torch makes the matrix of several when it is asked for
        return "layers with a parametrized weight"
    module = model.get_submodule(owner)
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"{type(module).__name__} layers"
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return f"{type(module).__name__} modules"
    return f"{leaf} of {type(module).__name__}"
