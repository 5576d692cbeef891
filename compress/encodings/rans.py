"""Packed codes in as few bits as their frequencies ask for: an entropy code without loss.

A code that is read often takes fewer bits than one that is rare: about log2 of one over its share. Source: Duda,
"Asymmetric numeral systems", 2013, arXiv:1311.2540 (the range variant, rANS), and Giesen, "Interleaved entropy coders",
2014, arXiv:1402.3392: lanes that are coded beside each other share one stream of words, so that each step is a few
operations on whole arrays. Codes of quantized networks were stored with such a code in Wiedemann et al., "DeepCABAC",
2019, arXiv:1905.08318. Differs from that in: shares are counted once for each tensor, and do not adapt.

Symbol i belongs to lane i % L and is decoded in step i // L. A lane is a number of 32 bits, of which decoding looks up
the low `PRECISION` bits; one that fell below 2**16 takes the next 16-bit word of the stream, lanes in ascending order.

Bytes of a coded tensor, little-endian, one part behind the other:

| part        | type, count               | what                                                              |
|-------------|---------------------------|-------------------------------------------------------------------|
| frequencies | uint16 (2**bits,)         | share of each symbol, in units of 2**-14; they add up to 2**14    |
| lanes       | uint32 (L,)               | what decoding starts from                                         |
| words       | uint16, the rest          | what lanes take, in the order that they take it                   |

After the last step every lane is 2**16 and no word is left: that is what encoding started from, and it is checked.

Shapes: N symbols, L lanes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from compress.encodings.bits import pack_bits, row_bytes, unpack_bits
from compress.encodings.stated import made_from
from compress.lazy import np, torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

PRECISION = 14  # bits of a frequency
FLOOR = 1 << 16  # a lane is never below it between steps
STEPS = 1024  # symbols of a lane: fewer are quicker to decode, and each lane costs two bytes beyond the entropy
FEW = (32, 256)  # up to so many lanes have as few symbols as this, which would be decoded in no less time together
WIDEST = 8  # bits of a symbol


@dataclass(frozen=True, kw_only=True)
class CodedForm:
    """Everything about a coded tensor that neither its bytes nor the shape that it is decoded to say; JSON-able.

    Attributes:
        bits: of a symbol, which is one code or several neighbours.
        columns: symbols in a row of the packed tensor.
        lanes: that are decoded beside each other.
        size: bytes of the coded tensor.
    """

    bits: int
    columns: int
    lanes: int
    size: int

    def decode(self, coded: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(size,) uint8 -> the packed tensor of a shape, uint8: the inverse of `encode`.

        Raises:
            ValueError: it is not what `encode` made.
        """
        rows = math.prod(shape[:-1])
        if row_bytes(self.columns, self.bits) != shape[-1]:
            raise ValueError(f"{self.columns} symbols of {self.bits} bits in rows of {shape[-1]} bytes")
        data: Any = coded.cpu().numpy()
        table, start = 2 << self.bits, (2 << self.bits) + 4 * self.lanes
        if len(data) != self.size or start > len(data) or len(data) % 2:
            raise ValueError(f"{len(data)} bytes with {self.lanes} lanes, where {self.size} should be")
        frequencies = data[:table].view("<u2").astype(np.int64)
        if frequencies.sum() != 1 << PRECISION:
            raise ValueError("frequencies that do not add up")
        symbols = _symbols(frequencies, data[table:start].view("<u4"), data[start:].view("<u2"), rows * self.columns)
        found = torch.from_numpy(symbols).view(rows, self.columns)
        return pack_bits(found, self.bits).view(shape).to(coded.device)

    def to_json(self) -> dict[str, int]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: an unknown field, or a number that it cannot have.
        """
        return made_from(cls, data, "an entropy-coded tensor")


def encode(packed: Tensor, bits: int, columns: int) -> tuple[CodedForm, Tensor] | None:
    """A packed tensor -> its form and bytes, (size,) uint8; None where that would not be smaller.

    Args:
        packed: uint8, rows as `pack_bits` makes them; one dimension is one row.
        bits: of a code.
        columns: codes in a row.
    """
    if not packed.numel():
        return None
    rows = packed.reshape(-1, packed.shape[-1]).cpu()
    single = unpack_bits(rows, bits, columns)
    if not torch.equal(pack_bits(single, bits), rows):
        return None
    symbols = [(bits, single), *_joined(rows, bits, columns)]
    counted = [(_counts(each, width), width, each) for width, each in symbols]
    counts, width, chosen = min(counted, key=lambda way: _expected(way[0]))
    if _expected(counts) >= packed.numel():
        return None
    lanes, frequencies = _lanes(chosen.numel()), _frequencies(counts)
    states, words = _stream(chosen.flatten().numpy(), frequencies, lanes)
    coded = np.concatenate([frequencies.astype("<u2").view(np.uint8), states.view(np.uint8), words.view(np.uint8)])
    form = CodedForm(bits=width, columns=chosen.shape[1], lanes=lanes, size=len(coded))
    return (form, torch.from_numpy(coded)) if len(coded) < packed.numel() else None


def _joined(rows: Tensor, bits: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Several neighbouring codes as one symbol: fewer steps, and what neighbours have in common is made use of."""
    count = WIDEST // bits
    if count > 1 and WIDEST % bits == 0:
        yield WIDEST, rows
    elif count > 1 and columns % count == 0:
        yield bits * count, unpack_bits(rows, bits * count, columns // count)


def entropy(counts: Any) -> float:
    """Bits per symbol that no code of symbols by their frequencies alone falls below; (S,) counts."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _lanes(symbols: int) -> int:
    most, fewest = FEW
    return max(1, symbols // STEPS, min(most, symbols // fewest))


def _counts(symbols: Tensor, bits: int) -> Any:
    return torch.bincount(symbols.flatten(), minlength=1 << bits).numpy()


def _expected(counts: Any) -> float:
    """About how many bytes symbols take in the end. A lane begins with 32 bits of which 16 hold symbols."""
    total = int(counts.sum())
    return 2 * len(counts) + 2 * _lanes(total) + total * entropy(counts) / 8


def _frequencies(counts: Any) -> Any:
    """(S,) counts -> (S,) shares in units of 2**-PRECISION, none zero that occurs; nearly the fewest bits in all."""
    total = 1 << PRECISION
    there = counts > 0
    found = np.where(there, np.maximum(1, np.round(counts * (total / counts.sum()))), 0).astype(np.int64)
    while missing := total - int(found.sum()):
        step = 1 if missing > 0 else -1
        able = there & (found + step > 0)
        before, after = np.maximum(found, 1), np.maximum(found + step, 1)
        found[np.where(able, counts * np.log(before / after), np.inf).argmin()] += step  # what costs least
    return found


def _stream(symbols: Any, frequencies: Any, lanes: int) -> tuple[Any, Any]:
    """(N,) symbols -> (L,) uint32 lanes and the words, as decoding wants them: encoded from the last to the first."""
    first = (np.cumsum(frequencies) - frequencies).astype(np.uint32)
    shares = frequencies.astype(np.uint32)
    state = np.full(lanes, FLOOR, "<u4")
    words = []
    for start in reversed(range(0, len(symbols), lanes)):
        now = symbols[start : start + lanes]
        lane, share = state[: len(now)], shares[now]
        full = np.flatnonzero(lane >> np.uint32(32 - PRECISION) >= share)
        words.append(lane[full].astype("<u2"))  # the low half
        lane[full] >>= np.uint32(16)
        times, rest = np.divmod(lane, share)
        lane[:] = (times << np.uint32(PRECISION)) + rest + first[now]
    return state, np.concatenate(words[::-1])


def _symbols(frequencies: Any, states: Any, words: Any, count: int) -> Any:
    """The inverse of `_stream`: (N,) uint8, N = `count`.

    Raises:
        ValueError: lanes and words do not fit so many symbols.
    """
    symbol = np.repeat(np.arange(len(frequencies), dtype=np.uint8), frequencies)
    place = np.arange(1 << PRECISION) - (np.cumsum(frequencies) - frequencies)[symbol]
    share, place = frequencies[symbol].astype(np.uint32), place.astype(np.uint32)
    state, found, taken = states.copy(), np.empty(count, np.uint8), 0
    for start in range(0, count, len(state)):
        lane = state[: count - start]
        low = (lane & np.uint32((1 << PRECISION) - 1)).astype(np.intp)
        found[start : start + len(lane)] = symbol.take(low)
        lane >>= np.uint32(PRECISION)
        lane *= share.take(low)
        lane += place.take(low)
        empty = np.flatnonzero(lane < np.uint32(FLOOR))
        more = words[taken : taken + len(empty)]
        if len(more) < len(empty):
            raise ValueError("the stream ends too early")
        lane[empty] = lane[empty] << np.uint32(16) | more
        taken += len(empty)
    if taken != len(words) or (state != FLOOR).any():
        raise ValueError("the stream does not end where it began")
    return found
