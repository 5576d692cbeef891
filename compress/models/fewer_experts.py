"""The experts of a mixture, and what the model is without some of them, or with some made of several. Reads no weight.

How many there are is said once, in the configuration, for all layers. Which parameters that decides is not written
down here by kind of model: the model is built anew with fewer, and what has another shape then is what has to be cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

from compress.errors import UnsupportedModelError
from compress.lazy import nn, transformers
from compress.models.cuts import Blend, Cut
from compress.models.experts import fused_parameters, passing_on, takes_choices
from compress.models.shorten import rebuilt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compress.models.cuts import Part
    from compress.models.graph import Graph
    from compress.models.site import Site

Value = TypeVar("Value")
Path = tuple[str, ...]

# What configurations call the number of experts of a layer, how many of them each token is sent to, and the groups of
# neighbours that a router first chooses among.
COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "layers_num_experts",
)
CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k",
    "top_k_experts",
    "moe_k",
    "moe_topk",
    "moe_top_k",
)
GROUPS, GROUPS_CHOSEN = "n_group", "topk_group"
LEAST_IN_GROUP = 2  # a group is ranked by its two best experts (DeepSeek V3)


@dataclass(frozen=True)
class Mixture:
    """The experts of a model.

    Attributes:
        layers: full names of the modules that hold them.
        count: how many each holds.
        chosen: to how many of them a token is sent.
        groups: that they fall into, neighbours together; 1 where the router knows none.
        groups_chosen: of how many of those the experts of a token are.
        beyond: what a token may be sent to beside them, which only passes it on.
    """

    layers: tuple[str, ...]
    count: int
    chosen: int = 1
    groups: int = 1
    groups_chosen: int = 1
    beyond: int = 0


@dataclass(frozen=True)
class Blends:
    """Experts that are made of several.

    Attributes:
        layers: module of experts -> number of one that stays -> what it becomes the sum of.
        routers: whether what routers have for each expert is summed up too, by `routed`; otherwise what they have for
            those that stay is left.
    """

    layers: Mapping[str, Mapping[int, tuple[Part, ...]]]
    routers: bool


@dataclass(frozen=True)
class Fewer:
    """A model without some of its experts.

    Attributes:
        graph: what is left, with experts renumbered.
        cuts: parameter or buffer -> what is left of it.
        configured: changed entries of the configuration, with their new values; those of a part of it inside that.
    """

    graph: Graph
    cuts: dict[str, Cut]
    configured: dict[str, Any]

    def name(self, old: str) -> str | None:
        """What a site or parameter is called now; None when it is gone."""
        parameter, _, number = old.rpartition(".")
        if parameter not in self.cuts or not number.isdecimal():
            return old
        kept = self.cuts[parameter].kept
        return f"{parameter}.{kept.index(int(number))}" if int(number) in kept else None

    def moved(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What was known by old names, by the new ones."""
        return {new: value for name, value in values.items() if (new := self.name(name)) is not None}


def mixture_of(graph: Graph) -> Mixture:
    """The experts of a model.

    Raises:
        UnsupportedModelError: it has none, or none that can go; says why.
    """
    model, kind = graph.model, type(graph.model).__name__
    layers = _layers(graph)
    if not layers or not isinstance(model, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"{kind} keeps no experts together in parameters that transformers runs, so none can go; for blocks use "
            "layer_drop, for weights wanda"
        )
    deaf = next((name for name in layers if not takes_choices(model.get_submodule(name))), None)
    if deaf is not None:
        raise UnsupportedModelError(
            f"{deaf} of a {kind} is not told which experts a token goes to, so what they are worth cannot be seen"
        )
    counts = {name: _experts_in(model.get_submodule(name)) for name in layers}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise UnsupportedModelError(
            f"{few} of a {kind} has {counts[few]} experts and {many} {counts[many]}; all must have equally many"
        )
    for name, tensor in graph.tensors():
        if not tensor.is_floating_point() and _layer_of(name, layers):
            raise UnsupportedModelError(
                f"{name} of a {kind} holds numbers of experts, by which tokens are sent to them, so none can go"
            )
    count = counts[layers[0]]
    sections = list(_sections(model.config.to_dict(), count))
    if not sections:
        raise UnsupportedModelError(
            f"the configuration of a {kind} has no entry that counts its {count} experts ({', '.join(COUNTS)})"
        )
    _, section = sections[0]
    chosen = [_most(section[name]) for name in CHOSEN if isinstance(section.get(name), int | list)]
    groups = section.get(GROUPS) or 1
    beyond = passing_on(model.get_submodule(layers[0]))
    return Mixture(layers, count, max(chosen, default=1), groups, section.get(GROUPS_CHOSEN) or groups, beyond)


