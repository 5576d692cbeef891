"""GPTQ against the textbook, and the properties of its paper."""

import pytest
import torch
from textbook import (
    gptq,
    inputs,
    mask,
    output_error,
    rows_that_differ,
    statistics,
    target,
    weight,
)
from torch import Tensor

from compress.calibration.statistics import Statistics
from compress.config.options import errors_in
from compress.encodings import Uniform
from compress.errors import SolveError
from compress.passes import Gptq, Rtn
from compress.passes.base import Target

ROWS, COLUMNS = 8, 48


def run(w: Tensor, x: Tensor, kept: Tensor | None = None, **options: object) -> Uniform:
    found = Gptq(**options).run(target(w, x, kept)).encoding
    assert isinstance(found, Uniform)
    return found


def with_gram(w: Tensor, gram: Tensor, **options: object) -> Uniform:
    found = Statistics(w.shape[1], "gram")
    found._gram, found.tokens = gram, 1
    made = Gptq(**options).run(Target(w, None, found)).encoding
    assert isinstance(made, Uniform)
    return made


def assert_same(a: Uniform, b: Uniform) -> None:
    """Codes and scales, but for one row in which the last bit may break a tie the other way."""
    assert rows_that_differ(a.codes, b.codes) <= 1
    assert rows_that_differ(a.zero_point.expand(ROWS, -1), b.zero_point.expand(ROWS, -1)) <= 1
    assert rows_that_differ(a.scale.float().expand(ROWS, -1), b.scale.float().expand(ROWS, -1)) <= 1


LAYOUTS = [
    {},
    {"group_size": 8},
    {"group_size": 24},
    {"group_size": 48},
    {"bits": 3, "group_size": 16, "symmetric": True},
    {"bits": 2, "scale_search": "mse"},
    {"bits": 8},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [16, 128])
def test_gptq_equals_the_textbook(options: dict[str, object], act_order: bool, masked: bool, tile: int) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    kept = mask(ROWS, COLUMNS) if masked else None
    w = w if kept is None else w * kept
    ours = run(w, x, kept, act_order=act_order, tile=tile, **options)
    plain = {"bits": 4, **options}
    plain["search"] = plain.pop("scale_search", "minmax")
    assert_same(ours, gptq(w, statistics(x).gram, kept, act_order=act_order, **plain))


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_with_one_scale_a_tensor_equals_the_textbook(act_order: bool) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    ours = run(w, x, granularity="tensor", act_order=act_order)
    assert ours.scale.shape == (1, 1)
    assert_same(ours, gptq(w, statistics(x).gram, bits=4, per_tensor=True, act_order=act_order))


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [1e-4, 37.0])
def test_gptq_with_identity_hessian_is_round_to_nearest(
    options: dict[str, object], act_order: bool, size: float
) -> None:
    w = weight(ROWS, COLUMNS)
    ours = with_gram(w, size * torch.eye(COLUMNS), act_order=act_order, tile=32, **options)
    nearest = Rtn(**options).run(target(w)).encoding
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(ours.scale, nearest.scale)
    assert torch.equal(ours.zero_point, nearest.zero_point)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_gptq_has_a_smaller_output_error_than_rounding(
    bits: int, group_size: int | None, act_order: bool, masked: bool, seed: int
) -> None:
    w, x = weight(ROWS, COLUMNS, seed), inputs(COLUMNS, seed=seed)
    kept = mask(ROWS, COLUMNS, seed) if masked else None
    w = w if kept is None else w * kept
    ours = run(w, x, kept, bits=bits, group_size=group_size, act_order=act_order)
    nearest = Rtn(bits=bits, group_size=group_size).run(target(w, kept=kept)).encoding
    assert output_error(w, ours.dequantize(), x) < output_error(w, nearest.dequantize(), x)


@pytest.mark.parametrize("act_order", [False, True])
def test_masked_weights_stay_zero_and_their_place_is_kept(act_order: bool) -> None:
    kept = mask(ROWS, COLUMNS)
    edit = Gptq(bits=3, group_size=16, act_order=act_order).run(target(weight(ROWS, COLUMNS), inputs(COLUMNS), kept))
    assert torch.equal(edit.mask, kept)
    assert bool((edit.encoding.dequantize()[~kept] == 0).all())


