# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, untyped-decorator"
"""Arranged codes to what a tensor core multiplies, in registers: a few instructions for several codes at once.

Two codes, or the values they mean, lie in one word of 32 bits, the first in its low half. How they are made:

| MODE   | codes of         | how                                                                                     |
|--------|------------------|-----------------------------------------------------------------------------------------|
| STEPS  | `uniform`        | codes become the low bits of floats that count in steps of one; the zero point is taken |
|        |                  | off in the same type, exactly                                                           |
| TABLE  | up to 16 entries | `prmt` picks four bytes of eight at once: low and high bytes of four values             |
| PAIRS  | pairs of 4 bits  | as TABLE: a sign and one of 8 magnitudes, or beside a code 8 one of 8 others            |
| GATHER | anything else    | each code reads its value from memory; 256 entries later beside the code `ESCAPE`       |

Values are in units of the scale and in the type of the input; codes less their zero point are exact in it. Float32
values are gathered in all modes but STEPS, whose steps are exact in float16.

Under Triton's interpreter, which has no assembler, each instruction is spelled out.

Shapes: P = records side by side, each in a warp of its own; of a plane of 4 bits, 128 words stand for 16 rows and 64
columns, in the order of `arrange.py`.
"""

from __future__ import annotations

from compress.runtime.triton_jit import SPELLED, constexpr, jit, tl

STEPS, TABLE, PAIRS, GATHER = (constexpr(number) for number in range(4))
NO_ESCAPE = constexpr(-1)


@jit
def mask_or(a, b, mask: constexpr):
    """(a & mask) | b in one instruction: the compiler makes two where `mask` and `b` are both constants."""
    if SPELLED:
        return (a & mask) | b
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,r,r", [a, mask, b], dtype=tl.int32, is_pure=True, pack=1
    )


@jit
def permute(a, b, select):
    """Four of the eight bytes of a and b, the lowest of a being number 0, by the four low nibbles of `select`."""
    if SPELLED:
        both = (a.to(tl.int64) & 0xFFFFFFFF) | (b.to(tl.int64) << 32)
        found = (a + b + select) * 0
        for i in tl.static_range(4):
            found |= (((both >> (8 * ((select >> (4 * i)) & 7))) & 255) << (8 * i)).to(tl.int32)
        return found
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, select], dtype=tl.int32, is_pure=True, pack=1
    )


