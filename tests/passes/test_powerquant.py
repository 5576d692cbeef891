"""PowerQuant: an exponent for each matrix."""

import pytest
import torch
from textbook import mask, target, weight
from torch import Tensor

import compress
from compress.config.options import errors_in
from compress.encodings import Power, Weight
from compress.encodings.power import PowerGrid, fit_exponent, fit_scale, nearest, profile
from compress.passes import Override, PowerQuant, Rtn
from compress.passes.base import Edit, Target

OPTIONS = [
    {},
    {"bits": 3, "group_size": 16, "levels": "zero"},
    {"bits": 8, "granularity": "tensor", "norm": 2.0},
    {"bits": 2, "levels": "half", "scale_search": "minmax"},
    {"exponent": 0.5},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def power(edit: Edit) -> Power:
    assert isinstance(edit.encoding, Power)
    return edit.encoding


def error(e: Power, w: Tensor, norm: float = 2.0) -> float:
    return float((e.dequantize() - w).abs().double().pow(norm).sum())


@each_option
@pytest.mark.parametrize("masked", [False, True])
def test_powerquant_is_the_fitted_grid_and_nothing_else(options: dict[str, object], masked: bool) -> None:
    pass_, kept = PowerQuant(**options), mask(8, 64) if masked else None
    given = target(weight(8, 64), kept=kept)
    cut = {"groups": 64 // (pass_.group_size or 64), "per_tensor": pass_.granularity == "tensor", "mask": kept}
    seen = [profile(given.weight, norm=pass_.norm, **cut)]
    fit = {"search": pass_.scale_search, "norm": pass_.norm}
    fitted = {
        levels: fit_exponent(seen, pass_.bits, levels, exponent=pass_.exponent, **fit)
        for levels in ("zero", "half")
        if pass_.levels in ("auto", levels)
    }
    levels = min(fitted, key=lambda name: fitted[name][1])
    grid = PowerGrid(pass_.bits, fitted[levels][0], levels)
    expected = nearest(given.weight, fit_scale(given.weight, grid, **cut, **fit), grid, kept)
    edit = pass_.run(given)
    for leaf in ("codes", "scale", "exponent"):
        assert torch.equal(getattr(power(edit), leaf), getattr(expected, leaf))
    assert (power(edit).bits, power(edit).levels) == (pass_.bits, levels)
    assert edit.notes["exponent"] == pytest.approx(float(expected.exponent))


@each_option
def test_its_form_is_known_beforehand_but_for_the_layout(options: dict[str, object]) -> None:
    pass_ = PowerQuant(**options)
    e = power(pass_.run(target(weight(8, 64))))
    assert e.form.tables((8, 64)) == pass_.form((8, 64)).tables((8, 64))
    assert (e.form.bits, e.form.groups, e.form.per_tensor) == (
        pass_.bits,
        64 // (pass_.group_size or 64),
        pass_.granularity == "tensor",
    )


@each_option
def test_masked_weights_stay_zero(options: dict[str, object]) -> None:
    kept = mask(8, 64)
    edit = PowerQuant(**options).run(target(weight(8, 64), kept=kept))
    assert torch.equal(edit.mask, kept)
    assert bool((Weight(mask=edit.mask, encoding=edit.encoding).dequantize()[~kept] == 0).all())


def test_it_needs_no_data_and_is_its_own_fallback() -> None:
    pass_ = PowerQuant(bits=3)
    assert pass_.needs == "none"
    assert pass_.stand_in() == pass_


def test_a_given_exponent_is_used() -> None:
    assert float(power(PowerQuant(exponent=0.42).run(target(weight(8, 64)))).exponent) == pytest.approx(0.42)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_auto_takes_the_layout_with_the_lower_error(bits: int, search: str) -> None:
    full = weight(8, 128)
    chosen = set()
    for w in (full, full * mask(8, 128, share=0.7)):  # the second has many zeros, and no mask that says so
        found = {
            levels: power(PowerQuant(bits=bits, levels=levels, scale_search=search).run(target(w)))
            for levels in ("auto", "zero", "half")
        }
        best = min(("zero", "half"), key=lambda levels: error(found[levels], w, 2.4))
        assert found["auto"].levels == best
        chosen.add(best)
    assert chosen == {"zero", "half"}


def test_under_a_mask_the_removed_zeros_do_not_ask_for_a_zero_level() -> None:
    kept = mask(8, 128, share=0.7)
    w = weight(8, 128)
    assert power(PowerQuant(bits=3).run(target(w, kept=kept))).levels == "half"
    assert power(PowerQuant(bits=3).run(target(w * kept))).levels == "zero"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searching_exponent_layout_and_range_each_lowers_the_error(bits: int) -> None:
    w = weight(16, 256)
    steps: list[dict[str, object]] = [
        {"exponent": 1.0, "levels": "zero", "scale_search": "minmax"},
        {"levels": "zero", "scale_search": "minmax"},
        {"scale_search": "minmax"},
        {},
    ]
    errors = [error(power(PowerQuant(bits=bits, **options).run(target(w))), w, 2.4) for options in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[2] < errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_normal_weights_are_rounded_better_than_by_rtn_in_fewer_bits(bits: int, search: str) -> None:
    w = weight(32, 256)
    mine = PowerQuant(bits=bits).run(target(w)).encoding
    other = Rtn(bits=bits, scale_search=search).run(target(w)).encoding
    assert mine.bits_per_weight <= other.bits_per_weight
    assert float((mine.dequantize() - w).norm()) < float((other.dequantize() - w).norm())


def test_rounding_again_changes_little() -> None:
    once = power(PowerQuant(scale_search="minmax").run(target(weight(8, 64))))
    again = PowerQuant(scale_search="minmax", exponent=float(once.exponent), levels=once.levels)
    twice = power(again.run(target(once.dequantize())))
    assert torch.equal(once.codes, twice.codes)
    assert torch.allclose(once.dequantize(), twice.dequantize(), rtol=1e-3)


def test_overrides_give_single_layers_other_levels() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 32))
    pass_ = PowerQuant(bits=3, overrides=(Override("1", {"bits": 5, "exponent": 0.5}),))
    found = compress.apply(model, [pass_]).weights
    assert [found[name].encoding.form.bits for name in ("0", "1")] == [3, 5]
    assert float(found["1"].encoding.exponent) == 0.5


@pytest.mark.real
def test_the_demo_model_with_its_last_block_rounded_stays_nearer_to_the_original_than_with_rtn() -> None:
    model, tokenizer = compress.demo.load()
    tokens = compress.load_tokens("demo", tokenizer, samples=2, length=256, split="evaluation")
    last = {"bits": 3, "include": ("*.5.*",)}
    passes = (PowerQuant(**last), Rtn(**last), Rtn(**last, scale_search="mse"))
    mine, *others = (compress.apply(model, [p], evaluation=tokens).report.rows[-1] for p in passes)
    for other in others:
        assert mine.kl < 0.9 * other.kl
        assert mine.bits_per_weight < other.bits_per_weight


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"bits": 1}, "bits"),
        ({"exponent": 0.05}, "exponent"),
        ({"exponent": 1.6}, "exponent"),
        ({"norm": 0.0}, "norm"),
        ({"granularity": "channel", "group_size": 8}, "group_size"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], option: str) -> None:
    assert [e.option for e in errors_in(PowerQuant(**options))] == [option]


def test_a_layer_of_zeros_is_rounded_to_zeros() -> None:
    edit = PowerQuant(bits=2).run(Target(torch.zeros(4, 12)))
    assert power(edit).defect() is None
    assert bool((power(edit).dequantize() == 0).all())
