"""Matrices that are trained as the codes that will be stored: latent weights, rounded whenever they are used.

Shapes: O rows, I columns, G groups of C = I / G columns; R = O, or 1 for one step per matrix. Steps are (R, G).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.encodings import Uniform
from compress.encodings.uniform import narrowest, stored_scale
from compress.lazy import function, no_grad, torch
from compress.passes.interface import Edit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.passes.retrain.adapters import AdaptedMatrix

Scale = Literal["lsq", "fixed", "stats", "mean", "median"]
FROM_WEIGHTS = ("stats", "mean", "median")  # read off the latent weights whenever these are rounded
BORDER = 0.05  # of a step: nearer to the middle between two levels, it is open which one a weight belongs to
FREE = 1 << 14  # stands for no level in the table of those that weights are held at
CELL = 0.49  # of a step, on either side of a level, is what is rounded to it for certain
TERNARY_FITS = 20  # alternations of rounding and fitting; they settle in fewer


@dataclass(frozen=True)
class Grid:
    """The levels that weights are rounded to: whole steps.

    Attributes:
        step: (R, G) float32.
        zero: (R, G) uint8, the code of zero.
        bits: of a code.
        symmetric: whether the zero point is the fixed middle, and therefore not stored.
        ternary: whether only -1, 0 and 1 steps are used.
    """

    step: Tensor
    zero: Tensor
    bits: int
    symmetric: bool
    ternary: bool = False

    @property
    def low(self) -> Tensor:
        """(R, G, 1), the lowest level in steps."""
        zero = self.zero.float()[..., None]
        return -torch.ones_like(zero) if self.ternary else -zero

    @property
    def high(self) -> Tensor:
        """(R, G, 1), the highest."""
        zero = self.zero.float()[..., None]
        return torch.ones_like(zero) if self.ternary else 2**self.bits - 1 - zero

    def within_cells(self, weight: Tensor, wanted: Tensor) -> Tensor:
        """(O, I) weights on levels, and others -> as near to the others as is still rounded to the same levels."""
        groups = self.step.shape[1]
        levels, others = (t.view(len(weight), groups, -1) for t in (weight, wanted))
        reach = CELL * self.step[..., None]
        return torch.minimum(torch.maximum(others, levels - reach), levels + reach).view(weight.shape)

    @property
    def levels(self) -> int:
        """How many there are."""
        return 3 if self.ternary else 2**self.bits


class RoundedMatrix:
    """One matrix being trained: latent weights, and the step of every group that they are rounded to.

    A learned step is learned as the logarithm of a factor, so that its learning rate is a relative change. From step
    `hold_from` on, weights that are not near a border between two levels are held at theirs.
    """

    def __init__(
        self,
        latent: AdaptedMatrix,
        mask: Tensor | None,
        grid: Grid,
        scale: Scale,
        scale_rate: float,
        hold_from: int | None = None,
    ):
        self.latent, self.mask, self.grid, self.scale, self.scale_rate = latent, mask, grid, scale, scale_rate
        self.hold_from = hold_from
        shape = len(latent.base), grid.step.shape[1], -1
        self.held = None if hold_from is None else torch.full_like(latent.base, FREE, dtype=torch.int16).view(shape)
        self.factor = torch.zeros_like(grid.step, requires_grad=True) if scale == "lsq" else None
        self.low, self.high = grid.low, grid.high

    def tensors(self) -> list[Tensor]:
        """What is learned."""
        return self.latent.tensors() if self.factor is None else [*self.latent.tensors(), self.factor]

    def groups(self, rate: float) -> list[tuple[list[Tensor], float]]:
        """The same with learning rates."""
        steps = [] if self.factor is None else [([self.factor], self.scale_rate)]
        return [(self.latent.tensors(), rate), *steps]

    def soft(self) -> Tensor:
        """(O, I), rounded; gradients pass through."""
        latent = self._masked(self.latent.soft())
        step = self.step(latent)
        rows, groups = len(latent), step.shape[1]
        whole = self.scale in ("mean", "median")
        made: Tensor = function(RoundThrough).apply(
            latent.view(rows, groups, -1), step[..., None], self.low, self.high, whole, self.held
        )
        return made.view(latent.shape)

    @no_grad
    def stepped(self, step: int) -> None:
        """Hold what is far from a border, once it is time for that; nothing is let go again."""
        if self.held is None or self.hold_from is None or step < self.hold_from:
            return
        latent = self._masked(self.latent.merged())
        units = latent.view(self.held.shape) / self.step(latent)[..., None]
        levels = rounded(units, self.low, self.high)
        sure = (units - levels).abs() < 0.5 - BORDER
        sure |= (units < self.low) | (units > self.high)
        self.held.copy_(torch.where((self.held == FREE) & sure, levels.to(torch.int16), self.held))

    def state(self) -> list[Tensor]:
        """The levels that weights are held at."""
        return [] if self.held is None else [self.held]

    @no_grad
    def merged(self) -> Tensor:
        """(O, I), as it will be stored."""
        return self._masked(self.encoding().dequantize())

    def step(self, latent: Tensor) -> Tensor:
        """(O, I) latent weights -> (R, G) steps."""
        if self.factor is not None:
            return self.grid.step * self.factor.exp()
        if self.scale in FROM_WEIGHTS:
            return step_of_weights(latent.detach(), self.mask, self.grid, self.scale)
        return self.grid.step

    @no_grad
    def encoding(self) -> Uniform:
        """What would be stored now."""
        latent = self._masked(self.latent.merged())
        step = self.step(latent)
        grouped = latent.view(len(latent), step.shape[1], -1)
        codes = rounded(grouped / step[..., None], self.low, self.high, self.held) + self.grid.zero.float()[..., None]
        stored = narrowest(stored_scale(step))
        return Uniform(
            codes.to(torch.uint8).view(latent.shape), stored, self.grid.zero, self.grid.bits, self.grid.symmetric
        )

    def edit(self, notes: Mapping[str, float]) -> Edit:
        """What is stored now."""
        return Edit(encoding=self.encoding(), mask=self.mask, notes=notes)

    def _masked(self, weight: Tensor) -> Tensor:
        return weight if self.mask is None else weight * self.mask


class RoundThrough:
    """step * clip(round(w / step)), with the gradients of LSQ: that of a weight passes where nothing is clipped.

    A weight counts as clipped when its nearest level is beyond the last, not when it is itself, so that those that
    start on the last level learn. `whole`: the gradient passes to clipped weights too, as in BitNet. To those that are
    `held` at a level none passes.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, step: Tensor, low: Tensor, high: Tensor, whole: bool, held: Tensor | None
    ) -> Tensor:
        u = weight / step
        ctx.save_for_backward(step, u, low, high, held)
        ctx.whole = whole
        return rounded(u, low, high, held) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        step, u, low, high, held = ctx.saved_tensors
        level = rounded(u, low, high, held)
        free = torch.ones_like(u, dtype=torch.bool) if held is None else held == FREE
        inside = free & (u.round() == level)
        to_step = None
        if ctx.needs_input_grad[1]:
            to_step = (gradient * (level - u * inside)).sum(-1, keepdim=True).sum_to_size(step.shape)
        return gradient * (free if ctx.whole else inside), to_step, None, None, None, None


