"""Power levels: where they lie, which is nearest, and which exponent and range fit a weight."""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from selection import only
from torch import Tensor

from compress.encodings import Power, Spec, Weight, pack, spec_of, unpack
from compress.encodings.power import (
    EMPTY,
    EXPONENTS,
    Levels,
    PowerGrid,
    Profile,
    dequantize,
    fit_exponent,
    fit_scale,
    level_values,
    nearest,
    profile,
)

BITS = range(2, 9)
SPREAD = (0.1, 0.25, 0.6, 0.83, 1.0, 1.2, 1.5)
each_layout = pytest.mark.parametrize("levels", ["zero", "half"])
each_bits = pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))


def normal(rows: int = 6, columns: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def laplace(rows: int, columns: int, seed: int = 0) -> Tensor:
    u = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def kept_of(rows: int, columns: int, share: float = 0.4) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(7)) >= share


def at(w: Tensor, bits: int, exponent: float, levels: Levels, mask: Tensor | None = None, **options: object) -> Power:
    """Rounded on the levels of a given exponent."""
    grid = PowerGrid(bits, exponent, levels)
    return nearest(w, fit_scale(w, grid, mask=mask, **options), grid, mask)


def lost(e: Power, w: Tensor, norm: float = 2.0) -> float:
    return float((e.dequantize() - w).abs().double().pow(norm).sum())


# --- levels -----------------------------------------------------------------------------------------------------------


@each_bits
@each_layout
def test_levels_increase_and_are_odd_symmetric_from_minus_one_to_one(bits: int, levels: Levels) -> None:
    for exponent in SPREAD:
        values = level_values(bits, levels, torch.tensor([exponent]))
        assert values.dtype == torch.float32
        assert len(values) == 2**bits - (levels == "zero")
        assert bool((values.diff() > 0).all())
        assert torch.equal(values, -values.flip(0))
        assert float(values[-1]) == 1
        assert bool((values == 0).any()) == (levels == "zero")
        assert not bool((values.signbit() & (values == 0)).any())


@each_bits
@each_layout
def test_steps_grow_away_from_zero_exactly_when_the_exponent_is_below_one(bits: int, levels: Levels) -> None:
    for exponent in SPREAD:
        values = level_values(bits, levels, torch.tensor([exponent])).double()
        growth = values[values >= 0].diff().diff()
        if exponent == 1:
            assert torch.allclose(growth, torch.zeros_like(growth), atol=1e-6)
        else:
            assert bool((growth > 0).all() if exponent < 1 else (growth < 0).all())


def test_levels_are_those_of_the_formula() -> None:
    for bits in (2, 3, 8):
        for exponent in (0.25, 0.7, 1.3):
            stored = float(torch.tensor(exponent))
            q = 2 ** (bits - 1) - 1
            zero = [math.copysign((abs(k) / q) ** (1 / stored), k) for k in range(-q, q + 1)]
            above = [((k + 0.5) / (q + 0.5)) ** (1 / stored) for k in range(q + 1)]
            half = [-v for v in reversed(above)] + above
            for levels, expected in (("zero", zero), ("half", half)):
                values = level_values(bits, levels, torch.tensor([exponent]))
                assert torch.allclose(values, torch.tensor(expected), rtol=1e-6, atol=0)


# --- the nearest level ------------------------------------------------------------------------------------------------


@each_bits
@each_layout
def test_the_nearest_level_is_found(bits: int, levels: Levels) -> None:
    for exponent in SPREAD:
        grid = PowerGrid(bits, exponent, levels)
        unit = torch.cat([torch.linspace(-1.3, 1.3, 1001), grid.values, grid.borders, normal(1, 500)[0] / 100])
        distance = (unit[:, None] - grid.values).abs()
        found = distance.gather(1, grid.nearest(unit).long()[:, None])[:, 0]
        assert bool((found <= distance.amin(1) + 2e-7).all())


