"""Learning by reconstruction: what every method shares that learns a block's weights from its outputs.

A method says which numbers are learned and how they make weights; the block is run with those weights, its outputs are
compared with the original block's on the original's inputs, and keeps the best iterate by the error of the
*hard* weights (those that will be stored) on samples that were not trained on. The start counts as an iterate, so the
result is never worse than it there.

Source of the scheme: Li et al., "BRECQ", 2021, arXiv 2102.05426; the element-wise mix of inputs: Wei et al., "QDrop",
2022, arXiv 2203.05740. Differs from the papers in: the best iterate on held-out samples is kept, not the last.

Shapes: N samples, B samples per step; hidden states are (N, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from compress.calibration.draws import draw
from compress.calibration.shares import ALONE
from compress.calibration.training import Learner, Loop, TrainingStore, learn
from compress.lazy import function, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.shares import Shares
    from compress.calibration.training import Label, Outcome

Inputs = Literal["compressed", "original", "mix"]
Weights: TypeAlias = "Mapping[str, Tensor]"  # site -> (out, in)

LOOKS = 10  # times the held-out error is measured while learning
HELD_OUT = 8  # one in so many samples is not trained on
SPACING = 30.0  # seconds: a block that is learned quickly is sooner learned again than its state is written
BLOCK_ERROR = "block_error"  # what the error is called in the report
MIX = 0.5  # share of the elements of a mixed input that come from the compressed chain


class HiddenSamples:
    """Hidden states of all calibration samples, kept as the batches they were computed in."""

    def __init__(self, batches: Sequence[Tensor], device: torch.device | None = None):
        """`device`: where samples are taken to; by default they stay where they are."""
        self.batches, self.device = batches, device
        self._place = [(i, row) for i, batch in enumerate(batches) for row in range(len(batch))]

    def __len__(self) -> int:
        return len(self._place)

    @property
    def example(self) -> Tensor:
        """(...) a sample, on the device that samples are taken to; of no use but for its shape."""
        return self.take(torch.zeros(1, dtype=torch.long, device="cpu"))[0]

    def take(self, numbers: Tensor) -> Tensor:
        """(B, ...) some of the samples, in the order asked for."""
        places = [self._place[n] for n in numbers.tolist()]
        first = self.batches[places[0][0]]
        device = first.device if self.device is None else self.device
        taken = torch.empty(len(places), *first.shape[1:], dtype=first.dtype, device=device)
        for i, (batch, row) in enumerate(places):
            taken[i] = self.batches[batch][row].to(device, non_blocking=True)  # from pinned memory nothing waits for it
        return taken


@dataclass(frozen=True)
class BlockData:
    """A block to reconstruct.

    Attributes:
        call: (weights by site, hidden states (B, ...), numbers of their samples) -> the block's outputs, differentiable
            in the weights.
        inputs: what arrives from the compressed blocks before it.
        original_inputs: what arrives at it in the original model.
        outputs: what the original block makes of `original_inputs`.
        shares: how processes share the samples, each of which is held by one.
        dtype: the type that `call` computes in, to which it rounds weights; None: that of the weights.
    """

    call: Callable[[Weights, Tensor, Tensor], Tensor]
    inputs: HiddenSamples
    original_inputs: HiddenSamples
    outputs: HiddenSamples
    shares: Shares = ALONE
    dtype: torch.dtype | None = None

    @property
    def count(self) -> int:
        """N, those of other processes too."""
        return sum(self.shares.counts) or len(self.outputs)


class LearnedWeights(Protocol):
    """What a method learns: numbers, and the weights they stand for."""

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Learned tensors with their learning rates."""

    def soft(self, progress: float) -> Weights:
        """Differentiable weights; `progress` goes from 0 to 1 over the steps."""

    def hard(self) -> Weights:
        """The weights that would be stored now."""

    def penalty(self, progress: float) -> Tensor | None:
        """Something to add to the loss, relative to the original outputs' mean square."""

    def after(self) -> None:
        """Called when the optimizer has changed the learned tensors."""


