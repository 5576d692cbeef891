"""What every quantizer onto a grid does where its group size does not divide the columns of a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress import ConfigError
from compress.passes import PASSES
from compress.passes.quantize.grid import GridOptions

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = [kind for kind in PASSES if issubclass(kind, GridOptions)]
CHEAP: dict[str, dict[str, Any]] = {key: {"steps": 3} for key in ("flexround", "adaround", "nupes", "qat")}


def quantizer(kind: Any, **options: Any) -> Any:
    return kind(bits=4, **options, **CHEAP.get(kind.key, {}))


def model() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))


def applied(pass_: Any) -> Any:
    return compress.apply(model(), [pass_], torch.randn(64, 32, generator=torch.Generator().manual_seed(1)))


def test_all_quantizers_with_groups_are_tried() -> None:
    assert {kind.key for kind in GRIDS} >= {"rtn", "gptq", "flexround", "adaround", "nupes", "powerquant"}


@pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.key)
def test_a_layer_that_the_group_size_does_not_divide_gets_one_scale_per_row_where_asked(kind: Any) -> None:
    with pytest.raises(ConfigError, match=r"2: group_size 16 does not divide its 24 columns; .* or fallback: channel"):
        applied(quantizer(kind, group_size=16))
    result = applied(quantizer(kind, group_size=16, fallback="channel"))
    groups = {name: weight.encoding.form.groups for name, weight in result.weights.items()}
    assert groups == {"0": 2, "2": 1, "4": 2}
    said = "one scale per row: group_size 16 does not divide its 24 columns"
    assert result.report.fallbacks == [f"2: {said}"]
    assert result.report.layers["2"][kind.key]["fallback"] == said
    assert "fallback" not in result.report.layers["0"][kind.key]


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"symmetric": True}], ids=str)
def test_gptq_gives_it_what_gptq_per_channel_does(options: dict[str, Any]) -> None:
    found = applied(compress.Gptq(bits=3, group_size=16, fallback="channel", include=("2",), **options))
    alone = applied(compress.Gptq(bits=3, include=("2",), **options))
    assert torch.equal(found.weights["2"].encoding.codes, alone.weights["2"].encoding.codes)
    assert torch.equal(found.weights["2"].encoding.scale, alone.weights["2"].encoding.scale)


@pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.key)
def test_it_changes_nothing_where_the_group_size_divides(kind: Any) -> None:
    for_all = quantizer(kind, group_size=8)
    plain, asked = applied(for_all), applied(replace(for_all, fallback="channel"))
    for name, weight in plain.weights.items():
        assert torch.equal(weight.encoding.codes, asked.weights[name].encoding.codes)
    assert not asked.report.fallbacks


def test_it_is_refused_without_a_group_size() -> None:
    with pytest.raises(ConfigError, match="fallback: changes nothing without group_size"):
        applied(compress.Rtn(fallback="channel"))
    sized = compress.Rtn(fallback="channel", overrides=(compress.Override("2", {"group_size": 16}),))
    assert len(applied(sized).report.fallbacks) == 1


def test_what_stands_in_for_a_pass_falls_back_too() -> None:
    unreached = nn.ModuleDict({"used": nn.Linear(24, 24), "unused": nn.Linear(24, 24)})
    unreached.forward = lambda x: unreached["used"](x)
    for pass_ in (compress.Gptq(bits=4, group_size=16, fallback="channel", include=("unused", "used")),):
        result = compress.apply(unreached, [pass_], torch.randn(8, 24))
        assert result.weights["unused"].encoding.form.groups == 1
        (said,) = [text for text in result.report.fallbacks if text.startswith("unused")]
        assert said.startswith("unused: rtn instead of gptq")
        assert said.endswith("one scale per row: group_size 16 does not divide its 24 columns")
