"""Codes read back from a stream of bits, without the code that packs them: what was written is checked with it.

Shapes: R rows, W words of 32 bits in a row, N codes in a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor

WORDS = 1 << 19  # read at once: their bits take 16 MB


def unpacked(words: Tensor, bits: int) -> Tensor:
    """(R, W) int32 -> (R, N) uint8 codes, the first in the lowest bits; a code may lie in two words."""
    rows = max(1, WORDS // words.shape[1])
    return torch.cat([_unpacked(part, bits) for part in torch.split(words, rows)])


def _unpacked(words: Tensor, bits: int) -> Tensor:
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    bits_of_codes = stream.reshape(len(stream), -1, bits)
    return torch.from_numpy(np.packbits(bits_of_codes, axis=-1, bitorder="little")[..., 0])
