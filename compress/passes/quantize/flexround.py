"""FlexRound: rounding learned by element-wise division.

Shapes: O rows, I columns, G groups of C = I / G columns; R = O, or 1 for one scale per matrix. Grids are (R, G).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from compress.calibration.draws import draw
from compress.encodings import Uniform
from compress.encodings.uniform import Search, narrowest, stored_scale
from compress.lazy import function, no_grad, torch
from compress.passes.base import OptionError
from compress.passes.quantize.grid import UniformOptions
from compress.passes.quantize.learned import LearnedPass, LearnedRounding
from compress.passes.quantize.rtn import Rtn
from compress.passes.solvers.device import has_kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.passes.base import Target

OF_ONE_SCALE = 0.3  # rate of a scale that a whole matrix has, as a share of that of the divisors


@dataclass(frozen=True, kw_only=True)
class FlexRound(UniformOptions, LearnedPass):
    """Learn a divisor for every weight and the scale of every group, then round.

    The divisors only steer which grid point a weight goes to; they are dropped afterwards, so that the result is stored
    and run like round-to-nearest. A weight's update is proportional to its size: large weights may travel several grid
    points, and none crosses zero. Masked weights stay zero. A convolution also learns a common divisor for each input
    channel (s4).

    Source: Lee, Kim, Kwon and Lee, "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training
    Quantization", ICML 2023, arXiv 2306.00317; the low-rank form (`rank`): Lee et al., "LRQ", 2024, arXiv 2407.11534.
    Differs from the paper in: s3 has one entry per group where scales have; the best iterate on held-out samples is
    kept, and it is never worse there than round-to-nearest, where learning starts.

    Args:
        rank: learn the divisors as a product of two matrices this thin (LRQ) instead of one number per weight.
        learn_scale: learn the scales too (s1); frozen ones are a little worse, see docs/methods/flexround.md.
        scale_rate: learning rate of the scales. By default that of the divisors; 0.3 of it where one scale serves
            the whole matrix, as there a step of the same size moves every weight at once.
        row_factor: learn a common divisor per row or group (s3).

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.FlexRound(bits=3, steps=5)], calibration=torch.randn(16, 64))
        >>> result.weights["0"].encoding.bits
        3
    """

    scale_search: Search = "mse"
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 0.01
    rank: Annotated[int, Ge(1)] | None = None
    learn_scale: bool = True
    scale_rate: Annotated[float, Gt(0), Lt(1)] | None = None
    row_factor: bool = True

    key: ClassVar[str] = "flexround"
    learned_on_device: ClassVar[int | None] = 6

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.scale_rate is not None and not self.learn_scale:
            yield OptionError("scale_rate", "changes nothing where learn_scale is false")

    def rate_of_scales(self) -> float:
        """The learning rate of s1."""
        if self.scale_rate is not None:
            return self.scale_rate
        return self.learning_rate * (OF_ONE_SCALE if self.granularity == "tensor" else 1)

    def start(self, target: Target) -> Division:
        scale, zero = self.even_grid(target.weight)
        return Division(target.weight, scale, zero, self, target.generator, target.kernel)

    def stand_in(self) -> Rtn:
        return rtn_like(self)


def rtn_like(options: UniformOptions) -> Rtn:
    """Round-to-nearest on the same grid."""
    return Rtn(
        bits=options.bits,
        group_size=options.group_size,
        granularity=options.granularity,
        fallback=options.fallback,
        symmetric=options.symmetric,
        scale_search=options.scale_search,
    )


class Division(LearnedRounding):
    """What = s1 * clip(round(W / (s1 * S2 * s3 * s4))), everything learned as a logarithm that starts at zero."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor,
        options: FlexRound,
        generator: torch.Generator | None,
        kernel: int = 1,
    ):
        """`kernel` neighbouring columns belong to one input channel."""
        rows, columns = weight.shape
        groups = scale.shape[1]
        self.options, self.zero = options, zero
        self.weight = weight.view(rows, groups, columns // groups)
        self.first_scale = scale.float()[..., None]
        self.low = -zero.float()[..., None]
        self.high = self.low + (2**options.bits - 1)
        self.log_s1 = torch.zeros_like(self.first_scale, requires_grad=options.learn_scale)
        self.log_s3 = torch.zeros(rows, groups, 1, requires_grad=options.row_factor)
        self.log_s4 = torch.zeros(columns // kernel, 1, requires_grad=kernel > 1)
        self.kernel = kernel
        self.log_s2 = self.left = self.right = self.column = torch.empty(0)
        if options.rank is None:
            self.log_s2 = torch.zeros_like(self.weight, requires_grad=True)
        else:
            bound = (6 / (6 * columns)) ** 0.5  # Kaiming-uniform with a = sqrt(5)
            self.left = torch.zeros(rows, options.rank, requires_grad=True)
            self.right = draw(generator, (options.rank, columns), "uniform", weight, (-bound, bound))
            self.right.requires_grad_()
            self.column = torch.zeros(1, columns, requires_grad=True)

    def groups(self) -> list[tuple[list[Tensor], float]]:
        divisors = [self.log_s2, self.log_s3, self.log_s4, self.left, self.right, self.column]
        every = ([self.log_s1], self.options.rate_of_scales()), (divisors, self.options.learning_rate)
        found = (([t for t in tensors if t.requires_grad], rate) for tensors, rate in every)
        return [(tensors, rate) for tensors, rate in found if tensors]

    def own_logarithm(self) -> Tensor:
        """(O, G, C), the logarithm of S2."""
        if self.options.rank is None:
            return self.log_s2
        return (self.left @ self.right + self.column).view(self.weight.shape)

    def logarithm(self) -> Tensor:
        """(O, G, C), the logarithm of S2 * s3 * s4."""
        found = self.own_logarithm() + self.log_s3
        return found if self.kernel == 1 else found + self._channels()

    def _channels(self) -> Tensor:
        return self.log_s4.expand(-1, self.kernel).reshape(self.weight.shape[1:])

    def soft(self, progress: float) -> Tensor:
        if has_kernels(self.weight):
            return self._fused().reshape(self.weight.shape[0], -1)
        made: Tensor = function(Divide).apply(
            self.weight, self.first_scale, self.log_s1, self.logarithm(), self.low, self.high
        )
        return made.reshape(self.weight.shape[0], -1)

    def _fused(self) -> Tensor:
        from compress.passes.quantize.division_kernel import FusedDivide

        log = self.own_logarithm() if self.kernel == 1 else self.own_logarithm() + self._channels()
        tensors = self.weight, self.first_scale, self.log_s1, log, self.log_s3, self.low
        made: Tensor = function(FusedDivide).apply(*(t.contiguous() for t in tensors), 2**self.options.bits - 1)
        return made

    @no_grad
    def encoding(self) -> Uniform:
        s1 = self.first_scale * self.log_s1.exp()
        codes = (self.weight / (s1 * self.logarithm().exp())).round_()
        codes = torch.minimum(torch.maximum(codes, self.low), self.high) - self.low
        rows = self.weight.shape[0]
        scale = narrowest(stored_scale(s1[..., 0]))
        bits, symmetric = self.options.bits, self.options.symmetric
        return Uniform(codes.to(torch.uint8).view(rows, -1), scale, self.zero, bits, symmetric)


class Divide:
    """s1 * clip(round(u)), u = W / (s1 * exp(log)), s1 = first * exp(log_s1); rounding passes gradients through."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, first: Tensor, log_s1: Tensor, log: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        s1 = first * log_s1.exp()
        u = weight / s1
        u *= log.neg().exp_()
        q = torch.minimum(torch.maximum(u.round(), low), high)
        ctx.save_for_backward(s1, u, q, low, high)
        return s1 * q

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        s1, u, q, low, high = ctx.saved_tensors
        g = gradients[0] * s1
        rounded_u = u.round()
        u = torch.where((rounded_u >= low) & (rounded_u <= high), u, 0.0)  # clipped: no gradient through W / S
        log = -g * u
        log_s1 = (g * q).add_(log).sum(-1, keepdim=True)
        return None, None, log_s1.sum_to_size(s1.shape), log, None, None
