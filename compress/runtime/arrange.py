"""The order in which the quick kernels want codes: each thread reads what it multiplies, in whole words.

A weight is cut into records of 16 rows and 128 columns, row blocks first. In a record, row r = 8a + g and column
k = 32u + 8t + 4j + 2i + b, where g and t name the thread of a warp that holds the weight for a tensor core's product
of (16, 32) by (32, n), and u counts these products. Codes of 3, 5, 6 and 8 bits are cut into two planes, low bits
first: a plane of 4 bits has 256 words of 32 bits in a record, one of 2 bits 128, one of 1 bit 64. In a word, from its
lowest bit:

| plane  | words       | halves: two codes of a pair 16 bits apart | nibbles: four neighbours, to look up at once |
|--------|-------------|-------------------------------------------|----------------------------------------------|
| 4 bits | u1 g t j a  | i, u0, b                                  | b, i, u0                                     |
| 2 bits | g t j a     | i, u0, u1, b                              | u1, b, i, u0                                 |
| 1 bit  | g t j       | i, u0, u1, a, b                           | u1, a, b, i, u0                              |

`u0` and `u1` are the bits of u. Where rows and columns fill their records this is as large as the stream of `bits.py`,
so that it can stand in its place; else they are padded with zeros. Codes of 7 bits take 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.encodings.bits import pack_bits, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS = 16, 128  # of a record
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 4), 8: (4, 4)}  # widths, low bits first
SIZES = {"a": 2, "g": 8, "v": 2, "w": 2, "t": 4, "j": 2, "i": 2, "b": 2}  # v, w: the high and low bit of u
AXES = "avwgtjib"
# Slow to quick, words first: the last letter stands for the lowest bits.
ORDERS = {
    False: {4: "vgtja" + "bwi", 2: "gtja" + "bvwi", 1: "gtj" + "bavwi"},
    True: {4: "vgtja" + "wib", 2: "gtja" + "wibv", 1: "gtj" + "wibav"},
}


def arrange(codes: Tensor, bits: int, *, nibbles: bool) -> Tensor:
    """(O, I) uint8 codes below 2**bits -> (bytes,) uint8, arranged; the inverse is `restore`."""
    blocks, chunks = _records((codes.shape[0], codes.shape[1]))
    missing = chunks * COLUMNS - codes.shape[1], blocks * ROWS - codes.shape[0]
    codes = torch.nn.functional.pad(codes, (0, missing[0], 0, missing[1]))
    # a g | chunk, v w t j i b -> chunk, then AXES
    cut = codes.view(blocks, 2, 8, chunks, 2, 2, 4, 2, 2, 2).permute(0, 3, 1, 4, 5, 2, 6, 7, 8, 9)
    planes, low = [], 0
    for width in PLANES[bits]:
        order = [2 + AXES.index(axis) for axis in ORDERS[nibbles][width]]
        part = cut.permute(0, 1, *order).reshape(-1, 32 // width) >> low & (1 << width) - 1
        planes.append(pack_bits(part, width).view(blocks, chunks, -1))
        low += width
    return torch.cat(planes, 2).flatten()


def restore(arranged: Tensor, shape: tuple[int, int], bits: int, *, nibbles: bool) -> Tensor:
    """(bytes,) uint8 -> (O, I) uint8 codes: the inverse of `arrange`."""
    blocks, chunks = _records(shape)
    records = arranged.view(blocks, chunks, -1)
    found, start, low = None, 0, 0
    for width in PLANES[bits]:
        stop = start + ROWS * COLUMNS * width // 8
        order = ORDERS[nibbles][width]
        codes = unpack_bits(records[:, :, start:stop].reshape(-1, 4), width, 32 // width)
        codes = codes.reshape(blocks, chunks, *(SIZES[axis] for axis in order))
        part = codes.permute(0, 1, *(2 + order.index(axis) for axis in AXES)) << low
        found = part if found is None else found | part
        start, low = stop, low + width
    assert found is not None
    whole = found.permute(0, 2, 5, 1, 3, 4, 6, 7, 8, 9).reshape(blocks * ROWS, chunks * COLUMNS)
    return whole[: shape[0], : shape[1]]


def _records(shape: tuple[int, int]) -> tuple[int, int]:
    """Blocks of rows, and records of each."""
    return -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
