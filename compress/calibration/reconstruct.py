"""Learning by reconstruction: the one training loop of every method that learns a block's weights from its outputs.

A method says which numbers are learned and how they make weights; this loop runs the block with those weights,
compares its outputs with the original block's on the original's inputs, and keeps the best iterate by the error of the
*hard* weights (those that will be stored) on samples that were not trained on. The start counts as an iterate, so the
result is never worse than it there.

Source of the scheme: Li et al., "BRECQ", 2021, arXiv 2102.05426; the element-wise mix of inputs: Wei et al., "QDrop",
2022, arXiv 2203.05740. Differs from the papers in: the best iterate on held-out samples is kept, not the last.

Shapes: N samples, B samples a step; hidden states are (N, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from compress.calibration.draws import draw
from compress.errors import SolveError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

Inputs = Literal["compressed", "original", "mix"]
Weights: TypeAlias = "Mapping[str, Tensor]"  # site -> (out, in)

LOOKS = 10  # times the held-out error is measured while learning
HELD_OUT = 8  # one in so many samples is not trained on
MIX = 0.5  # share of the elements of a mixed input that come from the compressed chain


class Samples:
    """Hidden states of all calibration samples, kept as the batches they were computed in."""

    def __init__(self, batches: Sequence[Tensor], device: torch.device | None = None):
        """`device`: where samples are taken to; by default they stay where they are."""
        self.batches, self.device = batches, device
        self._place = [(i, row) for i, batch in enumerate(batches) for row in range(len(batch))]

    def __len__(self) -> int:
        return len(self._place)

    def take(self, numbers: Tensor) -> Tensor:
        """(B, ...) some of the samples, in the order asked for."""
        places = [self._place[n] for n in numbers.tolist()]
        first = self.batches[places[0][0]]
        taken = torch.empty(len(places), *first.shape[1:], dtype=first.dtype, device=first.device)
        for i, (batch, row) in enumerate(places):
            taken[i] = self.batches[batch][row]
        return taken if self.device is None else taken.to(self.device)


@dataclass(frozen=True)
class BlockData:
    """A block to reconstruct.

    Attributes:
        call: (weights by site, hidden states (B, ...), numbers of their samples) -> the block's outputs, differentiable
            in the weights.
        inputs: what arrives from the compressed blocks before it.
        original_inputs: what arrives at it in the original model.
        outputs: what the original block makes of `original_inputs`.
    """

    call: Callable[[Weights, Tensor, Tensor], Tensor]
    inputs: Samples
    original_inputs: Samples
    outputs: Samples


class Learned(Protocol):
    """What a method learns: numbers, and the weights they stand for."""

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Learned tensors with their learning rates."""

    def soft(self, progress: float) -> Weights:
        """Differentiable weights; `progress` goes from 0 to 1 over the steps."""

    def hard(self) -> Weights:
        """The weights that would be stored now."""

    def penalty(self, progress: float) -> Tensor | None:
        """Something to add to the loss, relative to the original outputs' mean square."""

    def state(self) -> list[Tensor]:
        """What else belongs to an iterate and is changed in place, such as codes."""


@dataclass(frozen=True)
class Recipe:
    """How to learn.

    Attributes:
        steps: of Adam, learning rates falling to zero along a cosine.
        batch_size: samples a step.
        inputs: the block's inputs while learning: `compressed`, `original`, or an element-wise `mix` of both.
    """

    steps: int
    batch_size: int
    inputs: Inputs = "compressed"


@dataclass(frozen=True)
class Outcome:
    """What learning reached.

    Attributes:
        start, best: error of the hard weights on held-out samples, relative to the mean square of the outputs.
        best_step: when; 0 means that nothing learned was better than the start.
    """

    start: float
    best: float
    best_step: int

    def notes(self) -> dict[str, float]:
        """For the report."""
        return {"block_error_start": self.start, "block_error": self.best, "best_step": self.best_step}