@each_bits
@each_layout
def test_codes_of_level_values_are_found_again(bits: int, levels: Levels) -> None:
    for exponent in SPREAD:
        grid = PowerGrid(bits, exponent, levels)
        codes = torch.arange(len(grid.values), dtype=torch.uint8).expand(3, -1)
        scale = torch.tensor([[0.3], [1.0], [7.0]]).half()
        values = dequantize(codes, scale, grid.values)
        assert torch.equal(nearest(values, scale, grid).codes, codes)


@each_bits
def test_exponent_one_with_a_zero_level_is_symmetric_uniform_rounding_bit_for_bit(bits: int) -> None:
    q = 2 ** (bits - 1) - 1
    grid = PowerGrid(bits, 1.0, "zero")
    halves = torch.arange(-2 * q - 3, 2 * q + 4)[None] / 2  # every tie, and beyond both ends
    for w, scale in ((halves, float(q)), (normal(8, 512), 2.5)):
        e = nearest(w, torch.full((1, 1), scale).half(), grid)
        k = (w * (q / scale)).round().clamp(-q, q)
        assert torch.equal(e.codes, (k + q).to(torch.uint8))
        assert torch.allclose(e.dequantize(), k * (scale / q), rtol=1e-6, atol=0)


@each_layout
def test_rounding_in_pieces_changes_nothing(levels: Levels, monkeypatch: pytest.MonkeyPatch) -> None:
    w, mask = normal(50, 48), kept_of(50, 48)
    for options in ({"groups": 3}, {"groups": 1}, {"per_tensor": True}):
        whole, seen = at(w * mask, 4, 0.7, levels, mask, **options), profile(w * mask, mask=mask, **options)
        with monkeypatch.context() as patch:
            patch.setattr("compress.encodings.power.CHUNK", 7 * 48)
            parts = at(w * mask, 4, 0.7, levels, mask, **options)
            again = profile(w * mask, mask=mask, **options)
        assert torch.equal(whole.scale, parts.scale)
        assert torch.equal(whole.codes, parts.codes)
        assert torch.allclose(seen.masses, again.masses)
        assert torch.allclose(seen.places, again.places)


# --- the exponent: check values of N(0, 1) and Laplace weights, with the largest magnitude as range -------------------

# (weights, bits) -> exponent, error at it and error at exponent 1, both relative to the variance.
CHECKED: dict[tuple[str, int], tuple[float, float, float]] = {
    ("normal, one scale", 3): (0.65, 0.1265, 0.192),
    ("normal, one scale", 4): (0.62, 0.0231, 0.0354),
    ("normal, one scale", 8): (0.63, 7.0e-5, 1.07e-4),
    ("normal, a scale per row", 3): (0.70, 0.0975, 0.1315),
    ("normal, a scale per row", 4): (0.70, 0.0180, 0.0244),
    ("laplace, one scale", 3): (0.50, 0.2165, 0.418),
    ("laplace, one scale", 4): (0.50, 0.0347, 0.083),
}
SAMPLES: dict[str, Callable[[], Tensor]] = {
    "normal, one scale": lambda: normal(1, 65536),
    "normal, a scale per row": lambda: normal(64, 4096),
    "laplace, one scale": lambda: laplace(1, 65536),
}
each_check = pytest.mark.parametrize(("name", "bits"), CHECKED, ids=str)


def rounded_in_the_power_domain(w: Tensor, bits: int, exponent: float) -> Tensor:
    """The paper's rounding, written down: R(Q |w / M|^a), then its inverse."""
    q = 2 ** (bits - 1) - 1
    largest = w.abs().amax(1, keepdim=True)
    k = (q * (w.abs() / largest) ** exponent).round()
    return w.sign() * largest * (k / q) ** (1 / exponent)


