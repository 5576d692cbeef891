"""The neurons and heads of a model, and what the model is without some of them. Reads no weight.

Which rows and columns belong to a unit is said by the family's wiring (`symmetry.py`); how many there are is said once,
in the configuration, for all blocks. The model is built anew with fewer, and must then have the shapes that the wiring
says.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

from compress.errors import UnsupportedModelError
from compress.lazy import torch, transformers
from compress.models.changed_settings import changed
from compress.models.cuts import Cut
from compress.models.fewer_experts import cut_in_place
from compress.models.graph import free_axes
from compress.models.shorten import rebuilt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.models.symmetry import Part, Place, Units

Value = TypeVar("Value")

NEURONS = ("intermediate_size", "ffn_dim", "n_inner")  # what configurations call the width of an MLP
HEADS, GROUPS, SIZE = "num_attention_heads", "num_key_value_heads", "head_dim"
IN_WORDS: Mapping[Part, str] = {"heads": "key-value groups", "mlp": "neurons"}
KNOWN = "Llama and its like, GPT-2, GPT-NeoX, OPT, BERT and ViT"


@dataclass(frozen=True, eq=False)
class Coupled:
    """Units that one layer reads, and everything that goes with them.

    Attributes:
        reader: the site that reads them.
        units: with their places, the last of which are the columns of the reader.
    """

    reader: str
    units: Units

    @property
    def columns(self) -> Tensor:
        """(units, width) int64: which columns of the reader, as a matrix (out, in), each has."""
        return self.units.places[-1].index

    @property
    def makers(self) -> tuple[Place, ...]:
        """Where the matrices lie that make them."""
        return tuple(p for p in self.units.places[:-1] if p.tensor.endswith(".weight"))


@dataclass(frozen=True)
class Width:
    """One part of every block that can be made narrower.

    Attributes:
        coupled: its units, in the order of the model.
        count: how many units each has.
    """

    part: Part
    coupled: tuple[Coupled, ...]
    count: int


@dataclass(frozen=True)
class Narrower:
    """A model without some of its units.

    Attributes:
        graph: what is left.
        cuts: parameter -> what is left of it.
        configured: changed entries of the configuration, with their new values.
    """

    graph: Graph
    cuts: dict[str, Cut]
    configured: dict[str, Any]

    def moved(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What was known by old names, by the new ones: the same."""
        return dict(values)


def width_of(graph: Graph, part: Part) -> Width:
    """The units of a part of every block.

    Raises:
        UnsupportedModelError: which they are is not known, or they cannot go; says why.
    """
    model, kind, what = graph.model, type(graph.model).__name__, IN_WORDS[part]
    if not isinstance(model, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"{kind} is no model of transformers, whose configuration says how many {what} there are, so none can go"
        )
    readers = {site.parameter: site for site in graph.sites if site.block is not None}
    found = [u for u in graph.units() if u.part == part and u.places[-1].tensor in readers]
    if not found:
        raise UnsupportedModelError(
            f"which rows and columns belong to the {what} of a {kind} is not known, so none can go (known: {KNOWN}); "
            "for blocks use layer_drop, for weights wanda"
        )
    have = {readers[units.places[-1].tensor].block for units in found}
    lacking = next((name for index, name in enumerate(graph.blocks) if index not in have), None)
    if lacking is not None:
        raise UnsupportedModelError(
            f"{lacking} of a {kind} has no {what} that are known, and others have, so none can go"
        )
    counts = {units.places[-1].tensor: units.count for units in found}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise UnsupportedModelError(
            f"{few} of a {kind} reads {counts[few]} {what} and {many} {counts[many]}; all must read equally many"
        )
    for units in found if found[0].count > 1 else ():  # of one group a norm over a head is one over all
        norm = next((p.tensor for p in units.places if p.tensor.endswith(".weight") and not _is_matrix(model, p)), None)
        if norm is not None:
            raise UnsupportedModelError(
                f"{norm} of a {kind} takes a norm over all heads, which would be another one without some of them; "
                "use parts: [mlp]"
            )
    coupled = tuple(Coupled(readers[units.places[-1].tensor].name, units) for units in found)
    return Width(part, coupled, found[0].count)


