"""Which blocks of a model may go, and what the model is without them. Reads no weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from compress.errors import UnsupportedModelError
from compress.lazy import nn, transformers
from compress.models.changed_settings import changed
from compress.models.loading import built

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compress.models.cuts import Cut
    from compress.models.graph import Graph

Value = TypeVar("Value")
COUNT = "num_hidden_layers"  # or what `attribute_map` of the configuration says instead
PER_BLOCK = ("layer", "block")  # in the names of a configuration's lists that have an entry for every block
NUMBER = "layer_idx"  # by which a module outside transformers may know its block's place


@dataclass(frozen=True)
class Shorter:
    """A model without some of its blocks.

    Attributes:
        graph: what is left, with its blocks renumbered.
        before: the model's blocks until then.
        kept: which of them are left.
        configured: changed entries of the configuration, with their new values.
    """

    graph: Graph
    before: tuple[str, ...]
    kept: tuple[int, ...]
    configured: dict[str, Any]

    @property
    def cuts(self) -> dict[str, Cut]:
        """Parameter -> what is left of it: none is cut, as blocks go whole."""
        return {}

    def name(self, old: str) -> str | None:
        """What a module or parameter is called now; None when it is gone."""
        return _renumbered(old, self.before, self.kept)

    def moved(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What was known by old names, by the new ones."""
        return {new: value for name, value in values.items() if (new := self.name(name)) is not None}


def without(graph: Graph, gone: Sequence[int], in_place: bool = False) -> Shorter:
    """A model without some blocks, that `check` lets pass.

    Args:
        graph: of the model.
        gone: numbers of the blocks.
        in_place: change the model itself. Otherwise a transformers model is rebuilt, parameters on the meta device,
            and any other module, which has no configuration to build it from, keeps its blocks: names and shapes are
            those without them all the same.

    Raises:
        UnsupportedModelError: with fewer blocks in its configuration the model would be another one.
    """
    model = graph.model
    kept = tuple(i for i in range(len(graph.blocks)) if i not in gone)
    configured: dict[str, Any] = {}
    if isinstance(model, transformers.PreTrainedModel):
        configured = _changes(model.config, len(graph.blocks), kept)
        fresh = rebuilt(model, configured, f"{configured[count_name(model.config)]} blocks")
        _number(graph, kept, fresh, in_place)
        if in_place:
            for name, value in configured.items():
                setattr(model.config, name, value)
        else:
            model = fresh
    if in_place:
        blocks = list_of(graph)
        assert isinstance(blocks, nn.ModuleList | nn.Sequential)
        for new, old in enumerate(kept):
            for module in blocks[old].modules():
                if vars(module).get(NUMBER) == old:
                    setattr(module, NUMBER, new)
        for i in sorted(gone, reverse=True):
            del blocks[i]
    return Shorter(_graph(graph, model, kept), graph.blocks, kept, configured)


