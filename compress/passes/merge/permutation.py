"""Which unit of one model is which of another: coordinate descent over permutations, each an exact linear assignment.

Shapes: U units of some width; a tensor's units as rows, (U, width * everything else of the tensor).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.calibration.draws import draw
from compress.lazy import torch
from compress.passes.merge.orders import Arranged, Order, Read, arranged, coupled, moves, unchanged

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from compress.models.symmetry import Place, Units
    from compress.passes.merge.orders import Moves, ReadTensor, Values

GAIN = 1e-12  # of the product of both lengths: what is less is rounding


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
    exact = len(units) == 1 and not units[0].crossing  # one alone is found at once
    for _ in range(sweeps):
        before = len(found)
        for k in draw(generator, (len(units),), "permutation", orders[0].units).tolist():
            each = units[k]
            names = sorted({p.tensor for p in each.places if p.counts})
            others = [(u, order) for i, (u, order) in enumerate(zip(units, orders, strict=True)) if i != k]
            mine: Values = ours
            moved: Values = Arranged(theirs, others)
            if each.inner:  # looked at unit by unit
                mine, moved = ({name: model[name] for name in names} for model in (mine, moved))
            order = assigned(each, mine, moved, generator, sweeps, orders[k])
            gained = sum(_gain(each, mine[name], moved[name], name, order, orders[k]) for name in names)
            if gained > least:
                orders[k] = order
                found.append(found[-1] + gained)
        if len(found) == before or exact:
            break
    return FoundOrders(tuple(orders), tuple(found))


def _gain(units: Units, ours: Tensor, theirs: Tensor, name: str, order: Order, before: Order) -> float:
    """By how much more a tensor of two models agrees in one order of some units than in another."""
    now, then = (arranged(theirs, moves(name, theirs.shape, [(units, each)])) for each in (order, before))
    return float(torch.dot(ours.flatten(), now.flatten()) - torch.dot(ours.flatten(), then.flatten()))


def assigned(
    units: Units, ours: Values, theirs: Values, generator: torch.Generator, sweeps: int, before: Order | None = None
) -> Order:
    """The order that agrees best; where units have a free order within, each pair is scored at its best.

    Of a matrix along both of whose axes the units lie, each axis is scored with the other in the order `before`, so
    that of these the order found is the best in linear approximation only.
    """
    within = {place.tensor for inner in units.inner for place in inner.places}
    before = before or unchanged(units)
    scores = torch.zeros(units.count, units.count, dtype=torch.float64)
    for place in units.places:
        if place.counts and place.tensor not in within:
            value = theirs[place.tensor]
            crossing = tuple(p for p in units.places if p.tensor == place.tensor and p.axis != place.axis)
            if crossing:
                value = arranged(value, moves(place.tensor, value.shape, [(replace(units, places=crossing), before)]))
            scores += unit_rows(ours[place.tensor], place) @ unit_rows(value, place).T
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


def align_units(
    units: Sequence[Units], ours: ReadTensor, theirs: ReadTensor, generator: torch.Generator, sweeps: int
) -> Alignment:
    """Match two models, a coupled group of units at a time; of each model not more than `HELD` bytes are kept."""
    found: dict[str, list[tuple[int, Tensor]]] = {}
    before = after = 0.0
    stayed = total = 0
    for group in coupled(units):
        names = sorted({place.tensor for each in group for place in each.places})
        mine, other = (Read(read, names) for read in (ours, theirs))
        orders = list(zip(group, match(group, mine, other, generator, sweeps).orders, strict=True))
        for name in names:
            a, b = mine[name], other[name]
            found[name] = moves(name, b.shape, orders)
            before += float((a - b).square().sum())
            after += float((a - arranged(b, found[name])).square().sum())
        total += sum(each.count for each in group)
        stayed += sum(int((order.units == torch.arange(each.count)).sum()) for each, order in orders)
    return Alignment(found, total, total - stayed, before**0.5, after**0.5)