@each_check
def test_the_exponent_found_is_that_of_the_check_values_and_its_error_no_larger(name: str, bits: int) -> None:
    w = SAMPLES[name]()
    exponent, error, even = CHECKED[name, bits]
    variance = float(w.square().sum())
    found, norm = fit_exponent([profile(w, norm=2.0)], bits, "zero", search="minmax", norm=2.0)
    at_found = lost(at(w, bits, found, "zero", search="minmax"), w)
    at_one = lost(at(w, bits, 1.0, "zero", search="minmax"), w)
    assert found == pytest.approx(exponent, abs=0.05)
    assert norm**2 == pytest.approx(at_found, rel=2e-3)
    # Errors grow with the square of the largest sample, so the draw of a Laplace sample matters.
    if "laplace" not in name:
        assert at_one / variance == pytest.approx(even, rel=0.05)
    # The check values are of the paper's rounding, which the nearest level can only improve on.
    paper = float((rounded_in_the_power_domain(w, bits, exponent) - w).square().sum())
    assert at_found <= paper * 1.001
    assert at_found / at_one <= 1.05 * error / even


@each_check
def test_the_papers_rounding_gives_the_check_values(name: str, bits: int) -> None:
    w = SAMPLES[name]()
    exponent, error, even = CHECKED[name, bits]
    errors = [float((rounded_in_the_power_domain(w, bits, a) - w).square().sum()) for a in (exponent, 1.0)]
    assert errors[0] / errors[1] == pytest.approx(error / even, rel=0.15)


@pytest.mark.parametrize("bits", only([3, 8], [2, 3, 4, 8]))
@each_layout
@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"per_tensor": True}], ids=str)
def test_the_exponent_found_is_never_worse_than_even_spacing(
    bits: int, levels: Levels, options: dict[str, object]
) -> None:
    for w in (normal(8, 128), normal(8, 128) ** 3, laplace(8, 128).sign() * laplace(8, 128).abs().sqrt()):
        found, _ = fit_exponent([profile(w, norm=2.0, **options)], bits, levels, search="minmax", norm=2.0)
        fitted, even = (lost(at(w, bits, a, levels, search="minmax", **options), w) for a in (found, 1.0))
        assert fitted <= even * (1 + 1e-3)


@each_layout
@pytest.mark.parametrize("norm", [1.0, 2.4])
def test_the_exponent_found_is_as_good_as_trying_them_all(levels: Levels, norm: float) -> None:
    w = laplace(16, 256)
    found, _ = fit_exponent([profile(w, norm=norm)], 3, levels, search="minmax", norm=norm)
    errors = [lost(at(w, 3, k / 100, levels, search="minmax"), w, norm) for k in range(10, 151, 4)]
    assert lost(at(w, 3, found, levels, search="minmax"), w, norm) <= min(errors) * 1.005


def test_a_grid_of_two_bits_with_a_zero_level_has_no_use_for_an_exponent() -> None:
    assert fit_exponent([profile(normal())], 2, "zero")[0] == 1


def test_one_exponent_for_several_weights_has_the_least_sum_of_their_norms() -> None:
    weights = [normal(8, 64), 5 * laplace(8, 64), 0.1 * torch.rand(8, 64)]
    found, total = fit_exponent([profile(w, norm=2.0) for w in weights], 4, "zero", search="minmax", norm=2.0)

    def sum_of_norms(a: float) -> float:
        return sum(math.sqrt(lost(at(w, 4, a, "zero", search="minmax"), w)) for w in weights)

    assert total == pytest.approx(sum_of_norms(found), rel=1e-3)
    assert total <= min(sum_of_norms(k / 100) for k in range(10, 151, 10)) * 1.002


def test_a_given_exponent_is_measured_not_searched() -> None:
    seen = [profile(normal())]
    best, error = fit_exponent(seen, 4, "half")
    for exponent in (0.3, 1.4):
        same, larger = fit_exponent(seen, 4, "half", exponent=exponent)
        assert same == exponent
        assert larger > error
    assert EXPONENTS[0] < best < EXPONENTS[-1]


