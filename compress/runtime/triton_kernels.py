# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, untyped-decorator"
"""y = x W^T on arranged codes, for graphics processors: W is made in registers, where a tensor core takes it from.

Two kernels. `narrow` is for few rows of input: a program makes 16 outputs, each of its `P` warps from records of its
own, straight from memory to registers, and adds up in the end. `wide` is for many: a program makes 16 P outputs, and
inputs lie in shared memory. Sums are float32 and always in the same order: results repeat bit for bit.

| GROUPS  | scales                               | when they are applied            |
|---------|--------------------------------------|----------------------------------|
| ONE     | one per row, or none                 | to the sums                      |
| EACH    | any                                  | to the values, which are rounded |
| RECORDS | groups of a multiple of 128 columns  | to the sums of 128 columns       |
| SLABS   | groups of a multiple of 32 columns   | to the sums of 32 columns        |

Shapes: M rows of the input, N = out features, K = in features, G = groups; see `triton_decode.py` for the rest.
"""

from __future__ import annotations

from compress.runtime.triton_decode import GATHER, STEPS, by_row, columns, fragment, load_record, negative_zero, slab
from compress.runtime.triton_jit import SPELLED, constexpr, jit, kernel, tl

ONE, EACH, RECORDS, SLABS = (constexpr(number) for number in range(4))


@jit
def product(a, b, part):
    """Returns part + a b. Float32 is multiplied as float32, not as TF32; the interpreter knows no bfloat16."""
    if SPELLED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, part, input_precision="ieee")


@jit
def load_tables(tables, first, rows, P: constexpr, MODE: constexpr, like: constexpr, SHARED: constexpr):
    """The 8 words of each row's table, (P, 128) each.

    A table that all rows share is there eight times, for registers of their own: those that threads share are slower.
    """
    if like == tl.float32 or not (MODE > STEPS and MODE < GATHER):
        return (0, 0)
    else:
        number = (tl.arange(0, 8)[None, :, None] + tl.zeros_like(rows)) if SHARED else tl.load(first + rows)
        at = tables + number * 8
        return (
            by_row(tl.load(at), P), by_row(tl.load(at + 1), P), by_row(tl.load(at + 2), P), by_row(tl.load(at + 3), P),
            by_row(tl.load(at + 4), P), by_row(tl.load(at + 5), P), by_row(tl.load(at + 6), P),
            by_row(tl.load(at + 7), P),
        )  # fmt: skip


@jit
def begin_tables(first, rows, P: constexpr, MODE: constexpr, BITS: constexpr, like: constexpr, SHARED: constexpr):
    """Where each row's table begins, for values that are read one by one."""
    if SHARED or (MODE != GATHER and like != tl.float32):
        return 0
    else:
        return by_row(tl.load(first + rows), P) << BITS


@jit
def load_zeros(
    zero, rows, group, stride, P: constexpr, MODE: constexpr, BITS: constexpr, like: constexpr, ZEROS: constexpr
):
    """What takes the zero points of rows (P, 8, 2) off: those stored, or the middle code; 0 without steps."""
    if MODE != STEPS:
        return 0
    else:
        exact: constexpr = tl.float16 if like == tl.float32 else like
        found = tl.load(zero + rows * stride + group) if ZEROS else tl.zeros_like(rows) + (1 << (BITS - 1))
        return negative_zero(found, exact, P, BITS)


@jit
def scaled_each(
    a, zero, scale, rows, k, stride,
    GROUP: constexpr, MODE: constexpr, BITS: constexpr, like: constexpr, ZEROS: constexpr,
):  # fmt: skip
    """(P, 16, 32) values, or steps from the middle code -> what they mean; `rows` (P, 16, 1), columns k (P, 1, 32)."""
    at = rows * stride + k // GROUP
    a = a.to(tl.float32)
    if MODE == STEPS and ZEROS:
        a += (1 << (BITS - 1)) - tl.load(zero + at).to(tl.float32)
    return (a * tl.load(scale + at).to(tl.float32)).to(like)


