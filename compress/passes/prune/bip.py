"""BiP: which weights to keep, refined together with the weights by a short bi-level optimisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from compress.calibration.samples import batch, held_out_split
from compress.calibration.training import Learner, Loop, Schedule, learn
from compress.lazy import torch
from compress.passes.base import Edit, OptionError
from compress.passes.prune.global_magnitude import smallest_cut
from compress.passes.prune.mask_groups import group_sums, most_gone, smallest_groups, spread
from compress.passes.retrain.options import EndToEnd

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

    from compress.calibration.training import ModelData
    from compress.passes.base import Target, Whole

LOOKS = 5

Granularity = Literal["weight", "filter", "channel"]


@dataclass(frozen=True, kw_only=True)
class Bip(EndToEnd):
    """Experimental: refine a global magnitude mask and the kept weights by turns, a few steps of each.

    The lower level trains the weights that are kept, the upper level moves the scores that decide which are; a weight's
    score follows the gradient of the loss through its mask, corrected for what the lower level would answer. The best
    of what was seen, the start among it, is kept.

    The lower level is argmin l(m * theta) + gamma / 2 |theta|^2. Its pull towards zero is applied beside Adam's step,
    as a share learning_rate * gamma of every weight: added to the gradient, Adam would give it the size of a whole step
    wherever the loss is flat. Both levels read the same gamma.

    Source: Zhang et al., "Advancing Model Pruning via Bi-level Optimization", NeurIPS 2022, arXiv 2210.04092. Differs
    from the paper in: a reconstruction, as its formula was not to be had: dl/dm = (theta - g / gamma) * g with g the
    gradient at m * theta, of weights that are gone as of the others; Adam at the lower level; scores start as
    magnitudes and move by a share of their own size.

    Args:
        sparsity: share of zeros over all selected weights; of whole groups, as many of the worst as fit into it.
        granularity: what goes together: a single `weight`, a `filter` (a row: all that one output reads) or a `channel`
            (a column; of a convolution, all that reads one input channel). The move of a group's mask is the sum of its
            weights'; groups of unlike size are ranked by their means. Every matrix keeps a group.
        steps: of both levels, each on samples of its own.
        batch_size: samples per step and level.
        learning_rate: of the weights; warm-up and decay as of `perp`.
        mask_rate: root mean square of a step of the scores, as a share of theirs.
        gamma: of the pull towards zero that makes the lower level's answer unique; large ones leave the correction out.
        correction: off, the scores follow theta * g alone. By default on for single weights, and off for whole groups,
            over which squares of gradients add up while theta * g cancels out.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> passes = [compress.Bip(sparsity=0.5, steps=2)]
        >>> result = compress.apply(model, passes, calibration=torch.randn(16, 64))
        >>> sorted(result.weights)
        ['0', '1']
    """

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5
    steps: Annotated[int, Ge(1)] = 100
    batch_size: Annotated[int, Ge(1)] = 4
    learning_rate: Annotated[float, Ge(0), Lt(1)] = 1e-4
    mask_rate: Annotated[float, Ge(0), Lt(1)] = 0.02
    gamma: Annotated[float, Gt(0)] = 1e-2
    granularity: Granularity = "weight"
    correction: bool | None = None

    key: ClassVar[str] = "bip"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        pull = self.learning_rate * self.gamma
        if pull >= 1:
            yield OptionError("gamma", f"times learning_rate is {pull:g}, which leaves nothing of a weight: below 1")

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> OptionError | None:
        """Why this pass cannot work on all these matrices together, or None."""
        reachable = most_gone(shapes.values(), self.granularity)
        if reachable < self.sparsity:
            return OptionError(
                "sparsity",
                f"{self.sparsity} cannot be reached where every matrix keeps a {self.granularity}: at most "
                f"{reachable:.4f}; lower it",
            )
        return None

    def produces(self, kind: str) -> str:
        return "sparse"

    def run(self, model: Whole) -> Iterator[tuple[str, Edit]]:
        assert model.data is not None
        targets = {name: model.load(name) for name in model.names}
        learner = Refinement(targets, model.data, self, model.generator.initial_seed())
        rate = Schedule(self.steps, self.batch_size).rate
        outcome = learn(learner, Loop(self.steps, rate, LOOKS, "bip", fused=False), model.data.kept, model.over)
        notes = {"loss_start": outcome.start, "loss": outcome.best}
        for name in model.names:
            mask = learner.masks[name]
            yield name, Edit(weight=learner.weights[name] * mask, mask=mask, notes=notes)


class Refinement(Learner):
    """Weights, learned at a mask, and the scores that decide about it, moved by turns with them."""

    def __init__(self, targets: Mapping[str, Target], data: ModelData, options: Bip, order: int):
        self.targets, self.data, self.options, self.order = targets, data, options, order
        self.held, self.samples = held_out_split(data.count)
        self.rate = Schedule(options.steps, options.batch_size).rate
        self.weights = {name: t.weight.clone() for name, t in targets.items()}
        self.scores = {name: self._means(name, t.weight.abs()) for name, t in targets.items()}
        self.size = rms(self.scores)
        self.masks = self._ranked()

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [(list(self.weights.values()), self.options.learning_rate)]

    def state(self) -> list[Tensor]:
        return list(self.scores.values())

    def gradients(self, step: int) -> Tensor:
        loss, slopes = self.slopes(2 * step - 1)
        for name, weight in self.weights.items():
            weight.grad = slopes[name] * self.masks[name]
        return loss

    def after(self, step: int) -> None:
        self._pull(step)
        _, slopes = self.slopes(2 * step)
        moves = {name: self._means(name, self._move(self.weights[name], g)) for name, g in slopes.items()}
        length = self.options.mask_rate * self.rate(step) * self.size / max(rms(moves), 1e-30)
        for name, score in self.scores.items():
            score.copy_((score - length * moves[name]).clamp(min=0))
        self.masks = self._ranked()

    def _pull(self, step: int) -> None:
        """The lower level's gamma / 2 |theta|^2, beside Adam's step."""
        o = self.options
        kept = 1 - o.learning_rate * self.rate(step) * o.gamma
        with torch.no_grad():
            for weight in self.weights.values():
                weight.mul_(kept)

    def _move(self, weight: Tensor, slope: Tensor) -> Tensor:
        """(O, I) the gradient of the loss by the mask, from that by the masked weight."""
        o = self.options
        corrected = o.granularity == "weight" if o.correction is None else o.correction
        return (weight - slope / o.gamma) * slope if corrected else weight * slope

    def _means(self, name: str, values: Tensor) -> Tensor:
        """(O, I) -> what the groups of a matrix have on average, (groups,); of single weights the same again."""
        if self.options.granularity == "weight":
            return values
        sums = group_sums(values, self.options.granularity, self.targets[name].kernel)
        return sums * (len(sums) / values.numel())

    def restored(self) -> None:
        self.masks = self._ranked()

    def error(self) -> float:
        made = {name: weight * self.masks[name] for name, weight in self.weights.items()}
        return self.data.mean_loss(lambda wanted: _masks_of(made, wanted), self.held, self.options.batch_size)

    def _ranked(self) -> dict[str, Tensor]:
        kind, share = self.options.granularity, self.options.sparsity

        def scored(name: str) -> Target:
            return replace(self.targets[name], weight=self.scores[name], stored=None)

        if kind == "weight":
            return dict(smallest_cut(tuple(self.targets), scored, share))
        kept = smallest_groups(self.scores, self.targets, kind, share)
        shapes = {name: t.weight.shape for name, t in self.targets.items()}
        masks = {name: spread(kept[name], shapes[name], kind, t.kernel) for name, t in self.targets.items()}
        return {name: m if (own := self.targets[name].mask) is None else m & own for name, m in masks.items()}

    def slopes(self, draw: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on the samples of a draw, and its gradients at the masked weights.

        Those that are gone have gradients too, as they may come back; those that were gone before this pass do not.
        """
        made = {n: (w * self.masks[n]).requires_grad_() for n, w in self.weights.items()}
        with torch.enable_grad():
            numbers = batch(self.samples, draw, self.options.batch_size, self.order)
            value = self.data.backward(lambda wanted: _masks_of(made, wanted), numbers, list(made.values()))
        return value, {n: self._free(n, torch.zeros_like(m) if m.grad is None else m.grad) for n, m in made.items()}

    def _free(self, name: str, values: Tensor) -> Tensor:
        """(O, I) with zeros where a mask was before."""
        mask = self.targets[name].mask
        return values if mask is None else values * mask


def _masks_of(made: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    return {name: made[name] for name in wanted if name in made}


def rms(values: Mapping[str, Tensor]) -> float:
    """Root mean square over all of them."""
    count = sum(v.numel() for v in values.values())
    return float((sum(float(v.double().square().sum()) for v in values.values()) / count) ** 0.5)
