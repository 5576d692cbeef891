"""BiP: which weights to keep, refined together with the weights by a short bi-level optimisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from compress.calibration.training import Schedule, batch, held_out, split
from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.base import Edit
from compress.passes.prune.global_magnitude import cut
from compress.passes.retrain.options import EndToEnd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.calibration.training import ModelData
    from compress.passes.base import Target, Whole

LOOKS = 5


@dataclass(frozen=True, kw_only=True)
class Bip(EndToEnd):
    """Experimental: refine a global magnitude mask and the kept weights by turns, a few steps of each.

    The lower level trains the weights that are kept, the upper level moves the scores that decide which are; a weight's
    score follows the gradient of the loss through its mask, corrected for what the lower level would answer. The best
    of what was seen, the start among it, is kept.

    Source: Zhang et al., "Advancing Model Pruning via Bi-level Optimization", NeurIPS 2022, arXiv 2210.04092. Differs
    from the paper in: a reconstruction, as its formula was not to be had: dl/dm = (theta - g / gamma) * g with g the
    gradient at m * theta; Adam at the lower level; scores start as magnitudes and move by a share of their own size.

    Args:
        sparsity: share of zeros over all selected weights.
        steps: of both levels, each on samples of its own.
        batch_size: samples a step and level.
        learning_rate: of the weights; warm-up and decay as of `perp`.
        mask_rate: root mean square of a step of the scores, as a share of theirs.
        gamma: of the pull towards zero that makes the lower level's answer unique; large ones leave the correction out.

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
    gamma: Annotated[float, Gt(0)] = 1e4

    key: ClassVar[str] = "bip"

    def produces(self, kind: str) -> str:
        return "sparse"

    def run(self, model: Whole) -> Iterator[tuple[str, Edit]]:
        assert model.data is not None
        targets = {name: model.load(name) for name in model.names}
        weights, masks, notes = refine(targets, model.data, self, model)
        for name in model.names:
            yield name, Edit(weight=weights[name] * masks[name], mask=masks[name], notes=notes)


def refine(
    targets: Mapping[str, Target], data: ModelData, options: Bip, model: Whole
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Weights, masks and notes.

    Raises:
        SolveError: the loss is not finite at the start.
    """
    names, drawn = tuple(targets), model.generator.initial_seed()
    held, learned = split(data.count)
    schedule = Schedule(options.steps, options.batch_size)
    weights = {name: t.weight.clone() for name, t in targets.items()}
    scores = {name: t.weight.abs() for name, t in targets.items()}
    size = rms(scores)
    optimizer = torch.optim.Adam(list(weights.values()))

    def ranked() -> dict[str, Tensor]:
        return dict(cut(names, lambda n: replace(targets[n], weight=scores[n], stored=None), options.sparsity))

    def error() -> float:
        made = {name: weights[name] * masks[name] for name in names}
        return held_out(lambda wanted: {n: made[n] for n in wanted if n in made}, data, held, options.batch_size)

    masks = ranked()
    start = best = error()
    if not start < float("inf"):
        raise SolveError("the loss is not finite before anything is trained")
    kept = {n: (w.clone(), masks[n]) for n, w in weights.items()}
    for step in model.over(range(1, options.steps + 1), options.steps, "bip: steps"):
        rate = schedule.rate(step)
        gradients = slopes(weights, masks, data, batch(learned, 2 * step - 1, options.batch_size, drawn))
        for name, weight in weights.items():
            weight.grad = gradients[name] * masks[name]
        optimizer.param_groups[0]["lr"] = options.learning_rate * rate
        optimizer.step()
        gradients = slopes(weights, masks, data, batch(learned, 2 * step, options.batch_size, drawn))
        moves = {n: (weights[n] - g / options.gamma) * g for n, g in gradients.items()}
        length = options.mask_rate * rate * size / max(rms(moves), 1e-30)
        scores = {n: (s - length * moves[n]).clamp(min=0) for n, s in scores.items()}
        masks = ranked()
        if step % max(1, options.steps // LOOKS) == 0 or step == options.steps:
            now = error()
            if now < best:
                best, kept = now, {n: (w.clone(), masks[n]) for n, w in weights.items()}
    notes = {"loss_start": start, "loss": best}
    return {n: w for n, (w, _) in kept.items()}, {n: m for n, (_, m) in kept.items()}, notes


def slopes(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], data: ModelData, numbers: Tensor
) -> dict[str, Tensor]:
    """Gradients of the loss at the masked weights, of those that are gone too."""
    made = {n: (w * masks[n]).requires_grad_() for n, w in weights.items()}
    with torch.enable_grad():
        value = data.loss(lambda wanted: {n: made[n] for n in wanted if n in made}, numbers)
        torch.autograd.backward(value, inputs=list(made.values()))
    return {n: m.grad if m.grad is not None else torch.zeros_like(m) for n, m in made.items()}


def rms(values: Mapping[str, Tensor]) -> float:
    """Root mean square over all of them."""
    count = sum(v.numel() for v in values.values())
    return float((sum(float(v.double().square().sum()) for v in values.values()) / count) ** 0.5)
