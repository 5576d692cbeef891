"""PowerQuant with one exponent for a whole model or for each of its blocks."""

import math
from collections import Counter

import pytest
import torch
from textbook import mask, target, weight
from torch import Tensor

import compress
from compress.config.options import errors_in
from compress.encodings import Power
from compress.passes import Override, PowerQuant, PowerQuantShared
from compress.passes.base import Target, Whole


def made(pass_: PowerQuantShared, weights: dict[str, Tensor], kept: Tensor | None = None) -> dict[str, Power]:
    found = pass_.run(Whole(tuple(weights), lambda name: target(weights[name], kept=kept)))
    encodings = {name: edit.encoding for name, edit in found}
    assert all(isinstance(e, Power) for e in encodings.values())
    return encodings  # type: ignore[return-value]


def layers() -> dict[str, Tensor]:
    """Layers that alone would choose quite different exponents."""
    return {
        "model.layers.0.q": weight(8, 64, 0),
        "model.layers.0.mlp.0": weight(8, 64, 1) ** 3,
        "model.layers.1.q": torch.rand(8, 64, generator=torch.Generator().manual_seed(2)) - 0.5,
        "head": weight(8, 64, 3) ** 5,
    }


@pytest.mark.parametrize("options", [{}, {"bits": 3, "levels": "half"}, {"scale_search": "minmax"}], ids=str)
def test_one_exponent_for_all_is_one_exponent(options: dict[str, object]) -> None:
    found = made(PowerQuantShared(**options), layers())
    assert len({float(e.exponent) for e in found.values()}) == 1
    assert len({e.levels for e in found.values()}) == 1
    alone = {float(made(PowerQuantShared(**options), {n: w})[n].exponent) for n, w in layers().items()}
    assert len(alone) == 4


def test_a_block_is_what_agrees_up_to_the_first_number_of_the_name() -> None:
    found = made(PowerQuantShared(share="block"), layers())
    exponents = {name: float(e.exponent) for name, e in found.items()}
    assert exponents["model.layers.0.q"] == exponents["model.layers.0.mlp.0"]
    assert len(set(exponents.values())) == 3
    block = made(PowerQuantShared(), {n: w for n, w in layers().items() if ".0." in n})
    assert float(block["model.layers.0.q"].exponent) == exponents["model.layers.0.q"]


@pytest.mark.parametrize("share", ["global", "block"])
def test_layers_come_out_in_order_with_all_else_as_in_powerquant(share: str) -> None:
    weights, kept = layers(), mask(8, 64)
    found = made(PowerQuantShared(bits=3, group_size=16, share=share), weights, kept)
    assert list(found) == list(weights)
    for name, e in found.items():
        single = PowerQuant(bits=3, group_size=16, exponent=float(e.exponent), levels=e.levels)
        expected = single.run(target(weights[name], kept=kept)).encoding
        assert torch.equal(e.codes, expected.codes)
        assert torch.equal(e.scale, expected.scale)


def test_the_shared_exponent_has_the_least_sum_of_norms() -> None:
    weights = layers()
    options = {"levels": "zero", "scale_search": "minmax", "norm": 2.0}

    def total(encodings: dict[str, Power]) -> float:
        return sum(math.sqrt(float((e.dequantize() - weights[n]).square().sum())) for n, e in encodings.items())

    found = made(PowerQuantShared(**options), weights)
    for exponent in (k / 20 for k in range(2, 31)):
        other = {n: PowerQuant(exponent=exponent, **options).run(target(w)).encoding for n, w in weights.items()}
        assert total(found) <= total(other) * 1.002


@pytest.mark.parametrize("share", ["global", "block"])
def test_every_layer_is_read_twice_and_one_at_a_time(share: str) -> None:
    weights, read = layers(), Counter[str]()

    def load(name: str) -> Target:
        read[name] += 1
        return target(weights[name])

    edits = PowerQuantShared(share=share).run(Whole(tuple(weights), load))
    next(edits)
    assert sum(read.values()) == (5 if share == "global" else 3)
    list(edits)
    assert set(read.values()) == {2}


def test_options_of_single_layers_are_refused() -> None:
    pass_ = PowerQuantShared(overrides=(Override("*.q", {"bits": 3}),))
    assert [e.option for e in errors_in(pass_)] == ["overrides"]


def test_a_model_in_memory_is_compressed_with_one_exponent() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 32))
    for share, count in (("global", 1), ("block", 2)):
        result = compress.apply(model, [PowerQuantShared(bits=3, share=share)])
        assert {w.kind for w in result.weights.values()} == {"quantized"}
        assert len({float(w.encoding.exponent) for w in result.weights.values()}) == count
