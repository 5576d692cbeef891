"""A weight as it is kept: every kind goes to its stored tensors and comes back the same."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.encodings import Spec, Uniform, Weight, fit, pack, quantize, spec_of, unpack
from compress.encodings.bits import pack_bits

KINDS = ["dense", "sparse", "quantized", "sparse-quantized"]


def dense(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns)


def make(
    kind: str,
    rows: int = 6,
    columns: int = 40,
    *,
    bits: int = 4,
    groups: int = 1,
    per_tensor: bool = False,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Weight:
    values = dense(rows, columns)
    mask = torch.rand(rows, columns) > 0.4 if "sparse" in kind else None
    if mask is not None:
        values = values * mask
    if "quantized" not in kind:
        return Weight(values.to(dtype), mask)
    scale, zero = fit(values, bits, groups=groups, per_tensor=per_tensor, symmetric=symmetric)
    return Weight(mask=mask, encoding=Uniform(quantize(values, scale, zero, bits), scale, zero, bits, symmetric))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def assert_equal(a: Weight, b: Weight) -> None:
    assert a.kind == b.kind
    assert same(a.values, b.values)
    assert same(a.mask, b.mask)
    assert (a.encoding is None) == (b.encoding is None)
    if a.encoding and b.encoding:
        for leaf in ("codes", "scale", "zero_point"):
            assert same(getattr(a.encoding, leaf), getattr(b.encoding, leaf)), leaf
        assert (a.encoding.bits, a.encoding.symmetric) == (b.encoding.bits, b.encoding.symmetric)


def assert_round_trip(weight: Weight) -> None:
    spec, tensors = pack(weight)
    assert spec == spec_of(weight)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == spec.tensors()
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == spec.num_bytes
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    back = unpack(spec, tensors)
    assert_equal(back, weight)
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (6, 40), (5, 13), (3, 1)], ids=str)
def test_values_come_back_exactly(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_round_trip(make(kind, *shape, dtype=dtype))


@pytest.mark.parametrize("kind", ["quantized", "sparse-quantized"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (6, 40), (5, 13), (3, 7)], ids=str)
def test_codes_come_back_exactly(kind: str, bits: int, symmetric: bool, shape: tuple[int, int]) -> None:
    assert_round_trip(make(kind, *shape, bits=bits, symmetric=symmetric))


@pytest.mark.parametrize("kind", ["quantized", "sparse-quantized"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("options", [{"groups": 5}, {"groups": 40}, {"per_tensor": True}], ids=str)
def test_groups_come_back_exactly(kind: str, symmetric: bool, options: dict[str, int]) -> None:
    assert_round_trip(make(kind, bits=3, symmetric=symmetric, **options))


@pytest.mark.parametrize("kind", ["quantized", "sparse-quantized"])
def test_a_single_row_with_one_scale_comes_back_exactly(kind: str) -> None:
    assert_round_trip(make(kind, 1, 40, per_tensor=True))


def test_float32_scales_come_back_exactly() -> None:
    weight = make("quantized")
    e = weight.encoding
    assert e is not None
    assert_round_trip(Weight(encoding=replace(e, scale=e.scale.float() * 1.000001)))


@pytest.mark.parametrize("kind", ["sparse", "sparse-quantized"])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kept", [False, True])
def test_masks_that_keep_everything_or_nothing_come_back(kind: str, bits: int, kept: bool) -> None:
    weight = make(kind, 3, 10, bits=bits)
    mask = torch.full((3, 10), kept)
    if weight.encoding is not None:
        e = weight.encoding
        codes = torch.where(mask, e.codes, e.zero_point.expand(3, 10))
        assert_round_trip(Weight(mask=mask, encoding=replace(e, codes=codes)))
    else:
        assert weight.values is not None
        assert_round_trip(Weight(weight.values * mask, mask))


@pytest.mark.parametrize("kind", ["sparse", "sparse-quantized"])
def test_a_kept_weight_that_is_exactly_zero_stays_kept(kind: str) -> None:
    mask = torch.tensor([[True, True, False, True]])
    values = torch.tensor([[1.0, 0.0, 0.0, -2.0]])
    weight = Weight(values, mask)
    if kind == "sparse-quantized":
        scale, zero = fit(values, 4)
        weight = Weight(mask=mask, encoding=Uniform(quantize(values, scale, zero, 4), scale, zero, 4, False))
    spec, tensors = pack(weight)
    assert spec.kept == 3
    back = unpack(spec, tensors)
    assert back.mask is not None
    assert back.mask.tolist() == [[True, True, False, True]]
    assert back.dequantize()[0, 1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_told_from_what_is_there(kind: str) -> None:
    weight = make(kind)
    assert weight.kind == kind
    assert unpack(*pack(weight)).kind == kind


@pytest.mark.parametrize("kind", ["sparse", "sparse-quantized"])
def test_masked_positions_dequantize_to_exactly_zero(kind: str) -> None:
    weight = make(kind)
    assert weight.mask is not None
    assert bool((weight.dequantize()[~weight.mask] == 0).all())


def test_sizes_follow_the_documented_layout() -> None:
    assert pack(make("dense", 6, 40, dtype=torch.bfloat16))[0].num_bytes == 6 * 40 * 2
    assert pack(make("quantized", 6, 40, bits=4, groups=5))[0].num_bytes == 6 * 20 + 6 * 5 * 2 + 6 * 3
    assert pack(make("quantized", 6, 40, bits=3, groups=5, symmetric=True))[0].num_bytes == 6 * 15 + 6 * 5 * 2
    assert pack(make("quantized", 6, 40, bits=4, per_tensor=True))[0].num_bytes == 6 * 20 + 2 + 1
    spec, _ = pack(make("sparse", 6, 41))
    assert spec.num_bytes == 6 * 6 + spec.kept * 4
    spec, _ = pack(make("sparse-quantized", 6, 41, bits=3))
    assert spec.num_bytes == 6 * 6 + -(-spec.kept * 3 // 8) + 6 * 2 + 6


def patterned(rows: int, columns: int, keep: int, of: int) -> Tensor:
    """A random mask that keeps exactly `keep` in every run of `of` columns."""
    highest = torch.rand(rows, columns // of, of).argsort(-1)[..., :keep]
    return torch.zeros(rows, columns // of, of, dtype=torch.bool).scatter_(-1, highest, True).view(rows, columns)


def int4(mask: Tensor, groups: int, symmetric: bool) -> Weight:
    values = dense(*mask.shape) * mask
    scale, zero = fit(values, 4, groups=groups, symmetric=symmetric)
    return Weight(mask=mask, encoding=Uniform(quantize(values, scale, zero, 4), scale, zero, 4, symmetric))


def float16(mask: Tensor) -> Weight:
    return Weight((dense(*mask.shape) * mask).half(), mask)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [192, 768, 4608])
def test_two_of_four_in_four_bits_cost_two_and_two_thirds_bits_a_weight_and_scales(
    columns: int, symmetric: bool
) -> None:
    spec, _ = pack(int4(patterned(6, columns, 2, 4), columns // 64, symmetric))
    zeros = 0 if symmetric else 6 * -(-columns // 64 // 2)
    assert spec.num_bytes * 3 == 6 * columns + 3 * (6 * columns // 64 * 2 + zeros)  # 8 / 3 bits are a third of a byte


@pytest.mark.parametrize("columns", [64, 192])
def test_four_of_eight_in_four_bits_cost_two_and_seven_eighths_bits_a_weight_and_scales(columns: int) -> None:
    spec, _ = pack(int4(patterned(6, columns, 4, 8), columns // 64, True))
    assert spec.num_bytes == 6 * columns * 23 // 64 + 6 * columns // 64 * 2


@pytest.mark.parametrize("columns", [12, 20, 60, 100, 128])
def test_only_the_pattern_of_a_row_is_padded(columns: int) -> None:
    mask, words = patterned(6, columns, 2, 4), 6 * -(-columns // 12)  # three runs a byte
    assert pack(float16(mask))[0].num_bytes == words + 6 * columns
    assert pack(int4(mask, 1, True))[0].num_bytes == words + 6 * columns * 2 // 8 + 6 * 2


def test_an_unstructured_half_costs_a_bitmap_and_what_is_kept() -> None:
    mask = torch.rand(6, 100).argsort(1) < 50
    assert pack(float16(mask))[0].num_bytes == 6 * 13 + 6 * 50 * 2
    assert pack(int4(mask, 1, True))[0].num_bytes == 6 * 13 + 6 * 50 * 4 // 8 + 6 * 2


@pytest.mark.parametrize("make", [float16, lambda mask: int4(mask, 1, False)], ids=["float16", "int4"])
@pytest.mark.parametrize("columns", [72, 120, 128])
@pytest.mark.parametrize(("keep", "of"), [(1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (3, 8), (4, 8), (7, 8)])
def test_weights_with_a_pattern_come_back_exactly(
    keep: int, of: int, columns: int, make: Callable[[Tensor], Weight]
) -> None:
    weight = make(patterned(5, columns, keep, of))
    assert str(spec_of(weight).pattern) == f"{keep}:{of}"
    assert_round_trip(weight)


@pytest.mark.parametrize("make", [float16, lambda mask: int4(mask, 1, False)], ids=["float16", "int4"])
def test_a_bitmap_of_a_mask_with_a_pattern_is_read(make: Callable[[Tensor], Weight]) -> None:
    weight = make(patterned(5, 60, 2, 4))
    assert weight.mask is not None
    spec, tensors = pack(weight)
    del tensors["pattern"]
    bitmap = {k: v for k, v in spec.to_json().items() if k != "pattern"}
    assert_equal(unpack(Spec.from_json(bitmap), {**tensors, "mask": pack_bits(weight.mask.to(torch.uint8), 1)}), weight)


def test_golden_bytes_of_a_weight_with_a_pattern() -> None:
    # The numbers with two of four bits set are 3, 5, 6, 9, 10 and 12: ranks 0 to 5. Lowest bit first, the runs of the
    # first row are 12, 3 and 10: 5 + 0 * 6 + 4 * 36 = 149. Those of the second are 5, 9 and 6: 1 + 3 * 6 + 2 * 36 = 91.
    mask = torch.tensor([[int(bit) for bit in row] for row in ("001111000101", "101010010110")]).bool()
    kept = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4], dtype=torch.uint8)
    codes = torch.full((2, 12), 4, dtype=torch.uint8).masked_scatter_(mask, kept)
    scale = torch.tensor([[0.5], [0.25]], dtype=torch.float16)
    e = Uniform(codes, scale, torch.full((2, 1), 4, dtype=torch.uint8), 3, True)
    spec, tensors = pack(Weight(mask=mask, encoding=e))
    assert {n: bytes(t.flatten().view(torch.uint8).tolist()).hex() for n, t in tensors.items()} == {
        "pattern": "955b",
        "codes": "d1581fd108",
        "scale": "00380034",
    }
    assert spec.to_json() == {
        "shape": [2, 12], "encoding": "uniform", "bits": 3, "symmetric": True, "kept": 12, "pattern": "2:4",
        "layout": "compress-1",
    }  # fmt: skip


def test_golden_bytes_of_a_sparse_quantized_weight() -> None:
    mask = torch.tensor([[True, False, True, True], [False, True, False, True]])
    codes = torch.tensor([[1, 5, 2, 3], [6, 7, 6, 4]], dtype=torch.uint8)
    scale = torch.tensor([[0.5], [0.25]], dtype=torch.float16)
    zero = torch.tensor([[5], [6]], dtype=torch.uint8)
    spec, tensors = pack(Weight(mask=mask, encoding=Uniform(codes, scale, zero, 3, False)))
    assert {n: bytes(t.flatten().view(torch.uint8).tolist()).hex() for n, t in tensors.items()} == {
        "mask": "0d0a",
        "codes": "d14e",  # 1, 2, 3, 7, 4 in three bits each
        "scale": "00380034",
        "zero_point": "0506",
    }
    assert spec.to_json() == {
        "shape": [2, 4], "encoding": "uniform", "bits": 3, "kept": 5, "layout": "compress-1",
    }  # fmt: skip


def test_a_spec_says_only_what_is_not_default() -> None:
    assert pack(make("dense", 2, 3))[0].to_json() == {"shape": [2, 3], "layout": "compress-1"}


def test_an_unknown_layout_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'compress-9'.*reads 'compress-1'"):
        Spec.from_json({"shape": [2, 2], "layout": "compress-9"})
    with pytest.raises(ValueError, match="layout None"):
        Spec.from_json({"shape": [2, 2]})


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="rotation"):
        Spec.from_json({"shape": [2, 2], "layout": "compress-1", "rotation": 4})


def test_an_unknown_pattern_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'2:5'.*2:4"):
        Spec.from_json({"shape": [2, 10], "layout": "compress-1", "kept": 8, "pattern": "2:5"})


def test_a_pattern_without_the_number_of_kept_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="missing beside the pattern 2:4"):
        Spec.from_json({"shape": [2, 12], "layout": "compress-1", "pattern": "2:4"})


IMPOSSIBLE: dict[str, dict[str, object]] = {
    "no shape": {"shape": None},
    "a shape of texts": {"shape": ["4", "8"]},
    "a shape of fractions": {"shape": [4.0, 8.0]},
    "three sizes": {"shape": [4, 8, 2]},
    "more kept than there are": {"kept": 33},
    "bits as a text": {"bits": "4"},
    "no bits": {"bits": 0},
    "true for a number": {"groups": True},
    "groups that do not fill a row": {"groups": 3},
    "a number for true": {"symmetric": 1},
    "a type that is none": {"scale_dtype": "load"},
    "a family that is a list": {"encoding": ["uniform"]},
    "a pattern that is a list": {"pattern": ["2:4"], "kept": 16},
    "another number than the pattern keeps": {"pattern": "2:4", "kept": 8},
    "a correction that is a list": {"low_rank": [1]},
    "a correction of a negative rank": {"low_rank": {"rank": -1}},
    "an input's grid that is a text": {"inputs": "int8"},
}


@pytest.mark.parametrize("changed", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_no_weight_can_be_is_a_value_error(changed: dict[str, object]) -> None:
    good = {"shape": [4, 8], "layout": "compress-1", "encoding": "uniform", "bits": 4, "groups": 2}
    assert Spec.from_json(good).num_bytes
    with pytest.raises(ValueError, match=r"."):
        Spec.from_json({**good, **changed})


@pytest.mark.parametrize("kind", KINDS)
def test_packing_leaves_the_weight_alone(kind: str) -> None:
    weight = make(kind, bits=8)
    before = weight.dequantize().clone()
    spec, tensors = pack(weight)
    unpacked = unpack(spec, tensors).dequantize().clone()
    assert torch.equal(weight.dequantize(), before)
    assert torch.equal(unpacked, before)
