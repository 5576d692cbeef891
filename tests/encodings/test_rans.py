"""The entropy code: exact, near the entropy, the documented bytes, and damage is found."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.encodings.bits import pack_bits
from compress.encodings.rans import FLOOR, PRECISION, CodedForm, encode


def gaussian(rows: int, columns: int, bits: int) -> Tensor:
    """Codes of normal numbers in equal steps."""
    half = 2 ** (bits - 1)
    return (torch.randn(rows, columns) * half / 3 + half).round().clamp(0, 2 * half - 1).to(torch.uint8)


def entropy(codes: Tensor) -> float:
    shares = torch.bincount(codes.flatten()).double() / codes.numel()
    return float(-(shares * shares.clamp_min(1e-300).log2()).sum())


def coded(packed: Tensor, bits: int, columns: int) -> tuple[CodedForm, Tensor]:
    found = encode(packed, bits, columns)
    assert found is not None
    return found


def one_by_one(form: CodedForm, data: bytes, count: int) -> list[int]:
    """The symbols, one after the other, as the docstring of the module says."""

    def numbers(start: int, stop: int, width: int) -> list[int]:
        return [int.from_bytes(data[i : i + width], "little") for i in range(start, stop, width)]

    table = 2 * 2**form.bits
    shares, lanes = numbers(0, table, 2), numbers(table, table + 4 * form.lanes, 4)
    words = iter(numbers(table + 4 * form.lanes, len(data), 2))
    found = []
    for i in range(count):
        lane = i % form.lanes
        low, symbol, first = lanes[lane] % 2**PRECISION, 0, 0
        while first + shares[symbol] <= low:
            first += shares[symbol]
            symbol += 1
        found.append(symbol)
        lanes[lane] = shares[symbol] * (lanes[lane] >> PRECISION) + low - first
        if lane == form.lanes - 1 or i == count - 1:  # the end of a step
            for k in range(lane + 1):
                if lanes[k] < FLOOR:
                    lanes[k] = lanes[k] << 16 | next(words)
    assert list(words) == []
    return found


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_width_come_back_to_the_bit_whatever_their_rows_are_padded_with(bits: int) -> None:
    torch.manual_seed(bits)
    for rows, columns in ((1, 4000), (40, 96), (33, 131)):
        codes = gaussian(rows, columns, bits)
        packed = pack_bits(codes // (3 if bits > 4 else 1), bits)
        form, stored = coded(packed, bits, columns)
        assert stored.shape == (form.size,)
        assert form.size < packed.numel()
        assert torch.equal(form.decode(stored, tuple(packed.shape)), packed)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_bytes_are_the_entropy_of_the_codes_and_what_the_table_and_lanes_take(bits: int) -> None:
    torch.manual_seed(bits)
    codes = gaussian(500, 512, bits)
    form, stored = coded(pack_bits(codes, bits), bits, 512)
    least = codes.numel() * entropy(codes) / 8
    beside = 2 * 2**form.bits + 2 * form.lanes
    assert least * 0.99 < len(stored) < least * 1.007 + beside
    assert beside < 0.02 * least


def test_the_stream_is_the_documented_one() -> None:
    torch.manual_seed(1)
    for bits, columns in ((3, 5000), (4, 2501)):
        codes = gaussian(1, columns, bits)
        form, stored = coded(pack_bits(codes, bits), bits, columns)
        assert form.lanes > 1
        symbols = one_by_one(form, bytes(stored.tolist()), form.columns)
        assert torch.equal(pack_bits(torch.tensor([symbols], dtype=torch.uint8), form.bits), pack_bits(codes, bits))


def test_codes_that_leave_nothing_to_save_are_not_coded() -> None:
    torch.manual_seed(2)
    assert encode(torch.randint(256, (64, 64), dtype=torch.uint8), 4, 128) is None
    assert encode(torch.zeros(2, 1, dtype=torch.uint8), 4, 2) is None
    assert encode(torch.zeros(0, 8, dtype=torch.uint8), 4, 16) is None


def test_bytes_that_no_packing_makes_are_not_coded() -> None:
    packed = torch.zeros(50, 50, dtype=torch.uint8)
    assert encode(packed, 3, 133) is not None
    packed[:, -1] = 1 << 7  # a bit behind the last code of each row
    assert encode(packed, 3, 133) is None


def test_equal_codes_take_hardly_any_bytes() -> None:
    packed = pack_bits(torch.full((128, 128), 5, dtype=torch.uint8), 4)
    form, stored = coded(packed, 4, 128)
    assert len(stored) == 2 * 2**form.bits + 4 * form.lanes < packed.numel() / 30
    assert torch.equal(form.decode(stored, tuple(packed.shape)), packed)


def test_neighbours_that_depend_on_each_other_are_coded_together() -> None:
    torch.manual_seed(3)
    codes = torch.randint(16, (256, 512), dtype=torch.uint8)
    codes[:, 1::2] = codes[:, ::2]  # each alone is uniform
    assert len(coded(pack_bits(codes, 4), 4, 512)[1]) < 0.52 * codes.numel() / 2


def test_every_damage_to_a_stream_is_found() -> None:
    torch.manual_seed(4)
    packed = pack_bits(gaussian(64, 128, 4), 4)
    form, stored = coded(packed, 4, 128)
    table = 2 * 2**form.bits
    for place in (*range(0, table, 13), *range(table, len(stored), 397)):
        damaged = stored.clone()
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"add up|too early|where it began"):
            form.decode(damaged, tuple(packed.shape))
    for less in (1, 2, 1000, len(stored)):
        with pytest.raises(ValueError, match="should be"):
            form.decode(stored[:-less], tuple(packed.shape))
        with pytest.raises(ValueError, match=r"add up|too early|where it began|should be"):
            replace(form, size=form.size - less).decode(stored[:-less], tuple(packed.shape))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lanes": 1}, "where it began|too early"), ({"lanes": 2**30}, "should be"), ({"columns": 7}, "7 symbols"),
        ({"size": 5}, "5 should be"), ({"bits": 1, "columns": 512}, "add up"),
    ],
    ids=str,
)  # fmt: skip
def test_a_form_that_does_not_fit_the_bytes_is_refused(changed: dict[str, int], said: str) -> None:
    torch.manual_seed(5)
    packed = pack_bits(gaussian(64, 128, 4), 4)
    form, stored = coded(packed, 4, 128)
    with pytest.raises(ValueError, match=said):
        replace(form, **changed).decode(stored, tuple(packed.shape))


@pytest.mark.parametrize("data", [None, [], {}, {"bits": 9}, {"bits": 4, "columns": 8, "lanes": 0, "size": 9},
                                  {"bits": 4, "columns": 8, "lanes": 1, "size": 9, "more": 1}], ids=repr)  # fmt: skip
def test_a_form_that_this_version_does_not_write_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="entropy-coded"):
        CodedForm.from_json(data)


def test_a_form_survives_its_json() -> None:
    form = CodedForm(bits=4, columns=128, lanes=3, size=1000)
    assert CodedForm.from_json(form.to_json()) == form
