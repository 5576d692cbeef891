"""Sparse signs in bytes: the gaps between those that are not zero in a Rice code, and a bit for each sign.

A gap g (how many zeros stand before an entry) is written as its quotient g >> b, in unary, and its b low bits. Source:
Golomb, "Run-length encodings", 1966, and Rice, 1979. Differs from the usual order in: the three parts of all codewords
(quotients, low bits, signs) lie in three streams, which can be read as whole arrays; the number of bits is the same.

Bit i of a stream is bit i % 8 of byte i // 8; each stream is padded with zeros to a whole byte. A quotient q is q zeros
and a one; the sign of a positive entry is 1.

Shapes: n elements, c of them not zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from compress.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = (1 + math.sqrt(5)) / 2


def low_bits(count: int, total: int) -> int:
    """b, which needs the fewest bits where `count` of `total` entries are not zero, anywhere.

    Source: Kiely, "Selecting the Golomb parameter in Rice coding", 2004: 1 + floor(log2(ln(phi - 1) / ln(1 - k))).
    """
    if not 0 < count < total:
        return 0
    return max(0, 1 + math.floor(math.log2(math.log(GOLDEN - 1) / math.log1p(-count / total))))


def encode(signs: Tensor) -> tuple[int, int, int, bytes]:
    """(n,) int8 of -1, 0 and 1 -> how many are not zero, b, bytes of the first stream, and the three streams."""
    values = signs.numpy()
    places = np.flatnonzero(values)
    count = len(places)
    low = low_bits(count, len(values))
    gaps = np.diff(places, prepend=-1) - 1
    ends = np.cumsum((gaps >> low) + 1) - 1
    quotients = np.zeros(int(ends[-1]) + 1 if count else 0, np.uint8)
    quotients[ends] = 1
    first = _pack_stream(quotients)
    rest = (gaps[:, None] >> np.arange(low)) & 1
    return count, low, len(first), first + _pack_stream(rest) + _pack_stream(values[places] > 0)


def coded_size(count: int, low: int, first: int) -> int:
    """Bytes of the three streams."""
    return first + -(-count * low // 8) + -(-count // 8)


def decode(streams: Tensor, count: int, low: int, first: int, total: int) -> Tensor:
    """The inverse of `encode`: (B,) uint8 -> (n,) int8, n = `total`.

    Raises:
        ValueError: it is not what `encode` made of so many.
    """
    data: Any = streams.numpy()
    middle = first + -(-count * low // 8)
    ends = np.flatnonzero(_unpack_stream(data[:first], 8 * first))
    if len(ends) != count or len(data) != coded_size(count, low, first):
        raise ValueError(f"{len(ends)} entries where {count} should be")
    quotients = np.diff(ends, prepend=-1) - 1
    rest = _unpack_stream(data[first:middle], count * low).reshape(count, low)
    gaps = (quotients << low) + (rest.astype(np.int64) << np.arange(low)).sum(axis=1)
    places = np.cumsum(gaps + 1) - 1
    if count and places[-1] >= total:
        raise ValueError(f"an entry at {places[-1]} where {total} are")
    found = np.zeros(total, np.int8)
    found[places] = 2 * _unpack_stream(data[middle:], count).astype(np.int8) - 1
    return torch.from_numpy(found)


def _pack_stream(bits: Any) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack_stream(data: Any, count: int) -> Any:
    return np.unpackbits(data, count=count, bitorder="little")