@pytest.mark.parametrize("options", [{}, {"group_size": 16}, {"act_order": True}], ids=str)
def test_scaling_the_inputs_changes_nothing(options: dict[str, object]) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    one = run(w, x, **options)
    exact = run(w, x * 64, **options)  # a power of two changes no rounding at all
    assert torch.equal(one.codes, exact.codes)
    assert torch.equal(one.scale, exact.scale)
    assert_same(one, run(w, x * 0.0123, **options))


@pytest.mark.parametrize("options", [{}, {"group_size": 16}, {"group_size": 48}, {"act_order": True}], ids=str)
def test_the_tile_size_changes_nothing(options: dict[str, object]) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    whole = run(w, x, tile=COLUMNS, **options)
    for tile in (1, 7, 16, 20, 1000):
        assert_same(run(w, x, tile=tile, **options), whole)


def test_the_number_of_columns_may_be_prime() -> None:
    w, x = weight(ROWS, 53), inputs(53)
    assert_same(run(w, x, tile=16, act_order=False), gptq(w, statistics(x).gram, bits=4))


@pytest.mark.parametrize("options", [{}, {"group_size": 16}, {"act_order": True}], ids=str)
def test_dead_inputs_are_counted_and_cost_nothing(options: dict[str, object]) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS, dead=(0, 5, 47))
    edit = Gptq(**options).run(target(w, x))
    assert edit.notes == {"dead_inputs": 3}
    assert bool(torch.isfinite(edit.encoding.dequantize()).all())
    nearest = Rtn(**{k: v for k, v in options.items() if k != "act_order"}).run(target(w)).encoding
    assert output_error(w, edit.encoding.dequantize(), x) < output_error(w, nearest.dequantize(), x)


def test_live_inputs_alone_leave_no_note() -> None:
    assert Gptq().run(target(weight(ROWS, COLUMNS), inputs(COLUMNS))).notes == {}


def test_inputs_that_are_all_dead_give_round_to_nearest() -> None:
    w = weight(ROWS, COLUMNS)
    edit = Gptq().run(target(w, torch.zeros(10, COLUMNS)))
    assert edit.notes == {"dead_inputs": COLUMNS}
    assert torch.equal(edit.encoding.codes, Rtn().run(target(w)).encoding.codes)


def test_fewer_tokens_than_columns_are_enough() -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS, tokens=10)
    nearest = Rtn(bits=3).run(target(w)).encoding
    assert output_error(w, run(w, x, bits=3).dequantize(), x) < output_error(w, nearest.dequantize(), x)


def test_the_first_column_is_rounded_and_never_compensated() -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    assert torch.equal(run(w, x, act_order=False).codes[:, 0], Rtn().run(target(w)).encoding.codes[:, 0])


def test_rows_are_solved_independently() -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    shuffled = run(w[order], x, group_size=16)
    assert rows_that_differ(shuffled.codes, run(w, x, group_size=16).codes[order]) <= 1


def test_heavy_damping_tends_to_round_to_nearest() -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    codes = run(w, x, damping=1e6).codes
    assert float((codes == Rtn().run(target(w)).encoding.codes).float().mean()) > 0.99


def test_a_hessian_that_is_not_positive_definite_is_a_solve_error() -> None:
    gram = torch.eye(COLUMNS)
    gram[0, 1] = gram[1, 0] = 2
    with pytest.raises(SolveError, match="positive definite"):
        with_gram(weight(ROWS, COLUMNS), gram)


def test_no_statistics_are_a_solve_error_and_the_fallback_has_the_same_grid() -> None:
    pass_ = Gptq(bits=3, group_size=16, symmetric=True, scale_search="mse")
    with pytest.raises(SolveError, match="no input"):
        pass_.run(target(weight(ROWS, COLUMNS)))
    assert pass_.stand_in() == Rtn(bits=3, group_size=16, symmetric=True, scale_search="mse")


@pytest.mark.parametrize("option", ["damping", "tile"])
def test_impossible_options_are_named(option: str) -> None:
    assert [e.option for e in errors_in(Gptq(**{option: 0}))] == [option]
