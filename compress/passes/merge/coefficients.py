"""Coefficients of task vectors that are learned, and how sure of its answers the merged model is.

Shapes: K task vectors, T tensors, n predictions of C classes, or of tokens.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from compress.calibration.training import Make, Values
from compress.passes.merge.models import Running

Parts = Callable[[str], tuple[Tensor, list[Tensor]]]  # tensor -> the base's value, and what each task adds to it


class Coefficients:
    """What is learned: a coefficient for each task, and for each tensor if `level` is layer."""

    def __init__(
        self,
        start: Mapping[str, tuple[float, ...]],
        level: str,
        rate: float,
        parts: Parts,
    ):
        self.parts, self.rate = parts, rate
        rows = list(start.values()) if level == "layer" else list(start.values())[:1]
        self.row = {name: i if level == "layer" else 0 for i, name in enumerate(start)}
        self.values = torch.tensor(rows, requires_grad=True)

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [([self.values], self.rate)]

    def make(self, names: Collection[str]) -> Values:
        return {name: _Mixed.apply(self.values[self.row[name]].clamp(0, 1), name, self.parts) for name in names}  # type: ignore[no-untyped-call]

    def merged(self, names: Collection[str]) -> Values:
        with torch.no_grad():
            return self.make(names)

    def found(self) -> dict[str, tuple[float, ...]]:
        """Tensor -> K coefficients."""
        values = self.values.detach().clamp(0, 1).tolist()
        return {name: tuple(values[row]) for name, row in self.row.items()}


class _Mixed(torch.autograd.Function):
    """base + sum of coefficients times deltas; nothing of a tensor's size is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, name: str, parts: Parts) -> Tensor:
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


def _entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean entropy of (n, C) predictions in nats, and their mean (C,)."""
    logs = log_softmax(logits, dim=-1)
    shares = logs.exp()
    return -(shares * logs).sum(-1).mean(), shares.mean(0)


def _entropy(shares: Tensor) -> Tensor:
    each: Tensor = torch.special.xlogy(shares, shares)
    return -each.sum()


def loss(running: Running, diversity: float, make: Make, numbers: Tensor) -> Tensor:
    """How unsure a merged model is, less how different its answers are."""
    unsure, mean = _entropies(running.logits(make, numbers))
    return unsure - diversity * _entropy(mean) if diversity else unsure


def sureness(running: Running, make: Make, numbers: Tensor, batch_size: int) -> tuple[float, float]:
    """Mean entropy on some samples, and the entropy of their mean prediction."""
    unsure, means = [], []
    parts = torch.split(numbers, batch_size)
    with torch.no_grad():
        for part in parts:
            entropy, mean = _entropies(running.logits(make, part))
            unsure.append(float(entropy) * len(part) / len(numbers))
            means.append(mean * (len(part) / len(numbers)))
    return sum(unsure), float(_entropy(torch.stack(means).sum(0)))


def judged(running: Running, held: Tensor, batch_size: int, diversity: float, least: float, make: Make) -> float:
    """The loss of an iterate on samples held out; infinite where its predictions have collapsed."""
    unsure, spread = sureness(running, make, held, batch_size)
    return unsure - diversity * spread if spread >= least else math.inf
