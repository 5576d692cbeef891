# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, untyped-decorator"
"""FlexRound's weights and their gradients, made in one reading each, for graphics processors.

What `Divide` of `flexround.py` computes, with nothing kept between forward and backward but what is learned. Imported
where Triton is installed or not; `usable` of `runtime/launch.py` says whether it runs.

Shapes: O rows, G groups of C columns; R = O, or 1 for one scale per matrix; N = O * G.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from compress.runtime.triton_jit import constexpr, jit  # noqa: TC001 - read when a kernel is compiled

if TYPE_CHECKING:
    from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 1024  # numbers of a program at once


@jit
def quotient(weight, log_s2, place, inside, s1, s3):
    """W / (s1 * S2 * s3), before it is rounded."""
    w = tl.load(weight + place, mask=inside, other=0.0)
    return w / s1 * tl.exp(-(tl.load(log_s2 + place, mask=inside, other=0.0) + s3))


@jit
def rounded(u):
    """Ties to even, of numbers below 2**21; larger ones are on no grid."""
    return (tl.minimum(tl.maximum(u, -2097152.0), 2097152.0) + 12582912.0) - 12582912.0


@jit
def divide(
    weight, first, log_s1, log_s2, log_s3, low, out, N, G, C, HIGHEST, OWN: constexpr, BN: constexpr, BC: constexpr
):  # fmt: skip
    """(N, C) weights on the grid."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    inside = (n < N) & (c < C)
    own = n % G + (n // G) * (G * OWN)
    s1 = tl.load(first + own, mask=n < N, other=1.0) * tl.exp(tl.load(log_s1 + own, mask=n < N, other=0.0))
    lowest = tl.load(low + own, mask=n < N, other=0.0)
    place = n.to(tl.int64) * C + c
    u = quotient(weight, log_s2, place, inside, s1, tl.load(log_s3 + n, mask=n < N, other=0.0))
    q = tl.minimum(tl.maximum(rounded(u), lowest), lowest + HIGHEST) + (u - u)  # what is not finite stays so
    tl.store(out + place, s1 * q, mask=inside)


@jit
def divide_back(
    weight, first, log_s1, log_s2, log_s3, low, gradient, back_s1, back_s2, back_s3, N, G, C, HIGHEST,
    OWN: constexpr, BN: constexpr, BC: constexpr,
):  # fmt: skip
    """Gradients of (N, C) logarithms, and of the (N,) that are common to a group."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    own = n % G + (n // G) * (G * OWN)
    s1 = tl.load(first + own, mask=n < N, other=1.0) * tl.exp(tl.load(log_s1 + own, mask=n < N, other=0.0))
    lowest = tl.load(low + own, mask=n < N, other=0.0)
    s3 = tl.load(log_s3 + n, mask=n < N, other=0.0)
    all_s1 = tl.zeros((BN, BC), dtype=tl.float32)
    all_s3 = tl.zeros((BN, BC), dtype=tl.float32)
    for start in range(0, C, BC):
        c = (start + tl.arange(0, BC))[None, :]
        inside = (n < N) & (c < C)
        place = n.to(tl.int64) * C + c
        u = quotient(weight, log_s2, place, inside, s1, s3)
        whole = rounded(u)
        q = tl.minimum(tl.maximum(whole, lowest), lowest + HIGHEST)
        g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * s1
        back = tl.where(whole == q, -g * u, 0.0)  # clipped: no gradient through W / S
        tl.store(back_s2 + place, back, mask=inside)
        all_s1 += tl.where(inside, g * q + back, 0.0)
        all_s3 += tl.where(inside, back, 0.0)
    group = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(back_s1 + group, tl.sum(all_s1, 1), mask=group < N)
    tl.store(back_s3 + group, tl.sum(all_s3, 1), mask=group < N)


class FusedDivide:
    """s1 * clip(round(W / (s1 * exp(log_s2 + log_s3)))), s1 = first * exp(log_s1); rounding passes gradients through.

    Takes weight (O, G, C), first (R, G, 1), log_s1 as it, log_s2 (O, G, C), log_s3 (O, G, 1), low (R, G, 1), all
    float32 and contiguous, and the number of the highest code above the lowest.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        weight, first, log_s1, log_s2, log_s3, low, highest = given
        ctx.save_for_backward(weight, first, log_s1, log_s2, log_s3, low)
        ctx.highest = highest
        out = torch.empty_like(weight)
        rows, numbers, block = _sizes(weight, first)
        grid = (triton.cdiv(numbers[0], block["BN"]), triton.cdiv(numbers[2], block["BC"]))
        divide[grid](weight, first, log_s1, log_s2, log_s3, low, out, *numbers, float(highest), OWN=rows, **block)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, first, log_s1, log_s2, log_s3, low = ctx.saved_tensors
        back_s1, back_s2, back_s3 = torch.empty_like(log_s3), torch.empty_like(log_s2), torch.empty_like(log_s3)
        rows, numbers, block = _sizes(weight, first)
        given = weight, first, log_s1, log_s2, log_s3, low, gradients[0].contiguous(), back_s1, back_s2, back_s3
        divide_back[(triton.cdiv(numbers[0], block["BN"]),)](*given, *numbers, float(ctx.highest), OWN=rows, **block)
        return None, None, back_s1.sum_to_size(log_s1.shape), back_s2, back_s3, None, None


def _sizes(weight: Tensor, first: Tensor) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    rows, groups, columns = weight.shape
    wide = min(BLOCK, triton.next_power_of_2(columns))
    return int(len(first) > 1), (rows * groups, groups, columns), {"BN": max(1, BLOCK // wide), "BC": wide}