@each_layout
def test_the_unit_of_the_weights_does_not_change_the_exponent(levels: Levels) -> None:
    found = [fit_exponent([profile(normal() * size)], 4, levels)[0] for size in (1e-12, 1.0, 1e9)]
    assert found == pytest.approx([found[1]] * 3, rel=1e-3)


# --- the range --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", only([3, 8], [2, 3, 4, 8]))
@each_layout
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_the_searched_range_is_never_worse_than_the_largest_magnitude(bits: int, levels: Levels, norm: float) -> None:
    w = normal(8, 64) ** 3
    errors = {}
    for search in ("minmax", "mse"):
        e = at(w, bits, 0.7, levels, groups=4, search=search, norm=norm)
        errors[search] = (e.dequantize() - w).abs().pow(norm).view(8, 4, 16).sum(-1)
    assert bool((errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all())


@each_layout
def test_the_searched_range_is_about_as_good_as_trying_every_percent(levels: Levels) -> None:
    w = normal(8, 256)
    grid = PowerGrid(3, 0.8, levels)
    largest = w.abs().amax(1, keepdim=True)
    every = [(nearest(w, (largest * k / 100).half(), grid).dequantize() - w).square().sum(1) for k in range(20, 101)]
    found = at(w, 3, 0.8, levels, norm=2.0)
    assert float((found.dequantize() - w).square().sum()) <= 1.01 * float(torch.stack(every).amin(0).sum())


@pytest.mark.parametrize(("bits", "best", "slack"), [(2, 0.11748, 1.02), (3, 0.03454, 1.06)])
def test_half_levels_come_near_the_best_quantizer_of_normal_weights(bits: int, best: float, slack: float) -> None:
    # `best` is the error of the Lloyd-Max quantizer of N(0, 1), which places every level freely.
    w = normal(1, 65536)
    found, _ = fit_exponent([profile(w, norm=2.0)], bits, "half", norm=2.0)
    assert best * 0.98 < lost(at(w, bits, found, "half", norm=2.0), w) / float(w.square().sum()) < best * slack


@each_layout
def test_the_largest_magnitude_is_the_range_when_nothing_is_searched(levels: Levels) -> None:
    w = normal()
    e = at(w, 4, 0.7, levels, groups=3, search="minmax")
    assert torch.equal(e.scale, w.abs().view(6, 3, 16).amax(-1).half())
    e = at(w, 4, 0.7, levels, per_tensor=True, search="minmax")
    assert torch.equal(e.scale, w.abs().amax().half().view(1, 1))


@each_layout
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e6])
def test_scales_outside_the_normal_range_of_float16_stay_float32(levels: Levels, search: str, size: float) -> None:
    w = normal() * size
    e = at(w, 4, 0.7, levels, groups=3, search=search)
    assert e.scale.dtype == torch.float32
    assert e.defect() is None
    assert float((e.dequantize() - w).norm() / w.norm()) < 0.15


