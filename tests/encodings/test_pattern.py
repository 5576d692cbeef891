"""N:M masks to bytes: exact for every pattern and width, found only where they hold, in the documented bytes."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compress.encodings import reference
from compress.encodings.bits import row_bytes
from compress.encodings.pattern import RUN_WIDTHS, Pattern, find_pattern, promised

PATTERNS = [Pattern(keep, of) for of in RUN_WIDTHS for keep in range(1, of)]
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def masked(rows: int, columns: int, pattern: Pattern) -> Tensor:
    shape = rows, columns // pattern.of, pattern.of
    highest = torch.rand(shape).argsort(-1)[..., : pattern.keep]
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, highest, True).view(rows, columns)


def parsed(*rows: str) -> Tensor:
    return torch.tensor([[bit == "1" for bit in row if bit != " "] for row in rows])


def found(mask: Tensor) -> Pattern | None:
    return find_pattern(mask, int(mask.sum()))


# --- bytes ------------------------------------------------------------------------------------------------------------


@each_pattern
@pytest.mark.parametrize("columns", [8, 16, 24, 40, 96, 104, 256])
def test_packing_agrees_with_the_oracle_and_unpacking_gives_the_mask_back(pattern: Pattern, columns: int) -> None:
    mask = masked(5, columns, pattern)
    packed = pattern.pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, pattern.row_bytes(columns))
    rows: list[Sequence[bool]] = mask.tolist()
    assert [bytes(row.tolist()) for row in packed] == [
        reference.pack_pattern_row(row, pattern.keep, pattern.of) for row in rows
    ]
    back = pattern.unpack(packed, columns)
    assert back.dtype == torch.bool
    assert back.is_contiguous()
    assert torch.equal(back, mask)


@pytest.mark.parametrize("columns", [4, 12, 20, 28, 100])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_widths_that_eight_does_not_divide_come_back(keep: int, columns: int) -> None:
    pattern = Pattern(keep, 4)
    mask = masked(3, columns, pattern)
    assert torch.equal(pattern.unpack(pattern.pack(mask), columns), mask)


# Worked out by hand from the definition: a rank is the place among the M-bit numbers with N ones, lowest bit first.
GOLDEN = {
    # 12, 3, 10: 5 + 0 * 6 + 4 * 36 = 149; 9 alone in the next word: 3.
    "2:4": ("0011 1100 0101 1001", "9503"),
    # 1, 2, 4, 8: 0 + 1 * 4 + 2 * 16 + 3 * 64 = 228; 4 alone: 2.
    "1:4": ("1000 0100 0010 0001 0010", "e402"),
    # 7, 11, 13, 14 ascending: 0 + 1 * 4 + 2 * 16 + 3 * 64 = 228.
    "3:4": ("1110 1101 1011 0111", "e4"),
    # 128 and 1: 7 + 0 * 8 = 7; 16 alone: 4. Six bits each: 7 + 4 * 64 = 263.
    "1:8": ("00000001 10000000 00001000", "0701"),
    # 15, 23, 240: the first, the second and the last of 70. Seven bits each: 0 + 1 * 128 + 69 * 16384 = 1130624.
    "4:8": ("11110000 11101000 00001111", "804011"),
    # 3, 5, 192: the first, the second and the last of 28. Five bits each: 0 + 1 * 32 + 27 * 1024 = 27680.
    "2:8": ("11000000 10100000 00000011", "206c"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    pattern, (row, golden) = Pattern.parse(name), GOLDEN[name]
    mask = parsed(row, row)
    packed = pattern.pack(mask)
    assert [bytes(row.tolist()).hex() for row in packed] == [golden] * 2
    assert torch.equal(pattern.unpack(packed, mask.shape[1]), mask)


@each_pattern
def test_every_combination_comes_back(pattern: Pattern) -> None:
    numbers = [n for n in range(2**pattern.of) if n.bit_count() == pattern.keep]
    mask = torch.tensor([[bool(n >> i & 1) for i in range(pattern.of)] for n in numbers])
    packed = pattern.pack(mask)
    assert len(set(packed.flatten().tolist())) == math.comb(pattern.of, pattern.keep)
    assert torch.equal(pattern.unpack(packed, pattern.of), mask)


@each_pattern
def test_bytes_that_are_never_written_still_keep_as_many(pattern: Pattern) -> None:
    packed = torch.randint(256, (8, pattern.row_bytes(96)), dtype=torch.uint8)
    assert pattern.fits(pattern.unpack(packed, 96))


@each_pattern
def test_a_mask_that_is_not_contiguous_packs_the_same(pattern: Pattern) -> None:
    mask = masked(6, 48, pattern)
    assert torch.equal(pattern.pack(mask.T.contiguous().T), pattern.pack(mask))
    assert found(mask.T.contiguous().T) == found(mask)


def test_a_pattern_is_named_by_what_it_keeps() -> None:
    assert [str(p) for p in PATTERNS] == ["1:4", "2:4", "3:4", "1:8", "2:8", "3:8", "4:8", "5:8", "6:8", "7:8"]
    assert [Pattern.parse(str(p)) for p in PATTERNS] == PATTERNS


def test_the_bits_a_weight_are_the_documented_ones() -> None:
    bits = {str(p): p.bits / (p.ranks * p.of) for p in PATTERNS}
    assert bits == {
        "1:4": 0.5, "2:4": 2 / 3, "3:4": 0.5, "1:8": 0.375, "2:8": 0.625, "3:8": 0.75, "4:8": 0.875, "5:8": 0.75,
        "6:8": 0.625, "7:8": 0.375,
    }  # fmt: skip


# --- finding ----------------------------------------------------------------------------------------------------------


@each_pattern
def test_a_pattern_is_found_in_a_mask_that_has_it_in_every_run(pattern: Pattern) -> None:
    mask = masked(4, 96, pattern)
    assert found(mask) == pattern
    row, column = mask.nonzero()[-1].tolist()
    mask[row, column] = False
    assert found(mask) is None


@each_pattern
def test_as_many_kept_but_not_in_every_run_is_no_pattern(pattern: Pattern) -> None:
    mask = masked(4, 96, pattern)
    mask[-1, -pattern.of :] = torch.arange(pattern.of) < pattern.keep + 1
    mask[0, : pattern.of] = torch.arange(pattern.of) < pattern.keep - 1
    assert int(mask.sum()) == 4 * 96 * pattern.keep // pattern.of
    assert found(mask) is None


@pytest.mark.parametrize("mask", [torch.zeros(3, 96).bool(), torch.ones(3, 96).bool()], ids=["nothing", "everything"])
def test_nothing_and_everything_are_no_pattern(mask: Tensor) -> None:
    assert found(mask) is None


def test_the_smaller_of_two_patterns_is_found() -> None:
    assert found(masked(4, 96, Pattern(2, 4))) == Pattern(2, 4)  # 4:8 holds, too, and takes more
    every_other = parsed("1000 0000" * 12)
    assert found(every_other) == Pattern(1, 8)
    one_of_two = torch.arange(96).remainder(2).bool().expand(4, 96)
    assert found(one_of_two) == Pattern(2, 4)


@each_pattern
@pytest.mark.parametrize("columns", [8, 16, 24, 40, 96])
def test_a_pattern_is_used_only_where_it_takes_less_than_a_bitmap(pattern: Pattern, columns: int) -> None:
    chosen = found(masked(64, columns, pattern))
    assert (chosen is not None) == (pattern.row_bytes(columns) < row_bytes(columns, 1))


def test_a_width_that_the_run_does_not_divide_has_no_pattern() -> None:
    mask = parsed("1100 1010 0101 10")
    assert found(mask) is None
    assert promised(2, 4, 14) is None


@each_pattern
@pytest.mark.parametrize("columns", [8, 16, 24, 40, 96])
def test_what_a_rule_promises_is_what_is_found(pattern: Pattern, columns: int) -> None:
    assert promised(pattern.keep, pattern.of, columns) == found(masked(64, columns, pattern))


def test_a_rule_of_shorter_runs_promises_the_pattern_of_longer_ones() -> None:
    assert promised(1, 2, 96) == Pattern(2, 4)
    assert promised(10, 20, 120) is None
    assert promised(8, 16, 96) is None