@jit
def load_inputs(x, m, k, M, K, P: constexpr, BM: constexpr, FULL: constexpr, WIDTH: constexpr):
    """Columns k and 31 more of rows m, (P * BM,) each, in the order of warps -> (P, 32, BM)."""
    k = k[:, None] + tl.arange(0, 32)[None, :]
    inside = m[:, None] < M if FULL else (m[:, None] < M) & (k < K)
    found = tl.load(x + m[:, None].to(tl.int64) * K + k, mask=inside, other=0.0)
    found = found.reshape(BM // 8, P, 8, 32).permute(1, 0, 2, 3).reshape(P, BM, 32)
    return columns(found, P, BM, WIDTH)


@jit
def add_record(
    total, x, table, zero, scale, planes, zeros, tables, begins, block, record, m, own, M, N, K, G, stride,
    GROUP: constexpr, MODE: constexpr, BITS: constexpr, GROUPS: constexpr, ZEROS: constexpr, ESCAPE: constexpr,
    FULL: constexpr, WIDTH: constexpr, P: constexpr, BM: constexpr,
):  # fmt: skip
    """Returns total + the products of one record of each warp: `record` (P,); `own` (P * BM,) by rows of x."""
    like: constexpr = x.dtype.element_ty
    n = tl.minimum(block * 16 + tl.arange(0, 16), N - 1)[None, :]
    rows = tl.minimum(block * 16 + tl.arange(0, 8)[None, :, None] + 8 * tl.arange(0, 2)[None, None, :], N - 1)
    rows = rows.broadcast_to(P, 8, 2)
    k, last = own * 128, (K - 1) // 128
    inputs = (
        load_inputs(x, m, k, M, K, P, BM, FULL, WIDTH), load_inputs(x, m, k + 32, M, K, P, BM, FULL, WIDTH),
        load_inputs(x, m, k + 64, M, K, P, BM, FULL, WIDTH), load_inputs(x, m, k + 96, M, K, P, BM, FULL, WIDTH),
    )  # fmt: skip
    at = tl.minimum(record, last)[:, None] * 128
    part = total if GROUPS <= EACH else tl.zeros((P, 16, BM), tl.float32)
    if GROUPS == RECORDS:
        factor = tl.load(scale + n * stride + at // GROUP).to(tl.float32)
        zeros = load_zeros(zero, rows, (at // GROUP)[:, :, None], stride, P, MODE, BITS, like, ZEROS)
    for v in tl.static_range(2):
        for w in tl.static_range(2):
            g = tl.minimum((at + (64 * v + 32 * w)) // GROUP, G - 1)
            if GROUPS == SLABS:
                zeros = load_zeros(zero, rows, g[:, :, None], stride, P, MODE, BITS, like, ZEROS)
            one, two = slab(planes, v, w, zeros, tables, table, begins, like, MODE, BITS, ESCAPE)
            a = fragment(one, two, P, WIDTH)
            if GROUPS == EACH:
                c = (at + (64 * v + 32 * w))[:, :, None] + tl.arange(0, 32)[None, None, :]
                if WIDTH == 4:
                    c = c.broadcast_to(P, 1, 32).reshape(P, 1, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(P, 1, 32)
                c = tl.minimum(c, K - 1)
                a = scaled_each(a, zero, scale, n[:, :, None], c, stride, GROUP, MODE, BITS, like, ZEROS)
            part = product(a, inputs[2 * v + w], part)
            if GROUPS == SLABS:
                total += part * tl.load(scale + n * stride + g).to(tl.float32)[:, :, None]
                part = tl.zeros((P, 16, BM), tl.float32)
    if GROUPS == RECORDS:
        total += part * factor[:, :, None]
    elif GROUPS != SLABS:
        total = part
    return total


@kernel
def narrow(
    x, words, tables, table, first, zero, scale, y, M, N, K, G, stride,
    GROUP: constexpr, MODE: constexpr, BITS: constexpr, GROUPS: constexpr, ZEROS: constexpr, SHARED: constexpr,
    ESCAPE: constexpr, FULL: constexpr, WIDTH: constexpr, P: constexpr, BM: constexpr, AHEAD: constexpr,
):  # fmt: skip
    """(M, K) -> (M, N); programs by blocks of 16 rows of the weight, and of `BM` rows of the input.

    `stride`: from a row of scales to the next, 0 if there is one. `FULL`: K is a multiple of 128 P. `AHEAD`: how many
    records a warp has on their way while it multiplies one, 1 or 2.
    """
    like: constexpr = x.dtype.element_ty
    nibbles: constexpr = MODE > STEPS and MODE < GATHER
    size: constexpr = 64 * BITS
    block, record = tl.program_id(0), tl.arange(0, P)
    last = (K - 1) // 128
    rows = tl.minimum(block * 16 + tl.arange(0, 8)[None, :, None] + 8 * tl.arange(0, 2)[None, None, :], N - 1)
    rows = rows.broadcast_to(P, 8, 2)
    # Rows of the input as warps hold them: eight at once, the next record's, and so on; then the next eight.
    inner = tl.arange(0, P * BM)
    m, own = tl.program_id(1) * BM + inner // (8 * P) * 8 + inner % 8, inner // 8 % P
    words += block.to(tl.int64) * (last + 1) * size
    planes = load_record(words + tl.minimum(record, last) * size, P, BITS, nibbles)
    next_planes = planes
    if AHEAD == 2:
        next_planes = load_record(words + tl.minimum(P + record, last) * size, P, BITS, nibbles)
    looked_up = load_tables(tables, first, rows, P, MODE, like, SHARED)
    begins = begin_tables(first, rows, P, MODE, BITS, like, SHARED)
    zeros = load_zeros(zero, rows, 0, stride, P, MODE, BITS, like, ZEROS and GROUPS == ONE)
    total = tl.zeros((P, 16, BM), tl.float32)
    for start in range(0, last + 1, P):
        ahead = load_record(words + tl.minimum(start + AHEAD * P + record, last) * size, P, BITS, nibbles)
        total = add_record(
            total, x, table, zero, scale, planes, zeros, looked_up, begins, block, start + record, m, start + own,
            M, N, K, G, stride, GROUP, MODE, BITS, GROUPS, ZEROS, ESCAPE, FULL, WIDTH, P, BM,
        )  # fmt: skip
        planes = next_planes if AHEAD == 2 else ahead
        next_planes = ahead
    found = tl.sum(total, 0)
    n, top = block * 16 + tl.arange(0, 16)[:, None], tl.program_id(1) * BM + tl.arange(0, BM)[None, :]
    if GROUPS == ONE:
        found *= tl.load(scale + tl.minimum(n, N - 1) * stride).to(tl.float32)
    tl.store(y + top.to(tl.int64) * N + n, found.to(y.dtype.element_ty), mask=(top < M) & (n < N))


@kernel
def wide(
    x, words, tables, table, first, zero, scale, y, M, N, K, G, stride,
    GROUP: constexpr, MODE: constexpr, BITS: constexpr, GROUPS: constexpr, ZEROS: constexpr, SHARED: constexpr,
    ESCAPE: constexpr,
    P: constexpr, BM: constexpr, STAGES: constexpr,
):  # fmt: skip
    """(M, K) -> (M, N), K a multiple of 128; programs by blocks of 16 P rows of the weight, and `BM` of the input.

    Columns of x stand in the order j, i, t, b within each 32: see `ordered`. Groups are not `EACH`.
    """
    like: constexpr = x.dtype.element_ty
    nibbles: constexpr = MODE > STEPS and MODE < GATHER
    size: constexpr = 64 * BITS
    count = K // 128
    blocks = tl.program_id(0) * P + tl.arange(0, P)
    n = tl.minimum(tl.program_id(0) * (16 * P) + tl.arange(0, 16 * P), N - 1)
    rows = blocks[:, None, None] * 16 + tl.arange(0, 8)[None, :, None] + 8 * tl.arange(0, 2)[None, None, :]
    rows = tl.minimum(rows, N - 1)
    m = tl.minimum(tl.program_id(1) * BM + tl.arange(0, BM), M - 1).to(tl.int64)[:, None] * K
    words += tl.minimum(blocks, (N - 1) // 16).to(tl.int64) * count * size
    looked_up = load_tables(tables, first, rows, P, MODE, like, SHARED)
    begins = begin_tables(first, rows, P, MODE, BITS, like, SHARED)
    zeros = load_zeros(zero, rows, 0, stride, P, MODE, BITS, like, ZEROS and GROUPS == ONE)
    total = tl.zeros((16 * P, BM), tl.float32)
    for at in tl.range(0, count, num_stages=STAGES):
        planes = load_record(words + at * size, P, BITS, nibbles)
        if GROUPS == RECORDS:
            factor = tl.load(scale + n * stride + at * 128 // GROUP).to(tl.float32)
            zeros = load_zeros(zero, rows, at * 128 // GROUP, stride, P, MODE, BITS, like, ZEROS)
        if GROUPS == SLABS:
            for v in tl.static_range(2):
                for w in tl.static_range(2):
                    k = at * 128 + (64 * v + 32 * w)
                    g = tl.minimum(k // GROUP, G - 1)  # beyond the last column the input is zero
                    zeros = load_zeros(zero, rows, g, stride, P, MODE, BITS, like, ZEROS)
                    one, two = slab(planes, v, w, zeros, looked_up, table, begins, like, MODE, BITS, ESCAPE)
                    a = fragment(one, two, P, 2).reshape(16 * P, 32)
                    b = tl.load(x + m + (k + tl.arange(0, 32))[None, :])
                    part = product(a, tl.trans(b), tl.zeros((16 * P, BM), tl.float32))
                    total += part * tl.load(scale + n * stride + g).to(tl.float32)[:, None]
        else:
            b = tl.trans(tl.load(x + m + (at * 128 + tl.arange(0, 128))[None, :]))
            a = whole_record(planes, zeros, looked_up, table, begins, P, like, MODE, BITS, ESCAPE)
            if GROUPS == RECORDS:
                total += product(a, b, tl.zeros((16 * P, BM), tl.float32)) * factor[:, None]
            else:
                total = product(a, b, total)
    if GROUPS == ONE:
        total *= tl.load(scale + n * stride).to(tl.float32)[:, None]
    n = tl.program_id(0) * (16 * P) + tl.arange(0, 16 * P)[:, None]
    m = tl.program_id(1) * BM + tl.arange(0, BM)[None, :]
    tl.store(y + m.to(tl.int64) * N + n, total.to(y.dtype.element_ty), mask=(m < M) & (n < N))


@jit
def whole_record(
    planes, zeros, tables, table, begins, P: constexpr, like: constexpr,
    MODE: constexpr, BITS: constexpr, ESCAPE: constexpr,
):  # fmt: skip
    """The values (16 P, 128) of a record in each warp, columns in the order of `wide`."""
    one, two = slab(planes, 0, 0, zeros, tables, table, begins, like, MODE, BITS, ESCAPE)
    first = fragment(one, two, P, 2)
    one, two = slab(planes, 0, 1, zeros, tables, table, begins, like, MODE, BITS, ESCAPE)
    second = fragment(one, two, P, 2)
    one, two = slab(planes, 1, 0, zeros, tables, table, begins, like, MODE, BITS, ESCAPE)
    third = fragment(one, two, P, 2)
    one, two = slab(planes, 1, 1, zeros, tables, table, begins, like, MODE, BITS, ESCAPE)
    fourth = fragment(one, two, P, 2)
    found = tl.join(tl.join(first, second), tl.join(third, fourth))
    return found.permute(0, 1, 4, 3, 2).reshape(16 * P, 128)