@each_layout
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("options", [{}, {"groups": 3}, {"per_tensor": True}], ids=str)
def test_zeros_do_no_harm(levels: Levels, search: str, options: dict[str, object]) -> None:
    w = normal()
    w[:, ::3] = 0
    w[2, 16:32] = 0
    w[3] = 0
    for weight in (w, torch.zeros(4, 12)):
        found, error = fit_exponent([profile(weight, **options)], 3, levels, search=search)
        assert math.isfinite(error)
        e = at(weight, 3, found, levels, search=search, **options)
        assert e.scale.dtype == torch.float16
        assert e.defect() is None
        made = e.dequantize()
        assert bool(torch.isfinite(made).all())
        if levels == "zero":
            assert bool((made[weight == 0] == 0).all())
        else:
            empty = (e.scale.float() == EMPTY).repeat_interleave(weight.shape[1] // e.scale.shape[1], 1)
            assert bool((made[empty.expand(weight.shape)].abs() <= EMPTY).all())
            assert bool(empty.any()) == (options != {"per_tensor": True} or not bool(weight.any()))


@each_layout
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_masked_weights_count_nowhere(levels: Levels, search: str) -> None:
    w = normal(6, 64)
    mask = torch.arange(64).expand(6, 64) % 4 != 1
    short = w[mask].view(6, 48)
    seen, alone = profile(w * mask, mask=mask), profile(short)
    assert torch.allclose(seen.places, alone.places)
    assert torch.allclose(seen.masses, alone.masses)
    assert fit_exponent([seen], 3, levels, search=search) == fit_exponent([alone], 3, levels, search=search)
    e, expected = at(w * mask, 3, 0.8, levels, mask, search=search), at(short, 3, 0.8, levels, search=search)
    assert torch.equal(e.scale, expected.scale)
    assert torch.equal(e.codes[mask].view(6, 48), expected.codes)
    assert torch.equal(e.codes[~mask], e.idle()[~mask])
    assert bool((Weight(mask=mask, encoding=e).dequantize()[~mask] == 0).all())


def test_the_idle_code_is_zero_where_there_is_a_zero() -> None:
    zero, half = (at(normal(), 4, 0.7, levels) for levels in ("zero", "half"))
    assert bool((replace(zero, codes=zero.idle()).dequantize() == 0).all())
    assert bool((half.idle() == 0).all())


def test_fitting_and_rounding_leave_the_weight_alone() -> None:
    w, mask = normal(), kept_of(6, 48)
    before = w.clone()
    fit_exponent([profile(w, mask=mask)], 3, "half")
    at(w, 3, 0.7, "half", mask)
    assert torch.equal(w, before)


def test_a_profile_knows_the_error_of_any_range() -> None:
    w = normal(1, 4096)
    grid = PowerGrid(4, 0.8, "half")
    largest = w.abs().amax(1, keepdim=True)
    for share in (1.0, 0.7, 0.35):
        real = nearest(w, largest * share, grid).dequantize() - w
        seen: Profile = profile(w, norm=2.0)
        assert seen.error(grid, torch.tensor([share]), 2.0) == pytest.approx(float(real.square().sum()), rel=2e-3)


# --- stored -----------------------------------------------------------------------------------------------------------


@each_bits
@each_layout
@pytest.mark.parametrize("masked", [False, True])
def test_codes_come_back_exactly(bits: int, levels: Levels, masked: bool) -> None:
    for shape in ((1, 1), (6, 40), (5, 13), (3, 7)):
        mask = kept_of(*shape) if masked else None
        w = normal(*shape) if mask is None else normal(*shape) * mask
        for options in ({}, {"per_tensor": True}, {"groups": shape[1]}):
            e = at(w, bits, 0.6, levels, mask, search="minmax", **options)
            assert_round_trip(Weight(mask=mask, encoding=e))


@each_layout
def test_float32_scales_come_back_exactly(levels: Levels) -> None:
    assert_round_trip(Weight(encoding=at(normal() * 1e-7, 4, 0.6, levels, groups=3)))


def assert_round_trip(weight: Weight) -> None:
    spec, tensors = pack(weight)
    assert spec == spec_of(weight)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == spec.tensors()
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == spec.num_bytes
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    back = unpack(spec, tensors)
    assert isinstance(weight.encoding, Power)
    assert isinstance(back.encoding, Power)
    for leaf in ("codes", "scale", "exponent"):
        mine, theirs = getattr(weight.encoding, leaf), getattr(back.encoding, leaf)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), leaf
    assert (back.encoding.bits, back.encoding.levels) == (weight.encoding.bits, weight.encoding.levels)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_golden_bytes() -> None:
    mask = torch.tensor([[True, False, True, True], [False, True, False, True]])
    codes = torch.tensor([[1, 3, 2, 6], [3, 5, 3, 4]], dtype=torch.uint8)
    scale = torch.tensor([[0.5], [0.25]], dtype=torch.float16)
    spec, tensors = pack(Weight(mask=mask, encoding=Power(codes, scale, torch.tensor([0.5]), 3, "zero")))
    assert {n: bytes(t.flatten().view(torch.uint8).tolist()).hex() for n, t in tensors.items()} == {
        "mask": "0d0a",
        "codes": "914b",  # 1, 2, 6, 5, 4 in three bits each
        "scale": "00380034",
        "exponent": "0000003f",
    }
    assert spec.to_json() == {"shape": [2, 4], "encoding": "power", "bits": 3, "kept": 5, "layout": "compress-1"}
    third = 1 / 9  # (1/3)**(1/0.5)
    expected = [[-4 * third / 2, 0, -third / 2, 0.5], [0, 4 * third / 4, 0, third / 4]]
    assert torch.allclose(unpack(spec, tensors).dequantize(), torch.tensor(expected), rtol=1e-6, atol=0)
    e = Power(codes, scale, torch.tensor([0.5]), 3, "half")
    assert pack(Weight(encoding=e))[0].to_json()["levels"] == "half"
    assert float(e.dequantize()[0, 1]) == pytest.approx(-0.5 / 7**2)