@jit
def add(a, b, like: constexpr):
    """Adds two numbers of the type `like` in a word to two others."""
    if SPELLED:
        return joined(half(a, 0, like) + half(b, 0, like), half(a, 16, like) + half(b, 16, like), like)
    if like == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 f; mov.b32 f, 0x3f803f80; fma.rn.bf16x2 $0, $1, f, $2; }", "=r,r,r", [a, b],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        "{ .reg .b32 f; mov.b32 f, 0x3c003c00; fma.rn.f16x2 $0, $1, f, $2; }", "=r,r,r", [a, b],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def add_16(a, b, like: constexpr):
    """16 a + b of two numbers of the type `like` in a word."""
    if SPELLED:
        return joined(16 * half(a, 0, like) + half(b, 0, like), 16 * half(a, 16, like) + half(b, 16, like), like)
    if like == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 f; mov.b32 f, 0x41804180; fma.rn.bf16x2 $0, $1, f, $2; }", "=r,r,r", [a, b],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        "{ .reg .b32 f; mov.b32 f, 0x4c004c00; fma.rn.f16x2 $0, $1, f, $2; }", "=r,r,r", [a, b],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def read(table, index, like: constexpr):
    """table[index], without the change of layout that a load may come with."""
    if SPELLED:
        return tl.load(table + index)
    elif like == tl.float32:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 p; mad.wide.s32 p, $1, 4, $2; ld.global.nc.f32 $0, [p]; }", "=f,r,l",
            [index, table.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # the compiler reads on after a return in a branch, so that types must fit in what is never reached
        found = tl.inline_asm_elementwise(
            "{ .reg .b64 p; .reg .b16 h; mad.wide.s32 p, $1, 2, $2; ld.global.nc.b16 h, [p]; cvt.u32.u16 $0, h; }",
            "=r,r,l", [index, table.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        return half(found, 0, like)


@jit
def half(word, shift: constexpr, like: constexpr):
    """The number of 16 bits in one half of a word; in float32 under the interpreter, which computes so."""
    found = ((word >> shift) & 0xFFFF).to(tl.int16).to(like, bitcast=True)
    if SPELLED:
        return found.to(tl.float32)
    return found


@jit
def halves(word, like: constexpr):
    """Words (...) -> both their numbers (..., 2)."""
    return tl.join(half(word, 0, like).to(like), half(word, 16, like).to(like))


@jit
def joined(low, high, like: constexpr):
    """Two numbers -> a word."""
    low = low.to(like).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = high.to(like).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high << 16)


@jit
def shifted(word, places: constexpr):
    """To the right, zeros coming in; to the left if negative."""
    if places > 0:
        return (word.to(tl.uint32, bitcast=True) >> places).to(tl.int32, bitcast=True)
    if places < 0:
        return word << (-places)
    return word


@jit
def by_row(values, P: constexpr):
    """(P, 8, 2) of rows g and a -> (P, 128), as words of a plane lie."""
    return values.reshape(P, 8, 1, 1, 2).broadcast_to(P, 8, 4, 2, 2).reshape(P, 128)


@jit
def negative_zero(zero, like: constexpr, P: constexpr, BITS: constexpr):
    """Zero points (P, 8, 2) -> (P, 128) words, what is added to floats whose low bits are codes."""
    offset: constexpr = 0.0 if BITS == 8 else 128.0 if like == tl.bfloat16 else 1024.0
    number = (-(zero.to(tl.float32) + offset)).to(like).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return by_row(number | (number << 16), P)


@jit
def load_record(words, P: constexpr, BITS: constexpr, NIBBLES: constexpr):
    """Pointers (P,) to records -> their planes: the low and the high half of the first, and of the second, if any.

    Halves of a plane of 4 bits have 64 columns. A plane of 2 bits, or of 1, is its own halves.
    """
    word = tl.arange(0, 128)[None, :]
    at = words[:, None]
    low = tl.load(at + word, eviction_policy="evict_first")
    high, more, most = low, low, low
    if BITS > 3:
        high = tl.load(at + 128 + word, eviction_policy="evict_first")
    if BITS == 3 or BITS == 5:
        single = tl.load(at + (128 if BITS == 3 else 256) + tl.arange(0, 64)[None, :], eviction_policy="evict_first")
        more = single.reshape(P, 64, 1).broadcast_to(P, 64, 2).reshape(P, 128).to(tl.uint32, bitcast=True)
        more = (more >> ((2 if NIBBLES else 8) * (word & 1))).to(tl.int32, bitcast=True)
        most = more
    if BITS == 6:
        more = tl.load(at + 256 + word, eviction_policy="evict_first")
        most = more
    if BITS == 8:
        more = tl.load(at + 256 + word, eviction_policy="evict_first")
        most = tl.load(at + 384 + word, eviction_policy="evict_first")
    return low, high, more, most


@jit
def two_codes(plane, second, number: constexpr, base: constexpr, BITS: constexpr):
    """Words with the codes of pair `number` (0 to 7) of a record in their halves, and the bits of `base`."""
    if BITS <= 3:
        found = mask_or(shifted(plane, 2 * number), base, 0x00030003)
        if BITS == 3:
            found = mask_or(shifted(second, number - 2), found, 0x00040004)
        return found
    found = mask_or(shifted(plane, 4 * (number % 4)), base, 0x000F000F)
    if BITS == 5:
        found = mask_or(shifted(second, number - 4), found, 0x00100010)
    elif BITS == 6:
        found = mask_or(shifted(second, 2 * number - 4), found, 0x00300030)
    return found


@jit
def two_steps(plane, second, number: constexpr, zero, like: constexpr, BITS: constexpr):
    """Codes less their zero points; `zero` as of `negative_zero`."""
    magic: constexpr = 0x43004300 if like == tl.bfloat16 else 0x64006400  # 128 and 1024, in steps of one
    found = two_codes(plane, second, number, magic, BITS)
    if BITS != 8:
        return add(found, zero, like)
    minus = found * 0 + (magic - 0x80000000 + 0x8000)  # the same, negative
    tops = add(two_codes(second, second, number, magic, 4), minus, like)
    return add_16(tops, add(add(found, minus, like), zero, like), like)


@jit
def four_values(select, upper, tables):
    """Two words of values of the four codes in the low nibbles of `select`; `upper` is None for up to 8 entries.

    `tables`: words with the low bytes of entries 0 to 3, 4 to 7, ..., and then those with the high bytes.
    """
    low, high = permute(tables[0], tables[1], select), permute(tables[4], tables[5], select)
    if upper is not None:
        low = permute(low, permute(tables[2], tables[3], select), upper)
        high = permute(high, permute(tables[6], tables[7], select), upper)
    return low, high


@jit
def table_slab(plane, second, v: constexpr, w: constexpr, tables, BITS: constexpr):
    """Two words of values, of pairs i = 0 and 1, looked up in up to 16 entries."""
    if BITS == 4:
        select = shifted(plane & 0x77777777, 16 * w)
        # Selects byte n of the first four, or n + 4, where bit 3 of the code says the other eight entries.
        upper = shifted(mask_or(shifted(plane, 1), 0x32103210, 0x44444444), 16 * w)
        low, high = four_values(select, upper, tables)
    else:
        select = shifted(plane, 2 * v) & 0x33333333
        if BITS == 3:
            select = mask_or(shifted(second, v - 2), select, 0x44444444)
        low, high = four_values(shifted(select, 16 * w), None, tables)
    return permute(low, high, 0x5140), permute(low, high, 0x7362)


@jit
def pair_slab(plane, w: constexpr, tables):
    """Two words of values from signs and magnitudes, those beside code 8 from the second half of `tables`."""
    other = plane ^ -2004318072  # 0x88888888
    other = other | shifted(other, 1)
    found = ((other | shifted(other, 2)) ^ -1) & 0x11111111  # one in each nibble that is 8
    up, down = found << 6, shifted(found, 2)  # to bit 2 of the neighbour: of odd nibbles from even ones, and back
    beside = shifted(mask_or(((up ^ down) & 0x40404040) ^ down, 0x32103210, 0x44444444), 16 * w)
    select = shifted(plane & 0x77777777, 16 * w)
    low, high = four_values(select, None, tables)
    other_low = permute(tables[2], tables[3], select)
    other_high = permute(tables[6], tables[7], select)
    low, high = permute(low, other_low, beside), permute(high, other_high, beside)
    signs = permute(shifted(plane, 16 * w), shifted(plane, 16 * w - 4), 0x1504)  # bit 3 of each nibble tops a byte
    high = mask_or(signs, high, -2139062144)  # 0x80808080
    return permute(low, high, 0x5140), permute(low, high, 0x7362)


@jit
def code_at(plane, second, v: constexpr, w: constexpr, i: constexpr, b: constexpr, BITS: constexpr, NIBBLES: constexpr):
    """One code of each word, by itself: column 4j + 2i + b of those that the word holds for u = 2v + w."""
    number: constexpr = i + 2 * w + (4 * v if BITS <= 3 else 0)
    nibble: constexpr = b + 2 * i + 4 * w
    if BITS <= 3:
        found = shifted(plane, 4 * nibble + 2 * v if NIBBLES else 2 * number + 16 * b) & 3
        if BITS == 3:
            found |= (shifted(second, 4 * nibble + v if NIBBLES else number + 16 * b) & 1) << 2
        return found
    found = shifted(plane, 4 * nibble if NIBBLES else 4 * number + 16 * b) & 15
    if BITS == 5:
        found |= (shifted(second, number + 4 * v + 16 * b) & 1) << 4
    elif BITS == 6:
        found |= (shifted(second, 2 * (number + 4 * v) + 16 * b) & 3) << 4
    elif BITS == 8:
        found |= (shifted(second, 4 * number + 16 * b) & 15) << 4
    return found


@jit
def gathered(
    plane, second, v: constexpr, w: constexpr, i: constexpr, table, first, like: constexpr,
    BITS: constexpr, NIBBLES: constexpr, ESCAPE: constexpr,
):  # fmt: skip
    """Values (P, 128, 2) of pair i, read one by one; `first`: where the table of a row begins."""
    low = code_at(plane, second, v, w, i, 0, BITS, NIBBLES)
    high = code_at(plane, second, v, w, i, 1, BITS, NIBBLES)
    if ESCAPE != NO_ESCAPE:
        beside = tl.where(high == ESCAPE, 256, 0)
        high += tl.where(low == ESCAPE, 256, 0)
        low += beside
    return tl.join(read(table, first + low, like), read(table, first + high, like))


@jit
def slab(
    planes, v: constexpr, w: constexpr, zero, tables, table, first, like: constexpr,
    MODE: constexpr, BITS: constexpr, ESCAPE: constexpr,
):  # fmt: skip
    """The values (P, 128, 2) of pairs i = 0 and of pairs i = 1 of 32 columns: those of u = 2v + w."""
    plane = planes[1] if v == 1 else planes[0]
    second = planes[3] if v == 1 else planes[2]
    number: constexpr = 4 * v + 2 * w
    if MODE == STEPS:
        exact: constexpr = tl.float16 if like == tl.float32 else like
        one = two_steps(plane, second, number, zero, exact, BITS)
        two = two_steps(plane, second, number + 1, zero, exact, BITS)
        one, two = halves(one, exact).to(like), halves(two, exact).to(like)
    elif MODE == GATHER or like == tl.float32:
        nibbles: constexpr = MODE != GATHER
        one = gathered(plane, second, v, w, 0, table, first, like, BITS, nibbles, ESCAPE)
        two = gathered(plane, second, v, w, 1, table, first, like, BITS, nibbles, ESCAPE)
    else:
        if MODE == PAIRS:
            one, two = pair_slab(plane, w, tables)
        else:
            one, two = table_slab(plane, second, v, w, tables, BITS)
        one, two = halves(one, like), halves(two, like)
    return one, two


@jit
def fragment(one, two, P: constexpr, WIDTH: constexpr):
    """Values of pairs i = 0 and 1 -> (P, 16, 32), rows by columns.

    `WIDTH`: how many neighbouring columns a thread holds in the layout that the product wants its operand in. Columns
    are put in the order that makes each thread hold what it has decoded; those of the input must follow, see `columns`.
    """
    found = tl.join(one, two).reshape(P, 8, 4, 2, 2, 2, 2)  # g t j a b i
    if WIDTH == 8:
        found = found.permute(0, 4, 1, 2, 3, 6, 5)
    elif WIDTH == 4:
        found = found.permute(0, 4, 1, 3, 2, 6, 5)
    else:
        found = found.permute(0, 4, 1, 3, 6, 2, 5)
    return found.reshape(P, 16, 32)


@jit
def columns(x, P: constexpr, M: constexpr, WIDTH: constexpr):
    """Inputs (P, M, 32) -> (P, 32, M), their columns in the order of `fragment`."""
    if WIDTH == 4:
        x = x.reshape(P, M, 4, 2, 4).permute(0, 1, 3, 2, 4).reshape(P, M, 32)
    elif WIDTH == 2:
        x = x.reshape(P, M, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(P, M, 32)
    return x.permute(0, 2, 1)
