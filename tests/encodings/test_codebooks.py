"""Codebooks: what tables, row groups and scales promise, and how they lie in bytes."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.encodings import CodebookForm, Codebooks, Spec, Weight, pack, spec_of, unpack
from compress.encodings.bits import row_bytes
from compress.encodings.codebook import index_bits, nearest, stored_table, unscaled

ENTRIES = (2, 3, 5, 16, 17, 256)
SHAPES = [(1, 1), (6, 40), (5, 13), (3, 7)]
TINY, HUGE = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max


def make(
    rows: int = 6, columns: int = 40, entries: int = 5, tables: int = 1, scaled: bool = False, seed: int = 0
) -> Codebooks:
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(tables, entries, generator=g).half().sort(1).values
    codes = torch.randint(entries, (rows, columns), generator=g, dtype=torch.uint8)
    row_group = (torch.arange(rows) % tables).to(torch.uint8)
    scale = (torch.rand(rows, 1, generator=g) + 0.1).half() if scaled else None
    return Codebooks(codes, table, row_group, scale)


def masked(e: Codebooks, seed: int = 0) -> Weight:
    mask = torch.rand(e.codes.shape, generator=torch.Generator().manual_seed(100 + seed)) > 0.4
    return Weight(mask=mask, encoding=replace(e, codes=torch.where(mask, e.codes, e.idle())))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def assert_round_trip(weight: Weight) -> None:
    e = weight.encoding
    assert isinstance(e, Codebooks)
    assert e.defect() is None
    spec, tensors = pack(weight)
    assert spec == spec_of(weight)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == spec.tensors()
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == spec.num_bytes
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    back = unpack(spec, {n: t.clone() for n, t in tensors.items()})
    assert isinstance(back.encoding, Codebooks)
    for leaf in ("codes", "table", "row_group", "scale"):
        assert same(getattr(back.encoding, leaf), getattr(e, leaf)), leaf
    assert same(back.mask, weight.mask)
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_comes_back_exactly(
    entries: int, tables: int, scaled: bool, sparse: bool, shape: tuple[int, int]
) -> None:
    e = make(*shape, entries=entries, tables=tables, scaled=scaled)
    assert_round_trip(masked(e) if sparse else Weight(encoding=e))


@pytest.mark.parametrize("tables", [2, 5, 16, 17, 255, 256])
def test_the_table_of_each_row_comes_back_exactly(tables: int) -> None:
    assert_round_trip(Weight(encoding=make(300, 3, tables=tables)))


@pytest.mark.parametrize("scaled", [False, True])
def test_float32_tables_and_scales_come_back_exactly(scaled: bool) -> None:
    e = make(scaled=scaled, tables=2)
    wide = replace(e, table=e.table.float() * 1.000001, scale=None if e.scale is None else e.scale.float() * 1.000001)
    assert wide.form.table_dtype == "float32"
    assert_round_trip(Weight(encoding=wide))


def test_golden_bytes_of_a_sparse_weight_with_tables_and_scales() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    codes = torch.tensor([[4, 1, 2], [2, 0, 3]], dtype=torch.uint8)
    table = torch.tensor([[-2.0, -0.25, 0.5, 1.0, 2.0], [-1.0, -0.5, 0.25, 0.5, 1.0]], dtype=torch.float16)
    scale = torch.tensor([[1.0], [2.0]], dtype=torch.float16)
    e = Codebooks(codes, table, torch.tensor([1, 0], dtype=torch.uint8), scale)
    e = replace(e, codes=torch.where(mask, codes, e.idle()))
    assert e.codes.tolist() == [[4, 2, 2], [1, 0, 3]]  # under the mask: the entry nearest to zero
    spec, tensors = pack(Weight(mask=mask, encoding=e))
    assert {n: bytes(t.flatten().view(torch.uint8).tolist()).hex() for n, t in tensors.items()} == {
        "mask": "0506",
        "codes": "1406",  # 4, 2, 0, 3 in three bits each
        "table": "00c000b40038003c004000bc00b800340038003c",
        "row_group": "01",  # 1, 0 in one bit each
        "scale": "003c0040",
    }
    assert spec.to_json() == {
        "shape": [2, 3], "encoding": "codebook", "bits": 3, "entries": 5, "num_tables": 2, "scaled": True, "kept": 4,
        "layout": "compress-1",
    }  # fmt: skip
    assert torch.equal(unpack(spec, tensors).dequantize(), torch.tensor([[1.0, 0.0, 0.25], [0.0, -4.0, 2.0]]))


def test_one_table_without_scales_stores_nothing_but_codes_and_the_table() -> None:
    spec, tensors = pack(Weight(encoding=make(6, 40, entries=16)))
    assert set(tensors) == {"codes", "table"}
    assert spec.num_bytes == 6 * 20 + 16 * 2


@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize("tables", [1, 2, 6])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(6, 40), (7, 13)], ids=str)
def test_the_size_is_that_of_the_formula_but_for_rows_padded_to_bytes(
    entries: int, tables: int, scaled: bool, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    e = make(rows, columns, entries=entries, tables=tables, scaled=scaled)
    width = (entries - 1).bit_length()
    numbers = rows * (tables - 1).bit_length()
    exact = rows * columns * width + tables * entries * 16 + numbers + 16 * rows * scaled
    padding = rows * (-columns * width % 8) + (-numbers % 8)
    assert pack(Weight(encoding=e))[0].num_bytes * 8 == exact + padding
    assert e.bits_per_weight == pytest.approx((exact + (-numbers % 8)) / (rows * columns))


def test_an_index_takes_the_bits_of_the_largest_number_it_may_be() -> None:
    assert {n: index_bits(n) for n in (1, 2, 3, 4, 5, 16, 17, 255, 256)} == {
        1: 0, 2: 1, 3: 2, 4: 2, 5: 3, 16: 4, 17: 5, 255: 8, 256: 8,
    }  # fmt: skip


@pytest.mark.parametrize("tables", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_value_is_looked_up_in_the_table_of_its_row(tables: int, scaled: bool) -> None:
    e = make(entries=17, tables=tables, scaled=scaled)
    dense = e.dequantize()
    assert dense.dtype == torch.float32
    for row in range(6):
        for column in range(40):
            value = float(e.table[int(e.row_group[row]), int(e.codes[row, column])])
            factor = 1.0 if e.scale is None else float(e.scale[row, 0])
            assert float(dense[row, column]) == torch.tensor(value, dtype=torch.float32) * factor


def test_dequantized_values_may_be_written_to() -> None:
    e = make(tables=2)
    before = e.table.clone()
    e.dequantize().zero_()
    assert torch.equal(e.table, before)


@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_no_other_entry_is_nearer(entries: int, tables: int, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    e = make(entries=entries, tables=tables, scaled=scaled)
    w = torch.randn(e.codes.shape, generator=torch.Generator().manual_seed(5))
    codes = nearest(w, e.table, e.row_group, e.scale)
    values = e.table.float()[e.row_group.long()][:, None, :] * (1.0 if e.scale is None else e.scale.float()[..., None])
    lost = (values - w[..., None]).abs()
    chosen = lost.gather(2, codes.long()[..., None])[..., 0]
    assert codes.dtype == torch.uint8
    assert torch.allclose(chosen, lost.amin(2), rtol=0, atol=1e-6)
    monkeypatch.setattr("compress.encodings.codebook.CHUNK", 2 * 40)
    assert torch.equal(nearest(w, e.table, e.row_group, e.scale), codes)  # in pieces or whole


def test_halfway_between_two_entries_the_lower_one_is_chosen() -> None:
    table = torch.tensor([[0.0, 1.0, 3.0], [-1.0, 1.0, 1.0]])
    w = torch.tensor([[0.5, 2.0, 2.01], [0.0, 1.0, 9.0]])
    assert nearest(w[:1], table[:1], torch.tensor([0])).tolist() == [[0, 1, 2]]
    assert nearest(w, table, torch.tensor([0, 1])).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_entries_of_the_table_are_found_again() -> None:
    e = make(entries=17, tables=3, scaled=True)
    assert torch.equal(nearest(e.dequantize(), e.table, e.row_group, e.scale), e.codes)


def test_a_row_whose_scale_is_zero_is_zero() -> None:
    e = make(scaled=True)
    assert e.scale is not None
    scale = e.scale.clone()
    scale[2] = 0
    e = replace(e, scale=scale)
    assert e.defect() is None
    assert bool((e.dequantize()[2] == 0).all())
    assert bool((unscaled(torch.ones(6, 40), scale)[2] == 0).all())
    assert_round_trip(Weight(encoding=e))


@pytest.mark.parametrize("tables", [1, 3])
def test_the_idle_code_is_the_entry_nearest_to_zero(tables: int) -> None:
    e = make(entries=16, tables=tables)
    idle = e.idle().expand(e.codes.shape)
    assert idle.dtype == torch.uint8
    there = replace(e, codes=idle.contiguous()).dequantize().abs()
    least = e.table.float().abs().amin(1)[e.row_group.long()]
    assert torch.equal(there, least[:, None].expand(there.shape))


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("part", [slice(0, 2), slice(3, 6), slice(5, 6)], ids=str)
def test_some_rows_mean_what_they_meant(tables: int, scaled: bool, part: slice) -> None:
    e = make(tables=tables, scaled=scaled)
    some = e.rows(part)
    assert torch.equal(some.dequantize(), e.dequantize()[part])
    assert torch.equal(some.idle().expand(some.codes.shape), e.idle().expand(e.codes.shape)[part])
    assert_round_trip(Weight(encoding=some))


def test_some_rows_store_their_scales_as_narrow_as_those_rows_allow() -> None:
    e = make(scaled=True)
    assert e.scale is not None
    scale = e.scale.float()
    scale[0] = 1e-7
    e = replace(e, scale=scale)
    assert e.rows(slice(0, 2)).form.scale_dtype == "float32"
    assert e.rows(slice(1, 3)).form.scale_dtype == "float16"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codes": torch.full((6, 40), 5, dtype=torch.uint8)}, "codes beyond tables of 5"),
        ({"codes": torch.zeros(6, 40, dtype=torch.int16)}, "do not fit 3 bits"),
        ({"row_group": torch.full((6,), 2, dtype=torch.uint8)}, "beyond the 2"),
        ({"row_group": torch.zeros(5, dtype=torch.uint8)}, "one table for each row"),
        ({"table": torch.tensor([[0, 1, 2, 3, torch.inf]] * 2).half()}, "not finite"),
        ({"table": torch.tensor([[0, 1, 2, 3, torch.nan]] * 2).half()}, "not finite"),
        ({"table": torch.tensor([[0, 1, 3, 2, 4]] * 2).half()}, "ascending"),
        ({"table": torch.zeros(2, 1).half()}, "1 entries"),
        ({"table": torch.zeros(2, 257).half()}, "257 entries"),
        ({"scale": torch.full((6, 1), -1.0).half()}, "scales"),
        ({"scale": torch.full((6, 1), torch.inf).half()}, "scales"),
        ({"scale": torch.full((6, 1), torch.nan).half()}, "scales"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_what_is_impossible_is_refused(change: dict[str, Tensor], said: str) -> None:
    e = make(tables=2, scaled=True)
    assert e.defect() is None
    defect = replace(e, **change).defect()
    assert defect is not None
    assert said in defect


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_tables_are_rounded_to_float16_where_it_holds_them(size: float) -> None:
    table = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * size
    assert torch.equal(stored_table(table), table.half().float())


@pytest.mark.parametrize("largest", [TINY / 2, HUGE * 1.01, 1e-7, 1e6])
def test_a_table_that_float16_would_overflow_or_crush_keeps_its_values(largest: float) -> None:
    table = torch.tensor([[-0.3, 0.1, 1.0], [-0.5, 0.0, 1.0]])
    table[0] *= largest
    out = stored_table(table)
    assert torch.equal(out[0], table[0])
    assert torch.equal(out[1], table[1].half().float())  # each table for itself


@pytest.mark.parametrize("largest", [TINY, HUGE])
def test_tables_at_the_edge_of_float16_keep_their_meaning(largest: float) -> None:
    for factor in (0.9, 0.999, 1.0, 1.001, 1.1):
        table = torch.tensor([[-0.7, -0.01, 0.25, 1.0]]) * largest * factor
        assert torch.allclose(stored_table(table), table, rtol=0, atol=float(table.abs().max()) * 2**-11)


def test_a_table_of_zeros_is_possible() -> None:
    assert torch.equal(stored_table(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_a_file_without_the_number_of_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="entries"):
        Spec.from_json({"shape": [2, 2], "layout": "compress-1", "encoding": "codebook", "bits": 3})


def test_the_row_numbers_of_a_form_take_whole_bytes_once() -> None:
    form = CodebookForm(bits=3, entries=8, num_tables=5)
    assert form.tables((30, 40))["row_group"] == ((1, row_bytes(30, 3)), torch.uint8)