@each_layout
@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"per_tensor": True}], ids=str)
def test_rows_are_as_if_encoded_alone(levels: Levels, options: dict[str, object]) -> None:
    w = normal(6, 48)
    w[3:] *= 1e-7  # its scales need float32, the others' do not
    whole = at(w, 4, 0.7, levels, **options)
    for part in (slice(0, 3), slice(3, 6), slice(2, 4)):
        rows = whole.rows(part)
        assert torch.equal(rows.dequantize(), whole.dequantize()[part])
        if options != {"per_tensor": True}:
            alone = at(w[part], 4, 0.7, levels, **options)
            assert rows.scale.dtype == alone.scale.dtype
            assert torch.equal(rows.scale, alone.scale)
            assert torch.equal(rows.codes, alone.codes)
            assert rows.form == alone.form


@each_bits
@pytest.mark.parametrize("groups", [1, 3])
def test_bits_per_weight_counts_scales_and_the_exponent(bits: int, groups: int) -> None:
    e = at(normal(6, 48), bits, 0.7, "half", groups=groups)
    assert e.bits_per_weight == pytest.approx(bits + 16 * groups / 48 + 32 / (6 * 48))


def test_the_unused_code_is_refused() -> None:
    e = at(normal(), 3, 0.7, "zero")
    assert e.defect() is None
    assert "beyond its 7 levels" in str(replace(e, codes=torch.full_like(e.codes, 7)).defect())
    assert replace(e, codes=torch.full_like(e.codes, 7), levels="half").defect() is None
    assert "beyond its 8 levels" in str(replace(e, codes=torch.full_like(e.codes, 8), levels="half").defect())


@pytest.mark.parametrize("exponent", [[0.0], [-1.0], [math.nan], [math.inf], [0.001], [0.5, 0.5], []])
def test_an_impossible_exponent_is_refused(exponent: list[float]) -> None:
    assert "exponent" in str(replace(at(normal(), 8, 0.7, "zero"), exponent=torch.tensor(exponent)).defect())


def test_impossible_scales_and_widths_are_refused() -> None:
    e = at(normal(), 4, 0.7, "half")
    for scale in (0.0, -1.0, math.inf, math.nan):
        assert "scales" in str(replace(e, scale=torch.full_like(e.scale, scale)).defect())
    assert "9 bits" in str(replace(e, bits=9).defect())


def test_a_layout_of_a_newer_version_is_refused_by_name() -> None:
    spec = {"shape": [2, 2], "layout": "compress-1", "encoding": "power", "bits": 3, "levels": "third"}
    with pytest.raises(ValueError, match="'third'"):
        Spec.from_json(spec)
