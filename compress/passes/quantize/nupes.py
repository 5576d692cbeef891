"""NUPES: a power grid whose codes and exponent are learned together.

Shapes: O rows, I columns, G groups of C = I / G columns; R = O, or 1 for one scale per matrix; L levels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from compress.encodings import Power
from compress.encodings.power import level_values
from compress.encodings.uniform import narrowest, stored_scale
from compress.lazy import functional, no_grad, torch
from compress.passes.quantize.learned import LearnedPass, LearnedRounding, look_up, pulled
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

    A weight may go to any level on its side of zero, not only to the two around it; with `moves: grid` to any level of
    the whole grid, past zero too: it has a place on the grid that the gradient moves, each step by a share of the gap
    to the next level on that side, and it takes the level nearest to its place. Masked weights stay zero.

    Source: Yvinec, Dapogny and Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", 2023,
    arXiv 2308.05600; it starts where PowerQuant ends (ICLR 2023, arXiv 2301.09858). Only the abstract could be read;
    the parametrisations are reconstructions: for every weight a divisor, as FlexRound has on the uniform grid, or a
    place (both measured, see docs/methods/nupes.md). Differs from the paper in: scales are learned too; `half` levels,
    see powerquant; the best iterate on held-out samples is kept, and it is never worse there than PowerQuant.

    Args:
        moves: by `division`, each weight by a divisor of its own; or over the whole `grid`, as the paper has it.
        learning_rate: of the divisors' logarithms; of the places, in gaps between levels.
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
    moves: Literal["division", "grid"] = "division"
    learn_exponent: bool = True
    learn_scale: bool = True

    key: ClassVar[str] = "nupes"
    learned_on_device: ClassVar[int | None] = 9

    def start(self, target: Target) -> Position:
        return Position(target.weight, self.encoded(target, self.grid([self.profile(target)])), self)

    def stand_in(self) -> PowerQuant:
        shared = {f.name: getattr(self, f.name) for f in fields(PowerOptions)}
        return PowerQuant(**shared)


class Position(LearnedRounding):
    """What = s * lev(nearest(W / s + place)), or lev(nearest(W / (s * S))) with divisors S.

    Scales s, divisors and exponent are learned as logarithms, everything from zero.
    """

    def __init__(self, weight: Tensor, start: Power, options: Nupes):
        self.options, self.bits, self.layout = options, start.bits, start.levels
        self.first_scale = start.scale.float()[..., None]
        self.unit = weight.view(len(weight), start.scale.shape[1], -1) / self.first_scale
        self.log_scale = torch.zeros_like(self.first_scale, requires_grad=options.learn_scale)
        self.moves = torch.zeros_like(self.unit, requires_grad=True)  # places in units of s, or logarithms of S
        self.step: tuple[Tensor, Tensor, Tensor] | None = None  # places before it, the levels there, and their values
        self.first_exponent = start.exponent.double()
        self.log_exponent = torch.zeros(1, dtype=torch.float64, requires_grad=options.learn_exponent)
        self.places = even_places(self.bits, self.layout)

    def groups(self) -> list[tuple[list[Tensor], float]]:
        o = self.options
        every = (
            ([self.moves], o.learning_rate),
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
        unit = self.moved_unit(scale)
        code = nearest_level(unit.detach(), values.detach())
        if self.options.moves == "division":
            end = 1 + (values[-1] - values[-2]).detach() / 2  # a weight beyond this no longer feels its place
        else:
            end = torch.full((), torch.inf)
            self.step = self.moves.detach().clone(), code, values.detach()
        return landed(look_up(values[None], code), unit, end, self.first_scale * scale)

    def moved_unit(self, scale: Tensor) -> Tensor:
        """Where weights are, in units of the scales."""
        return (divided if self.options.moves == "division" else placed)(self.unit, scale, self.moves)

    @no_grad
    def after(self) -> None:
        if self.step is None:
            return
        before, code, values = self.step
        gaps = values.diff()  # nothing lies beyond the last levels
        up, down = functional.pad(gaps, (0, 1)), functional.pad(gaps, (1, 0))
        self.moves.copy_(pulled(before, self.moves, up[code], down[code]))

    @no_grad
    def encoding(self) -> Power:
        scale, exponent = self.log_scale.exp(), self.exponent().float()
        stored = narrowest(stored_scale((self.first_scale * scale)[..., 0]))
        unit = self.moved_unit(scale)
        code = nearest_level(unit, level_values(self.bits, self.layout, exponent)).to(torch.uint8)
        return Power(code.view(len(code), -1), stored, exponent, self.bits, self.layout)


@fused
def divided(unit: Tensor, scale: Tensor, log_divisor: Tensor) -> Tensor:
    """Weights in units of the first scale, divided by what is learned."""
    return unit / scale * log_divisor.neg().exp()


@fused
def placed(unit: Tensor, scale: Tensor, place: Tensor) -> Tensor:
    """Weights in units of the first scale, on the range of the learned one, and moved."""
    return (unit / scale).clamp(-1, 1) + place


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
