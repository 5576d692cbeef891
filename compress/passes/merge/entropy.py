"""Coefficients of task vectors that are learned, and how sure of its answers the merged model is.

Shapes: K task vectors, T tensors, n predictions of C classes, or of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from compress.lazy import function, functional, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor

    from compress.calibration.training import Make, Values
    from compress.passes.merge.models import Running

ReadTensorParts: TypeAlias = (
    "Callable[[str], tuple[Tensor, list[Tensor]]]"  # tensor -> the base's value, and what each task adds to it
)


class Coefficients:
    """What is learned: a coefficient for each task, and for each tensor if `level` is layer."""

    def __init__(
        self,
        start: Mapping[str, tuple[float, ...]],
        level: str,
        rate: float,
        parts: ReadTensorParts,
    ):
        self.parts, self.rate = parts, rate
        rows = list(start.values()) if level == "layer" else list(start.values())[:1]
        self.row = {name: i if level == "layer" else 0 for i, name in enumerate(start)}
        self.values = torch.tensor(rows, requires_grad=True)

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [([self.values], self.rate)]

    def make(self, names: Collection[str]) -> Values:
        return {
            name: function(_Mixed).apply(self.values[self.row[name]].clamp(0, 1), name, self.parts) for name in names
        }

    def merged(self, names: Collection[str]) -> Values:
        with torch.no_grad():
            return self.make(names)

    def found(self) -> dict[str, tuple[float, ...]]:
        """Tensor -> K coefficients."""
        values = self.values.detach().clamp(0, 1).tolist()
        return {name: tuple(values[row]) for name, row in self.row.items()}


class _Mixed:
    """base + sum of coefficients times deltas; nothing of a tensor's size is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, name: str, parts: ReadTensorParts) -> Tensor:
        ctx.name, ctx.parts = name, parts
        base, deltas = parts(name)
        total = base.clone()
        for delta, coefficient in zip(deltas, coefficients.tolist(), strict=True):
            total.add_(delta, alpha=coefficient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        _, deltas = ctx.parts(ctx.name)
        return torch.stack([(gradients[0] * delta).sum() for delta in deltas]), None, None


@dataclass(frozen=True)
class Sureness:
    """How sure the predictions are for the samples of one source.

    Attributes:
        entropy: mean over predictions, in nats.
        spread: the entropy of their mean, in nats: 0 where all say the same.
    """

    entropy: Tensor
    spread: Tensor


def sureness(running: Running, make: Make, numbers: Tensor, batch_size: int) -> dict[int, Sureness]:
    """How sure the predictions are for every source that some samples are from; a batch of samples is run at a time."""
    totals: dict[int, list[Tensor]] = {}
    for part in torch.split(numbers, batch_size):
        logs = functional.log_softmax(running.logits(make, part), dim=-1)
        shares, sources = logs.exp(), running.sources[part].repeat_interleave(len(logs) // len(part))
        unsure = -(shares * logs).sum(-1)
        for source in sorted(set(sources.tolist())):
            rows = sources == source
            now = [unsure[rows].sum(), shares[rows].sum(0), rows.sum()]
            before = totals.get(source)
            totals[source] = [a + b for a, b in zip(before, now, strict=True)] if before else now
    return {source: Sureness(e / n, _entropy(shares / n)) for source, (e, shares, n) in sorted(totals.items())}


def _entropy(shares: Tensor) -> Tensor:
    each: Tensor = torch.special.xlogy(shares, shares)
    return -each.sum()


def unsure(found: Mapping[int, Sureness], diversity: float) -> Tensor:
    """The mean over the sources: how unsure a model is of single answers, less how different they are."""
    return torch.stack([each.entropy - diversity * each.spread for each in found.values()]).mean()


def loss(running: Running, diversity: float, make: Make, numbers: Tensor) -> Tensor:
    """What is made small."""
    return unsure(sureness(running, make, numbers, len(numbers)), diversity)


def judged(
    running: Running, held: Tensor, batch_size: int, diversity: float, least: Mapping[int, float], make: Make
) -> float:
    """The loss of an iterate on samples held out; infinite where its predictions for a source have collapsed."""
    with torch.no_grad():
        found = sureness(running, make, held, batch_size)
    collapsed = any(float(each.spread) < least[source] for source, each in found.items())
    return math.inf if collapsed else float(unsure(found, diversity))
