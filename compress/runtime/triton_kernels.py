# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, untyped-decorator"
"""y = x W^T on codes as they lie in the file, for graphics processors: W is made in registers, tile by tile.

One program makes `BN` outputs of one row of the input (`vector`), or `BM` by `BN` of several (`matrix`). A code of 2 to
8 bits may begin in one byte and end in the next. What it means, in units of its scale:

| LOOKUP | unit                                                                     | for                          |
|--------|--------------------------------------------------------------------------|------------------------------|
| 0      | code - zero point of its row and group                                   | uniform                      |
| 1      | entry of its row's table                                                 | codebook, power levels       |
| 2      | entry, by both codes of a pair of columns, first and second in turn      | outlier-victim               |

Sums are float32. Imported where Triton is installed or not; without it only `AVAILABLE` can be asked.

Shapes: M rows of the input, N = out features, K = in features, B bytes per row of codes, R = N or 1, G = groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

AVAILABLE = triton is not None
jit: Any = triton.jit if AVAILABLE else lambda function: function
constexpr = tl.constexpr if AVAILABLE else Any  # by this name: Triton's interpreter reads annotations as text


@jit
def unit(
    codes, table, first, zero, n, k, inside, B, G, GROUP,
    BITS: constexpr, LOOKUP: constexpr, ZERO_ROWS: constexpr,
):  # fmt: skip
    """(BN, 1) rows and (1, BK) columns -> (BN, BK) float32; zero where not `inside`."""
    mask = (1 << BITS) - 1
    row = codes + n.to(tl.int64) * B
    if LOOKUP == 2:
        byte = k // 2 * BITS // 4
        index = tl.load(row + byte, mask=inside, other=0).to(tl.int32)
        if BITS == 8:
            high = tl.load(row + byte + 1, mask=inside & (byte + 1 < B), other=0).to(tl.int32)
            index = index | (high << 8)
        return tl.load(table + index * 2 + k % 2, mask=inside, other=0.0)
    bit = k * BITS
    word = tl.load(row + bit // 8, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        high = tl.load(row + bit // 8 + 1, mask=inside & (bit // 8 + 1 < B), other=0).to(tl.int32)
        word = word | (high << 8)
    code = (word >> (bit % 8)) & mask
    if LOOKUP == 1:
        begin = tl.load(first + n, mask=inside, other=0)
        return tl.load(table + begin + code, mask=inside, other=0.0)
    middle = tl.load(zero + n * ZERO_ROWS * G + k // GROUP, mask=inside, other=0).to(tl.int32)
    return tl.where(inside, (code - middle).to(tl.float32), 0.0)


@jit
def vector(
    x, codes, table, first, zero, scale, y, N, K, B, G, GROUP,
    BITS: constexpr, LOOKUP: constexpr, ROWS: constexpr, BN: constexpr, BK: constexpr,
):  # fmt: skip
    """(K,) -> (N,). `ROWS`: 1 where scales and zero points have a row each, 0 for one row."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    total = tl.zeros((BN, BK), dtype=tl.float32)
    for start in range(0, K, BK):
        k = (start + tl.arange(0, BK))[None, :]
        inside = (n < N) & (k < K)
        part = unit(codes, table, first, zero, n, k, inside, B, G, GROUP, BITS, LOOKUP, ROWS)
        factor = tl.load(scale + n * ROWS * G + k // GROUP, mask=inside, other=0.0).to(tl.float32)
        value = (part * factor).to(x.dtype.element_ty).to(tl.float32)
        total += value * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    out = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(y + out, tl.sum(total, 1).to(y.dtype.element_ty), mask=out < N)


@jit
def matrix(
    x, codes, table, first, zero, scale, y, M, N, K, B, G, GROUP,
    BITS: constexpr, LOOKUP: constexpr, ROWS: constexpr,
    BM: constexpr, BN: constexpr, BK: constexpr, WIDE: constexpr,
):  # fmt: skip
    """(M, K) -> (M, N); float32 is multiplied as float32, not as TF32. `WIDE`: and so is everything else."""
    m = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    n = (tl.program_id(1) * BN + tl.arange(0, BN))[:, None]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        k = (start + tl.arange(0, BK))[None, :]
        inside = (n < N) & (k < K)
        part = unit(codes, table, first, zero, n, k, inside, B, G, GROUP, BITS, LOOKUP, ROWS)
        factor = tl.load(scale + n * ROWS * G + k // GROUP, mask=inside, other=0.0).to(tl.float32)
        value = (part * factor).to(x.dtype.element_ty)
        given = tl.load(x + m.to(tl.int64) * K + k, mask=(m < M) & (k < K), other=0.0)
        if WIDE:
            given, value = given.to(tl.float32), value.to(tl.float32)
        total += tl.dot(given, tl.trans(value), input_precision="ieee")
    out = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    tl.store(y + m.to(tl.int64) * N + out, total.to(y.dtype.element_ty), mask=(m < M) & (out < N))


def multiply(
    x: Tensor, codes: Tensor, table: Tensor, first: Tensor, zero: Tensor, scale: Tensor, *,
    columns: int, bits: int, lookup: int,
) -> Tensor:  # fmt: skip
    """(M, K) of float32, float16 or bfloat16 -> (M, N) of the same.

    Args:
        x: the input.
        codes: (N, B) uint8, a stream per row.
        table: float32, what codes look up; with tables of several rows, one after the other.
        first: (N,) int32, where in it a row's table begins.
        zero: (R, G) uint8 zero points.
        scale: (R, G) float16 or float32.
        columns: K.
        bits: of a code, 2 to 8.
        lookup: as in the table above.
    """
    rows, groups = len(codes), scale.shape[1]
    x = x.contiguous()
    y = x.new_empty(len(x), rows)
    own = 1 if len(scale) == rows else 0
    common = (rows, columns, codes.shape[1], groups, columns // groups)
    chosen = {"BITS": bits, "LOOKUP": lookup, "ROWS": own}
    tensors = (x, codes, table, first, zero, scale, y)
    if len(x) == 1:
        vector[(triton.cdiv(rows, 16),)](*tensors, *common, **chosen, BN=16, BK=128)
    elif len(x):
        wide = interpreted() and x.dtype == torch.bfloat16  # which its `dot` takes for whole numbers
        grid = (triton.cdiv(len(x), 16), triton.cdiv(rows, 32))
        matrix[grid](*tensors, len(x), *common, **chosen, BM=16, BN=32, BK=64, WIDE=wide)
    return y


def interpreted() -> bool:
    """Whether kernels run on the processor, in Triton's interpreter."""
    return type(vector).__name__ == "InterpretedFunction"


def usable(device: torch.device) -> bool:
    """Whether kernels run there: on a CUDA device, or on the processor in Triton's interpreter."""
    return AVAILABLE and (device.type == "cuda" or interpreted())
