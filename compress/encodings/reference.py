"""Slow and plainly right: the oracle that tests hold the fast paths against. Python integers and floats only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def pack_row(codes: Sequence[int], bits: int) -> bytes:
    """One row of codes as a little-endian bit stream padded to a whole byte."""
    stream = 0
    for i, code in enumerate(codes):
        stream |= code << (bits * i)
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


def unpack_row(packed: bytes, bits: int, num_codes: int) -> list[int]:
    """The inverse of `pack_row`."""
    stream = int.from_bytes(packed, "little")
    return [(stream >> (bits * i)) & (2**bits - 1) for i in range(num_codes)]


def pack_pattern_row(mask: Sequence[bool], keep: int, of: int) -> bytes:
    """One row of a mask that keeps `keep` of every `of`: ranks in words of up to a byte, words as in `pack_row`."""
    numbers = [n for n in range(2**of) if n.bit_count() == keep]
    ranks = [numbers.index(sum(mask[start + i] << i for i in range(of))) for start in range(0, len(mask), of)]
    in_word = 1
    while len(numbers) ** (in_word + 1) <= 256:
        in_word += 1
    cut = [ranks[start : start + in_word] for start in range(0, len(ranks), in_word)]
    words = [sum(rank * len(numbers) ** i for i, rank in enumerate(part)) for part in cut]
    return pack_row(words, len(bin(len(numbers) ** in_word - 1)) - 2)


def dequantize_row(codes: Sequence[int], scale: Sequence[float], zero_point: Sequence[int]) -> list[float]:
    """One row; `scale` and `zero_point` have one entry per group of neighbouring columns."""
    width = len(codes) // len(scale)
    return [(code - zero_point[i // width]) * scale[i // width] for i, code in enumerate(codes)]
