"""rtn and gptq with super-blocks in the place of groups: what the options say, refuse, and buy."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from torch import nn

import compress
from compress import ConfigError, Gptq, Override, Rtn
from compress.api.fit_options import with_options
from compress.config.options import errors_in
from compress.config.reading import parse
from compress.config.schema import schema
from compress.encodings import SuperBlockForm, UniformForm, super_scales
from compress.encodings.super_blocks import KINDS
from compress.models import graph
from compress.passes import Pass
from compress.planning import plan

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY: dict[str, dict[str, Any]] = {
    name: {"grid": name, "bits": kind.bits, "group_size": kind.columns} for name, kind in KINDS.items()
}
Q4 = EVERY["q4_k"]


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(512, 24), nn.ReLU(), nn.Linear(24, 16))


def inputs() -> torch.Tensor:
    """Correlated: what gptq makes use of."""
    made = torch.Generator().manual_seed(2)
    return torch.randn(640, 64, generator=made) @ torch.randn(64, 512, generator=made) + 1


def applied(pass_: Pass, x: torch.Tensor) -> Any:
    return compress.apply(model(), [pass_], x).weights["0"].encoding


def lost(encoding: Any) -> float:
    return float(((encoding.dequantize() - model()[0].weight) @ inputs().T).square().sum().detach())


# --- what they do -----------------------------------------------------------------------------------------------------


def test_gptq_repairs_in_later_columns_what_is_lost_and_rounds_lose_no_more() -> None:
    for options in (EVERY["q2_k"], EVERY["q6_k"]):
        alone: dict[str, Any] = {"include": ("0",), "scale_search": "weighted", **options}
        nearest = lost(applied(Rtn(**{**alone, "scale_search": "mse"}), inputs()))
        repaired, in_order = (lost(applied(Gptq(**alone, act_order=each), inputs())) for each in (True, False))
        assert max(repaired, in_order) < 0.5 * nearest
        assert lost(applied(Gptq(**alone, rounds=1), inputs())) <= repaired


def test_gptq_with_uncorrelated_inputs_rounds_to_nearest() -> None:
    for options, act_order in product((EVERY["q3_k"], Q4), (True, False)):
        x = torch.eye(512).repeat(2, 1) * torch.linspace(1, 2, 1024)[:, None]
        found = applied(Gptq(**options, act_order=act_order, include=("0",)), x)
        alone = applied(Rtn(**options, include=("0",)), x)
        assert torch.equal(found.dequantize(), alone.dequantize())


def test_in_order_scales_are_fitted_to_the_weights_as_they_stand_when_their_super_block_begins() -> None:
    x, weight = inputs(), model()[0].weight.detach()
    found = applied(Gptq(**Q4, act_order=False, damping=0.1, include=("0",)), x)
    beforehand, _ = super_scales.fit(weight, "q4_k")
    assert torch.equal(found.scale.of()[:, :8], beforehand.of()[:, :8])
    assert not torch.equal(found.scale.of()[:, 8:], beforehand.of()[:, 8:])
    gram = (x.T @ x).double()
    gram.diagonal().add_(0.1 * gram.diagonal().mean())
    first, second = slice(0, 256), slice(256, 512)
    made_up = torch.linalg.solve(gram[second, second], gram[second, first])  # what the second block makes up for
    left = (weight.double() - found.dequantize().double())[:, first] @ made_up.T
    now, _ = super_scales.fit((weight.double()[:, second] + left).float(), "q4_k")
    assert torch.allclose(found.scale.of()[:, 8:], now.of(), rtol=2e-2)


def test_pruned_weights_stay_zero_in_super_blocks() -> None:
    for name in ("q4_k", "q6_k"):
        for quantizer in (Rtn(**EVERY[name], include=("0",)), Gptq(**EVERY[name], include=("0",), rounds=1)):
            made = compress.apply(model(), [compress.Magnitude(sparsity="2:4"), quantizer], inputs()).weights["0"]
            assert made.kind == "sparse-quantized"
            assert not made.dequantize()[~made.mask].any()


def test_a_layer_that_super_blocks_do_not_fill_is_refused_or_gets_even_steps() -> None:
    with pytest.raises(ConfigError, match=r"2: super-blocks of 256 do not fill its 24 columns, .* fallback: channel"):
        compress.apply(model(), [Rtn(**Q4)])
    for pass_ in (Rtn(**Q4, fallback="channel"), Gptq(**Q4, fallback="channel")):
        result = compress.apply(model(), [pass_], inputs())
        assert result.weights["0"].encoding.form == SuperBlockForm(bits=4, kind="q4_k")
        assert result.weights["2"].encoding.form == UniformForm(bits=4, symmetric=True)
        said = "2: even steps, one scale per row: super-blocks of 256 do not fill its 24 columns"
        assert result.report.fallbacks == [said]
    with pytest.raises(ConfigError, match="scheme: w4g32, with even steps, would fit"):
        compress.apply(nn.Sequential(nn.Linear(96, 8)), [Rtn(**Q4)])


def test_the_folder_loads_says_what_it_is_and_takes_the_bytes_that_the_plan_shows(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = make_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    made.save_pretrained(tmp_path / "model")
    steps = parse("passes: [{rtn: {scheme: q4_k, embeddings: q6_k, overrides: [{match: '*.v_proj', scheme: q6_k}]}}]")
    found = graph.find(made)
    shown = plan.make(steps, found, {name: tensor.dtype for name, tensor in found.tensors()})
    report = compress.run(steps, tmp_path / "model", tmp_path / "out")
    assert shown.final_bytes == report.rows[-1].bytes
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    attention = loaded.model.layers[0].self_attn
    for layer, kind in ((attention.q_proj, "q4_k"), (attention.v_proj, "q6_k")):
        assert layer.spec.form.kind == kind
        assert kind in str(layer)
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-5, atol=1e-5)


# --- what they say ----------------------------------------------------------------------------------------------------


def test_a_scheme_is_short_for_grid_bits_and_group_size() -> None:
    for name, options in EVERY.items():
        assert parse(f"passes: [rtn: {{scheme: {name}}}]").passes[0][0] == Rtn(**options)
        assert parse(f"passes: [gptq: {{scheme: {name}}}]").passes[0][0] == Gptq(**options)
    text = "rtn: {scheme: q4_k, overrides: [{match: '*.a', scheme: q6_k}, {match: '*.b', scheme: w4g64}]}"
    with pytest.raises(ConfigError, match="group_size: 32 columns share a scale of q4_k, not 64"):
        parse(f"passes: [{text}]")


def test_a_scheme_of_super_blocks_is_one_of_rtn_and_gptq_only() -> None:
    with pytest.raises(ConfigError, match="is not bits and group size such as w4g128"):
        parse("passes: [flexround: {scheme: q4_k}]")
    patterns = {name: schema()["$defs"][name]["properties"]["scheme"]["pattern"] for name in ("Rtn", "FlexRound")}
    assert "q4_k" in patterns["Rtn"]
    assert "q4_k" not in patterns["FlexRound"]
    assert with_options(Gptq(), ["q4_k", "q6_k"])["q6_k"] == Gptq(**EVERY["q6_k"])


def test_impossible_options_are_named_and_say_what_would_do() -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"grid": "q5_k", "group_size": 32}, "bits", "codes of q5_k have 5 bits, not 4; `scheme: q5_k`"),
        ({"grid": "q4_k"}, "group_size", "32 columns share a scale of q4_k, not those of a row"),
        ({**Q4, "symmetric": True}, "symmetric", "which says itself where steps begin"),
        ({**Q4, "granularity": "channel"}, "group_size", "makes no sense with granularity channel"),
        ({**Q4, "overrides": (Override("*", {"bits": 6}),)}, "overrides[0].bits", "`grid: int` means even steps"),
    ]
    for options, option, message in cases:
        (error,) = errors_in(Rtn(**options))
        assert error.option == option
        assert message in error.message
