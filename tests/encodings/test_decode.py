"""Values straight from packed tensors: the same bits as codes first and their meaning then."""

import pytest
import torch
from runtime_layers import ENCODINGS, FEW, weight
from selection import only

from compress.encodings import Weight, pack, unpack
from compress.encodings.decode import Decoder, indices
from compress.encodings.lookup import codes_an_index
from compress.encodings.weight import spread


def assert_same_bits(of: Weight) -> None:
    spec, tensors = pack(of)
    found, expected = Decoder(spec, tensors).dequantize(), unpack(spec, tensors).dequantize()
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("mask", ["", "2:4", "half"])
@pytest.mark.parametrize("name", only(FEW, ENCODINGS))
def test_every_encoding_is_looked_up_bit_for_bit(name: str, mask: str) -> None:
    assert_same_bits(weight(name, mask=mask))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 31), (2, 66)])
@pytest.mark.parametrize("name", only(FEW, ENCODINGS))
def test_rows_need_not_end_where_a_byte_does(name: str, shape: tuple[int, int]) -> None:
    assert_same_bits(weight(name, *shape))


@pytest.mark.parametrize("name", ["uniform 3 groups", "uniform 4 tensor", "codebook 4 tables", "olive int4"])
def test_tiles_of_rows_make_up_the_whole(name: str) -> None:
    spec, tensors = pack(weight(name, 70, 64))
    decoder = Decoder(spec, tensors)
    tiles = [decoder.rows(part) for part in decoder.tiles(16 * 64)]
    assert [len(t) for t in tiles] == [16, 16, 16, 16, 6]
    assert torch.equal(torch.cat(tiles), unpack(spec, tensors).dequantize())


def test_a_weight_larger_than_a_tile_is_the_same() -> None:
    assert_same_bits(weight("uniform 3 groups", 1030, 512))


def test_a_correction_is_added() -> None:
    assert_same_bits(weight("codebook 4", rank=3))


@pytest.mark.parametrize("bits", range(2, 9))
def test_an_index_holds_neighbouring_codes_the_first_in_its_low_bits(bits: int) -> None:
    of = weight(f"uniform {bits}", 4, 64)
    _, tensors = pack(of)
    count = codes_an_index(bits)
    found = indices(tensors["codes"], bits, count).view(4, -1)
    assert of.encoding is not None
    codes = of.encoding.codes.int().view(4, -1, count)
    assert torch.equal(found, (codes << (bits * torch.arange(count, dtype=torch.int32))).sum(-1, dtype=torch.int32))


def test_kept_values_are_spread_with_zeros_between() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    assert torch.equal(spread(torch.tensor([5, 6, 7]), mask), torch.tensor([[0, 5, 6], [7, 0, 0]]))
    assert torch.equal(spread(torch.zeros(0), torch.zeros(2, 3, dtype=torch.bool)), torch.zeros(2, 3))
