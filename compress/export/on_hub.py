"""The names that the hub has for a model's parameters, and which rows of its experts each matrix there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.checkpoint.matching import Spelling
from compress.lazy import nn, torch, transformers
from compress.models.experts import router_names
from compress.models.hub_names import undone

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import Tensor

    from compress.models.graph import Graph
    from compress.models.hub_names import Described, Undone
    from compress.models.site import Site

WEIGHT = ".weight"


def groups_on_hub(graph: Graph, described: Mapping[str, Described]) -> list[Undone]:
    """How a model's tensors lie on the hub; empty where they lie there as in the model, or that is not known.

    Args:
        graph: of the model.
        described: shape and type of each of its tensors, by name, in order.
    """
    if not isinstance(graph.model, transformers.PreTrainedModel):
        return []
    spelling = Spelling(graph.model)
    return undone(graph.model, described, lambda stored: spelling.place(stored, described)) or []


def described_by(graph: Graph) -> dict[str, Described]:
    """Shape and type of each of a model's tensors, as the model has them."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in graph.tensors() if name not in graph.tied}


def layers_on_hub(names: Iterable[str], groups: Iterable[Undone]) -> dict[str, str]:
    """What layers are called on the hub, by their names in the model."""
    renamed = {group.names[0]: group.first for group in groups if group.converter is None}
    weights = {name: f"{name}{WEIGHT}" for name in names}
    return {name: renamed.get(weight, weight).removesuffix(WEIGHT) for name, weight in weights.items()}


def module_on_hub(name: str, groups: Iterable[Undone]) -> str:
    """What a module with layers in it is called on the hub, by its name in the model."""
    for group in groups:
        leaf = group.names[0].removeprefix(name)
        if group.converter is None and leaf.startswith(".") and group.first.endswith(leaf):
            return group.first.removesuffix(leaf)
    return name


def dense_layers(graph: Graph, coded: Collection[str]) -> list[str]:
    """The layers without codes, and the routers, which are layers to others than transformers."""
    modules = dict(graph.model.named_modules())
    plain = [name for name, module in modules.items() if type(module) is nn.Linear]
    plain += [n for n in sorted(router_names(graph.model)) if n not in plain and hasattr(modules[n], "weight")]
    return [name for name in plain if name not in coded]


@dataclass(frozen=True)
class HubMatrix:
    """A matrix of the hub that is rows of one expert.

    Attributes:
        name: of the layer that it would be the weight of.
        rows: of the expert's (out, in), in the order they have there.
        count: how many rows that are.
    """

    name: str
    rows: slice | tuple[int, ...]
    count: int


def expert_matrices(group: Undone, experts: Mapping[str, Sequence[Site]]) -> dict[str, list[HubMatrix]] | None:
    """Site -> the matrices of the hub that its rows are, of a group of parameters that lie together.

    Found by what the conversion makes of the numbers of rows: whatever it cuts, turns and orders.

    Args:
        group: of parameters, all of which hold experts.
        experts: parameter -> its sites, in order.

    Returns:
        None where the hub has no matrix of its own for each expert.
    """
    sites = [site for name in group.names for site in experts[name]]
    rows = max(site.shape[0] for site in sites)
    first = {site.name: rows * number for number, site in enumerate(sites)}

    def numbered(name: str) -> Tensor:
        """A parameter of the same shape with one column, that of the numbers of its rows."""
        made = [first[site.name] + torch.arange(site.shape[0])[:, None] for site in experts[name]]
        whole = torch.stack([each.T if experts[name][0].ref.transposed else each for each in made])
        return whole.flatten(0, 1) if experts[name][0].ref.joined else whole

    try:
        made = group.tensors(numbered)
    except (ValueError, RuntimeError, KeyError, IndexError, AttributeError, TypeError):
        return None
    found: dict[str, list[HubMatrix]] = {}
    for name, numbers in made.items():
        if numbers.dim() != 2 or numbers.shape[1] != 1 or not name.endswith(WEIGHT):
            return None
        places = numbers[:, 0]
        site = sites[int(places[0]) // rows]
        within = (places - first[site.name]).tolist()
        if min(within) < 0 or max(within) >= site.shape[0]:
            return None
        run = within == list(range(within[0], within[0] + len(within)))
        chosen = slice(within[0], within[0] + len(within)) if run else tuple(within)
        found.setdefault(site.name, []).append(HubMatrix(name.removesuffix(WEIGHT), chosen, len(within)))
    whole = all(sum(m.count for m in found.get(site.name, ())) == site.shape[0] for site in sites)
    return found if whole else None


def matrices_on_hub(graph: Graph, groups: Sequence[Undone]) -> dict[str, list[HubMatrix]]:
    """Site -> the matrices of the hub that its rows are, of every expert that has matrices of its own there."""
    experts: dict[str, list[Site]] = {}
    for site in graph.sites:
        if site.is_expert:
            experts.setdefault(site.parameter, []).append(site)
    found: dict[str, list[HubMatrix]] = {}
    for group in groups:
        if group.converter is not None and all(name in experts for name in group.names):
            found |= expert_matrices(group, experts) or {}
    return found
