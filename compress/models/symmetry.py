"""What of a model may be put in another order without changing what it computes, known by how it is wired.

Neurons of an MLP are such units, heads of attention, and values within a head: rows of the layers that make them,
columns of the layer that reads them. `Units` has every place that has to move along, biases too; `Axis` is the same for
passes that work on matrices alone, and leaves out layers with a bias. Only where nothing else sees them, which is never
guessed from names alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch import Tensor, nn

Part = Literal["heads", "mlp"]


@dataclass(frozen=True)
class Axis:
    """Channels in heads; their order is free within each head.

    Attributes:
        makers: sites whose rows they are, (heads * size) of them.
        readers: sites whose columns they are, (heads * repeats * size) of them.
        size: channels of a head.
        heads: 1 for the neurons of an MLP.
        repeats: how many heads of the readers read the same head, as in grouped-query attention.
    """

    makers: tuple[str, ...]
    readers: tuple[str, ...]
    size: int
    heads: int = 1
    repeats: int = 1

    def rows(self, order: Tensor) -> Tensor:
        """(heads, size) which channel comes first in each head -> (heads * size,) the rows of a maker in that order."""
        return (order + self.size * torch.arange(self.heads)[:, None]).flatten()

    def columns(self, order: Tensor) -> Tensor:
        """(heads, size) -> (heads * repeats * size,) the columns of a reader in that order."""
        wide = order.repeat_interleave(self.repeats, 0)
        return (wide + self.size * torch.arange(len(wide))[:, None]).flatten()


@dataclass(frozen=True, eq=False)
class Place:
    """Where units lie along one axis of a tensor.

    Attributes:
        tensor: its name.
        axis: of the tensor.
        index: (units, width) int64, the entries along the axis that belong to each unit.
        counts: whether it tells one unit from another; running statistics only move along.
    """

    tensor: str
    axis: int
    index: Tensor
    counts: bool = True


@dataclass(frozen=True, eq=False)
class Units:
    """Parts of a model whose order is free.

    Attributes:
        places: everywhere they lie.
        inner: what is free within each unit. Its places count from 0 to the width of the unit.
        part: what they are, where the wiring says it: neurons of an `mlp`, or `heads` (key-value groups with their
            query heads). Their last place is then the columns of the layer that reads them.
    """

    places: tuple[Place, ...]
    inner: tuple[Units, ...] = ()
    part: Part | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.places[0].index)

    @property
    def crossing(self) -> bool:
        """Whether some tensor has them along both of its axes."""
        axes = {(place.tensor, place.axis) for place in self.places}
        return len(axes) > len(self.tensors())

    def tensors(self) -> set[str]:
        """The names of all tensors that move."""
        return {place.tensor for place in self.places}

    def among(self, names: set[str]) -> Units | None:
        """These units with only their places in the given tensors; None if there are none."""
        places = tuple(place for place in self.places if place.tensor in names)
        inner = tuple(found for units in self.inner if (found := units.among(names)))
        return replace(self, places=places, inner=inner) if places else None


@dataclass(frozen=True)
class Wiring:
    """How a kind of model is put together: names of layers in the module that holds them.

    Attributes:
        attention: query, key, value and output; or one layer for the first three, and output.
        mlp: the layers that make its neurons, and last the one that reads them.
        rotary: positions turn queries and keys, so their order within a head is not free.
        by_head: of one layer for three: query, key and value of a head stand together.
        linear: of the layers that make the neurons, that with a factor in what it makes the neuron has, as those that
            a gate multiplies.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    rotary: bool = False
    by_head: bool = False
    linear: str | None = None


def axes_among(units: Iterable[Units], sites: Collection[str]) -> tuple[Axis, ...]:
    """The free orders among some sites, of units that lie nowhere else."""
    names = set(sites)
    found = (axis for each in units for axis in _axes(each))
    return tuple(axis for axis in found if {*axis.makers, *axis.readers} <= names)


def _axes(units: Units) -> Iterator[Axis]:
    """The axes of neurons themselves; for heads those of the values, which are the last that is free within them."""
    free, heads = (units.inner[-1], units.count) if units.inner else (units, 1)
    if any(place.tensor.endswith(".bias") for place in free.places):
        return
    ends = [tuple(p.tensor.removesuffix(".weight") for p in free.places if p.axis == axis) for axis in (0, 1)]
    yield Axis(ends[0], ends[1], free.count, heads, free.places[-1].index.shape[1])


def is_code_of(module: nn.Module, code: Collection[str]) -> bool:
    """Whether what a module computes is written in one of some folders of `transformers.models`."""
    written = type(module).forward.__module__
    return any(written == f"transformers.models.{folder}.modeling_{folder}" for folder in code)


def is_wired(model: nn.Module, wiring: Wiring, code: Collection[str]) -> bool:
    """Whether a model has an MLP or an attention of a wiring, as `wired_units` takes it. Reads no weight."""
    modules = dict(model.named_modules())
    return any(mlp or attention for mlp, attention in _wired(modules, wiring, code))


