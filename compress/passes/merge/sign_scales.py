"""Scales of signs: fitted to a delta round by round, or learned together from what the fine-tune predicts.

Shapes: n elements of a delta, k rounds, B samples, C classes, or tokens of a vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.encodings.signs import Signs
from compress.lazy import function, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from torch import Tensor

    from compress.calibration.training import Make, Values
    from compress.passes.merge.models import Models, Running


@dataclass(frozen=True)
class Scales:
    """The scales of one tensor.

    Attributes:
        fitted: (k,) float32, that the signs of each round were found with.
        used: (k,) float32, that they are multiplied with.
    """

    fitted: Tensor
    used: Tensor


def fit_sign_scales(deltas: Callable[[], Iterable[Tensor]], total: int, rounds: int) -> Tensor:
    """(k,) each the mean magnitude of what the rounds before have left, which is the scale with the least error.

    Args:
        deltas: the parts of a delta, as often as it is called.
        total: its elements.
        rounds: k.
    """
    scales = torch.zeros(0)
    for _ in range(rounds):
        left = sum(float(signs_of(delta, scales)[1].abs().sum(dtype=torch.float64)) for delta in deltas())
        scales = torch.cat([scales, torch.tensor([left / max(1, total)])])
    return scales


def signs_of(delta: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(k, n) int8 signs of a delta (n,), round by round, no change counting as positive; and (n,) what they leave."""
    left, signs = delta, []
    for scale in scales:
        sign = torch.where(left >= 0, 1, -1).to(torch.int8)
        left = left - sign * scale
        signs.append(sign)
    return torch.stack(signs) if signs else torch.zeros(0, len(delta), dtype=torch.int8), left


class Distilled:
    """What is learned: a factor of every fitted scale, so that one learning rate serves deltas of any size."""

    def __init__(self, models: Models, fitted: Mapping[str, Tensor], rate: float):
        self.models, self.fitted, self.rate = models, fitted, rate
        self.factors = {name: torch.ones_like(scales, requires_grad=True) for name, scales in fitted.items()}

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [(list(self.factors.values()), self.rate)]

    def make(self, names: Collection[str]) -> Values:
        return {name: self._value(name) for name in names}

    def merged(self, names: Collection[str]) -> Values:
        with torch.no_grad():
            return self.make(names)

    def found(self) -> dict[str, Scales]:
        """Tensor -> its scales."""
        return {name: Scales(scales, self._used(name).detach()) for name, scales in self.fitted.items()}

    def _used(self, name: str) -> Tensor:
        return self.factors[name] * self.fitted[name]

    def _value(self, name: str) -> Tensor:
        if name not in self.fitted:
            return self.models.value(1, name)
        value: Tensor = function(_Signed).apply(self._used(name), self.fitted[name], name, self.models)
        return value


class _Signed:
    """base + sum of scales times signs; the signs are computed again for the gradient, so nothing large is kept."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, fitted: Tensor, name: str, models: Models) -> Tensor:
        ctx.fitted, ctx.name, ctx.models = fitted, name, models
        base, signs = _found(fitted, name, models)
        return Signs(scales, signs).value().view_as(base).add_(base)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        _, signs = _found(ctx.fitted, ctx.name, ctx.models)
        gradient = gradients[0].flatten()
        return torch.stack([(gradient * sign).sum() for sign in signs]), None, None, None


def _found(fitted: Tensor, name: str, models: Models) -> tuple[Tensor, Tensor]:
    base = models.value(0, name)
    return base, signs_of((models.value(1, name) - base).flatten(), fitted)[0]


def distance(running: Running, models: Models, make: Make, numbers: Tensor) -> Tensor:
    """Mean square of how far logits (B, C) are from those of the fine-tune."""
    with torch.no_grad():
        meant = running.logits(lambda names: {name: models.value(1, name) for name in names}, numbers)
    return (running.logits(make, numbers) - meant).square().mean()
