"""Codes to bytes and back: one dense little-endian bit stream per row.

Code `i` of a row stands in bits `[i*bits, (i+1)*bits)` of the row's stream; bit `k` of the stream is bit `k % 8` of
byte `k // 8`. A row is padded with zero bits to a whole byte, never further: 3-bit codes cost 3 bits.

Shapes: R rows, N codes per row, B = ceil(N * bits / 8) bytes per row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from compress.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor


def row_bytes(num_codes: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-num_codes * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(R, N) uint8 codes below 2**bits -> (R, B) uint8, bits 1 to 8."""
    rows, num_codes = codes.shape
    if bits == 8:
        return codes.contiguous()
    if 8 % bits == 0:
        per_byte = 8 // bits
        lanes = padded(codes, per_byte).view(rows, -1, per_byte)
        packed = lanes[..., 0].clone()
        for i in range(1, per_byte):
            packed |= lanes[..., i] << (bits * i)
        return packed
    # Eight codes fill exactly `bits` bytes: put them in one 64-bit word, then cut the word into bytes.
    lanes = padded(codes, 8).view(rows, -1, 8).long()
    word = lanes[..., 0].clone()
    for i in range(1, 8):
        word |= lanes[..., i] << (bits * i)
    packed = torch.stack([(word >> (8 * i)) & 255 for i in range(bits)], dim=-1).to(torch.uint8)
    return packed.view(rows, -1)[:, : row_bytes(num_codes, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """(R, B) uint8 -> (R, N) uint8 codes: the inverse of `pack_bits`."""
    rows = packed.shape[0]
    if bits == 8:
        return packed
    if 8 % bits == 0:
        codes = _lanes(bits, str(packed.device)).index_select(0, packed.flatten().int()).view(torch.uint8)
    else:
        groups = padded(packed, bits).view(rows, -1, bits).long()
        word = groups[..., 0].clone()
        for i in range(1, bits):
            word |= groups[..., i] << (8 * i)
        mask = (1 << bits) - 1
        codes = torch.stack([(word >> (bits * i)) & mask for i in range(8)], dim=-1).to(torch.uint8)
    return codes.view(rows, -1)[:, :num_codes]


@lru_cache(maxsize=32)
def _lanes(bits: int, device: str) -> Tensor:
    """(256,): the codes in a byte, each a byte of a wider integer."""
    with torch.inference_mode(False):
        byte = torch.arange(256, device=device)
        codes = torch.stack([byte >> (bits * i) & (1 << bits) - 1 for i in range(8 // bits)], -1).to(torch.uint8)
        return codes.view({1: torch.int64, 2: torch.int32, 4: torch.int16}[bits])[:, 0]


def padded(values: Tensor, multiple: int) -> Tensor:
    """(R, N) with zeros behind each row, up to a multiple of columns; contiguous."""
    missing = -values.shape[1] % multiple
    return functional.pad(values, (0, missing)) if missing else values.contiguous()
