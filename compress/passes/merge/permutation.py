"""Which unit of one model is which of another: coordinate descent over permutations, each an exact linear assignment.

Shapes: U units of some width; a tensor's units as rows, (U, width * everything else of the tensor).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from compress.calibration.draws import draw
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from compress.models.symmetry import Place, Units

Values: TypeAlias = "Mapping[str, Tensor]"
Moves: TypeAlias = (
    "Mapping[str, Sequence[tuple[int, Tensor]]]"  # tensor -> (axis, which entry comes where), one after the other
)
ReadTensor: TypeAlias = "Callable[[str], Tensor]"  # a whole tensor of a model
GAIN = 1e-12  # of the product of both lengths: what is less is rounding


@dataclass(frozen=True)
class Order:
    """A permutation.

    Attributes:
        units: (U,) int64: which unit of the other model stands where ours stands.
        inner: for each place the orders within the unit that stands there.
    """

    units: Tensor
    inner: tuple[tuple[Order, ...], ...] = ()


@dataclass(frozen=True)
class FoundOrders:
    """The best orders that were found.

    Attributes:
        orders: one for each of the units asked for.
        agreement: the inner product of both models at the start, and after every step that changed something.
    """

    orders: tuple[Order, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class Alignment:
    """How another model's entries are put in our order.

    Attributes:
        moves: tensor -> what is done to it.
        units: how many there are.
        moved: how many of them now stand elsewhere.
        before: the distance of both models in all tensors that have units, as they were.
        after: the same, as they are now.
    """

    moves: Moves
    units: int
    moved: int
    before: float
    after: float


def unchanged(units: Units) -> Order:
    """The order as it is."""
    inner = tuple(unchanged(within) for within in units.inner)
    return Order(torch.arange(units.count), (inner,) * units.count if inner else ())


def match(
    units: Sequence[Units], ours: Values, theirs: Values, generator: torch.Generator, sweeps: int = 100
) -> FoundOrders:
    """Orders of their units that agree best with ours, each found with all others held.

    Args:
        units: coupled through the tensors that they share.
        ours: float64, all tensors of the units.
        theirs: the same of the other model.
        generator: decides in which order the units are taken.
        sweeps: at most so many times through all of them.
    """
    orders = [unchanged(each) for each in units]
    counted = {p.tensor for each in units for p in each.places if p.counts}
    found = [inner_product(ours, theirs, counted)]
    least = GAIN * inner_product(ours, ours, counted) ** 0.5 * inner_product(theirs, theirs, counted) ** 0.5
    for _ in range(sweeps):
        before = len(found)
        for k in draw(generator, (len(units),), "permutation", orders[0].units).tolist():
            each = units[k]
            names = {p.tensor for p in each.places if p.counts}
            others = [(u, order) for i, (u, order) in enumerate(zip(units, orders, strict=True)) if i != k]
            moved = {name: arranged(theirs[name], moves(name, theirs[name].shape, others)) for name in names}
            order = assigned(each, ours, moved, generator, sweeps)
            now, then = (
                inner_product(ours, {n: arranged(v, moves(n, v.shape, [(each, o)])) for n, v in moved.items()}, names)
                for o in (order, orders[k])
            )
            if now - then > least:
                orders[k] = order
                found.append(found[-1] + now - then)
        if len(found) == before or len(units) == 1:  # one alone is exact at once
            break
    return FoundOrders(tuple(orders), tuple(found))


def assigned(units: Units, ours: Values, theirs: Values, generator: torch.Generator, sweeps: int) -> Order:
    """The order that agrees best; where units have a free order within, each pair is scored at its best."""
    within = {place.tensor for inner in units.inner for place in inner.places}
    scores = torch.zeros(units.count, units.count, dtype=torch.float64)
    for place in units.places:
        if place.counts and place.tensor not in within:
            scores += unit_rows(ours[place.tensor], place) @ unit_rows(theirs[place.tensor], place).T
    pairs: list[list[FoundOrders]] = []
    if within:
        a, b = (unit_blocks(units, model, within) for model in (ours, theirs))
        pairs = [[match(units.inner, mine, other, generator, sweeps) for other in b] for mine in a]
        scores += torch.tensor([[pair.agreement[-1] for pair in line] for line in pairs], dtype=torch.float64)
    from scipy.optimize import linear_sum_assignment

    chosen = torch.from_numpy(linear_sum_assignment(scores.cpu().numpy(), maximize=True)[1]).to(scores.device).long()
    return Order(chosen, tuple(line[j].orders for line, j in zip(pairs, chosen.tolist(), strict=False)))


def unit_rows(value: Tensor, place: Place) -> Tensor:
    """(U, width * rest) what of a tensor belongs to each unit."""
    return value.movedim(place.axis, 0)[place.index.flatten()].reshape(len(place.index), -1)


def unit_blocks(units: Units, model: Values, names: set[str]) -> list[dict[str, Tensor]]:
    """The part of these tensors that belongs to each unit."""
    chosen = [place for place in units.places if place.tensor in names]
    return [{p.tensor: model[p.tensor].index_select(p.axis, p.index[i]) for p in chosen} for i in range(units.count)]


def inner_product(ours: Values, theirs: Values, names: Iterable[str]) -> float:
    """The inner product of two models in these tensors."""
    return sum(float(torch.dot(ours[name].flatten(), theirs[name].flatten())) for name in sorted(names))


def arranged(value: Tensor, moved: Iterable[tuple[int, Tensor]]) -> Tensor:
    """A tensor with its entries in another order."""
    for axis, order in moved:
        value = value.index_select(axis, order.to(value.device))
    return value


def moves(tensor: str, shape: Sequence[int], ordered: Iterable[tuple[Units, Order]]) -> list[tuple[int, Tensor]]:
    """What the orders of some units do to one tensor."""
    found = []
    for units, order in ordered:
        for axis in sorted({place.axis for place in units.places if place.tensor == tensor}):
            found.append((axis, along(tensor, axis, shape[axis], [(units, order)])))
    return found


def along(tensor: str, axis: int, length: int, ordered: Iterable[tuple[Units, Order]]) -> Tensor:
    """(length,) which entry of an axis comes where."""
    entries = torch.arange(length)
    for units, order in ordered:
        for place in units.places:
            if (place.tensor, place.axis) != (tensor, axis):
                continue
            taken = place.index[order.units]
            if order.inner:
                taken = torch.stack(
                    [
                        entry[along(tensor, axis, len(entry), zip(units.inner, within, strict=True))]
                        for entry, within in zip(taken, order.inner, strict=True)
                    ]
                )
            moved = entries.clone()
            moved[place.index] = entries[taken]
            entries = moved
    return entries


def coupled(units: Sequence[Units]) -> list[list[Units]]:
    """Groups of units that share tensors, so that each group can be matched without the others."""
    groups: list[tuple[set[str], list[Units]]] = []
    for each in units:
        names, members = each.tensors(), [each]
        apart = []
        for others, there in groups:
            if others & names:
                names, members = names | others, there + members
            else:
                apart.append((others, there))
        groups = [*apart, (names, members)]
    return [members for _, members in groups]


def align_units(
    units: Sequence[Units], ours: ReadTensor, theirs: ReadTensor, generator: torch.Generator, sweeps: int
) -> Alignment:
    """Match two models, a coupled group of units in memory at a time."""
    found: dict[str, list[tuple[int, Tensor]]] = {}
    before = after = 0.0
    stayed = total = 0
    for group in coupled(units):
        names = sorted({place.tensor for each in group for place in each.places})
        mine, other = ({name: read(name).double() for name in names} for read in (ours, theirs))
        orders = list(zip(group, match(group, mine, other, generator, sweeps).orders, strict=True))
        for name in names:
            found[name] = moves(name, other[name].shape, orders)
            before += float((mine[name] - other[name]).square().sum())
            after += float((mine[name] - arranged(other[name], found[name])).square().sum())
        total += sum(each.count for each in group)
        stayed += sum(int((order.units == torch.arange(each.count)).sum()) for each, order in orders)
    return Alignment(found, total, total - stayed, before**0.5, after**0.5)
