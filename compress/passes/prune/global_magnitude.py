"""Global magnitude pruning with a minimum threshold.

Shapes: N weights in all, n_l of layer l.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Lt

from compress.calibration.training import Loss, train
from compress.lazy import torch
from compress.passes.base import Edit, ModelPass, OptionError, Pass
from compress.passes.prune.selection import count_in_share, keep_all_but, masked_out
from compress.passes.retrain.options import TrainingOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.passes.base import Target, Whole


@dataclass(frozen=True, kw_only=True)
class GlobalMagnitude(TrainingOptions, ModelPass):
    """Zero the smallest weights of the whole model, wherever they are, leaving every layer a minimum.

    Weights are ranked by magnitude over all layers at once; the share each layer loses follows. Layers that would keep
    fewer than the minimum threshold are held at it, and the others give up correspondingly more.

    Source: Gupta et al., "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
    2022, arXiv 2209.14624; the cubic schedule: Zhu and Gupta, 2017, arXiv 1710.01878. Differs from the paper in: the
    threshold is met exactly by water-filling, not by repeated rescaling; an infeasible target is refused; nothing is
    trained after the last cut (put `perp` behind). Its gradual pruning has no public code: this is a reconstruction.

    Args:
        sparsity: share of zeros over all selected weights.
        min_keep: the minimum threshold: weights every layer keeps, as a share of all selected weights (the paper's MT
            of 0.05 % is 0.0005). The same count for every layer; layers smaller than it stay dense.
        cuts: more than one prunes gradually: after cut t of n the share is sparsity * (1 - (1 - t / n)**3), and the
            model is trained for `steps` between two cuts.
        regrow: weights that are gone keep their last value for the ranking, and may come back at a later cut.
        objective: of training, as of `perp`.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 64))
        >>> result = compress.apply(model, [compress.GlobalMagnitude(sparsity=0.5)])
        >>> sorted(result.weights)
        ['0', '1']
    """

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5
    min_keep: Annotated[float, Ge(0), Lt(1)] = 0.0005
    cuts: Annotated[int, Ge(1)] = 1
    regrow: bool = False
    objective: Loss = "distill"

    key: ClassVar[str] = "global_magnitude"

    @property
    def loss(self) -> Loss | None:
        return self.objective if self.cuts > 1 else None

    @property
    def calibrated(self) -> bool:
        return self.cuts > 1

    def trains(self, parameter: str) -> bool:
        return self.cuts > 1 and super().trains(parameter)

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.cuts == 1:
            of_training = {f.name for f in fields(TrainingOptions)} - {f.name for f in fields(Pass)}
            for option in sorted({*of_training, "regrow", "objective"} & set(self.options())):
                yield OptionError(option, "changes nothing with one cut: set cuts, or train with perp afterwards")
        beside = [name for name in self.train if name in ("head", "lora", "scale")]
        if beside:
            yield OptionError("train", f"{beside[0]} has no zeros to keep; name mask_lora, scale_lora or full")
        if self.overrides:
            yield OptionError("overrides", "one ranking over all layers has no options for single layers; use exclude")

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> OptionError | None:
        """Why this pass cannot work on all these matrices together, or None."""
        return unreachable(shapes, self.sparsity, self.min_keep)

    def produces(self, kind: str) -> str:
        return "sparse"

    def run(self, model: Whole) -> Iterator[tuple[str, Edit]]:
        if self.cuts == 1:
            yield from edits(model.names, model.load, self.sparsity, self.min_keep)
            return
        assert model.data is not None
        targets = {name: model.load(name) for name in model.names}
        vectors = dict(model.vectors)
        for number in range(1, self.cuts):
            share = self.sparsity * (1 - (1 - number / self.cuts) ** 3)
            masks = dict(smallest_cut(model.names, targets.__getitem__, share, self.min_keep))
            now = {n: replace(t, weight=t.weight * masks[n], mask=masks[n], stored=None) for n, t in targets.items()}
            trained = self.trainables(now, vectors)
            train(trained, model.data.part(str(number)), self.schedule, model.generator, model.over)
            made = {name: value.detach() for name, value in trained.merged(trained.names()).items()}
            vectors = {name: made[name] for name in vectors}
            if self.regrow:
                last = {n: torch.where(masks[n], made[n], t.weight) for n, t in targets.items()}
                targets = {n: replace(t, weight=last[n]) for n, t in targets.items()}
            else:
                targets = {n: replace(t, weight=made[n], mask=masks[n]) for n, t in targets.items()}
        yield from edits(model.names, targets.__getitem__, self.sparsity, self.min_keep)
        yield from ((name, Edit(weight=vector)) for name, vector in vectors.items())


def edits(
    names: Sequence[str], load: Callable[[str], Target], sparsity: float, min_keep: float
) -> Iterator[tuple[str, Edit]]:
    """Every layer with its smallest weights gone."""
    for name, mask in smallest_cut(names, load, sparsity, min_keep):
        weight = load(name).weight
        yield name, Edit(weight=weight * mask, mask=mask, notes={"sparsity": 1 - float(mask.float().mean())})


def smallest_cut(
    names: Sequence[str], load: Callable[[str], Target], sparsity: float, min_keep: float = 0.0
) -> Iterator[tuple[str, Tensor]]:
    """(layer, mask) with the smallest weights of all layers gone; what was masked before stays so."""
    counts = count_below(names, load, sparsity)
    sizes = [load(name).weight.numel() for name in names]
    for name, count in zip(names, layer_counts(counts, sizes, sparsity, min_keep), strict=True):
        target = load(name)
        mask = keep_all_but(masked_out(target.weight.abs(), target.mask), count)
        yield name, mask if target.mask is None else mask & target.mask


def unreachable(shapes: Mapping[str, tuple[int, int]], sparsity: float, min_keep: float) -> OptionError | None:
    """Why layers that each keep a minimum cannot have so many zeros together, or None."""
    reachable = max_sparsity([rows * columns for rows, columns in shapes.values()], min_keep)
    if reachable >= sparsity:
        return None
    reason = f"{sparsity} cannot be reached with min_keep {min_keep}: at most {reachable:.4f}; lower one"
    return OptionError("sparsity", reason)


def max_sparsity(sizes: Sequence[int], min_keep: float) -> float:
    """The largest share of zeros when every layer must keep its minimum."""
    floor = count_in_share(sum(sizes), min_keep)
    return sum(max(0, n - floor) for n in sizes) / sum(sizes)


def layer_counts(counts: Sequence[int], sizes: Sequence[int], sparsity: float, min_keep: float) -> list[int]:
    """Weights each layer loses: the global cut, then water-filling for the minimum threshold; exact in sum.

    Args:
        counts: weights of each layer that a plain global cut removes.
        sizes: n_l.

    Raises:
        ValueError: the target cannot be reached.
    """
    total = sum(sizes)
    budget = count_in_share(total, sparsity)
    floor = count_in_share(total, min_keep)
    most = [max(0, n - floor) for n in sizes]
    if sum(most) < budget:
        raise ValueError(f"sparsity {sparsity} cannot be reached: at most {sum(most) / total:.4f}")
    held = {i for i, m in enumerate(most) if m == 0}  # smaller than the threshold: stays dense
    while True:
        left = budget - sum(most[i] for i in held)
        open_ = [i for i in range(len(sizes)) if i not in held]
        # Layers that the cut spared altogether share what is left by what they can give.
        weights = counts if sum(counts[i] for i in open_) else most
        shared = sum(weights[i] for i in open_)
        wanted = {i: left * weights[i] / shared if shared else 0.0 for i in open_}
        over = {i for i in open_ if wanted[i] > most[i]}
        if not over:
            break
        held |= over
    removed = [most[i] if i in held else int(wanted[i]) for i in range(len(sizes))]
    # Whole weights: the largest fractions are rounded up until the sum is right.
    for i in sorted(open_, key=lambda i: (int(wanted[i]) - wanted[i], i)) * 2:
        if sum(removed) < budget and removed[i] < most[i]:
            removed[i] += 1
    return removed


def count_below(names: Sequence[str], load: Callable[[str], Target], sparsity: float) -> list[int]:
    """How many weights of each layer are among the floor(sparsity * N) smallest of all, exactly, two layers in memory.

    The bits of a non-negative float32 order as integers do, so the threshold is found in two rounds of histograms: the
    upper 16 bits, then the lower 16 bits inside the bin where the count is reached. Ties at the threshold go to the
    layers in order.
    """
    upper = torch.stack([torch.bincount(_magnitude_bits(load(name)) >> 16, minlength=1 << 15) for name in names])
    wanted = count_in_share(int(upper.sum()), sparsity)
    if not wanted:
        return [0] * len(names)
    high = int(torch.searchsorted(upper.sum(0).cumsum(0), wanted))
    before = upper[:, :high].sum(1)
    lower = torch.stack([_lower_histogram(_magnitude_bits(load(name)), high) for name in names])
    still = wanted - int(before.sum())
    low = int(torch.searchsorted(lower.sum(0).cumsum(0), still))
    counts = before + lower[:, :low].sum(1)
    still = wanted - int(counts.sum())
    result = []
    for count, ties in zip(counts.tolist(), lower[:, low].tolist(), strict=True):
        taken = min(ties, still)
        still -= taken
        result.append(count + taken)
    return result


def _magnitude_bits(target: Target) -> Tensor:
    return target.weight.abs().flatten().view(torch.int32)


def _lower_histogram(bits: Tensor, high: int) -> Tensor:
    return torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