def rounded(units: Tensor, low: Tensor, high: Tensor, held: Tensor | None = None) -> Tensor:
    """(O, G, C) weights in steps -> their levels in steps; those that they are held at, where they are."""
    levels = torch.minimum(torch.maximum(units.round(), low), high)
    return levels if held is None else torch.where(held == FREE, levels, held.to(levels.dtype))


def step_of_weights(weight: Tensor, mask: Tensor | None, grid: Grid, scale: Scale) -> Tensor:
    """(O, I) weights, zero where masked -> (R, G) steps, from the magnitudes of the kept ones of each group.

    `stats`: as many steps as there are levels cover twice the mean on either side. `mean`, `median`: what they say.
    """
    rows, groups = grid.step.shape
    sizes = weight.abs().view(rows, groups, -1)
    kept = torch.ones_like(sizes, dtype=torch.bool) if mask is None else mask.view(sizes.shape)
    count = kept.sum(-1)
    if scale == "median":
        ascending = sizes.masked_fill(~kept, torch.inf).sort(-1).values
        step = ascending.gather(-1, ((count - 1).clamp(min=0) // 2)[..., None])[..., 0]
    else:
        step = sizes.sum(-1) / count.clamp(min=1) * (4 / grid.levels if scale == "stats" else 1)
    return _positive(torch.where(count > 0, step, 0.0))


def ternary_step(weight: Tensor, mask: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """(O, I) weights, zero where masked -> (R, G) steps of -1, 0 and 1 that are nearest to them, or nearly."""
    sizes = weight.abs().view(*shape, -1)
    kept = sizes.numel() // (shape[0] * shape[1]) if mask is None else mask.view(sizes.shape).sum(-1).clamp(min=1)
    step = sizes.sum(-1) / kept
    for _ in range(TERNARY_FITS):
        used = sizes > step[..., None] / 2
        step = (sizes * used).sum(-1) / used.sum(-1).clamp(min=1)
    return _positive(step)


def _positive(step: Tensor) -> Tensor:
    """Steps as they can be stored; of a group that is all zero any step says zero."""
    return stored_scale(torch.where(step > 0, step, 1.0))


__all__ = [
    "FROM_WEIGHTS", "Grid", "RoundThrough", "RoundedMatrix", "Scale", "rounded", "step_of_weights", "ternary_step",
]  # fmt: skip