def wired_units(model: nn.Module, wiring: Wiring, code: Collection[str]) -> Iterator[Units]:
    """The neurons of every MLP of a model, and the heads of its attention.

    Args:
        model: to look at.
        wiring: the names of their layers.
        code: the folders of `transformers.models` whose modules are known to do nothing else with these.
    """
    modules = dict(model.named_modules())
    heads = getattr(getattr(model, "config", None), "num_attention_heads", 0)
    for mlp, attention in _wired(modules, wiring, code):
        if mlp:
            yield _neurons(modules, mlp)
        if attention:
            yield from (_fused if len(attention) == 2 else _separate)(modules, attention, heads, wiring)


def _wired(
    modules: dict[str, nn.Module], wiring: Wiring, code: Collection[str]
) -> Iterator[tuple[list[str], list[str]]]:
    """The layers of the MLP and of the attention that a module holds, by full name; none where one is missing."""
    for owner, module in modules.items():
        if is_code_of(module, code):
            prefix = f"{owner}." if owner else ""
            mlp, attention = ([f"{prefix}{leaf}" for leaf in leaves] for leaves in (wiring.mlp, wiring.attention))
            yield (
                mlp if modules.keys() >= set(mlp) else [],
                attention if modules.keys() >= set(attention) else [],
            )


def _neurons(modules: dict[str, nn.Module], names: list[str]) -> Units:
    *makers, reader = names
    index = torch.arange(_width(modules[reader], made=False))[:, None]
    return Units(
        (*(p for name in makers for p in _output_places(modules, name, index)), _input_place(modules, reader, index)),
        part="mlp",
    )


def _separate(modules: dict[str, nn.Module], names: list[str], heads: int, wiring: Wiring) -> Iterator[Units]:
    """Key-value groups, with the query heads of each group and the values free within."""
    query, key, value, output = names
    wide, rows = (_width(modules[name], made=True) for name in (query, value))
    size = wide // max(heads, 1)
    if not heads or wide % heads or rows % size or wide % rows:
        return
    groups, repeats = rows // size, wide // rows
    ours, all_ours = torch.arange(rows).view(groups, size), torch.arange(wide).view(groups, repeats * size)
    queries, keys = list(_output_places(modules, query, all_ours)), list(_output_places(modules, key, ours))
    values = [*_output_places(modules, value, ours), _input_place(modules, output, all_ours)]
    # A norm over all heads has a scale for each of their channels; one over a head has the same for every head.
    for projection, length, index, places in ((query, wide, all_ours, queries), (key, rows, ours, keys)):
        norm = f"{projection.removesuffix('proj')}norm"
        if norm in modules and modules[norm].weight.shape == (length,):
            places.append(Place(f"{norm}.weight", 0, index))
    within = torch.arange(repeats * size).view(repeats, size)
    inner = []
    if repeats > 1:
        inner.append(Units(tuple(replace(p, index=within) for p in (*queries, values[-1]))))
    elif not wiring.rotary:
        inner.append(Units(tuple(replace(p, index=torch.arange(size)[:, None]) for p in (*queries, *keys))))
    *made, read = (replace(p, index=torch.arange(size)[:, None]) for p in values)
    inner.append(Units((*made, replace(read, index=within.T))))
    yield Units((*queries, *keys, *values), tuple(inner), "heads")


def _fused(modules: dict[str, nn.Module], names: list[str], heads: int, wiring: Wiring) -> Iterator[Units]:
    """Heads, with values free within and, where nothing turns them, the channels of queries and keys."""
    maker, reader = names
    wide, rows = _width(modules[reader], made=False), _width(modules[maker], made=True)
    if not heads or wide % heads or rows != 3 * wide:
        return
    size, every = wide // heads, torch.arange(rows)
    index = every.view(heads, -1) if wiring.by_head else every.view(3, heads, size).transpose(0, 1).reshape(heads, -1)
    made, read = (
        list(_output_places(modules, maker, index)),
        _input_place(modules, reader, torch.arange(wide).view(heads, size)),
    )
    channel = torch.arange(size)[:, None]
    inner = [Units((*(replace(p, index=2 * size + channel) for p in made), replace(read, index=channel)))]
    if not wiring.rotary:
        both = torch.cat([channel, size + channel], 1)
        inner.insert(0, Units(tuple(replace(p, index=both) for p in made)))
    yield Units((*made, read), tuple(inner), "heads")


def _width(module: nn.Module, made: bool) -> int:
    """How many channels a layer makes, or reads."""
    rows, columns = module.get_parameter("weight").shape
    return rows if made != is_transposed(module) else columns


def _output_places(modules: dict[str, nn.Module], name: str, index: Tensor) -> Iterator[Place]:
    yield Place(f"{name}.weight", 1 if is_transposed(modules[name]) else 0, index)
    if getattr(modules[name], "bias", None) is not None:
        yield Place(f"{name}.bias", 0, index)


def _input_place(modules: dict[str, nn.Module], name: str, index: Tensor) -> Place:
    return Place(f"{name}.weight", 0 if is_transposed(modules[name]) else 1, index)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its matrix as (in, out), as the `Conv1D` of transformers does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
