"""NUPES: codes over the whole power grid, scales and exponent, learned together."""

from dataclasses import replace

import pytest
import textbook
import torch
from selection import only
from torch import Tensor

from compress.encodings import Power
from compress.encodings.power import level_values
from compress.passes import Nupes, PowerQuant
from compress.passes.base import Target
from compress.passes.quantize.nupes import Position, even_places, nearest_level

GENTLE = {"learning_rate": 0.005, "scale_rate": 0.003}  # for a few hundred tokens of noise


def target(rows: int = 16, columns: int = 48, mask: Tensor | None = None) -> Target:
    w = textbook.weight(rows, columns) * 0.1
    return Target(w if mask is None else w * mask, mask, None, torch.Generator().manual_seed(0))


def learn(pass_: Nupes, given: Target) -> tuple[Power, dict[str, float]]:
    ((_, edit),) = pass_.run(textbook.block({"a": given}, samples=64))
    assert isinstance(edit.encoding, Power)
    return edit.encoding, dict(edit.notes)


@pytest.mark.parametrize("levels", ["zero", "half"])
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 3, "group_size": 16}, {"bits": 2, "granularity": "tensor"}])
def test_learning_starts_exactly_at_powerquant(levels: str, options: dict[str, object]) -> None:
    given = target()
    start = Nupes(levels=levels, **options).start(given).encoding()  # type: ignore[arg-type]
    expected = PowerQuant(levels=levels, **options).run(given).encoding  # type: ignore[arg-type]
    assert isinstance(expected, Power)
    assert torch.equal(start.codes, expected.codes)
    assert torch.equal(start.scale.float(), expected.scale.float())
    assert torch.equal(start.exponent, expected.exponent)


def test_before_the_first_step_the_soft_weight_is_the_stored_one() -> None:
    state = Nupes(bits=3).start(target())
    assert torch.allclose(state.soft(0.0), state.encoding().dequantize(), atol=1e-6)


@pytest.mark.parametrize("levels", ["zero", "half"])
def test_levels_made_to_be_learned_are_those_that_are_stored(levels: str) -> None:
    state = Nupes(bits=4, levels=levels).start(target())  # type: ignore[arg-type]
    assert isinstance(state, Position)
    stored = level_values(4, levels, state.exponent().float().detach())  # type: ignore[arg-type]
    assert torch.allclose(state.values(), stored, atol=1e-6)


def test_the_exponents_gradient_is_that_of_a_finite_difference() -> None:
    state = Nupes(bits=4, levels="zero").start(target())
    assert isinstance(state, Position)
    towards = torch.randn_like(state.soft(0.0))
    (state.soft(0.0) * towards).sum().backward()
    found = float(state.log_exponent.grad)  # type: ignore[arg-type]
    code = nearest_level(state.unit, state.values().detach())

    def value(step: float) -> float:
        exponent = state.first_exponent * torch.tensor(step, dtype=torch.float64).exp()
        x = even_places(4, "zero")
        levels = x.sign() * x.abs() ** (1 / exponent)
        return float(((levels[code] * state.first_scale).view_as(towards) * towards).sum())

    assert found == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-3)


def test_exact_zeros_make_no_nan() -> None:
    given = target()
    given.weight[:, ::3] = 0
    state = Nupes(bits=3, levels="zero").start(given)
    state.soft(0.0).square().sum().backward()
    for tensors, _ in state.groups():
        for tensor in tensors:
            assert tensor.grad is not None
            assert bool(torch.isfinite(tensor.grad).all())
    assert bool((state.encoding().dequantize()[:, ::3] == 0).all())


@pytest.mark.parametrize("bits", only([3], [2, 3, 4]))
def test_learning_lowers_the_blocks_error_and_never_ends_above_powerquant(bits: int) -> None:
    _, notes = learn(Nupes(bits=bits, steps=240), target())
    assert notes["block_error"] < 0.97 * notes["block_error_start"]
    _, none = learn(Nupes(bits=bits, steps=1, learning_rate=0.9, scale_rate=0.9), target())
    assert none["block_error"] <= none["block_error_start"]


