"""Low-rank corrections: bytes, sizes, and what they add to a weight."""

import json

import pytest
import torch
from textbook import mask, weight
from torch import Tensor

from compress.encodings import LowRankFactors, Spec, Uniform, Weight, fit, pack, quantize, spec_of, unpack
from compress.encodings.low_rank import LowRankForm


def uniform(w: Tensor, bits: int, groups: int = 1) -> Uniform:
    scale, zero = fit(w, bits, groups=groups, symmetric=True)
    return Uniform(quantize(w, scale, zero, bits), scale, zero, bits, symmetric=True)


def correction(rows: int, columns: int, rank: int, bits: int | None = None, groups: int = 1) -> LowRankFactors:
    a, b = weight(rank, columns, seed=1), weight(rows, rank, seed=2)
    return (
        LowRankFactors(a.half(), b.half())
        if bits is None
        else LowRankFactors(uniform(a, bits, groups), uniform(b, bits))
    )


CORRECTIONS = [
    {"rank": 3},
    {"rank": 3, "bits": 4},
    {"rank": 5, "bits": 8, "groups": 2},
    {"rank": 1, "bits": 4, "groups": 4},
]


def bases(w: Tensor) -> dict[str, Weight]:
    kept = mask(*w.shape)
    coded = uniform(w, 3)
    masked = Uniform(torch.where(kept, coded.codes, coded.idle()), coded.scale, coded.zero_point, 3, symmetric=True)
    return {
        "dense": Weight(w),
        "sparse": Weight(w * kept, kept),
        "quantized": Weight(encoding=coded),
        "sparse-quantized": Weight(mask=kept, encoding=masked),
    }


@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
@pytest.mark.parametrize("kind", bases(weight(7, 16)))
def test_what_is_stored_reads_back_bit_for_bit_and_has_the_size_it_says(kind: str, options: dict[str, int]) -> None:
    base = bases(weight(7, 16))[kind]
    corrected = Weight(base.values, base.mask, base.encoding, low_rank=correction(7, 16, **options))
    spec, tensors = pack(corrected)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == spec.tensors()
    assert spec.num_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    again = unpack(Spec.from_json(json.loads(json.dumps(spec.to_json()))), tensors)
    assert torch.equal(again.dequantize(), corrected.dequantize())
    assert spec == spec_of(again)
    assert spec.kind == corrected.kind == f"{kind}-compensated"


def test_the_correction_is_added_to_all_of_the_weight_and_the_base_keeps_its_zeros() -> None:
    base = bases(weight(7, 16))["sparse-quantized"]
    extra = correction(7, 16, rank=3)
    corrected = Weight(mask=base.mask, encoding=base.encoding, low_rank=extra)
    a, b = extra.factors()
    assert torch.equal(corrected.base(), base.dequantize())
    assert torch.equal(corrected.dequantize(), base.dequantize() + b @ a)


@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
def test_factors_alone_are_a_weight(options: dict[str, int]) -> None:
    factors = correction(7, 16, **options)
    alone = Weight(low_rank=factors)
    spec, tensors = pack(alone)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == spec.tensors()
    assert all(name.startswith("lora_") for name in tensors)
    again = unpack(Spec.from_json(json.loads(json.dumps(spec.to_json()))), tensors)
    assert torch.equal(again.dequantize(), factors.product())
    assert torch.equal(alone.base(), torch.zeros(7, 16))
    assert torch.equal(alone.rows(slice(2, 5)).base(), torch.zeros(3, 16))
    torch.testing.assert_close(alone.rows(slice(2, 5)).dequantize(), factors.product()[2:5])
    assert spec == spec_of(again)
    assert spec.kind == alone.kind == "low-rank"


@pytest.mark.parametrize("more", [{}, {"low_rank": {"rank": 3}, "kept": 5}])
def test_a_weight_of_nothing_and_factors_under_a_mask_are_refused(more: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="without values has a low-rank form, and no mask"):
        Spec.from_json({"shape": [7, 16], "layout": "compress-1", "value_dtype": None, **more})


def test_some_rows_are_those_of_the_whole() -> None:
    corrected = Weight(weight(8, 16), low_rank=correction(8, 16, rank=3, bits=8))
    part = corrected.rows(slice(2, 5)).dequantize()
    torch.testing.assert_close(part, corrected.dequantize()[2:5])


def test_sixteen_bits_a_number_or_codes_with_their_scales() -> None:
    plain = spec_of(Weight(weight(64, 128), low_rank=correction(64, 128, rank=4)))
    coded = spec_of(Weight(weight(64, 128), low_rank=correction(64, 128, rank=4, bits=4, groups=2)))
    bare = spec_of(Weight(weight(64, 128)))
    assert plain.num_bytes - bare.num_bytes == 2 * 4 * (64 + 128)
    assert coded.num_bytes - bare.num_bytes == 4 * (64 + 128) // 2 + 2 * (4 * 2 + 64)


@pytest.mark.parametrize(
    "broken",
    [
        LowRankFactors(torch.zeros(3, 15), torch.zeros(7, 3)),
        LowRankFactors(torch.zeros(3, 16), torch.zeros(7, 2)),
        LowRankFactors(torch.zeros(3, 16), torch.full((7, 3), torch.nan)),
    ],
)
def test_what_cannot_be_is_a_defect(broken: LowRankFactors) -> None:
    assert broken.defect((7, 16))
    assert correction(7, 16, rank=3).defect((7, 16)) is None
    assert correction(7, 16, rank=3, bits=4).defect((7, 16)) is None


def test_fields_of_a_newer_version_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shine.*not known"):
        LowRankForm.from_json({"rank": 3, "shine": 1})
    with pytest.raises(ValueError, match=r"rank.*missing"):
        LowRankForm.from_json({})
