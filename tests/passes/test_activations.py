"""The options by which a quantizer rounds inputs too, and what calibration remembers for them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import compress
from compress.calibration import ranges
from compress.calibration.ranges import Range
from compress.calibration.statistics import Statistics
from compress.config.options import errors_in
from compress.config.reading import parse
from compress.encodings import InputForm, Weight
from compress.errors import ConfigError
from compress.passes import PASSES, ModelPass, Override, Pass, Rtn
from compress.passes.interface import Edit
from compress.passes.quantize.activations import ActivationOptions, attached

QUANTIZERS = [cls for cls in PASSES if cls().form((8, 8)) is not None]
each_quantizer = pytest.mark.parametrize("cls", QUANTIZERS, ids=lambda cls: cls.key)
STATIC = {"activation_bits": 8, "activation_scale": "tensor"}


def problems(pass_: Pass) -> list[str]:
    return [e.option for e in errors_in(pass_)]


# --- options ----------------------------------------------------------------------------------------------------------


def test_every_pass_that_makes_codes_has_the_options() -> None:
    assert [cls for cls in PASSES if issubclass(cls, ActivationOptions)] == QUANTIZERS
    assert len(QUANTIZERS) >= 6


@each_quantizer
def test_by_default_inputs_are_left_alone(cls: type[ActivationOptions]) -> None:
    assert cls().input_form() is None
    assert attached(cls(), Weight(torch.zeros(2, 2)), Edit(), None)[0].inputs is None


@each_quantizer
def test_dynamic_grids_need_no_calibration_and_static_ones_do(cls: type[ActivationOptions]) -> None:
    plain = cls()
    dynamic = replace(plain, activation_bits=4)
    assert dynamic.calibrated == plain.calibrated
    assert not dynamic.ranged
    static = replace(plain, **STATIC)
    if issubclass(cls, ModelPass):
        assert problems(static) == ["activation_scale"]
    else:
        assert static.calibrated
        assert static.ranged
        assert problems(static) == []


def test_a_static_grid_of_one_layer_alone_needs_calibration_too() -> None:
    pass_ = Rtn(activation_bits=8, overrides=(Override("*.a", {"activation_scale": "tensor"}),))
    assert pass_.calibrated
    assert pass_.at("x.a").input_form() == InputForm(bits=8, scale="tensor")
    assert pass_.at("x.b").input_form() == InputForm(bits=8)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"activation_bits": 1}, "activation_bits"),
        ({"activation_bits": 9}, "activation_bits"),
        ({"activation_bits": 6, "activation_grid": "olive", "activation_scale": "tensor"}, "activation_bits"),
        ({"activation_bits": 4, "activation_grid": "olive"}, "activation_scale"),
        ({"activation_scale": "tensor"}, "activation_scale"),
        ({"activation_grid": "olive"}, "activation_grid"),
        ({"activation_bits": 8, "overrides": (Override("*", {"activation_bits": 0}),)}, "overrides[0].activation_bits"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, object], option: str) -> None:
    assert problems(Rtn(**options)) == [option]  # type: ignore[arg-type]


def test_an_override_may_leave_the_inputs_of_some_layers_alone() -> None:
    pass_ = Rtn(**STATIC, overrides=(Override("*.down_proj", {"activation_bits": None}),))  # type: ignore[arg-type]
    assert problems(pass_) == []
    assert pass_.at("0.down_proj").input_form() is None
    assert pass_.at("0.up_proj").input_form() is not None


def test_a_pipeline_file_names_the_place_of_a_mistake() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("passes:\n  - rtn:\n      activation_bits: 4\n      activation_grid: olive\n")
    assert [(p.path, p.line) for p in caught.value.problems] == [("passes[0].rtn.activation_scale", 2)]
    assert "tensor" in caught.value.problems[0].message


def test_a_layer_that_nothing_ever_reached_keeps_its_inputs_and_the_report_says_so() -> None:
    weight, notes = attached(Rtn(**STATIC), Weight(torch.zeros(2, 2)), Edit(), None)  # type: ignore[arg-type]
    assert weight.inputs is None
    assert "none ever reached it" in notes["fallback"]


def test_a_static_grid_without_calibration_data_is_refused_before_any_work() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="rtn learns from data, and `calibration:` is missing"):
        compress.apply(model, [Rtn(**STATIC)])  # type: ignore[arg-type]
    assert compress.apply(model, [Rtn(activation_bits=8)]).weights["0"].inputs is not None


# --- what calibration remembers ---------------------------------------------------------------------------------------


def seen(parts: list[Tensor]) -> Range:
    found = Range()
    for part in parts:
        found.update(part)
    return found


def numbered(count: int, channels: int = 8) -> Tensor:
    """Tokens that hold their own number."""
    return torch.arange(float(count))[:, None].expand(-1, channels).clone()


def test_the_extremes_are_those_of_everything_and_include_zero() -> None:
    x = torch.randn(100, 8)
    found = seen([x[:30], x[30:].view(7, 10, 8)])
    assert (found.low, found.high) == (float(x.min()), float(x.max()))
    assert (seen([x.abs() + 1]).low, seen([-x.abs() - 1]).high) == (0, 0)


def test_the_sample_is_bounded_spread_evenly_and_the_same_however_the_data_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranges, "MOST_NUMBERS", 8 * 50)
    x = numbered(1000)
    whole = seen([x]).sample
    assert 25 < len(whole) <= 50
    gaps = whole[1:, 0] - whole[:-1, 0]
    assert len(gaps.unique()) == 1
    assert float(whole[-1, 0] + gaps[0]) >= 1000
    for cuts in ([7] * 142 + [6], [1, 499, 500], [250] * 4):
        assert torch.equal(seen(list(torch.split(x, cuts))).sample, whole)


def test_a_sample_of_few_tokens_is_all_of_them() -> None:
    x = torch.randn(5, 6, 8)
    assert torch.equal(seen([x]).sample, x.view(30, 8))


def test_tokens_wider_than_the_whole_sample_still_leave_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "MOST_NUMBERS", 4)
    assert torch.equal(seen([numbered(20)]).sample, numbered(1))


def test_what_is_kept_does_not_change_with_the_tensor_it_came_from() -> None:
    x = torch.randn(10, 8)
    before = x.clone()
    found = seen([x])
    x.zero_()
    assert torch.equal(found.sample, before)


def test_a_grid_is_fitted_once_and_again_after_more_was_seen() -> None:
    form = InputForm(bits=8, scale="tensor")
    found = seen([torch.ones(2, 2)])
    first = found.grid(form)
    assert found.grid(form) is first
    found.update(torch.full((2, 2), 5.0))
    assert float(found.grid(form).scale) == pytest.approx(5 * float(first.scale))  # type: ignore[arg-type]


def test_statistics_have_no_range_unless_asked() -> None:
    assert Statistics(4, "norm").range is None