def test_a_weight_may_go_to_any_level_on_its_side_of_zero() -> None:
    state = Nupes(bits=4, levels="zero").start(target())
    assert isinstance(state, Position)
    start = state.encoding()
    assert isinstance(start, Power)
    with torch.no_grad():
        state.moves.fill_(-5.0)
    end = state.encoding()
    assert isinstance(end, Power)
    middle = 7
    assert bool((end.codes[start.codes > middle] == 14).all())
    assert bool((end.codes[start.codes < middle] == 0).all())


def test_no_weight_changes_its_sign() -> None:
    given = target()
    made, _ = learn(Nupes(bits=3, steps=60, learning_rate=0.1), given)
    assert bool((made.dequantize() * given.weight >= 0).all())


@pytest.mark.parametrize("levels", ["zero", "half"])
def test_places_start_at_powerquant_and_a_step_is_a_share_of_the_gap_to_the_next_level(levels: str) -> None:
    state = Nupes(bits=4, levels=levels, moves="grid", learning_rate=0.05).start(target())  # type: ignore[arg-type]
    assert isinstance(state, Position)
    first = state.encoding()
    assert torch.equal(first.codes, PowerQuant(bits=4, levels=levels).run(target()).encoding.codes)  # type: ignore[arg-type, union-attr]
    towards = torch.randn(16, 48)
    optimizer = torch.optim.Adam([{"params": ts, "lr": rate} for ts, rate in state.groups()[:1]])
    gaps = state.values().detach().diff()
    (state.soft(0.0) * towards).sum().backward()
    optimizer.step()
    state.after()
    up, down = torch.cat([gaps, gaps[:1] * 0]), torch.cat([gaps[:1] * 0, gaps])
    codes = first.codes.long()
    expected = 0.05 * torch.where(towards < 0, up[codes], -down[codes])
    assert torch.allclose(state.moves.detach().view(16, 48), expected, atol=1e-5)


def test_over_the_whole_grid_weights_change_their_sign_and_pass_many_levels() -> None:
    given = target()
    state = Nupes(bits=4, levels="zero", moves="grid", learning_rate=0.2).start(given)
    assert isinstance(state, Position)
    first = state.encoding()
    optimizer = torch.optim.Adam([{"params": ts, "lr": rate} for ts, rate in state.groups()[:1]])
    for _ in range(100):
        (state.soft(0.0) * given.weight.sign()).sum().backward()  # every weight is wanted on the other side
        optimizer.step()
        optimizer.zero_grad()
        state.after()
    last = state.encoding()
    assert int((last.codes.int() - first.codes.int()).abs().max()) > 7
    assert bool((last.dequantize() * given.weight <= 0).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_learning_places_lowers_the_blocks_error_too(bits: int) -> None:
    _, notes = learn(Nupes(bits=bits, steps=100, moves="grid", learning_rate=0.01, scale_rate=0.003), target())
    assert notes["block_error"] < notes["block_error_start"]


def test_the_exponent_is_learned_unless_it_is_told_to_stay() -> None:
    given = target()
    first = Nupes(bits=3).start(given).encoding().exponent
    fixed, _ = learn(Nupes(bits=3, steps=30, learn_exponent=False), given)
    free, _ = learn(Nupes(bits=3, steps=30, exponent_rate=0.02, **GENTLE), given)
    assert torch.equal(fixed.exponent, first)
    assert not torch.equal(free.exponent, first)


def test_scales_stay_when_told_to() -> None:
    given = target()
    first = Nupes(bits=3).start(given).encoding().scale
    fixed, _ = learn(Nupes(bits=3, steps=30, learn_scale=False), given)
    assert torch.equal(fixed.scale, first)


def test_the_fallback_is_powerquant_with_the_same_grid() -> None:
    pass_ = Nupes(bits=3, group_size=16, levels="half", scale_search="minmax")
    same = PowerQuant(bits=3, group_size=16, levels="half", scale_search="minmax")
    assert pass_.stand_in() == same
    assert replace(pass_, include=("*",)).stand_in().include == ("*",)
