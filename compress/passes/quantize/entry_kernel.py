# mypy: disable-error-code="valid-type, operator, no-untyped-def, no-untyped-call, untyped-decorator"
"""The gradient of looking entries of small tables up, for graphics processors.

Every weight adds its gradient to the entry it has. With atomic additions a few addresses would be waited for by
millions of weights, in another order every time; here every row is summed up by itself, in one order. Imported where
Triton is installed or not; `usable` of `runtime/launch.py` says whether it runs.

Shapes: O rows, I columns, K entries of a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.runtime.triton_jit import constexpr, jit  # noqa: TC001 - read when a kernel is compiled

if TYPE_CHECKING:
    from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 1024  # weights of a program at once


@jit
def sum_entries(gradient, index, sums, columns, K: constexpr, BLOCK: constexpr):
    """(O, I) gradients and indices -> (O, pieces, K) sums over the pieces of a row."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = piece * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    given = tl.load(gradient + row * columns + c, mask=inside, other=0.0)
    entry = tl.load(index + row * columns + c, mask=inside, other=0).to(tl.int32)
    into = sums + (row * tl.num_programs(1) + piece) * K
    for k in range(K):
        tl.store(into + k, tl.sum(tl.where(entry == k, given, 0.0), 0))


def sums_of_entries(gradient: Tensor, index: Tensor, entries: int) -> Tensor:
    """(O, I) float32 gradients and whole numbers below K -> (O, K) float64 sums of those with each number."""
    rows, columns = gradient.shape
    pieces = triton.cdiv(columns, BLOCK)
    sums = torch.empty(rows, pieces, entries, device=gradient.device)
    sum_entries[(rows, pieces)](gradient.contiguous(), index.contiguous(), sums, columns, K=entries, BLOCK=BLOCK)
    total: Tensor = sums.sum(1, dtype=torch.float64)
    return total