def _is_matrix(model: nn.Module, place: Place) -> bool:
    return model.get_parameter(place.tensor).dim() == 2


def nearest(graph: Graph, width: Width, target: float, multiple: int) -> int:
    """How many units stay: the number nearest to `target` that the configuration allows, of two the larger.

    Args:
        graph: of the model.
        width: the part.
        target: how many should stay.
        multiple: what it must be a multiple of.

    Raises:
        UnsupportedModelError: the nearest number is none.
    """
    what = IN_WORDS[width.part]
    possible = sorted(range(0, width.count + 1, multiple), key=lambda keep: (abs(keep - target), -keep))
    if possible[0] == 0:
        of = f" as a multiple of {multiple}" if multiple > 1 else ""
        raise UnsupportedModelError(
            f"of {width.count} {what} in a block about {target:g} should stay, and{of} that is none: take out less"
            + (", or lower multiple_of" if multiple > 1 else "")
        )
    allowed = (keep for keep in possible if keep and _allows(graph.model, settings(graph, {width: keep})))
    return next(allowed, width.count)


def _allows(model: nn.Module, configured: Mapping[str, Any]) -> bool:
    """Whether there is such a configuration; that of Llama wants a hidden size that its heads divide."""
    assert isinstance(model, transformers.PreTrainedModel)
    try:
        type(model.config).from_dict(changed(copy.deepcopy(model.config).to_dict(), configured, model.config))
    except Exception:  # a wrong value surfaces as whatever checks it first
        return False
    return True


def settings(graph: Graph, keep: Mapping[Width, int]) -> dict[str, Any]:
    """The entries of the configuration that change, with their new values; those of a part of it inside that."""
    config: Any = graph.model.config
    made: dict[str, Any] = {}
    for width, count in keep.items():
        for path, section in _sections(graph.model, config, width):
            entries = _entries(section, width, count)
            made = changed(made, reduce(lambda inner, name: {name: inner}, reversed(path), entries) if entries else {})
    return made


def _sections(model: nn.Module, config: Any, width: Width) -> list[tuple[tuple[str, ...], Any]]:
    """The parts of a configuration, and where they are, that the modules with the units were built from.

    A model of several towers has one for each, and what of another tower is called the same is not meant. All of them
    where no module says which is its own.
    """
    every = list(_parts(config))
    asked = {id(_config_of(model, coupled.reader)) for coupled in width.coupled}
    return [(path, section) for path, section in every if id(section) in asked] or every


