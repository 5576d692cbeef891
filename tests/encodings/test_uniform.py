"""The uniform grid: what scales and zero points promise about the numbers they stand for."""

import pytest
import torch
from selection import only
from torch import Tensor

from compress.encodings import Uniform, fit, quantize, reference
from compress.encodings.uniform import SEARCH_NORM

BITS = range(2, 9)
TINY, HUGE = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max


def weight(rows: int = 6, columns: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(w: Tensor, bits: int, **options: object) -> Uniform:
    scale, zero = fit(w, bits, **options)
    return Uniform(quantize(w, scale, zero, bits), scale, zero, bits, bool(options.get("symmetric", False)))


def spread(values: Tensor, w: Tensor) -> Tensor:
    """(R, G) -> one value a weight."""
    return values.float().repeat_interleave(w.shape[1] // values.shape[1], dim=1).expand(w.shape)


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_zero_is_always_exactly_on_the_grid(bits: int, symmetric: bool, search: str, shift: float) -> None:
    w = weight() + shift
    w[:, ::5] = 0
    e = rounded(w, bits, groups=3, symmetric=symmetric, search=search)
    assert bool((e.dequantize()[w == 0] == 0).all())
    assert int(e.zero_point.max()) < 2**bits


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
def test_affine_codes_cover_the_range_to_half_a_step(bits: int) -> None:
    w = weight()
    e = rounded(w, bits, groups=4)
    # The scale is rounded to 11 significant bits after the range was divided: the far end may move by that much.
    slack = 0.5 + (2**bits - 1) * 2**-11
    assert bool(((e.dequantize() - w).abs() <= slack * spread(e.scale, w) * (1 + 1e-5)).all())


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
def test_symmetric_codes_cover_the_range_to_half_a_step(bits: int) -> None:
    w = weight()
    e = rounded(w, bits, groups=4, symmetric=True)
    slack = 0.5 + 2 ** (bits - 1) * 2**-11
    assert bool(((e.dequantize() - w).abs() <= slack * spread(e.scale, w) * (1 + 1e-5)).all())
    assert bool((e.zero_point == 2 ** (bits - 1)).all())


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
def test_the_affine_scale_is_the_range_over_the_levels(bits: int) -> None:
    w = weight()
    scale, _ = fit(w, bits)
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    assert torch.equal(scale[:, 0], ((high - low) / (2**bits - 1)).half())


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
def test_a_range_that_does_not_hold_zero_is_widened_to_it(bits: int) -> None:
    w = weight().abs() + 3
    scale, zero = fit(w, bits)
    assert torch.equal(scale[:, 0], (w.amax(1) / (2**bits - 1)).half())
    assert bool((zero == 0).all())
    scale, zero = fit(-w, bits)
    assert bool((zero == 2**bits - 1).all())


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_other_code_is_nearer(bits: int, symmetric: bool) -> None:
    w = weight(3, 20)
    e = rounded(w, bits, groups=2, symmetric=symmetric)
    every = torch.arange(2**bits, dtype=torch.float32)
    grid = (every - spread(e.zero_point, w)[..., None]) * spread(e.scale, w)[..., None]
    nearest = (grid - w[..., None]).abs().amin(-1)
    assert torch.allclose((e.dequantize() - w).abs(), nearest, rtol=0, atol=1e-6)


def test_rounding_breaks_ties_to_even() -> None:
    one = torch.ones(1, 1, dtype=torch.float16)
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    codes = quantize(w, one, torch.full((1, 1), 8, dtype=torch.uint8), 4)
    assert codes.tolist() == [[8, 10, 10, 8, 6]]


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("heavy", [False, True])
def test_mse_search_is_never_worse_than_minmax_in_its_own_norm(bits: int, symmetric: bool, heavy: bool) -> None:
    w = weight(8, 64)
    w = w**3 if heavy else w
    errors = {}
    for search in ("minmax", "mse"):
        e = rounded(w, bits, groups=4, symmetric=symmetric, search=search)
        errors[search] = (e.dequantize() - w).abs().pow(SEARCH_NORM).view(8, 4, 16).sum(-1)
    assert bool((errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all())


def test_mse_search_gives_up_an_outlier_when_that_pays() -> None:
    w = weight(1, 256)
    w[0, 0] = 12.0
    errors = {s: (rounded(w, 3, search=s).dequantize() - w).abs().pow(SEARCH_NORM).sum() for s in ("minmax", "mse")}
    assert float(errors["mse"]) < 0.8 * float(errors["minmax"])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_scales_are_rounded_to_float16_before_codes_are_made(symmetric: bool, search: str) -> None:
    scale, _ = fit(weight(), 4, groups=3, symmetric=symmetric, search=search)
    assert scale.dtype == torch.float16


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_scales_outside_the_normal_range_of_float16_stay_float32(size: float, search: str) -> None:
    w = weight() * size
    e = rounded(w, 4, groups=3, search=search)
    assert e.scale.dtype == torch.float32
    assert bool(((e.dequantize() - w).abs() <= 0.51 * spread(e.scale, w)).all()) or search == "mse"
    assert bool((e.scale > 0).all())
    assert bool(torch.isfinite(e.scale).all())


@pytest.mark.parametrize("limit", [TINY, HUGE])
def test_scales_at_the_edge_of_float16_keep_their_meaning(limit: float) -> None:
    for factor in (0.9, 0.999, 1.0, 1.001, 1.1):
        w = torch.tensor([[0.0, 15 * limit * factor, 7 * limit * factor, limit * factor]])
        e = rounded(w, 4)
        assert torch.allclose(e.dequantize(), w, rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_the_search_near_the_smallest_float16_still_gives_usable_scales(symmetric: bool, search: str) -> None:
    w = weight(4, 32) * 15 * TINY
    e = rounded(w, 4, symmetric=symmetric, search=search)
    assert bool((e.scale > 0).all())
    assert float((e.dequantize() - w).norm() / w.norm()) < 0.25


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_a_group_of_zeros_stays_zero(symmetric: bool, search: str) -> None:
    w = weight()
    w[2, 16:32] = 0
    w[3] = 0
    e = rounded(w, 3, groups=3, symmetric=symmetric, search=search)
    assert bool((e.dequantize()[w == 0] == 0).all())
    assert bool((e.scale > 0).all())


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
def test_dequantize_agrees_with_the_oracle(bits: int) -> None:
    e = rounded(weight(4, 24), bits, groups=3)
    for row in range(4):
        expected = reference.dequantize_row(
            e.codes[row].tolist(), e.scale[row].float().tolist(), e.zero_point[row].tolist()
        )
        assert torch.allclose(e.dequantize()[row], torch.tensor(expected), rtol=1e-6, atol=0)


def test_groups_are_fitted_on_their_own_columns_only() -> None:
    w = weight(4, 32)
    whole = rounded(w, 4, groups=4)
    for g in range(4):
        part = rounded(w[:, 8 * g : 8 * g + 8].contiguous(), 4)
        assert torch.equal(whole.codes[:, 8 * g : 8 * g + 8], part.codes)
        assert torch.equal(whole.scale[:, g : g + 1], part.scale)


def test_one_scale_for_the_whole_matrix() -> None:
    w = weight()
    e = rounded(w, 4, per_tensor=True)
    assert e.scale.shape == e.zero_point.shape == (1, 1)
    one_row = rounded(w.reshape(1, -1), 4)
    assert torch.equal(e.codes.reshape(1, -1), one_row.codes)


def test_quantizing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(50, 48)
    for options in ({"groups": 3}, {"per_tensor": True}):
        scale, zero = fit(w, 4, **options)
        whole = quantize(w, scale, zero, 4)
        with monkeypatch.context() as patch:
            patch.setattr("compress.encodings.uniform.CHUNK", 7 * 48)
            assert torch.equal(quantize(w, scale, zero, 4), whole)


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
def test_codes_on_the_grid_are_found_again(bits: int) -> None:
    e = rounded(weight(), bits, groups=3)
    assert torch.equal(quantize(e.dequantize(), e.scale, e.zero_point, bits), e.codes)


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
def test_finer_groups_and_more_bits_do_not_round_worse(bits: int) -> None:
    w = weight(8, 64)
    errors = [float((rounded(w, bits, groups=g).dequantize() - w).norm()) for g in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    if bits < 8:
        assert float((rounded(w, bits + 1).dequantize() - w).norm()) < errors[0]


@pytest.mark.parametrize("bits", only((2, 3, 5, 8), BITS))
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_bits_per_weight_counts_scales_and_zero_points(bits: int, groups: int) -> None:
    group_size = 48 // groups
    affine = rounded(weight(), bits, groups=groups)
    assert affine.group_size == group_size
    assert affine.bits_per_weight == pytest.approx(bits + 16 / group_size + 8 * -(-groups * bits // 8) / 48)
    symmetric = rounded(weight(), bits, groups=groups, symmetric=True)
    assert symmetric.bits_per_weight == pytest.approx(bits + 16 / group_size)
    wide = rounded(weight() * 1e-7, bits, groups=groups, symmetric=True)
    assert wide.bits_per_weight == pytest.approx(bits + 32 / group_size)


def test_fitting_and_quantizing_leave_the_weight_alone() -> None:
    w = weight()
    before = w.clone()
    for search in ("minmax", "mse"):
        rounded(w, 4, groups=3, search=search)
    assert torch.equal(w, before)
