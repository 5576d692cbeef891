"""Codes to bytes: exact for every width and odd shape, and the bytes are the documented ones."""

import pytest
import torch

from compress.encodings import reference
from compress.encodings.bits import pack_bits, row_bytes, unpack_bits

WIDTHS = range(1, 9)
SHAPES = [(1, 1), (1, 7), (3, 8), (2, 9), (5, 13), (4, 31), (1, 64), (2, 65), (7, 100)]


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(2**bits, (rows, columns), dtype=torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_agrees_with_the_oracle_byte_for_byte(shape: tuple[int, int], bits: int) -> None:
    codes = random_codes(*shape, bits)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert [bytes(row.tolist()) for row in packed] == [reference.pack_row(row.tolist(), bits) for row in codes]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_gives_the_codes_back(shape: tuple[int, int], bits: int) -> None:
    codes = random_codes(*shape, bits)
    back = unpack_bits(pack_bits(codes, bits), bits, shape[1])
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_agrees_with_the_oracle_on_bytes_it_did_not_write(bits: int) -> None:
    packed = torch.randint(256, (3, row_bytes(11, bits)), dtype=torch.uint8)
    expected = [reference.unpack_row(bytes(row.tolist()), bits, 11) for row in packed]
    assert unpack_bits(packed, bits, 11).tolist() == expected


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 127, 128])
def test_a_row_takes_the_bytes_its_bits_need_and_no_more(count: int, bits: int) -> None:
    assert row_bytes(count, bits) == (count * bits + 7) // 8
    assert pack_bits(random_codes(2, count, bits), bits).shape == (2, (count * bits + 7) // 8)


# Worked out by hand from the definition: code i stands in bits [i*bits, (i+1)*bits), lowest bit first.
GOLDEN = {
    1: ([1, 0, 1, 1, 0, 0, 0, 1, 1], "8d01"),
    2: ([0, 1, 2, 3, 3, 0, 1], "e413"),
    3: ([0, 1, 2, 3, 4, 5, 6, 7, 5], "88c6fa05"),
    4: ([1, 2, 15, 8, 5], "218f05"),
    5: ([1, 2, 3, 31, 16], "418c0f01"),
    6: ([1, 2, 3, 63, 33], "8130fc21"),
    7: ([1, 2, 127, 64], "01c11f08"),
    8: ([0, 1, 127, 255], "00017fff"),
}


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden_bytes(bits: int) -> None:
    codes, golden = GOLDEN[bits]
    packed = pack_bits(torch.tensor([codes], dtype=torch.uint8), bits)
    assert bytes(packed[0].tolist()).hex() == golden
    assert unpack_bits(packed, bits, len(codes)).tolist() == [codes]


@pytest.mark.parametrize("bits", WIDTHS)
def test_padding_bits_are_zero(bits: int) -> None:
    last = pack_bits(torch.full((1, 3), 2**bits - 1, dtype=torch.uint8), bits)[0, -1]
    used = 3 * bits % 8 or 8
    assert int(last) == 2**used - 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_that_are_not_contiguous_pack_the_same(bits: int) -> None:
    codes = random_codes(12, 9, bits)
    assert torch.equal(pack_bits(codes.T, bits), pack_bits(codes.T.contiguous(), bits))
    assert torch.equal(pack_bits(codes[:, ::2], bits), pack_bits(codes[:, ::2].contiguous(), bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_leaves_the_codes_alone(bits: int) -> None:
    codes = random_codes(3, 11, bits)
    before = codes.clone()
    pack_bits(codes, bits)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_codes_at_all_are_no_bytes(bits: int) -> None:
    nothing = torch.empty(1, 0, dtype=torch.uint8)
    packed = pack_bits(nothing, bits)
    assert packed.shape == (1, 0)
    assert unpack_bits(packed, bits, 0).shape == (1, 0)