@dataclass(frozen=True)
class Recipe:
    """How to learn.

    Attributes:
        steps: of Adam, learning rates falling to zero along a cosine.
        batch_size: samples per step.
        inputs: the block's inputs while learning: `compressed`, `original`, or an element-wise `mix` of both.
    """

    steps: int
    batch_size: int
    inputs: Inputs = "compressed"

    def loop(self) -> Loop:
        """The loop that learns so."""
        return Loop(self.steps, self._rate, LOOKS, "learn", spacing=SPACING)

    def _rate(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))


def by_block(
    learned: LearnedWeights,
    data: BlockData,
    recipe: Recipe,
    generator: torch.Generator,
    over: Callable[[Iterable[int], int, Label], Iterator[int]],
    kept: TrainingStore | None = None,
) -> Outcome:
    """Learn from the outputs of the whole block. Afterwards `learned` holds the best iterate.

    The error is that of the hard weights on held-out samples, relative to the mean square of the outputs.

    Args:
        learned: what is learned.
        data: the block.
        recipe: how to learn.
        generator: randomness of the order of samples, and of mixed inputs.
        over: draws progress.
        kept: where the state of an unfinished learning is kept; nowhere by default.

    Raises:
        SolveError: the start's error is not finite.
    """
    return learn(_ByBlock(learned, data, recipe, generator), recipe.loop(), kept or TrainingStore(), over)


def by_layer(
    learned: LearnedWeights,
    original: Weights,
    grams: Mapping[str, Tensor],
    recipe: Recipe,
    over: Callable[[Iterable[int], int, Label], Iterator[int]],
    kept: TrainingStore | None = None,
) -> Outcome:
    """Learn from each layer's own outputs, tr(dW H dW^T): needs only the Gram matrices, never the data again.

    Args:
        learned: as for `by_block`.
        original: (out, in) weights before compression.
        grams: site -> (in, in), sum of x x^T.
        recipe: only its steps count.
        over: draws progress.
        kept: where the state of an unfinished learning is kept; nowhere by default.
    """
    return learn(_ByLayer(learned, recipe, original, grams), recipe.loop(), kept or TrainingStore(), over)


class _Reconstruction(Learner):
    """Weights learned from what they should make."""

    not_finite = "the block's outputs are not finite"

    def __init__(self, learned: LearnedWeights, recipe: Recipe):
        self.learned, self.recipe, self.shares = learned, recipe, ALONE
        self.tensors = [t for ts, _ in learned.groups() for t in ts]

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return self.learned.groups()

    def gradients(self, step: int) -> Tensor:
        progress = (step - 1) / self.recipe.steps
        value = self.loss(self.learned.soft(progress))
        penalty = self.learned.penalty(progress) if self.shares.leads else None
        if penalty is not None:
            value = value + penalty
        return self.shares.backward(value, self.tensors)

    def after(self, step: int) -> None:
        self.learned.after()

    def loss(self, weights: Weights) -> Tensor:
        """The distance from what should come out, on the next samples: the part of this process in their mean."""
        raise NotImplementedError