def check_fewer(mixture: Mixture, keep: int) -> str | None:
    """Why a number of experts cannot be kept in every layer, and what can; or None."""
    count, groups = mixture.count, mixture.groups
    if keep > count:
        return f"keeps {keep} experts of every layer, and each has {count}"
    if groups > 1 and (keep % groups or keep < LEAST_IN_GROUP * groups) and keep != count:
        return (
            f"keeps {keep} experts of every layer, but the router chooses among {groups} groups of equally many first "
            f"({GROUPS}): keep a multiple of {groups}, and at least {LEAST_IN_GROUP * groups}"
        )
    return None


def fewer(
    graph: Graph, kept: Mapping[str, Sequence[int]], in_place: bool = False, blends: Blends | None = None
) -> Fewer:
    """A model without some experts.

    Args:
        graph: of the model, which `mixture_of` lets pass.
        kept: module of experts -> the numbers of those that stay, in order; equally many of each, that `check_fewer`
            lets pass.
        in_place: change the model itself. Otherwise it is rebuilt, parameters on the meta device.
        blends: what those that stay are made of; without, they stay as they are.

    Raises:
        UnsupportedModelError: with fewer experts in its configuration the model would be another one.
    """
    model, mixture = graph.model, mixture_of(graph)
    assert isinstance(model, transformers.PreTrainedModel)
    (keep,) = {len(numbers) for numbers in kept.values()}
    changes = _changes(model.config, mixture, keep)
    configured = _entries(changes)
    fresh = rebuilt(model, configured, f"{keep} experts in every layer")
    cuts = _cuts(graph, mixture, kept, fresh, blends or Blends({}, False))
    if in_place:
        for path, value in changes.items():
            setattr(reduce(getattr, path[:-1], model.config), path[-1], value)
        cut_in_place(model, fresh, cuts)
    return Fewer(_graph(graph, model if in_place else fresh, cuts), cuts, configured)


def _layers(graph: Graph) -> tuple[str, ...]:
    """Modules of fused experts in the blocks that are worked on, or in no block."""
    owners = (site.parameter.rpartition(".")[0] for site in graph.sites if site.is_expert)
    return tuple(dict.fromkeys(owners))


def _experts_in(module: nn.Module) -> int:
    """How many experts a module has; those that only pass on what they are given need no second matrix."""
    return min(fused.count for fused in fused_parameters(module))


def _most(value: Any) -> int:
    return int(max(value)) if isinstance(value, list) else int(value)


