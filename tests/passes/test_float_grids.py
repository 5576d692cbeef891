"""rtn and gptq with floats in the place of even steps: what the options say, refuse, and buy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress import ConfigError, Gptq, Override, Rtn
from compress.api.fit_options import with_options
from compress.config.options import errors_in
from compress.config.reading import parse
from compress.config.schema import schema
from compress.encodings import FloatForm, UniformForm
from compress.passes import Pass
from compress.passes.quantize.named_grids import FLOAT_GRIDS

pytestmark = pytest.mark.usefixtures("one_thread")

FP8: dict[str, Any] = {"grid": "fp8", "bits": 8}
MXFP4: dict[str, Any] = {"grid": "mxfp4", "bits": 4, "group_size": 32}
NVFP4: dict[str, Any] = {"grid": "nvfp4", "bits": 4, "group_size": 16}
EVERY = {"fp8": FP8, "fp8 tensor": {**FP8, "granularity": "tensor"}, "mxfp4": MXFP4, "nvfp4": NVFP4}
each_grid = pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))


def inputs() -> torch.Tensor:
    """Correlated: what gptq makes use of."""
    made = torch.Generator().manual_seed(2)
    return torch.randn(256, 16, generator=made) @ torch.randn(16, 64, generator=made) + torch.randn(64, generator=made)


def lost(pass_: Pass) -> float:
    x, first = inputs(), model()[0]
    weight = compress.apply(model(), [pass_], x).weights["0"].dequantize()
    return float(((weight - first.weight) @ x.T).square().sum().detach())


# --- what they do -----------------------------------------------------------------------------------------------------


@each_grid
def test_gptq_repairs_in_later_columns_what_is_lost_and_rounds_lose_no_more(
    options: dict[str, Any],
) -> None:
    nearest, repaired = lost(Rtn(**options)), lost(Gptq(**options))
    assert repaired < 0.8 * nearest
    assert lost(Gptq(**options, rounds=2)) <= repaired


@each_grid
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_with_uncorrelated_inputs_rounds_to_nearest(options: dict[str, Any], act_order: bool) -> None:
    x = torch.eye(64).repeat(2, 1) * torch.linspace(1, 2, 128)[:, None]
    found = compress.apply(model(), [Gptq(**options, act_order=act_order, include=("0",))], x).weights["0"].encoding
    alone = compress.apply(model(), [Rtn(**options, include=("0",))]).weights["0"].encoding
    assert torch.equal(found.codes, alone.codes)
    assert torch.equal(found.scale, alone.scale)


def test_scales_for_fewer_weights_lose_less_and_a_search_loses_less() -> None:
    found = {name: lost(Rtn(**options, scale_search="mse")) for name, options in EVERY.items()}
    assert found["fp8"] <= found["fp8 tensor"] < found["nvfp4"] < found["mxfp4"]
    assert found["nvfp4"] < lost(Rtn(**NVFP4))


def test_pruned_weights_stay_zero_in_codes_of_floats() -> None:
    for options in EVERY.values():
        passes = [compress.Magnitude(sparsity="2:4"), Gptq(**options)]
        for weight in compress.apply(model(), passes, inputs()).weights.values():
            assert weight.kind == "sparse-quantized"
            assert not weight.dequantize()[~weight.mask].any()


def test_blocks_share_a_scale_over_rows_and_columns_and_layers_that_they_do_not_fill_fall_back() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 96))
    block = {**FP8, "granularity": "block"}
    with pytest.raises(ConfigError, match=r"2: blocks of 128 x 128 do not fill its 96 rows and 128 columns; set fall"):
        compress.apply(layers, [Rtn(**block)])
    result = compress.apply(layers, [Rtn(**block, fallback="channel")])
    scales = {name: tuple(weight.encoding.scale.shape) for name, weight in result.weights.items()}
    assert scales == {"0": (1, 2), "2": (96, 1)}
    assert result.report.fallbacks == [
        "2: one scale per row: blocks of 128 x 128 do not fill its 96 rows and 128 columns"
    ]


@pytest.mark.parametrize("scale", ["token", "tensor"])
def test_inputs_are_rounded_to_the_numbers_that_torch_casts_to(scale: str) -> None:
    pass_ = Rtn(**FP8, activation_bits=8, activation_grid="fp8", activation_scale=scale)  # type: ignore[arg-type]
    x = inputs()
    result = compress.apply(model(), [pass_], x)
    first = result.weights["0"]
    top = x.abs().amax(-1, keepdim=True) if scale == "token" else x.abs().max()
    step = top / 448
    meant = (x / step).to(torch.float8_e4m3fn).float() * step
    assert first.inputs is not None
    assert torch.equal(first.inputs.apply(x), meant)
    assert first.inputs.apply(torch.zeros(2, 64)).eq(0).all()
    if scale == "tensor":
        assert first.inputs.apply(1e6 * x).abs().max() == pytest.approx(float(top))


@pytest.mark.parametrize("grid", FLOAT_GRIDS)
def test_the_folder_loads_says_what_it_is_and_computes_with_the_very_weights(grid: str, tmp_path: Path) -> None:
    from conftest import make_llama
    from transformers import AutoModelForCausalLM

    make_llama().save_pretrained(tmp_path / "model")
    steps = {"passes": [{"rtn": {"scheme": grid, "embeddings": grid}}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out")
    bits = {"fp8": 8.0, "mxfp4": 4.25, "nvfp4": 4.5}[grid]
    assert bits <= (report.rows[-1].bits_per_weight or 0) < bits + 0.3
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj
    assert layer.spec.form.number in str(layer)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-5, atol=1e-5)


# --- what they say ----------------------------------------------------------------------------------------------------


def read(text: str) -> Pass:
    return parse(f"passes: [{text}]").passes[0][0]


@pytest.mark.parametrize("key", ["rtn", "gptq"])
def test_a_scheme_is_short_for_grid_bits_and_group_size(key: str) -> None:
    kind = {"rtn": Rtn, "gptq": Gptq}[key]
    assert read(f"{key}: {{scheme: fp8}}") == kind(**FP8)
    assert read(f"{key}: {{scheme: mxfp4}}") == kind(**MXFP4)
    found = read(f"{key}: {{scheme: nvfp4, overrides: [{{match: '*.a', scheme: fp8}}, {{match: '*.b', grid: int}}]}}")
    assert found.at("x.c").form((64, 64)) == FloatForm(bits=4, number="e2m1", groups=4, scale_type="e4m3")
    assert found.at("x.a").form((64, 64)) == FloatForm(bits=8, number="e4m3")
    assert found.at("x.b").form((64, 64)) == UniformForm(bits=4, groups=4)


def test_a_scheme_of_floats_is_one_of_rtn_and_gptq_only() -> None:
    for text in ("flexround: {scheme: nvfp4}", "rtn: {scheme: fp9}"):
        with pytest.raises(ConfigError, match="is not bits and group size such as w4g128"):
            read(text)
    with pytest.raises(ConfigError, match=r"'fp9' is not bits .* also fp8, mxfp4, nvfp4"):
        read("rtn: {scheme: fp9}")
    patterns = {name: schema()["$defs"][name]["properties"]["scheme"]["pattern"] for name in ("Rtn", "FlexRound")}
    assert "nvfp4" in patterns["Rtn"]
    assert "nvfp4" not in patterns["FlexRound"]


def test_fit_chooses_between_floats_too() -> None:
    assert with_options(Gptq(), ["nvfp4", "fp8"])["fp8"] == Gptq(**FP8)


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        ({"grid": "fp8"}, "bits", "codes of fp8 have 8 bits, not 4; `scheme: fp8`"),
        ({"grid": "nvfp4"}, "group_size", "16 columns share a scale of nvfp4, not those of a row"),
        ({**MXFP4, "group_size": 64}, "group_size", "32 columns share a scale of mxfp4, not 64"),
        ({**NVFP4, "symmetric": True}, "symmetric", "whose codes have a sign"),
        ({**NVFP4, "overrides": (Override("*", {"bits": 8}),)}, "overrides[0].bits", "`grid: int` means even steps"),
        ({"bits": 8, "granularity": "block"}, "granularity", "the scheme fp8"),
        ({**FP8, "granularity": "block", "group_size": 128}, "group_size", "makes no sense with granularity block"),
        ({**FP8, "fallback": "channel"}, "fallback", "changes nothing without group_size"),
        ({**FP8, "activation_bits": 4, "activation_grid": "fp8"}, "activation_bits", "4 is not 8, the bits of fp8"),
    ],
    ids=str,
)
def test_impossible_options_are_named_and_say_what_would_do(options: dict[str, Any], option: str, message: str) -> None:
    (error,) = errors_in(Rtn(**options))
    assert error.option == option
    assert message in error.message
