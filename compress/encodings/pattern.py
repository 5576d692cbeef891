"""Masks that keep N of every M neighbouring columns, in fewer bits than a bitmap.

A run of M columns with N kept is one of M! / (N! (M - N)!) combinations. Its rank is its place among the M-bit numbers
with N ones, ascending, where bit j is 1 if column j of the run is kept (the combinatorial number system: Knuth, TAOCP
4A, section 7.2.1.3). As many ranks as fit in a byte make one word, the first rank the lowest digit to the base of the
number of combinations. Words lie in the streams of `bits.py`, in as many bits as the greatest of them takes:

| pattern  | combinations | ranks per word | bits per word | bits per weight |
|----------|--------------|----------------|---------------|-----------------|
| 1:4, 3:4 | 4            | 4              | 8             | 0.5             |
| 2:4      | 6            | 3              | 8             | 0.667           |
| 1:8, 7:8 | 8            | 2              | 6             | 0.375           |
| 2:8, 6:8 | 28           | 1              | 5             | 0.625           |
| 3:8, 5:8 | 56           | 1              | 6             | 0.75            |
| 4:8      | 70           | 1              | 7             | 0.875           |

The last word of a row is filled up with ranks of zero, which are cut off again.

Shapes: O rows, I columns, which M divides; W words per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from compress.encodings.bits import pack_bits, row_bytes, unpack_bits
from compress.lazy import functional, torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

RUN_WIDTHS = (4, 8)  # the runs that are looked for


@dataclass(frozen=True)
class Pattern:
    """Exactly `keep` of every `of` neighbouring columns are kept."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: Any) -> Self:
        """The inverse of `str`.

        Raises:
            ValueError: a pattern that is not known: the file was written by a newer version.
        """
        known = {str(p): p for of in RUN_WIDTHS for p in (cls(keep, of) for keep in range(1, of))}
        if not isinstance(text, str) or text not in known:
            raise ValueError(f"pattern {text!r:.100} of a mask is not known to this version; it reads {sorted(known)}")
        return known[text]

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def combinations(self) -> int:
        """Ways to keep `keep` of `of`."""
        return math.comb(self.of, self.keep)

    @property
    def ranks(self) -> int:
        """Ranks per word."""
        return max(k for k in range(1, 9) if self.combinations**k <= 256)

    @property
    def bits(self) -> int:
        """Bits per word."""
        return int(self.combinations**self.ranks - 1).bit_length()

    def words(self, columns: int) -> int:
        """Words per row."""
        return -(-columns // (self.of * self.ranks))

    def row_bytes(self, columns: int) -> int:
        """Bytes of one packed row."""
        return row_bytes(self.words(columns), self.bits)

    def fits(self, mask: Tensor) -> bool:
        """Whether every run of an (O, I) mask keeps exactly that many."""
        runs = mask.reshape(len(mask), -1, self.of)
        # Most masks without the pattern are told from their first row.
        return all(bool((part.sum(-1, dtype=torch.uint8) == self.keep).all()) for part in (runs[:1], runs))

    def pack(self, mask: Tensor) -> Tensor:
        """(O, I) bool with the pattern -> uint8 (O, `row_bytes`)."""
        rows, columns = mask.shape
        numbers = unpack_bits(pack_bits(mask.to(torch.uint8), 1), self.of, columns // self.of)
        rank_of = torch.zeros(2**self.of, dtype=torch.uint8)
        rank_of[self._numbers()] = torch.arange(self.combinations, dtype=torch.uint8)
        ranks = rank_of.to(mask.device).index_select(0, numbers.flatten().int()).view(rows, -1)
        missing = self.words(columns) * self.ranks - ranks.shape[1]
        digits = functional.pad(ranks, (0, missing)).view(rows, -1, self.ranks)
        word = digits[..., 0].clone()
        for i in range(1, self.ranks):
            word += digits[..., i] * self.combinations**i
        return pack_bits(word, self.bits)

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """The inverse of `pack`. No byte is refused: those that `pack` never writes keep as many, too."""
        words = unpack_bits(packed, self.bits, self.words(columns))
        table = _pattern_table(self, str(packed.device))
        found = table.index_select(0, words.flatten().int()).view(len(packed), -1)
        return found[:, :columns].contiguous()

    def _numbers(self) -> Tensor:
        """(combinations,) the number of every rank."""
        return torch.tensor([n for n in range(2**self.of) if n.bit_count() == self.keep])

    def table(self) -> Tensor:
        """(2**bits, ranks * of) bool: what every word keeps. A digit beyond the last counts from the first again."""
        words = torch.arange(2**self.bits)[:, None]
        digits = words // self.combinations ** torch.arange(self.ranks) % self.combinations
        return (self._numbers()[digits][..., None] >> torch.arange(self.of) & 1).bool().view(len(words), -1)


@lru_cache(maxsize=32)
def _pattern_table(pattern: Pattern, device: str) -> Tensor:
    with torch.inference_mode(False):
        return pattern.table().to(device)


def find_pattern(mask: Tensor, kept: int) -> Pattern | None:
    """The pattern an (O, I) mask that keeps `kept` is stored with; None where a bitmap does as well or must do."""
    columns = mask.shape[1]
    exact = (Pattern(kept * of // mask.numel(), of) for of in RUN_WIDTHS if kept * of % mask.numel() == 0)
    return next((p for p in _smallest(exact, columns) if p.fits(mask)), None)


def promised(keep: int, of: int, columns: int) -> Pattern | None:
    """The pattern that masks of some columns are stored with when they keep exactly `keep` of every `of`."""
    exact = (Pattern(keep * width // of, width) for width in RUN_WIDTHS if width % of == 0)
    return next(iter(_smallest(exact, columns)), None)


def _smallest(patterns: Iterable[Pattern], columns: int) -> list[Pattern]:
    """Those that can lie on some columns in fewer bytes than a bitmap, the smallest first."""
    able = (p for p in patterns if 0 < p.keep < p.of and columns % p.of == 0)
    return sorted((p for p in able if p.row_bytes(columns) < row_bytes(columns, 1)), key=lambda p: p.row_bytes(columns))


__all__ = ["Pattern", "find_pattern", "promised"]
