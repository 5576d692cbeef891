"""Where sparsity goes: how much every layer loses, for a share of zeros over all of them.

Shapes: L layers or blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.lazy import torch
from compress.passes.names import block_of
from compress.passes.prune.spectra import alpha, farms_alpha

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

Allocate = Literal["uniform", "global", "owl", "alphapruning", "farms"]
SPREAD = {"owl": 0.08, "alphapruning": 0.2, "farms": 0.2}
OUTLIER = 5.0  # times the mean score of its block: an outlier to OWL
MOST = 0.995  # zeros in any layer
FINE = 64  # classes of scores for each factor of two
LOWEST, HIGHEST = -60, 60  # powers of two told apart


@dataclass(frozen=True)
class Scores:
    """How many weights of a layer have a score of each size.

    Attributes:
        counts: of each class, FINE classes for a factor of two.
        total: the sum of all scores.
    """

    counts: Tensor
    total: float

    @classmethod
    def of(cls, scores: Tensor) -> Scores:
        """Count scores, not negative; zeros are with the smallest."""
        classes = (scores.float().clamp(min=2.0**LOWEST).log2() - LOWEST).mul(FINE).long()
        counts = torch.bincount(classes.clamp(0, (HIGHEST - LOWEST) * FINE - 1).flatten())
        return cls(counts, float(scores.double().sum()))

    def above(self, threshold: float) -> float:
        """About how many are larger than this."""
        if threshold <= 0:
            return float(self.counts.sum())
        place = (torch.tensor(threshold, dtype=torch.float64).log2().item() - LOWEST) * FINE
        first = min(max(int(place), 0), len(self.counts))
        part = float(self.counts[first]) * (first + 1 - place) if 0 <= place < len(self.counts) else 0.0
        return part + float(self.counts[first + 1 :].sum())


def allocation_facts(kind: Allocate, weight: Tensor, scores: Tensor | None) -> dict[str, Any]:
    """What an allocation must know of a layer: JSON-able.

    Args:
        kind: of the allocation.
        weight: (O, I).
        scores: (O, I), what the pass ranks weights by; for `owl` |w| * ||x||.
    """
    found: dict[str, Any] = {"shape": list(weight.shape)}
    if kind in ("owl", "global"):
        assert scores is not None
        counted = Scores.of(scores)
        first = int(counted.counts.nonzero()[0])
        return found | {"first": first, "counts": counted.counts[first:].tolist(), "total": counted.total}
    return found | {"alpha": alpha(weight) if kind == "alphapruning" else farms_alpha(weight)}


def shares(
    kind: Allocate, found: Mapping[str, Mapping[str, Any]], share: float, by: str, spread: float | None
) -> dict[str, float]:
    """Share of zeros of every layer.

    Args:
        kind: of the allocation.
        found: layer -> what `allocation_facts` found.
        share: of zeros over all.
        by: `block` gives all layers of a block the same share, `site` each its own.
        spread: how far apart shares are; None for the published default, or half as far as exponents are where that is
            less.

    Source: OWL: Yin et al., 2023, arXiv 2310.05175; AlphaPruning: Lu et al., 2024, arXiv 2410.10912; FARMS: Hu et al.,
    2025, arXiv 2506.06280. Differs from the papers in: blocks whose exponents hardly differ are given shares that
    hardly differ, where the papers stretch any difference to the same range; means over blocks are weighted by their
    sizes, and what is cut off at the upper end is spread over the others, so that the budget is exact.
    """
    unit = {name: block_of(name) if by == "block" else name for name in found}
    names = list(dict.fromkeys(unit.values()))
    members = {u: [n for n in found if unit[n] == u] for u in names}
    sizes = torch.tensor([sum(_layer_size(found[n]) for n in members[u]) for u in names], dtype=torch.float64)
    if kind == "global":
        wanted = _under_one_threshold(members, found, share)
    elif kind == "owl":
        outliers = torch.tensor([_outlier_share([found[n] for n in members[u]]) for u in names], dtype=torch.float64)
        density = 2 * (SPREAD["owl"] if spread is None else spread) * _unit_range(outliers)
        density -= (density * sizes).sum() / sizes.sum()
        wanted = share - density
    else:
        alphas = _alphas(members, found)
        width = _width(kind, alphas, spread)
        wanted = 1 - width + 2 * width * _unit_range(alphas)
    filled = fill(wanted.clamp(min=0), sizes, share)
    exact = {n: float(filled[names.index(unit[n])]) for n in found}
    return whole_columns(exact, {n: (int(f["shape"][0]), int(f["shape"][1])) for n, f in found.items()}, share)


def fill(wanted: Tensor, sizes: Tensor, share: float) -> Tensor:
    """(L,) shares in proportion to what is wanted, none above MOST, whose mean weighted by size is `share`."""
    if float(wanted.max()) <= 0:
        return torch.full_like(wanted, share)
    target = share * float(sizes.sum())
    low, high = 0.0, MOST / float(wanted[wanted > 0].min())
    if float((wanted * high).clamp(max=MOST) @ sizes) < target:  # layers that were to lose nothing must lose something
        rest = (target - MOST * float(sizes[wanted > 0].sum())) / float(sizes[wanted <= 0].sum())
        return torch.full_like(wanted, MOST).where(wanted > 0, rest)
    for _ in range(200):
        middle = (low + high) / 2
        if float((wanted * middle).clamp(max=MOST) @ sizes) < target:
            low = middle
        else:
            high = middle
    return (wanted * high).clamp(max=MOST)


def whole_columns(exact: Mapping[str, float], shapes: Mapping[str, tuple[int, int]], share: float) -> dict[str, float]:
    """Shares that are whole numbers of weights in every row, and as near to the budget as those can be."""
    counts = {n: int(exact[n] * shapes[n][1] + 1e-9) for n in exact}
    missing = share * sum(r * c for r, c in shapes.values()) - sum(counts[n] * shapes[n][0] for n in exact)
    for name in sorted(exact, key=lambda n: (counts[n] - exact[n] * shapes[n][1], n)):  # the most cut off first
        rows, columns = shapes[name]
        if missing >= rows / 2 and counts[name] + 1 <= MOST * columns:
            counts[name] += 1
            missing -= rows
    return {n: counts[n] / shapes[n][1] for n in exact}


def _layer_size(found: Mapping[str, Any]) -> int:
    rows, columns = found["shape"]
    return int(rows) * int(columns)


def _layer_scores(found: Mapping[str, Any]) -> Scores:
    counts = torch.cat([torch.zeros(int(found["first"]), dtype=torch.long), torch.tensor(found["counts"])])
    return Scores(counts, float(found["total"]))


def _outlier_share(layers: Sequence[Mapping[str, Any]]) -> float:
    """Share of a block's scores that are far above their mean."""
    scores, size = [_layer_scores(f) for f in layers], sum(_layer_size(f) for f in layers)
    mean = sum(s.total for s in scores) / size
    return sum(s.above(OUTLIER * mean) for s in scores) / size


