"""Global magnitude pruning with a minimum threshold.

Shapes: N weights in all, n_l of layer l.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.passes.base import Edit, ModelPass, OptionError, Target, Whole
from compress.passes.prune.selection import count_of, keep_all_but, masked_out


@dataclass(frozen=True, kw_only=True)
class GlobalMagnitude(ModelPass):
    """Zero the smallest weights of the whole model, wherever they are, leaving every layer a minimum.

    Weights are ranked by magnitude over all layers at once; the share each layer loses follows. Layers that would keep
    fewer than the minimum threshold are held at it, and the others give up correspondingly more.

    Source: Gupta et al., "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
    2022, arXiv 2209.14624. Differs from the paper in: the threshold is met exactly by water-filling, not by repeated
    rescaling; an infeasible target is refused; there is no fine-tuning here.

    Args:
        sparsity: share of zeros over all selected weights.
        min_keep: the minimum threshold: weights every layer keeps, as a share of all selected weights (the paper's MT
            of 0.05 % is 0.0005). The same count for every layer; layers smaller than it stay dense.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 64))
        >>> result = compress.apply(model, [compress.GlobalMagnitude(sparsity=0.5)])
        >>> sorted(result.weights)
        ['0', '1']
    """

    sparsity: float = 0.5
    min_keep: float = 0.0005

    key: ClassVar[str] = "global_magnitude"

    def check(self) -> Iterator[OptionError]:
        if not 0 <= self.sparsity < 1:
            yield OptionError("sparsity", f"{self.sparsity} is not a share of zeros from 0 to below 1")
        if self.overrides:
            yield OptionError("overrides", "one ranking over all layers has no options for single layers; use exclude")
        if not 0 <= self.min_keep < 1:
            yield OptionError("min_keep", f"{self.min_keep} is not a share of all weights from 0 to below 1")

    def check_sizes(self, sizes: Sequence[int]) -> OptionError | None:
        """Whether the target can be met on layers of these sizes."""
        reachable = max_sparsity(sizes, self.min_keep)
        if reachable < self.sparsity:
            return OptionError(
                "sparsity",
                f"{self.sparsity} cannot be reached with min_keep {self.min_keep}: at most {reachable:.4f}; lower one",
            )
        return None

    def produces(self, kind: str) -> str:
        return "sparse"

    def run(self, model: Whole) -> Iterator[tuple[str, Edit]]:
        names, load = model.names, model.load
        counts = count_below(names, load, self.sparsity)
        sizes = [load(name).weight.numel() for name in names]
        removed = layer_counts(counts, sizes, self.sparsity, self.min_keep)
        for name, count in zip(names, removed, strict=True):
            target = load(name)
            mask = keep_all_but(masked_out(target.weight.abs(), target.mask), count)
            if target.mask is not None:
                mask &= target.mask
            yield name, Edit(weight=target.weight * mask, mask=mask, notes={"sparsity": count / target.weight.numel()})


def max_sparsity(sizes: Sequence[int], min_keep: float) -> float:
    """The largest share of zeros when every layer must keep its minimum."""
    floor = count_of(sum(sizes), min_keep)
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
    budget = count_of(total, sparsity)
    floor = count_of(total, min_keep)
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
    upper = torch.stack([torch.bincount(_bits(load(name)) >> 16, minlength=1 << 15) for name in names])
    wanted = count_of(int(upper.sum()), sparsity)
    if not wanted:
        return [0] * len(names)
    high = int(torch.searchsorted(upper.sum(0).cumsum(0), wanted))
    before = upper[:, :high].sum(1)
    lower = torch.stack([_lower_histogram(_bits(load(name)), high) for name in names])
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


def _bits(target: Target) -> Tensor:
    return target.weight.abs().flatten().view(torch.int32)


def _lower_histogram(bits: Tensor, high: int) -> Tensor:
    return torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
