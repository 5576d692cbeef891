"""Coordinate descent over codes, and scales weighted by what arrives."""

import itertools

import pytest
import torch
from textbook import inputs, mask, target, weight
from torch import Tensor

from compress.config.options import errors_in
from compress.encodings import Uniform, fit
from compress.encodings.uniform import quantize
from compress.passes import FlexRound, Gptq, Rtn
from compress.passes.solvers.descent import descend
from compress.passes.solvers.projections import Rounding

ROWS, COLUMNS = 6, 48
DAMPING = 0.01
LAYOUTS: dict[str, dict[str, object]] = {
    "rows": {"bits": 3},
    "groups": {"bits": 2, "group_size": 16},
    "one scale": {"bits": 4, "granularity": "tensor"},
    "symmetric, in order": {"bits": 3, "group_size": 8, "symmetric": True, "act_order": False},
}


def run(w: Tensor, x: Tensor, kept: Tensor | None = None, **options: object) -> Uniform:
    found = Gptq(**options).run(target(w, x, kept)).encoding  # type: ignore[arg-type]
    assert isinstance(found, Uniform)
    return found


def loss(w: Tensor, made: Tensor, x: Tensor, damping: float = DAMPING) -> float:
    """What is minimised, with its damping."""
    gram = (x.T @ x).double()
    lost = (w - made).double()
    return float(((lost @ gram) * lost).sum() + damping * gram.diagonal().mean() * lost.square().sum())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_no_round_loses_more_and_the_first_loses_less(layout: str, masked: bool) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    kept = mask(ROWS, COLUMNS) if masked else None
    w = w if kept is None else w * kept
    made = [run(w, x, kept, rounds=rounds, **LAYOUTS[layout]) for rounds in range(4)]
    lost = [loss(w, each.dequantize(), x) for each in made]
    assert lost[1] < lost[0]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(lost))
    if kept is not None:
        assert bool((made[-1].dequantize()[~kept] == 0).all())
    assert all(each.form == made[0].form for each in made)  # what is stored is as large


@pytest.mark.parametrize("group_size", [None, 16])
def test_at_the_end_no_other_code_of_any_weight_is_better(group_size: int | None) -> None:
    w, x = weight(2, 16), inputs(16)
    made = run(w, x, bits=2, group_size=group_size, rounds=60)
    least = loss(w, made.dequantize(), x)
    for row, column, code in itertools.product(range(2), range(16), range(4)):
        other = made.codes.clone()
        other[row, column] = code
        value = Uniform(other, made.scale, made.zero_point, 2, False).dequantize()
        assert loss(w, value, x) >= least * (1 - 1e-5)


@pytest.mark.parametrize("rows", [5, 1])
def test_a_wrong_scale_is_put_right_where_the_codes_are(rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 8, (COLUMNS, 5), generator=generator).to(torch.uint8)
    zeros, right = torch.full((3, rows), 4.0), torch.full((3, rows), 0.125)
    group = torch.arange(COLUMNS) // 16
    w = ((codes.float() - zeros[group]) * right[group]).T.contiguous()
    rounding = Rounding(right * 1.06, zeros, group, 7, None, codes.clone())
    x = inputs(COLUMNS)
    descend(w, x.T @ x, DAMPING, rounding, rounds=8)
    assert torch.equal(rounding.scales, right)
    assert torch.equal(rounding.codes, codes)


def test_groups_wider_than_a_tile_are_visited_whole() -> None:
    w, x = weight(3, 272), inputs(272)
    made = [run(w, x, bits=2, rounds=rounds) for rounds in (0, 1, 30)]
    lost = [loss(w, each.dequantize(), x) for each in made]
    assert lost[2] < lost[1] < lost[0]
    other = made[2].codes.clone()
    for column in (0, 127, 128, 255, 256, 271):
        for code in range(4):
            other[:, column] = code
            assert loss(w, Uniform(other, made[2].scale, made[2].zero_point, 2, False).dequantize(), x) >= lost[2]
        other[:, column] = made[2].codes[:, column]


def test_inputs_that_are_always_zero_change_nothing() -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    x[:, 5:9] = 0
    before, after = (run(w, x, group_size=16, rounds=rounds, scale_search="weighted") for rounds in (0, 3))
    assert loss(w, after.dequantize(), x) < loss(w, before.dequantize(), x)
    x[:] = 0
    none, some = (run(w, x, group_size=16, rounds=rounds, scale_search="weighted") for rounds in (0, 3))
    assert torch.equal(none.dequantize(), some.dequantize())


def test_the_weighted_search_loses_less_where_it_matters() -> None:
    w, importance = weight(4, 64), torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4
    importance[::9] = 0

    def lost(search: str, **given: Tensor) -> Tensor:
        scale, zero = fit(w, 3, groups=4, search=search, **given)  # type: ignore[arg-type]
        codes = quantize(w, scale, zero, 3)
        wrong = (Uniform(codes, scale, zero, 3, False).dequantize() - w).square() * importance
        return wrong.view(4, 4, 16).sum(-1)

    found = lost("weighted", importance=importance)
    assert bool((found <= lost("minmax")).all())
    assert found.sum() < lost("mse").sum()


def test_columns_without_any_input_take_the_whole_range() -> None:
    w = weight(4, 64)
    found = fit(w, 3, groups=4, search="weighted", importance=torch.zeros(64))
    assert all(map(torch.equal, found, fit(w, 3, groups=4)))


def test_a_weighted_search_is_refused_where_no_inputs_are_known() -> None:
    with pytest.raises(ValueError, match="importance"):
        fit(weight(4, 64), 3, search="weighted")
    for refused in (Rtn(scale_search="weighted"), FlexRound(scale_search="weighted")):
        assert ["use gptq" in error.message for error in errors_in(refused)] == [True]
    assert not errors_in(Gptq(scale_search="weighted", rounds=2))
    assert [error.option for error in errors_in(Gptq(rounds=-1))] == ["rounds"]
    assert Gptq(scale_search="weighted", rounds=2).stand_in() == Rtn(scale_search="mse")