def _under_one_threshold(
    members: Mapping[str, Sequence[str]], found: Mapping[str, Mapping[str, Any]], share: float
) -> Tensor:
    """Shares of scores under the threshold that leaves `share` of all under it."""
    scores = {n: _layer_scores(f) for n, f in found.items()}
    total = sum(_layer_size(f) for f in found.values())
    low, high = 2.0**LOWEST, 2.0**HIGHEST
    for _ in range(100):
        middle = (low * high) ** 0.5
        if total - sum(s.above(middle) for s in scores.values()) < share * total:
            low = middle
        else:
            high = middle
    under = [
        1 - sum(scores[n].above(high) for n in names) / sum(_layer_size(found[n]) for n in names)
        for names in members.values()
    ]
    return torch.tensor(under, dtype=torch.float64)


def _alphas(members: Mapping[str, Sequence[str]], found: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """Mean exponent of each unit; one without any has the mean of the others."""
    means = []
    for names in members.values():
        known = [float(found[n]["alpha"]) for n in names if found[n]["alpha"] is not None]
        means.append(sum(known) / len(known) if known else float("nan"))
    alphas = torch.tensor(means, dtype=torch.float64)
    return torch.where(alphas.isnan(), alphas.nanmean() if not alphas.isnan().all() else 0.0, alphas)


def _width(kind: Allocate, values: Tensor, spread: float | None) -> float:
    """Half the width of what shares are multiplied with.

    Stretched to one range, differences that mean nothing cost as much as those between the blocks of large models.
    """
    if spread is not None:
        return spread
    low, high = float(values.min()), float(values.max())
    return min(SPREAD[kind], (high - low) / (high + low) / 2 if high + low > 0 else 0.0)


def _unit_range(values: Tensor) -> Tensor:
    """From 0 for the smallest to 1 for the largest; a half for all if they are equal."""
    width = float(values.max() - values.min())
    return (values - values.min()) / width if width > 0 else torch.full_like(values, 0.5)