def _parts(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for name, inner in vars(config).items():
        if isinstance(inner, transformers.PreTrainedConfig):
            yield from _parts(inner, (*path, name))


def _config_of(model: nn.Module, name: str) -> Any:
    """The configuration of the innermost module around a layer that has one."""
    while name:
        name = name.rpartition(".")[0]
        found = vars(model.get_submodule(name)).get("config")
        if isinstance(found, transformers.PreTrainedConfig):
            return found
    return None


def _entries(config: Any, width: Width, keep: int) -> dict[str, Any]:
    """The entries of a part of a configuration that change; those of the parts inside it are not its own."""
    inside = [name for name, inner in vars(config).items() if isinstance(inner, transformers.PreTrainedConfig)]
    return _changed_in({name: value for name, value in config.to_dict().items() if name not in inside}, width, keep)


def _changed_in(section: Mapping[str, Any], width: Width, keep: int) -> dict[str, Any]:
    inner = {name: _changed_in(value, width, keep) for name, value in section.items() if isinstance(value, dict)}
    found: dict[str, Any] = {name: changes for name, changes in inner.items() if changes}
    if width.part == "mlp":
        names = [name for name in NEURONS if name in section and section[name] in (width.count, None)]
        return {**found, **dict.fromkeys(names, keep)}
    size, repeats = width.coupled[0].units.inner[-1].places[-1].index.shape  # values that are free within a group
    if section.get(HEADS) == width.count * repeats:
        found |= {HEADS: keep * repeats, SIZE: size}
        found |= {GROUPS: keep} if section.get(GROUPS) is not None else {}
    return found


def narrower(graph: Graph, kept: Mapping[Width, Mapping[str, Sequence[int]]], in_place: bool = False) -> Narrower:
    """A model without some units.

    Args:
        graph: of the model.
        kept: part -> reader -> the numbers of the units that stay, ascending; equally many for each reader of a part.
        in_place: change the model itself. Otherwise it is rebuilt, parameters on the meta device.

    Raises:
        UnsupportedModelError: with fewer units in its configuration the model would be another one.
    """
    model = graph.model
    assert isinstance(model, transformers.PreTrainedModel)
    keep = {width: len(next(iter(readers.values()))) for width, readers in kept.items()}
    configured = settings(graph, keep)
    fresh = rebuilt(model, configured, " and ".join(f"{n} {IN_WORDS[w.part]} in a block" for w, n in keep.items()))
    cuts: dict[str, Cut] = {}
    for width, readers in kept.items():
        for coupled in width.coupled:
            cuts |= _cuts(model, coupled, readers[coupled.reader])
    _check(model, fresh, cuts, kept)
    if in_place:
        for path, value in _paths(configured):
            setattr(reduce(getattr, path[:-1], model.config), path[-1], value)
        cut_in_place(model, fresh, cuts)
    left = model if in_place else fresh
    sites = tuple(_site(site, cuts.get(site.parameter)) for site in graph.sites)
    axes = free_axes(graph.family, left, [site for site in sites if not site.looked_up])
    return Narrower(replace(graph, model=left, sites=sites, axes=axes), cuts, configured)


def _paths(entries: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _paths(value, (*path, name))
        else:
            yield (*path, name), value


def _cuts(model: nn.Module, coupled: Coupled, kept: Sequence[int]) -> dict[str, Cut]:
    """What is left of each parameter that has something of some units."""
    found = {}
    for place in coupled.units.places:
        entries = tuple(place.index[torch.tensor(kept, device="cpu")].flatten().sort().values.tolist())
        shape = list(model.get_parameter(place.tensor).shape)
        shape[place.axis] = len(entries)
        found[place.tensor] = Cut(place.axis, entries, tuple(shape))
    return found


def _check(
    model: nn.Module, fresh: nn.Module, cuts: Mapping[str, Cut], kept: Mapping[Width, Mapping[str, Sequence[int]]]
) -> None:
    """Compare the model as its configuration builds it with what is left of this one."""
    kind = type(model).__name__
    if [(n, type(m)) for n, m in model.named_modules()] != [(n, type(m)) for n, m in fresh.named_modules()]:
        raise UnsupportedModelError(f"with other widths in its configuration a {kind} has other modules")
    now = {n: tuple(v.shape) for n, v in (*fresh.named_parameters(), *fresh.named_buffers())}
    part_of = {p.tensor: w.part for w in kept for c in w.coupled for p in c.units.places}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        left = cuts[name].shape if name in cuts else tuple(value.shape)
        if now.get(name, left) == left:  # a pass may have given it biases
            continue
        if part_of.get(name) == "heads":
            raise UnsupportedModelError(
                f"the configuration of a {kind} has no size of a head ({SIZE}): it divides its hidden size among the "
                "heads, and with fewer of them would be another model; use parts: [mlp]"
            )
        raise UnsupportedModelError(
            f"{name} of a {kind} would have shape {now[name]} by its configuration, and {left} by what is left of it, "
            "so nothing can go"
        )


def _site(site: Site, cut: Cut | None) -> Site:
    if cut is None:
        return site
    rows, columns = reversed(cut.shape) if site.ref.transposed else cut.shape
    return replace(site, shape=(rows, columns))