def by_block(
    learned: Learned,
    data: BlockData,
    recipe: Recipe,
    generator: torch.Generator,
    over: Callable[[Iterable[int], int, str], Iterator[int]],
) -> Outcome:
    """Learn from the outputs of the whole block. Afterwards `learned` holds the best iterate.

    Raises:
        SolveError: the start's error is not finite.
    """
    count = len(data.outputs)
    held = torch.arange(count)[:: min(HELD_OUT, count)]
    trained = torch.tensor([n for n in range(count) if n not in set(held.tolist())] or held.tolist())
    scale = _mean_square(data.outputs, held, recipe.batch_size)

    def error() -> float:
        weights, total = learned.hard(), 0.0
        with torch.no_grad():
            for part in torch.split(held, recipe.batch_size):
                made = data.call(weights, data.inputs.take(part), part)
                total += float((made.float() - data.outputs.take(part).float()).square().sum())
        return total / (scale * _numel(data.outputs, held))

    order = torch.empty(0, dtype=torch.long)

    def loss(progress: float) -> Tensor:
        nonlocal order
        if len(order) == 0:
            order = trained[draw(generator, (len(trained),), "permutation", trained)]
        part, order = order[: recipe.batch_size], order[recipe.batch_size :]
        made = data.call(learned.soft(progress), _inputs(data, recipe.inputs, part, generator), part)
        return (made.float() - data.outputs.take(part).float()).square().mean() / scale

    return _learn(learned, loss, error, recipe.steps, over)


def by_layer(
    learned: Learned,
    original: Weights,
    grams: Mapping[str, Tensor],
    recipe: Recipe,
    over: Callable[[Iterable[int], int, str], Iterator[int]],
) -> Outcome:
    """Learn from each layer's own outputs, tr(dW H dW^T): needs only the Gram matrices, never the data again.

    Args:
        learned: as for `by_block`.
        original: (out, in) weights before compression.
        grams: site -> (in, in), sum of x x^T.
        recipe: only its steps count.
        over: draws progress.
    """
    sizes = {name: float(((w @ grams[name]) * w).sum()) or 1.0 for name, w in original.items()}

    def distance(weights: Weights) -> Tensor:
        total = torch.zeros(())
        for name, w in original.items():
            lost = weights[name] - w
            total = total + ((lost @ grams[name]) * lost).sum() / sizes[name]
        return total / len(original)

    def error() -> float:
        with torch.no_grad():
            return float(distance(learned.hard()))

    return _learn(learned, lambda progress: distance(learned.soft(progress)), error, recipe.steps, over)


def _learn(
    learned: Learned,
    loss: Callable[[float], Tensor],
    error: Callable[[], float],
    steps: int,
    over: Callable[[Iterable[int], int, str], Iterator[int]],
) -> Outcome:
    groups = learned.groups()
    tensors = [t for ts, _ in groups for t in ts]
    iterate = tensors + learned.state()
    start = best = error()
    if not math.isfinite(start):
        raise SolveError("the block's outputs are not finite")
    kept, best_step = [t.detach().clone() for t in iterate], 0
    optimizer = torch.optim.Adam([{"params": ts, "lr": lr, "most": lr} for ts, lr in groups], fused=True)
    with torch.enable_grad():
        for step in over(range(1, steps + 1), steps, "learn: steps"):
            progress = (step - 1) / steps
            for group in optimizer.param_groups:
                group["lr"] = group["most"] * 0.5 * (1 + math.cos(math.pi * progress))
            value = loss(progress)
            penalty = learned.penalty(progress)
            if penalty is not None:
                value = value + penalty
            optimizer.zero_grad()
            torch.autograd.backward(value, inputs=tensors)
            if not torch.isfinite(value):
                break  # diverged: what was best stays
            optimizer.step()
            if step % max(1, steps // LOOKS) == 0 or step == steps:
                now = error()
                if now < best:
                    best, best_step = now, step
                    kept = [t.detach().clone() for t in iterate]
    with torch.no_grad():
        for tensor, value in zip(iterate, kept, strict=True):
            tensor.copy_(value)
    return Outcome(start, best, best_step)


def _inputs(data: BlockData, kind: Inputs, part: Tensor, generator: torch.Generator) -> Tensor:
    if kind == "original":
        return data.original_inputs.take(part)
    inputs = data.inputs.take(part)
    if kind == "compressed":
        return inputs
    chosen = draw(generator, inputs.shape, "uniform", inputs) < MIX
    return torch.where(chosen, inputs, data.original_inputs.take(part))


def _numel(samples: Samples, numbers: Tensor) -> int:
    return samples.take(numbers[:1]).numel() * len(numbers)


def _mean_square(samples: Samples, numbers: Tensor, at_once: int) -> float:
    total = 0.0
    for part in torch.split(numbers, at_once):
        total += float(samples.take(part).float().square().sum())
    return total / _numel(samples, numbers) or 1.0
