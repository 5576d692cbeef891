"""AdaRound: every weight learns whether it is rounded down or up.

Shapes: O rows, I columns, G groups of C = I / G columns; grids are (R, G), R = O, or 1 for one scale per matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from compress.encodings import Uniform
from compress.encodings.uniform import Search
from compress.lazy import no_grad, torch
from compress.passes.quantize.flexround import rtn_like
from compress.passes.quantize.grid import UniformOptions
from compress.passes.quantize.learned import LearnedPass, LearnedRounding
from compress.passes.solvers.device import fused, has_kernels

if TYPE_CHECKING:
    from torch import Tensor

    from compress.passes.base import Target
    from compress.passes.quantize.rtn import Rtn

ZETA, GAMMA = 1.1, -0.1  # the stretched sigmoid reaches 0 and 1 at finite arguments
WARM = 0.2  # share of the steps before weights are pulled towards 0 or 1
BETA = (20.0, 2.0)  # sharpness of that pull, first and last


@dataclass(frozen=True, kw_only=True)
class AdaRound(UniformOptions, LearnedPass):
    """Learn to round each weight down or up, on a fixed grid.

    The baseline of the learned quantizers: no weight moves further than to a neighbouring grid point, and scales stay
    as round-to-nearest has them. Masked weights stay zero.

    Source: Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
    Quantization", ICML 2020, arXiv 2004.10568; block by block as Li et al., "BRECQ", 2021, arXiv 2102.05426. Differs
    from the paper in: fewer steps at a larger learning rate; the best iterate on held-out samples is kept, and it is
    never worse there than round-to-nearest.

    Args:
        regularization: weight of the term that pulls every weight to a decision, relative to the output error.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.AdaRound(bits=3, steps=5)], calibration=torch.randn(16, 64))
        >>> result.weights["0"].encoding.bits
        3
    """

    scale_search: Search = "mse"
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 0.1
    regularization: Annotated[float, Ge(0)] = 1.0

    key: ClassVar[str] = "adaround"
    learned_on_device: ClassVar[int | None] = 8

    def start(self, target: Target) -> UpOrDown:
        scale, zero = self.even_grid(target.weight)
        return UpOrDown(target.weight, scale, zero, self)

    def stand_in(self) -> Rtn:
        return rtn_like(self)


class UpOrDown(LearnedRounding):
    """What = s * (clip(floor(W / s) + h(v) + z) - z), h a stretched sigmoid."""

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor, options: AdaRound):
        rows, columns = weight.shape
        groups = scale.shape[1]
        self.options, self.stored_scale, self.zero = options, scale, zero
        self.scale, self.point = scale.float()[..., None], zero.float()[..., None]
        exact = weight.view(rows, groups, columns // groups) / self.scale
        self.floor = exact.floor()
        # The rounding to start from is nearest, ties to even: a hair is all that moves a tie to its side.
        fraction = exact - self.floor
        tie = fraction == 0.5
        up = exact.round() > self.floor
        fraction = torch.where(tie, torch.where(up, 0.5 + 1e-4, 0.5 - 1e-4), fraction)
        self.v = -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)
        self.v.requires_grad_()

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [([self.v], self.options.learning_rate)]

    def share(self) -> Tensor:
        """(O, G, C), h(v): how far each weight is on its way up, 0 to 1."""
        return stretched_sigmoid(self.v)

    def soft(self, progress: float) -> Tensor:
        return between(self.v, self.floor, self.scale, self.point, 2**self.options.bits - 1)

    def penalty(self, progress: float) -> Tensor | None:
        if progress < WARM:
            return None
        done = (progress - WARM) / (1 - WARM)
        beta = BETA[0] + (BETA[1] - BETA[0]) * done
        # As a tensor it is no constant of the compiled function, which is else compiled anew for each.
        sharpness = torch.full((), beta) if has_kernels(self.v) else beta
        return self.options.regularization * undecided(self.v, sharpness)

    @no_grad
    def encoding(self) -> Uniform:
        codes = (self.floor + (self.share() >= 0.5) + self.point).clamp(0, 2**self.options.bits - 1)
        stored = codes.to(torch.uint8).view(len(codes), -1)
        return Uniform(stored, self.stored_scale, self.zero, self.options.bits, self.options.symmetric)


def stretched_sigmoid(v: Tensor) -> Tensor:
    """From 0 to 1, both of which it reaches."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


@fused
def between(v: Tensor, floor: Tensor, scale: Tensor, point: Tensor, highest: int) -> Tensor:
    """(O, I) weights that are h(v) of the way from one grid point to the next."""
    q = (floor + stretched_sigmoid(v) + point).clamp(0, highest) - point
    return (q * scale).reshape(len(q), -1)


@fused
def undecided(v: Tensor, beta: float | Tensor) -> Tensor:
    """How far weights are from 0 or 1, on average."""
    return (1 - (2 * stretched_sigmoid(v) - 1).abs().pow(beta)).mean()
