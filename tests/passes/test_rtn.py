"""Round to nearest."""

import pytest
import torch
from textbook import mask, target, weight

from compress.config.options import errors_in
from compress.encodings import fit, quantize
from compress.passes import Rtn

OPTIONS = [{}, {"bits": 3, "group_size": 16}, {"bits": 8, "granularity": "tensor"}, {"symmetric": True}, {"bits": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_rtn_is_the_uniform_grid_and_nothing_else(options: dict[str, object], search: str) -> None:
    w = weight(8, 64)
    pass_ = Rtn(scale_search=search, **options)
    edit = pass_.run(target(w))
    e = edit.encoding
    groups = 1 if pass_.group_size is None else 64 // pass_.group_size
    scale, zero = fit(
        w,
        pass_.bits,
        groups=groups,
        per_tensor=pass_.granularity == "tensor",
        symmetric=pass_.symmetric,
        search=search,
    )
    assert torch.equal(e.scale, scale)
    assert torch.equal(e.zero_point, zero)
    assert torch.equal(e.codes, quantize(w, scale, zero, pass_.bits))
    assert (e.bits, e.symmetric) == (pass_.bits, pass_.symmetric)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rtn_keeps_masked_weights_at_zero(options: dict[str, object]) -> None:
    kept = mask(8, 64)
    edit = Rtn(**options).run(target(weight(8, 64), kept=kept))
    assert torch.equal(edit.mask, kept)
    assert bool((edit.encoding.dequantize()[~kept] == 0).all())


def test_rtn_needs_no_data_and_is_its_own_fallback() -> None:
    pass_ = Rtn(bits=3)
    assert pass_.needs == "none"
    assert pass_.stand_in() == pass_


def test_rounding_again_changes_nothing() -> None:
    w = weight(8, 64)
    once = Rtn(bits=4, group_size=16).run(target(w)).encoding
    twice = Rtn(bits=4, group_size=16).run(target(once.dequantize())).encoding
    assert torch.allclose(once.dequantize(), twice.dequantize(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"granularity": "group"}, "granularity"),
        ({"granularity": "channel", "group_size": 8}, "group_size"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], option: str) -> None:
    assert [e.option for e in errors_in(Rtn(**options))] == [option]


def test_a_group_size_that_does_not_divide_says_which_would() -> None:
    assert Rtn(group_size=16).check_shape((8, 64)) is None
    assert "16, 32 would" in Rtn(group_size=64).check_shape((8, 96))
