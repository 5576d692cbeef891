"""Floats of 4 and 8 bits: which numbers there are, rounding to them, and the scales of their blocks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.encodings import FloatForm, Spec, Weight, floats, pack
from compress.encodings.minifloat import MINIFLOATS, Minifloat
from compress.encodings.uniform import SEARCH_NORM

FP8 = FloatForm(bits=8, number="e4m3")
MXFP4 = FloatForm(bits=4, number="e2m1", groups=2, scale_type="e8m0")
NVFP4 = FloatForm(bits=4, number="e2m1", groups=4, scale_type="e4m3")
FORMS = {
    "fp8": FP8,
    "fp8 tensor": replace(FP8, row_blocks=1),
    "fp8 blocks": replace(FP8, row_blocks=2, groups=4),
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def weight(rows: int = 6, columns: int = 64, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=made) * torch.rand(rows, 1, generator=made).mul(4).exp()


def rounded(w: Tensor, form: FloatForm, search: str = "minmax", importance: Tensor | None = None) -> floats.Floats:
    return floats.quantize(w, form, floats.fit(w, form, search=search, importance=importance))  # type: ignore[arg-type]


def nearest(kind: Minifloat, value: float) -> set[float]:
    """The oracle: the nearest of all numbers there are, two of them halfway between."""
    signed = [float(m) for m in torch.cat([kind.magnitudes, -kind.magnitudes])]
    least = min(abs(value - each) for each in signed)
    return {each for each in signed if abs(value - each) == least}


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_e4m3_is_what_torch_casts_to_bit_for_bit_and_what_is_too_large_becomes_the_largest() -> None:
    kind, made = MINIFLOATS["e4m3"], torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(4000, generator=made) * 4.0**power for power in range(-7, 4)])
    halfway = (kind.magnitudes[1:] + kind.magnitudes[:-1]) / 2
    x = torch.cat([x, halfway, -halfway, kind.magnitudes, -kind.magnitudes]).clamp(-448, 448)
    expected = x.to(torch.float8_e4m3fn)
    assert torch.equal(kind.round(x), expected.float())
    assert torch.equal(kind.codes(kind.round(x)), expected.view(torch.uint8))
    assert kind.round(torch.tensor([449.0, 1e30, torch.inf, -torch.inf])).tolist() == [448, 448, 448, -448]
    assert kind.round(torch.tensor([torch.nan])).isnan().all()


def test_the_codes_of_e4m3_are_the_bits_of_torch_s_numbers() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    there = codes.view(torch.float8_e4m3fn).float()
    table = MINIFLOATS["e4m3"].table(torch.device("cpu")).values.flatten()
    assert torch.equal(table, there.nan_to_num())
    assert int(there.isnan().sum()) == 2


def test_e2m1_has_its_eight_magnitudes_and_ties_go_to_the_even_mantissa() -> None:
    kind = MINIFLOATS["e2m1"]
    assert kind.magnitudes.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert kind.round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert kind.round(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    assert kind.codes(torch.tensor([6.0, -0.5, -6.0])).tolist() == [7, 9, 15]
    for value in torch.linspace(-8, 8, 97).tolist():
        assert float(kind.round(torch.tensor(value))) in nearest(kind, max(min(value, 6.0), -6.0)), value


# --- scales -----------------------------------------------------------------------------------------------------------


@each_form
def test_what_is_stored_says_all_of_it(form: FloatForm) -> None:
    w = weight()
    found = rounded(w, form)
    assert found.defect() is None
    assert replace(found.form, scale_type=form.scale_type) == form
    spec, tensors = pack(Weight(encoding=found))
    assert Spec.from_json(spec.to_json()) == spec
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensors()
    lookup = found.lookup()
    assert lookup.scale is not None
    scale = lookup.scale.of().repeat_interleave(64 // form.groups, 1).expand(w.shape)
    unit = w / scale
    assert torch.equal(found.dequantize(), form.kind.round(unit) * scale)


@pytest.mark.parametrize(("name", "bits"), [("fp8", 8.25), ("mxfp4", 4.25), ("nvfp4", 4.5 + 32 / 384)])
def test_bits_per_weight_count_every_scale(name: str, bits: float) -> None:
    form = replace(FORMS[name], groups={"mxfp4": 2, "nvfp4": 4}.get(name, 1))
    assert rounded(weight(), form).bits_per_weight == pytest.approx(bits)


def test_the_usual_scale_of_mxfp4_is_the_power_of_two_of_the_specification() -> None:
    w = torch.zeros(1, 64)
    w[0, 3], w[0, 40] = 7.9, -0.3
    found = floats.fit(w, MXFP4)["scale"]
    assert found.tolist() == [[127 + 2 - 2, 127 - 2 - 2]]  # floor(log2(largest)) less that of 6
    assert rounded(w, MXFP4).dequantize()[0, 3] == 6, "beyond the largest number: cut"


def test_the_scales_of_nvfp4_are_e4m3_numbers_and_the_outer_one_a_power_of_two_that_holds_the_largest() -> None:
    for size in (1e-6, 1.0, 3e4):
        w = weight(seed=int(size)) * size
        tables = floats.fit(w, NVFP4)
        outer, inner = tables["outer_scale"], tables["scale"].view(torch.float8_e4m3fn).float()
        assert float(torch.frexp(outer).mantissa) == 0.5
        assert 128 <= float(inner.max()) <= 256
        wanted = w.view(6, 4, 16).abs().amax(-1) / 6 / outer
        assert torch.equal(inner, wanted.to(torch.float8_e4m3fn).float().clamp(min=2**-9))


@each_form
def test_a_search_finds_no_worse_scales_and_weighs_columns_where_asked(form: FloatForm) -> None:
    w, importance = weight(seed=3), torch.linspace(0, 4, 64).exp()

    def lost(found: floats.Floats, weighed: bool) -> float:
        error = (found.dequantize() - w).abs()
        return float((error**2 * importance).sum() if weighed else (error**SEARCH_NORM).sum())

    usual = rounded(w, form)
    assert lost(rounded(w, form, "mse"), weighed=False) <= lost(usual, weighed=False) * (1 + 1e-5)
    assert lost(rounded(w, form, "weighted", importance), weighed=True) <= lost(usual, weighed=True) * (1 + 1e-5)
    if form.scale_type != "float16":
        assert lost(rounded(w, form, "mse"), weighed=False) < lost(usual, weighed=False)


def test_a_block_whose_weights_are_2_3_and_4_of_something_is_kept_exactly_by_scaling_to_4_and_not_to_6() -> None:
    w = torch.tensor([[2.0, 3.0, 4.0, -4.0] * 16])
    assert not torch.equal(rounded(w, NVFP4).dequantize(), w)
    assert torch.equal(rounded(w, NVFP4, "mse").dequantize(), w)


@each_form
def test_zeros_stay_zero_and_a_weight_of_nothing_else_is_held(form: FloatForm) -> None:
    w = weight()
    w[:, ::3] = 0
    w[2] = 0
    assert bool((rounded(w, form).dequantize()[w == 0] == 0).all())
    assert not rounded(torch.zeros(6, 64), form).dequantize().any()
    assert rounded(torch.zeros(6, 64), form).defect() is None


@each_form
def test_rows_are_what_they_are_in_the_whole_and_put_together_again(form: FloatForm) -> None:
    found = rounded(weight(), form)
    whole = found.dequantize()
    assert torch.equal(found.rows(slice(1, 4)).dequantize(), whole[1:4])
    if form.row_blocks is None:
        parts = [found.rows(part) for part in (slice(0, 2), slice(2, 3), slice(3, 6))]
        assert torch.equal(parts[0].above(parts[1:]).dequantize(), whole)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"number": "e5m2"}, "'e5m2' of 4 bits .* reads e4m3 of 8 bits, e2m1 of 4 bits"),
        ({"bits": 5}, "'e2m1' of 5 bits"),
        ({"scale_type": "e3m4"}, "scales of type 'e3m4'"),
        ({"row_blocks": 4}, "6 rows cannot be split into 4"),
        ({"groups": 5}, "64 columns cannot be split into 5"),
        ({"row_blocks": 0}, "row_blocks 0"),
    ],
    ids=str,
)
def test_a_file_that_states_something_else_is_refused(changed: dict[str, object], message: str) -> None:
    spec, _ = pack(Weight(encoding=rounded(weight(), NVFP4)))
    with pytest.raises(ValueError, match=message):
        Spec.from_json({**spec.to_json(), **changed})


def test_codes_that_are_no_numbers_and_scales_that_are_none_are_defects() -> None:
    found = rounded(weight(), FP8)
    assert replace(found, codes=found.codes | 127).defect() == "codes that are no numbers"
    assert replace(found, scale=found.scale * 0).defect() == "scales that are not positive and finite"
    assert "do not fit 4 bits" in str(replace(rounded(weight(), MXFP4), codes=found.codes | 16).defect())
