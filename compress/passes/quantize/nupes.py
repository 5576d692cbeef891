"""NUPES: a power grid whose codes and exponent are learned together.

Shapes: O rows, I columns, G groups of C = I / G columns; R = O, or 1 for one scale per matrix; L levels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Gt, Lt

from compress.encodings import Power
from compress.encodings.power import level_values
from compress.encodings.uniform import narrowest, stored_scale
from compress.lazy import no_grad, torch
from compress.passes.quantize.learned import LearnedPass, LearnedRounding, look_up
from compress.passes.quantize.powerquant import PowerOptions, PowerQuant
from compress.passes.solvers.device import fused

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings.power import Levels
    from compress.passes.base import Target

EXPONENT_RANGE = (0.1, 1.5)  # the smallest and the largest
FROZEN = 0.8  # share of the steps after which the exponent stays as it is


@dataclass(frozen=True, kw_only=True)
class Nupes(PowerOptions, LearnedPass):
    """Learn every weight's place on a power grid, and the grid's exponent, from the block's outputs.

    A weight may go to any level on its side of zero, not only to the two around it. Masked weights stay zero.

    Source: Yvinec, Dapogny and Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", 2023,
    arXiv 2308.05600; it starts where PowerQuant ends (ICLR 2023, arXiv 2301.09858). Only the abstract could be read;
    the parametrisation is a reconstruction: a weight's place is learned as a divisor of its own, as FlexRound does on
    the uniform grid (measured against soft rounding with a regulariser, see docs/methods/nupes.md). Differs from the
    paper in: scales are learned too; `half` levels, see powerquant; the best iterate on held-out samples is kept, and
    it is never worse there than PowerQuant.

    Args:
        learn_exponent: False keeps each matrix's first exponent.
        learn_scale: False keeps the first scales.
        exponent_rate: learning rate of the exponent's logarithm.
        scale_rate: learning rate of the scales' logarithms.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.Nupes(bits=3, steps=5)], calibration=torch.randn(16, 64))
        >>> result.weights["0"].encoding.form.family
        'power'
    """

    learning_rate: Annotated[float, Gt(0), Lt(1)] = 0.02
    exponent_rate: Annotated[float, Gt(0), Lt(1)] = 0.005
    scale_rate: Annotated[float, Gt(0), Lt(1)] = 0.015
    learn_exponent: bool = True
    learn_scale: bool = True

    key: ClassVar[str] = "nupes"

    def start(self, target: Target) -> Position:
        return Position(target.weight, self.encoded(target, self.grid([self.profile(target)])), self)

    def stand_in(self) -> PowerQuant:
        shared = {f.name: getattr(self, f.name) for f in fields(PowerOptions)}
        return PowerQuant(**shared)


class Position(LearnedRounding):
    """What = s * lev(nearest(W / (s * S))): scales s, divisors S and exponent learned as logarithms, from zero."""

    def __init__(self, weight: Tensor, start: Power, options: Nupes):
        self.options, self.bits, self.layout = options, start.bits, start.levels
        self.first_scale = start.scale.float()[..., None]
        self.unit = weight.view(len(weight), start.scale.shape[1], -1) / self.first_scale
        self.log_scale = torch.zeros_like(self.first_scale, requires_grad=options.learn_scale)
        self.log_divisor = torch.zeros_like(self.unit, requires_grad=True)
        self.first_exponent = start.exponent.double()
        self.log_exponent = torch.zeros(1, dtype=torch.float64, requires_grad=options.learn_exponent)
        self.places = even_places(self.bits, self.layout)

    def groups(self) -> list[tuple[list[Tensor], float]]:
        o = self.options
        every = (
            ([self.log_divisor], o.learning_rate),
            ([self.log_scale], o.scale_rate),
            ([self.log_exponent], o.exponent_rate),
        )
        return [(tensors, rate) for tensors, rate in every if tensors[0].requires_grad]

    def exponent(self) -> Tensor:
        """(1,) float64 as it stands."""
        return (self.first_exponent * self.log_exponent.exp()).clamp(*EXPONENT_RANGE)

    def values(self) -> Tensor:
        """(L,) levels in units of the scale; differentiable in the exponent."""
        # Powers of places, never of weights: the logarithms are bounded, and there is none at zero.
        magnitude = torch.where(self.places == 0, 1.0, self.places.abs()).log()
        values: Tensor = self.places.sign() * (magnitude / self.exponent()).exp()
        return values.float()

    def soft(self, progress: float) -> Tensor:
        values = self.values() if progress < FROZEN else self.values().detach()
        scale = self.log_scale.exp()
        unit = divided(self.unit, scale, self.log_divisor)
        code = nearest_level(unit.detach(), values.detach())
        end = 1 + (values[-1] - values[-2]).detach() / 2  # a weight beyond this no longer feels its place
        return landed(look_up(values[None], code), unit, end, self.first_scale * scale)

    @no_grad
    def encoding(self) -> Power:
        scale, exponent = self.log_scale.exp(), self.exponent().float()
        stored = narrowest(stored_scale((self.first_scale * scale)[..., 0]))
        unit = divided(self.unit, scale, self.log_divisor)
        code = nearest_level(unit, level_values(self.bits, self.layout, exponent)).to(torch.uint8)
        return Power(code.view(len(code), -1), stored, exponent, self.bits, self.layout)


@fused
def divided(unit: Tensor, scale: Tensor, log_divisor: Tensor) -> Tensor:
    """Weights in units of the first scale, divided by what is learned."""
    return unit / scale * log_divisor.neg().exp()


@fused
def landed(level: Tensor, unit: Tensor, end: Tensor, scale: Tensor) -> Tensor:
    """(O, I) the levels that weights have, scaled; the gradient goes to their places too, where these are inside."""
    inside = unit.detach().abs() <= end
    made = level + (unit - unit.detach()) * inside
    return (made * scale).reshape(len(made), -1)


def even_places(bits: int, levels: Levels) -> Tensor:
    """(L,) float64 evenly spaced from -1 to 1: what the levels are powers of."""
    middle: float = 2 ** (bits - 1) - (1 if levels == "zero" else 0.5)
    steps = torch.arange(2 * middle + 1, dtype=torch.float64) - middle
    return steps / middle


def nearest_level(unit: Tensor, values: Tensor) -> Tensor:
    """Numbers of any shape -> int64 numbers of the nearest of (L,) ascending levels."""
    found: Tensor = torch.bucketize(unit, (values[1:] + values[:-1]) / 2)
    return found
