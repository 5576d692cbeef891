"""How many directions a correction gets."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def by_energy(energies: Sequence[float], share: float) -> int:
    """The smallest rank, at least 1, whose largest energies make up this share of all."""
    total, kept = sum(energies), 0.0
    for rank, energy in enumerate(energies, start=1):
        kept += energy
        if kept >= share * total:
            return rank
    return max(1, len(energies))


def by_budget(energies: Mapping[str, Sequence[float]], costs: Mapping[str, float], budget: float) -> dict[str, int]:
    """Ranks that together cost no more than a budget and leave little energy.

    One direction after the other goes to the layer where it brings most for what it costs. Energies fall within a
    layer, so this is the best choice but for what is left of the budget in the end.

    Args:
        energies: layer -> squared singular values, largest first.
        costs: layer -> cost of one more rank.
        budget: in the same unit.
    """
    ranks = dict.fromkeys(energies, 0)
    gains = [(-e[0] / costs[name], name) for name, e in energies.items() if e]
    heapq.heapify(gains)
    while gains:
        _, name = heapq.heappop(gains)
        if costs[name] > budget:
            continue  # a cheaper layer may still fit
        budget -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(energies[name]):
            heapq.heappush(gains, (-energies[name][ranks[name]] / costs[name], name))
    return ranks


def ratios_by_energy(found: Mapping[str, Mapping[str, Any]], ratio: float) -> dict[str, float]:
    """Layer -> numbers in its two factors as a share of those in the matrix, where all layers share a budget.

    Args:
        found: layer -> its `energies`, largest first, and its `shape`.
        ratio: numbers in all factors as a share of those in all matrices.
    """
    sizes = {name: math.prod(each["shape"]) for name, each in found.items()}
    costs = {name: sum(each["shape"]) for name, each in found.items()}
    # Every matrix has rank 1 at least, and no more than makes its factors smaller than it is.
    most = {name: int((size - 1) / costs[name] - 0.5) for name, size in sizes.items()}
    further = {name: each["energies"][1 : most[name]] for name, each in found.items()}
    ranks = by_budget(further, costs, ratio * sum(sizes.values()) - sum(costs.values()))
    # Half a rank more, so that rounding cannot lose one.
    return {name: (ranks[name] + 1.5) * costs[name] / size for name, size in sizes.items()}


def too_little(costs: Mapping[str, int], weights: int, budget: float) -> str | None:
    """Why a budget gives no layer a rank, and the smallest that does, or None.

    Args:
        costs: layer -> bits of one more rank.
        weights: of all layers.
        budget: bits per weight.
    """
    cheapest = min(costs, key=lambda name: costs[name])
    if costs[cheapest] <= budget * weights:
        return None
    enough = costs[cheapest] / weights
    unit = 10.0 ** (math.floor(math.log10(enough)) - 2)
    enough = math.ceil(enough / unit) * unit  # rounded up to three digits
    return (
        f"{budget:g} bits per weight pay for no correction: the cheapest, rank 1 of {cheapest}, takes "
        f"{costs[cheapest]} bits, and there are {weights} weights. "
        f"The smallest budget that pays for one is {enough:.3g}"
    )