def _sections(settings: Mapping[str, Any], count: int, path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The parts of a configuration that say how many experts a layer has; the whole of it first."""
    if any(_counts(settings.get(name), count) for name in COUNTS):
        yield path, settings
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _sections(value, count, (*path, name))


def _counts(value: Any, count: int) -> bool:
    every = value if isinstance(value, list) else [value]
    return bool(every) and all(type(each) is int and each == count for each in every)


def _changes(config: transformers.PreTrainedConfig, mixture: Mixture, keep: int) -> dict[Path, Any]:
    """Where something of a configuration changes -> its new value."""
    most = mixture.groups_chosen * keep // mixture.groups + mixture.beyond
    changes: dict[Path, Any] = {}
    for path, section in _sections(config.to_dict(), mixture.count):
        for name in COUNTS:
            if _counts(value := section.get(name), mixture.count):
                changes[*path, name] = [keep] * len(value) if isinstance(value, list) else keep
        for name in CHOSEN:
            value = section.get(name)
            if isinstance(value, int | list) and _most(value) > most:
                changes[*path, name] = [min(v, most) for v in value] if isinstance(value, list) else most
    return changes


def _entries(changes: Mapping[Path, Any]) -> dict[str, Any]:
    """The changes as parts of the configuration inside each other."""
    entries: dict[str, Any] = {}
    for path, value in changes.items():
        reduce(lambda inner, name: inner.setdefault(name, {}), path[:-1], entries)[path[-1]] = value
    return entries


def _layer_of(name: str, layers: Sequence[str]) -> str | None:
    """The module of experts that a parameter belongs to: one of its own, or one beside it, as a router's."""
    beside = {f"{layer.rpartition('.')[0]}.": layer for layer in layers}
    found = [head for head in beside if name.startswith(head)]
    return beside[max(found, key=len)] if found else None


def _cuts(
    graph: Graph,
    mixture: Mixture,
    kept: Mapping[str, Sequence[int]],
    fresh: transformers.PreTrainedModel,
    blends: Blends,
) -> dict[str, Cut]:
    """What is left of each parameter and buffer that has another shape with fewer experts."""
    model, kind, count = graph.model, type(graph.model).__name__, mixture.count
    if [(n, type(m)) for n, m in model.named_modules()] != [(n, type(m)) for n, m in fresh.named_modules()]:
        raise UnsupportedModelError(f"with fewer experts in its configuration a {kind} has other modules")
    now = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    cuts = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name not in now or now[name].shape == value.shape:  # a pass may have given it biases
            continue
        layer, old, new = _layer_of(name, mixture.layers), tuple(value.shape), tuple(now[name].shape)
        places = [dim for dim, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
        gone = count - len(next(iter(kept.values())))
        if layer is None or len(old) != len(new) or len(places) != 1 or old[places[0]] - new[places[0]] != gone:
            raise UnsupportedModelError(
                f"{name} of a {kind} has shape {old}, and {new} with {gone} experts less: not known what of it goes"
            )
        (dim,) = places
        # What stands behind the experts stays: those of LongCat-Flash that only pass on what they are given.
        numbers = (*kept[layer], *range(count, old[dim]))
        cuts[name] = _cut(name, layer, Cut(dim, numbers, new), blends)
    for layer in mixture.layers:
        for fused in fused_parameters(model.get_submodule(layer)):
            if f"{layer}.{fused.leaf}" not in cuts and len(kept[layer]) < count:
                raise UnsupportedModelError(f"the configuration of a {kind} does not decide the experts of {layer}")
    return cuts


def _cut(name: str, layer: str, cut: Cut, blends: Blends) -> Cut:
    """What is left of a parameter of a layer, or of the router beside it, where experts are made of several."""
    owner, _, leaf = name.rpartition(".")
    parts = blends.layers.get(layer)
    if not parts or (owner != layer and not blends.routers):
        return cut
    return Blend(cut.dim, cut.kept, cut.shape, parts, leaf if owner == layer else "")


def cut_in_place(model: nn.Module, fresh: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Leave of a model in memory what `fresh` has."""
    for (path, module), (_, other) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        for values in (module._parameters, module._buffers):
            for leaf, value in values.items():
                cut = cuts.get(f"{path}.{leaf}" if path else leaf)
                if cut is not None and value is not None:
                    left = cut.of(value.detach())
                    kept = nn.Parameter(left, value.requires_grad) if isinstance(value, nn.Parameter) else left
                    values[leaf] = kept
        for key, number in vars(other).items():  # how many experts there are, and how many a token is sent to
            mine = vars(module).get(key)
            if not key.startswith("_") and type(number) is int and type(mine) is int and mine != number:
                setattr(module, key, number)


def _graph(graph: Graph, model: nn.Module, cuts: Mapping[str, Cut]) -> Graph:
    left = Fewer(graph, dict(cuts), {})
    sites = [made for site in graph.sites if (made := _site(site, left)) is not None]

    def new(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(n for name in names if (n := left.name(name)) is not None)

    axes = [replace(a, makers=new(a.makers), readers=new(a.readers)) for a in graph.axes]
    return replace(graph, model=model, sites=tuple(sites), axes=tuple(a for a in axes if a.makers))


def _site(site: Site, left: Fewer) -> Site | None:
    cut, name = left.cuts.get(site.parameter), left.name(site.name)
    if cut is None or name is None:
        return site if cut is None else None
    if site.is_expert:
        number = cut.kept.index(site.ref.index[0])
        return replace(site, name=name, ref=replace(site.ref, index=(number,), of=len(cut.kept)))
    rows, columns = reversed(cut.shape) if site.ref.transposed else cut.shape
    return replace(site, shape=(rows, columns))