class _ByBlock(_Reconstruction):
    def __init__(self, learned: LearnedWeights, data: BlockData, recipe: Recipe, generator: torch.Generator):
        super().__init__(learned, recipe)
        self.data, self.generator, self.shares, count = data, generator, data.shares, data.count
        # Numbers of samples stay where they are read: to say which sample comes next must not wait for a device.
        self.held = torch.arange(count, device="cpu")[:: min(HELD_OUT, count)]
        held = self.held.tolist()
        self.trained = torch.tensor([n for n in range(count) if n not in set(held)] or held, device="cpu")
        self.order = torch.empty(0, dtype=torch.long, device="cpu")
        self.step, self.part = 0, self.order
        self.mixed: Tensor | None = None
        self.scale = _mean_square(data, self.held, recipe.batch_size)

    def error(self) -> float:
        weights, data = self.learned.hard(), self.data
        with torch.no_grad():
            owned = (self.shares.own(part)[0] for part in torch.split(self.held, self.recipe.batch_size))
            parts = [self._held_error(weights, own) for own in owned if len(own)]
        total: float = sum(torch.stack(parts).tolist()) if parts else 0.0
        return self.shares.total(total) / (self.scale * _numel(data, self.held))

    def _held_error(self, weights: Weights, part: Tensor) -> Tensor:
        made = self.data.call(weights, self.data.inputs.take(part), part)
        return (made.float() - self.data.outputs.take(part).float()).square().sum()

    def gradients(self, step: int) -> Tensor:
        if step != self.step:  # one that has to be computed again is computed on the same samples
            self._draw()
            self.step = step
        return super().gradients(step)

    def _draw(self) -> None:
        """Take the next samples, of all processes together."""
        if len(self.order) == 0:
            self.order = self.trained[draw(self.generator, (len(self.trained),), "permutation", self.trained)]
        size = self.recipe.batch_size
        self.part, self.order = self.order[:size], self.order[size:]
        self.mixed = self._mixed(len(self.part))

    def loss(self, weights: Weights) -> Tensor:
        part, chosen = self.part, self.mixed
        own, places = self.shares.own(part)
        if len(own) == 0:  # other processes hold all of them
            return torch.zeros((), device=self.tensors[0].device)
        made = self.data.call(weights, _inputs(self.data, self.recipe.inputs, own, chosen, places), own)
        lost = _mean_square_error(made, self.data.outputs.take(own))
        return lost * (len(own) / len(part)) / self.scale

    def _mixed(self, count: int) -> Tensor | None:
        """Where the inputs of so many samples are those of the compressed chain; None where all are of one kind."""
        if self.recipe.inputs != "mix":
            return None
        example = self.data.inputs.example
        return draw(self.generator, (count, *example.shape), "uniform", example) < MIX

    def randomness(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state(), "order": self.order.clone()}

    def reseed(self, randomness: Mapping[str, Tensor]) -> None:
        self.generator.set_state(randomness["generator"].cpu())
        self.order = randomness["order"].to(self.trained.device)


class _ByLayer(_Reconstruction):
    def __init__(self, learned: LearnedWeights, recipe: Recipe, original: Weights, grams: Mapping[str, Tensor]):
        super().__init__(learned, recipe)
        self.original, self.grams = original, grams
        self.sizes = {name: float(((w @ grams[name]) * w).sum()) or 1.0 for name, w in original.items()}

    def loss(self, weights: Weights) -> Tensor:
        total = torch.zeros(())
        for name, w in self.original.items():
            lost = weights[name] - w
            total = total + ((lost @ self.grams[name]) * lost).sum() / self.sizes[name]
        return total / len(self.original)

    def error(self) -> float:
        with torch.no_grad():
            return float(self.loss(self.learned.hard()))


def _inputs(data: BlockData, kind: Inputs, own: Tensor, chosen: Tensor | None, places: Tensor) -> Tensor:
    if kind == "original":
        return data.original_inputs.take(own)
    inputs = data.inputs.take(own)
    if chosen is None:
        return inputs
    return torch.where(chosen[places.to(chosen.device)], inputs, data.original_inputs.take(own))


def _mean_square_error(made: Tensor, wanted: Tensor) -> Tensor:
    if made.device.type == "cuda":
        error: Tensor = function(_SquareError).apply(made, wanted)
        return error
    return (made.float() - wanted.float()).square().mean()


class _SquareError:
    # One sample after the other: the whole as float32, several times over, would be the peak of the memory.
    @staticmethod
    def forward(ctx: Any, made: Tensor, wanted: Tensor) -> Tensor:
        ctx.save_for_backward(made, wanted)
        errors = [(a.float() - b.float()).square().sum() for a, b in zip(made, wanted, strict=True)]
        return torch.stack(errors).sum() / made.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        made, wanted = ctx.saved_tensors
        factor, back = gradients[0] * (2 / made.numel()), torch.empty_like(made)
        for a, b, into in zip(made, wanted, back, strict=True):
            into.copy_((a.float() - b.float()) * factor)
        return back, None


def _numel(data: BlockData, numbers: Tensor) -> int:
    return data.outputs.example.numel() * len(numbers)


def _mean_square(data: BlockData, numbers: Tensor, at_once: int) -> float:
    total = 0.0
    for part in torch.split(numbers, at_once):
        own, _ = data.shares.own(part)
        if len(own):
            total += float(data.outputs.take(own).float().square().sum())
    return data.shares.total(total) / _numel(data, numbers) or 1.0