def _graph(graph: Graph, model: nn.Module, kept: Sequence[int]) -> Graph:
    def new(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(n for name in names if (n := _renumbered(name, graph.blocks, kept)) is not None)

    sites = []
    for site in graph.sites:
        names = new((site.name,))
        place = None if site.block is None or not names else kept.index(site.block)
        refs = [replace(site.ref, parameter=parameter) for parameter in new((site.parameter,))]
        sites += [
            replace(site, name=n, ref=ref, block=place, shared=new(site.shared))
            for n, ref in zip(names, refs, strict=True)
        ]
    axes = [replace(a, makers=new(a.makers), readers=new(a.readers)) for a in graph.axes]
    return replace(
        graph,
        model=model,
        blocks=graph.blocks[: len(kept)],
        towers=tuple(replace(tower, blocks=tower.blocks[: len(kept)]) for tower in graph.towers),
        sites=tuple(sites),
        buffers=new(graph.buffers),
        axes=tuple(a for a in axes if a.makers),
    )


def _renumbered(name: str, blocks: tuple[str, ...], kept: Sequence[int]) -> str | None:
    prefix = blocks[0].rpartition(".")[0]
    head = f"{prefix}." if prefix else ""
    place, dot, rest = name.removeprefix(head).partition(".")
    if not name.startswith(head) or f"{head}{place}" not in blocks:
        return name
    return f"{head}{kept.index(int(place))}{dot}{rest}" if int(place) in kept else None


def list_of(graph: Graph) -> nn.Module | None:
    """What holds the blocks, if it holds them all and they are numbered."""
    prefix = graph.blocks[0].rpartition(".")[0]
    head = f"{prefix}." if prefix else ""
    found = graph.model.get_submodule(prefix)
    every = tuple(f"{head}{i}" for i in range(len(graph.blocks)))
    return found if graph.blocks == every and len(list(found.named_children())) == len(every) else None


def count_name(config: transformers.PreTrainedConfig) -> str:
    """The entry of a configuration that counts its blocks."""
    return str(config.attribute_map.get(COUNT, COUNT))


def _changes(config: transformers.PreTrainedConfig, count: int, kept: Sequence[int]) -> dict[str, Any]:
    """The entries of a configuration that change when only some blocks are kept, with their new values."""
    changes: dict[str, Any] = {count_name(config): len(kept)}
    for name, value in config.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == count and any(part in name for part in PER_BLOCK):
            changes[name] = [value[i] for i in kept]
    return changes


def rebuilt(
    model: transformers.PreTrainedModel, configured: dict[str, Any], having: str
) -> transformers.PreTrainedModel:
    """A model of the same kind, parameters on the meta device.

    Args:
        model: whose configuration is taken.
        configured: entries of it that change, with their new values.
        having: what it has then, in words.

    Raises:
        UnsupportedModelError: there is no such model.
    """
    try:  # from entries, as a written config.json is read: some lists are made of others then
        settings = changed(copy.deepcopy(model.config).to_dict(), configured, model.config)
        config = type(model.config).from_dict(settings)
        return built(lambda: type(model)._from_config(config))
    except Exception as error:  # a wrong value surfaces wherever the model's code first uses it
        raise UnsupportedModelError(f"{type(model).__name__} cannot be built with {having}: {error}") from error


def _number(graph: Graph, kept: Sequence[int], fresh: transformers.PreTrainedModel, in_place: bool) -> None:
    """Check that the blocks of the shorter model are those that are left, but for their numbers.

    Their kind may come from their place: attention over a window in every other block, say. `in_place`: the old blocks
    get their new numbers.

    Raises:
        UnsupportedModelError: a block is another one at its new place.
    """
    model, name = graph.model, type(graph.model).__name__
    if len(list(fresh.get_submodule(graph.blocks[0].rpartition(".")[0]).children())) != len(kept):
        raise UnsupportedModelError(f"the configuration of a {name} does not decide how many blocks it has")
    for new, old in enumerate(kept):
        was, now = (m.get_submodule(graph.blocks[i]) for m, i in ((model, old), (fresh, new)))
        modules = ([(path, type(m)) for path, m in block.named_modules()] for block in (was, now))
        shapes = ({(path, p.shape) for path, p in block.named_parameters()} for block in (now, was))
        if next(modules) != next(modules) or not next(shapes) <= next(shapes):  # a pass may have given it biases
            raise UnsupportedModelError(f"{graph.blocks[old]} of a {name} would be another block at place {new}")
        for (path, a), (_, b) in zip(was.named_modules(), now.named_modules(), strict=True):
            before, after = dict(_simple(a)), dict(_simple(b))
            for key in {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}:
                if (before.get(key), after.get(key)) != (old, new):
                    where = ".".join(part for part in (graph.blocks[old], path, key) if part)
                    raise UnsupportedModelError(
                        f"{where} of a {name} is {before.get(key)}, and would be {after.get(key)} at place {new}: its "
                        "blocks depend on where they are, so none can go"
                    )
                if in_place:
                    setattr(a, key, new)


def _simple(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Numbers and words a module keeps; not what matters for training only."""
    for key, value in vars(module).items():
        unused = key.startswith("_") or key == "training" or "drop" in key
        if isinstance(value, bool | int | float | str) and not unused:
            yield key, value
