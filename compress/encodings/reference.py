"""Slow and plainly right: the oracle that tests hold the fast paths against. Python integers and floats only."""

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


def dequantize_row(codes: Sequence[int], scale: Sequence[float], zero_point: Sequence[int]) -> list[float]:
    """One row; `scale` and `zero_point` have one entry a group of neighbouring columns."""
    width = len(codes) // len(scale)
    return [(code - zero_point[i // width]) * scale[i // width] for i, code in enumerate(codes)]
