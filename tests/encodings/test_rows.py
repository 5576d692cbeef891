"""Rows of a packed weight that are looked up: the same bits as those of the whole, and no other row is decoded."""

import pytest
import torch
from runtime_layers import ENCODINGS, FEW, weight
from selection import only

from compress.encodings import Weight, pack, unpack
from compress.encodings.rows import decode_rows, row_starts, streamed

ROWS = torch.tensor([5, 0, 11, 11, 3])


def assert_same_rows(of: Weight, rows: torch.Tensor = ROWS) -> None:
    spec, tensors = pack(of)
    starts = row_starts(spec, tensors) if streamed(spec) else None
    found, expected = decode_rows(spec, tensors, rows, starts), unpack(spec, tensors).dequantize()[rows]
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("mask", ["", "2:4", "half"])
@pytest.mark.parametrize("name", only(FEW, ENCODINGS))
def test_rows_of_every_encoding_are_the_same_bit_for_bit(name: str, mask: str) -> None:
    assert_same_rows(weight(name, 12, 64, mask=mask))


@pytest.mark.parametrize("shape", [(12, 7), (12, 31), (12, 66)])
@pytest.mark.parametrize("name", only(FEW, ENCODINGS))
def test_rows_need_not_end_where_a_byte_does(name: str, shape: tuple[int, int]) -> None:
    assert_same_rows(weight(name, *shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_values_are_read_with_and_without_a_mask(dtype: torch.dtype) -> None:
    values = torch.randn(12, 20).to(dtype)
    assert_same_rows(Weight(values))
    for mask in (torch.rand(12, 20) < 0.3, torch.arange(20).expand(12, 20) % 4 < 2, torch.zeros(12, 20).bool()):
        assert_same_rows(Weight(values * mask, mask))


def test_more_rows_than_there_are_and_none_at_all() -> None:
    for name in ENCODINGS:
        assert_same_rows(weight(name, 12, 64), torch.randint(12, (40,)))
        assert_same_rows(weight(name, 12, 64, mask="half"), torch.empty(0, dtype=torch.int64))
