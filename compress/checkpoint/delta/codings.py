"""How the signs of one tensor lie in bytes, chunk by chunk, so that any piece can be read without the rest.

A chunk is the same number of elements in a whole file; the last one of a tensor may be shorter. Numbers are little
endian. What lies behind the last chunk of a tensor that was only partly merged is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from compress.encodings import rice
from compress.encodings.bits import pack_bits, row_bytes, unpack_bits
from compress.encodings.signs import Signs
from compress.io.safetensors_file import bytes_of
from compress.lazy import np, torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

ReadBytes: TypeAlias = "Callable[[int, int], Tensor]"  # (start, stop) -> those bytes of a tensor's payload, uint8


class Chunks(Protocol):
    """One tensor's payload, opened."""

    def chunk(self, index: int, length: int) -> Signs:
        """The signs of a chunk of so many elements.

        Raises:
            ValueError: it cannot be read.
        """


@dataclass(frozen=True)
class RiceChunks:
    """Few entries that are not zero, all of one magnitude, in a Rice code (`encodings/rice.py`).

    Bytes: the scale, bfloat16; the number of chunks, uint32; for each chunk how many entries are not zero and the
    bytes of its quotients, uint32 each, and its low bits, uint8; then the streams of every chunk.
    """

    read: ReadBytes
    chunk_size: int

    @staticmethod
    def pack(codes: Iterable[Signs]) -> Tensor:
        """(B,) uint8 of a tensor's chunks, in order."""
        rows, streams, scale = [], [], torch.zeros(1)
        for code in codes:
            scale = code.scales
            *row, stream = rice.encode(code.signs[0].cpu())
            rows.append((row[0], row[2], row[1]))
            streams.append(stream)
        head = bytes(bytes_of(scale.bfloat16())) + len(rows).to_bytes(4, "little")
        return _uint8(head + np.array(rows, TABLE).tobytes() + b"".join(streams))

    @cached_property
    def _head(self) -> tuple[Tensor, Any, Any]:
        """The scale, the table, and where every chunk begins."""
        head = self.read(0, 6)
        count = int.from_bytes(bytes(bytes_of(head[2:])), "little")
        begin = 6 + count * TABLE.itemsize
        table = np.frombuffer(bytes(bytes_of(self.read(6, begin))), TABLE)
        sizes = [rice.coded_size(int(row["count"]), int(row["low"]), int(row["first"])) for row in table]
        return head[:2].view(torch.bfloat16).float(), table, np.cumsum([begin, *sizes])

    def chunk(self, index: int, length: int) -> Signs:
        scale, table, begins = self._head
        if index >= len(table):
            return Signs(scale, torch.zeros(1, length, dtype=torch.int8, device="cpu"))
        count, first, low = (int(n) for n in table[index])
        streams = self.read(int(begins[index]), int(begins[index + 1]))
        return Signs(scale, rice.decode(streams, count, low, first, length)[None])


@dataclass(frozen=True)
class BitChunks:
    """A sign for every entry, in one or more rounds with a scale each: 1 bit per entry and round.

    Bytes: the number of rounds, uint8; their scales, float32; for each chunk the signs of each round, 1 for plus,
    padded to whole bytes.
    """

    read: ReadBytes
    chunk_size: int

    @staticmethod
    def pack(codes: Iterable[Signs]) -> Tensor:
        """(B,) uint8 of a tensor's chunks, in order."""
        head, rows = b"", []
        for code in codes:
            head = len(code.scales).to_bytes(1, "little") + bytes(bytes_of(code.scales))
            rows.append(pack_bits((code.signs > 0).to(torch.uint8), 1).flatten().cpu())
        return torch.cat([_uint8(head), *rows])

    @cached_property
    def _scales(self) -> Tensor:
        rounds = int(self.read(0, 1)[0])
        return self.read(1, 1 + 4 * rounds).view(torch.float32)

    def chunk(self, index: int, length: int) -> Signs:
        rounds = len(self._scales)
        begin = 1 + 4 * rounds + index * rounds * row_bytes(self.chunk_size, 1)
        packed = self.read(begin, begin + rounds * row_bytes(length, 1)).view(rounds, -1)
        return Signs(self._scales, unpack_bits(packed, 1, length).to(torch.int8) * 2 - 1)


TABLE = np.dtype([("count", "<u4"), ("first", "<u4"), ("low", "u1")])
CODINGS: dict[str, type[RiceChunks] | type[BitChunks]] = {"rice": RiceChunks, "bits": BitChunks}


def _uint8(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
